"""The golden vectors: the files are what the code writes today, and what the code reads."""

from __future__ import annotations

import base64

import msgspec
import pytest

from edge_agent.wire import control, messages
from edge_agent.wire.codec import encode
from edge_agent.wire.control import decode_reply, read_request
from edge_agent.wire.pushed_frame import TOPIC, PushedFrame, decode_pushed_frame, pack_pushed_frame
from edge_agent.wire.streams import STREAMS, pack, unpack
from tests.harness import ROOT

FOLDER = ROOT / "tests" / "vectors"
NAMES = sorted(path.stem for path in FOLDER.glob("*.msgpack"))
STREAM_OF_TOPIC = {stream.topic: name for name, stream in STREAMS.items() if stream.topic}


def read(name: str) -> tuple[msgspec.Struct, bytes, dict]:
    """The message, its bytes, and the content of the JSON file."""
    payload = (FOLDER / f"{name}.msgpack").read_bytes()
    text = msgspec.json.decode((FOLDER / f"{name}.json").read_bytes())
    topic = text["topic"].encode()
    assert payload.startswith(topic)
    if topic in STREAM_OF_TOPIC:
        return unpack(STREAM_OF_TOPIC[topic], payload), payload, text
    decode = decode_pushed_frame if topic == TOPIC else read_request if "op" in text["message"] else decode_reply
    return decode(payload[len(topic) :]), payload, text


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_and_the_json_are_the_same_message(name):
    message, payload, text = read(name)
    fields = msgspec.to_builtins(message)  # bytes become base64
    assert fields == text["message"]
    assert {key: type(value) for key, value in fields.items()} == {
        key: type(value) for key, value in text["message"].items()
    }
    raw = msgspec.msgpack.decode(payload[len(text["topic"]) :])
    if isinstance(message, PushedFrame):
        raw["data"] = base64.b64encode(raw["data"]).decode()
    assert list(raw.items()) == list(text["message"].items())


@pytest.mark.parametrize("name", NAMES)
def test_encoding_the_message_gives_the_bytes(name):
    message, payload, text = read(name)
    if isinstance(message, PushedFrame):
        fields = {key: value for key, value in msgspec.structs.asdict(message).items() if key != "v"}
        assert pack_pushed_frame(**fields) == payload
    elif text["topic"]:
        assert pack(STREAM_OF_TOPIC[text["topic"].encode()], message) == payload
    else:
        assert encode(message) == payload


def test_every_message_of_the_wire_has_a_vector():
    have = {type(read(name)[0]) for name in NAMES}
    assert have == {
        messages.Action,
        messages.Refusal,
        messages.TextMessage,
        messages.Status,
        control.Request,
        control.Reply,
        PushedFrame,
    }
    assert {path.stem for path in FOLDER.glob("*.json")} == set(NAMES)
    assert read("action_with_chunk")[0].chunk and not read("action")[0].chunk


def test_an_integer_above_2_to_the_53_is_exact():
    assert read("action")[0].t_capture_ns == 2**53 + 1 and float(2**53 + 1) != 2**53 + 1
    assert b"\xcf" + (2**53 + 1).to_bytes(8, "big") in read("action")[1]


def test_the_script_writes_these_files():
    from tests.vectors.make import VECTORS, as_json

    assert set(VECTORS) == set(NAMES)
    for name, payload in VECTORS.items():
        assert (FOLDER / f"{name}.msgpack").read_bytes() == payload
        assert (FOLDER / f"{name}.json").read_bytes() == as_json(payload)
