"""Pictures: the bytes of a file or of a frame -> pixels. The one reader for the camera, bench, imatrix and evaluate.

A picture is taken if it is whole and has 8 bits for each channel of grey or colour. Everything else is refused with the
reason: a picture that is cut or damaged, more bits, transparency, more pixels than allowed. The bytes are read here and
decoded from memory, because OpenCV reads names of files by rules of its own and can crash on one.

What is checked: libjpeg's warnings, because OpenCV decodes half a JPEG to an image with a grey half and reports no
error; the check sum of each chunk of a PNG; the length of a WebP and a BMP. JPEG, WebP and BMP have no check sums:
damage that leaves a valid picture cannot be found.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from edge_agent.camera.source import MAX_PIXELS, SourceError, WantedImage, check_size
from edge_agent.errors import fault_of
from edge_agent.ipc.frame_slot import MAX_IMAGE_BYTES
from edge_agent.ipc.image_grid import jpeg_reduction

PICTURE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
MAX_FILE_BYTES = 2 * MAX_IMAGE_BYTES  # more than the largest picture takes in any of the formats
# Some encoders leave a few bytes before the end marker. A damaged picture leaves hundreds there.
MAX_STRAY_BYTES = 16
WHOLE = WantedImage(0, None)
_STRAY_BYTES = re.compile(r"(\d+) extraneous bytes before marker 0xd9$")

JPEG, PNG, BMP, RIFF, WEBP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF", b"WEBP"


def picture_paths(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their names. Raises SourceError if there are none.

    A hidden file is not a picture: macOS leaves `._a.jpg` beside `a.jpg` on a stick.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise SourceError("absent", f"{folder}: {error.strerror}", fault_of(error, "source-file")) from None
    paths = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")]
    if not paths:
        kinds = ", ".join(PICTURE_SUFFIXES)
        raise SourceError("absent", f"{folder}: no image in this folder; expected {kinds}", "source-file")
    return paths


def read_picture(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """(H, W, 3) uint8, BGR, turned as its EXIF orientation says. Raises SourceError, which names the file."""
    try:
        with path.open("rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            data = file.read(n_bytes) if n_bytes <= MAX_FILE_BYTES else b""
    except OSError as error:
        raise SourceError("unreadable", f"{path}: {error.strerror}") from None
    try:
        if n_bytes > MAX_FILE_BYTES:
            raise SourceError("too-large", f"expected at most {MAX_FILE_BYTES} bytes, found {n_bytes}")
        return decode_picture(data, max_pixels)
    except SourceError as error:
        raise SourceError(error.reason, f"{path}: {error.detail}") from None


def decode_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The bytes of a JPEG, PNG, WebP or BMP -> (H, W, 3) uint8, BGR, turned as its EXIF orientation says.

    Raises SourceError.
    """
    if data.startswith(JPEG):
        bgr = decode_jpeg(data, max_pixels)
        return _opencv(data, cv2.IMREAD_COLOR) if b"Exif\0\0" in data[:65536] else bgr  # OpenCV turns it
    try:
        height, width = _whole_size(data)
    except struct.error:
        raise SourceError("unreadable", "cut in its header") from None
    check_size(height, width, max_pixels)
    pixels = _opencv(data, cv2.IMREAD_UNCHANGED)
    if pixels.dtype != np.uint8:
        bits = 8 * pixels.dtype.itemsize
        raise SourceError("unreadable", f"{bits} bits per channel; expected 8: scale it to 8 bits")
    if pixels.ndim == 3 and pixels.shape[2] == 4 and pixels[:, :, 3].min() < 255:
        raise SourceError("unreadable", "has transparent pixels; expected grey or colour without transparency")
    return _opencv(data, cv2.IMREAD_COLOR)


def decode_jpeg(data: bytes | np.ndarray, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """One JPEG -> (H, W, 3) uint8, BGR, as it is stored. It is whole up to its end marker; what follows is ignored.

    Raises SourceError if libjpeg warns of damage.
    """
    return decode_jpeg_for(WHOLE, data, max_pixels).bgr


class DecodedFrame(NamedTuple):
    bgr: np.ndarray  # (H, W, 3) uint8
    size: tuple[int, int]  # height and width as stored, pixels; `bgr` may be a half, a quarter or an eighth of it


def decode_jpeg_for(wanted: WantedImage, data: bytes | np.ndarray, max_pixels: int = MAX_PIXELS) -> DecodedFrame:
    """As decode_jpeg(), at the smallest size that has enough pixels for the image that is wanted.

    libjpeg reads all of the data in each case, and finds the same damage.
    """
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        check_size(height, width, max_pixels)
        n = jpeg_reduction(height, width, wanted.size(height, width))
        smallest = {"min_height": -(-height // n), "min_width": -(-width // n)} if n > 1 else {}
        try:
            bgr = simplejpeg.decode_jpeg(data, "BGR", **smallest)
        except ValueError as error:
            stray = _STRAY_BYTES.search(str(error))
            if stray is None or int(stray[1]) > MAX_STRAY_BYTES:
                raise
            bgr = simplejpeg.decode_jpeg(data, "BGR", strict=False, **smallest)
    except ValueError as error:
        raise SourceError("unreadable", f"not one whole JPEG: {error}") from None
    return DecodedFrame(bgr, (height, width))


def _opencv(data: bytes, flags: int) -> np.ndarray:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise SourceError("unreadable", f"OpenCV: {error.err}") from None
    if pixels is None:
        raise SourceError("unreadable", "damaged: not an image that OpenCV can decode")
    return pixels


# -- whole or cut, and how large, before anything is decoded -----------------------------------------------------------


def _whole_size(data: bytes) -> tuple[int, int]:
    """Height and width of a PNG, WebP or BMP. Raises SourceError if it is cut, struct.error if its header is."""
    if data.startswith(PNG):
        return _png_size(data)
    if data.startswith(RIFF) and data[8:12] == WEBP:
        return _webp_size(data)
    if data.startswith(BMP):
        return _bmp_size(data)
    raise SourceError("unreadable", "not a JPEG, PNG, WebP or BMP picture")


def _png_size(data: bytes) -> tuple[int, int]:
    view, start, name = memoryview(data), len(PNG), b""
    while name != b"IEND":
        n_bytes, name = struct.unpack_from(">I4s", data, start)
        end = start + 8 + n_bytes
        if end + 4 > len(data):
            raise SourceError("unreadable", f"PNG: cut after {len(data)} bytes")
        if zlib.crc32(view[start + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise SourceError("unreadable", f"PNG: damaged: wrong check sum of the chunk at byte {start}")
        start = end + 4
    width, height = struct.unpack_from(">II", data, 16)
    return height, width


def _webp_size(data: bytes) -> tuple[int, int]:
    n_bytes, kind = struct.unpack_from("<I4x4s", data, 4)
    if 8 + n_bytes > len(data):
        raise SourceError("unreadable", f"WebP: cut after {len(data)} of {8 + n_bytes} bytes")
    if kind == b"VP8X":  # 24 bits each, less one
        width, width_high, height, height_high = struct.unpack_from("<HBHB", data, 24)
        return 1 + (height | height_high << 16), 1 + (width | width_high << 16)
    if kind == b"VP8L":  # 14 bits each, less one
        bits = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return height & 0x3FFF, width & 0x3FFF


def _bmp_size(data: bytes) -> tuple[int, int]:
    pixels_at, header_bytes = struct.unpack_from("<II", data, 10)
    if header_bytes < 40:
        raise SourceError("unreadable", "BMP: of OS/2; expected the format of Windows")
    width, height, bits, compression = struct.unpack_from("<ii2xHI", data, 18)
    row_bytes = (abs(width) * bits + 31) // 32 * 4
    is_packed = compression in (1, 2)  # run lengths: OpenCV reads to their end
    if not is_packed and pixels_at + row_bytes * abs(height) > len(data):
        raise SourceError("unreadable", f"BMP: cut after {len(data)} bytes")
    return abs(height), abs(width)
