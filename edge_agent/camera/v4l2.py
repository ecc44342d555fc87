"""V4L2 cameras: /dev/videoN through OpenCV, with the time stamps of the driver where they are plausible."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from pathlib import Path

import cv2
import msgspec
import numpy as np

from edge_agent.camera.clock import Clock
from edge_agent.camera.picture import decode_jpeg_for
from edge_agent.camera.source import (
    STALL_NS,
    STALL_S,
    CapturedFrame,
    FaultReport,
    SourceError,
    SourceItems,
    into_slot,
    wanted_image,
)
from edge_agent.config import CameraConfig
from edge_agent.errors import encodable
from edge_agent.ipc.frame_slot import Slot
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.codec import encode, make_decoder
from edge_agent.wire.messages import CaptureClock

MAX_DRIVER_AGE_NS = NS_PER_S
VIDIOC_QUERYCAP, VIDIOC_REQBUFS, VIDIOC_ENUM_FMT = 0x80685600, 0xC0145608, 0xC0405602  # linux/videodev2.h
FORMAT = struct.Struct("=3I32sI16x")  # struct v4l2_fmtdesc: index, type, flags, description, pixel format
BUFFER_TYPES = (1, 9)  # V4L2_BUF_TYPE_VIDEO_CAPTURE, and the same with planes
MAX_FORMATS = 64
LINKS = Path("/dev/v4l")  # udev's folders by-id and by-path: names that belong to one camera, or to one port
CAPABILITY_BYTES = 104  # struct v4l2_capability
COMPRESSED = ("MJPG", "JPEG")


class CameraIdentity(msgspec.Struct, frozen=True):
    """Which camera was opened. It is remembered in the slot, so that it outlives this process."""

    driver: str
    card: str  # the name of the model
    bus: str  # the port
    width: int = 0  # pixels
    height: int = 0

    def text(self) -> str:
        return f"{self.card} ({self.driver}) at {self.bus}, {self.width}x{self.height}"


_decode_identity = make_decoder(CameraIdentity)


def read_v4l2(config: CameraConfig, slot: Slot, clock: Clock) -> SourceItems:
    device = device_path(config.source)
    identity = check_device(device)
    capture = cv2.VideoCapture(device, cv2.CAP_V4L2)
    try:
        if not capture.isOpened():
            raise SourceError(
                "unreadable", f"{device}: opens, but is not a V4L2 camera with a pixel format that OpenCV can read"
            )
        not_granted, remark = configure(capture, config), ""
        if fourcc_of(capture) in COMPRESSED:
            # OpenCV's own decoder takes half a JPEG for a whole one. So retrieve() shall return the JPEG's bytes.
            capture.set(cv2.CAP_PROP_CONVERT_RGB, 0)
        for item in read_frames(capture, device, config, slot, clock):
            if isinstance(item, CapturedFrame):
                remark = remark or first_frame_remark(capture, not_granted, item.size, stable_name(device))
                if identity is not None:
                    check_identity(device, identity, item.size, slot)
                    identity = None  # an open device cannot become another one
                item = msgspec.structs.replace(item, remark=remark)
            yield item
        if not os.path.exists(device):
            raise SourceError("absent", f"{device}: the device is gone")
        raise SourceError("stalled", f"{device}: returns no frame")
    finally:
        capture.release()


def device_path(source: str) -> str:
    """0 and v4l2:0 are /dev/video0."""
    device = source.removeprefix("v4l2:")
    return f"/dev/video{device}" if device.isdigit() else device


def read_frames(capture: cv2.VideoCapture, device: str, config: CameraConfig, slot: Slot, clock: Clock) -> SourceItems:
    """Until the device returns none."""
    fps = capture.get(cv2.CAP_PROP_FPS) or None
    faults = FaultReport(device)
    last_driver_ns, last_image_ns, pixels = 0, clock.now_ns(), None
    while capture.grab():
        arrival_ns = clock.now_ns()
        # JetPack drivers use another clock, half a minute away. Only a plausible stamp is taken from the driver.
        driver_ns = round(capture.get(cv2.CAP_PROP_POS_MSEC) * NS_PER_MS)
        driver_is_plausible = 0 <= arrival_ns - driver_ns <= MAX_DRIVER_AGE_NS
        if driver_is_plausible and driver_ns <= last_driver_ns:
            continue  # the driver returned the same exposure again
        try:
            ok, pixels = capture.retrieve(None if is_jpeg(pixels) else pixels)
            if not ok:
                raise SourceError("unreadable", "buffers without an image")
            wanted, bgr, size = wanted_image(slot), pixels, None
            if is_jpeg(pixels):
                bgr, size = decode_jpeg_for(wanted, pixels.reshape(-1), config.max_pixels)
        except SourceError as error:
            if not error.retryable:
                raise
            if arrival_ns - last_image_ns > STALL_NS:
                detail = f"{device}: returns buffers, but no image in {STALL_S:g} s: {error.detail}"
                raise SourceError("unreadable", detail) from None
            if fault := faults.add(error, arrival_ns):
                yield fault
            continue
        last_driver_ns, last_image_ns = (driver_ns if driver_is_plausible else 0), arrival_ns
        capture_clock: CaptureClock = "driver" if driver_is_plausible else "arrival"
        captured_ns = driver_ns if driver_is_plausible else arrival_ns
        image = into_slot(bgr, slot, config, wanted=wanted, full_size=size)
        yield CapturedFrame(image, captured_ns, capture_clock, fps, captured=bgr, full_size=size)


def is_jpeg(pixels: np.ndarray | None) -> bool:
    """Whether these are not pixels but one row or column of bytes, as OpenCV returns what it did not decode."""
    return pixels is not None and pixels.ndim == 2 and 1 in pixels.shape and pixels.dtype == np.uint8


# -- what is asked of the driver, and what it grants -------------------------------------------------------------------


def configure(capture: cv2.VideoCapture, config: CameraConfig) -> str:
    """Ask for the configured pixel format, size and rate. Returns one line about what was not granted, or "".

    Many webcams give large images at a useful rate as JPEG only, but OpenCV asks for raw pixels first. So where the
    camera gives less than was wished, and no format is configured, MJPG is asked for.
    """
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the driver queues frames; with one buffer the next frame is a new one
    ask(capture, config, config.fourcc)
    if config.fourcc is None and any(found < wish for wish, found in size_and_rate(capture, config)):
        ask(capture, config, "MJPG")
    is_as_wished = all(found == wish for wish, found in size_and_rate(capture, config))
    if is_as_wished and config.fourcc in (None, fourcc_of(capture)):
        return ""
    wishes = (
        f"{config.width or 'any'}x{config.height or 'any'}",
        f"{config.fps:g} fps" if config.fps else "",
        config.fourcc,
    )
    width, height = (capture.get(number) for number in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    given = (f"{width:g}x{height:g}", f"{capture.get(cv2.CAP_PROP_FPS):g} fps", fourcc_of(capture))
    return f"asked for {' '.join(filter(None, wishes))}, the camera gives {' '.join(given)}"


def first_frame_remark(
    capture: cv2.VideoCapture, not_granted: str, size: tuple[int, int], stable_name_line: str
) -> str:
    """What the log and `edge-agent check` say about the open device. size: height and width of its first frame, which
    can be another one than the driver claims."""
    fourcc = fourcc_of(capture)
    in_use = f"pixel format {fourcc}" if fourcc.strip().isalnum() and not not_granted else ""
    claimed = [round(capture.get(number)) for number in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)]
    wrong_claim = ""
    if min(claimed) > 0 and claimed != [size[1], size[0]]:
        wrong_claim = f"the driver claims {claimed[0]}x{claimed[1]}, the frames have {size[1]}x{size[0]}"
    return "; ".join(filter(None, (in_use, not_granted, wrong_claim, stable_name_line)))


def ask(capture: cv2.VideoCapture, config: CameraConfig, fourcc: str | None) -> None:
    """A driver may choose others. The format comes first, because the sizes and rates depend on it."""
    wishes = {
        cv2.CAP_PROP_FOURCC: cv2.VideoWriter.fourcc(*fourcc) if fourcc else None,
        cv2.CAP_PROP_FRAME_WIDTH: config.width,
        cv2.CAP_PROP_FRAME_HEIGHT: config.height,
        cv2.CAP_PROP_FPS: config.fps,
    }
    for number, value in wishes.items():
        if value is not None:
            capture.set(number, value)


def size_and_rate(capture: cv2.VideoCapture, config: CameraConfig) -> list[tuple[float, float]]:
    """(wished, granted) of each configured value that the driver tells; a rate in whole Hz: 29.97 are 30."""
    wishes = {
        cv2.CAP_PROP_FRAME_WIDTH: config.width,
        cv2.CAP_PROP_FRAME_HEIGHT: config.height,
        cv2.CAP_PROP_FPS: config.fps,
    }
    pairs = [(wish, capture.get(number)) for number, wish in wishes.items() if wish is not None]
    return [(round(wish), round(found)) for wish, found in pairs if found > 0]


def fourcc_of(capture: cv2.VideoCapture) -> str:
    """The pixel format in use, for example "YUYV"."""
    number = int(capture.get(cv2.CAP_PROP_FOURCC)) & 0xFFFFFFFF
    return number.to_bytes(4, "little").decode("latin-1")


# -- which camera it is ------------------------------------------------------------------------------------------------


def stable_name(device: str) -> str:
    """One line with the name of the device that stays the same when it is plugged in again; "" if there is none."""
    if Path(device).parent.parent == LINKS:
        return ""
    links = sorted(LINKS.glob("by-id/*")) or sorted(LINKS.glob("by-path/*"))
    link = next((link for link in links if os.path.realpath(link) == os.path.realpath(device)), None)
    return f"{device} may be another camera after a replug: use {encodable(str(link))}" if link else ""


def check_identity(device: str, identity: CameraIdentity, size: tuple[int, int], slot: Slot) -> None:
    """Raise SourceError if another camera than before is behind the same name; otherwise remember this one.

    A name in /dev/v4l/by-id follows a camera to another port.
    """
    found = msgspec.structs.replace(identity, height=size[0], width=size[1])
    if remembered := slot.read_source_identity():
        expected = _decode_identity(remembered)
        if Path(device).parent == LINKS / "by-id":
            expected = msgspec.structs.replace(expected, bus=found.bus)
        if found != expected:
            detail = (
                f"{device}: was {expected.text()}, and is now {found.text()}; connect the first one again, give its "
                "name in /dev/v4l/by-id, or restart the daemon to use this one"
            )
            raise SourceError("other-camera", detail)
    slot.write_source_identity(encode(found))


def check_device(device: str) -> CameraIdentity | None:
    """Which camera it is; None: the driver does not tell. Raises SourceError with the reason that OpenCV does not
    report: no device, no permission, or in use."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        raise SourceError("unreadable", f"{device}: no permission; is this user in group video?") from None
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise SourceError("busy", f"{device}: {error.strerror}", "source-in-use") from None
        raise SourceError("absent", f"{device}: {error.strerror}") from None
    try:
        # A request for 0 buffers (count, type CAPTURE, memory MMAP, ...) fails while another process streams.
        fcntl.ioctl(fd, VIDIOC_REQBUFS, struct.pack("=5I", 0, 1, 1, 0, 0))
        return parse_capability(fcntl.ioctl(fd, VIDIOC_QUERYCAP, bytes(CAPABILITY_BYTES)))
    except OSError as error:  # OpenCV finds every other error when it opens the device
        if error.errno == errno.EBUSY:
            raise SourceError("busy", f"{device}: another process uses it", "source-in-use") from None
        return None
    finally:
        os.close(fd)


def pixel_formats(device: str) -> tuple[str, ...]:
    """Every pixel format that the driver offers, for example ("YUYV", "MJPG"); empty: it does not tell."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ()
    found: list[str] = []
    try:
        for buffer_type in BUFFER_TYPES:
            with contextlib.suppress(OSError):  # EINVAL: there are no more
                for index in range(MAX_FORMATS):
                    answer = fcntl.ioctl(fd, VIDIOC_ENUM_FMT, FORMAT.pack(index, buffer_type, 0, b"", 0))
                    found.append(FORMAT.unpack(answer)[4].to_bytes(4, "little").decode("latin-1"))
    finally:
        os.close(fd)
    return tuple(dict.fromkeys(found))


def parse_capability(capability: bytes) -> CameraIdentity:
    """struct v4l2_capability: driver[16], card[32], bus_info[32], and numbers."""
    texts = struct.unpack_from("16s32s32s", capability)
    return CameraIdentity(*(text.split(b"\0")[0].decode(errors="replace") for text in texts))
