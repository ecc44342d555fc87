"""A system without descriptors, memory, processes or disk: the loop goes on, and the reason is published.

Every call of the loop that can fail is made to fail, with every error that it can have. What costs a child process or a
connection is in tests/edge_agent/ipc/test_worker.py and tests/edge_agent/zmtp/test_endpoint.py.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import select
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from edge_agent.ipc.worker import Worker
from edge_agent.supervisor import process
from edge_agent.supervisor.publisher import Publisher
from edge_agent.supervisor.trace import Trace
from edge_agent.zmtp.frames import GREETING
from tests.harness.in_process import InProcess
from tests.harness.zmtp_peer import ready

ERRORS = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EIO, errno.EACCES, errno.EPIPE]


@pytest.fixture
def running() -> Iterator[InProcess]:
    with InProcess() as supervised:
        supervised.make_ready()
        yield supervised


def go_on(running: InProcess) -> None:
    """Turns with everything in them: a status, a lost process, its successor, a request, a second of time."""
    for op in ("stats", "pause", "resume"):
        running.publisher.request(op)
    for _ in range(3):
        running.turn(0.3)
    running.end_model_process()
    running.camera.exit_status = 1
    for _ in range(8):
        running.turn(1.0)
    assert running.publisher.stream("status")[-1].state == "fault"
    assert [reply.ok for reply in running.publisher.replies] == [True] * 3


def failing(number: int) -> Callable[..., None]:
    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


CALLS = {
    "open": (io, "open"),
    "descriptor": (os, "open"),
    "folder": (os, "scandir"),
    "log": (os, "write"),
    "log is writable": (select, "select"),
    "notify": (socket.socket, "sendto"),
    "bytes of a child": (os, "read"),
}


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", CALLS)
def test_the_loop_goes_on_whatever_fails(running, monkeypatch, call, number):
    monkeypatch.setenv("NOTIFY_SOCKET", "/none")
    with monkeypatch.context() as patched:
        patched.setattr(*CALLS[call], failing(number))
        go_on(running)


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_a_poll_that_fails_is_a_short_sleep(running, monkeypatch, number):
    slept = []
    monkeypatch.setattr(process.time, "sleep", slept.append)
    monkeypatch.setattr(process.select, "poll", lambda: SimpleNamespace(register=lambda *_: None, poll=failing(number)))
    go_on(running)
    monkeypatch.undo()
    assert set(slept) == {0.005}


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_processes_that_cannot_be_started_are_tried_again(running, number):
    start_worker = running.supervisor.model._launch
    for worker in (running.supervisor.model, running.supervisor.camera):
        worker._launch = failing(number)
    running.end_model_process()
    running.turn(6.0)
    assert running.state == ("fault", f"model: cannot be started: {os.strerror(number)}")
    running.supervisor.model._launch = start_worker
    running.turn(6.0)
    running.load_model()
    assert running.state[0] != "fault"


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_a_timeline_that_cannot_be_written_ends_and_the_daemon_does_not(tmp_path, number, capfd):
    trace = Trace(str(tmp_path / "trace.json"))
    trace._file.close()
    trace._file = SimpleNamespace(write=failing(number), close=failing(number))
    trace.span("resize", "frame-encoder", 0, 1)
    trace.span("resize", "frame-encoder", 0, 1)
    trace.close()
    assert not trace.is_on and capfd.readouterr().err.count("the timeline ends here") == 1


def test_without_any_descriptor_the_daemon_goes_on_and_recovers(running, tmp_path):
    """The limit of the kernel itself, real endpoints and a real start of a process."""
    publisher = Publisher(tmp_path / "run", running.clock)
    running.publisher.lost_endpoint, running.publisher.serve = publisher.lost_endpoint, publisher.serve
    fake, real = running.supervisor.model._launch, lambda: Worker("edge_agent.model", running.supervisor.slot, b"")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.closing(publisher), contextlib.ExitStack() as taken:
        running.supervisor.model._launch = real
        try:
            peer = taken.enter_context(socket.socket(socket.AF_UNIX))
            with contextlib.suppress(OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
                while True:
                    taken.enter_context(contextlib.closing(os.fdopen(os.dup(0), closefd=True)))
            peer.connect(str(tmp_path / "run" / "control"))
            peer.sendall(GREETING + ready(b"DEALER"))
            running.end_model_process()
            for _ in range(4):
                running.turn(2.0)
            assert running.state == ("fault", "model: cannot be started: Too many open files")
            assert running.publisher.stream("status")[-1].temperature_c is None
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        running.supervisor.model._launch = fake
        running.turn(6.0)
        running.load_model()
        assert running.state[0] != "fault" and len(publisher.endpoints["control"]._connections) == 1


def test_descriptors_are_raised_to_what_is_allowed(monkeypatch):
    limits = {"now": (1024, 100_000)}
    monkeypatch.setattr(process.resource, "getrlimit", lambda _what: limits["now"])
    monkeypatch.setattr(process.resource, "setrlimit", lambda _what, new: limits.update(now=new))
    process.raise_descriptor_limit()
    assert limits["now"] == (4096, 100_000)
    for unchanged in [(4096, 100_000), (65_536, 65_536)]:
        limits["now"] = unchanged
        process.raise_descriptor_limit()
        assert limits["now"] == unchanged
    limits["now"] = (256, 1024)
    process.raise_descriptor_limit()
    assert limits["now"] == (1024, 1024)
