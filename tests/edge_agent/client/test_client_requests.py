"""The client's requests, over real sockets: the reply to each, answers in pieces, time-outs. Its clock is a fake."""

from __future__ import annotations

import socket
import threading
import time

import msgspec
import pytest

from edge_agent.client.client import Client, NotConnected, RequestRefused
from edge_agent.time_units import NS_PER_S as S
from edge_agent.wire.codec import encode
from edge_agent.wire.control import Request
from edge_agent.wire.streams import STREAMS
from tests.harness.clock import FakeClock
from tests.harness.fake_daemon import HANG_S, FakeDaemon, make_reply, make_text

# -- control ----------------------------------------------------------------------------------------------------------


def test_every_operation_is_one_request(daemon, client):
    with daemon.answering(lambda request: [make_reply(request, text="An answer.", frames=3)]) as requests:
        client.instruct("Land.")
        assert client.ask("What is it?") == "An answer."
        client.adapter("night")
        client.vehicle_state(altitude_m=3.5, self="a key")
        client.pause()
        client.resume()
        assert client.stats() == {"text": "An answer.", "frames": 3}
    assert [(request.v, request.op, request.text, request.values) for request in requests] == [
        (1, "instruct", "Land.", {}),
        (1, "ask", "What is it?", {}),
        (1, "adapter", "night", {}),
        (1, "vehicle_state", "", {"altitude_m": 3.5, "self": "a key"}),
        (1, "pause", "", {}),
        (1, "resume", "", {}),
        (1, "stats", "", {}),
    ]
    ids = [request.id for request in requests]
    assert len(set(ids)) == 7 and all(0 < len(request_id) <= 64 for request_id in ids)


def test_a_refused_request_has_its_reason(daemon, client):
    with (
        daemon.answering(lambda request: [make_reply(request, error="the model is not ready")]),
        pytest.raises(RequestRefused, match=r"^the model is not ready$"),
    ):
        client.instruct("Land.")


def test_a_missing_reply_is_a_timeout_that_names_the_endpoint(daemon, client, tmp_path):
    with daemon.answering(lambda request: []) as requests:
        with pytest.raises(TimeoutError) as caught:
            client.request("stats", "", 0.2)
        while not requests:  # on a busy machine it may arrive later
            time.sleep(0.01)
    assert f"{tmp_path}/control: edge-agent did not reply to stats in 0.2 s" in str(caught.value)


def test_a_question_without_a_reply_is_a_timeout(daemon, client):
    with daemon.answering(lambda request: []), pytest.raises(TimeoutError, match="did not reply to ask in"):
        list(client.ask_stream("What?", timeout_s=0.2))


def test_without_a_daemon_a_request_is_a_timeout(client):
    with pytest.raises(TimeoutError):
        client.pause(timeout_s=0.1)
    with pytest.raises(TimeoutError):
        list(client.ask_stream("What?", timeout_s=0.1))


def test_a_daemon_that_ends_before_the_request_is_sent_is_a_timeout(client, tmp_path):
    """It accepts each connection and ends it."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "control"))
        listening.listen()
        ended = threading.Event()

        def end_connections() -> None:
            while not ended.is_set():
                listening.accept()[0].close()

        thread = threading.Thread(target=end_connections)
        thread.start()
        with pytest.raises(NotConnected, match="pause was not sent"):
            client.pause(timeout_s=0.1)
        ended.set()
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(tmp_path / "control"))
        thread.join()


def test_a_request_that_timed_out_is_not_carried_out_later(tmp_path, client):
    """The daemon was not running. The caller knows that nothing happened, and nothing may happen minutes later."""
    with pytest.raises(TimeoutError):
        client.instruct("Take off.", timeout_s=0.2)
    with FakeDaemon(tmp_path) as daemon, daemon.answering(lambda request: [make_reply(request)]) as requests:
        client.pause(timeout_s=HANG_S)
        client.resume(timeout_s=HANG_S)
    assert [request.op for request in requests] == ["pause", "resume"]


def test_a_late_reply_is_not_taken_for_the_reply_to_the_next_request(daemon, client):
    first: list[Request] = []

    def answer(request: Request) -> list[bytes]:
        if not first:
            first.append(request)
            return []
        return [make_reply(first[0], text="late"), make_reply(request, text="right")]

    with daemon.answering(answer):
        with pytest.raises(TimeoutError):
            client.ask("First?", timeout_s=0.1)
        assert client.ask("Second?", timeout_s=HANG_S) == "right"
        assert "".join(client.ask_stream("Third?", timeout_s=HANG_S)) == "right"


def test_an_invalid_reply_is_skipped(daemon, client):
    garbage = [b"", b"garbage", b"\x81\xa2id\xa2\xff\xff", encode({"v": 1, "id": 3})]
    with daemon.answering(lambda request: [*garbage, make_reply(request, n=1)]):
        assert client.stats(timeout_s=HANG_S) == {"n": 1}


def test_replies_to_others_do_not_make_a_request_longer(daemon, client, monkeypatch):
    """The time is over when such a reply has been read; there is always another one."""
    monkeypatch.setattr(client, "_is_over", lambda _deadline_ns: True)
    with (
        daemon.answering(lambda request: [make_reply(msgspec.structs.replace(request, id="another"))] * 2),
        pytest.raises(TimeoutError, match="did not reply to stats"),
    ):
        client.stats(timeout_s=HANG_S)


def test_an_id_of_the_caller_is_sent_as_it_is(daemon, client):
    with daemon.answering(lambda request: [make_reply(request)]) as requests:
        for _ in range(2):
            client.request("instruct", "Land.", HANG_S, request_id="mine")
    assert [request.id for request in requests] == ["mine", "mine"]


# -- answers in pieces ------------------------------------------------------------------------------------------------


def ask_in_pieces(daemon: FakeDaemon, client: Client, published: list[str], whole: str) -> list[str]:
    """Ask. The daemon publishes the pieces, and replies with the whole answer when the client has read all of them."""
    all_read = threading.Event()

    def answer(request: Request) -> list[bytes]:
        daemon.wait_for_subscriber("text")
        daemon.publish("text", make_text(0, "to another request", request="other"))
        daemon.send("text", STREAMS["text"].topic + b"garbage")
        for n, text in enumerate(published, 1):
            daemon.publish("text", make_text(n, text, request=request.id, final=n == len(published)))
        all_read.wait(HANG_S)
        return [make_reply(request, text=whole)]

    pieces = []
    if not published:
        all_read.set()
    with daemon.answering(answer):
        for piece in client.ask_stream("What?", timeout_s=HANG_S):
            pieces.append(piece)
            if len(pieces) == len(published):
                all_read.set()
    return pieces


def test_the_pieces_together_are_the_answer(daemon, client):
    pieces = ask_in_pieces(daemon, client, ["A red", " box", " on grass."], "A red box on grass.")
    assert pieces == ["A red", " box", " on grass.", ""]


def test_pieces_that_did_not_arrive_come_with_the_reply(daemon, client):
    assert ask_in_pieces(daemon, client, ["A red"], "A red box.") == ["A red", " box."]


def test_without_pieces_the_reply_is_the_answer(daemon, client):
    assert "".join(ask_in_pieces(daemon, client, [], "A red box.")) == "A red box."


def test_pieces_beyond_the_limit_of_a_reply_are_not_given_twice(daemon, client):
    assert ask_in_pieces(daemon, client, ["A red", " box."], "A red bo") == ["A red", " box.", ""]


def test_when_a_piece_was_lost_the_whole_answer_follows(daemon, client):
    assert ask_in_pieces(daemon, client, ["A red", " grass."], "A red box on grass.")[-1] == "\nA red box on grass."


def test_a_refused_question_is_refused_in_pieces_too(daemon, client):
    with (
        daemon.answering(lambda request: [make_reply(request, error="not ready")]),
        pytest.raises(RequestRefused, match="not ready"),
    ):
        list(client.ask_stream("What?", timeout_s=HANG_S))


# -- the end ----------------------------------------------------------------------------------------------------------


def test_closing_again_does_nothing_and_a_request_that_waits_does_not_delay_it(daemon, tmp_path):
    client = Client(str(tmp_path))
    client.next_answer(0.01)
    with pytest.raises(TimeoutError):
        client.stats(0.05)
    client.close()
    client.close()
    assert client._sockets == {} and client._connections == {}


# -- messages without a pause -----------------------------------------------------------------------------------------


def test_a_request_ends_although_replies_to_others_arrive_without_a_pause(daemon, subscribed, clock):
    def other_replies(request: Request) -> list[bytes]:
        return [make_reply(msgspec.structs.replace(request, id="another"))] * 50

    start_ns = clock.now_ns
    with daemon.answering(other_replies), pytest.raises(TimeoutError):
        clock.on_read = lambda _clock: clock.advance(1.0)
        subscribed.request("stats", "", 20.0)
    assert clock.now_ns < start_ns + 60 * S


def test_a_question_ends_although_text_of_others_arrives_without_a_pause(daemon, subscribed, clock):
    subscribed.next_text(0.0)
    daemon.wait_for_subscriber("text")
    start_ns, seq = clock.now_ns, 0

    def publish_text(_clock: FakeClock) -> None:
        nonlocal seq
        seq += 1
        clock.advance(1.0)
        assert clock.now_ns < start_ns + 200 * S, "the question never ends"
        daemon.publish("text", make_text(seq, "x", request="another"))
        time.sleep(0.02)

    with daemon.answering(lambda request: []), pytest.raises(TimeoutError):
        clock.on_read = publish_text
        list(subscribed.ask_stream("What?", timeout_s=20.0))
