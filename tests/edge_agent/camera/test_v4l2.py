"""V4L2 cameras, with a class in the place of cv2.VideoCapture and a clock that each grab() moves."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from contextlib import closing

import cv2
import numpy as np
import pytest

from edge_agent.camera.process import open_source
from edge_agent.camera.source import CapturedFrame, SourceError
from edge_agent.camera.v4l2 import (
    CameraIdentity,
    check_device,
    check_identity,
    configure,
    device_path,
    fourcc_of,
    pixel_formats,
    stable_name,
)
from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraFault, CameraOpened
from edge_agent.ipc.frame_slot import Slot
from tests.harness.camera import FakeClock
from tests.harness.pictures import encoded, scene


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
        self.granted: dict[int, float] = {cv2.CAP_PROP_FPS: 30.0}  # in place of what was set
        self.opened, self.released = True, False

    def isOpened(self) -> bool:
        return self.opened

    def set(self, number: int, value: float) -> None:
        self.settings[number] = value

    def get(self, number: int) -> float:
        if number == cv2.CAP_PROP_POS_MSEC:
            return self.stamp_ms(self.clock.time_ns / 1e6)
        return self.granted.get(number, self.settings.get(number, 0.0))

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
            closing(open_source(CameraConfig(**({"source": "/dev/video0"} | config)), slot, clock)) as source,
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
        cv2.CAP_PROP_BUFFERSIZE: 1,
        cv2.CAP_PROP_FRAME_WIDTH: 64,
        cv2.CAP_PROP_FRAME_HEIGHT: 48,
        cv2.CAP_PROP_FPS: 30,
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
    items, error = play(FakeCapture([images[0], *["empty"] * n_bad, images[1]], clock))
    assert error.reason == "absent"  # not longer than two seconds, so it continued
    assert [type(item) for item in items] == [CameraOpened, CapturedFrame, CameraFault, CameraFault, CapturedFrame]
    items, error = play(FakeCapture([images[2], *["empty"] * (n_bad + 1), images[1]], clock))
    assert [type(item) for item in items] == [CameraOpened, CapturedFrame, CameraFault, CameraFault]
    assert error.reason == "unreadable" and "no image in 2 s" in error.detail


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


# -- MJPG: the JPEGs are decoded here, because OpenCV takes half of one for a whole one --------------------------------

MJPG, YUYV = (cv2.VideoWriter.fourcc(*name) for name in ("MJPG", "YUYV"))


class JpegCapture(FakeCapture):
    """A webcam that gives MJPG; its buffers are longer than their JPEGs."""

    def __init__(self, jpegs: Iterable[bytes], clock: FakeClock) -> None:
        super().__init__([np.frombuffer(jpeg + bytes(200), np.uint8)[None] for jpeg in jpegs], clock)
        self.granted[cv2.CAP_PROP_FOURCC] = MJPG


def test_a_damaged_jpeg_of_a_webcam_is_named_and_not_shown(play, clock):
    whole = [encoded(".jpg", scene(seed=k)) for k in range(2)]
    capture = JpegCapture([whole[0], whole[1][:4000], whole[1][:4000] + b"\xff\xd9", b"junk", whole[1]], clock)
    items, _ = play(capture)
    assert capture.settings[cv2.CAP_PROP_CONVERT_RGB] == 0
    assert [type(item) for item in items] == [CameraOpened, CapturedFrame, CameraFault, CapturedFrame]
    assert items[2].reason == "unreadable" and "/dev/video0: 1 refused" in items[2].detail
    expected = cv2.imdecode(np.frombuffer(whole[1], np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    assert np.array_equal(items[-1].image, expected)


def test_a_webcam_that_gives_only_damaged_jpegs_is_opened_again(play, clock):
    items, error = play(JpegCapture([encoded(".jpg")[:4000]] * 100, clock))
    assert error.reason == "unreadable" and error.retryable and "no image in 2 s: not one whole JPEG" in error.detail
    assert {type(item) for item in items} == {CameraFault}


def test_frames_larger_than_the_configuration_allows_are_a_permanent_error(play, clock):
    for capture in (FakeCapture(noise(1), clock), JpegCapture([encoded(".jpg", noise(1)[0])], clock)):
        items, error = play(capture, max_megapixels=0.003)
        assert items == [] and error.reason == "too-large" and not error.retryable


# -- what is asked of the driver, and what it grants -------------------------------------------------------------------


class Driver:
    """Gives the sizes and rates of a webcam: 640x480 at 30 fps or 1280x720 at 10 fps raw, 1280x720 at 30 fps as MJPG.

    As V4L2 it takes the nearest values, and each call may change all of them.
    """

    def __init__(self, formats: Iterable[int] = (YUYV, MJPG)) -> None:
        self.formats, self.calls = formats, []
        self.now = {cv2.CAP_PROP_FOURCC: YUYV, cv2.CAP_PROP_FRAME_WIDTH: 640, cv2.CAP_PROP_FRAME_HEIGHT: 480}

    def set(self, number: int, value: float) -> None:
        self.calls.append((number, value))
        if number == cv2.CAP_PROP_FOURCC and value not in self.formats:
            return
        self.now[number] = value
        width, height = (1280, 720) if self.now[cv2.CAP_PROP_FRAME_WIDTH] > 640 else (640, 480)
        self.now |= {cv2.CAP_PROP_FRAME_WIDTH: width, cv2.CAP_PROP_FRAME_HEIGHT: height}

    def get(self, number: int) -> float:
        is_slow = self.now[cv2.CAP_PROP_FRAME_WIDTH] > 640 and self.now[cv2.CAP_PROP_FOURCC] == YUYV
        return (10.0 if is_slow else 30.0) if number == cv2.CAP_PROP_FPS else self.now.get(number, 0.0)


@pytest.mark.parametrize(
    ("wishes", "fourcc", "remark"),
    [
        ({}, "YUYV", ""),
        ({"width": 640, "height": 480, "fps": 30}, "YUYV", ""),
        ({"width": 640, "height": 480, "fps": 29.97}, "YUYV", ""),
        ({"width": 1280, "height": 720, "fps": 30}, "MJPG", ""),
        ({"width": 1280, "height": 720}, "YUYV", ""),
        ({"width": 640, "height": 480, "fourcc": "MJPG"}, "MJPG", ""),
        (
            {"width": 1920, "height": 1080, "fps": 30},
            "MJPG",
            "asked for 1920x1080 30 fps, the camera gives 1280x720 30 fps MJPG",
        ),
        (
            {"width": 1280, "height": 720, "fps": 30, "fourcc": "YUYV"},
            "YUYV",
            "asked for 1280x720 30 fps YUYV, the camera gives 1280x720 10 fps YUYV",
        ),
        ({"fourcc": "NV12"}, "YUYV", "asked for anyxany NV12, the camera gives 640x480 30 fps YUYV"),
    ],
)
def test_mjpg_is_asked_for_where_size_and_rate_need_it(wishes, fourcc, remark):
    driver = Driver()
    assert configure(driver, CameraConfig(source="0", **wishes)) == remark
    assert fourcc_of(driver) == fourcc


def test_a_camera_without_mjpg_stays_as_it_is_and_the_difference_is_told():
    driver = Driver(formats=(YUYV,))
    remark = configure(driver, CameraConfig(source="0", width=1280, height=720, fps=30))
    assert remark == "asked for 1280x720 30 fps, the camera gives 1280x720 10 fps YUYV"


def test_the_format_is_asked_for_before_size_and_rate():
    driver = Driver()
    configure(driver, CameraConfig(source="0", width=1280, height=720, fps=30, fourcc="MJPG"))
    numbers = [number for number, _ in driver.calls]
    assert numbers.index(cv2.CAP_PROP_FOURCC) < numbers.index(cv2.CAP_PROP_FRAME_WIDTH)


def test_the_log_tells_what_was_not_granted(play, clock):
    capture = FakeCapture(noise(2), clock)
    capture.granted[cv2.CAP_PROP_FPS] = 10.0
    items, _ = play(capture, fps=30)
    assert "asked for anyxany 30 fps, the camera gives" in items[0].description


@pytest.mark.parametrize("fourcc", ["YUYV", "MJPG", "Y16 "])
def test_the_log_tells_the_pixel_format_that_is_in_use(play, clock, fourcc):
    """Also if all was granted: `edge-agent check` prints the same line."""
    capture = FakeCapture([np.frombuffer(encoded(".jpg"), np.uint8).reshape(1, -1)] * 2, clock)
    capture.granted[cv2.CAP_PROP_FOURCC] = cv2.VideoWriter.fourcc(*fourcc)
    (opened, *_), _ = play(capture, fourcc=fourcc, fps=30)
    assert opened.description == f"v4l2 /dev/video0 (pixel format {fourcc})"


def test_the_log_tells_frames_of_another_size_than_the_driver_claims(play, clock):
    """Asked for and granted, by its word."""
    items, _ = play(FakeCapture(noise(2), clock), width=1920, height=1080)
    assert "(the driver claims 1920x1080, the frames have 64x48)" in items[0].description
    assert (items[0].width, items[0].height) == (64, 48)


# -- which camera it is ------------------------------------------------------------------------------------------------

WEBCAM = CameraIdentity("uvcvideo", "HD Webcam", "usb-0000:00:14.0-1")
ANOTHER_PORT = CameraIdentity("uvcvideo", "HD Webcam", "usb-0000:00:14.0-2")
THERMAL = CameraIdentity("uvcvideo", "PureThermal", "usb-0000:00:14.0-1")
LOOPBACK = CameraIdentity("v4l2 loopback", "HD Webcam", "usb-0000:00:14.0-1")


@pytest.fixture
def reopen(play, clock, monkeypatch):
    """reopen(identity, image, source) -> the error that ended it. Each call is as after a replug."""

    def reopen(identity: CameraIdentity | None, image: np.ndarray, source: str = "/dev/video0") -> SourceError:
        monkeypatch.setattr("edge_agent.camera.v4l2.check_device", lambda device: identity)
        return play(FakeCapture([image], clock), source=source, identical_frames_s=0)[1]

    return reopen


SMALL, LARGE = (scene(height, width) for height, width in ((48, 64), (96, 128)))


@pytest.mark.parametrize(
    ("identity", "image", "words"),
    [
        (THERMAL, LARGE, "is now PureThermal (uvcvideo) at usb-0000:00:14.0-1, 128x96"),
        (WEBCAM, SMALL, "was HD Webcam (uvcvideo) at usb-0000:00:14.0-1, 128x96, and is now HD Webcam"),
        (ANOTHER_PORT, LARGE, "at usb-0000:00:14.0-2"),
        (LOOPBACK, LARGE, "v4l2 loopback"),
    ],
    ids=["another model", "another size", "the same model at another port", "another driver"],
)
def test_another_camera_behind_the_same_name_is_a_fault(reopen, slot, identity, image, words):
    assert reopen(WEBCAM, LARGE).reason == "absent"
    n_published = slot.latest_seq
    for _ in range(2):
        error = reopen(identity, image)
        assert error.reason == "other-camera" and error.retryable and words in error.detail
    assert slot.latest_seq == n_published
    assert reopen(WEBCAM, LARGE).reason == "absent" and slot.latest_seq == n_published + 1  # the first one is back


def test_a_name_that_belongs_to_one_camera_follows_it_to_another_port(reopen):
    source = "/dev/v4l/by-id/usb-HD_Webcam_123-video-index0"
    assert [reopen(found, LARGE, source).reason for found in (WEBCAM, ANOTHER_PORT, THERMAL)] == [
        "absent", "absent", "other-camera"
    ]  # fmt: skip


def test_a_driver_that_tells_no_identity_is_accepted(reopen):
    assert [reopen(None, image).reason for image in (LARGE, SMALL)] == ["absent"] * 2


def test_the_identity_outlives_the_camera_process(slot):
    check_identity("/dev/video0", WEBCAM, LARGE.shape[:2], slot)
    attached = Slot.attach(os.dup(slot.fd), os.dup(slot.wake_fd))
    with closing(attached), pytest.raises(SourceError, match="PureThermal"):
        check_identity("/dev/video0", THERMAL, LARGE.shape[:2], attached)


def test_the_answer_of_the_driver_is_read(slot, clock, monkeypatch):
    answer = struct.pack("16s32s32s24x", b"uvcvideo", b"HD Webcam \xff", b"usb-1")
    monkeypatch.setattr("edge_agent.camera.v4l2.fcntl.ioctl", lambda fd, request, data: answer)
    assert check_device("/dev/null") == CameraIdentity("uvcvideo", "HD Webcam \ufffd", "usb-1")


def test_a_bare_name_is_worth_a_remark_with_the_name_that_stays(play, clock, tmp_path, monkeypatch):
    monkeypatch.setattr("edge_agent.camera.v4l2.LINKS", tmp_path)
    assert stable_name("/dev/video0") == ""  # no udev
    (tmp_path / "by-path").mkdir()
    (tmp_path / "by-path" / "usb-0:1").symlink_to("/dev/video0")
    assert f"use {tmp_path}/by-path/usb-0:1" in stable_name("/dev/video0")
    (tmp_path / "by-id").mkdir()
    (tmp_path / "by-id" / "usb-HD_Webcam_123").symlink_to("/dev/video0")
    assert f"use {tmp_path}/by-id/usb-HD_Webcam_123" in stable_name("/dev/video0")
    assert stable_name("/dev/video7") == stable_name(f"{tmp_path}/by-id/usb-HD_Webcam_123") == ""
    items, _ = play(FakeCapture(noise(1), clock))
    assert "may be another camera after a replug" in items[0].description


# -- a still picture ---------------------------------------------------------------------------------------------------


def test_a_stamp_of_the_driver_that_advances_proves_that_the_device_lives(play, clock):
    """A covered lens behind noise reduction gives identical images."""
    items, error = play(FakeCapture([noise(1)[0]] * 200, clock, stamp_ms=lambda now_ms: now_ms - 5))
    assert error.reason == "absent" and len(items) == 201


@pytest.mark.parametrize(
    ("config", "n_published"),
    [
        ({"identical_frames_s": 0}, 600),
        ({"identical_frames_s": 2}, 2 * 100),
        ({"identical_frames_s": 0.1}, 29),
        ({}, 100),
    ],
    ids=["for ever", "two seconds", "never less than thirty frames", "one second"],
)
@pytest.mark.parametrize("has_stamps", [False, True])
def test_the_configuration_allows_identical_images_for_a_time(play, clock, config, n_published, has_stamps):
    """Once it is set, the key counts for every camera, also for one whose stamps advance."""
    stamp_ms = (lambda now_ms: now_ms - 1) if has_stamps else (lambda now_ms: 0.0)
    items, error = play(FakeCapture([noise(1)[0]] * 600, clock, 0.01, stamp_ms), **config)
    if has_stamps and not config:
        n_published = 600
    assert len(items) == 1 + n_published
    assert error.reason == ("absent" if n_published == 600 else "frozen")
    if error.reason == "frozen":
        assert "camera.identical_frames_s" in error.detail


def test_the_pixel_formats_of_a_device_with_and_without_planes(monkeypatch):
    """struct v4l2_fmtdesc of linux/videodev2.h, 64 bytes; after the last format the driver says EINVAL."""
    offered = {1: [b"YUYV", b"MJPG"], 9: [b"NM12", b"YUYV"]}

    def enumerate_formats(_fd: int, request: int, data: bytes) -> bytes:
        assert (request & 0xFFFF, len(data), request >> 16 & 0x3FFF) == (0x5602, 64, 64)
        index, kind = struct.unpack_from("=2I", data)
        if index >= len(offered[kind]):
            raise OSError(22, "Invalid argument")
        return struct.pack("=3I32s4s16x", index, kind, 0, b"a format", offered[kind][index])

    monkeypatch.setattr("edge_agent.camera.v4l2.fcntl.ioctl", enumerate_formats)
    assert pixel_formats("/dev/null") == ("YUYV", "MJPG", "NM12")
    assert pixel_formats("/dev/video97") == ()
    monkeypatch.undo()
    assert pixel_formats("/dev/null") == ()


def test_names_of_a_device():
    assert [device_path(source) for source in ("0", "v4l2:2", "/dev/video1", "v4l2:/dev/v4l/by-id/a")] == [
        "/dev/video0", "/dev/video2", "/dev/video1", "/dev/v4l/by-id/a",
    ]  # fmt: skip
