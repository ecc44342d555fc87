"""A frame that another process pushes to the daemon over ZeroMQ (`camera.source: zmq:ipc:///path`)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edge_agent.wire.codec import encode, make_decoder
from edge_agent.wire.messages import PROTOCOL_VERSION

TOPIC = b"F"  # first byte of every pushed frame
PixelFormat = Literal["rgb8", "bgr8", "gray8", "jpeg"]


class PushedFrame(msgspec.Struct, frozen=True, kw_only=True):
    """The map that follows the topic byte."""

    v: Literal[1]  # PROTOCOL_VERSION
    frame_id: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]  # chosen by the sender; comes back in the action
    t_capture_ns: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]  # time of exposure, CLOCK_MONOTONIC
    width: Annotated[int, msgspec.Meta(ge=1, le=65535)]  # pixels
    height: Annotated[int, msgspec.Meta(ge=1, le=65535)]  # pixels
    format: PixelFormat
    data: memoryview  # rows from the top, pixels from the left, no padding; or one JPEG file; in the message's memory


def pack_pushed_frame(
    frame_id: int, t_capture_ns: int, width: int, height: int, format: PixelFormat, data: bytes | memoryview
) -> bytes:
    """The one ZeroMQ frame of an image. `data`: any C-contiguous buffer. The camera process checks the values.

        image = camera.read()                                          # (H, W, 3) uint8, RGB, C-contiguous
        push.send(pack_pushed_frame(n, time.monotonic_ns(), image.shape[1], image.shape[0], "rgb8", image.data))

    `push` is a PUSH socket with SNDHWM 2, IMMEDIATE 1 and LINGER 0, all set before it connects. Send with NOBLOCK and
    drop the frame on zmq.Again: no daemon is there, or its queue is full. edge_agent.client.FramePusher does this.
    t_capture_ns is the time of the exposure and not of the sending.
    """
    fields = {"v": PROTOCOL_VERSION, "frame_id": frame_id, "t_capture_ns": t_capture_ns}
    return TOPIC + encode(fields | {"width": width, "height": height, "format": format, "data": data})


decode_pushed_frame = make_decoder(PushedFrame)
