"""read_request(): the forms in which encoders of other languages write a request, and what a refusal names."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edge_agent.wire.control import MAX_ID_CHARS, BadRequest, read_request

INSTRUCT = {"v": 1, "id": "a", "op": "instruct", "text": "Land."}
STATE = {"v": 1, "id": "a", "op": "vehicle_state"}


def read(fields: dict[str, Any]) -> Any:
    return read_request(msgspec.msgpack.encode(fields))


def test_names_and_text_may_be_bytes():
    found = read(INSTRUCT | {"id": b"a", "op": b"instruct", "text": "Lande \u00fcber Rot.".encode(), "expires_ns": 5.0})
    assert (found.id, found.op, found.text, found.expires_ns) == ("a", "instruct", "Lande \u00fcber Rot.", 5)


def test_a_value_that_cannot_be_read_stays_bytes_and_the_others_are_taken():
    payload = msgspec.msgpack.encode(STATE | {"values": {"mode": b"AUTO", "note": "##", "altitude_m": 3}})
    values = read_request(payload.replace(b"##", b"\xff\xfe")).values
    assert (values["mode"], values["altitude_m"]) == ("AUTO", 3) and isinstance(values["note"], bytes)


@pytest.mark.parametrize(
    ("fields", "request_id", "said"),
    [
        ({"v": 2}, "a", "expected v 1 and an id of 1 to "),
        ({"id": ""}, "", "expected v 1 and an id of 1 to "),
        ({"id": "x" * 1000}, "x" * 1000, "expected v 1 and an id of 1 to "),
        ({"id": 7}, "7", "id: expected a str, found int"),
        ({"id": b"\xff"}, "\N{REPLACEMENT CHARACTER}", "id: 'utf-8' codec can't decode"),
        ({"id": [1]}, "", "id: expected a str, found list"),
        ({"op": b"\xff"}, "a", "op: 'utf-8' codec can't decode"),
        ({"op": "fly"}, "a", "op: expected one of .*; found 'fly'"),
        ({"text": 7}, "a", "text: expected a str, found int"),
        ({"expires_ns": 1.5}, "a", "expires_ns: expected whole nanoseconds; found 1.5"),
        ({"expires_ns": -1}, "a", "expires_ns: expected whole nanoseconds; found -1"),
        ({"expires_ns": float("inf")}, "a", "expires_ns: cannot convert float infinity"),
    ],
)
def test_a_refusal_names_the_request_and_the_field(fields: dict[str, Any], request_id: str, said: str):
    with pytest.raises(BadRequest, match=f"^not a request: {said}") as refused:
        read(INSTRUCT | fields)
    assert refused.value.id == request_id[:MAX_ID_CHARS]
