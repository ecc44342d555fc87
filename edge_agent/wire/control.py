"""The control endpoint: one request map in, one reply map with the same id out. PROTOCOL.md describes both."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from edge_agent.wire.codec import make_decoder

# Control: a request is one map, the answer one map with the same id. Repeating an id returns the first answer.

Operation = Literal["instruct", "adapter", "ask", "vehicle_state", "pause", "resume", "stats"]
StateValue = bool | int | float | str  # a value that a controller pushes about its vehicle


class Request(msgspec.Struct, frozen=True, kw_only=True):
    v: int
    id: str  # chosen by the controller; at most 64 characters
    op: Operation
    text: str = ""  # the instruction, the question, or the adapter's name
    values: dict[str, StateValue] = {}  # of state: key -> newest value


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    v: int
    id: str
    ok: bool
    error: str = ""
    result: dict[str, Any] = {}


decode_request = make_decoder(Request)
decode_reply = make_decoder(Reply)
