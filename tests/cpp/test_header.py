"""The pure parts of examples/cpp: msgpack against the golden vectors and against our own reader, hostile bytes, and the
rules of a controller with times that a test chooses. All of it runs under sanitizers."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from typing import Any

import msgspec
import pytest

from edge_agent.wire.control import read_request
from edge_agent.wire.streams import pack, unpack
from tests.harness import ROOT
from tests.harness.fake_daemon import make_action

VECTORS = ROOT / "tests" / "vectors"
NAMES = sorted(path.stem for path in VECTORS.glob("*.msgpack"))
NOW_NS = 10**15


def vector(name: str) -> tuple[bytes, str, dict]:
    """The bytes, the topic and the message."""
    text = json.loads((VECTORS / f"{name}.json").read_text())
    return (VECTORS / f"{name}.msgpack").read_bytes(), text["topic"], text["message"]


def with_types(value: Any) -> Any:
    """For a comparison in which 2 is not 2.0."""
    if isinstance(value, dict):
        return {key: with_types(item) for key, item in value.items()}
    return [with_types(item) for item in value] if isinstance(value, list) else (type(value).__name__, value)


@pytest.mark.parametrize("name", NAMES)
def test_the_reader_reads_every_vector(probe, name):
    payload, topic, message = vector(name)
    (line,) = probe([("j", 0, 0, payload[len(topic) :])])
    found = json.loads(line)
    if name == "pushed_frame":
        found["data"] = msgspec.to_builtins(bytes.fromhex(found["data"]))  # base64
    assert with_types(found) == with_types(message)


@pytest.mark.parametrize("name", ["action", "action_with_chunk", "refusal"])
def test_an_action_and_a_refusal_have_all_fields_of_the_vector(probe, name):
    payload, _, message = vector(name)
    (line,) = probe([("m", 0, 0, payload)])
    assert with_types(json.loads(line)) == with_types(message)


def test_a_request_is_what_the_daemon_reads(probe):
    for text in ("", "Land on the red disc.", "Lände auf dem Dreieck △.", "x" * 2000):
        (line,) = probe([("w", 2**62, 0, text.encode())])
        request = read_request(bytes.fromhex(line))
        assert (request.v, request.id, request.op, request.text) == (1, "7", "instruct", text)
        assert request.expires_ns == 2**62


# -- the same answer as our own reader --------------------------------------------------------------------------------

FLIPS = [bytes([byte]) for byte in bytes.fromhex("007f80c0c1c3c7cacbcfd3d9dbdddfff")]
CONTENTS = [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1, 1.0, math.nan, -math.inf, True, None, "", "driver", "é", b"\xff"]
CONTENTS += [[], {}, [1], {"a": 1}, {"a": math.nan}, {"a": "b"}, {"a": []}, [{"a": 1}], [{"a": None}], [[]], "late"]


def mutated(rng: random.Random) -> bytes:
    """One of the vectors of the stream actions, changed: as bytes, or as fields."""
    payload, _, message = vector(rng.choice(["action", "action_with_chunk", "refusal"]))
    if rng.random() < 0.5:
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(payload))
            cut = place + rng.choice([0, 0, 1, 1, 1, 2, 9])
            new = rng.choice([rng.choice(FLIPS), bytes([rng.randrange(256)]), b"", rng.randbytes(4)])
            payload = payload[:place] + new + payload[cut:]
        return payload[: rng.randrange(len(payload))] if rng.random() < 0.1 else payload
    fields = json.loads(json.dumps(message))
    for _ in range(rng.randint(1, 2)):
        inner = rng.choice(["stages_ms", "values", "clamped"])
        where = fields[inner] if isinstance(fields.get(inner), dict) and rng.random() < 0.3 else fields
        name = rng.choice([*where, "from_a_later_release" if where is fields or inner == "stages_ms" else "more_m_s"])
        if rng.random() < 0.2:
            where.pop(name, None)
        else:
            where[name] = copy.deepcopy(rng.choice(CONTENTS))
    items = list(fields.items())
    rng.shuffle(items)
    return payload[:1] + msgspec.msgpack.encode(dict(items))


def is_strict(value: Any) -> bool:
    """What PROTOCOL.md asks for and our own reader does not: finite numbers, integers of 64 bits with sign."""
    if isinstance(value, dict):
        return all(is_strict(item) for key, item in value.items() if key != "from_a_later_release")
    if isinstance(value, list):
        return all(map(is_strict, value))
    return math.isfinite(value) if isinstance(value, float) else not isinstance(value, int) or -(2**63) <= value < 2**63


def has_key_twice(text: str) -> bool:
    found = []

    def pairs(items: list[tuple[str, Any]]) -> dict:
        found.extend(items if len(dict(items)) < len(items) else [])
        return dict(items)

    if text != "discard":  # an extension, for example
        json.loads(text, object_pairs_hook=pairs)
    return bool(found)


def compare(probe: Any, seed: int, n: int) -> tuple[int, int]:
    """How many messages both readers took, and how many both discarded. They agree on all of them."""
    rng = random.Random(seed)
    payloads = [mutated(rng) for _ in range(n)]
    lines = probe([record for payload in payloads for record in (("m", 0, 0, payload), ("j", 0, 0, payload[1:]))])
    n_taken = n_discarded = 0
    for payload, ours, raw in zip(payloads, lines[::2], lines[1::2], strict=True):
        try:
            expected = msgspec.to_builtins(unpack("actions", payload))
            known = {name: msgspec.msgpack.decode(payload[1:]).get(name) for name in expected}
            assert is_strict(expected) and is_strict(known) and not has_key_twice(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, AssertionError):
            assert ours == "discard", payload
            n_discarded += 1
            continue
        assert ours != "discard", payload
        assert with_types(json.loads(ours)) == with_types(expected), payload
        n_taken += 1
    return n_taken, n_discarded


def test_a_changed_message_is_taken_or_discarded_as_by_our_own_reader(probe):
    n_taken, n_discarded = compare(probe, seed=7, n=3000)
    assert n_taken > 200 and n_discarded > 200


@pytest.mark.soak
def test_many_changed_messages(probe):
    taken, discarded = zip(*(compare(probe, seed, 10_000) for seed in range(20)), strict=True)
    print(f"taken by both: {sum(taken)}, discarded by both: {sum(discarded)}")


# -- hostile bytes ----------------------------------------------------------------------------------------------------

DEPTH_BOMBS = [head * 12_000 for head in (b"\x91", b"\x81\xa1a", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff\xa1a")]
HUGE = [head + b"\xff" * 4 for head in (b"\xdb", b"\xc6", b"\xc9", b"\xdd", b"\xdf")]


def test_no_bytes_are_too_hostile(probe):
    rng = random.Random(3)
    payloads = [b"", b"A", b"\x80", *DEPTH_BOMBS, *HUGE, *(rng.randbytes(rng.randrange(64)) for _ in range(3000))]
    action, *_ = vector("action")
    fields = msgspec.msgpack.decode(action[1:])
    inside = [action[:1] + b"\xde\xff\xff" + action[2:], *(action[:cut] for cut in range(len(action)))]
    for bomb in (*DEPTH_BOMBS, *HUGE):
        for name in ("values", "chunk", "type", "seq", "from_a_later_release"):
            key = msgspec.msgpack.encode(name)
            rest = b"".join(msgspec.msgpack.encode(item) for pair in fields.items() if pair[0] != name for item in pair)
            inside.append(b"A" + bytes([0x80 + 15]) + key + bomb + rest)
    records = [("m", 0, 0, b"A" + payload) for payload in payloads] + [("m", 0, 0, payload) for payload in inside]
    assert set(probe(records)) == {"discard"}
    probe([("j", 0, 0, payload) for payload in payloads])


def with_last_field(name: str, value: bytes) -> bytes:
    """The vector of an action, with a field of these bytes at its end."""
    fields = msgspec.msgpack.decode(vector("action")[0][1:])
    fields.pop(name, None)
    rest = b"".join(msgspec.msgpack.encode(item) for pair in fields.items() for item in pair)
    return b"A\xde" + struct.pack(">H", len(fields) + 1) + rest + msgspec.msgpack.encode(name) + value


def test_text_is_utf_8(probe):
    leads = bytes.fromhex("007f80bfc0c1c2dfe0e1ecedeeeff0f1f3f4f5ff")
    texts = [
        bytes([lead]) + tail * n for lead in leads for tail in (b"\x7f", b"\x80", b"\xbf", b"\xc0") for n in range(4)
    ]
    texts += [bytes([lead, second]) + b"\x80" * n for lead in leads for second in b"\x8f\x90\x9f\xa0" for n in range(3)]
    lines = probe([("m", 0, 0, with_last_field("instruction", bytes([0xA0 + len(text)]) + text)) for text in texts])
    for text, line in zip(texts, lines, strict=True):
        try:
            expected = text.decode()
        except UnicodeDecodeError:
            assert line == "discard", text
        else:
            assert json.loads(line)["instruction"] == expected


@pytest.mark.parametrize("bad", ["ff", "c1", "81a161c1", "92c0", "c402", "c70100", "d4", "ce0000", "cb00", "da00ff"])
def test_a_field_that_is_no_whole_value_is_not_skipped(probe, bad):
    is_whole = bad == "ff"  # -1
    (line,) = probe([("m", 0, 0, with_last_field("from_a_later_release", bytes.fromhex(bad)))])
    assert (line == "discard") != is_whole


def test_a_key_that_is_there_twice_makes_a_message_ambiguous(probe):
    action = vector("action")[0]
    twice = [with_last_field("twice", b"\x00").replace(b"\xa5twice\x00", b"\xa3seq\x12")]
    for name, entries in (("values", b"\xa1a\x01\xa1a\x02"), ("clamped", b"\xa1a\x01\xa1a\x02")):
        twice.append(with_last_field(name, b"\x82" + entries))
    twice.append(action.replace(b"\x85\xa5queue", b"\x86\xa5queue\x00\xa5queue"))
    assert twice[-1] != action
    assert probe([("m", 0, 0, payload) for payload in twice]) == ["discard"] * 4


def test_an_unknown_field_may_be_of_any_kind_and_depth(probe):
    _, _, message = vector("action")
    for extra in (
        [[[[[]]]]] * 5,
        {"a": {"b": {"c": [{}]}}},
        msgspec.msgpack.Ext(5, b"12345678"),
        b"\xff",
        2**64 - 1,
        math.nan,
    ):
        payload = b"A" + msgspec.msgpack.encode({"extra": extra} | message)
        (line,) = probe([("m", 0, 0, payload)])
        assert with_types(json.loads(line)) == with_types(message)


def test_a_message_is_at_most_65536_bytes_long(probe):
    action = make_action(type="move", values={"forward_m_s": 0.5})
    room = 65_536 - len(pack("actions", action)) + len(action.instruction)
    room -= len(msgspec.msgpack.encode("x" * 60_000)) - 60_000 - (len(msgspec.msgpack.encode(action.instruction)) - 14)
    for n, is_taken in ((room, True), (room + 1, False)):
        fields = msgspec.to_builtins(action) | {"instruction": "x" * n}
        payload = b"A" + msgspec.msgpack.encode(fields)
        assert len(payload) == 65_536 + (not is_taken)
        assert (probe([("m", 0, 0, payload)]) == ["discard"]) != is_taken


@pytest.mark.parametrize("number", [0.5, 1e300, 3, -(2**63)])
def test_a_float_may_have_32_bits_or_be_an_integer(probe, number):
    _, _, message = vector("action")
    fields = dict(message) | {"values": {"a": number}}
    payload = b"A" + msgspec.msgpack.encode(fields)
    if number == 0.5:
        payload = payload.replace(b"\xcb" + struct.pack(">d", 0.5), b"\xca" + struct.pack(">f", 0.5))
    (line,) = probe([("m", 0, 0, payload)])
    assert json.loads(line)["values"] == {"a": float(number)}
