"""V4L2 cameras, with a class in the place of cv2.VideoCapture and a clock that each grab() moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing

import cv2
import numpy as np
import pytest

from edge_agent.camera.process import open_source
from edge_agent.camera.source import CapturedFrame, SourceError
from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraOpened
from tests.harness.camera import FakeClock


class FakeCapture:
    """In the place of cv2.VideoCapture: one image for each grab(), then none.

    A string instead of an image is a buffer without an image. stamp_ms: the driver's stamp, from the clock in ms.
    """

    def __init__(
        self,
        images: Iterable[np.ndarray | str],
        clock: FakeClock,
        period_s: float = 1 / 30,
        stamp_ms: Callable[[float], float] = lambda now_ms: 0.0,  # a driver without stamps
    ) -> None:
        self.images, self.clock, self.period_s, self.stamp_ms = iter(images), clock, period_s, stamp_ms
        self.settings: dict[int, float] = {}
        self.opened, self.released = True, False

    def isOpened(self) -> bool:
        return self.opened

    def set(self, number: int, value: float) -> None:
        self.settings[number] = value

    def get(self, number: int) -> float:
        return 30.0 if number == cv2.CAP_PROP_FPS else self.stamp_ms(self.clock.time_ns / 1e6)

    def grab(self) -> bool:
        self.image = next(self.images, None)
        self.clock.advance(self.period_s)
        return self.image is not None

    def retrieve(self, image: np.ndarray | None = None) -> tuple[bool, np.ndarray | None]:
        return (False, None) if isinstance(self.image, str) else (True, self.image)

    def release(self) -> None:
        self.released = True


@pytest.fixture
def play(monkeypatch, slot, clock):
    """play(capture, **config) -> (the items of the source, the SourceError that ended it). Publishes every frame."""
    monkeypatch.setattr("edge_agent.camera.v4l2.check_device", lambda device: None)

    def play(capture: FakeCapture, **config) -> tuple[list, SourceError]:
        monkeypatch.setattr("cv2.VideoCapture", lambda *arguments: capture)
        items = []
        with (
            closing(open_source(CameraConfig(source="/dev/video0", **config), slot, clock)) as source,
            pytest.raises(SourceError) as caught,
        ):
            for item in source:
                items.append(item)
                if isinstance(item, CapturedFrame):
                    slot.publish(1, item.t_capture_ns, item.capture_clock)
        assert capture.released
        return items, caught.value

    return play


def noise(n_frames: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(n_frames)]


def test_frames_are_rgb_and_the_driver_gets_the_configuration(play, clock):
    images = noise(3)
    capture = FakeCapture(images, clock)
    (opened, *frames), error = play(capture, width=64, height=48, fps=30)
    assert opened == CameraOpened(64, 48, 30.0, "v4l2 /dev/video0")
    assert np.array_equal(frames[2].image, images[2][:, :, ::-1])
    assert capture.settings == {
        cv2.CAP_PROP_FRAME_WIDTH: 64,
        cv2.CAP_PROP_FRAME_HEIGHT: 48,
        cv2.CAP_PROP_FPS: 30,
        cv2.CAP_PROP_BUFFERSIZE: 1,
    }
    assert error.reason == "absent" and error.retryable  # grab() returned False, and this machine has no /dev/video0


@pytest.mark.parametrize(
    ("offset_ms", "capture_clock"),
    [(-20, "driver"), (-999, "driver"), (-1001, "arrival"), (-29_000, "arrival"), (40, "arrival"), (-1e9, "arrival")],
)
def test_the_drivers_stamp_is_taken_only_if_it_is_plausible(play, clock, offset_ms, capture_clock):
    start_ns = clock.time_ns
    items, _ = play(FakeCapture(noise(2), clock, 0.05, lambda now_ms: now_ms + offset_ms))
    frames = items[1:]
    shift_ns = offset_ms * 1_000_000 if capture_clock == "driver" else 0
    assert [frame.capture_clock for frame in frames] == [capture_clock] * 2
    assert [frame.t_capture_ns for frame in frames] == [start_ns + k * 50_000_000 + shift_ns for k in (1, 2)]


def test_without_a_driver_stamp_the_arrival_counts(play, clock):
    items, _ = play(FakeCapture(noise(2), clock))
    assert [item.capture_clock for item in items[1:]] == ["arrival"] * 2


def test_the_same_exposure_twice_is_one_frame(play, clock):
    stamp_ms = clock.time_ns / 1e6
    items, _ = play(FakeCapture(noise(5), clock, stamp_ms=lambda now_ms: stamp_ms))
    assert [type(item) for item in items] == [CameraOpened, CapturedFrame]


@pytest.mark.parametrize(
    ("period_s", "n_published"),
    [(0.01, 100), (0.05, 29)],  # a second at 100 Hz; 30 frames where a second is less
)
def test_a_frozen_device_is_found_after_thirty_frames_and_a_second(play, clock, period_s, n_published):
    """The frame that completes the second is not published any more. A device still frozen is found at once."""
    image = noise(1)[0]
    items, error = play(FakeCapture([image] * 400, clock, period_s))
    assert error.reason == "frozen" and error.retryable
    assert [type(item) for item in items] == [CameraOpened] + [CapturedFrame] * n_published
    items, error = play(FakeCapture([image] * 400, clock, period_s))
    assert error.reason == "frozen" and items == []


def test_one_bit_of_noise_is_not_frozen(play, clock):
    """The lowest bit of one row changes; a sensor's noise changes all rows."""
    image = noise(1)[0]

    def images():
        for k in range(130):
            image[0, :, 0] ^= k & 1
            yield image.copy()

    items, error = play(FakeCapture(images(), clock, 0.01))
    assert error.reason == "absent" and len(items) == 131


def test_a_black_flash_is_not_frozen(play, clock):
    """Fewer than thirty identical frames, however long they take."""
    items, error = play(FakeCapture(noise(1) * 25, clock, 0.05))
    assert error.reason == "absent" and len(items) == 26


def test_buffers_without_an_image_for_two_seconds_are_an_error(play, clock):
    images, n_bad = noise(3), 60  # at 30 Hz
    items, error = play(FakeCapture([images[0], *["bad jpeg"] * n_bad, images[1]], clock))
    assert error.reason == "absent" and len(items) == 3  # not longer than two seconds, so it continued
    items, error = play(FakeCapture([images[2], *["bad jpeg"] * (n_bad + 1), images[1]], clock))
    assert len(items) == 2 and error.reason == "unreadable" and "no image in 2 s" in error.detail


def test_sixteen_bit_pixels_are_refused(play, clock):
    _, error = play(FakeCapture([np.zeros((48, 64), np.uint16)], clock))
    assert error.reason == "unreadable" and "uint16" in error.detail


def test_a_silent_device_has_stalled(play, clock, monkeypatch):
    monkeypatch.setattr("os.path.exists", lambda path: True)
    _, error = play(FakeCapture([], clock))
    assert error.reason == "stalled"


def test_a_device_that_opencv_cannot_open_is_unreadable(play, clock):
    capture = FakeCapture([], clock)
    capture.opened = False
    _, error = play(capture)
    assert error.reason == "unreadable" and error.retryable


def test_a_device_that_is_not_a_camera_is_unreadable(slot, clock):
    with pytest.raises(SourceError, match="/dev/null: opens, but is not a V4L2 camera"):
        next(open_source(CameraConfig(source="v4l2:/dev/null"), slot, clock))


def test_a_device_without_permission_is_unreadable(slot, clock, monkeypatch):
    def refuse(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("edge_agent.camera.v4l2.os.open", refuse)
    with pytest.raises(SourceError, match="is this user in group video") as caught:
        next(open_source(CameraConfig(source="0"), slot, clock))
    assert caught.value.reason == "unreadable"


def test_a_device_that_another_process_uses_is_busy(slot, clock, monkeypatch):
    def refuse(*arguments: object) -> int:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr("edge_agent.camera.v4l2.fcntl.ioctl", refuse)
    with pytest.raises(SourceError, match="another process uses it") as caught:
        next(open_source(CameraConfig(source="/dev/null"), slot, clock))
    assert caught.value.reason == "busy"
