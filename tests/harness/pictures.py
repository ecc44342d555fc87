"""Pictures and recordings as people have them: cut, padded, of other depths, and with any time stamps."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np


def scene(height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 BGR with edges and noise, so that its compressed bytes are many."""
    noise = np.random.default_rng(seed).integers(0, 80, (height, width, 3), np.uint8)
    noise[height // 4 : height // 2, width // 4 :] += 120
    return noise


def encoded(suffix: str, pixels: np.ndarray | None = None, *options: int) -> bytes:
    """One file. options: OpenCV's flags and their values."""
    return cv2.imencode(suffix, scene() if pixels is None else pixels, options)[1].tobytes()


def with_segment(jpeg: bytes, payload: bytes, marker: int = 0xE1) -> bytes:
    """The JPEG with an application segment behind its first marker."""
    return jpeg[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


def exif(orientation: int) -> bytes:
    """The payload of an EXIF segment with nothing but the orientation."""
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)


def png_chunk(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def png(depth: int, colour: int, row: bytes, *chunks: bytes, height: int = 4, width: int = 4) -> bytes:
    """A PNG of equal rows. depth, colour: as in its header. chunks: palette and so on."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress((b"\0" + row) * height))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + png_chunk(b"IEND", b"")


def mkv(frames: Iterable[tuple[float, bytes]], width: int, height: int, header_fps: float = 0.0) -> bytes:
    """A Matroska file of JPEGs, each with its time stamp in ms. header_fps: the rate that the header claims; 0: none.

    It has no duration and no index, as a recording that was never ended.
    """

    def element(number: int, payload: bytes) -> bytes:
        name = number.to_bytes((number.bit_length() + 7) // 8, "big")
        return name + (1 << 56 | len(payload)).to_bytes(8, "big") + payload

    def whole(number: int, value: int) -> bytes:
        return element(number, value.to_bytes(8, "big"))

    claim = whole(0x23E383, round(1e9 / header_fps)) if header_fps else b""
    video = element(0xE0, whole(0xB0, width) + whole(0xBA, height))
    track = whole(0xD7, 1) + whole(0x73C5, 1) + whole(0x83, 1) + element(0x86, b"V_MJPEG") + claim + video
    body = element(0x1549A966, whole(0x2AD7B1, 1_000_000)) + element(0x1654AE6B, element(0xAE, track))
    for stamp_ms, jpeg in frames:
        block = b"\x81\0\0\x80" + jpeg  # track 1, 0 ms after its cluster, a key frame
        body += element(0x1F43B675, whole(0xE7, round(stamp_ms)) + element(0xA3, block))
    head = element(0x1A45DFA3, element(0x4282, b"matroska"))
    return head + b"\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff" + body  # a segment of unknown length


def counting_mkv(path: Path, stamps_ms: Iterable[float], header_fps: float = 0.0) -> Path:
    """Frame k has grey level 4k and stamp k."""
    greys = (encoded(".jpg", np.full((48, 64, 3), 4 * k, np.uint8)) for k in range(64))
    path.write_bytes(mkv(zip(stamps_ms, greys, strict=False), 64, 48, header_fps))
    return path
