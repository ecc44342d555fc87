"""A client after a fork, a suspend, an acknowledged stop, and where no daemon can be reached."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from edge_agent.client import Client, FramePusher, NotConnected, RequestRefused
from edge_agent.suspend import MAX_GAIN_NS, SuspendDetector
from edge_agent.wire.control import Request
from tests.harness import ROOT
from tests.harness.clock import FakeClock
from tests.harness.fake_daemon import HANG_S, FakeDaemon, make_action, make_reply, make_text


@pytest.fixture
def boottime(clock: FakeClock) -> FakeClock:
    return FakeClock(clock.now_ns + 7_000_000_000)  # the machine has slept for 7 s before


@pytest.fixture
def client(tmp_path: Path, clock: FakeClock, boottime: FakeClock) -> Iterator[Client]:
    with Client(str(tmp_path), clock, SuspendDetector(clock, boottime)) as connected:
        yield connected


def publish(daemon: FakeDaemon, client: Client, seq: int, now_ns: int) -> None:
    client.next_answer(0.0)
    daemon.wait_for_subscriber("actions")
    daemon.publish("actions", make_action(seq, now_ns=now_ns))
    assert client._subscriber("actions").poll(round(HANG_S * 1000))


def advance(seconds: float, *clocks: FakeClock) -> None:
    for clock in clocks:
        clock.advance(seconds)


# -- suspend ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asleep_s", [0.011, 5.0, 100_000.0])
def test_an_action_from_before_a_suspend_is_not_returned_after_it(daemon, client, clock, boottime, asleep_s):
    publish(daemon, client, 0, clock())
    boottime.advance(asleep_s)
    assert client.next_answer(0.0) is None and client.expired == 1
    advance(0.001, clock, boottime)
    publish(daemon, client, 1, clock())
    assert client.next_answer(0.0).seq == 1, "what is published after it is valid"


def test_an_action_that_the_controller_holds_ends_with_a_suspend(daemon, client, clock, boottime):
    publish(daemon, client, 0, clock())
    action = client.next_answer(0.0)
    advance(0.1, clock, boottime)
    assert client.is_valid(action)
    boottime.advance(1.0)
    assert not client.is_valid(action) and not client.is_valid(action)


def test_time_that_passes_on_both_clocks_is_no_suspend(clock, boottime):
    detector = SuspendDetector(clock, boottime)
    advance(1000.0, clock, boottime)
    boottime.now_ns += MAX_GAIN_NS
    assert detector.resumed_ns() == 0
    boottime.now_ns += 1
    assert detector.resumed_ns() == clock()
    advance(1.0, clock, boottime)
    assert detector.resumed_ns() == clock() - 1_000_000_000
    boottime.advance(1.0)
    assert detector.resumed_ns() == clock(), "a second suspend"


def test_a_reader_that_is_interrupted_between_the_clocks_reads_again():
    """CLOCK_MONOTONIC, then CLOCK_BOOTTIME, then CLOCK_MONOTONIC: 50 ms pass between the first two, once."""
    times_ms = iter([0, 0, 0, *(100, 150, 150), *(150, 150, 150)])
    read = lambda: next(times_ms) * 1_000_000  # noqa: E731
    detector = SuspendDetector(read, read)
    assert detector.resumed_ns() == 0


def test_a_reader_that_is_always_interrupted_assumes_a_suspend():
    clock = FakeClock()

    def interrupted() -> int:
        clock.advance(0.02)
        return clock()

    detector = SuspendDetector(clock, clock)
    detector._boottime = interrupted
    assert detector.resumed_ns() == clock()


def test_the_clocks_of_the_machine_say_that_it_did_not_sleep_in_this_test():
    assert SuspendDetector().resumed_ns() == 0


# -- an acknowledged change -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["pause", "instruct", "adapter"])
def test_an_action_from_before_the_reply_is_not_returned_after_it(daemon, client, clock, change):
    """It lies in the socket of the actions stream, which nothing orders with the reply."""
    publish(daemon, client, 0, clock())
    clock.advance(0.01)
    with daemon.answering(lambda request: [make_reply(request)]):
        client.request(change, "x", HANG_S)
    assert client.next_answer(0.0) is None
    clock.advance(0.01)
    publish(daemon, client, 1, clock())
    assert client.next_answer(0.0).seq == 1


def test_a_refused_pause_ends_older_actions_too(daemon, client, clock):
    """The daemon is paused, and cannot promise that it stays so."""
    publish(daemon, client, 0, clock())
    action = client.next_answer(0.0)
    clock.advance(0.01)
    with daemon.answering(lambda request: [make_reply(request, error="it cannot be kept")]):
        with pytest.raises(RequestRefused):
            client.instruct("Land.")
        assert client.is_valid(action)
        with pytest.raises(RequestRefused):
            client.pause()
    assert not client.is_valid(action)


def test_a_held_action_ends_with_the_reply_to_pause(daemon, client, clock):
    publish(daemon, client, 0, clock())
    action = client.next_answer(0.0)
    clock.advance(0.01)
    assert client.is_valid(action)
    with daemon.answering(lambda request: [make_reply(request)]):
        client.stats()
        assert client.is_valid(action)
        client.pause()
    assert not client.is_valid(action)


def test_a_request_says_when_nobody_waits_for_it_any_more(daemon, client, clock):
    with daemon.answering(lambda request: [make_reply(request)]) as requests:
        client.stats(timeout_s=3.0)
        client.resume(timeout_s=4.0)
    assert [request.expires_ns - clock() for request in requests] == [3_000_000_000, 4_000_000_000]


# -- a question that nobody waits for ---------------------------------------------------------------------------------


def wait_for_cancel(requests: list[Request]) -> None:
    while not any(request.op == "cancel" for request in requests):
        time.sleep(0.001)
    question, cancel = requests
    assert (question.op, cancel.text) == ("ask", question.id)


def test_a_time_out_cancels_the_question(daemon, client):
    with daemon.answering(lambda request: []) as requests:
        with pytest.raises(TimeoutError):
            client.ask("What?", timeout_s=0.3)
        wait_for_cancel(requests)


def test_an_iterator_that_is_closed_cancels_the_question(daemon, client):
    def publish_one_piece(request: Request) -> list[bytes]:
        if request.op == "ask":
            daemon.wait_for_subscriber("text")
            daemon.publish("text", make_text(0, "a pad", request=request.id))
        return []

    with daemon.answering(publish_one_piece) as requests:
        pieces = client.ask_stream("What?", HANG_S)
        assert next(pieces) == "a pad"
        pieces.close()
        wait_for_cancel(requests)


def test_ctrl_c_cancels_the_question(daemon, client, monkeypatch):
    def interrupted(_request_id: str, _control: zmq.Socket) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "_reply_to", interrupted)
    with daemon.answering(lambda request: [make_reply(request)] if request.op == "ask" else []) as requests:
        with pytest.raises(KeyboardInterrupt):
            client.ask("What?", HANG_S)
        wait_for_cancel(requests)


def test_a_daemon_that_is_gone_cannot_be_told(client):
    with pytest.raises(KeyboardInterrupt), client._waiting_for("ask", "id"):
        client._control("control")  # nobody is there
        raise KeyboardInterrupt


def test_other_requests_can_be_made_between_two_pieces_of_an_answer(daemon, client):
    """The reply to the question comes while the reply to another request is waited for."""
    question: list[Request] = []

    def answer(request: Request) -> list[bytes]:
        if request.op == "ask":
            question.append(request)
            daemon.wait_for_subscriber("text")
            daemon.publish("text", make_text(0, "a ", request=request.id))
            return []
        daemon.reply_to("ask", make_reply(question[0], text="a pad"))
        return [make_reply(request, refused={})]

    with daemon.answering(answer):
        pieces = client.ask_stream("What?", HANG_S)
        assert next(pieces) == "a "
        assert client.vehicle_state(altitude_m=3.5) == {}
        assert "".join(pieces) == "pad"


def test_an_answer_outlives_a_time_out_of_another_request(daemon, client):
    question: list[Request] = []

    def answer(request: Request) -> list[bytes]:
        if request.op == "ask":
            daemon.wait_for_subscriber("text")
            daemon.publish("text", make_text(0, "a ", request=request.id))
            question.append(request)
        else:
            daemon.reply_to("ask", make_reply(question[0], text="a pad"))
        return []

    with daemon.answering(answer):
        pieces = client.ask_stream("What?", HANG_S)
        assert next(pieces) == "a "
        with pytest.raises(TimeoutError):
            client.stats(timeout_s=0.1)
        assert "".join(pieces) == "pad"


def test_an_iterator_may_be_closed_after_its_client(daemon, client):
    def publish_one_piece(request: Request) -> list[bytes]:
        daemon.wait_for_subscriber("text")
        daemon.publish("text", make_text(0, "a pad", request=request.id))
        return []

    with daemon.answering(publish_one_piece):
        pieces = client.ask_stream("What?", HANG_S)
        next(pieces)
        client.close()
        pieces.close()


def test_an_iterator_that_ends_in_a_forked_process_leaves_the_question_alone(daemon, client, monkeypatch):
    with daemon.answering(lambda request: [make_reply(request, text="a pad")]) as requests:
        pieces = client.ask_stream("What?", HANG_S)
        with monkeypatch.context() as forked, pytest.raises(KeyboardInterrupt), client._waiting_for("ask", "id", "id"):
            connection = client._control("id")
            forked.setattr(os, "getpid", lambda: 1)
            raise KeyboardInterrupt
        assert "".join(pieces) == "a pad"
    assert [request.op for request in requests] == ["ask"] and not connection.socket.closed
    connection.close()


# -- a client that is closed, and odd time-outs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "call", [Client.pause, Client.stats, lambda client: client.next_answer(0.0), lambda client: client.ask("What?")]
)
def test_a_closed_client_says_so(client, call):
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="this Client was closed; make another one"):
        call(client)


@pytest.mark.parametrize("timeout_s", [math.inf, 1e12, 10**400, np.float32(60)])
def test_a_time_out_may_be_endless(daemon, client, timeout_s):
    with daemon.answering(lambda request: [make_reply(request)]) as requests:
        client.stats(timeout_s)
    assert requests[0].expires_ns < 2**63


@pytest.mark.parametrize("timeout_s", [math.nan, None, "3"])
def test_what_is_no_time_out_is_refused(client, timeout_s):
    for call in (client.next_answer, client.pause, client.next_text):
        with pytest.raises(ValueError, match="timeout_s: expected seconds; found"):
            call(timeout_s)


# -- a fork -----------------------------------------------------------------------------------------------------------

FORK = """
import os, sys
from edge_agent.client import Client, FramePusher, NotConnected
client, pusher = Client(sys.argv[1]), FramePusher(f"ipc://{sys.argv[1]}/frames")
client.next_answer(0.0)
client.status(0.0)
calls = {
    "next_answer": lambda: client.next_answer(0.3),
    "actions": lambda: next(client.actions(silence_s=0.5)),
    "next_text": lambda: client.next_text(0.3),
    "status": lambda: client.status(0.3),
    "pause": lambda: client.pause(1),
    "stats": lambda: client.stats(1),
    "ask": lambda: client.ask("What?", 1),
    "vehicle_state": lambda: client.vehicle_state(a=1),
    "push": lambda: pusher.push(b"x", frame_id=1, t_capture_ns=1, format="gray8", width=1, height=1),
}
if os.fork() == 0:
    for name, call in calls.items():
        try:
            call()
        except RuntimeError as error:
            print(name, "made in process" in str(error), flush=True)
    pusher.close()
    client.close()  # does not wait for threads that are not here
    print("closed", flush=True)
    os._exit(0)
os.wait()
client.close()
"""


def test_after_a_fork_every_call_says_so_at_once(tmp_path):
    """multiprocessing forks. The threads of libzmq are not in the new process: nothing would arrive there."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S
    )
    names = ["next_answer", "actions", "next_text", "status", "pause", "stats", "ask", "vehicle_state", "push"]
    assert done.stdout.splitlines() == [*(f"{name} True" for name in names), "closed"], done.stderr


def test_after_a_fork_the_client_and_the_pusher_are_not_used(monkeypatch, client, tmp_path):
    """The same, for the measurement of coverage."""
    with FramePusher(f"ipc://{tmp_path}/frames") as pusher:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(RuntimeError, match="this Client was made in process"):
            client.stats()
        with pytest.raises(RuntimeError, match="this FramePusher was made in process"):
            pusher.push(b"x", frame_id=1, t_capture_ns=1, format="gray8", width=1, height=1)
        client.close()
        pusher.close()
        monkeypatch.undo()


# -- no daemon --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [Client.pause, Client.stats, lambda client: client.next_answer(0.0)])
def test_a_folder_that_cannot_be_trusted_is_an_error_at_once(client, tmp_path, call):
    tmp_path.chmod(0o777)
    with pytest.raises(NotConnected, match="anybody can pose as the daemon"):
        call(client)


@pytest.mark.parametrize("stream", ["actions", "status"])
def test_a_message_of_a_folder_that_is_made_later_is_not_trusted_unseen(daemon, client, tmp_path, clock, stream):
    """The client started first. libzmq connects to whatever is at the path now."""
    read = {"actions": client.next_answer, "status": client.status}[stream]
    publish(daemon, client, 0, clock())
    tmp_path.chmod(0o777)
    with pytest.raises(NotConnected, match="anybody can pose as the daemon"):
        read(0.0)


@pytest.mark.parametrize("change", ["opened", "removed"])
def test_what_arrives_while_the_folder_changes_is_dropped(daemon, client, tmp_path, clock, monkeypatch, change):
    publish(daemon, client, 0, clock())
    socket = client._subscriber("actions")
    checks = iter(["everybody may write to it" if change == "opened" else ""])
    monkeypatch.setattr("edge_agent.client.client.why_unreachable", lambda folder, stream: next(checks))
    if change == "removed":
        client.folder = tmp_path / "removed"
        assert client._receive("actions", clock()) == []
    else:
        with pytest.raises(NotConnected):
            client._receive("actions", clock())
    assert not socket.poll(0)


def test_a_request_is_not_sent_into_a_folder_that_changed_before_it_was_connected(daemon, client, monkeypatch):
    checks = iter(["", "everybody may write to it"])
    monkeypatch.setattr("edge_agent.client.client.why_unreachable", lambda folder, stream: next(checks))
    with daemon.answering(lambda request: []) as requests, pytest.raises(NotConnected, match="everybody"):
        client.pause()
    assert requests == []


def test_a_request_without_a_daemon_does_not_wait_for_the_whole_time_out(client, monkeypatch):
    monkeypatch.setattr("edge_agent.client.client.CONNECT_S", 0.01)
    with pytest.raises(NotConnected, match="nobody answers there, ask was not sent; is edge-agent running"):
        client.ask("What?", timeout_s=10 * HANG_S)


def test_a_daemon_that_is_stopped_is_named(tmp_path, client, monkeypatch):
    """SIGSTOP, or a hang: it is there, and the stop was not sent."""
    monkeypatch.setattr("edge_agent.client.client.CONNECT_S", 0.01)
    with socket.socket(socket.AF_UNIX) as stopped:
        stopped.bind(str(tmp_path / "control"))
        stopped.listen(4)
        with pytest.raises(
            NotConnected, match="edge-agent does not answer, pause was not sent; it is stopped or hangs"
        ):
            client.pause()
