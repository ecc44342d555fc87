"""What a socket of the client has received: one message of its stream, or nothing that counts."""

from __future__ import annotations

from typing import Any

import msgspec

from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.messages import MAX_MESSAGE_BYTES, Action
from edge_agent.wire.streams import unpack

# libzmq ends the connection at a longer message, and does not connect again: the limit is more than a message may have.
MAX_RECEIVED_BYTES = 1024 * 1024
MAX_AHEAD_NS = 5 * NS_PER_MS  # a later stamp is from another machine's clock, or from another boot
MAX_VALID_NS = 1 * NS_PER_S  # no action may be valid for longer: autopilots time out after about a second


def only_frame(frames: list[bytes]) -> bytes:
    """A message has one ZeroMQ frame of at most 65 536 bytes. Anything else becomes b"", which is no message."""
    return frames[0] if len(frames) == 1 and len(frames[0]) <= MAX_MESSAGE_BYTES else b""


def unpack_or_none(stream: str, payload: bytes) -> Any:
    """The message, or None if the bytes are not a message of this stream."""
    try:
        return unpack(stream, payload)
    except msgspec.DecodeError:
        return None


def is_of_this_clock(action: Action, now_ns: int) -> bool:
    """Whether the stamps of an action can be from this machine's clock. now_ns: CLOCK_MONOTONIC."""
    return (
        action.t_pub_ns <= now_ns + MAX_AHEAD_NS
        and action.t_capture_ns <= action.t_pub_ns
        and action.valid_until_ns - action.t_pub_ns <= MAX_VALID_NS
    )
