"""An endpoint with real sockets: every peer has a budget, and none of them can end, block or fill the daemon.

How much memory the peers cost is measured in tests/promises/test_peers.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq

from edge_agent.zmtp import endpoint as endpoint_module
from edge_agent.zmtp.endpoint import HANDSHAKE_NS, PEERS, PUB, PULL, ROUTER, Connection, Endpoint, Limits
from edge_agent.zmtp.frames import GREETING, MORE, Message, pack_message, pack_ready
from tests.harness.clock import FakeClock
from tests.harness.zmtp_peer import RawPeer, command, frame, ready

HANG_S = 60.0  # bounds a hang
LIMITS = Limits(max_message_bytes=65_536, read_bytes=16_384, queue_messages=8, max_connections=10)
A = pack_message(b"Aaction")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "endpoint"


@pytest.fixture
def bind(path: Path) -> Iterator[Callable[..., Endpoint]]:
    """bind(type, ...): an endpoint at `path`."""
    with contextlib.ExitStack() as stack:
        yield lambda kind, limits=LIMITS, **more: stack.enter_context(
            contextlib.closing(Endpoint(path, kind, limits, **more))
        )


def serve(endpoint: Endpoint, n_turns: int = 5) -> list[Message]:
    """What has been sent to unix sockets before this call has arrived."""
    return [message for _ in range(n_turns) for _, message in endpoint.serve()]


def serve_until(endpoint: Endpoint, condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        endpoint.serve()


def next_message(endpoint: Endpoint) -> tuple[Connection, Message]:
    end_s = time.monotonic() + HANG_S
    while not (arrived := endpoint.serve()):
        assert time.monotonic() < end_s, "waited in vain"
    return arrived[0]


def n_connections(endpoint: Endpoint) -> int:
    return len(endpoint._connections)


# -- with libzmq ------------------------------------------------------------------------------------------------------

LIBZMQ = [
    (PUB, zmq.SUB),
    (PUB, zmq.XSUB),
    (ROUTER, zmq.DEALER),
    (ROUTER, zmq.REQ),
    (ROUTER, zmq.ROUTER),
    (PULL, zmq.PUSH),
]


@pytest.mark.parametrize(("kind", "peer"), LIBZMQ, ids=lambda kind: str(kind))
def test_every_socket_type_that_may_connect_is_served(bind, path, kind, peer):
    assert {name for name, _ in LIBZMQ} == set(PEERS)
    endpoint = bind(kind)
    with zmq.Context() as context, context.socket(peer) as theirs:
        theirs.setsockopt(zmq.LINGER, 0)
        theirs.setsockopt(zmq.HEARTBEAT_IVL, 5)  # the peer pings us; a busy machine may answer later than that
        theirs.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(1000 * HANG_S))
        theirs.connect(f"ipc://{path}")
        if kind == PUB:
            theirs.send(b"\x01A") if peer == zmq.XSUB else theirs.subscribe(b"A")
            serve_until(endpoint, lambda: endpoint.n_subscribed)
            endpoint.publish(b"Aaction", A)
            endpoint.publish(b"Bother", pack_message(b"Bother"))
            endpoint.publish(b"Alarge", pack_message(b"A" * 50_000))
            serve_until(endpoint, lambda: theirs.poll(1))
            assert theirs.recv() == b"Aaction"
            serve_until(endpoint, lambda: theirs.poll(1))
            assert theirs.recv() == b"A" * 50_000
        elif peer != zmq.ROUTER:
            theirs.send(b"x" * 40_000)
            connection, parts = next_message(endpoint)
            assert parts[-1] == b"x" * 40_000
            if kind == ROUTER:
                endpoint.send(connection, pack_message(*parts[:-1], b"reply"))
                serve_until(endpoint, lambda: theirs.poll(1))
                assert theirs.recv() == b"reply"
        serve_until(endpoint, lambda: n_connections(endpoint) == 1)
    serve_until(endpoint, lambda: not n_connections(endpoint))


def test_a_newer_connection_takes_over_a_routing_id(bind, path):
    """A controller with a fixed id was started again, and its old process hangs."""
    endpoint = bind(ROUTER)
    with RawPeer(path, b"DEALER", b"controller") as old:
        serve(endpoint)
        with RawPeer(path, b"DEALER", b"controller") as new:
            serve(endpoint)
            assert old.is_ended()
            new.send(pack_message(b"pause"))
            connection, parts = next_message(endpoint)
            assert parts == [b"pause"]
            endpoint.send(connection, pack_message(b"paused"))
            assert new.socket.recv(1000).endswith(pack_message(b"paused"))


# -- budgets ----------------------------------------------------------------------------------------------------------

ENDLESS = {
    "parts": frame(b"x" * 1000, MORE) * 100,
    "empty parts": frame(b"", MORE) * 100,
    "one frame": frame(b"x" * 70_000),
    "an announced frame": b"\x02" + (1 << 40).to_bytes(8, "big"),
    "long subscriptions": b"".join(frame(b"\x01" + b"%d" % i * 60) for i in range(50)),
    "many subscriptions": b"".join(frame(b"\x01%d" % i) for i in range(1000)),
    "subscriptions as commands": b"".join(command(b"SUBSCRIBE", b"%d" % i) for i in range(1000)),
    "not zmtp": b"GET / HTTP/1.1\r\n\r\n" * 100,
}


@pytest.mark.parametrize("kind", [PUB, ROUTER, PULL])
@pytest.mark.parametrize("what", ENDLESS)
def test_a_peer_that_exceeds_its_budget_is_ended_and_the_others_are_not(bind, path, kind, what):
    endpoint = bind(kind)
    peer_type = sorted(PEERS[kind])[0]
    with RawPeer(path, peer_type) as honest, RawPeer(path, peer_type) as greedy:
        serve(endpoint)
        assert n_connections(endpoint) == 2
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                greedy.send(ENDLESS[what])
                serve(endpoint)
        if "subscription" not in what or kind == PUB:
            assert n_connections(endpoint) == 1
            assert greedy.is_ended()
        assert not honest.is_ended()
        message = b"\x01A" if kind == PUB else b"hello"
        honest.send(pack_message(message))
        serve(endpoint)
        assert endpoint.n_subscribed >= 1 or kind != PUB


@pytest.mark.parametrize("kind", [PUB, ROUTER, PULL])
def test_connections_are_bounded_and_who_leaks_them_harms_itself(bind, path, kind, monkeypatch):
    endpoint = bind(kind)
    pids = iter([7] + [8] * 2000)
    make = endpoint_module.Connection

    def connection_of_process(*arguments: object) -> object:
        made = make(*arguments)
        made.pid = made.process_group = next(pids)
        return made

    monkeypatch.setattr(endpoint_module, "Connection", connection_of_process)
    with RawPeer(path, sorted(PEERS[kind])[0]) as honest:
        serve(endpoint)
        leaked = []
        for _ in range(2000):
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(str(path))
            leaked.append(peer)
            endpoint.serve()
        serve(endpoint, 40)
        assert n_connections(endpoint) == LIMITS.max_connections
        assert not honest.is_ended()
        for peer in leaked:
            peer.close()
        serve(endpoint, 40)
        assert n_connections(endpoint) == 1


# Peers as (user, process group, process), in the order of their connections. The endpoint takes ten.
HONEST, OTHER = (1, 7, 7), (2, 8, 8)
FLOODS = {
    "processes of one program": [HONEST, *[(1, 9, 100 + i) for i in range(300)]],
    "processes of one program, and a second controller": [
        HONEST, *[(1, 9, 100 + i) for i in range(300)], OTHER, *[(1, 9, 500 + i) for i in range(300)],
    ],
    "process groups": [HONEST, OTHER, *[(1, 100 + i, 100 + i) for i in range(300)]],
    "process groups of another user": [HONEST, *[(3, 100 + i, 100 + i) for i in range(300)], OTHER],
    "one process, in the group of the controller": [HONEST, *[(1, 7, 9)] * 300, OTHER],
    "ended processes": [HONEST, *[(1, 0, 100 + i) for i in range(300)]],
}  # fmt: skip


@pytest.mark.parametrize("what", FLOODS)
def test_a_flood_of_processes_does_not_push_out_the_honest_ones(bind, path, what, monkeypatch):
    endpoint = bind(ROUTER)
    peers, make = iter(FLOODS[what]), endpoint_module.Connection

    def connection_of_peer(*arguments: object) -> object:
        made = make(*arguments)
        made.uid, made.process_group, made.pid = next(peers)
        return made

    monkeypatch.setattr(endpoint_module, "Connection", connection_of_peer)
    honest = {}
    with contextlib.ExitStack() as stack:
        for peer in FLOODS[what]:
            connected = stack.enter_context(socket.socket(socket.AF_UNIX))
            connected.connect(str(path))
            endpoint.serve()
            if peer in (HONEST, OTHER):
                honest[peer] = connected
        open_now = {(found.uid, found.process_group, found.pid) for found in endpoint._connections.values()}
        assert honest.keys() <= open_now and n_connections(endpoint) == LIMITS.max_connections


def test_a_connection_knows_its_process_and_its_group(bind, path):
    endpoint = bind(ROUTER)
    code = f"import socket, os; s = socket.socket(1); s.connect({str(path)!r}); print(flush=True); input()"
    command = [sys.executable, "-c", code]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as child,
        RawPeer(path, b"DEALER"),
    ):
        assert child.stdout is not None and child.stdout.readline()
        serve(endpoint)
        found = {(each.uid, each.process_group, each.pid) for each in endpoint._connections.values()}
        assert found == {(os.getuid(), child.pid, child.pid), (os.getuid(), os.getpgrp(), os.getpid())}
        child.communicate(b"\n")
    assert endpoint_module._process_group(child.pid) == 0 == endpoint_module._process_group(0)


def test_a_peer_that_reads_nothing_has_a_queue_of_bounded_length(bind, path):
    endpoint = bind(PUB, Limits(256, 1024, queue_messages=8, queue_bytes=100_000))
    with RawPeer(path, b"SUB") as stalled:
        stalled.send(pack_message(b"\x01A"))
        serve(endpoint)
        (connection,) = endpoint._connections.values()
        for size in (1000, 60_000):
            for _ in range(2000):
                endpoint.publish(b"A", pack_message(b"A" * size))
            assert len(connection.queue) <= 9 and connection.queue_bytes <= 200_000
        received = b""
        while connection.queue:
            received += stalled.socket.recv(1 << 20)
            endpoint.serve()
        assert connection.queue_bytes == 0
        endpoint.publish(b"A", A)
        while not received.endswith(A):  # what was sent is whole: the last message follows it
            received += stalled.socket.recv(1 << 20)


def test_the_rest_of_a_message_leaves_when_a_full_socket_has_room_for_a_part(bind, path):
    endpoint = bind(PUB)
    with RawPeer(path, b"SUB") as slow:
        slow.send(pack_message(b"\x01A"))
        serve(endpoint)
        (connection,) = endpoint._connections.values()
        sizes = iter([3, 0, 4])  # what send() takes of ten bytes, call by call
        real = connection.socket

        def send(data: memoryview) -> int:
            size = next(sizes, len(data))
            if not size:
                raise BlockingIOError
            return real.send(data[:size])

        connection.socket = SimpleNamespace(fileno=real.fileno, send=send, recv_into=real.recv_into, close=real.close)
        endpoint.send(connection, b"0123456789")
        for _ in range(3):
            endpoint._flush(connection)
        assert connection.queue_bytes == 0 and not connection.queue
        received = slow.socket.recv(1000)
        assert received.endswith(b"0123456789")


def test_a_peer_without_memory_for_it_is_not_taken(bind, path, monkeypatch):
    endpoint = bind(ROUTER)
    real = endpoint._epoll

    def register(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "max_user_watches")

    endpoint._epoll = SimpleNamespace(fileno=real.fileno, poll=real.poll, register=register, close=real.close)
    with RawPeer(path, b"DEALER") as peer:
        serve(endpoint)
        assert n_connections(endpoint) == 0 and peer.is_ended()


def test_what_can_be_read_no_more_is_read_later(bind, path):
    """epoll reported the connection, and another reader was faster."""
    endpoint = bind(ROUTER)
    with RawPeer(path, b"DEALER") as peer:
        serve(endpoint)
        (connection,) = endpoint._connections.values()
        assert endpoint._read(connection) == []
        assert connection.is_open and not peer.is_ended()
        endpoint._drop(connection)
        endpoint._drop(connection)  # two events of one turn end it
        assert not connection.is_open and n_connections(endpoint) == 0


def test_connections_are_accepted_in_portions(bind, path, monkeypatch):
    monkeypatch.setattr(endpoint_module, "MAX_ACCEPTS_PER_TURN", 2)
    endpoint = bind(ROUTER)
    endpoint._accept()
    assert n_connections(endpoint) == 0
    with RawPeer(path, b"DEALER"), RawPeer(path, b"REQ"), RawPeer(path, b"DEALER"):
        endpoint._accept()
        assert n_connections(endpoint) == 2
        endpoint._accept()
        assert n_connections(endpoint) == 3


def test_who_ends_a_subscription_gets_no_more(bind, path):
    endpoint = bind(PUB)
    with RawPeer(path, b"SUB") as peer:
        peer.send(pack_message(b"\x01A"), pack_message(b"\x01B"), pack_message(b"\x00A"), pack_message(b"\x00C"))
        serve(endpoint)
        endpoint.publish(b"Aaction", A)
        endpoint.publish(b"B", pack_message(b"B"))
        assert peer.socket.recv(1000).endswith(pack_message(b"B")) and endpoint.n_subscribed == 2
        assert [sorted(found.topics) for found in endpoint._connections.values()] == [[b"B"]]


def test_an_endpoint_is_readable_when_it_has_something_to_do(bind, path):
    endpoint = bind(ROUTER)
    assert select.select([endpoint], [], [], 0)[0] == []
    with RawPeer(path, b"DEALER"):
        assert select.select([endpoint], [], [], HANG_S)[0] == [endpoint]


def test_a_peer_that_leaves_with_a_full_queue_is_forgotten(bind, path):
    endpoint = bind(PUB)
    with RawPeer(path, b"SUB") as stalled:
        stalled.send(pack_message(b"\x01A"))
        serve(endpoint)
        (connection,) = endpoint._connections.values()
        while not connection.queue:
            endpoint.publish(b"A", pack_message(b"A" * 60_000))
        endpoint._flush(connection)  # nothing can leave
        assert connection.queue
    endpoint._flush(connection)
    assert n_connections(endpoint) == 0


def test_requests_are_taken_in_portions(bind, path):
    endpoint = bind(ROUTER)
    with RawPeer(path, b"DEALER") as flood:
        flood.send(pack_message(b"") * 50_000)  # two bytes each
        portions = [len(endpoint.serve()) for _ in range(20)]
    assert max(portions) <= LIMITS.read_bytes // 2 and sum(portions) == 50_000


def test_many_floods_are_taken_in_portions_too(bind, path):
    endpoint = bind(ROUTER)
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(RawPeer(path, b"DEALER")).send(pack_message(b"x" * 10) * 1000)
        portions = [len(endpoint.serve()) for _ in range(40)]
    assert max(portions) <= 64 + LIMITS.read_bytes // 12 and sum(portions) == 8000


def test_a_connection_without_a_handshake_ends_after_a_while(bind, path):
    clock = FakeClock()
    endpoint = bind(ROUTER, clock=clock)
    with socket.socket(socket.AF_UNIX) as mute, socket.socket(socket.AF_UNIX) as slow, RawPeer(path, b"REQ") as ready_:
        mute.connect(str(path))
        slow.connect(str(path))
        slow.sendall(GREETING)
        serve(endpoint)
        assert endpoint.check() == "" and n_connections(endpoint) == 3
        clock.now_ns += HANDSHAKE_NS + 1
        assert endpoint.check() == "" and n_connections(endpoint) == 1
        assert not ready_.is_ended()


# -- a system without resources ---------------------------------------------------------------------------------------

NO_RESOURCES = [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPERM]


@pytest.mark.parametrize("number", NO_RESOURCES, ids=errno.errorcode.get)
def test_accept_without_resources_is_tried_again_and_does_not_spin(bind, path, number):
    endpoint = bind(ROUTER)
    real = endpoint._listener.socket

    def accept() -> None:
        raise OSError(number, os.strerror(number))

    with RawPeer(path, b"DEALER") as peer:
        endpoint._listener.socket = SimpleNamespace(fileno=real.fileno, accept=accept)
        endpoint.serve()
        assert endpoint._epoll.poll(0) == [], "the loop would spin"
        endpoint._listener.socket = real
        assert endpoint.check() == ""
        peer.send(pack_message(b"hello"))
        assert serve(endpoint) == [[b"hello"]]


@pytest.mark.parametrize("number", NO_RESOURCES, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["recv_into", "send"])
def test_a_connection_that_fails_ends_alone(bind, path, call, number):
    endpoint = bind(ROUTER)
    with RawPeer(path, b"DEALER") as peer, RawPeer(path, b"DEALER") as other:
        serve(endpoint)
        connection = next(iter(endpoint._connections.values()))
        real = connection.socket

        def fail(*_arguments: object) -> int:
            raise OSError(number, os.strerror(number))

        works = {name: getattr(real, name) for name in ("fileno", "close", "recv_into", "send")}
        connection.socket = SimpleNamespace(**works | {call: fail})
        peer.send(pack_message(b"x"))
        serve(endpoint)
        endpoint.send(connection, A)
        assert n_connections(endpoint) == 1
        other.send(pack_message(b"hello"))
        assert serve(endpoint) == [[b"hello"]]


# -- the path ---------------------------------------------------------------------------------------------------------


def test_a_path_that_was_removed_is_bound_again_and_connections_stay(path):
    endpoint = Endpoint(path, ROUTER, LIMITS, 0o660)
    with contextlib.closing(endpoint), RawPeer(path, b"DEALER") as old:
        serve(endpoint)
        path.unlink()
        assert endpoint.check() == "" and path.is_socket()
        with RawPeer(path, b"DEALER") as new:
            old.send(pack_message(b"old"))
            new.send(pack_message(b"new"))
            assert sorted(serve(endpoint)) == [[b"new"], [b"old"]]
    assert not path.exists()


@pytest.mark.parametrize("other", ["file", "living socket", "no folder"])
def test_a_path_that_is_lost_is_named_and_not_touched(tmp_path, other):
    folder = tmp_path / "run"
    folder.mkdir()
    with (
        contextlib.closing(Endpoint(folder / "endpoint", PUB, LIMITS)) as endpoint,
        socket.socket(socket.AF_UNIX) as owner,
    ):
        (folder / "endpoint").unlink()
        if other == "file":
            (folder / "endpoint").write_text("precious")
        elif other == "living socket":
            owner.bind(str(folder / "endpoint"))
            owner.listen()
        else:
            folder.rmdir()
        reason = endpoint.check()
        assert str(folder / "endpoint") in reason and "cannot be bound" in reason
    assert (folder / "endpoint").exists() == (other != "no folder")


def test_ready_is_sent_after_the_greeting(bind, path):
    endpoint = bind(PULL)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
        endpoint.serve()
        assert peer.recv(1000) == GREETING
        peer.sendall(GREETING)
        endpoint.serve()
        assert peer.recv(1000) == pack_ready(b"PULL")
        peer.sendall(ready(b"PUSH") + command(b"PING", b"\0\0ttl"))
        endpoint.serve()
        assert peer.recv(1000) == b"\x04\x08\x04PONGttl"
