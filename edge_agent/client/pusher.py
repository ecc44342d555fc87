"""Pushes frames to a daemon whose camera.source is zmq:ENDPOINT, from the process that owns the camera.

    with FramePusher("ipc:///run/edge-agent/frames") as pusher:
        for frame_id, image in enumerate(camera):                  # image: (H, W, 3) uint8, RGB
            pusher.push(image, frame_id=frame_id, t_capture_ns=time.monotonic_ns())

The frame may be a numpy array or anything else with the buffer protocol; numpy is not imported. push() never waits.
"""

from __future__ import annotations

import os
from typing import Literal, Protocol, cast, get_args

import zmq

from edge_agent.wire.pushed_frame import pack_pushed_frame

PixelFormat = Literal["rgb8", "bgr8", "gray8", "jpeg"]
CHANNELS = {"rgb8": 3, "bgr8": 3, "gray8": 1}
QUEUE_FRAMES = 2  # the daemon uses the newest frame only; older frames in a queue delay it


class Buffer(Protocol):
    """bytes, bytearray, memoryview and others, for a type checker."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class Array(Protocol):
    """numpy.ndarray, whose type information has no __buffer__ before Python 3.12."""

    @property
    def data(self) -> memoryview: ...


class FramePusher:
    """Owns one PUSH socket; close() or a with block frees it. Use it from one thread."""

    def __init__(self, endpoint: str) -> None:
        """endpoint: the part of camera.source after "zmq:", for example ipc:///run/edge-agent/frames."""
        self._pid = os.getpid()
        self._endpoint = endpoint
        self._context = zmq.Context()
        self._connect()

    def _connect(self) -> None:
        self._file = _file_at(self._endpoint)
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE_FRAMES)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # no queue without a connection
        self._socket.connect(self._endpoint)

    def close(self) -> None:
        if os.getpid() != self._pid:  # the socket belongs to the process before fork()
            return
        self._socket.close()
        self._context.term()

    def __enter__(self) -> FramePusher:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    # The frame's four properties of the wire, and its size where the buffer does not have it.
    def push(
        self,
        frame: Buffer | Array,
        *,
        frame_id: int,
        t_capture_ns: int,
        format: PixelFormat = "rgb8",
        width: int | None = None,
        height: int | None = None,
    ) -> bool:
        """Send one frame, or drop it. Returns False if it was dropped: no daemon is connected, or it is too slow.

        frame: (H, W, 3) uint8 for rgb8 and bgr8, (H, W) uint8 for gray8; for jpeg, and for pixels without a shape, a
        row of bytes with width and height.
        frame_id: grows from frame to frame; the answer to the frame has it too.
        t_capture_ns: CLOCK_MONOTONIC of the exposure on this machine, not of the call.

        Raises RuntimeError after fork(): make a FramePusher in each process.
        Raises ValueError: the format is unknown, only one of width and height is given, or the buffer does not match.
        """
        if os.getpid() != self._pid:
            raise RuntimeError(f"this FramePusher was made in process {self._pid}; make one in process {os.getpid()}")
        if format not in get_args(PixelFormat):
            raise ValueError(f"format: expected one of {', '.join(get_args(PixelFormat))}; found {format!r}")
        if (width is None) != (height is None):
            raise ValueError(f"frame: expected both width and height or none, found width {width}, height {height}")
        view = memoryview(cast(Buffer, frame))
        if view.itemsize != 1:
            raise ValueError(f"frame: expected elements of one byte (uint8), found {view.format!r}")
        if width is None or height is None:
            height, width = _size(view, format)
        if format != "jpeg" and view.nbytes != width * height * CHANNELS[format]:
            raise ValueError(
                f"frame: expected {width * height * CHANNELS[format]} bytes for {width}x{height} {format}, "
                f"found {view.nbytes}"
            )
        data = view if view.c_contiguous else memoryview(view.tobytes())
        if self._file is None:  # the daemon started after this pusher
            self._file = _file_at(self._endpoint)
        message = pack_pushed_frame(frame_id, t_capture_ns, width, height, format, data)
        try:
            self._socket.send(message, zmq.NOBLOCK)
        except zmq.Again:
            if _file_at(self._endpoint) != self._file:  # the connection may lead to a process that hangs in a driver
                self._socket.close()
                self._connect()
            return False
        return True


def _file_at(endpoint: str) -> tuple[int, int] | None:
    """Which file is at the path of an endpoint; None: none. Another one: another process listens there."""
    try:
        found = os.stat(endpoint.removeprefix("ipc://"))
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _size(view: memoryview, format: PixelFormat) -> tuple[int, int]:
    """Height and width of an image array. Raises ValueError."""
    shape = view.shape or ()
    dimensions = 2 if format == "gray8" else 3
    if format == "jpeg" or len(shape) != dimensions or shape[2:] != (3,)[: dimensions - 2]:
        expected = {"gray8": "a (H, W) array", "jpeg": "width and height"}.get(format, "a (H, W, 3) array")
        raise ValueError(f"frame: expected {expected} for {format}, or width and height; found shape {shape}")
    return shape[0], shape[1]
