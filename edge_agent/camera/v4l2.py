"""V4L2 cameras: /dev/videoN through OpenCV, with the time stamps of the driver where they are plausible."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

import cv2

from edge_agent.camera.clock import Clock
from edge_agent.camera.source import STALL_NS, STALL_S, CapturedFrame, SourceError, SourceItems, into_slot
from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraFaultReason
from edge_agent.ipc.frame_slot import Slot
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.messages import CaptureClock

MAX_DRIVER_AGE_NS = NS_PER_S
VIDIOC_REQBUFS = 0xC0145608  # linux/videodev2.h


def read_v4l2(config: CameraConfig, slot: Slot, clock: Clock) -> SourceItems:
    device = config.source.removeprefix("v4l2:")
    device = f"/dev/video{device}" if device.isdigit() else device
    check_device(device)
    capture = cv2.VideoCapture(device, cv2.CAP_V4L2)
    try:
        if not capture.isOpened():
            raise SourceError(
                "unreadable", f"{device}: opens, but is not a V4L2 camera with a pixel format that OpenCV can read"
            )
        configure(capture, config)
        fps = capture.get(cv2.CAP_PROP_FPS) or None
        bgr, last_driver_ns, last_image_ns = None, 0, clock.now_ns()
        while capture.grab():
            arrival_ns = clock.now_ns()
            # JetPack drivers use another clock, half a minute away. Only a plausible stamp is taken from the driver.
            driver_ns = round(capture.get(cv2.CAP_PROP_POS_MSEC) * NS_PER_MS)
            driver_is_plausible = 0 <= arrival_ns - driver_ns <= MAX_DRIVER_AGE_NS
            if driver_is_plausible and driver_ns <= last_driver_ns:
                continue  # the driver returned the same exposure again
            ok, bgr = capture.retrieve(bgr)
            if ok:
                last_driver_ns, last_image_ns = (driver_ns if driver_is_plausible else 0), arrival_ns
                capture_clock: CaptureClock = "driver" if driver_is_plausible else "arrival"
                captured_ns = driver_ns if driver_is_plausible else arrival_ns
                yield CapturedFrame(into_slot(bgr, slot), captured_ns, capture_clock, fps)
            elif arrival_ns - last_image_ns > STALL_NS:
                raise SourceError("unreadable", f"{device}: returns buffers, but no image in {STALL_S:g} s")
        if not os.path.exists(device):
            raise SourceError("absent", f"{device}: the device is gone")
        raise SourceError("stalled", f"{device}: returns no frame")
    finally:
        capture.release()


def configure(capture: cv2.VideoCapture, config: CameraConfig) -> None:
    """Ask the driver for the configured size and rate. A driver may choose others."""
    properties = {
        cv2.CAP_PROP_FRAME_WIDTH: config.width,
        cv2.CAP_PROP_FRAME_HEIGHT: config.height,
        cv2.CAP_PROP_FPS: config.fps,
        cv2.CAP_PROP_BUFFERSIZE: 1,  # the driver queues frames; with one buffer the next frame is a new one
    }
    for number, value in properties.items():
        if value is not None:
            capture.set(number, value)


def check_device(device: str) -> None:
    """Raise SourceError with the reason that OpenCV does not report: no device, no permission, or in use."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        raise SourceError("unreadable", f"{device}: no permission; is this user in group video?") from None
    except OSError as error:
        reason: CameraFaultReason = "busy" if error.errno == errno.EBUSY else "absent"
        raise SourceError(reason, f"{device}: {error.strerror}") from None
    try:
        # A request for 0 buffers (count, type CAPTURE, memory MMAP, ...) fails while another process streams.
        fcntl.ioctl(fd, VIDIOC_REQBUFS, struct.pack("=5I", 0, 1, 1, 0, 0))
    except OSError as error:  # OpenCV finds every other error when it opens the device
        if error.errno == errno.EBUSY:
            raise SourceError("busy", f"{device}: another process uses it") from None
    finally:
        os.close(fd)
