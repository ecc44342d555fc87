"""The control endpoint: one request, one reply with the same id. PROTOCOL.md describes every operation."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from edge_agent.wire.codec import make_decoder

Operation = Literal["instruct", "adapter", "ask", "vehicle_state", "pause", "resume", "stats"]
StateValue = bool | int | float | str  # a value of the vehicle state that the controller pushes


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a controller."""

    v: int  # PROTOCOL_VERSION
    id: str  # 1 to 64 characters, chosen by the controller, different for every request
    op: Operation
    text: str = ""  # the instruction, the question, or the name of the adapter
    values: dict[str, StateValue] = {}  # vehicle_state: key -> newest value


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The reply to one request."""

    v: int  # PROTOCOL_VERSION
    id: str  # of the request; "" if the request could not be read
    ok: bool
    error: str = ""  # one line that says why the operation was refused; "" if ok
    result: dict[str, Any] = {}  # if ok


decode_request = make_decoder(Request)
decode_reply = make_decoder(Reply)
