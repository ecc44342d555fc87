"""Every encoding against OpenCV, which we did not write; a contradiction in a message is refused with its reason."""

from __future__ import annotations

import array
import io
import re
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import simplejpeg

from edge_agent.ros2.image import (
    BAYER,
    PACKED,
    TAKEN,
    YUV_420,
    YUV_422,
    ImageRefused,
    picture_of,
    picture_of_compressed,
)
from edge_agent.wire.pushed_frame import decode_pushed_frame, pack_pushed_frame

WIDTH, HEIGHT = 10, 130  # more rows than one band


class Message(NamedTuple):
    """The fields of sensor_msgs/Image, which rclpy gives as these types."""

    width: int
    height: int
    encoding: str
    is_bigendian: int
    step: int
    data: Any


class Compressed(NamedTuple):
    format: str
    data: Any


def noise(*shape: int, dtype: str = "u1") -> np.ndarray:
    return np.random.default_rng(7).integers(0, np.iinfo(dtype).max, shape, dtype=np.dtype(dtype), endpoint=True)


def message_of(pixels: np.ndarray, encoding: str, height: int = HEIGHT, padding: int = 0, big: bool = False) -> Message:
    """pixels: (rows, ...) of any type; its rows get some bytes of padding."""
    rows = np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")))
    rows = rows.view(np.uint8).reshape(len(pixels), -1)
    padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=123)
    return Message(WIDTH, height, encoding, int(big), padded.shape[1], array.array("B", padded.tobytes()))


def pixels_of(message: Message) -> np.ndarray:
    """What the daemon gets: packed and unpacked as a pushed frame."""
    picture = picture_of(message)
    data = memoryview(picture.data)
    frame = decode_pushed_frame(
        memoryview(pack_pushed_frame(1, 1, picture.width, picture.height, picture.format, data))[1:]
    )
    shape = (frame.height, frame.width) if frame.format == "gray8" else (frame.height, frame.width, 3)
    return np.frombuffer(frame.data, np.uint8).reshape(shape)


@pytest.mark.parametrize("padding", [0, 1, 64])
@pytest.mark.parametrize("encoding", PACKED)
def test_packed_pixels(encoding, padding):
    n_channels, n_bytes, kept = PACKED[encoding]
    assert kept == ("gray8" if n_channels == 1 else "rgb8" if encoding.startswith("rgb") else "bgr8")
    pixels = noise(HEIGHT, WIDTH, n_channels, dtype=f"u{n_bytes}")
    for big in (False, True):
        message = message_of(pixels, encoding, padding=padding, big=big)
        expected = pixels[:, :, : 1 if n_channels == 1 else 3].squeeze()
        if n_bytes == 2:
            expected = cv2.convertScaleAbs(expected, alpha=255 / 65535)
        assert picture_of(message).format == kept
        np.testing.assert_array_equal(pixels_of(message), expected)


def test_every_number_of_16_bits():
    numbers = np.arange(65536, dtype="u2").reshape(HEIGHT - 2, -1)
    message = message_of(numbers, "mono16", HEIGHT - 2)._replace(width=512)
    np.testing.assert_array_equal(pixels_of(message), np.rint(numbers / 257))


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize(
    ("encoding", "code"),
    [
        ("uyvy", cv2.COLOR_YUV2RGB_UYVY),
        ("yuv422", cv2.COLOR_YUV2RGB_UYVY),
        ("yuyv", cv2.COLOR_YUV2RGB_YUYV),
        ("yuv422_yuy2", cv2.COLOR_YUV2RGB_YUYV),
        ("nv12", cv2.COLOR_YUV2RGB_NV12),
        ("nv21", cv2.COLOR_YUV2RGB_NV21),
    ],
)
def test_yuv(encoding, code, padding):
    pixels = noise(HEIGHT, WIDTH, 2) if encoding in YUV_422 else noise(HEIGHT * 3 // 2, WIDTH)
    found = pixels_of(message_of(pixels, encoding, padding=padding)).astype(int)
    assert np.abs(found - cv2.cvtColor(pixels, code)).max() <= 1


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", BAYER)
def test_bayer(encoding, padding):
    pattern, n_bytes = BAYER[encoding]
    pixels = noise(HEIGHT - 1, WIDTH, dtype=f"u{n_bytes}")
    found = pixels_of(message_of(pixels, encoding, HEIGHT - 1, padding))
    of_8_bits = pixels if n_bytes == 1 else cv2.convertScaleAbs(pixels, alpha=255 / 65535)
    expected = cv2.cvtColor(of_8_bits, getattr(cv2, f"COLOR_Bayer{pattern.upper()}2RGB"))
    np.testing.assert_array_equal(found[1:-1, 1:-1], expected[1:-1, 1:-1])


def test_the_edge_of_a_bayer_image_has_its_colour():
    """OpenCV repeats the row before. A surface of one colour must be of one colour up to its edge."""
    mosaic = np.zeros((6, 7), np.uint8)
    mosaic[::2, ::2], mosaic[1::2, 1::2] = 200, 40
    mosaic[::2, 1::2] = mosaic[1::2, ::2] = 90
    message = Message(7, 6, "bayer_rggb8", 0, 7, mosaic.tobytes())
    assert (pixels_of(message) == (200, 90, 40)).all()


def test_every_kind_of_encoding_is_tried():
    assert set(TAKEN) == {*PACKED, *YUV_422, *YUV_420, *BAYER}
    assert len(TAKEN) == len(set(TAKEN))


UNKNOWN = [
    "16UC1",
    "32FC1",
    "64FC1",
    "8SC1",
    "16SC1",
    "32SC1",
    "8UC2",
    "16UC2",
    "nv24",
    "depth",
    "RGB8",
    "",
    "x" * 5000,
]


@pytest.mark.parametrize("encoding", UNKNOWN)
def test_what_is_no_picture_is_refused_by_its_name(encoding):
    with pytest.raises(ImageRefused, match=re.escape(repr(encoding[:32]))) as refused:
        picture_of(Message(2, 2, encoding, 0, 64, bytes(128)))
    assert refused.value.reason == "encoding" and len(str(refused.value)) < 600


def test_a_depth_image_is_named():
    with pytest.raises(ImageRefused, match="depth image in millimetres"):
        picture_of(Message(2, 2, "16UC1", 0, 4, bytes(8)))


@pytest.mark.parametrize(
    ("width", "height", "encoding", "step", "n_bytes"),
    [
        (4, 3, "rgb8", 11, 33),  # a row does not fit
        (4, 3, "rgb8", 0, 0),
        (4, 3, "rgb8", 12, 35),
        (4, 3, "rgb8", 12, 37),
        (4, 3, "rgb8", 12, 0),
        (4, 3, "rgb8", 2**32 - 1, 36),
        (0, 3, "rgb8", 12, 36),
        (4, 0, "mono8", 4, 0),
        (2**32 - 1, 2**32 - 1, "mono8", 2**32 - 1, 16),
        (65_535, 65_535, "mono8", 65_535, 16),
        (65_536, 1, "mono8", 65_536, 65_536),
        (4, 3, "mono16", 4, 12),
        (3, 2, "yuyv", 6, 12),
        (3, 2, "nv12", 3, 9),
        (2, 3, "nv21", 2, 9),
        (2, 2, "nv12", 2, 4),  # only the rows of Y
        (1, 4, "bayer_rggb8", 1, 4),
        (4, 1, "bayer_grbg16", 8, 8),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(width, height, encoding, step, n_bytes):
    with pytest.raises(ImageRefused, match="expected") as refused:
        picture_of(Message(width, height, encoding, 0, step, array.array("B", bytes(n_bytes))))
    assert refused.value.reason == "size"


# -- compressed -------------------------------------------------------------------------------------------------------


def jpeg(progressive: bool = False) -> bytes:
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)]
    return bytes(cv2.imencode(".jpg", noise(33, 50, 3), options)[1])


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_passes_through(progressive):
    data = jpeg(progressive)
    picture = picture_of_compressed(Compressed("rgb8; jpeg compressed bgr8", array.array("B", data)))
    assert (picture.format, picture.width, picture.height, bytes(picture.data)) == ("jpeg", 50, 33, data)
    assert simplejpeg.decode_jpeg_header(data)[:2] == (33, 50)


def test_a_jpeg_with_more_before_its_size():
    """An Exif segment, fillers before a marker, a restart marker."""
    data = jpeg()
    more = b"\xff\xe1\x00\x08Exif\0\0" + b"\xff\xff\xff\xd0"
    assert picture_of_compressed(Compressed("", data[:2] + more + data[2:])).width == 50


PNG = bytes(cv2.imencode(".png", noise(3, 3))[1])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (PNG, "found PNG"),
        (b"", "found no JPEG"),
        (b"\xff\xd8", "found no JPEG"),
        (b"RIFF0000WEBP", "found WebP"),
        (jpeg()[:40], "no size"),
        (b"\xff\xd8\xff\xd9", "no size"),
        (b"\xff\xd8\xff\xe0\x00\x00" * 9, "no size"),
        (b"\xff\xd8\xff\xc0\x00\x11\x08\x00", "no size"),
        (jpeg().replace(b"\xff\xc0", b"\xff\xc3", 1), "lossless"),
        (jpeg().replace(b"\xff\xc0\x00\x11\x08\x00\x21", b"\xff\xc0\x00\x11\x08\x00\x00", 1), "50x0"),
    ],
)
def test_what_is_not_a_whole_jpeg_is_refused(data, expected):
    with pytest.raises(ImageRefused, match=expected):
        picture_of_compressed(Compressed("png", data))


def test_random_damage_to_a_header_never_crashes():
    data, rng = jpeg(), np.random.default_rng(3)
    for _ in range(300):
        damaged = bytearray(data[: rng.integers(2, 200)])
        for at in rng.integers(0, len(damaged), 4):
            damaged[at] = rng.integers(0, 256)
        try:
            picture = picture_of_compressed(Compressed("jpeg", bytes(damaged)))
        except ImageRefused:
            continue
        assert picture.width >= 1 and picture.height >= 1


def test_too_many_bytes_of_jpeg(monkeypatch):
    monkeypatch.setattr("edge_agent.ros2.image.MAX_JPEG_BYTES", 100)
    with pytest.raises(ImageRefused, match="expected at most 100 bytes"):
        picture_of_compressed(Compressed("jpeg", io.BytesIO(jpeg()).getvalue()))
