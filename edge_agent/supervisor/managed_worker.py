"""One worker over its restarts: how ready it is, why it delivers nothing, when it starts again, and which killed
processes of it are still dying.

Nothing here waits for a process. A killed process that hangs in a driver call stays on a list, which reap() checks once
per turn; its successor is started meanwhile.
"""

from __future__ import annotations

import contextlib
import enum
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from edge_agent.board import health
from edge_agent.ipc.backoff import Backoff
from edge_agent.ipc.worker import Worker
from edge_agent.supervisor.child_log import ChildLog
from edge_agent.supervisor.log import log_line
from edge_agent.time_units import NS_PER_S
from edge_agent.wire.messages import WorkerStatus

FIRST_PAUSE_S, MAX_PAUSE_S = 0.2, 5.0
STUCK_AFTER_NS = 1 * NS_PER_S  # a killed process that is still there after this is reported in the log

Clock = Callable[[], int]  # CLOCK_MONOTONIC in nanoseconds


class Readiness(enum.Enum):
    """What one worker can do now."""

    STARTING = enum.auto()  # the process runs and cannot deliver yet, or it is the first and was not started yet
    READY = enum.auto()  # camera: the source was opened; model: frames are answered under the instruction in force
    REFUSED = enum.auto()  # model only: it is loaded, and refuses the instruction in force
    RESTARTING = enum.auto()  # no process; the next one starts at restart_at_ns
    ENDED = enum.auto()  # camera only: the source has ended; no process, and none will be started


class ReasonKind(enum.Enum):
    """Which kind of reason it is; the daemon's state depends on it."""

    STARTING = enum.auto()
    FAILED = enum.auto()  # the process ended, could not start, or sent an invalid event
    STALLED = enum.auto()  # no progress in the allowed time
    REFUSED = enum.auto()  # the model refuses the instruction in force
    SOURCE = enum.auto()  # the camera process reports a fault of its source
    ENDED = enum.auto()  # the camera's source has ended
    NO_FRAME = enum.auto()  # the camera process is well, and delivers nothing
    NO_ACTION = enum.auto()  # the model answers, and every answer is refused
    PAUSED = enum.auto()  # by control


@dataclass(frozen=True)
class Reason:
    """Why a worker, or the whole daemon, delivers nothing."""

    worker: str  # "camera", "model", or "" for the daemon
    kind: ReasonKind
    what: str  # a few words; the same failure always has the same words
    detail: str = ""  # may change from one moment to the next

    @property
    def key(self) -> str:
        """What counts as the same fault: "model: killed by SIGKILL"."""
        return f"{self.worker}: {self.what}" if self.worker else self.what

    @property
    def text(self) -> str:
        """One line for people."""
        return f"{self.key}: {self.detail}" if self.detail else self.key


@dataclass
class _Dying:
    """A process that was killed and still exists."""

    worker: Worker
    killed_ns: int
    logged: bool = False


class ManagedWorker:
    """Starts, kills and restarts the process of one kind."""

    def __init__(self, name: str, launch: Callable[[], Worker], clock: Clock = time.monotonic_ns) -> None:
        """name: "camera" or "model". launch: starts a process. clock: monotonic time in nanoseconds."""
        self.name, self.clock = name, clock
        self._launch = launch
        self.worker: Worker | None = None
        self.readiness = Readiness.STARTING
        self.reason: Reason | None = Reason(name, ReasonKind.STARTING, "starting")
        self.faults: Counter[str] = Counter()
        self.failures_before_ready = 0  # consecutive processes that never got ready
        self.last_progress_ns = 0
        self.restart_at_ns = 0
        self._starts = 0
        self._was_ready = False  # the current process
        self._backoff = Backoff(FIRST_PAUSE_S, MAX_PAUSE_S)
        self._dying: list[_Dying] = []
        self._log = ChildLog(name, clock)

    # -- one process after the other ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start a process. If the system cannot (no memory, no descriptors), try again after a pause."""
        self._was_ready = False
        self._log = ChildLog(self.name, self.clock)
        try:
            self.worker = self._launch()
        except OSError as error:
            self.restart_after_fault(
                Reason(self.name, ReasonKind.FAILED, "cannot be started", error.strerror or str(error))
            )
            return
        self.readiness = Readiness.STARTING
        self.last_progress_ns = self.clock()
        self._starts += 1

    def start_if_due(self) -> None:
        """Start the next process when the pause after a failure is over."""
        if self.readiness is Readiness.RESTARTING and self.clock() >= self.restart_at_ns:
            self.start()

    def mark_ready(self) -> None:
        self.readiness, self.reason = Readiness.READY, None
        self.failures_before_ready, self._was_ready = 0, True

    def note_success(self) -> None:
        """Note that a frame was delivered or answered. See Backoff.note_success."""
        self._backoff.note_success(self.clock())

    def note_progress(self) -> None:
        """Note that the process gave a sign of progress."""
        self.last_progress_ns = self.clock()

    def has_no_progress_for(self, seconds: float) -> bool:
        """Whether a process exists that gave no sign of progress in the last `seconds`."""
        return self.worker is not None and self.clock() - self.last_progress_ns > seconds * NS_PER_S

    def record_fault(self, reason: Reason) -> None:
        self.faults[reason.key] += 1
        log_line(f"fault {reason.text}")

    def restart_after_fault(self, reason: Reason) -> None:
        """Count a fault, kill the process, and start the next one after a pause that grows with every failure."""
        self.record_fault(reason)
        self.restart_later(reason)

    def restart_later(self, reason: Reason) -> None:
        """Kill the process and start the next one after a pause. Counts no fault."""
        self._kill()
        self.readiness, self.reason = Readiness.RESTARTING, reason
        self.failures_before_ready += not self._was_ready
        self.restart_at_ns = self.clock() + round(self._backoff.next_pause_s() * NS_PER_S)

    def end(self, reason: Reason) -> None:
        """Kill the process. No other process is started."""
        self._kill()
        self.readiness, self.reason = Readiness.ENDED, reason

    def _kill(self) -> None:
        if self.worker is not None:
            self.forward_stderr()
            self.worker.kill()
            self._dying.append(_Dying(self.worker, self.clock()))
            self.worker = None
            self.reap()

    # -- messages -----------------------------------------------------------------------------------------------------

    def send(self, message: bytes) -> bool:
        """Whether the process took the message."""
        return self.worker is not None and self.worker.send(message)

    def receive(self) -> list[bytes]:
        """All messages that have arrived from the process."""
        return self.worker.receive() if self.worker is not None else []

    def exit_reason(self) -> Reason | None:
        """Why the process has ended; None: it runs, or there is none."""
        status = self.worker.exit_status if self.worker is not None else None
        if status is None:
            return None
        self.forward_stderr()
        return Reason(self.name, ReasonKind.FAILED, describe_exit(status), self._log.last_line())

    def forward_stderr(self) -> None:
        """Once per turn: what the process has written on stderr goes to the log."""
        if self.worker is not None:
            self._log.add(self.worker.read_stderr())

    # -- killed processes ---------------------------------------------------------------------------------------------

    def reap(self) -> None:
        """Forget the killed processes that are gone; write one line for each that stays in the kernel."""
        self._dying = [dying for dying in self._dying if dying.worker.exit_status is None]
        for dying in self._dying:
            if not dying.logged and self.clock() - dying.killed_ns > STUCK_AFTER_NS:
                dying.logged = True
                log_line(f"{self.name}: the old process {dying.worker.pid} was killed and is still in the kernel")

    @property
    def is_gone(self) -> bool:
        """Whether no process of this worker exists, running or dying."""
        return self.worker is None and not self._dying

    def full_reason(self) -> Reason | None:
        """The reason. If a killed process still exists, the detail names it: it may hold the device or the memory."""
        if self.reason is None or not self._dying:
            return self.reason
        stuck = f"the old process {self._dying[0].worker.pid} is still in the kernel"
        return replace(self.reason, detail=f"{self.reason.detail}; {stuck}" if self.reason.detail else stuck)

    def status(self) -> WorkerStatus:
        pid = self.worker.pid if self.worker is not None else None
        return WorkerStatus(
            alive=pid is not None,
            pid=pid,
            restarts=max(self._starts - 1, 0),
            rss_mib=health.rss_mib(pid) if pid is not None else None,
        )


def describe_exit(status: int) -> str:
    """ "killed by SIGSEGV" or "ended with status 3", from the status of a process as subprocess gives it."""
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
