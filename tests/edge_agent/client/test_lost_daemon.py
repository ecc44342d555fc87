"""A daemon that ends while a request waits: the client says so at once, and does not guess what was done."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from edge_agent.client import Client, ConnectionEnded, NotConnected
from edge_agent.client.control_connection import ControlConnection
from edge_agent.wire.control import Request, read_request
from tests.harness.clock import FakeClock
from tests.harness.fake_daemon import HANG_S, make_reply, make_text

CALLS: dict[str, Callable[[Client], object]] = {
    "ask": lambda client: client.ask("What?", HANG_S),
    "ask_stream": lambda client: list(client.ask_stream("What?", HANG_S)),
    "instruct": lambda client: client.instruct("Land.", HANG_S),
    "adapter": lambda client: client.adapter("night", HANG_S),
    "pause": lambda client: client.pause(HANG_S),
    "resume": lambda client: client.resume(HANG_S),
    "vehicle_state": lambda client: client.vehicle_state(altitude_m=1.0),
}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """Its clock stands still: no time-out ever ends a call."""
    with Client(str(tmp_path), FakeClock()) as connected:
        yield connected


def no_reply(_request: Request) -> list[bytes]:
    return []


@contextlib.contextmanager
def ending_daemon(
    folder: Path, answer: Callable[[Request], list[bytes]] = no_reply, n_requests: int = 1
) -> Iterator[None]:
    """A control endpoint that closes after it has read so many requests and sent the answers."""
    context = zmq.Context()
    control = context.socket(zmq.ROUTER)
    control.setsockopt(zmq.RCVTIMEO, round(HANG_S * 1000))
    control.bind(f"ipc://{folder}/control")

    def serve() -> None:
        for _ in range(n_requests):
            sender, payload = control.recv_multipart()
            for reply in answer(read_request(payload)):
                control.send_multipart([sender, reply])
        control.close(linger=1000)  # what was sent leaves before

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        context.term()


def wait_for_the_end(client: Client) -> None:
    """Until the client's libzmq has seen that its one connection has ended: a request would leave before that."""
    (connection,) = client._connections.values()
    while not connection.has_ended:
        time.sleep(0.001)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_ends_with_the_daemon_and_says_what_is_known(client, tmp_path, name):
    with ending_daemon(tmp_path), pytest.raises(ConnectionEnded) as caught:
        CALLS[name](client)
    op = name.removesuffix("_stream")
    assert str(caught.value) == (
        f"{tmp_path}/control: the connection ended after {op} was sent: no reply comes; it is unknown whether it was "
        "carried out"
    )
    assert client._connections == {}
    assert isinstance(caught.value, TimeoutError) and not isinstance(caught.value, NotConnected)


def test_a_process_that_is_killed_ends_the_call(client, tmp_path):
    code = "import sys, zmq; s = zmq.Context().socket(zmq.ROUTER); s.bind(sys.argv[1]); s.recv(); print(flush=True)"
    command = [sys.executable, "-c", f"{code}; input()", f"ipc://{tmp_path}/control"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as daemon:

        def kill_when_the_request_has_arrived() -> None:
            assert daemon.stdout is not None and daemon.stdout.readline()
            daemon.send_signal(signal.SIGKILL)

        thread = threading.Thread(target=kill_when_the_request_has_arrived)
        thread.start()
        while not (tmp_path / "control").exists():
            assert daemon.poll() is None
        with pytest.raises(ConnectionEnded):
            client.ask("What?", HANG_S)
        thread.join()


def test_the_pieces_of_an_answer_that_came_before_the_end_are_given_out(daemon, client, tmp_path):
    """The text stream is that of another daemon: it stays."""
    daemon.sockets["control"].close()
    both_have_arrived = threading.Event()

    def two_pieces(request: Request) -> list[bytes]:
        daemon.wait_for_subscriber("text")
        for seq, text in enumerate(("a ", "pad")):
            daemon.publish("text", make_text(seq, text, request=request.id))
        both_have_arrived.wait(HANG_S)
        return []

    with ending_daemon(tmp_path, two_pieces):
        pieces = client.ask_stream("What?", HANG_S)
        found = [next(pieces)]
        assert client._subscriber("text").poll(round(HANG_S * 1000))
        both_have_arrived.set()
        wait_for_the_end(client)
        found.append(next(pieces))
        with pytest.raises(ConnectionEnded):
            next(pieces)
    assert found == ["a ", "pad"]


@pytest.mark.parametrize("name", ["ask", "ask_stream"])
def test_a_reply_that_came_before_the_end_counts(tmp_path, name):
    for _ in range(20):  # the end follows the reply at once
        with (
            Client(str(tmp_path), FakeClock()) as client,
            ending_daemon(tmp_path, lambda request: [make_reply(request, text="done")]),
        ):
            assert "".join(CALLS[name](client)) == "done"


def test_the_next_request_goes_to_the_next_daemon(client, tmp_path):
    def reply_to_stats(request: Request) -> list[bytes]:
        return [make_reply(request, n=1)] if request.op == "stats" else []

    with ending_daemon(tmp_path, reply_to_stats):
        assert client.stats(HANG_S) == {"n": 1}
    wait_for_the_end(client)
    with ending_daemon(tmp_path, reply_to_stats, n_requests=2):
        assert client.stats(HANG_S) == {"n": 1}
        with pytest.raises(ConnectionEnded):
            client.pause(HANG_S)


def test_without_a_next_daemon_the_next_request_is_not_sent(tmp_path):
    with Client(str(tmp_path)) as client:
        with ending_daemon(tmp_path, lambda request: [make_reply(request, n=1)]):
            assert client.stats(HANG_S) == {"n": 1}
        wait_for_the_end(client)
        (tmp_path / "control").unlink(missing_ok=True)
        with pytest.raises(NotConnected, match="nobody answers there, resume was not sent"):
            client.resume(0.1)


def test_a_request_on_a_connection_that_stands_waits_for_nothing_but_its_reply(tmp_path, monkeypatch):
    waits_ms: list[int] = []
    read_events = ControlConnection._read_events

    def read(connection: ControlConnection, timeout_ms: int) -> None:
        waits_ms.append(timeout_ms)
        read_events(connection, timeout_ms)

    with ending_daemon(tmp_path, lambda request: [make_reply(request)], n_requests=3), Client(str(tmp_path)) as client:
        client.pause(HANG_S)
        monkeypatch.setattr(ControlConnection, "_read_events", read)
        client.resume(HANG_S)
        client.pause(HANG_S)
    assert waits_ms and not any(waits_ms)
