"""The daemon's state, its reason and its counters, and the status message that publishes them."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from edge_agent.board import health
from edge_agent.config import CameraConfig
from edge_agent.supervisor.board_monitor import BoardMonitor
from edge_agent.supervisor.camera_worker import CameraWorker
from edge_agent.supervisor.gate import ControlState
from edge_agent.supervisor.log import log_line
from edge_agent.supervisor.managed_worker import Clock, Reason, ReasonKind
from edge_agent.supervisor.model_worker import ModelWorker
from edge_agent.supervisor.publisher import Publisher
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.information_age import PublishedAction, mean_information_age_ms
from edge_agent.wire.messages import DaemonState, Status

STATUS_INTERVAL_NS = 200_000_000
# A status takes 1 to 2 ms. Right after an answer it is the furthest from the next one, which must not wait for it.
STATUS_AFTER_ANSWER_NS = 150_000_000
MAX_REASON_CHARS = 1000
PAUSED = Reason("", ReasonKind.PAUSED, "by control; `edge-agent resume` ends it")
NO_ACTION_NS = 2 * NS_PER_S  # refusals alone for this time are a reason, although the daemon is running


RECENT_NS, MAX_RECENT_ACTIONS = 30 * NS_PER_S, 512  # of the mean age of information
ORDERED_REFUSALS = ("paused", "stale-instruction")  # they follow from a request


@dataclass
class Counters:
    """Numbers since this session began."""

    model_events: int = 0  # from the model process: each means that it made progress. Status.inference_count
    actions: int = 0
    dropped_frames: int = 0
    refusals: Counter[str] = field(default_factory=Counter)  # refusal reason -> count
    last_frame_seq: int = 0  # number in the slot of the frame that was answered last
    last_action_ns: int = 0  # when the last action was published; 0: none yet
    refused_since_ns: int = 0  # the first of the refusals since the last action; 0: there is none
    last_refusal: str = ""  # its reason
    recent_actions: deque[PublishedAction] = field(default_factory=lambda: deque(maxlen=MAX_RECENT_ACTIONS))

    @property
    def answers(self) -> int:
        """Frames that were answered, with an action or with a refusal."""
        return self.actions + self.refusals.total()

    def count_dropped(self, frame_seq: int) -> int:
        """Frames between the last answered frame and this one."""
        dropped = max(0, frame_seq - self.last_frame_seq - 1)
        self.last_frame_seq = frame_seq
        self.dropped_frames += dropped
        return dropped

    def count_action(self, t_capture_ns: int, now_ns: int) -> None:
        self.actions += 1
        self.recent_actions.append(PublishedAction(t_capture_ns, now_ns))
        self.last_action_ns, self.refused_since_ns = now_ns, 0

    def information_age_ms(self, now_ns: int) -> float | None:
        """Mean age of information over the last RECENT_NS; None: unknown."""
        while self.recent_actions and now_ns - self.recent_actions[0].t_pub_ns > RECENT_NS:
            self.recent_actions.popleft()
        return mean_information_age_ms(self.recent_actions)

    def count_refusal(self, reason: str, now_ns: int) -> None:
        self.refusals[reason] += 1
        self.last_refusal = reason
        if reason in ORDERED_REFUSALS:
            self.refused_since_ns = 0
        elif not self.refused_since_ns:
            self.refused_since_ns = now_ns


class StatusReporter:
    """Knows everything that status needs, and publishes it: five times a second or more, on change, and to a new
    subscriber."""

    def __init__(
        self,
        config: CameraConfig,
        control_state: ControlState,
        camera: CameraWorker,
        model: ModelWorker,
        board: BoardMonitor,
        clock: Clock = time.monotonic_ns,
    ) -> None:
        self.config, self.control_state, self.camera, self.model = config, control_state, camera, model
        self.board = board
        self.clock = clock
        self.counters = Counters()
        self.is_ready = False  # READY was sent
        self.is_stopping = False
        self._started_ns = clock()
        self._boot_id = health.boot_id()
        self._published_ns = 0
        self._last_frame_seq = 0
        self._published_key: tuple[DaemonState, str] | None = None

    def state(self) -> tuple[DaemonState, Reason | None]:
        """The daemon's state and its reason. A running daemon has a reason if it refuses every answer."""
        if self.is_stopping:
            return "stopping", None
        if not self.is_ready:
            return "starting", self.model.full_reason() or self.camera.full_reason()
        model_reason = self.model.full_reason()
        if model_reason is not None:
            return ("stalled" if model_reason.kind is ReasonKind.STALLED else "fault"), model_reason
        if self.control_state.paused:
            return "paused", PAUSED
        camera_reason = self.camera.missing_frames_reason()
        return ("running", self._only_refusals()) if camera_reason is None else ("no-frames", camera_reason)

    def _only_refusals(self) -> Reason | None:
        """Why there is no action, although frames are answered; None: there are actions, or it is too early to say."""
        since_ns = self.counters.refused_since_ns
        duration_ns = self.clock() - since_ns
        if not since_ns or duration_ns < NO_ACTION_NS:
            return None
        detail = f"for {duration_ns / NS_PER_S:.0f} s, the last one: {self.counters.last_refusal}"
        return Reason("model", ReasonKind.NO_ACTION, "every answer is refused", detail)

    def counts(self) -> dict[str, Any]:
        """The fields that status and the reply to `stats` have in common."""
        counters = self.counters
        return {
            "uptime_s": (self.clock() - self._started_ns) / NS_PER_S,
            "frames": self.camera.slot.latest_seq,
            "frames_dropped": counters.dropped_frames,
            "actions": counters.actions,
            "refusals": dict(counters.refusals),
            "faults": dict(self.camera.faults + self.model.faults),
            "inference_count": counters.model_events,
            "instruction": self.control_state.instruction.text,
            "adapter": self.control_state.instruction.adapter,
        }

    def publish_if_due(self, publisher: Publisher) -> None:
        state, reason = self.state()
        key = (state, reason.key if reason is not None else "")
        changed = key != self._published_key
        if changed:
            self._published_key = key
            log_line(f"state {state}" + (f": {reason.text}" if reason is not None else ""))
        was_answered = self.counters.last_frame_seq != self._last_frame_seq
        self._last_frame_seq = self.counters.last_frame_seq
        interval_ns = STATUS_AFTER_ANSWER_NS if was_answered else STATUS_INTERVAL_NS
        is_due = self.clock() - self._published_ns >= interval_ns
        if changed or is_due or publisher.has_new_subscriber():
            self.publish(publisher, state, reason.text if reason is not None else "")

    def publish(self, publisher: Publisher, state: DaemonState, reason: str) -> None:
        now_ns = self._published_ns = self.clock()
        if self.control_state.paused:
            self.counters.recent_actions.clear()  # the time until the next action is the controller's choice
        publisher.send(
            "status",
            Status,
            t_pub_ns=now_ns,
            wall_clock_ns=time.time_ns(),
            boot_id=self._boot_id,
            paused=self.control_state.paused,
            state=state,
            reason=reason[:MAX_REASON_CHARS],
            camera=self.config.name,
            camera_worker=self.camera.status(),
            model_worker=self.model.status(),
            last_frame_age_ms=_age_ms(self.camera.slot.newest_capture_ns(), now_ns),
            last_action_age_ms=_age_ms(self.counters.last_action_ns, now_ns),
            vision_backend=self.model.vision_backend,
            language_backend=self.model.language_backend,
            information_age_ms=self.counters.information_age_ms(now_ns),
            mem_available_mib=health.mem_available_mib(),
            temperature_c=self.board.temperature_c,
            board=self.board.board_status(),
            governor=self.board.governor_status(),
            **self.counts(),
        )


def _age_ms(then_ns: int, now_ns: int) -> float | None:
    """None: it never happened."""
    return (now_ns - then_ns) / NS_PER_MS if then_ns else None
