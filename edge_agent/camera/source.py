"""What every source of frames uses: CapturedFrame, SourceError, pixels into the slot, detection of a frozen device.

A source is a generator. It fills the slot's free buffer, then yields a CapturedFrame; or it yields a CameraFault and
continues. A source that cannot continue raises SourceError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import cv2
import msgspec
import numpy as np

from edge_agent.camera.clock import Clock
from edge_agent.errors import UserError
from edge_agent.ipc.events import CameraFault, CameraFaultReason
from edge_agent.ipc.frame_slot import MAX_IMAGE_BYTES, Slot
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.messages import CaptureClock

STALL_S = 2.0  # a live source without a frame for this long has stalled
STALL_NS = round(STALL_S * NS_PER_S)
FRAME_POLL_MS = 100  # how often a source that waits for data reads the clock
READER_POLL_NS = NS_PER_MS  # how often a file that is not in real time asks whether the model wants the next frame
# A device is frozen after this many identical frames over at least this time: a sensor's noise never repeats so long.
FROZEN_FRAMES, FROZEN_NS = 30, NS_PER_S


class CapturedFrame(msgspec.Struct, frozen=True):
    """One image, already in the slot's free buffer, not yet published."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    t_capture_ns: int  # CLOCK_MONOTONIC
    capture_clock: CaptureClock  # who took that time
    fps: float | None = None  # the rate that the source reports, Hz
    frame_id: int | None = None  # None: the camera process numbers the frames


SourceItems = Generator["CapturedFrame | CameraFault", None, None]


class SourceError(UserError):
    """The source gives no image. `reason` and `detail` become a CameraFault.

    retryable: whether opening the source again may help. A camera can come back; a wrong path cannot.
    """

    def __init__(self, reason: CameraFaultReason, detail: str, retryable: bool = True):
        super().__init__(f"{reason}: {detail}")
        self.reason: CameraFaultReason = reason
        self.detail = detail
        self.retryable = retryable


def check_size(height: int, width: int) -> None:
    """Raises SourceError if a frame of height x width pixels does not fit into the slot."""
    if height * width * 3 > MAX_IMAGE_BYTES:
        limit = f"the limit is {MAX_IMAGE_BYTES // 3} pixels (7680x4320)"
        raise SourceError("too-large", f"frames of {width}x{height}; {limit}", retryable=False)


def into_slot(pixels: np.ndarray, slot: Slot, conversion: int | None = cv2.COLOR_BGR2RGB) -> np.ndarray:
    """Convert pixels, (H, W, 3) or (H, W) uint8, into the slot's free buffer without a copy in between.

    conversion: OpenCV's code, for example COLOR_BGR2RGB; None copies. Returns the buffer's view, (H, W, 3) uint8 RGB.
    """
    if pixels.dtype != np.uint8 or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise SourceError("unreadable", f"expected 8-bit pixels of 3 channels, found {pixels.shape} {pixels.dtype}")
    height, width = pixels.shape[:2]
    check_size(height, width)
    image = slot.write(height, width)
    if conversion is None:
        np.copyto(image, pixels)
    else:
        cv2.cvtColor(pixels, conversion, dst=image)  # in place: dst has the shape and type that OpenCV would allocate
    return image


def wait_for_reader(slot: Slot, clock: Clock) -> int:
    """Wait until the model asks for another frame. Returns that time, which is a file's time of capture."""
    while not slot.reader_is_idle():
        clock.sleep_until(clock.now_ns() + READER_POLL_NS)
    return clock.now_ns()


def detect_frozen(items: SourceItems, slot: Slot, clock: Clock) -> SourceItems:
    """Pass the items on; raise SourceError when a device returns the same image again and again.

    A dead image processor does that, and every read succeeds. The first frame is compared with the last published one,
    also after a restart, so a device that is still frozen when it is opened again is reported at once.
    """
    newest = slot.peek(0)
    last = fingerprint(newest.image) if newest else None
    n_identical, since_ns = FROZEN_FRAMES, 0
    with contextlib.closing(items):  # closes the device before it is opened again
        for item in items:
            if isinstance(item, CapturedFrame):
                now_ns, this = clock.now_ns(), fingerprint(item.image)
                if this != last:
                    last, n_identical, since_ns = this, 0, now_ns
                n_identical += 1
                if n_identical >= FROZEN_FRAMES and now_ns - since_ns >= FROZEN_NS:
                    size = f"{item.image.shape[1]}x{item.image.shape[0]}"
                    raise SourceError("frozen", f"the same {size} image again and again")
            yield item


def fingerprint(image: np.ndarray) -> bytes:
    """About 4096 bytes from the whole image and every 64th row of (H, W, 3) uint8.

    That is enough to contain a sensor's noise, and cheap enough for a 4K image.
    """
    flat, rows = image.reshape(-1), image.reshape(len(image), -1)
    return flat[:: flat.size // 4096 | 1].tobytes() + rows[::64].tobytes() + bytes(str(image.shape), "ascii")
