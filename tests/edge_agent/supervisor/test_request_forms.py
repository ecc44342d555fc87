"""A request in the forms in which encoders of other languages write it. A stop is not refused over a field that it does
not use, and every refusal names the request or the value."""

from __future__ import annotations

import msgspec
import pytest

from edge_agent.wire.control import Reply, read_request
from tests.harness.in_process import InProcess


@pytest.fixture
def running():
    with InProcess() as supervised:
        supervised.make_ready()
        yield supervised


def raw_request(running: InProcess, fields: dict) -> Reply:
    running.publisher.request_bytes(msgspec.msgpack.encode(fields))
    running.turn()
    return running.publisher.replies[-1]


PAUSE = {"v": 1, "id": "a", "op": "pause"}


@pytest.mark.parametrize(
    "fields",
    [
        PAUSE | {"text": None, "values": None, "expires_ns": None},
        PAUSE | {"v": 1.0},
        PAUSE | {"id": b"a", "op": b"pause"},
        {"op": "pause", "id": "a", "v": 1, "text": 7, "values": [1, 2], "more": {"a": [None]}},
        PAUSE | {"values": {1: 2}},
        PAUSE | {"expires_ns": 1},  # long ago: a late stop is on the safe side
    ],
)
def test_a_pause_in_any_common_form_pauses(running, fields):
    reply = raw_request(running, fields)
    assert (reply.ok, reply.id, reply.result) == (True, "a", {"paused": True})


def test_a_pause_with_bytes_that_are_not_utf_8_in_a_field_that_it_does_not_use_pauses(running):
    payload = msgspec.msgpack.encode(PAUSE | {"text": "##"}).replace(b"##", b"\xff\xfe")
    running.publisher.request_bytes(payload)
    running.turn()
    assert running.publisher.replies[-1].result == {"paused": True}


@pytest.mark.parametrize("op", ["pause", "cancel"])
@pytest.mark.parametrize(
    "expires_ns",
    [-1, 1.5, float("nan"), float("inf"), 2**64 - 1, "soon", b"", True, [], {}, msgspec.msgpack.Ext(1, b"")],
)
def test_a_stop_is_not_refused_over_its_expiry(running, op, expires_ns):
    """It never expires, so the field is not read."""
    reply = raw_request(running, PAUSE | {"op": op, "expires_ns": expires_ns})
    assert (reply.ok, reply.id) == (True, "a")


@pytest.mark.parametrize(
    ("fields", "request_id", "error"),
    [
        ({"v": 1, "id": "a", "op": "stop"}, "a", "op: expected one of instruct, adapter"),
        ({"v": 1, "id": "a", "op": 3}, "a", "op: expected a str, found int"),
        ({"v": 1, "id": "a"}, "a", "op"),
        ({"v": 2, "id": "a", "op": "pause"}, "a", "expected v 1"),
        ({"v": "1", "id": "a", "op": "pause"}, "a", "v"),
        ({"v": 1, "id": 7, "op": "pause"}, "7", "id: expected a str, found int"),
        ({"v": 1, "id": b"\xff", "op": "pause"}, "\ufffd", "utf-8"),
        ({"v": 1, "id": "a", "op": "ask", "text": 7}, "a", "text: expected a str, found int"),
        ({"v": 1, "id": "a", "op": "ask", "text": b"\xff"}, "a", "utf-8"),
        ({"v": 1, "id": "a", "op": "vehicle_state", "values": [1]}, "a", "values"),
        ({"v": 1, "id": "a", "op": "resume", "expires_ns": 1.5}, "a", "expires_ns: expected whole nanoseconds"),
        ({"v": 1, "id": "a", "op": "resume", "expires_ns": -1}, "a", "expires_ns: expected whole nanoseconds"),
        ({"v": 1, "id": "a", "op": "resume", "expires_ns": float("inf")}, "a", "not a request"),
        ({"v": 1, "op": "pause"}, "", "id"),
        ({"v": 1, "id": [1], "op": "pause"}, "", "id: expected a str, found list"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_id_of_the_request(running, fields, request_id, error):
    reply = raw_request(running, fields)
    assert not reply.ok and reply.id == request_id and error in reply.error


@pytest.mark.parametrize(
    ("op", "fields"),
    [
        ("ask", {"text": "what?", "values": [1]}),
        ("instruct", {"text": "Land.", "values": {1: 2}}),
        ("vehicle_state", {"values": {"a": 1}, "text": 7}),
        ("cancel", {"text": "q", "values": 3}),
        ("resume", {"text": [None], "values": 3}),
    ],
)
def test_a_field_that_the_operation_does_not_use_is_not_read(running, op, fields):
    n_replies = len(running.publisher.replies)
    running.publisher.request_bytes(msgspec.msgpack.encode({"v": 1, "id": "a", "op": op} | fields))
    running.turn()
    assert all(reply.ok for reply in running.publisher.replies[n_replies:])


@pytest.mark.parametrize("value", [b"\xa2\xff\xfe", b"\xc4\x01\xff", b"\x91\xa1\xff", b"\xd7\xff" + b"\xff" * 8])
def test_a_value_that_cannot_be_read_is_named_and_the_others_are_taken(running, value):
    """A flight program's buffer need not be UTF-8."""
    payload = msgspec.msgpack.encode({"v": 1, "id": "a", "op": "vehicle_state", "values": {"mode": 0, "altitude_m": 3}})
    request_fields = msgspec.msgpack.decode(payload)
    assert read_request(payload.replace(b"\xa4mode\x00", b"\xa4mode" + value)).values == {
        "mode": value,
        "altitude_m": request_fields["values"]["altitude_m"],
    }


def test_a_word_as_bin_is_a_word():
    fields = {"v": 1, "id": "a", "op": "vehicle_state", "values": {"mode": b"AUTO"}}
    assert read_request(msgspec.msgpack.encode(fields)).values == {"mode": "AUTO"}
