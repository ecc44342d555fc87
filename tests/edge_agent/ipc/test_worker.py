"""Starting and killing a child process: with a real one, a few lines of Python."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.ipc.frame_slot import Slot
from edge_agent.ipc.worker import MAX_EVENTS_AT_ONCE, Worker
from tests.harness import ROOT, rig

ECHO = """
import time
from edge_agent.ipc import worker
slot, events, first, trace = worker.attach_to_supervisor()
events.send(b"first " + first)
while message := events.recv(worker.MAX_EVENT_BYTES):
    events.send(b"again " + message)
time.sleep(600)
"""


TELL = """
import os
import time
from edge_agent.ipc import worker
attached = worker.attach_to_supervisor()
attached.slot.write(2, 2)
attached.slot.publish(5, 1, "driver")
attached.events.send(attached.first)
attached.events.send(str(attached.trace).encode())
attached.events.send(os.environ["GGML_NO_BACKTRACE"].encode())
time.sleep(600)
"""


@contextlib.contextmanager
def started(module: str, code: str, folder: Path, monkeypatch, flags: tuple[str, ...] = ()) -> Iterator[Worker]:
    """A child process that runs `code`; it is gone at the end."""
    (folder / f"{module}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    with contextlib.closing(Slot.create()) as slot:
        worker = Worker(module, slot, b"hello", flags)
        worker.slot = slot
        try:
            yield worker
        finally:
            worker.kill()
            worker.process.wait(60)


@pytest.fixture
def echo(tmp_path, monkeypatch):
    with started("echo_worker", ECHO, tmp_path, monkeypatch) as worker:
        yield worker


def wait_for(worker: Worker, n: int, seconds: float = 60.0) -> list[bytes]:
    """The next n messages; the time-out only bounds a hang."""
    messages: list[bytes] = []
    until_s = time.monotonic() + seconds
    while len(messages) < n and time.monotonic() < until_s:
        messages += worker.receive()
        time.sleep(0.01)
    assert len(messages) >= n, f"got {messages}; the process: {worker.exit_status}"
    return messages


def test_each_message_arrives_as_it_was_sent(echo):
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


def test_a_child_that_takes_nothing_is_reported_and_nothing_waits(echo):
    wait_for(echo, 1)
    echo.process.send_signal(signal.SIGSTOP)
    n_sent = 0
    while echo.send(b"x" * 60_000):
        n_sent += 1
    assert 0 < n_sent < 1000, "the queue of the socket is bounded"


def test_closing_the_socket_ends_a_child_whose_main_thread_hangs(tmp_path, monkeypatch):
    with started("tell_worker", TELL, tmp_path, monkeypatch) as worker:  # sleeps after two messages
        wait_for(worker, 2)
        worker.socket.close()
        assert worker.process.wait(60) == 0


def test_the_child_dies_with_its_parent(tmp_path):
    (tmp_path / "echo_worker.py").write_text(ECHO)
    parent = textwrap.dedent("""
        import time
        from edge_agent.ipc.frame_slot import Slot
        from edge_agent.ipc.worker import MAX_EVENTS_AT_ONCE, Worker
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
        rig.wait_until_gone(pid)


def test_the_end_of_the_child_closes_the_socket(echo):
    wait_for(echo, 1)
    assert not echo.hung_up
    echo.process.send_signal(signal.SIGKILL)
    echo.process.wait(60)
    assert echo.receive() == [] and echo.hung_up and not echo.send(b"hello")
    assert echo.exit_status == -signal.SIGKILL


def test_a_child_that_has_left_messages_unread_hangs_up_with_an_error(echo):
    """The kernel then resets the connection; what the child had sent still arrives."""
    wait_for(echo, 1)
    echo.process.send_signal(signal.SIGSTOP)
    assert echo.send(b"never read")
    echo.process.send_signal(signal.SIGKILL)
    echo.process.wait(60)
    assert echo.receive() == [] and echo.hung_up


@pytest.mark.parametrize("flags", [(), ("--trace",)])
def test_a_child_gets_the_slot_the_first_message_and_its_flags(tmp_path, monkeypatch, flags):
    with started("tell_worker", TELL, tmp_path, monkeypatch, flags) as worker:
        assert wait_for(worker, 3) == [b"hello", b"True" if flags else b"False", b"1"]
        assert worker.pid == worker.process.pid and worker.slot.peek(0).frame_id == 5


def test_a_child_that_floods_is_read_in_parts(tmp_path, monkeypatch):
    (tmp_path / "flooding_worker.py").write_text(
        "from edge_agent.ipc.worker import MAX_EVENTS_AT_ONCE, attach_to_supervisor\n"
        "attached = attach_to_supervisor()\n"
        "while True: attached.events.send(b'x')\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    slot = Slot.create()
    worker = Worker("flooding_worker", slot, b"hello")
    try:
        end_s = time.monotonic() + 60
        while not (messages := worker.receive()):
            assert time.monotonic() < end_s
        for _ in range(50):
            messages = worker.receive()
            assert len(messages) <= MAX_EVENTS_AT_ONCE
        assert not worker.hung_up
    finally:
        worker.kill()
        worker.process.wait()
        slot.close()


WRITER = """
import os, sys
from edge_agent.ipc import worker
attached = worker.attach_to_supervisor()
for _ in range(40_000):
    try:
        os.write(2, b"Corrupt JPEG data: 7 extraneous bytes\\n")  # as libjpeg does
    except OSError:
        pass
attached.events.send(b"not held up")
attached.events.recv(1)
raise ImportError("libcudnn.so.9: cannot open shared object file")
"""


def test_a_child_whose_stderr_nobody_reads_is_not_held_up(tmp_path, monkeypatch):
    with started("writing_worker", WRITER, tmp_path, monkeypatch) as worker:
        assert wait_for(worker, 1) == [b"not held up"]
        first = worker.read_stderr()
        assert first.startswith(b"Corrupt JPEG data") and len(first) <= 64 * 1024
        while worker.read_stderr():
            pass
        worker.send(b"x")
        worker.process.wait(60)
        assert worker.read_stderr().endswith(b"ImportError: libcudnn.so.9: cannot open shared object file\n")
        assert worker.read_stderr() == b""


def test_without_memory_the_kernel_takes_a_child_before_the_supervisor(echo):
    wait_for(echo, 1)
    ours, theirs = (int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in ("self", echo.pid))
    assert theirs >= ours + 300


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM, errno.EMSGSIZE, errno.EAGAIN, errno.EPIPE])
def test_a_socket_without_resources_is_no_end_of_the_supervisor(echo, monkeypatch, number):
    wait_for(echo, 1)

    def fail(*_arguments: object) -> bytes:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(socket.socket, "send", fail)
        patched.setattr(socket.socket, "recv", fail)
        assert not echo.send(b"x") and echo.receive() == []
        assert echo.hung_up == (number == errno.EPIPE)
    assert echo.send(b"y") and wait_for(echo, 1) == [b"again y"]


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.EAGAIN, errno.EMSGSIZE])
def test_a_child_that_cannot_get_its_configuration_is_ended(monkeypatch, number):
    """A child killed at its birth is another matter: its socket is closed, and its exit status is read."""
    killed = []

    def fail(*_arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket.socket, "send", fail)
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: killed.append(process))
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.closing(Slot.create()) as slot, pytest.raises(OSError, match=re.escape(os.strerror(number))):
        Worker("no_such_module", slot, b"hello")
    assert len(killed) == 1 and len(os.listdir("/proc/self/fd")) == before
    killed[0].wait(60)


def test_a_child_that_is_dead_at_its_birth_has_an_exit_status(monkeypatch):
    """The first message meets a closed socket."""
    send = socket.socket.send

    def send_to_the_dead(sender: socket.socket, message: bytes) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(socket.socket, "send", send_to_the_dead)
    with contextlib.closing(Slot.create()) as slot:
        worker = Worker("no_such_module", slot, b"hello")
    monkeypatch.setattr(socket.socket, "send", send)
    worker.process.wait(60)
    assert worker.exit_status == 1 and b"no_such_module" in worker.read_stderr()
    worker.kill()


@pytest.mark.parametrize("what", ["socketpair", "pipe", "process"])
def test_a_child_that_cannot_be_started_leaves_nothing_open(monkeypatch, what):
    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    names = {"socketpair": "socket.socketpair", "pipe": "os.pipe2", "process": "subprocess.Popen"}
    with contextlib.closing(Slot.create()) as slot:
        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(f"edge_agent.ipc.worker.{names[what]}", fail)
        with pytest.raises(OSError, match="Too many open files"):
            Worker("anything", slot, b"hello")
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_program_that_cannot_be_started_leaves_no_socket(monkeypatch):
    monkeypatch.setattr("edge_agent.ipc.worker.sys.executable", "/no/such/python")
    slot = Slot.create()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No such file"):
        Worker("anything", slot, b"hello")
    assert len(os.listdir("/proc/self/fd")) == before
    slot.close()
