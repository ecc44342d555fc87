"""V4L2 cameras: /dev/videoN through OpenCV, with the time stamps of the driver."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time

import cv2

from edge_agent.camera.source import NS_PER_S, STALL_S, CapturedFrame, SourceError, SourceItems, into_slot
from edge_agent.config import CameraConfig
from edge_agent.ipc.frame_slot import Slot
from edge_agent.wire.messages import CaptureClock

# Sources: generators that fill the slot's free buffer and yield Captured, or a CameraFault that they can live with.


def read_v4l2(config: CameraConfig, slot: Slot) -> SourceItems:
    device = config.source.removeprefix("v4l2:")
    device = f"/dev/video{device}" if device.isdigit() else device
    check_device(device)
    capture = cv2.VideoCapture(device, cv2.CAP_V4L2)
    try:
        if not capture.isOpened():
            raise SourceError(
                "unreadable", f"{device}: opens, but is no V4L2 camera with a pixel format known to OpenCV"
            )
        wishes = {
            cv2.CAP_PROP_FRAME_WIDTH: config.width,
            cv2.CAP_PROP_FRAME_HEIGHT: config.height,
            cv2.CAP_PROP_FPS: config.fps,
            cv2.CAP_PROP_BUFFERSIZE: 1,  # the driver queues frames: this loop always drains, and what it gets is new
        }
        for wish, value in wishes.items():
            if value is not None:
                capture.set(wish, value)
        fps = capture.get(cv2.CAP_PROP_FPS) or None
        bgr, last_driver_ns, good_ns = None, 0, time.monotonic_ns()
        while capture.grab():
            arrival_ns = time.monotonic_ns()
            # JetPack drivers stamp with another clock, half a minute off: only a plausible stamp is the driver's.
            driver_ns = round(capture.get(cv2.CAP_PROP_POS_MSEC) * 1e6)
            by_driver = 0 <= arrival_ns - driver_ns <= NS_PER_S
            if by_driver and driver_ns <= last_driver_ns:
                continue  # the same exposure handed out again is not a new frame
            ok, bgr = capture.retrieve(bgr)
            if ok:
                last_driver_ns, good_ns = (driver_ns if by_driver else 0), arrival_ns
                clock: CaptureClock = "driver" if by_driver else "arrival"
                yield CapturedFrame(into_slot(bgr, slot), driver_ns if by_driver else arrival_ns, clock, fps)
            elif arrival_ns - good_ns > STALL_S * NS_PER_S:
                raise SourceError("unreadable", f"{device}: gives buffers, but no image in {STALL_S:g} s")
        if not os.path.exists(device):
            raise SourceError("absent", f"{device}: is gone")
        raise SourceError("stalled", f"{device}: gives no frame")
    finally:
        capture.release()


def check_device(device: str) -> None:
    """Name the reason that OpenCV keeps to itself: no device, no permission, or somebody else's."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        raise SourceError("unreadable", f"{device}: no permission; is this user in group video?") from None
    except OSError as error:
        reason = "busy" if error.errno == errno.EBUSY else "absent"
        raise SourceError(reason, f"{device}: {error.strerror}") from None
    try:
        # VIDIOC_REQBUFS for no buffers (count, type CAPTURE, memory MMAP, ...) fails while another process streams.
        fcntl.ioctl(fd, 0xC0145608, struct.pack("=5I", 0, 1, 1, 0, 0))
    except OSError as error:  # what else it may say, OpenCV finds out as well
        if error.errno == errno.EBUSY:
            raise SourceError("busy", f"{device}: another process has it") from None
    finally:
        os.close(fd)
