"""The table of published streams; a message as its one wire frame, and back."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from edge_agent.wire.codec import _encoder, make_decoder
from edge_agent.wire.messages import MAX_MESSAGE_BYTES, Action, Header, Refusal, Status, TextMessage


class Stream(msgspec.Struct, frozen=True):
    """One row of the table below: how a stream is carried."""

    topic: bytes  # the first byte of every message of the stream; empty for control, which has one reader per message
    socket: str  # what the daemon binds
    reader: str  # what a controller connects
    rate: str
    newest: bool  # the client reads what waits and keeps the newest message


STREAMS = {
    "actions": Stream(b"A", "PUB", "SUB", "one per frame", newest=True),
    "text": Stream(b"T", "PUB", "SUB", "one per decoded piece", newest=False),
    "status": Stream(b"S", "XPUB", "SUB", "5 Hz, on change, and the last value on subscribing", newest=True),
    "control": Stream(b"", "ROUTER", "DEALER", "on request", newest=False),
}


_DECODERS = {
    "actions": make_decoder(Action | Refusal),
    "text": make_decoder(TextMessage),
    "status": make_decoder(Status),
}


def pack(stream: str, message: Header) -> bytes:
    """The one frame that goes on the wire: topic byte, then the map.

    Raises ValueError when the message is too large or an action's number is not finite: neither may leave.
    """
    if isinstance(message, Action) and not _is_finite(message):
        raise ValueError(f"action {message.type!r} of frame {message.frame_id} holds a number that is not finite")
    payload = STREAMS[stream].topic + _encoder.encode(message)
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


def unpack(stream: str, payload: bytes) -> Any:
    """The message in one wire frame. Raises msgspec.DecodeError (a ValueError) on anything else."""
    topic = STREAMS[stream].topic
    if payload[:1] != topic:
        raise msgspec.DecodeError(f"{stream}: expected topic {topic!r}, found {payload[:1]!r}")
    return _DECODERS[stream](memoryview(payload)[1:])
