"""sensor_msgs/Image and CompressedImage -> a frame of the wire, or a refusal with its reason. Pure functions.

    picture = picture_of(message)                        # sensor_msgs/Image
    pusher.push(picture.data, format=picture.format, width=picture.width, height=picture.height, ...)

What has 8 bits for each channel of grey or colour is passed on as it is, without the padding of its rows. 16 bits
become 8; YUV and Bayer patterns become rgb8. A depth image, floats and signed numbers are no picture: they are refused,
and so is a message whose sizes contradict each other. Needs numpy, and neither OpenCV nor cv_bridge.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from edge_agent.client.pusher import PixelFormat

Pixels = np.ndarray[Any, Any]
MAX_SIDE, MAX_PIXELS = 65_535, 7680 * 4320  # of a pushed frame
MAX_JPEG_BYTES = 3 * MAX_PIXELS  # no longer than the same picture without compression
BAND_ROWS = 64  # converted at once: what is computed in between stays in the cache, and small. Even, for NV12

ImageReason = Literal["encoding", "size", "compressed"]
# Reason of a refusal -> what is wrong. docs/ros2.md has the same table.
IMAGE_REASONS: dict[ImageReason, str] = {
    "encoding": "The encoding is not a picture with grey or colour: depth, floats, signed numbers, or unknown.",
    "size": "Width, height, step, encoding and the number of bytes contradict each other, or the picture is too large.",
    "compressed": "A CompressedImage is not a whole baseline or progressive JPEG.",
}


class ImageRefused(ValueError):
    """One line: what was expected and found."""

    def __init__(self, reason: ImageReason, line: str) -> None:
        super().__init__(line)
        self.reason = reason


class ImageMessage(Protocol):
    """What is read of sensor_msgs/Image."""

    width: int
    height: int
    encoding: str
    is_bigendian: int
    step: int
    data: Any  # uint8[]


class Picture(NamedTuple):
    format: PixelFormat
    width: int
    height: int
    data: Any  # a buffer of bytes; its rows have no padding


class _Packed(NamedTuple):
    """An encoding whose pixels lie beside each other."""

    n_channels: int  # in the message
    n_bytes: int  # of one channel
    format: PixelFormat  # of its first three channels, or of its only one


# 8UC1 and 8UC3 do not name their colours. cv_bridge takes them as mono8 and bgr8, and so do its users.
PACKED: dict[str, _Packed] = {
    "rgb8": _Packed(3, 1, "rgb8"),
    "rgba8": _Packed(4, 1, "rgb8"),
    "bgr8": _Packed(3, 1, "bgr8"),
    "bgra8": _Packed(4, 1, "bgr8"),
    "mono8": _Packed(1, 1, "gray8"),
    "8UC1": _Packed(1, 1, "gray8"),
    "8UC3": _Packed(3, 1, "bgr8"),
    "8UC4": _Packed(4, 1, "bgr8"),
    "rgb16": _Packed(3, 2, "rgb8"),
    "rgba16": _Packed(4, 2, "rgb8"),
    "bgr16": _Packed(3, 2, "bgr8"),
    "bgra16": _Packed(4, 2, "bgr8"),
    "mono16": _Packed(1, 2, "gray8"),
    "16UC3": _Packed(3, 2, "bgr8"),
    "16UC4": _Packed(4, 2, "bgr8"),
}
# Encoding -> where the first Y, U and V of four bytes are.
YUV_422: dict[str, tuple[int, int, int]] = {
    "uyvy": (1, 0, 2),
    "yuv422": (1, 0, 2),
    "yuyv": (0, 1, 3),
    "yuv422_yuy2": (0, 1, 3),
}
YUV_420 = {"nv12": (0, 1), "nv21": (1, 0)}  # where U and V are in a pair
# Encoding -> its pattern, by rows of two, and the bytes of one pixel.
BAYER: dict[str, tuple[str, int]] = {
    f"bayer_{pattern}{8 * n_bytes}": (pattern, n_bytes)
    for pattern in ("rggb", "bggr", "gbrg", "grbg")
    for n_bytes in (1, 2)
}
TAKEN = (*PACKED, *YUV_422, *YUV_420, *BAYER)
_NOT_A_PICTURE = {
    "16UC1": "a depth image in millimetres (REP 118); a thermal camera or the like publishes mono16",
    "32FC1": "a depth image in metres (REP 118)",
}


def picture_of(message: ImageMessage) -> Picture:
    """Raises ImageRefused."""
    encoding, width, height = message.encoding, message.width, message.height
    if encoding not in TAKEN:
        found = _NOT_A_PICTURE.get(encoding, "not a picture of 8 or 16 bits for each channel of grey or colour")
        raise ImageRefused("encoding", f"encoding {encoding[:32]!r} is {found}; expected one of {', '.join(TAKEN)}")
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise ImageRefused("size", f"expected 1x1 to {MAX_PIXELS} pixels, found {width}x{height}")
    if encoding in PACKED:
        return _from_packed(message, PACKED[encoding])
    if encoding in BAYER:
        return Picture("rgb8", width, height, _from_bayer(message, *BAYER[encoding]))
    if width % 2 or (encoding in YUV_420 and height % 2):
        even = "an even width and height" if encoding in YUV_420 else "an even width"
        raise ImageRefused("size", f"{encoding}: expected {even}, found {width}x{height}")
    from_yuv = _from_yuv_422 if encoding in YUV_422 else _from_yuv_420
    return Picture("rgb8", width, height, from_yuv(message))


def _rows(message: ImageMessage, row_bytes: int, n_rows: int) -> Pixels:
    """(n_rows, row_bytes) uint8: the rows without their padding; shares the memory of the message."""
    data = np.frombuffer(message.data, np.uint8)
    what = f"{message.width}x{message.height} {message.encoding}"
    if message.step < row_bytes:
        raise ImageRefused("size", f"{what}: expected a step of {row_bytes} bytes or more, found {message.step}")
    if len(data) != message.step * n_rows:
        expected = f"{message.step * n_rows} bytes ({n_rows} rows of step {message.step})"
        raise ImageRefused("size", f"{what}: expected {expected}, found {len(data)}")
    return data.reshape(n_rows, message.step)[:, :row_bytes]


def _from_packed(message: ImageMessage, packed: _Packed) -> Picture:
    width, height, (n_channels, n_bytes, _) = message.width, message.height, packed
    rows = _rows(message, width * n_channels * n_bytes, height)
    n_kept = 1 if packed.format == "gray8" else 3
    if n_bytes == 1 and n_kept == n_channels:
        return Picture(packed.format, width, height, np.ascontiguousarray(rows))
    pixels = np.empty((height, width, n_kept), np.uint8)
    for band in _bands(height):
        found = rows[band] if n_bytes == 1 else _to_8_bits(rows[band], message.is_bigendian)
        pixels[band] = found.reshape(-1, width, n_channels)[:, :, :n_kept]  # without alpha
    return Picture(packed.format, width, height, pixels)


def _to_8_bits(rows: Pixels, is_bigendian: int) -> Pixels:
    """(H, 2 n) uint8, the bytes of numbers of 16 bits -> (H, n) uint8: 255/65535 of each number, rounded."""
    numbers = np.ascontiguousarray(rows).view(">u2" if is_bigendian else "<u2").astype(np.uint32)
    return ((255 * numbers + 32_895) >> 16).astype(np.uint8)


def _bands(height: int) -> Iterator[slice]:
    return (slice(top, min(top + BAND_ROWS, height)) for top in range(0, height, BAND_ROWS))


# -- YUV --------------------------------------------------------------------------------------------------------------


def _from_yuv_422(message: ImageMessage) -> Pixels:
    width, height = message.width, message.height
    at_y, at_u, at_v = YUV_422[message.encoding]
    rows = _rows(message, 2 * width, height)
    rgb = np.empty((height, width, 3), np.uint8)
    for band in _bands(height):
        row = rows[band]
        _write_rgb(rgb[band], row[:, at_y::2], row[:, at_u::4], row[:, at_v::4])
    return rgb


def _from_yuv_420(message: ImageMessage) -> Pixels:
    """The rows of Y, and after them half as many rows with pairs of U and V."""
    width, height = message.width, message.height
    at_u, at_v = YUV_420[message.encoding]
    rows = _rows(message, width, height + height // 2)
    rgb = np.empty((height, width, 3), np.uint8)
    for band in _bands(height):
        pairs = rows[height + band.start // 2 : height + band.stop // 2].repeat(2, axis=0)
        _write_rgb(rgb[band], rows[band], pairs[:, at_u::2], pairs[:, at_v::2])
    return rgb


def _write_rgb(rgb: Pixels, y: Pixels, u: Pixels, v: Pixels) -> None:
    """rgb: (H, W, 3) uint8, is written; y: (H, W); u, v: (H, W / 2). BT.601, Y from 16 to 235, as OpenCV takes it."""
    luma = 298 * np.maximum(y.astype(np.int32) - 16, 0) + 128
    u, v = u.astype(np.int32) - 128, v.astype(np.int32) - 128
    for channel, chroma in enumerate((409 * v, -100 * u - 208 * v, 516 * u)):
        rgb[:, :, channel] = ((luma + chroma.repeat(2, axis=1)) >> 8).clip(0, 255)


# -- Bayer ------------------------------------------------------------------------------------------------------------


def _from_bayer(message: ImageMessage, pattern: str, n_bytes: int) -> Pixels:
    """Each missing colour of a pixel is the mean of the nearest pixels that have it."""
    width, height = message.width, message.height
    if width < 2 or height < 2:
        raise ImageRefused("size", f"{message.encoding}: expected 2x2 pixels or more, found {width}x{height}")
    rows = _rows(message, width * n_bytes, height)
    if n_bytes == 2:
        rows = np.concatenate([_to_8_bits(rows[band], message.is_bigendian) for band in _bands(height)])
    padded = np.pad(rows, 1, mode="reflect")  # a mirrored row or column continues the pattern
    rgb = np.empty((height, width, 3), np.uint8)
    for i, colour in enumerate(pattern):
        top, left = divmod(i, 2)
        site, here = _Site(padded, top, left, height, width), rgb[top::2, left::2]
        here[:, :, "rgb".index(colour)] = site.at(0, 0)
        row, column = site.mean((0, -1), (0, 1)), site.mean((-1, 0), (1, 0))
        if colour == "g":
            is_red_beside = pattern[i ^ 1] == "r"  # i ^ 1: the other pixel of the row of the pattern
            here[:, :, 0], here[:, :, 2] = (row, column) if is_red_beside else (column, row)
        else:
            here[:, :, 1] = site.mean((0, -1), (0, 1), (-1, 0), (1, 0))
            here[:, :, 2 if colour == "r" else 0] = site.mean((-1, -1), (-1, 1), (1, -1), (1, 1))
    return rgb


class _Site(NamedTuple):
    """The pixels of one place of the pattern: every second pixel of every second row."""

    padded: Pixels  # with one more row and column on each side
    top: int
    left: int
    height: int  # of the picture
    width: int

    def at(self, down: int, right: int) -> Pixels:
        """Their neighbours in a direction."""
        top, left = 1 + self.top + down, 1 + self.left + right
        n_rows, n_columns = (self.height - self.top + 1) // 2, (self.width - self.left + 1) // 2
        return self.padded[top : top + 2 * n_rows - 1 : 2, left : left + 2 * n_columns - 1 : 2]

    def mean(self, *directions: tuple[int, int]) -> Pixels:
        total = np.uint16(len(directions) // 2) + self.at(*directions[0])
        for direction in directions[1:]:
            total = total + self.at(*direction)
        mean: Pixels = (total // np.uint16(len(directions))).astype(np.uint8)
        return mean


# -- JPEG -------------------------------------------------------------------------------------------------------------


class CompressedMessage(Protocol):
    """What is read of sensor_msgs/CompressedImage."""

    format: str
    data: Any  # uint8[]


FILE_STARTS = {b"\x89PNG": "PNG", b"RIFF": "WebP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"BM": "BMP"}
# Markers of JPEG: start of frame, of the kinds that are taken and of the others; and those without a length.
TAKEN_FRAMES = (0xC0, 0xC1, 0xC2)
OTHER_FRAMES = (0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD8))
START_OF_SCAN, END = 0xDA, 0xD9


def picture_of_compressed(message: CompressedMessage) -> Picture:
    """A JPEG as it is, with the size in its header. The daemon decodes it, and finds damage. Raises ImageRefused."""
    data = memoryview(message.data).cast("B")
    if len(data) > MAX_JPEG_BYTES:
        raise ImageRefused("compressed", f"expected at most {MAX_JPEG_BYTES} bytes, found {len(data)}")
    start = bytes(data[:4])
    if not start.startswith(b"\xff\xd8\xff"):
        kind = next((kind for magic, kind in FILE_STARTS.items() if start.startswith(magic)), "no JPEG")
        named = f"format {message.format[:64]!r}" if message.format else "without a format"
        raise ImageRefused("compressed", f"expected a JPEG, found {kind} ({named}); set the publisher to jpeg")
    width, height = _jpeg_size(data)
    if not 1 <= width * height <= MAX_PIXELS:
        raise ImageRefused("size", f"JPEG: expected 1x1 to {MAX_PIXELS} pixels, found {width}x{height}")
    return Picture("jpeg", width, height, data)


def _jpeg_size(data: memoryview) -> tuple[int, int]:
    """Width and height. Raises ImageRefused."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF or marker in WITHOUT_LENGTH:  # 0xFF: a filler before a marker
            at += 1 if marker == 0xFF else 2
            continue
        if marker in OTHER_FRAMES:
            raise ImageRefused(
                "compressed", "expected a baseline or progressive JPEG, found a lossless or arithmetic one"
            )
        if marker in TAKEN_FRAMES and at + 9 <= len(data):
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        if marker in (START_OF_SCAN, END):
            break
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise ImageRefused("compressed", f"JPEG of {len(data)} bytes: no size in its header; it is cut or damaged")
