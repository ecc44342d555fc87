"""Frames pushed over ZeroMQ by the process that owns the camera."""

from __future__ import annotations

import contextlib
import fcntl
import time

import cv2
import msgspec
import numpy as np
import zmq

from edge_agent.camera.source import NS_PER_S, STALL_S, CapturedFrame, SourceError, SourceItems, check_size, into_slot
from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraFault
from edge_agent.ipc.frame_slot import MAX_IMAGE_BYTES, Slot
from edge_agent.wire.pushed_frame import PushedFrame, decode_pushed_frame

MAX_AHEAD_NS, MAX_AGE_NS = 5_000_000, NS_PER_S  # a pushed frame's stamp: so far in the future or past, and no further


# format -> bytes per pixel (None: compressed), and OpenCV's conversion to RGB (None: it is RGB)
PUSHED_FORMATS = {
    "rgb8": (3, None),
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "gray8": (1, cv2.COLOR_GRAY2RGB),
    "jpeg": (None, cv2.COLOR_BGR2RGB),
}
MAX_QUEUED_FRAMES = 2  # wait in the socket at most


def read_pushed_frames(config: CameraConfig, slot: Slot) -> SourceItems:
    endpoint = config.source.removeprefix("zmq:")
    path = endpoint.removeprefix("ipc://")
    if not endpoint.startswith("ipc:///"):
        detail = f"zmq:{endpoint}: expected zmq:ipc:///absolute/path; frames do not come over a network"
        raise SourceError("unreadable", detail, heals=False)
    with contextlib.ExitStack() as stack:
        try:
            # ZeroMQ lets a second process bind the same path and take the traffic without a word.
            lock = stack.enter_context(open(path + ".lock", "a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            receiver = stack.enter_context(zmq.Context()).socket(zmq.PULL)
            stack.enter_context(receiver)
            receiver.setsockopt(zmq.LINGER, 0)
            receiver.setsockopt(zmq.RCVHWM, MAX_QUEUED_FRAMES)
            receiver.setsockopt(zmq.MAXMSGSIZE, MAX_IMAGE_BYTES + 4096)
            receiver.bind(endpoint)
        except BlockingIOError:
            raise SourceError("busy", f"{endpoint}: another process receives there") from None
        except (OSError, zmq.ZMQError) as error:
            raise SourceError("absent", f"{endpoint}: {error.strerror}") from None
        newest = slot.peek(0)  # a frame from before our restart is not new again
        last_ns = newest.t_capture_ns if newest else 0
        n_refused, told_ns = 0, -NS_PER_S
        while True:
            if not receiver.poll(STALL_S * 1000):
                yield CameraFault("stalled", f"{endpoint}: no frame pushed for {STALL_S:g} s")
                continue
            message = receiver.recv(copy=False)
            with contextlib.suppress(zmq.Again):  # the newest, whatever the pusher's pace; CONFLATE may hold one back
                for _ in range(MAX_QUEUED_FRAMES):
                    message = receiver.recv(zmq.NOBLOCK, copy=False)
            now_ns = time.monotonic_ns()
            try:
                frame = check_pushed_frame(message.buffer, last_ns, now_ns)
                image = into_slot(pushed_pixels(frame), slot, PUSHED_FORMATS[frame.format][1])
            except SourceError as bad:
                n_refused += 1
                if now_ns - told_ns >= NS_PER_S:  # a pusher that is wrong is wrong at its full rate
                    yield CameraFault(bad.reason, f"{endpoint}: {n_refused} refused, the last: {bad.detail}")
                    n_refused, told_ns = 0, now_ns
                continue
            last_ns = frame.t_capture_ns
            yield CapturedFrame(image, frame.t_capture_ns, "sender", frame_id=frame.frame_id)


def check_pushed_frame(message: memoryview, last_ns: int, now_ns: int) -> PushedFrame:
    """One message, checked but for its pixels. `last_ns` is the stamp of the frame before. Raises Broken."""
    if message[:1] != b"F":
        raise SourceError("unreadable", f"expected topic b'F', found {bytes(message[:1])!r}")
    try:
        frame = decode_pushed_frame(message[1:])
    except msgspec.DecodeError as error:
        raise SourceError("unreadable", str(error)) from None
    check_size(frame.height, frame.width)
    n_bytes = frame.width * frame.height * (PUSHED_FORMATS[frame.format][0] or 0)
    if n_bytes and len(frame.data) != n_bytes:
        size = f"{frame.width}x{frame.height} {frame.format}"
        raise SourceError("unreadable", f"{size} is {n_bytes} bytes, found {len(frame.data)}")
    age_ns = now_ns - frame.t_capture_ns
    if not -MAX_AHEAD_NS <= age_ns <= MAX_AGE_NS:
        raise SourceError("clock", f"frame {frame.frame_id} is stamped {age_ns / 1e6:.1f} ms ago by CLOCK_MONOTONIC")
    if frame.t_capture_ns <= last_ns:
        behind_ms = (last_ns - frame.t_capture_ns) / 1e6
        raise SourceError("clock", f"frame {frame.frame_id} is stamped {behind_ms:.1f} ms before the one before it")
    return frame


def pushed_pixels(frame: PushedFrame) -> np.ndarray:
    """(H, W, 3) or (H, W) uint8, in the format's own channel order."""
    data = np.frombuffer(frame.data, np.uint8)
    if frame.format == "gray8":
        return data.reshape(frame.height, frame.width)
    if frame.format != "jpeg":
        return data.reshape(frame.height, frame.width, 3)
    # Whole, and no other format: OpenCV has decoders for a dozen, and takes half a JPEG for a grey-bottomed image.
    if bytes(data[:3]) != b"\xff\xd8\xff" or bytes(data[-2:]) != b"\xff\xd9":
        raise SourceError("unreadable", f"frame {frame.frame_id}: not one whole JPEG")
    try:
        bgr = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise SourceError("unreadable", f"frame {frame.frame_id}: JPEG: {error.err}") from None
    found = (0, 0) if bgr is None else bgr.shape[:2]
    if found != (frame.height, frame.width):
        size = f"{frame.width}x{frame.height}, found {found[1]}x{found[0]}"
        raise SourceError("unreadable", f"frame {frame.frame_id}: JPEG: expected {size}")
    return bgr
