"""Bytes of a peer to messages: every way to cut them, and everything that a peer may not send."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.zmtp.frames import (
    COMMAND,
    GREETING,
    GREETING_BYTES,
    LARGE_BYTES,
    MORE,
    Message,
    ProtocolError,
    Reader,
    pack_message,
    pack_ready,
)
from tests.harness.zmtp_peer import command, frame, ready

LIMIT = 200_000
START = GREETING + ready(b"DEALER")


def new_reader(peer: bytes = b"DEALER", max_parts: int = 3) -> Reader:
    return Reader(frozenset({peer}), LIMIT, max_parts)


def read(reader: Reader, data: bytes, portion: int = 1 << 30) -> list[Message]:
    """Give the reader the bytes as recv_into() would, at most `portion` at once."""
    scratch, messages = memoryview(bytearray(1 << 16)), []
    while data:
        space = reader.space(scratch)
        n = min(len(space), len(data), portion)
        space[:n] = data[:n]
        messages += reader.take(space[:n])
        data = data[n:]
    return [[bytes(part) for part in message] for message in messages]


# -- what arrives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("portion", [1, 2, 7, 64, 65_536])
def test_messages_are_the_same_however_the_bytes_are_cut(portion):
    sent = [[b"one"], [b"", b"payload"], [b"x" * 300], [b"a", b"", b"c"], [b""]]
    reader = new_reader()
    assert read(reader, START + b"".join(pack_message(*parts) for parts in sent), portion) == sent
    assert reader.is_ready


@pytest.mark.parametrize("portion", [4096, 65_536, 1 << 20])
def test_a_large_frame_is_received_into_memory_of_its_own(portion):
    large = bytes(range(256)) * (LARGE_BYTES // 256 + 1)
    reader = new_reader()
    sent = pack_message(b"small", large) + pack_message(b"after it")
    assert read(reader, START + sent, portion) == [[b"small", large], [b"after it"]]


@given(st.lists(st.lists(st.binary(max_size=400), min_size=1, max_size=3), max_size=5), st.integers(1, 600))
def test_what_is_packed_is_read(messages, portion):
    packed = b"".join(pack_message(*parts) for parts in messages)
    assert read(new_reader(), START + packed, portion) == messages


def test_the_routing_id_is_the_one_that_the_peer_chose():
    reader = new_reader()
    read(reader, GREETING + ready(b"DEALER", b"controller"))
    assert reader.identity == b"controller"


def test_our_own_ready_is_taken_by_a_reader():
    reader = new_reader(b"ROUTER")
    assert read(reader, GREETING + pack_ready(b"ROUTER") + pack_message(b"x")) == [[b"x"]]


def test_a_subscription_may_be_a_message_or_a_command():
    reader = Reader(frozenset({b"SUB"}), 256, 1)
    start = GREETING + ready(b"SUB")
    sent = pack_message(b"\x01A") + command(b"SUBSCRIBE", b"S") + command(b"CANCEL", b"S") + pack_message(b"\x00A")
    assert read(reader, start + sent) == [[b"\x01A"], [b"\x01S"], [b"\x00S"], [b"\x00A"]]


def test_a_ping_gets_its_pong_and_other_commands_are_ignored():
    reader = new_reader()
    read(reader, START + command(b"PING", b"\x00\x10context") + command(b"PONG") + command(b"NEWS"))
    assert reader.outgoing == b"\x04\x0c\x04PONGcontext"
    assert read(reader, pack_message(b"still here")) == [[b"still here"]]


# -- what a peer may not send -----------------------------------------------------------------------------------------

NOT_GREETINGS = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "zeros": bytes(64),
    "zmtp-1": b"\xff" + bytes(8) + b"\x00" + GREETING[10:],
    "zmtp-2": GREETING[:10] + b"\x01" + GREETING[11:],
    "curve": GREETING[:12] + b"CURVE".ljust(20, b"\0") + GREETING[32:],
}
BAD = {
    "a message before READY": pack_message(b"early"),
    "another command before READY": command(b"SUBSCRIBE", b"A"),
    "an empty command": frame(b"", COMMAND),
    "another socket type": ready(b"SUB"),
    "no socket type": command(b"READY"),
    "a long identity": ready(b"DEALER", b"x" * 256),
    "an identity of ours": ready(b"DEALER", b"\0\0\0\0\1"),
    "a property that is cut off": command(b"READY", b"\x0bSocket-Type\x00\x00\x00\x09DEALER"),
    "a reserved flag": ready(b"DEALER") + b"\x08\x00",
    "a command over 1 KiB": ready(b"DEALER") + command(b"PING", b"x" * 1024),
    "a frame over the limit": ready(b"DEALER") + frame(b"")[:1] + (LIMIT + 1).to_bytes(8, "big"),
    "a frame of 2^63 bytes": ready(b"DEALER") + b"\x02" + b"\xff" * 8,
    "parts over the limit of bytes": ready(b"DEALER") + frame(b"x" * LIMIT, MORE) + frame(b"x"),
    "parts over the limit of parts": ready(b"DEALER") + frame(b"", MORE) * 4,
    "an error": ready(b"DEALER") + command(b"ERROR", b"\x04nope"),
}


@pytest.mark.parametrize("data", NOT_GREETINGS.values(), ids=NOT_GREETINGS.keys())
def test_what_is_not_zmtp_3_is_refused(data):
    with pytest.raises(ProtocolError):
        read(new_reader(), data)


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_what_a_peer_may_not_send_is_refused(data):
    with pytest.raises(ProtocolError):
        read(new_reader(), GREETING + data)


def test_part_of_a_greeting_waits_for_the_rest():
    reader = new_reader()
    for i in range(GREETING_BYTES - 1):
        assert read(reader, GREETING[i : i + 1]) == []
    assert not reader.is_greeted
    read(reader, GREETING[-1:])
    assert reader.is_greeted and not reader.is_ready


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_messages_or_refused(data, after_the_handshake):
    reader = new_reader()
    try:
        read(reader, (START if after_the_handshake else b"") + data)
    except ProtocolError:
        return
    held = len(reader._rest) + reader._n_bytes
    assert held <= len(START) + 300
