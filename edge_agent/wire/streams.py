"""The table of streams. A published message <-> its one ZeroMQ frame."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, overload

import msgspec

from edge_agent.wire.codec import encode, make_decoder
from edge_agent.wire.messages import MAX_MESSAGE_BYTES, Action, Header, Refusal, Status, TextMessage


class Stream(msgspec.Struct, frozen=True):
    """One row of the table: how a stream is carried."""

    topic: bytes  # first byte of every message; empty for control
    socket: str  # ZeroMQ socket type that the daemon binds
    reader: str  # ZeroMQ socket type that a controller connects
    rate: str
    newest: bool  # a reader receives all waiting messages and uses the last one


STREAMS = {
    "actions": Stream(b"A", "PUB", "SUB", "one message for each answered frame", newest=True),
    "text": Stream(b"T", "PUB", "SUB", "one message for each decoded piece", newest=False),
    "status": Stream(b"S", "PUB", "SUB", "5 Hz or more, at every change, and once after you subscribe", newest=True),
    "control": Stream(b"", "ROUTER", "DEALER", "one reply for each request", newest=False),
}
_DECODERS: dict[str, Callable[[memoryview], Any]] = {
    "actions": make_decoder(Action | Refusal),
    "text": make_decoder(TextMessage),
    "status": make_decoder(Status),
}


def pack(stream: str, message: Header) -> bytes:
    """A message -> its one ZeroMQ frame: the topic byte, then the msgpack map.

    Raises ValueError if the frame is larger than MAX_MESSAGE_BYTES, or if an action contains NaN or infinity.
    """
    if isinstance(message, Action) and not _is_finite(message):
        raise ValueError(f"action {message.type!r} of frame {message.frame_id} contains a number that is not finite")
    payload = STREAMS[stream].topic + encode(message)
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ValueError(f"{stream}: message of {len(payload)} bytes, the limit is {MAX_MESSAGE_BYTES}")
    return payload


def _is_finite(action: Action) -> bool:
    numbers = [
        action.age_ms,
        *action.values.values(),
        *action.clamped.values(),
        *(number for values in action.chunk for number in values.values()),
        *msgspec.structs.astuple(action.stages_ms),
    ]
    return all(math.isfinite(number) for number in numbers if isinstance(number, float))


@overload
def unpack(stream: Literal["actions"], payload: bytes) -> Action | Refusal: ...
@overload
def unpack(stream: Literal["text"], payload: bytes) -> TextMessage: ...
@overload
def unpack(stream: Literal["status"], payload: bytes) -> Status: ...
@overload
def unpack(stream: str, payload: bytes) -> Any: ...
def unpack(stream: str, payload: bytes) -> Any:
    """One ZeroMQ frame -> its message. Raises msgspec.DecodeError (a ValueError) if the frame has another topic byte,
    is not valid msgpack, lacks a required field, has a field of another type, or is an action with NaN or infinity."""
    topic = STREAMS[stream].topic
    if payload[:1] != topic:
        raise msgspec.DecodeError(f"{stream}: expected topic {topic!r}, found {payload[:1]!r}")
    message = _DECODERS[stream](memoryview(payload)[1:])
    if isinstance(message, Action) and not _is_finite(message):
        raise msgspec.DecodeError(f"{stream}: action of frame {message.frame_id}: a number is not finite")
    return message
