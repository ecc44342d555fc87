"""What every source of frames uses: CapturedFrame, SourceError, limits, pixels into the slot, frozen devices.

A source is a generator. It fills the slot's free buffer, then yields a CapturedFrame; or it yields a CameraFault and
continues. A source that cannot continue raises SourceError.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Generator
from typing import NamedTuple

import cv2
import msgspec
import numpy as np

from edge_agent.camera.clock import Clock
from edge_agent.config import CameraConfig
from edge_agent.errors import FAULTS, FaultName, UserError, encodable
from edge_agent.ipc.events import CameraFault, CameraFaultReason
from edge_agent.ipc.frame_slot import MAX_IMAGE_BYTES, Slot
from edge_agent.ipc.image_grid import ImageRequest, image_size, resize
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.codec import make_decoder
from edge_agent.wire.messages import CaptureClock

STALL_S = 2.0  # a live source without a frame for this long has stalled
STALL_NS = round(STALL_S * NS_PER_S)
FRAME_POLL_MS = 100  # how often a source that waits for data reads the clock
READER_POLL_NS = NS_PER_MS  # how often a file that is not in real time asks whether the model wants the next frame
# A device is frozen after this many identical frames over at least this time, if camera.identical_frames_s is not set.
FROZEN_FRAMES, FROZEN_S = 30, 1.0
FAULT_INTERVAL_NS = NS_PER_S  # a source with a defect gives bad frames at its full rate
MAX_PIXELS = MAX_IMAGE_BYTES // 3  # of any frame, whatever the configuration allows


class CapturedFrame(msgspec.Struct, frozen=True):
    """One image, already in the slot's free buffer, not yet published."""

    image: np.ndarray  # (H, W, 3) uint8, RGB, of the size that the model process asked for
    t_capture_ns: int  # CLOCK_MONOTONIC
    capture_clock: CaptureClock  # who took that time
    fps: float | None = None  # the rate that the source reports, Hz
    frame_id: int | None = None  # None: the camera process numbers the frames
    remark: str = ""  # what the log and `edge-agent check` say about the open source
    captured: np.ndarray | None = None  # the pixels that `image` was made of, until the next item; None: `image` itself
    full_size: tuple[int, int] | None = None  # height, width, pixels; None: of `captured`

    @property
    def pixels(self) -> np.ndarray:
        """What the source gave: it shows whether two images are the same."""
        return self.image if self.captured is None else self.captured

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frame in pixels, as the source gave it."""
        return self.full_size or self.pixels.shape[:2]


SourceItems = Generator["CapturedFrame | CameraFault", None, None]


class SourceError(UserError):
    """The source gives no image. `reason` and `detail` become a CameraFault.

    fault: the row of FAULTS. retryable: whether opening the source again may help. A camera can come back; a wrong path
    cannot.
    """

    def __init__(self, reason: CameraFaultReason, detail: str, fault: FaultName = "source-device"):
        detail = encodable(detail)
        super().__init__(f"{reason}: {detail}", fault)
        self.reason: CameraFaultReason = reason
        self.detail = detail
        self.retryable = not FAULTS[fault].is_permanent


class FaultReport:
    """Makes at most one CameraFault a second of frames that were refused, with their number."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.n_refused, self.reported_ns = 0, -FAULT_INTERVAL_NS

    def add(self, error: SourceError, now_ns: int) -> CameraFault | None:
        self.n_refused += 1
        if now_ns - self.reported_ns < FAULT_INTERVAL_NS:
            return None
        fault = CameraFault(error.reason, f"{self.source}: {self.n_refused} refused, the last one: {error.detail}")
        self.n_refused, self.reported_ns = 0, now_ns
        return fault


def check_size(height: int, width: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raises SourceError if a frame of height x width pixels is larger than is allowed, or empty."""
    if height < 1 or width < 1:
        raise SourceError("unreadable", f"frames of {width}x{height} pixels")
    if height * width > max_pixels:
        limit = f"camera.max_megapixels allows {max_pixels / 1e6:g} million pixels; ask for smaller frames, or raise it"
        if max_pixels >= MAX_PIXELS:
            limit = f"the limit is {MAX_PIXELS} pixels (7680x4320)"
        raise SourceError("too-large", f"frames of {width}x{height}; {limit}", "frame-size")


class WantedImage(NamedTuple):
    """What the model process wants of a frame. It can change from one frame to the next."""

    number: int  # of the request, for the slot; 0: there is none
    request: ImageRequest | None  # None: the frame as captured

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the image for a frame of height x width pixels."""
        return (height, width) if self.request is None else image_size(height, width, self.request)


def wanted_image(slot: Slot) -> WantedImage:
    """The newest request. One that makes no sense counts as none: the model process resizes the frame then."""
    number, payload = slot.read_image_request()
    request = _decode_image_request(payload)
    return WantedImage(0 if request is None else number, request)


@functools.lru_cache(8)
def _decode_image_request(payload: bytes) -> ImageRequest | None:
    try:
        request: ImageRequest = _image_request_decoder(payload)
    except msgspec.DecodeError:
        return None
    sides = (request.longest_side, *(request.fixed or ()))
    fixed_height, fixed_width = request.fixed or (1, 1)
    return request if min(sides) >= request.unit and fixed_height * fixed_width <= MAX_PIXELS else None


_image_request_decoder = make_decoder(ImageRequest)


def into_slot(
    pixels: np.ndarray,
    slot: Slot,
    config: CameraConfig,
    conversion: int | None = cv2.COLOR_BGR2RGB,
    wanted: WantedImage | None = None,
    full_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Resize pixels, (H, W, 3) or (H, W) uint8, as the model process wants them, and convert them into the slot's free
    buffer. Returns the buffer's view, (H, W, 3) uint8 RGB.

    conversion: OpenCV's code, for example COLOR_BGR2RGB; None copies. wanted: None for wanted_image(slot). full_size:
    height and width of the frame, if the pixels are a reduced decoding of it.
    """
    if pixels.dtype != np.uint8 or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise SourceError("unreadable", f"expected 8-bit pixels of 3 channels, found {pixels.shape} {pixels.dtype}")
    height, width = full_size or pixels.shape[:2]
    check_size(height, width, config.max_pixels)
    wanted = wanted or wanted_image(slot)
    size = wanted.size(height, width)
    image = slot.write(*size, wanted.number)
    if conversion is None:
        resize(pixels, image)
        return image
    if pixels.shape[:2] != size:  # before the conversion: it has fewer pixels then
        resized = np.empty((*size, *pixels.shape[2:]), np.uint8)
        resize(pixels, resized)
        pixels = resized
    cv2.cvtColor(pixels, conversion, dst=image)  # in place: dst has the shape and type that OpenCV would allocate
    return image


def wait_for_reader(slot: Slot, clock: Clock) -> int:
    """Wait until the model asks for another frame. Returns that time, which is a file's time of capture."""
    while not slot.reader_is_idle():
        clock.sleep_until(clock.now_ns() + READER_POLL_NS)
    return clock.now_ns()


def detect_frozen(items: SourceItems, slot: Slot, clock: Clock, config: CameraConfig) -> SourceItems:
    """Pass the items on; raise SourceError when a device returns the same image again and again.

    A dead image processor does that, and every read succeeds. A stamp of the driver that advances proves that a new
    image was taken. Where there is none, a sensor's noise proves it: a covered lens behind noise reduction or a still
    screen has no noise, so the configuration can allow identical images for a longer time, or always. The pixels as
    captured are compared: a smaller image is an average, without the noise. The first frame is compared with the last
    one, also after a restart, so a device that is still frozen when it is opened again is reported at once.
    """
    allowed_s = config.identical_frames_s
    limit_s = FROZEN_S if allowed_s is None else allowed_s
    last = slot.read_fingerprint()
    n_identical, since_ns = FROZEN_FRAMES, clock.now_ns() - round(limit_s * NS_PER_S)
    with contextlib.closing(items):  # closes the device before it is opened again
        for item in items:
            if isinstance(item, CapturedFrame) and limit_s:
                is_proven = allowed_s is None and item.capture_clock == "driver"
                now_ns, this = clock.now_ns(), fingerprint(item.pixels)
                if this != last or is_proven:
                    last, n_identical, since_ns = this, 0, now_ns
                    slot.write_fingerprint(this)
                n_identical += 1
                if n_identical >= FROZEN_FRAMES and now_ns - since_ns >= limit_s * NS_PER_S:
                    size = f"{item.size[1]}x{item.size[0]}"
                    detail = (
                        f"the same {size} image again and again for {limit_s:g} s; if the camera may show a still "
                        "picture, set camera.identical_frames_s (0: for ever)"
                    )
                    raise SourceError("frozen", detail)
            yield item


def fingerprint(pixels: np.ndarray) -> bytes:
    """Of about 4096 bytes from the whole image and every 64th row of (H, W, 3) or (H, W) uint8.

    That is enough to contain a sensor's noise, and cheap enough for a 4K image.
    """
    flat, rows = pixels.reshape(-1), pixels.reshape(len(pixels), -1)
    shown = flat[:: flat.size // 4096 | 1].tobytes() + rows[::64].tobytes() + bytes(str(pixels.shape), "ascii")
    return hashlib.blake2b(shown, digest_size=16).digest()
