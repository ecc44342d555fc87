"""Starting and losing a child process: with a real one, a few lines of Python."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time

import pytest

from edge_agent.ipc.frame_slot import Slot
from edge_agent.ipc.worker import Worker
from tests.harness import ROOT, rig

ECHO = """
from edge_agent.ipc import worker
slot, events, first = worker.attach_to_supervisor()
events.send(b"first " + first)
while message := events.recv(worker.MAX_EVENT_BYTES):
    events.send(b"again " + message)
time.sleep(60)
"""


@pytest.fixture
def echo(tmp_path, monkeypatch):
    (tmp_path / "echo_worker.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    slot = Slot.create()
    worker = Worker("echo_worker", slot, b"hello")
    yield worker
    if worker.exit_status is None:
        worker.kill()
    slot.close()


def wait_for(worker: Worker, n: int, seconds: float = 10.0) -> list[bytes]:
    found, until_s = [], time.monotonic() + seconds
    while len(found) < n and time.monotonic() < until_s:
        found += worker.receive()
        time.sleep(0.01)
    return found


def test_messages_keep_their_bounds(echo):
    assert wait_for(echo, 1) == [b"first hello"]
    for i in range(50):
        assert echo.send(b"%d" % i)
    assert wait_for(echo, 50) == [b"again %d" % i for i in range(50)]
    assert echo.receive() == []


def test_kill_works_on_a_stopped_child(echo):
    wait_for(echo, 1)
    echo.process.send_signal(signal.SIGSTOP)
    echo.kill()
    assert echo.process.wait(30) == echo.exit_status == -signal.SIGKILL


def test_kill_never_waits_for_the_child(echo, monkeypatch):
    """As for a child inside a driver call, which stays in the kernel: here SIGKILL does not reach the child."""

    def wait_for_ever(timeout: float | None = None) -> int:
        raise AssertionError("kill() waits for the child")

    wait_for(echo, 1)
    with monkeypatch.context() as patched:
        patched.setattr(echo.process, "kill", lambda: None)
        patched.setattr(echo.process, "wait", wait_for_ever)
        echo.kill()
        assert echo.socket.fileno() == -1
    echo.process.wait(30)


def test_a_child_that_takes_nothing_never_makes_us_wait(echo):
    wait_for(echo, 1)
    echo.process.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    while echo.send(b"x" * 60_000):
        pass
    assert time.monotonic() - start < 2


def test_closing_the_socket_ends_a_child_that_waits_elsewhere(echo):
    wait_for(echo, 1)
    echo.socket.close()
    assert echo.process.wait(3) == 0


def test_the_child_dies_with_its_parent(tmp_path):
    (tmp_path / "echo_worker.py").write_text(ECHO)
    parent = textwrap.dedent("""
        import time
        from edge_agent.ipc.frame_slot import Slot
        from edge_agent.ipc.worker import Worker
        worker = Worker("echo_worker", Slot.create(), b"hello")
        while not worker.receive():
            time.sleep(0.01)
        print(worker.process.pid, flush=True)
        time.sleep(60)
    """)
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"}
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, env=env) as process:
        pid = int(process.stdout.readline())
        assert rig.alive(pid)
        process.kill()
        until_s = time.monotonic() + 2
        while rig.alive(pid) and time.monotonic() < until_s:
            time.sleep(0.01)
    assert not rig.alive(pid)
