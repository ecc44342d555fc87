"""A video file or a folder of images as a camera."""

from __future__ import annotations

from pathlib import Path

from edge_agent.camera.clock import Clock
from edge_agent.camera.picture import picture_paths, read_picture
from edge_agent.camera.recording import USUAL_FPS, Playback, Recording
from edge_agent.camera.source import (
    CapturedFrame,
    FaultReport,
    SourceError,
    SourceItems,
    into_slot,
    wait_for_reader,
    wanted_image,
)
from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraFault
from edge_agent.ipc.frame_slot import Slot
from edge_agent.time_units import NS_PER_S

FOLDER_FPS = 5.0  # Hz, where the configuration has no rate


def read_video(config: CameraConfig, slot: Slot, clock: Clock) -> SourceItems:
    with Recording(config.source, config.max_pixels) as recording:
        fps = recording.fps()
        faults = FaultReport(config.source)
        start_ns = clock.now_ns()
        while True:
            n_frames = 0
            with Playback(recording, config.fps or fps or USUAL_FPS) as playback:
                pacer = Pacer(playback, start_ns, clock)
                while pacer.next() if config.realtime else playback.grab() is not None:
                    captured_ns = clock.now_ns()
                    try:
                        wanted = wanted_image(slot)
                        bgr, size = playback.image_for(wanted)
                        image = into_slot(bgr, slot, config, wanted=wanted, full_size=size)
                    except SourceError as error:
                        if error.reason == "too-large":
                            raise
                        if fault := faults.add(error, captured_ns):
                            yield fault
                        continue
                    n_frames += 1
                    if not config.realtime:
                        captured_ns = wait_for_reader(slot, clock)
                    yield CapturedFrame(image, captured_ns, "arrival", fps, captured=bgr, full_size=size)
                start_ns = pacer.end_ns
            if n_frames == 0:
                raise recording.no_frame()
            if not config.loop:
                return


class Pacer:
    """Plays a recording at its own pace: waits until a frame is due, and skips frames whose time is over."""

    def __init__(self, playback: Playback, start_ns: int, clock: Clock) -> None:
        """start_ns: when the first frame is due."""
        self.playback, self.clock = playback, clock
        self._shift_ns = start_ns  # from the recording's time to the clock's
        self._time_ns, self._gap_ns = 0, playback.usual_gap_ns

    @property
    def end_ns(self) -> int:
        """When the last frame has been shown for as long as the frame before it."""
        return self._shift_ns + self._time_ns + self._gap_ns

    def next(self) -> bool:
        """Go to the frame to show next and wait until it is due; False when the last one has been shown for its time.

        The first frame is always shown. Of the late ones, those of one second at most are skipped: where decoding is
        slower than the recording, the next frame is shown late, and the rest of the recording is as much later.
        """
        is_first = self.playback.n_grabbed == 0
        if not self._grab():
            if not is_first:
                self.clock.sleep_until(self.end_ns)
            return False
        if is_first:
            self._show_now()
        skip_until_ns = self._time_ns + NS_PER_S
        while not is_first and self.clock.now_ns() >= self.end_ns:
            if self._time_ns >= skip_until_ns:
                self._show_now()
            elif not self._grab():
                return False
        self.clock.sleep_until(self._shift_ns + self._time_ns)
        return True

    def _show_now(self) -> None:
        """Show this frame now if it is due, and all later ones as much later."""
        self._shift_ns = max(self._shift_ns, self.clock.now_ns() - self._time_ns)

    def _grab(self) -> bool:
        time_ns = self.playback.grab()
        if time_ns is None:
            return False
        self._gap_ns, self._time_ns = time_ns - self._time_ns or self._gap_ns, time_ns
        return True


def read_folder(config: CameraConfig, slot: Slot, clock: Clock) -> SourceItems:
    folder, fps = Path(config.source), config.fps or FOLDER_FPS
    period_ns, due_ns = round(NS_PER_S / fps), clock.now_ns()
    reported: set[Path] = set()  # a picture that cannot be used is reported once, not in every round
    while True:
        n_frames, problem = 0, ""
        for path in (paths := picture_paths(folder)):
            if config.realtime:
                clock.sleep_until(due_ns)
            try:
                bgr = read_picture(path, config.max_pixels)
                image = into_slot(bgr, slot, config)
            except SourceError as error:
                problem = problem or error.detail
                if path not in reported:
                    reported.add(path)
                    yield CameraFault(error.reason, f"{error.detail}; skipped")
                continue
            n_frames += 1
            captured_ns = clock.now_ns() if config.realtime else wait_for_reader(slot, clock)
            due_ns = max(due_ns + period_ns, captured_ns)
            rate = fps if config.realtime else None
            yield CapturedFrame(image, captured_ns, "arrival", rate, captured=bgr)
        if n_frames == 0:
            detail = f"{folder}: none of its {len(paths)} images can be used; the first: {problem}"
            raise SourceError("unreadable", detail, "source-file")
        if not config.loop:
            return
