"""The control endpoint: one request, one reply with the same id. PROTOCOL.md describes every operation.

A request is read in the forms in which the encoders of other languages write it: null for a field that was not set,
text as bin, a whole number as float. A field that the operation does not use is not read at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import msgspec

from edge_agent.wire.codec import make_decoder
from edge_agent.wire.messages import PROTOCOL_VERSION

Operation = Literal["instruct", "adapter", "ask", "cancel", "vehicle_state", "pause", "resume", "stats"]
StateValue = bool | int | float | str  # a value of the vehicle state that the controller pushes

MAX_ID_CHARS = 64
# Operation -> the other fields that it reads. A stop has no expires_ns: it is carried out at any age.
FIELDS: dict[str, tuple[str, ...]] = {
    "instruct": ("text", "expires_ns"),
    "adapter": ("text", "expires_ns"),
    "ask": ("text", "expires_ns"),
    "cancel": ("text",),
    "vehicle_state": ("values", "expires_ns"),
    "pause": (),
    "resume": ("expires_ns",),
    "stats": ("expires_ns",),
}


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a controller."""

    v: int  # PROTOCOL_VERSION
    id: str  # 1 to 64 characters, chosen by the controller
    op: Operation
    text: str = ""  # the instruction, the question, the name of the adapter, or the id of the question to cancel
    values: dict[str, StateValue | None] = {}  # vehicle_state: key -> newest value; None: unknown
    expires_ns: int = 0  # CLOCK_MONOTONIC: not carried out later, except pause; 0: it does not expire


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The reply to one request."""

    v: int  # PROTOCOL_VERSION
    id: str  # of the request; "" if it could not be read
    ok: bool
    error: str = ""  # one line that says why the operation was refused; "" if ok
    result: dict[str, Any] = {}  # if ok


class BadRequest(ValueError):
    """A request that cannot be read. One line. `id`: of the request, as far as it could be read."""

    def __init__(self, request_id: str, line: str) -> None:
        super().__init__(line)
        self.id = request_id[:MAX_ID_CHARS]


_NIL = msgspec.Raw(b"\xc0")


class _Head(msgspec.Struct):
    """What every operation needs. Any: str, or the same as bin."""

    v: int | float
    id: Any
    op: Any


class _Fields(msgspec.Struct):
    """What some operations read, not decoded yet."""

    text: msgspec.Raw = _NIL
    values: msgspec.Raw = _NIL
    expires_ns: msgspec.Raw = _NIL


class _Id(msgspec.Struct):
    id: Any = ""


_decode_head = make_decoder(_Head)
_decode_fields = make_decoder(_Fields)
_decode_any = make_decoder(Any)
_decode_values = make_decoder(dict[str, msgspec.Raw] | None)
_decode_expiry = make_decoder(int | float | None)
_decode_id = make_decoder(_Id)
decode_reply = make_decoder(Reply)


def read_request(payload: bytes) -> Request:
    """The msgpack map of a request -> the request. Raises BadRequest."""
    request_id = ""
    try:
        request_id = _readable_id(payload)
        head = _decode_head(payload)
        request_id, operation = _named("id", _text, head.id), _named("op", _text, head.op)
        if head.v != PROTOCOL_VERSION or not 0 < len(request_id) <= MAX_ID_CHARS:
            raise ValueError(f"expected v {PROTOCOL_VERSION} and an id of 1 to {MAX_ID_CHARS} characters")
        if operation not in get_args(Operation):
            raise ValueError(f"op: expected one of {', '.join(get_args(Operation))}; found {operation[:40]!r}")
        found = _decode_fields(payload)
        fields = {name: _named(name, READERS[name], getattr(found, name)) for name in FIELDS[operation]}
        return Request(v=PROTOCOL_VERSION, id=request_id, op=operation, **fields)
    except ValueError as error:  # msgspec.DecodeError and UnicodeDecodeError are ValueErrors
        raise BadRequest(request_id, f"not a request: {error}") from None


def _readable_id(payload: bytes) -> str:
    """The id alone, so that the refusal of everything else can name it; "" if there is none."""
    request_id = _decode_id(payload).id
    if isinstance(request_id, bytes):
        return request_id.decode(errors="replace")
    return str(request_id) if isinstance(request_id, str | int | float) else ""


def _named(name: str, read: Callable[[Any], Any], value: Any) -> Any:
    """read(value). Raises ValueError that begins with the name of the field."""
    try:
        return read(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name}: {error}") from None


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode()
    if not isinstance(value, str):
        raise ValueError(f"expected a str, found {type(value).__name__}")
    return value


def _read_text(raw: msgspec.Raw) -> str:
    value = _decode_any(raw)
    return "" if value is None else _text(value)


def _read_values(raw: msgspec.Raw) -> dict[str, Any]:
    return {key: _read_value(value) for key, value in (_decode_values(raw) or {}).items()}


def _read_value(raw: msgspec.Raw) -> Any:
    """One value. What cannot be read becomes bytes, which are no value: it is refused by its key, and the others are
    taken."""
    try:
        value = _decode_any(raw)
        return value.decode() if isinstance(value, bytes) else value
    except ValueError:
        return bytes(raw)


def _read_expiry(raw: msgspec.Raw) -> int:
    value = _decode_expiry(raw) or 0
    if value != int(value) or not 0 <= value < 2**63:
        raise ValueError(f"expected whole nanoseconds; found {value}")
    return int(value)


READERS: dict[str, Callable[[msgspec.Raw], Any]] = {
    "text": _read_text,
    "values": _read_values,
    "expires_ns": _read_expiry,
}
