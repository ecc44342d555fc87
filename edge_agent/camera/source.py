"""The camera process: one source, named by one string, into the newest-frame slot.

    /dev/video0, v4l2:/dev/v4l/by-id/..., 0    a V4L2 camera; the by-id name stays the same over a replug
    clip.mp4                                   a video file, at its own pace or (realtime: false) as fast as it is taken
    frames/                                    a folder of images in the order of their names
    gst:nvarguscamerasrc sensor-id=0 ! nvvidconv ! video/x-raw,format=RGBA
                                               a GStreamer pipeline, here a CSI camera; runs in gst-launch-1.0
    zmq:ipc:///run/edge-agent/frames           frames pushed by the process that owns the camera: frames.pack_frame()

The supervisor starts it (worker.py) with the CameraConfig as first message; back go CameraOpened, CameraFault and
CameraEnded. A live source that fails is named in a fault and opened again for ever; what cannot heal (no such file)
ends the process with EX_CONFIG. It cannot free itself from a read() that hangs: the supervisor kills it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator

import cv2
import msgspec
import numpy as np

from edge_agent.errors import UserError
from edge_agent.ipc.events import CameraFault, CameraFaultReason
from edge_agent.ipc.frame_slot import MAX_IMAGE_BYTES, Slot
from edge_agent.wire.messages import CaptureClock

NS_PER_S = 1_000_000_000
STALL_S = 2.0  # a live source silent for so long has stalled
FROZEN_FRAMES, FROZEN_NS = 30, NS_PER_S  # so many identical frames over so long: no sensor without noise does that


class CapturedFrame(msgspec.Struct, frozen=True):
    """One image, already in the slot's free buffer, not yet published."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    t_capture_ns: int
    capture_clock: CaptureClock
    fps: float | None = None  # what the source says it gives
    frame_id: int | None = None  # None: counted here


SourceItems = Generator["CapturedFrame | CameraFault", None, None]


class SourceError(UserError):
    """The source gives no image, and why: what a CameraFault says."""

    def __init__(self, reason: CameraFaultReason, detail: str, heals: bool = True):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.heals = heals  # worth another try: a camera may come back, a misspelt path does not


# What they share.


def check_size(height: int, width: int) -> None:
    if height * width * 3 > MAX_IMAGE_BYTES:
        limit = f"the limit is {MAX_IMAGE_BYTES // 3} pixels (7680x4320)"
        raise SourceError("too-large", f"frames of {width}x{height}; {limit}", heals=False)


def into_slot(pixels: np.ndarray, slot: Slot, conversion: int | None = cv2.COLOR_BGR2RGB) -> np.ndarray:
    """Convert into the slot's free buffer, with no copy in between; returns that buffer's view, RGB."""
    if pixels.dtype != np.uint8 or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise SourceError("unreadable", f"expected 8-bit pixels of 3 channels, found {pixels.shape} {pixels.dtype}")
    height, width = pixels.shape[:2]
    check_size(height, width)
    image = slot.write(height, width)
    if conversion is None:
        np.copyto(image, pixels)
    else:
        cv2.cvtColor(pixels, conversion, dst=image)  # in place: shape and type are what it would allocate
    return image


def sleep_until(due_ns: int) -> None:
    time.sleep(max(0, due_ns - time.monotonic_ns()) / NS_PER_S)


def wait_for_reader(slot: Slot) -> int:
    """Wait until the model asks for another frame; returns that time, which stands for a file's time of capture."""
    while not slot.wanted():
        time.sleep(0.001)
    return time.monotonic_ns()


def detect_frozen(items: SourceItems, slot: Slot) -> SourceItems:
    """Give up on a device that hands out one buffer over and over with success: a dead image processor does.

    The frame before the first is the last one published, also before a restart: a device that is still frozen when it
    is opened again gets no second second.
    """
    newest = slot.peek(0)
    last = fingerprint(newest.image) if newest else None
    n_same, since_ns = FROZEN_FRAMES, 0
    with contextlib.closing(items):  # the device, before it is opened again
        for item in items:
            if isinstance(item, CapturedFrame):
                now_ns, this = time.monotonic_ns(), fingerprint(item.image)
                if this != last:
                    last, n_same, since_ns = this, 0, now_ns
                n_same += 1
                if n_same >= FROZEN_FRAMES and now_ns - since_ns >= FROZEN_NS:
                    raise SourceError(
                        "frozen", f"the same {item.image.shape[1]}x{item.image.shape[0]} image over and over"
                    )
            yield item


def fingerprint(image: np.ndarray) -> bytes:
    """Some 4096 bytes from all over and every 64th row: enough to meet a sensor's noise, cheap enough for 4K."""
    flat, rows = image.reshape(-1), image.reshape(len(image), -1)
    return flat[:: flat.size // 4096 | 1].tobytes() + rows[::64].tobytes() + bytes(str(image.shape), "ascii")
