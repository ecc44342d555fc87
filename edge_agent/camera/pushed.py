"""Frames that another process, which owns the camera, pushes over ZeroMQ."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import msgspec
import numpy as np

from edge_agent.camera.clock import Clock
from edge_agent.camera.source import (
    FRAME_POLL_MS,
    STALL_NS,
    STALL_S,
    CapturedFrame,
    SourceError,
    SourceItems,
    check_size,
    into_slot,
)
from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraFault, CameraFaultReason
from edge_agent.ipc.frame_slot import MAX_IMAGE_BYTES, Slot
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.pushed_frame import PushedFrame, decode_pushed_frame
from edge_agent.zmtp.endpoint import PULL, Endpoint, Limits
from edge_agent.zmtp.frames import Message
from edge_agent.zmtp.listener import PathError

MAX_AHEAD_NS, MAX_AGE_NS = 5 * NS_PER_MS, NS_PER_S  # how far a frame's stamp may lie in the future and in the past
MAX_QUEUED_FRAMES = 2  # behind the first one that has arrived
RECEIVER_LIMITS = Limits(MAX_IMAGE_BYTES + 4096, read_bytes=64 * 1024, max_connections=4)
CHECK_INTERVAL_NS = NS_PER_S  # how often the path of the socket is checked
FAULT_INTERVAL_NS = NS_PER_S  # a pusher with a defect sends wrong frames at its full rate

# format -> bytes per pixel (None: compressed), and OpenCV's conversion to RGB (None: it is RGB)
PUSHED_FORMATS: dict[str, tuple[int | None, int | None]] = {
    "rgb8": (3, None),
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "gray8": (1, cv2.COLOR_GRAY2RGB),
    "jpeg": (None, cv2.COLOR_BGR2RGB),
}


def read_pushed_frames(config: CameraConfig, slot: Slot, clock: Clock) -> SourceItems:
    endpoint = config.source.removeprefix("zmq:")
    if not endpoint.startswith("ipc:///"):
        detail = f"zmq:{endpoint}: expected zmq:ipc:///absolute/path; frames cannot come over a network"
        raise SourceError("unreadable", detail, retryable=False)
    with bind_receiver(endpoint) as receiver:
        newest = slot.peek(0)  # a frame that was published before a restart is not a new frame
        last_captured_ns = newest.t_capture_ns if newest else 0
        refusals = RefusalReport(endpoint)
        last_data_ns = checked_ns = clock.now_ns()
        while True:
            message = receive_newest(receiver)
            now_ns = clock.now_ns()
            if now_ns - checked_ns >= CHECK_INTERVAL_NS:
                checked_ns = now_ns
                if lost := receiver.check():
                    raise SourceError("absent", lost)
            if message is None:
                if now_ns - last_data_ns >= STALL_NS:
                    last_data_ns = now_ns
                    yield CameraFault("stalled", f"{endpoint}: no frame was pushed for {STALL_S:g} s")
                continue
            last_data_ns = now_ns
            try:
                frame = check_pushed_frame(message, last_captured_ns, now_ns)
                image = into_slot(pushed_pixels(frame), slot, PUSHED_FORMATS[frame.format][1])
            except SourceError as error:
                if fault := refusals.add(error, now_ns):
                    yield fault
                continue
            last_captured_ns = frame.t_capture_ns
            yield CapturedFrame(image, frame.t_capture_ns, "sender", frame_id=frame.frame_id)


@contextlib.contextmanager
def bind_receiver(endpoint: str) -> Iterator[Endpoint]:
    """The PULL socket at `ipc:///absolute/path`. Raises SourceError, "busy" if another process receives there."""
    try:
        receiver = Endpoint(Path(endpoint.removeprefix("ipc://")), PULL, RECEIVER_LIMITS)
    except PathError as error:
        reason: CameraFaultReason = "busy" if error.is_busy else "absent"
        raise SourceError(reason, str(error), retryable=not error.is_taken) from None
    with contextlib.closing(receiver):
        yield receiver


def receive_newest(receiver: Endpoint) -> Message | None:
    """The newest message that has arrived, or None if none is complete within FRAME_POLL_MS."""
    poll = select.poll()
    poll.register(receiver, select.POLLIN)
    end_s = time.monotonic() + FRAME_POLL_MS / 1000
    newest: Message | None = None
    n_messages = 0
    while n_messages <= MAX_QUEUED_FRAMES:  # not for ever: a fast pusher may never leave the socket empty
        wait_ms = 0 if newest is not None else max(0.0, 1000 * (end_s - time.monotonic()))
        if not poll.poll(wait_ms) and (newest is not None or wait_ms == 0):
            break
        for _, message in receiver.serve():
            newest, n_messages = message, n_messages + 1
    return newest


class RefusalReport:
    """Makes at most one CameraFault a second of refused messages, with their number."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.n_refused, self.reported_ns = 0, -FAULT_INTERVAL_NS

    def add(self, error: SourceError, now_ns: int) -> CameraFault | None:
        self.n_refused += 1
        if now_ns - self.reported_ns < FAULT_INTERVAL_NS:
            return None
        fault = CameraFault(error.reason, f"{self.endpoint}: {self.n_refused} refused, the last one: {error.detail}")
        self.n_refused, self.reported_ns = 0, now_ns
        return fault


def check_pushed_frame(message: Message, last_captured_ns: int, now_ns: int) -> PushedFrame:
    """One message, checked except for its pixels. Raises SourceError.

    last_captured_ns: the stamp of the previous frame.
    """
    if len(message) > 1:
        raise SourceError("unreadable", f"expected one ZeroMQ frame, found {len(message)}")
    payload = memoryview(message[0])
    if payload[:1] != b"F":
        raise SourceError("unreadable", f"expected topic b'F', found {bytes(payload[:1])!r}")
    try:
        frame = decode_pushed_frame(payload[1:])
    except msgspec.DecodeError as error:
        raise SourceError("unreadable", str(error)) from None
    check_size(frame.height, frame.width)
    n_bytes = frame.width * frame.height * (PUSHED_FORMATS[frame.format][0] or 0)
    if n_bytes and len(frame.data) != n_bytes:
        size = f"{frame.width}x{frame.height} {frame.format}"
        raise SourceError("unreadable", f"{size} is {n_bytes} bytes, found {len(frame.data)}")
    age_ns = now_ns - frame.t_capture_ns
    if not -MAX_AHEAD_NS <= age_ns <= MAX_AGE_NS:
        detail = (
            f"frame {frame.frame_id} is stamped {age_ns / NS_PER_MS:.1f} ms ago by CLOCK_MONOTONIC; expected 0 to 1000"
        )
        raise SourceError("clock", detail)
    if frame.t_capture_ns <= last_captured_ns:
        behind_ms = (last_captured_ns - frame.t_capture_ns) / NS_PER_MS
        raise SourceError("clock", f"frame {frame.frame_id} is stamped {behind_ms:.1f} ms before the previous frame")
    return frame


def pushed_pixels(frame: PushedFrame) -> np.ndarray:
    """(H, W, 3) or (H, W) uint8, in the format's own channel order. Raises SourceError."""
    data = np.frombuffer(frame.data, np.uint8)
    if frame.format == "gray8":
        return data.reshape(frame.height, frame.width)
    if frame.format != "jpeg":
        return data.reshape(frame.height, frame.width, 3)
    # OpenCV has decoders for a dozen formats, and decodes half a JPEG to an image with a grey bottom: both are refused.
    if bytes(data[:3]) != b"\xff\xd8\xff" or bytes(data[-2:]) != b"\xff\xd9":
        raise SourceError("unreadable", f"frame {frame.frame_id}: not one whole JPEG")
    try:
        bgr = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise SourceError("unreadable", f"frame {frame.frame_id}: JPEG: {error.err}") from None
    height, width = (0, 0) if bgr is None else bgr.shape[:2]
    if bgr is None or (height, width) != (frame.height, frame.width):
        expected = f"{frame.width}x{frame.height}"
        raise SourceError("unreadable", f"frame {frame.frame_id}: JPEG: expected {expected}, found {width}x{height}")
    return bgr
