"""What a socket of the client has received: one message of its stream, or nothing that counts."""

from __future__ import annotations

from typing import Any

import msgspec

from edge_agent.wire.messages import MAX_MESSAGE_BYTES
from edge_agent.wire.streams import unpack

# libzmq ends the connection at a longer message, and does not connect again: the limit is more than a message may have.
MAX_RECEIVED_BYTES = 1024 * 1024


def only_frame(frames: list[bytes]) -> bytes:
    """A message has one ZeroMQ frame of at most 65 536 bytes. Anything else becomes b"", which is no message."""
    return frames[0] if len(frames) == 1 and len(frames[0]) <= MAX_MESSAGE_BYTES else b""


def unpack_or_none(stream: str, payload: bytes) -> Any:
    """The message, or None if the bytes are not a message of this stream."""
    try:
        return unpack(stream, payload)
    except msgspec.DecodeError:
        return None
