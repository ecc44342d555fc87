"""The model process as the supervisor sees it: how long it may take, and what it reported when it was loaded."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from edge_agent.config import WatchdogConfig
from edge_agent.ipc.worker import Worker
from edge_agent.supervisor.managed_worker import Clock, ManagedWorker, Readiness, Reason, ReasonKind
from edge_agent.supervisor.shutdown import Shutdown
from edge_agent.time_units import NS_PER_S

MAX_FAILURES_BEFORE_READY = 5  # in a row; then the daemon ends, and systemd starts everything again
STALL_FACTOR = 3  # the stall limit is at least this many times the duration of a usual frame
RECENT_FRAMES = 16  # what counts as usual: the longest of these, and no more than the warm-up frame
# A model that refuses the instruction in force is started again after this time: memory is planned anew at each start,
# and with more of it free the instruction may fit again.
REFUSED_RETRY_S = 30.0


class ModelWorker(ManagedWorker):
    """Owns the model process."""

    def __init__(self, config: WatchdogConfig, launch: Callable[[], Worker], clock: Clock = time.monotonic_ns) -> None:
        super().__init__("model", launch, clock)
        self.config = config
        self.vision_backend = self.language_backend = ""  # what really runs
        self.warmup_s = 0.0  # duration of the warm-up frame
        self._frames_s: deque[float] = deque(maxlen=RECENT_FRAMES)  # durations of the newest answered frames
        self.memory_reduced = False  # the memory plan reduced the configuration at this start
        self._refused_ns = 0

    @property
    def is_loaded(self) -> bool:
        """Whether the process takes instructions."""
        return self.readiness in (Readiness.READY, Readiness.REFUSED)

    @property
    def slowest_frame_s(self) -> float:
        """A frame that takes longer than this is a stall.

        The warm-up frame can be slow by accident: pages come from a disk, TensorRT makes an engine. So can one frame.
        """
        return STALL_FACTOR * min(self.warmup_s, max(self._frames_s, default=self.warmup_s))

    @property
    def stall_s(self) -> float:
        """Without progress for this time, the process is stalled."""
        return max(self.config.model_stall_s, self.slowest_frame_s) if self.is_loaded else self.config.model_load_s

    def note_warmup(self, duration_s: float) -> None:
        """The process is loaded. duration_s: of its warm-up frame."""
        self.warmup_s = duration_s
        self._frames_s.clear()

    def note_frame(self, duration_s: float) -> bool:
        """A frame was answered. Whether the stall limit has changed."""
        before_s = self.stall_s
        self._frames_s.append(duration_s)
        return self.stall_s != before_s

    def mark_refused(self, error: str) -> None:
        """The process is loaded, and refuses the instruction in force."""
        what = "the model refuses the instruction"
        reason = Reason("model", ReasonKind.REFUSED, what, f"{error}; send another instruction")
        self.record_fault(reason)
        self.readiness, self.reason = Readiness.REFUSED, reason
        self.failures_before_ready, self._was_ready = 0, True
        self._refused_ns = self.clock()

    def timeout_reason(self) -> Reason | None:
        """Why the process must be started again; None: it need not."""
        if self.has_no_progress_for(self.stall_s):
            return Reason("model", ReasonKind.STALLED, "stalled", f"no progress in {self.stall_s:g} s")
        if self.readiness is Readiness.REFUSED and self.clock() - self._refused_ns > REFUSED_RETRY_S * NS_PER_S:
            return self.reason
        return None

    def shut_down_after_failures(self) -> None:
        """Raises Shutdown when too many consecutive processes never got ready."""
        n = self.failures_before_ready
        if n > MAX_FAILURES_BEFORE_READY:
            why = self.reason.text if self.reason is not None else "model: failed"
            raise Shutdown("process", f"{why}; {n} model processes in a row did not get ready")
