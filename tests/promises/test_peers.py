"""What peers can make the daemon hold: memory of the supervisor and of the camera process while somebody who may open
the folder does his worst, and after he has gone. Each test prints one JSON line with its figures."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_agent.board import health
from edge_agent.wire.streams import STREAMS
from edge_agent.zmtp.frames import GREETING, MORE, pack_message
from tests.harness import rig
from tests.harness.zmtp_peer import RawPeer, command, frame

LIMIT_MIB = 32.0
ATTACK_S = 4.0
N_CONNECTIONS = 2000

pytestmark = pytest.mark.promise


@pytest.fixture
def running(toy_bundle, runtime) -> Iterator[rig.Daemon]:
    config = {"bundle": str(toy_bundle), "camera": {"source": f"zmq:ipc://{runtime}/frames"}}
    with rig.Pusher(f"ipc://{runtime}/frames"), rig.daemon(runtime, config, fake={}) as daemon:
        yield daemon


def numbered(size: int) -> Iterator[bytes]:
    """About 1 MiB of different subscriptions of this size, again and again."""
    numbers = itertools.count()
    while True:
        yield b"".join(frame(b"\x01" + b"%d" % next(numbers) * (size // 8 + 1)) for _ in range(2**20 // (size + 9)))


FLOODS: dict[str, tuple[list[str], Callable[[], Iterator[bytes]]]] = {
    "a message that never ends": (
        [*STREAMS, "frames"], lambda: itertools.repeat(frame(b"x" * 60_000, MORE) * 17)
    ),
    "a message of empty parts": ([*STREAMS, "frames"], lambda: itertools.repeat(frame(b"", MORE) * 100_000)),
    "long subscriptions": (["actions", "status"], lambda: numbered(20_000)),
    "many subscriptions": (["text", "status"], lambda: numbered(200)),
    "the same subscription": (["status"], lambda: itertools.repeat(pack_message(b"\x01S", ) * 100_000)),
    "subscribe and leave": (["status"], lambda: itertools.repeat(pack_message(b"\x01S") * 1 + pack_message(b"\x00S"))),
    "subscriptions as commands": (["status"], lambda: itertools.repeat(command(b"SUBSCRIBE", b"x" * 60) * 10_000)),
    "requests of many parts": (["control"], lambda: itertools.repeat(pack_message(*[b"x" * 60_000] * 2000))),
    "empty requests": (["control"], lambda: itertools.repeat(pack_message(b"") * 100_000)),
    "requests without reading replies": (["control"], lambda: itertools.repeat(pack_message(b"x" * 100) * 9000)),
}  # fmt: skip


def flood(path: Path, kind: bytes, chunks: Iterator[bytes], end_s: float) -> int:
    """Send until end_s, connecting again whenever the daemon ends the connection. How often it did."""
    n_ended = 0
    while time.monotonic() < end_s:
        with contextlib.suppress(OSError), RawPeer(path, kind) as peer:
            peer.socket.settimeout(0.2)
            while time.monotonic() < end_s:
                peer.send(next(chunks))
        n_ended += 1
    return n_ended


@pytest.mark.parametrize("what", FLOODS)
def test_a_flood_costs_little_memory_and_gives_it_back(running, runtime, capsys, what):
    status = running.wait("running")
    pids = {"supervisor": running.process.pid, "camera": status.camera_worker.pid}
    before = {name: health.rss_mib(pid) for name, pid in pids.items()}
    worst = dict.fromkeys(pids, 0.0)
    streams, chunks = FLOODS[what]
    kinds = dict.fromkeys(STREAMS, b"SUB") | {"control": b"DEALER", "frames": b"PUSH"}
    children = []
    for stream in streams:
        if (pid := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                flood(runtime / stream, kinds[stream], chunks(), time.monotonic() + ATTACK_S)
            os._exit(0)
        children.append(pid)
    end_s = time.monotonic() + ATTACK_S
    n_actions = 0
    with running.client() as client:
        while time.monotonic() < end_s:
            n_actions += client.next_answer(0.01) is not None
            for name, pid in pids.items():
                worst[name] = max(worst[name], health.rss_mib(pid) - before[name])
    for pid in children:
        os.waitpid(pid, 0)
    assert running.wait("running").camera_worker.pid == pids["camera"]
    with running.client() as client:
        assert client.next_answer(10.0) is not None
        client.pause()
    after = {name: health.rss_mib(pid) - before[name] for name, pid in pids.items()}
    figures = {"promise": what, "actions": n_actions}
    figures |= {"worst_mib": {name: round(mib, 1) for name, mib in worst.items()}}
    with capsys.disabled():
        print("\n" + json.dumps(figures | {"after_mib": {name: round(mib, 1) for name, mib in after.items()}}))
    assert worst["supervisor"] <= LIMIT_MIB and after["supervisor"] <= LIMIT_MIB / 2
    assert n_actions


@pytest.mark.parametrize("hello", [b"", GREETING], ids=["mute", "greeting"])
def test_thousands_of_connections_cost_little_memory_and_give_it_back(running, runtime, capsys, hello):
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    pid = running.process.pid
    before = health.rss_mib(pid)
    with contextlib.ExitStack() as stack:
        for stream in [*STREAMS, "frames"]:
            for _ in range(N_CONNECTIONS):
                peer = stack.enter_context(socket.socket(socket.AF_UNIX))
                peer.connect(str(runtime / stream))
                with contextlib.suppress(OSError):
                    peer.sendall(hello)
        worst = health.rss_mib(pid) - before
        with running.client() as client:
            assert client.next_answer(10.0) is not None
            client.pause()
    after = health.rss_mib(running.wait("paused").camera_worker.pid and pid) - before
    with capsys.disabled():
        print(
            "\n"
            + json.dumps({"connections": N_CONNECTIONS, "worst_mib": round(worst, 1), "after_mib": round(after, 1)})
        )
    assert worst <= LIMIT_MIB and after <= LIMIT_MIB / 2
