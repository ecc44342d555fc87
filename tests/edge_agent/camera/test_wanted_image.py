"""Frames leave every source at the size that the model process asks for, and nothing else about them changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from edge_agent.camera.picture import decode_jpeg, decode_jpeg_for
from edge_agent.camera.process import SOURCES, open_source
from edge_agent.camera.source import CapturedFrame, SourceError, WantedImage, into_slot, wanted_image
from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraOpened
from edge_agent.ipc.frame_slot import Slot
from edge_agent.ipc.image_grid import ImageRequest, image_size, resize
from edge_agent.wire.codec import encode
from tests.edge_agent.camera.test_v4l2 import FakeCapture
from tests.harness.camera import FakeClock, Pusher, install_fake_gstreamer, wait_until
from tests.harness.pictures import encoded, mkv, scene

HEIGHT, WIDTH = 480, 640
REQUEST = ImageRequest(unit=28, longest_side=1540, max_tokens=144)
SMALL = ImageRequest(unit=8, longest_side=1540, max_tokens=12)  # small enough for a JPEG of a half of its size
FRAME = scene(HEIGHT, WIDTH)  # BGR


def expected(bgr: np.ndarray, request: ImageRequest) -> np.ndarray:
    """What the model process makes of a frame as captured."""
    rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    image = np.empty((*image_size(*rgb.shape[:2], request), 3), np.uint8)
    resize(rgb, image)
    return image


# -- every source -----------------------------------------------------------------------------------------------------

Play = Callable[[Path, Slot, FakeClock, pytest.MonkeyPatch], Iterator[object]]


def v4l2(pixels: np.ndarray | bytes) -> Play:
    def play(folder: Path, slot: Slot, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
        buffer = np.frombuffer(pixels, np.uint8).reshape(1, -1) if isinstance(pixels, bytes) else pixels
        monkeypatch.setattr("edge_agent.camera.v4l2.check_device", lambda device: None)
        monkeypatch.setattr("cv2.VideoCapture", lambda *arguments: FakeCapture([buffer] * 3, clock))
        return open_source(CameraConfig(source="/dev/video0"), slot, clock)

    return play


def pushed(format: str, data: bytes) -> Play:
    def play(folder: Path, slot: Slot, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
        pusher = Pusher(folder / "frames", clock)
        fields = {"width": WIDTH, "height": HEIGHT, "format": format, "data": data}
        with closing(pusher.socket), closing(open_source(config_of(folder), slot, clock)) as items:
            for number in itertools.count(1):
                clock.advance(0.02)
                pusher.send(number, **fields)
                if number == 1:
                    yield next(items)
                yield next(items)

    def config_of(folder: Path) -> CameraConfig:
        return CameraConfig(source=f"zmq:ipc://{folder}/frames")

    return play


def file(name: str, data: bytes) -> Play:
    def play(folder: Path, slot: Slot, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
        (folder / "source").mkdir()
        (folder / "source" / name).write_bytes(data)
        is_video = name.endswith(".mkv")
        return open_source(CameraConfig(source=str(folder / "source" / (name if is_video else ""))), slot, clock)

    return play


def gstreamer(folder: Path, slot: Slot, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.setenv("PATH", install_fake_gstreamer(folder)["PATH"])
    return open_source(CameraConfig(source="gst:prints", width=WIDTH, height=HEIGHT), slot, clock)


JPEG = encoded(".jpg", FRAME, cv2.IMWRITE_JPEG_QUALITY, 95)
DECODED = decode_jpeg(JPEG)
GREY = FRAME[..., 0].copy()
WHITE = np.full_like(FRAME, 255)
SOURCES_OF_FRAMES: dict[str, tuple[Play, np.ndarray]] = {  # name -> (source, the frame, BGR)
    "v4l2": (v4l2(FRAME), FRAME),
    "v4l2 MJPG": (v4l2(JPEG), DECODED),
    "gst": (gstreamer, WHITE),
    "pushed rgb8": (pushed("rgb8", FRAME[..., ::-1].tobytes()), FRAME),
    "pushed bgr8": (pushed("bgr8", FRAME.tobytes()), FRAME),
    "pushed gray8": (pushed("gray8", GREY.tobytes()), cv2.cvtColor(GREY, cv2.COLOR_GRAY2BGR)),
    "pushed jpeg": (pushed("jpeg", JPEG), DECODED),
    "MJPG recording": (file("v.mkv", mkv([(40.0 * k, JPEG) for k in range(5)], WIDTH, HEIGHT)), DECODED),
    "folder": (file("a.png", encoded(".png", FRAME)), FRAME),
    "folder of JPEGs": (file("a.jpg", JPEG), DECODED),
}


@pytest.mark.parametrize(("play", "bgr"), SOURCES_OF_FRAMES.values(), ids=SOURCES_OF_FRAMES)
def test_every_source_follows_the_request_from_one_frame_to_the_next(tmp_path, slot, clock, monkeypatch, play, bgr):
    """As captured before a request; then, byte for byte, what the model process would make of the frame."""

    def published(frame: object) -> np.ndarray:
        assert isinstance(frame, CapturedFrame) and frame.size == (HEIGHT, WIDTH)
        slot.publish(slot.latest_seq + 1, frame.t_capture_ns, frame.capture_clock)
        return slot.peek(0).image

    with closing(play(tmp_path, slot, clock, monkeypatch)) as items:
        opened = next(items)
        assert isinstance(opened, CameraOpened) and (opened.width, opened.height) == (WIDTH, HEIGHT)
        assert np.array_equal(published(next(items)), bgr[..., ::-1]) and slot.peek(0).image_request == 0
        slot.request_images(encode(REQUEST))
        image = published(next(items))  # no second CameraOpened: the source is as it was
        assert image.shape == (280, 392, 3) and np.array_equal(image, expected(bgr, REQUEST))
        assert slot.peek(0).image_request == 1


@pytest.mark.parametrize("name", ["v4l2 MJPG", "pushed jpeg", "MJPG recording"])
def test_a_jpeg_is_decoded_at_a_part_of_its_size_where_that_is_enough(tmp_path, slot, clock, monkeypatch, name):
    play, bgr = SOURCES_OF_FRAMES[name]
    slot.request_images(encode(SMALL))
    with closing(play(tmp_path, slot, clock, monkeypatch)) as items:
        opened, frame = next(items), next(items)
    assert (opened.width, opened.height) == (WIDTH, HEIGHT) and frame.size == (HEIGHT, WIDTH)
    assert frame.captured.shape == (HEIGHT // 2, WIDTH // 2, 3)
    difference = frame.image.astype(int) - expected(bgr, SMALL)
    assert np.abs(difference).max() <= 8 and np.abs(difference).mean() < 1


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_damaged_jpeg_is_found_at_every_size_of_decoding(n, share):
    request = ImageRequest(unit=4, longest_side=1540, max_tokens=8, fixed=(480 // 10 // n, 640 // 10 // n))
    wanted = WantedImage(1, request)
    assert decode_jpeg_for(wanted, JPEG).bgr.shape == (HEIGHT // n, WIDTH // n, 3)
    cut = JPEG[: round(share * len(JPEG))]
    for damaged in (cut, cut + b"\xff\xd9"):
        with pytest.raises(SourceError, match="not one whole JPEG"):
            decode_jpeg_for(wanted, damaged)


def test_the_same_bytes_give_the_same_image(slot, clock):
    """A frame that is recorded as it is in the slot and pushed later gives the same image again."""
    slot.request_images(encode(REQUEST))
    config = CameraConfig(source="0")
    first = into_slot(FRAME, slot, config).copy()
    assert np.array_equal(into_slot(FRAME, slot, config), first)
    assert np.array_equal(into_slot(first, slot, config, conversion=None), first)


# -- requests that make no sense --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1" * 40,
        b"\x81\xa4unit\xff",
        encode({"unit": 0, "longest_side": 1540, "max_tokens": 256}),
        encode({"unit": 28, "longest_side": 27, "max_tokens": 256}),
        encode({"unit": 28, "longest_side": 10**9, "max_tokens": 256}),
        encode({"unit": 28, "longest_side": 1540, "max_tokens": 10**6}),
        encode({"unit": 28, "longest_side": 1540, "max_tokens": 256, "fixed": [14, 448]}),
        encode({"unit": 28, "longest_side": 1540, "max_tokens": 256, "fixed": [8192, 8192]}),
        encode({"unit": 28, "longest_side": 1540, "max_tokens": 7}),
        encode({"unit": 28, "longest_side": 84, "max_tokens": 8}),
        encode({"unit": "28", "longest_side": 1540, "max_tokens": 256}),
    ],
    ids=["empty", "noise", "cut", "unit 0", "unit too large", "endless side", "too many tokens", "fixed too small",
         "fixed larger than the slot", "too few tokens", "no grid", "text"],
)  # fmt: skip
def test_a_request_that_makes_no_sense_leaves_the_frame_as_captured(slot, payload):
    """The model process resizes it then. The camera process goes on."""
    slot.request_images(payload)
    assert wanted_image(slot) == WantedImage(0, None)
    image = into_slot(FRAME, slot, CameraConfig(source="0"))
    assert np.array_equal(image, FRAME[..., ::-1])
    slot.publish(1, 1, "arrival")
    assert slot.peek(0).image_request == 0


# -- a device that shows the same image -------------------------------------------------------------------------------


def device_of(pictures: Iterator[np.ndarray], clock: FakeClock):
    def device(config, slot, _clock):
        for pixels in pictures:
            clock.advance(0.1)
            yield CapturedFrame(into_slot(pixels, slot, config), clock.now_ns(), "arrival", 10.0, captured=pixels)

    return device


def with_one_pixel(n: int) -> np.ndarray:
    pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    pixels[64 * (n % 7), n % WIDTH] += 1
    return pixels


def test_the_noise_of_a_sensor_that_is_lost_in_the_small_image_still_counts(slot, clock, monkeypatch):
    slot.request_images(encode(SMALL))
    monkeypatch.setitem(SOURCES, "v4l2", device_of(map(with_one_pixel, range(100)), clock))
    images = set()
    for item in open_source(CameraConfig(source="0"), slot, clock):
        if isinstance(item, CapturedFrame):
            images.add(item.image.tobytes())
            slot.publish(1, item.t_capture_ns, item.capture_clock)
    assert len(images) == 1 and slot.latest_seq == 100


def test_a_frozen_device_is_found_with_small_images_and_at_once_after_a_restart(slot, clock, monkeypatch):
    slot.request_images(encode(REQUEST))
    monkeypatch.setitem(SOURCES, "v4l2", device_of(itertools.repeat(FRAME), clock))
    n_frames = []
    for _ in range(2):
        with pytest.raises(SourceError, match="the same 640x480 image") as caught:
            n_frames.append(0)
            for item in open_source(CameraConfig(source="0"), slot, clock):
                if isinstance(item, CapturedFrame):
                    n_frames[-1] += 1
                    slot.publish(1, item.t_capture_ns, item.capture_clock)
        assert caught.value.reason == "frozen"
    assert n_frames == [29, 0]


# -- the real process -------------------------------------------------------------------------------------------------


def test_a_camera_process_that_starts_again_knows_the_request(camera_process, tmp_path):
    """It is in the shared memory: nobody has to send it again."""
    (tmp_path / "a.png").write_bytes(encoded(".png", FRAME))
    camera = camera_process(tmp_path, fps=50)
    camera.frame()
    camera.slot.request_images(encode(REQUEST))
    wait_until(lambda: camera.frame().image_request == 1)
    camera.kill()
    seq = camera.slot.latest_seq
    camera.start()
    wait_until(lambda: camera.slot.latest_seq > seq)
    frame = camera.frame()
    assert frame.image_request == 1 and np.array_equal(frame.image, expected(FRAME, REQUEST))


def test_the_request_that_is_written_is_the_one_that_is_read():
    """As small as the record allows, with every field at its limit."""
    largest = ImageRequest(unit=128, longest_side=8192, max_tokens=1024, fixed=(8192, 8192))
    assert msgspec.msgpack.decode(encode(largest), type=ImageRequest) == largest and len(encode(largest)) < 256
