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
from edge_agent.camera.picture import WHOLE, decode_jpeg_for
from edge_agent.camera.source import (
    FRAME_POLL_MS,
    STALL_NS,
    STALL_S,
    CapturedFrame,
    FaultReport,
    SourceError,
    SourceItems,
    WantedImage,
    check_size,
    into_slot,
    wanted_image,
)
from edge_agent.config import CameraConfig
from edge_agent.errors import FaultName
from edge_agent.ipc.events import CameraFault, CameraFaultReason
from edge_agent.ipc.frame_slot import Slot
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.pushed_frame import PushedFrame, decode_pushed_frame
from edge_agent.zmtp.endpoint import PULL, Endpoint, Limits
from edge_agent.zmtp.frames import Message
from edge_agent.zmtp.listener import PathError

MAX_AHEAD_NS, MAX_AGE_NS = 5 * NS_PER_MS, NS_PER_S  # how far a frame's stamp may lie in the future and in the past
MAX_QUEUED_FRAMES = 2  # behind the first one that has arrived
MAX_PUSHERS = 4
CHECK_INTERVAL_NS = NS_PER_S  # how often the path of the socket is checked
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
        raise SourceError("unreadable", detail, "source-name")
    with bind_receiver(endpoint, config.max_pixels) as receiver:
        newest = slot.peek(0)  # a frame that was published before a restart is not a new frame
        last_captured_ns = newest.t_capture_ns if newest else 0
        refusals = FaultReport(endpoint)
        last_data_ns = checked_ns = clock.now_ns()
        n_refused_before = 0
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
                    detail = f"{endpoint}: no frame was pushed for {STALL_S:g} s"
                    n, n_refused_before = receiver.n_refused - n_refused_before, receiver.n_refused
                    if n:
                        detail += (
                            f"; {n} times a pusher's connection ended: a message of more than "
                            f"{max_message_bytes(config.max_pixels)} bytes (from camera.max_megapixels) ends it"
                        )
                    yield CameraFault("stalled", detail)
                continue
            last_data_ns = now_ns
            try:
                frame = check_pushed_frame(message, last_captured_ns, now_ns, config.max_pixels)
                wanted, size = wanted_image(slot), (frame.height, frame.width)
                pixels = pushed_pixels(frame, wanted)
                image = into_slot(pixels, slot, config, PUSHED_FORMATS[frame.format][1], wanted, size)
            except SourceError as error:
                if fault := refusals.add(error, now_ns):
                    yield fault
                continue
            last_captured_ns = frame.t_capture_ns
            yield CapturedFrame(
                image, frame.t_capture_ns, "sender", frame_id=frame.frame_id, captured=pixels, full_size=size
            )


def max_message_bytes(max_pixels: int) -> int:
    return 3 * max_pixels + MAX_HEADER_BYTES


@contextlib.contextmanager
def bind_receiver(endpoint: str, max_pixels: int) -> Iterator[Endpoint]:
    """The PULL socket at `ipc:///absolute/path`. Raises SourceError, "busy" if another process receives there.

    A message that is longer than the largest frame is not received: the connection that it comes from ends.
    """
    limits = Limits(max_message_bytes(max_pixels), read_bytes=64 * 1024, max_connections=MAX_PUSHERS)
    try:
        receiver = Endpoint(Path(endpoint.removeprefix("ipc://")), PULL, limits)
    except PathError as error:
        reason: CameraFaultReason = "busy" if error.is_busy else "absent"
        fault: FaultName = "source-name" if error.is_taken else "source-in-use" if error.is_busy else "source-device"
        raise SourceError(reason, str(error), fault) from None
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


def check_pushed_frame(message: Message, last_captured_ns: int, now_ns: int, max_pixels: int) -> PushedFrame:
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


def pushed_pixels(frame: PushedFrame, wanted: WantedImage = WHOLE) -> np.ndarray:
    """(H, W, 3) or (H, W) uint8, in the format's own channel order. Raises SourceError.

    wanted: a JPEG that is larger than this needs may be decoded at a part of its size.
    """
    data = np.frombuffer(frame.data, np.uint8)
    if frame.format == "gray8":
        return data.reshape(frame.height, frame.width)
    if frame.format != "jpeg":
        return data.reshape(frame.height, frame.width, 3)
    try:
        bgr, (height, width) = decode_jpeg_for(wanted, data, frame.width * frame.height)
    except SourceError as error:
        raise SourceError("unreadable", f"frame {frame.frame_id}: {error.detail}") from None
    if (height, width) != (frame.height, frame.width):
        expected = f"{frame.width}x{frame.height}"
        raise SourceError("unreadable", f"frame {frame.frame_id}: JPEG: expected {expected}, found {width}x{height}")
    return bgr
