"""Messages as bytes: a message is one topic byte and one msgpack map; anything else is a DecodeError."""

from __future__ import annotations

import contextlib
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.ipc.events import (
    CameraFault,
    CameraOpened,
    Heartbeat,
    SetPaused,
    decode_camera_event,
    decode_model_command,
    decode_model_event,
)
from edge_agent.wire.codec import encode
from edge_agent.wire.control import BadRequest, Reply, Request, decode_reply, read_request
from edge_agent.wire.messages import (
    Action,
    DaemonState,
    Header,
    Lane,
    Refusal,
    RefusalReason,
    StageTimes,
    Status,
    TextMessage,
    TextStopReason,
    WorkerStatus,
)
from edge_agent.wire.pushed_frame import decode_pushed_frame, pack_pushed_frame
from edge_agent.wire.streams import STREAMS, pack, unpack

HEADER = {"v": 1, "session": 7, "seq": 3, "t_pub_ns": 2_000_000, "bundle_id": "0123456789abcdef"}
FRAME = {"camera": "front", "frame_id": 41, "t_capture_ns": 1_000_000, "capture_clock": "driver", "age_ms": 1.0}
ACTION = Action(
    **HEADER,
    **FRAME,
    stages_ms=StageTimes(queue=1.0, encode=2.0, prefill=3.0, decode=4.0, check=0.5),
    valid_for_ms=500,
    valid_until_ns=502_000_000,
    action_space="velocity_body",
    type="move",
    values={"forward_m_s": 2.0, "count": 2.0, "pace": "slow"},
    clamped={"forward_m_s": 9.5},
    instruction="Hold position.",
    dropped_frames=2,
)
REFUSAL = Refusal(
    **HEADER, **FRAME, reason="late", detail="2100 ms old", instruction="Hold position.", dropped_frames=0
)
TEXT = TextMessage(**HEADER, lane="answer", frame_id=41, text="ein Würfel ", request="4f", final=False)
WORKER = WorkerStatus(alive=True, pid=None, restarts=0, rss_mib=None)
STATUS = Status(
    **HEADER,
    state="running",
    reason="",
    uptime_s=1.5,
    camera="front",
    camera_worker=WORKER,
    model_worker=WORKER,
    frames=9,
    frames_dropped=1,
    actions=7,
    refusals={"late": 1},
    faults={"camera: stalled": 2},
    last_frame_age_ms=None,
    last_action_age_ms=20.0,
    inference_count=8,
    instruction="Hold position.",
    vision_backend="onnxruntime CPUExecutionProvider",
    mem_available_mib=None,
    temperature_c=None,
)
WIRE = [("actions", ACTION), ("actions", REFUSAL), ("text", TEXT), ("status", STATUS)]
EACH = pytest.mark.parametrize(("stream", "message"), WIRE, ids=["action", "refusal", "text", "status"])


KIND = {Action: "action", Refusal: "refusal", TextMessage: "text", Status: "status"}


# -- encode -----------------------------------------------------------------------------------------------------------


@EACH
def test_a_message_is_its_topic_byte_and_one_map(stream, message):
    payload = pack(stream, message)
    assert payload[:1] == STREAMS[stream].topic and len(STREAMS[stream].topic) == 1
    fields = msgspec.msgpack.decode(payload[1:])  # raises if anything follows the map
    assert fields["kind"] == KIND[type(message)]
    assert HEADER.items() <= fields.items()
    assert fields.keys() == {"kind", *message.__struct_fields__}


def test_topics_differ():
    topics = [row.topic for row in STREAMS.values()]
    assert len(set(topics)) == len(topics)


def test_the_bytes_are_those_of_the_msgpack_specification():
    """Expected bytes by hand from the specification: fixmap, fixstr, fixint, uint16, float64 (30.0 is 0x403e…)."""
    by_hand = (
        b"\x85\xa4kind\xa6opened\xa5width\xcd\x02\x80\xa6height\xcd\x01\xe0"
        b"\xa3fps\xcb\x40\x3e\x00\x00\x00\x00\x00\x00\xabdescription\xa3cam"
    )
    opened = CameraOpened(width=640, height=480, fps=30.0, description="cam")
    assert encode(opened) == by_hand
    assert decode_camera_event(by_hand) == opened

    by_hand = b"\x84\xa1v\x01\xa2id\xa24f\xa2op\xa3ask\xa4text\xa5what?"
    request = Request(v=1, id="4f", op="ask", text="what?")
    assert read_request(by_hand) == request
    by_hand = b"\x86" + by_hand[1:] + b"\xa6values\x80" + b"\xaaexpires_ns\x00"  # fixmap, fixint
    assert encode(request) == by_hand
    assert read_request(by_hand) == request


@EACH
def test_decoding_an_encoded_message_gives_the_message(stream, message):
    assert unpack(stream, pack(stream, message)) == message


def test_numbers_keep_their_types():
    fields = msgspec.msgpack.decode(pack("actions", ACTION)[1:])
    assert [type(fields["values"][name]) for name in ACTION.values] == [float, float, str]
    integers = {name: type(value) for name, value in fields.items() if name.endswith("_ns") or name == "valid_for_ms"}
    assert len(integers) == 4 and set(integers.values()) == {int}
    assert type(fields["age_ms"]) is float and type(fields["stages_ms"]["queue"]) is float


def test_an_integer_in_the_place_of_a_float_is_read_as_a_float():
    """Other languages write 2.0 as the integer 2."""
    fields = msgspec.to_builtins(ACTION) | {"age_ms": 1, "values": {"forward_m_s": 2}}
    action = unpack("actions", b"A" + msgspec.msgpack.encode(fields))
    assert (type(action.age_ms), type(action.values["forward_m_s"])) == (float, float)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["values", "clamped", "age_ms", "stages_ms", "chunk"])
def test_an_action_with_a_number_that_is_not_finite_is_neither_encoded_nor_decoded(place, number):
    changed = {
        "values": {"forward_m_s": 0.0, "right_m_s": number},
        "clamped": {"forward_m_s": number},
        "chunk": [{"forward_m_s": 0.0}, {"forward_m_s": number}],
        "age_ms": number,
        "stages_ms": StageTimes(queue=1.0, encode=number, prefill=3.0, decode=4.0, check=0.5),
    }[place]
    action = msgspec.structs.replace(ACTION, **{place: changed})
    with pytest.raises(ValueError, match=r"frame 41.*not finite"):
        pack("actions", action)
    with pytest.raises(msgspec.DecodeError, match=r"frame 41.*not finite"):
        unpack("actions", b"A" + msgspec.msgpack.encode(action))


def test_the_largest_message_has_64_kib():
    n_chars = 64 * 1024 - len(pack("text", msgspec.structs.replace(TEXT, text="x" * 40_000))) + 40_000
    payload = pack("text", msgspec.structs.replace(TEXT, text="x" * n_chars))
    assert len(payload) == 65536
    with pytest.raises(ValueError, match=r"text: message of 65537 bytes, the limit is 65536"):
        pack("text", msgspec.structs.replace(TEXT, text="x" * (n_chars + 1)))


# -- decode ----------------------------------------------------------------------------------------------------------


@EACH
def test_readers_ignore_unknown_keys(stream, message):
    fields = msgspec.to_builtins(message) | {"altitude_m": 3.5, "nested": {"a": [1, {"b": None}]}}
    payload = STREAMS[stream].topic + msgspec.msgpack.encode(fields)
    assert unpack(stream, payload) == message


@EACH
@pytest.mark.parametrize(
    ("field", "value"), [("v", 2), ("v", "1"), ("t_pub_ns", 1.5), ("t_pub_ns", None), ("kind", "x")]
)
def test_another_version_or_type_is_an_error(stream, message, field, value):
    fields = msgspec.to_builtins(message) | {field: value}
    with pytest.raises(msgspec.DecodeError):
        unpack(stream, STREAMS[stream].topic + msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    ("stream", "message", "field"),
    [
        ("actions", ACTION, "capture_clock"),
        ("actions", REFUSAL, "reason"),
        ("text", TEXT, "lane"),
        ("text", TEXT, "stop_reason"),
        ("status", STATUS, "state"),
    ],
)
def test_a_value_outside_the_list_of_a_field_is_an_error(stream, message, field):
    fields = msgspec.to_builtins(message) | {field: "from a later version"}
    with pytest.raises(msgspec.DecodeError, match=field):
        unpack(stream, STREAMS[stream].topic + msgspec.msgpack.encode(fields))


# -- pushed frames ----------------------------------------------------------------------------------------------------


def test_a_pushed_frame_is_its_topic_byte_and_one_map():
    pixels = bytes(range(2 * 3 * 3))
    payload = pack_pushed_frame(41, 1_000_000, 3, 2, "rgb8", memoryview(pixels).cast("B", (2, 3, 3)))
    assert payload[:1] == b"F"
    frame = decode_pushed_frame(payload[1:])
    assert (frame.frame_id, frame.t_capture_ns, frame.width, frame.height) == (41, 1_000_000, 3, 2)
    assert (frame.format, frame.data) == ("rgb8", pixels)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("v", 2),
        ("frame_id", -1),
        ("frame_id", 2**63),
        ("t_capture_ns", 1.5),
        ("width", 0),
        ("height", 65536),
        ("format", "rgba8"),
        ("data", 7),
    ],
)
def test_a_pushed_frame_with_a_wrong_field_is_an_error(field, value):
    fields = msgspec.msgpack.decode(pack_pushed_frame(1, 2, 1, 1, "gray8", b"x")[1:])
    with pytest.raises(msgspec.DecodeError):
        decode_pushed_frame(msgspec.msgpack.encode(fields | {field: value}))


# -- control ----------------------------------------------------------------------------------------------------------


def test_control_and_worker_messages_ignore_unknown_keys_too():
    for decode, message in [
        (read_request, Request(v=1, id="a", op="stats")),
        (decode_reply, Reply(v=1, id="a", ok=True, result={"n": 1})),
        (decode_camera_event, CameraFault("stalled", "no frame")),
        (decode_model_event, Heartbeat("idle")),
        (decode_model_command, SetPaused(True)),
    ]:
        fields = msgspec.to_builtins(message) | {"since": "v2"}
        assert decode(msgspec.msgpack.encode(fields)) == message


@EACH
def test_a_missing_key_is_an_error(stream, message):
    optional = {"request", "final", "stop_reason", "adapter", "chunk", "chunk_step_ms"}
    optional |= {"wall_clock_ns", "boot_id", "paused", "language_backend", "board", "governor"}
    optional |= {"information_age_ms"}
    for name in {"kind", *message.__struct_fields__} - optional:
        fields = msgspec.to_builtins(message)
        if name == "kind" and stream != "actions":
            continue  # msgspec needs the kind only on a stream with two kinds of messages
        del fields[name]
        with pytest.raises(msgspec.DecodeError, match=name):
            unpack(stream, STREAMS[stream].topic + msgspec.msgpack.encode(fields))


@EACH
def test_the_wrong_topic_is_an_error(stream, message):
    payload = pack(stream, message)
    for other, row in STREAMS.items():
        if other != stream:
            with pytest.raises(msgspec.DecodeError, match="expected topic"):
                unpack(stream, (row.topic or b"C") + payload[1:])
    for damaged in (b"", payload[1:], payload[:1]):
        with pytest.raises(msgspec.DecodeError):
            unpack(stream, damaged)


@EACH
def test_every_truncation_and_everything_appended_is_an_error(stream, message):
    payload = pack(stream, message)
    for damaged in [payload[:n] for n in range(len(payload))] + [payload + b"\xc0", payload + payload]:
        with pytest.raises(msgspec.DecodeError):
            unpack(stream, damaged)


@EACH
@settings(deadline=None)
@given(changes=st.lists(st.tuples(st.integers(1, 10**6), st.binary(max_size=3)), min_size=1, max_size=4))
def test_changed_bytes_give_a_message_or_a_decode_error(stream, message, changes):
    payload = bytearray(pack(stream, message))
    for place, replacement in changes:
        at = 1 + place % (len(payload) - 1)
        payload[at : at + len(replacement)] = replacement
    with contextlib.suppress(msgspec.DecodeError):
        assert isinstance(unpack(stream, bytes(payload)), Header)


@pytest.mark.parametrize("stream", ["actions", "text", "status"])
@settings(deadline=None)
@given(garbage=st.binary(max_size=200))
def test_an_invalid_message_is_a_decode_error(stream, garbage):
    with pytest.raises(msgspec.DecodeError):
        unpack(stream, STREAMS[stream].topic + garbage)


READERS = {stream: lambda data, stream=stream: unpack(stream, STREAMS[stream].topic + data) for stream, _ in WIRE}
READERS |= {
    "request": read_request,
    "reply": decode_reply,
    "camera event": decode_camera_event,
    "model event": decode_model_event,
    "model command": decode_model_command,
    "pushed frame": decode_pushed_frame,
}


@pytest.mark.parametrize("reader", READERS)
def test_invalid_utf8_is_a_decode_error(reader):
    """In a field of the message, and in an unknown field."""
    first = {"request": "id", "reply": "id", "pushed frame": "format"}.get(reader, "kind").encode()
    if reader in ("actions", "text", "status"):
        first = b"bundle_id"
    for key in (first, b"unknown"):
        data = b"\x81" + bytes([0xA0 + len(key)]) + key + b"\xa2\xff\xff"
        with pytest.raises((msgspec.DecodeError, BadRequest)):
            READERS[reader](data)


@pytest.mark.parametrize("reader", READERS)
def test_a_deeply_nested_value_is_a_decode_error(reader):
    """A message of 64 KiB can hold 60 000 nested arrays in an unknown field."""
    with pytest.raises((msgspec.DecodeError, BadRequest)):
        READERS[reader](b"\x81\xa7unknown" + b"\x91" * 60_000 + b"\xc0")


# -- round trips ------------------------------------------------------------------------------------------------------

count = st.integers(0, 2**63 - 1)
number = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(max_size=50)
header = {"v": st.just(1), "session": count, "seq": count, "t_pub_ns": count, "bundle_id": text}
frame = {
    "camera": text,
    "frame_id": count,
    "t_capture_ns": count,
    "capture_clock": st.sampled_from(["driver", "arrival", "sender"]),
    "age_ms": number,
    "instruction": text,
    "dropped_frames": count,
}
any_action = st.builds(
    Action,
    **header,
    **frame,
    stages_ms=st.builds(StageTimes, queue=number, encode=number, prefill=number, decode=number, check=number),
    valid_for_ms=count,
    valid_until_ns=count,
    action_space=text,
    type=text,
    values=st.dictionaries(text, number | text, max_size=5),
    clamped=st.dictionaries(text, number, max_size=5),
)
any_refusal = st.builds(Refusal, **header, **frame, reason=st.sampled_from(RefusalReason.__args__), detail=text)
any_text = st.builds(
    TextMessage,
    **header,
    lane=st.sampled_from(Lane.__args__),
    frame_id=count,
    text=text,
    request=text,
    final=st.booleans(),
    stop_reason=st.sampled_from(TextStopReason.__args__),
)
worker = st.builds(WorkerStatus, alive=st.booleans(), pid=st.none() | count, restarts=count, rss_mib=st.none() | number)
any_status = st.builds(
    Status,
    **header,
    state=st.sampled_from(DaemonState.__args__),
    reason=text,
    uptime_s=number,
    camera=text,
    camera_worker=worker,
    model_worker=worker,
    frames=count,
    frames_dropped=count,
    actions=count,
    refusals=st.dictionaries(text, count, max_size=3),
    faults=st.dictionaries(text, count, max_size=3),
    last_frame_age_ms=st.none() | number,
    last_action_age_ms=st.none() | number,
    inference_count=count,
    instruction=text,
    vision_backend=text,
    mem_available_mib=st.none() | number,
    temperature_c=st.none() | number,
    language_backend=text,
    information_age_ms=st.none() | number,
)


@pytest.mark.parametrize(
    ("stream", "messages"),
    [("actions", any_action), ("actions", any_refusal), ("text", any_text), ("status", any_status)],
    ids=["action", "refusal", "text", "status"],
)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_decoding_any_encoded_message_gives_the_message(stream, messages, data):
    message = data.draw(messages)
    payload = pack(stream, message)
    assert unpack(stream, payload) == message
    assert msgspec.msgpack.decode(payload[1:]) == {"kind": KIND[type(message)]} | {
        key: value for key, value in msgspec.to_builtins(message).items() if key != "kind"
    }


def test_the_pixels_of_a_pushed_frame_are_not_copied():
    """A frame has megabytes."""
    message = bytearray(pack_pushed_frame(1, 2, 2, 1, "rgb8", b"abcdef"))
    frame = decode_pushed_frame(memoryview(message)[1:])
    assert frame.data == b"abcdef"
    message[-1:] = b"g"
    assert frame.data == b"abcdeg"
