"""Recordings: a video file -> frames with their own stamps. The one reader for the camera, bench, imatrix and evaluate.

A container's header may claim any rate, number of frames and duration, so none of them is believed: a frame's stamp is
that of the frame. The file is opened here and given to FFmpeg as a descriptor, because FFmpeg reads a name by rules of
its own: a colon, a per cent sign or a byte that is not UTF-8 means something else to it.

The frames of an MJPG recording are decoded by picture.py, which finds damage. FFmpeg's decoders conceal it, so half a
frame of another codec cannot be found.
"""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path

import cv2
import numpy as np

from edge_agent.camera.picture import WHOLE, DecodedFrame, decode_jpeg_for
from edge_agent.camera.source import MAX_PIXELS, SourceError, WantedImage, check_size
from edge_agent.errors import fault_of
from edge_agent.time_units import NS_PER_MS, NS_PER_S

USUAL_FPS = 30.0  # Hz, where neither stamps nor configuration have a rate
MAX_FPS = 1000.0
MAX_GAP_NS = 5 * NS_PER_S  # a longer pause between two frames is shortened to this
RATE_FRAMES = 60  # whose stamps give the rate


class Recording:
    """Owns the descriptor of a video file."""

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        """Raises SourceError if the file cannot be opened."""
        self.path, self.max_pixels = str(path), max_pixels
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise SourceError("absent", f"{path}: no such file or folder", "source-file") from None
        except OSError as error:
            fault = fault_of(error, "source-file")
            raise SourceError("unreadable", f"{path}: {error.strerror}", fault) from None
        if not stat.S_ISREG(os.fstat(self.fd).st_mode):
            os.close(self.fd)
            raise SourceError("absent", f"{path}: not a regular file", "source-file")

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.fd)

    def no_frame(self) -> SourceError:
        detail = f"{self.path}: contains no frame that can be decoded"
        return SourceError("unreadable", detail, "source-file")

    def n_packets(self) -> int:
        """How many frames the file holds, about: counted, without decoding them."""
        with Playback(self, packets=True) as playback:
            return sum(1 for _ in iter(playback.grab, None))

    def fps(self) -> float | None:
        """The mean rate of the first frames, by their stamps. None: they have no stamps that tell."""
        with Playback(self, packets=True) as playback:
            stamps_ms: list[float] = []
            while len(stamps_ms) < RATE_FRAMES and playback.grab() is not None:
                stamps_ms.append(playback.stamp_ms)
        span_s = (max(stamps_ms, default=0.0) - min(stamps_ms, default=0.0)) / 1000
        fps = (len(stamps_ms) - 1) / span_s if span_s > 0 else math.inf
        return round(fps, 2) if fps <= MAX_FPS else None


class Playback:
    """One pass through a recording. close() ends it.

    packets: only count and time the frames; image() is not possible. It costs a fraction of decoding.
    """

    def __init__(self, recording: Recording, usual_fps: float = USUAL_FPS, packets: bool = False) -> None:
        self.recording = recording
        self._capture = capture = cv2.VideoCapture(f"/proc/self/fd/{recording.fd}", cv2.CAP_FFMPEG)
        self._bgr: np.ndarray | None = None
        is_mjpg = int(capture.get(cv2.CAP_PROP_FOURCC)) == cv2.VideoWriter.fourcc(*"MJPG")
        self._is_jpeg = is_mjpg and not capture.get(cv2.CAP_PROP_ORIENTATION_META)
        if packets or self._is_jpeg:
            capture.set(cv2.CAP_PROP_FORMAT, -1)  # retrieve() returns the stored bytes
        self._height = int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        self._width = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        header_fps = capture.get(cv2.CAP_PROP_FPS)
        self.usual_gap_ns = round(NS_PER_S / (header_fps if 1 <= header_fps <= 240 else usual_fps))
        self.n_grabbed = 0
        self.stamp_ms = 0.0  # of the frame, as it is stored
        self._time_ns = 0

    def __enter__(self) -> Playback:
        return self

    def __exit__(self, *exception: object) -> None:
        self._capture.release()

    def grab(self) -> int | None:
        """Go to the next frame. Returns its time since the first frame, in ns, always more than the one before.

        None: the end. A gap that is not positive is replaced by the usual one, and a gap of hours by MAX_GAP_NS.
        """
        if not self._capture.grab():
            return None
        before_ms, self.stamp_ms = self.stamp_ms, self._capture.get(cv2.CAP_PROP_POS_MSEC)
        self.n_grabbed += 1
        if self.n_grabbed > 1:
            gap_ns = (self.stamp_ms - before_ms) * NS_PER_MS
            self._time_ns += round(min(gap_ns, MAX_GAP_NS)) if gap_ns >= 1 else self.usual_gap_ns
        return self._time_ns

    def image(self) -> np.ndarray:
        """The frame that was grabbed, (H, W, 3) uint8, BGR. Raises SourceError if it is damaged."""
        return self.image_for(WHOLE).bgr

    def image_for(self, wanted: WantedImage) -> DecodedFrame:
        """The same, of MJPG at the smallest size that has enough pixels for the image that is wanted."""
        where = f"{self.recording.path}: frame {self.n_grabbed}"
        check_size(self._height, self._width, self.recording.max_pixels)
        ok, found = self._capture.retrieve(None if self._is_jpeg else self._bgr)
        if not ok:
            raise SourceError("unreadable", f"{where}: cannot be decoded")
        if not self._is_jpeg:
            self._bgr = found
            return DecodedFrame(found, found.shape[:2])
        try:
            decoded = decode_jpeg_for(wanted, found.reshape(-1), self.recording.max_pixels)
        except SourceError as error:
            raise SourceError(error.reason, f"{where}: {error.detail}") from None
        if decoded.size != (self._height, self._width):
            found_size, size = f"{decoded.size[1]}x{decoded.size[0]}", f"{self._width}x{self._height}"
            raise SourceError("unreadable", f"{where}: expected {size}, found {found_size}")
        return decoded
