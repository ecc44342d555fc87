"""A frame that another process pushes to the daemon over ZeroMQ: its fields and its bytes."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec


def pack_pushed_frame(
    frame_id: int, t_capture_ns: int, width: int, height: int, format: str, data: memoryview
) -> bytes:
    """One message for a `zmq:` source, from the process that owns the camera (a simulator, a flight stack).

        image = render()                                               # (H, W, 3) uint8, RGB, contiguous
        push.send(pack_frame(n, time.monotonic_ns(), image.shape[1], image.shape[0], "rgb8", image.data))

    `push` is a PUSH socket with SNDHWM = 2, IMMEDIATE = 1 and LINGER = 0, set before it connects; send with NOBLOCK
    and drop the frame when that raises zmq.Again: nobody is there, or takes it. `format` is rgb8, bgr8, gray8 or jpeg;
    `data` anything that holds bytes in a row. The stamp is that of the exposure on this machine's monotonic clock, not
    of the sending.
    Nothing is checked here: the camera process does.
    """
    import msgspec  # only who pushes needs it; whoever reads the slot needs numpy alone

    fields = {"v": 1, "frame_id": frame_id, "t_capture_ns": t_capture_ns, "width": width, "height": height}
    return b"F" + msgspec.msgpack.encode(fields | {"format": format, "data": data})


class PushedFrame(msgspec.Struct, frozen=True):
    """What a pusher sends, after the topic byte b"F"."""

    v: Literal[1]
    frame_id: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    t_capture_ns: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    width: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    height: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    format: Literal["rgb8", "bgr8", "gray8", "jpeg"]
    data: bytes


decode_pushed_frame = msgspec.msgpack.Decoder(PushedFrame).decode
