"""What the client reads from the streams, over real sockets: each valid action at most once. Its clock is a fake."""

from __future__ import annotations

import itertools
import os
import random
import time

import msgspec
import pytest

from edge_agent.client import client as client_module
from edge_agent.client.client import Client, is_valid
from edge_agent.time_units import NS_PER_MS as MS
from edge_agent.time_units import NS_PER_S as S
from edge_agent.wire.messages import MAX_MESSAGE_BYTES, Action, Header, Refusal
from edge_agent.wire.streams import STREAMS, pack
from tests.harness.clock import FakeClock
from tests.harness.fake_daemon import HANG_S, FakeDaemon, make_action, make_refusal, make_text


def arrive(client: Client, stream: str = "actions") -> None:
    """Until a message waits in the client's socket."""
    assert client._subscriber(stream).poll(round(HANG_S * 1000)), f"{stream}: nothing arrived"


def exchange(daemon: FakeDaemon, client: Client, message: Header) -> Action | Refusal | None:
    """Publish one message, and read when it has arrived."""
    daemon.publish("actions", message)
    arrive(client)
    return client.next_answer(0.0)


# -- actions ----------------------------------------------------------------------------------------------------------


def test_a_valid_action_is_returned_as_it_was_published(daemon, subscribed, clock):
    sent = make_action(1, now_ns=clock.now_ns)
    assert exchange(daemon, subscribed, sent) == sent
    assert (subscribed.expired, subscribed.missed) == (0, 0)


def test_next_answer_returns_a_refusal_and_actions_skips_it(daemon, subscribed, clock):
    sent = make_refusal(1)
    assert exchange(daemon, subscribed, sent) == sent
    daemon.publish("actions", make_refusal(2))
    arrive(subscribed)

    def publish_after_the_refusal(_clock: FakeClock) -> None:
        if subscribed._newest == (1, 2):
            daemon.publish("actions", make_action(3, now_ns=clock.now_ns))

    clock.on_read = publish_after_the_refusal
    assert next(subscribed.actions()).seq == 3
    assert subscribed.expired == subscribed.missed == 0


@pytest.mark.parametrize(
    ("changes", "ok"),
    [
        ({}, True),
        ({"t_pub_ns": -2 * S}, False),  # everything two seconds ago
        ({"t_pub_ns": 3 * S}, False),  # everything in the future
        ({"t_pub_ns": 100 * MS}, False),
        ({"t_capture_ns": 10 * MS}, False),  # captured after it was published
        ({"t_capture_ns": 0}, True),
        ({"t_capture_ns": -60 * S}, True),  # the daemon has checked the age
        ({"valid_until_ns": 1 * S}, True),
        ({"valid_until_ns": 1 * S + 1}, False),  # valid for longer than any action may be
        ({"valid_until_ns": 3600 * S}, False),
        ({"valid_until_ns": -1}, False),
        ({"valid_until_ns": 0}, False),
    ],
)
def test_validity(changes, ok):
    """t_pub_ns is an offset from now; the other two are offsets from t_pub_ns."""
    now_ns = 10**15
    pub_ns = now_ns + changes.get("t_pub_ns", 0)
    capture_ns = pub_ns + changes.get("t_capture_ns", -20 * MS)
    until_ns = pub_ns + changes.get("valid_until_ns", 500 * MS)
    tested = make_action(now_ns=pub_ns, t_capture_ns=capture_ns, valid_until_ns=until_ns)
    assert is_valid(tested, now_ns) is ok


# About every limit, and far from all of them.
OFFSETS = [limit + change for limit in (-S, 0, 5 * MS, S) for change in (-1, 0, 1)]
OFFSETS += [-(2**62), -4 * S, -300 * MS, -20 * MS, 3 * MS, 20 * MS, 300 * MS, 4 * S, 2**62]
STAMPS = list(itertools.product(OFFSETS, repeat=3))
NOW_NS = 2**62 + 10**15


def action_at(published: int, captured: int, until: int, seq: int = 0) -> tuple[Action, bool]:
    """An action with stamps at offsets from NOW_NS, and whether it is valid at NOW_NS."""
    action = make_action(seq, now_ns=NOW_NS + published, t_capture_ns=NOW_NS + captured, valid_until_ns=NOW_NS + until)
    is_current = captured <= published <= 5 * MS  # two readings of one clock on two cores may differ by that
    return action, is_current and 0 < until <= published + S


def test_no_stamps_make_an_expired_or_future_action_valid():
    found = set()
    for stamps in STAMPS:
        action, valid = action_at(*stamps)
        assert is_valid(action, NOW_NS) == valid, stamps
        found.add(valid)
    assert found == {True, False}


def test_over_the_wire_only_valid_actions_are_returned(daemon, subscribed, clock):
    clock.now_ns = NOW_NS
    valid_stamps = [stamps for stamps in STAMPS if action_at(*stamps)[1]]
    rows = random.Random(0).sample(STAMPS, 60) + random.Random(0).sample(valid_stamps, 20)
    for seq, stamps in enumerate(rows):
        subscribed._valid_from_ns = 0  # the times of the rows go back
        expired = subscribed.expired
        sent, valid = action_at(*stamps, seq)
        assert exchange(daemon, subscribed, sent) == (sent if valid else None)
        assert subscribed.expired == expired + (not valid)


def test_an_action_expires_while_it_waits_to_be_read(daemon, subscribed, clock):
    daemon.publish("actions", make_action(1, now_ns=clock.now_ns, valid_ms=100))
    arrive(subscribed)
    clock.advance(0.15)
    assert subscribed.next_answer(0.0) is None
    assert subscribed.expired == 1
    sent = make_action(2, now_ns=clock.now_ns, valid_ms=100)
    assert exchange(daemon, subscribed, sent) == sent


def test_nothing_is_returned_twice_or_after_a_newer_message(daemon, subscribed, clock):
    sent = make_action(5, now_ns=clock.now_ns)
    assert exchange(daemon, subscribed, sent) == sent
    older = [make_action(seq, now_ns=clock.now_ns) for seq in (5, 4, 0)]
    for again in (sent, *older, make_refusal(5), make_refusal(3)):
        assert exchange(daemon, subscribed, again) is None
    assert subscribed.missed == 0
    sent = make_action(6, now_ns=clock.now_ns)
    assert exchange(daemon, subscribed, sent) == sent


def test_missed_messages_are_counted(daemon, subscribed, clock):
    for seq, missed in ((1, 0), (2, 0), (5, 2), (6, 2), (106, 101)):
        assert exchange(daemon, subscribed, make_action(seq, now_ns=clock.now_ns)).seq == seq
        assert subscribed.missed == missed


def test_a_slow_controller_gets_the_newest_and_counts_what_it_missed(daemon, subscribed, clock):
    """When all of a burst has arrived, one read returns the last one. A busy machine may need several bursts."""
    until_s, last = time.monotonic() + HANG_S, 1
    assert exchange(daemon, subscribed, make_action(last, now_ns=clock.now_ns)).seq == last
    while True:
        first, last, missed = last + 1, last + 200, subscribed.missed
        for seq in range(first, last + 1):
            daemon.publish("actions", make_action(seq, now_ns=clock.now_ns))
        time.sleep(0.05)
        if subscribed.next_answer(0.0).seq == last and subscribed.missed == missed + 199:
            break
        assert time.monotonic() < until_s, "never the newest"
        while subscribed.next_answer(1.0).seq < last:
            pass


def test_after_a_restart_the_daemon_counts_from_the_beginning(daemon, subscribed, clock):
    assert exchange(daemon, subscribed, make_action(900, now_ns=clock.now_ns)).seq == 900
    assert exchange(daemon, subscribed, make_action(0, now_ns=clock.now_ns, session=77)).seq == 0
    assert subscribed.missed == 0
    assert exchange(daemon, subscribed, make_action(3, now_ns=clock.now_ns, session=77)).seq == 3
    assert subscribed.missed == 2


def test_a_session_that_has_ended_does_not_come_back(daemon, subscribed, clock):
    rows = [(1, 50, True), (2, 0, True), (1, 51, False), (2, 1, True), (3, 0, True), (2, 9, False), (1, 52, False)]
    for session, seq, is_returned in rows:
        sent = make_action(seq, now_ns=clock.now_ns, session=session)
        assert exchange(daemon, subscribed, sent) == (sent if is_returned else None)


@pytest.mark.parametrize("change", [{"session": 2}, {"seq": 1000}])
def test_a_message_of_another_clock_ends_no_session_and_skips_no_number(daemon, subscribed, clock, change):
    first = make_action(0, now_ns=clock.now_ns)
    assert exchange(daemon, subscribed, first) == first
    future = make_action(1, now_ns=clock.now_ns + S)
    assert exchange(daemon, subscribed, msgspec.structs.replace(future, **change)) is None
    second = make_action(2, now_ns=clock.now_ns)
    assert exchange(daemon, subscribed, second) == second


@pytest.mark.parametrize("refused", [True, False])
@pytest.mark.parametrize("session", [1, 2])
def test_an_action_that_is_expired_on_arrival_ends_the_one_before(daemon, subscribed, clock, refused, session):
    """PROTOCOL.md, rule 3. It may also hide a refusal, or the beginning of a session."""
    first = make_action(1, now_ns=clock.now_ns, valid_ms=900)
    assert exchange(daemon, subscribed, first) == first and subscribed.is_valid(first)
    late = make_action(3, now_ns=clock.now_ns + MS, session=session, valid_ms=1)
    clock.advance(0.01)
    waiting = [pack("actions", make_refusal(2))] if refused else []
    subscribed._receive = lambda _stream, _deadline_ns: [*waiting, pack("actions", late)]
    assert subscribed.next_answer(0.0) is None and subscribed.expired == 1
    assert not subscribed.is_valid(first)
    newer = make_action(4, now_ns=clock.now_ns, session=session)
    del subscribed._receive
    assert exchange(daemon, subscribed, newer) == newer and subscribed.is_valid(newer)


def late(seq: int, clock: FakeClock) -> Action:
    """It expired before the action before it was published: only its number says that it is newer."""
    return make_action(seq, now_ns=clock.now_ns - S)


@pytest.mark.parametrize(
    ("newer", "is_valid"),
    [
        (late, False),
        (lambda seq, _clock: make_refusal(seq), False),
        (lambda seq, clock: make_action(seq, now_ns=clock.now_ns), True),
    ],
    ids=["expired", "refusal", "action"],
)
def test_a_refusal_and_an_expired_action_end_the_action_before(daemon, subscribed, clock, newer, is_valid):
    """A valid one does not: who asks whether the present action is valid, and then takes the next one, holds never."""
    first = make_action(1, now_ns=clock.now_ns, valid_ms=900)
    assert exchange(daemon, subscribed, first) == first and subscribed.is_valid(first)
    exchange(daemon, subscribed, newer(2, clock))
    assert subscribed.is_valid(first) is is_valid
    third = make_action(3, now_ns=clock.now_ns)
    assert exchange(daemon, subscribed, third) == third and subscribed.is_valid(third)


def test_the_session_that_has_ended_takes_its_action_with_it(daemon, subscribed, clock):
    first = make_action(1, now_ns=clock.now_ns, valid_ms=900)
    assert exchange(daemon, subscribed, first) == first
    exchange(daemon, subscribed, msgspec.structs.replace(late(0, clock), session=2))
    assert not subscribed.is_valid(first)


@pytest.mark.parametrize("later", ["garbage", "another clock", "an ended session", "an old number"])
def test_what_is_discarded_does_not_hide_the_message_before_it(subscribed, clock, later):
    """Both wait in the socket when the controller reads: a refusal must not be lost."""
    action, refusal = make_action(8, now_ns=clock.now_ns, session=2), make_refusal(9)
    ended = make_action(900, now_ns=clock.now_ns, session=2)
    last = {
        "garbage": b"Anonsense",
        "another clock": pack("actions", make_action(10, now_ns=clock.now_ns + S)),
        "an ended session": pack("actions", ended),
        "an old number": pack("actions", make_action(9, now_ns=clock.now_ns)),
    }[later]
    waiting = [pack("actions", action), pack("actions", refusal), last]
    assert subscribed._newest_of(waiting) == refusal
    assert subscribed.missed == 1 and subscribed.expired == (later == "another clock")


def test_a_message_of_several_zeromq_frames_is_skipped(daemon, subscribed, clock):
    frames = [pack("actions", make_action(seq, now_ns=clock.now_ns)) for seq in (1, 2)]
    daemon.sockets["actions"].send_multipart(frames)
    arrive(subscribed)
    assert subscribed.next_answer(0.0) is None
    sent = make_action(1, now_ns=clock.now_ns)
    assert exchange(daemon, subscribed, sent) == sent


def test_a_message_that_is_too_long_is_skipped_and_the_connection_stays(daemon, subscribed, clock):
    payload = pack("actions", make_action(1, now_ns=clock.now_ns, instruction=""))
    n_chars = MAX_MESSAGE_BYTES - len(payload) - 2  # a longer str has two more bytes of length
    for extra, is_returned in ((1, False), (0, True)):
        action = make_action(1, now_ns=clock.now_ns, instruction="x" * (n_chars + extra))
        daemon.send("actions", b"A" + msgspec.msgpack.encode(action))
        arrive(subscribed)
        assert (subscribed.next_answer(0.0) == action) is is_returned


def test_each_silence_is_reported_until_an_action_arrives(daemon, subscribed, clock):
    actions = subscribed.actions(silence_s=0.05)
    assert [next(actions) for _ in range(3)] == [None, None, None]
    daemon.publish("actions", make_action(1, now_ns=clock.now_ns))
    arrive(subscribed)
    assert next(actions).seq == 1
    assert next(actions) is None


def test_while_actions_arrive_there_is_no_silence(daemon, subscribed, clock):
    actions = subscribed.actions(silence_s=HANG_S)
    for seq in range(1, 8):
        daemon.publish("actions", make_action(seq, now_ns=clock.now_ns))
        assert next(actions).seq == seq
        clock.advance(0.9 * HANG_S)  # less than the silence since the last action, more than it since the first


def test_silence_begins_at_the_last_action_and_not_at_the_last_message(daemon, subscribed, clock):
    """Refusals and expired actions do not end a silence. A message arrives at every reading of the clock."""
    seq, start_ns = 0, clock.now_ns

    def publish_noise(_clock: FakeClock) -> None:
        nonlocal seq
        seq += 1
        clock.advance(1.0)
        assert clock.now_ns < start_ns + 10 * HANG_S * S, "no silence"
        daemon.publish("actions", make_refusal(seq) if seq % 2 else make_action(seq, now_ns=0))

    clock.on_read = publish_noise
    assert next(subscribed.actions(silence_s=HANG_S)) is None
    assert clock.now_ns >= start_ns + HANG_S * S and seq >= HANG_S


def test_without_a_silence_the_iterators_wait_until_something_comes(daemon, subscribed, clock, monkeypatch):
    monkeypatch.setattr(client_module, "POLL_S", 0.01)
    subscribed.next_text(0.0)
    daemon.wait_for_subscriber("text")
    readings = 0

    def publish_later(_clock: FakeClock) -> None:
        nonlocal readings
        readings += 1
        if readings == 20:
            daemon.publish("actions", make_action(1, now_ns=clock.now_ns))
        elif readings == 50:
            daemon.publish("text", make_text(1, "A word."))

    clock.on_read = publish_later
    assert next(subscribed.actions()).seq == 1
    assert next(subscribed.text()).text == "A word."
    assert readings >= 50


def test_without_a_daemon_there_is_silence_and_no_error(client):
    assert client.next_answer(0.05) is None and client.next_text(0.05) is None and client.status(0.05) is None
    assert next(client.actions(silence_s=0.1)) is None


def test_a_wait_ends_at_its_deadline_although_old_messages_arrive(daemon, subscribed, clock):
    """The clock decides, not the time of one poll."""
    assert exchange(daemon, subscribed, make_refusal(1)) is not None

    def repeat(_clock: FakeClock) -> None:
        clock.advance(1.0)
        daemon.publish("actions", make_refusal(1))

    clock.on_read, start_ns = repeat, clock.now_ns
    assert subscribed.next_answer(HANG_S) is None
    assert clock.now_ns >= start_ns + HANG_S * S


@pytest.mark.parametrize("stream", ["actions", "text", "status"])
def test_an_invalid_message_on_a_stream_is_skipped(daemon, client, clock, stream):
    topic = STREAMS[stream].topic
    read = {"actions": client.next_answer, "text": client.next_text, "status": client.status}[stream]
    assert read(0.0) is None
    daemon.wait_for_subscriber(stream)
    deep, not_text = b"\x81\xa1x" + b"\x91" * 50_000 + b"\xc0", b"\x81\xa9bundle_id\xa2\xff\xff"
    for garbage in (b"", b"\x80", b"garbage", b"\x00" * 1000, b"\x82\xa4kind\xa6action", not_text, deep):
        daemon.send(stream, topic + garbage)
        arrive(client, stream)
        assert read(0.0) is None
    if stream != "status":
        good = make_action(1, now_ns=clock.now_ns) if stream == "actions" else make_text(1, "good")
        daemon.publish(stream, good)
        assert read(HANG_S) == good


# -- text -------------------------------------------------------------------------------------------------------------


def test_text_arrives_complete_and_in_order(daemon, client):
    client.next_text(0.0)
    daemon.wait_for_subscriber("text")
    for seq in range(300):
        daemon.publish("text", make_text(seq, f"word {seq} "))
    stream = client.text()
    assert [next(stream).text for _ in range(300)] == [f"word {seq} " for seq in range(300)]


# -- messages without a pause -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["next_answer", "next_text"])
def test_a_time_out_ends_although_other_messages_arrive_without_a_pause(daemon, subscribed, clock, read):
    """Expired actions on one stream, damaged messages on the other: at each reading of the clock another one."""
    start_ns, stream = clock.now_ns, {"next_answer": "actions", "next_text": "text"}[read]
    getattr(subscribed, read)(0.0)
    daemon.wait_for_subscriber(stream)

    def publish_noise(_clock: FakeClock) -> None:
        clock.advance(1.0)
        assert clock.now_ns < start_ns + 100 * S, "the time-out never ends"
        if stream == "actions":
            daemon.publish("actions", make_action(clock.now_ns // S, now_ns=0))
        else:
            daemon.send(stream, b"T damaged")
        time.sleep(0.02)  # the message has arrived when poll() is called

    clock.on_read = publish_noise
    assert getattr(subscribed, read)(5.0) is None


def test_a_loop_with_another_connection_waits_for_both(daemon, client, tmp_path):
    client.wait_for_answer(0.0)
    daemon.wait_for_subscriber("actions")
    daemon.publish("actions", make_action(0, now_ns=client._clock()))
    client.wait_for_answer(HANG_S)
    assert client.next_answer(0.0) is not None
    reader, writer = os.pipe()
    os.write(writer, b"x")
    client.wait_for_answer(HANG_S, reader)  # or the test would hang
    assert client.next_answer(0.0) is None
    for descriptor in (reader, writer):
        os.close(descriptor)
