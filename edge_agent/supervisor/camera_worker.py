"""The camera process as the supervisor sees it: its events, its frames in the slot, and its time-outs.

Frames themselves never pass the supervisor. It reads only the sequence number of the newest frame.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from edge_agent.config import CameraConfig
from edge_agent.errors import EX_CONFIG
from edge_agent.ipc.events import CameraEnded, CameraEvent, CameraOpened, decode_camera_event
from edge_agent.ipc.frame_slot import Slot
from edge_agent.ipc.worker import Worker
from edge_agent.supervisor.log import log_line
from edge_agent.supervisor.managed_worker import Clock, ManagedWorker, Readiness, Reason, ReasonKind
from edge_agent.supervisor.shutdown import Shutdown
from edge_agent.time_units import NS_PER_S

# Before READY a camera may be absent for this time. The unit gives up after 20 starts in 300 s: with 15 s for each, it
# never gives up, and a camera that is plugged in later is found.
CAMERA_WAIT_S = 15.0
HUNG_S = 8.0  # beyond the time after which frames are missed: without frame or event, the process hangs in the driver
FAULT_SHOWN_NS = 1 * NS_PER_S  # a fault is the daemon's state only if no frame follows it for this time
SLOW_CAMERA_PERIODS = 2  # a camera that is slower than camera_stall_s allows misses frames after this many periods


class CameraWorker(ManagedWorker):
    """Owns the camera process."""

    def __init__(
        self,
        config: CameraConfig,
        stall_s: float,
        slot: Slot,
        launch: Callable[[], Worker],
        clock: Clock = time.monotonic_ns,
    ) -> None:
        """stall_s: without a frame for this time, the camera delivers nothing (configuration: camera_stall_s)."""
        super().__init__("camera", launch, clock)
        self.config, self.slot = config, slot
        periods_s = SLOW_CAMERA_PERIODS / config.fps if config.fps else 0.0
        self.no_frame_s = max(stall_s, periods_s)
        self.frame_size = ""  # "640x480", of the source as it was opened last
        self.last_frame_ns = 0  # when the supervisor saw the newest frame in the slot; 0: no frame yet
        self._latest_seq = 0
        self._created_ns = clock()

    # -- once per turn ------------------------------------------------------------------------------------------------

    def handle_events(self, was_ready: bool) -> None:
        """Take in what the process reports, and its end.

        was_ready: READY was sent. Before that, a source that can never work ends the daemon: raises Shutdown.
        """
        # Read first: a fault that the process sent before its end is received below.
        status = self.worker.exit_status if self.worker is not None else None
        for payload in self.receive():
            try:
                event = decode_camera_event(payload)
            except msgspec.DecodeError as error:
                self.restart_after_fault(
                    Reason("camera", ReasonKind.FAILED, "invalid event from the camera process", str(error))
                )
                return
            self.note_progress()
            self._handle_event(event)
        if status is not None:
            self._handle_exit(status, was_ready)

    def _handle_event(self, event: CameraEvent) -> None:
        if isinstance(event, CameraOpened):
            self.mark_ready()
            rate = f" at {event.fps:g} fps" if event.fps else ""
            self.frame_size = f"{event.width}x{event.height}"
            log_line(f"camera {self.config.name}: {event.description}, {self.frame_size}{rate}")
        elif isinstance(event, CameraEnded):
            self.readiness = Readiness.ENDED
            self.reason = Reason("camera", ReasonKind.ENDED, "the source has ended")
        else:
            self.reason = Reason("camera", ReasonKind.SOURCE, event.reason, event.detail)
            self.record_fault(self.reason)

    def _handle_exit(self, status: int, was_ready: bool) -> None:
        reason = self.reason
        if self.readiness is Readiness.ENDED and reason is not None:
            self.end(reason)
        elif status != EX_CONFIG or reason is None or reason.kind is not ReasonKind.SOURCE:
            self.restart_after_fault(self.exit_reason() or Reason("camera", ReasonKind.FAILED, "ended"))
        elif was_ready:
            self.restart_later(reason)  # the last fault says more than the exit status, and was counted
        else:
            raise Shutdown("source-name", f"camera.source: {reason.what}: {reason.detail}")

    def check_slot(self) -> None:
        """Look for a new frame in the slot. It is a sign of progress, and ends a fault of the source."""
        seq = self.slot.latest_seq
        if seq == self._latest_seq:
            return
        self._latest_seq, self.last_frame_ns = seq, self.clock()
        self.note_progress()
        self.note_success()
        if self.readiness is Readiness.READY:
            self.reason = None

    def check_timeouts(self, was_ready: bool) -> None:
        """Restart a process that hangs. Before READY: raises Shutdown when no camera was opened in CAMERA_WAIT_S."""
        hung_s = self.no_frame_s + HUNG_S
        if self.config.realtime and self.has_no_progress_for(hung_s):
            self.restart_after_fault(
                Reason("camera", ReasonKind.STALLED, "stalled", f"no frame and no event in {hung_s:g} s")
            )
        waited_ns = self.clock() - self._created_ns
        is_open = self.readiness in (Readiness.READY, Readiness.ENDED)
        if not was_ready and not is_open and waited_ns > CAMERA_WAIT_S * NS_PER_S:
            why = f"{self.reason.what}: {self.reason.detail}" if self.reason is not None else "no frame"
            raise Shutdown("source-device", f"camera.source: {why}; connect the camera, or correct camera.source")

    # -- for the status -----------------------------------------------------------------------------------------------

    def missing_frames_reason(self) -> Reason | None:
        """Why the camera delivers no frames; None: it delivers frames."""
        frame_age_ns = self.clock() - self.last_frame_ns
        if self.readiness is not Readiness.READY or (self.reason is not None and frame_age_ns > FAULT_SHOWN_NS):
            return self.full_reason()
        if self.config.realtime and frame_age_ns > self.no_frame_s * NS_PER_S:
            return Reason("camera", ReasonKind.NO_FRAME, "no frame", f"for {frame_age_ns / NS_PER_S:.0f} s")
        return None
