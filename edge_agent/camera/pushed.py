"""Frames that another process, which owns the camera, pushes over ZeroMQ."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator

import cv2
import msgspec
import numpy as np
import zmq

from edge_agent.camera.clock import Clock
from edge_agent.camera.picture import decode_jpeg
from edge_agent.camera.source import (
    FRAME_POLL_MS,
    STALL_NS,
    STALL_S,
    CapturedFrame,
    FaultReport,
    SourceError,
    SourceItems,
    check_size,
    into_slot,
)
from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraFault
from edge_agent.ipc.frame_slot import Slot
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.pushed_frame import PushedFrame, decode_pushed_frame

MAX_AHEAD_NS, MAX_AGE_NS = 5 * NS_PER_MS, NS_PER_S  # how far a frame's stamp may lie in the future and in the past
MAX_QUEUED_FRAMES = 2  # frames that wait in the socket
MAX_HEADER_BYTES = 4096  # of a message, beside its pixels

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
    with bind_receiver(endpoint, config.max_pixels) as receiver, watch_disconnections(receiver) as monitor:
        newest = slot.peek(0)  # a frame that was published before a restart is not a new frame
        last_captured_ns = newest.t_capture_ns if newest else 0
        refusals = FaultReport(endpoint)
        last_data_ns = clock.now_ns()
        while True:
            message = receive_newest(receiver)
            now_ns = clock.now_ns()
            if message is None:
                if now_ns - last_data_ns >= STALL_NS:
                    last_data_ns = now_ns
                    detail = f"{endpoint}: no frame was pushed for {STALL_S:g} s"
                    if n := count_messages(monitor):
                        detail += (
                            f"; {n} times a pusher's connection ended: a message of more than "
                            f"{max_message_bytes(config.max_pixels)} bytes (from camera.max_megapixels) ends it"
                        )
                    yield CameraFault("stalled", detail)
                continue
            last_data_ns = now_ns
            try:
                frame = check_pushed_frame(message.buffer, last_captured_ns, now_ns, config.max_pixels)
                image = into_slot(pushed_pixels(frame), slot, config, PUSHED_FORMATS[frame.format][1])
            except SourceError as error:
                if fault := refusals.add(error, now_ns):
                    yield fault
                continue
            last_captured_ns = frame.t_capture_ns
            yield CapturedFrame(image, frame.t_capture_ns, "sender", frame_id=frame.frame_id)


def max_message_bytes(max_pixels: int) -> int:
    return 3 * max_pixels + MAX_HEADER_BYTES


@contextlib.contextmanager
def bind_receiver(endpoint: str, max_pixels: int) -> Iterator[zmq.Socket[bytes]]:
    """The PULL socket at `ipc:///absolute/path`. Raises SourceError, "busy" if another process receives there.

    A message that is longer than the largest frame is not received: ZeroMQ closes the connection that it comes from.
    """
    with contextlib.ExitStack() as stack:
        try:
            # ZeroMQ lets a second process bind the same path and silently take the frames, so a lock file guards it.
            lock = stack.enter_context(open(endpoint.removeprefix("ipc://") + ".lock", "a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            receiver = stack.enter_context(stack.enter_context(zmq.Context()).socket(zmq.PULL))
            receiver.setsockopt(zmq.LINGER, 0)
            receiver.setsockopt(zmq.RCVHWM, MAX_QUEUED_FRAMES)
            receiver.setsockopt(zmq.MAXMSGSIZE, max_message_bytes(max_pixels))
            receiver.bind(endpoint)
        except BlockingIOError:
            raise SourceError("busy", f"{endpoint}: another process receives there") from None
        except (OSError, zmq.ZMQError) as error:
            raise SourceError("absent", f"{endpoint}: {error.strerror}") from None
        yield receiver


@contextlib.contextmanager
def watch_disconnections(receiver: zmq.Socket[bytes]) -> Iterator[zmq.Socket[bytes]]:
    """A socket with a message for each connection that ended."""
    monitor = receiver.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    try:
        yield monitor
    finally:
        receiver.disable_monitor()
        monitor.close(linger=0)


def count_messages(monitor: zmq.Socket[bytes]) -> int:
    """Messages that have arrived; it takes them."""
    n = 0
    with contextlib.suppress(zmq.Again):
        while True:
            monitor.recv_multipart(zmq.NOBLOCK)
            n += 1
    return n


def receive_newest(receiver: zmq.Socket[bytes]) -> zmq.Frame | None:
    """The newest message in the socket, or None if none comes within FRAME_POLL_MS.

    Reads until the socket is empty: the socket option CONFLATE can hold a message back.
    """
    if not receiver.poll(FRAME_POLL_MS):
        return None
    message = receiver.recv(copy=False)
    with contextlib.suppress(zmq.Again):
        for _ in range(MAX_QUEUED_FRAMES):  # not for ever: a fast pusher may never leave the socket empty
            message = receiver.recv(zmq.NOBLOCK, copy=False)
    return message


def check_pushed_frame(message: memoryview, last_captured_ns: int, now_ns: int, max_pixels: int) -> PushedFrame:
    """One message, checked except for its pixels. Raises SourceError.

    last_captured_ns: the stamp of the previous frame.
    """
    if message[:1] != b"F":
        raise SourceError("unreadable", f"expected topic b'F', found {bytes(message[:1])!r}")
    try:
        frame = decode_pushed_frame(message[1:])
    except msgspec.DecodeError as error:
        raise SourceError("unreadable", str(error)) from None
    check_size(frame.height, frame.width, max_pixels)
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
    try:
        bgr = decode_jpeg(data, frame.width * frame.height)
    except SourceError as error:
        raise SourceError("unreadable", f"frame {frame.frame_id}: {error.detail}") from None
    height, width = bgr.shape[:2]
    if (height, width) != (frame.height, frame.width):
        expected = f"{frame.width}x{frame.height}"
        raise SourceError("unreadable", f"frame {frame.frame_id}: JPEG: expected {expected}, found {width}x{height}")
    return bgr
