"""A client after a fork, a suspend, an acknowledged stop, and where no daemon can be reached."""

from __future__ import annotations

import decimal
import enum
import fractions
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from edge_agent.client import Client, FramePusher, NotConnected
from edge_agent.client.client import plain_value
from edge_agent.suspend import MAX_GAIN_NS, SuspendDetector
from edge_agent.wire.control import Request
from tests.harness import ROOT
from tests.harness.clock import FakeClock
from tests.harness.fake_daemon import HANG_S, FakeDaemon, make_action, make_reply, make_text


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def boottime(clock: FakeClock) -> FakeClock:
    return FakeClock(clock.now_ns + 7_000_000_000)  # the machine has slept for 7 s before


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as opened:
        yield opened


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
    def interrupted(_request_id: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "_reply_to", interrupted)
    with daemon.answering(lambda request: [make_reply(request)] if request.op == "ask" else []) as requests:
        with pytest.raises(KeyboardInterrupt):
            client.ask("What?", HANG_S)
        wait_for_cancel(requests)


def test_a_daemon_that_is_gone_cannot_be_told(daemon, client, monkeypatch):
    class FullSocket:
        def send(self, payload, flags):
            raise zmq.Again

        def close(self, linger):
            pass

    with pytest.raises(KeyboardInterrupt), client._waiting_for("ask", "id"):
        client._sockets["control"] = FullSocket()
        raise KeyboardInterrupt


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


def test_a_request_without_a_daemon_does_not_wait_for_the_whole_time_out(client, monkeypatch):
    monkeypatch.setattr("edge_agent.client.client.CONNECT_S", 0.01)
    with pytest.raises(NotConnected, match="nobody answers there, ask was not sent; is edge-agent running"):
        client.ask("What?", timeout_s=10 * HANG_S)


# -- values of flight programs ----------------------------------------------------------------------------------------


class Mode(enum.Enum):
    GUIDED = "GUIDED"


class Number(enum.IntEnum):
    THREE = 3


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (None, None),
        (True, True),
        ("x", "x"),
        (3, 3),
        (2**70, float(2**70)),
        (np.float32(0.5), 0.5),
        (np.int16(-3), -3),
        (np.bool_(True), True),
        (np.array([[2.0]]), 2.0),
        (decimal.Decimal("1.25"), 1.25),
        (fractions.Fraction(1, 4), 0.25),
        (Mode.GUIDED, "GUIDED"),
        (Number.THREE, 3),
    ],
)
def test_a_value_of_any_numeric_type_is_sent(value, sent):
    plain = plain_value(value)
    assert plain == sent and type(plain) is type(sent)


@pytest.mark.parametrize("value", [[1], {"a": 1}, object(), b"x", 10**400, np.zeros(2), 1j])
def test_what_is_no_value_is_named_and_the_others_are_sent(daemon, client, value):
    with daemon.answering(lambda request: [make_reply(request, refused={"mode": "why"})]) as requests:
        refused = client.vehicle_state(altitude_m=3.5, heading=value, mode="?")
    assert set(refused) == {"heading", "mode"} and refused["mode"] == "why"
    assert requests[0].values == {"altitude_m": 3.5, "mode": "?"}


def test_not_a_number_is_sent_as_it_is_and_the_daemon_takes_it_for_unknown(daemon, client):
    with daemon.answering(lambda request: [make_reply(request)]) as requests:
        assert client.vehicle_state(battery_percent=float("nan"), altitude_m=np.float64("inf")) == {}
    assert math.isnan(requests[0].values["battery_percent"]) and math.isinf(requests[0].values["altitude_m"])
