"""What systemd gets, with a socket in place of systemd's and a fake clock."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from edge_agent import systemd
from edge_agent.ipc.events import ModelReady
from edge_agent.systemd import Watchdog, notify
from edge_agent.wire.messages import StageTimes
from tests.harness.clock import FakeClock
from tests.harness.in_process import InProcess


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path, monkeypatch):
    """The other end of $NOTIFY_SOCKET."""
    path = f"@edge-agent-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(path.replace("@", "\0", 1))
        listening.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        yield listening


@pytest.fixture(autouse=True)
def no_service_manager(monkeypatch):
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    systemd._unsent.clear()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def watchdog_of(monkeypatch, clock):
    """watchdog_of(interval in seconds, process id of WATCHDOG_PID)"""

    def make(interval_s: float, pid: int | None = None) -> Watchdog:
        monkeypatch.setenv("WATCHDOG_USEC", str(round(interval_s * 1e6)))
        if pid is not None:
            monkeypatch.setenv("WATCHDOG_PID", str(pid))
        return Watchdog(clock)

    return make


def received(manager: socket.socket) -> list[str]:
    """Every datagram that has arrived."""
    datagrams = []
    while True:
        try:
            datagrams.append(manager.recv(4096).decode())
        except BlockingIOError:
            return datagrams


# -- messages ---------------------------------------------------------------------------------------------------------


def test_a_busy_manager_gets_ready_with_the_next_message(manager, watchdog_of):
    """The kernel queues a few datagrams; a sender that must not wait cannot send more."""
    watchdog = watchdog_of(0.4)
    for n in range(1000):
        notify(f"STATUS={n}")
    notify("STATUS=last", "READY=1")
    watchdog.feed(1)
    lines = "\n".join(received(manager)).split("\n")
    assert "READY=1" not in lines and "WATCHDOG=1" not in lines and "STATUS=999" not in lines
    watchdog.feed(2)
    assert received(manager) == [], "the time of a feed has not come"
    notify("STOPPING=1")
    (late,) = received(manager)
    assert late.split("\n")[-3:] == ["STATUS=last", "READY=1", "STOPPING=1"] and "WATCHDOG=1" not in late
    notify("STATUS=new")
    assert received(manager) == ["STATUS=new"]


def test_lines_arrive_as_one_datagram(manager):
    notify("READY=1", "STATUS=ministral3 3B")
    notify("STOPPING=1")
    assert received(manager) == ["READY=1\nSTATUS=ministral3 3B", "STOPPING=1"]


def test_a_manager_that_does_not_listen_is_not_an_error(tmp_path, monkeypatch):
    notify("READY=1")  # no NOTIFY_SOCKET
    fds = set(os.listdir("/proc/self/fd"))
    for path in ("", str(tmp_path / "nowhere"), f"@edge-agent-nobody-{os.getpid()}", str(tmp_path), "x" * 500):
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        notify("READY=1")
    assert set(os.listdir("/proc/self/fd")) == fds, "a socket was left open"


def test_a_socket_file_without_a_manager_is_not_an_error(tmp_path, monkeypatch):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(path))
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    notify("READY=1")
    Path(path).unlink()
    notify("READY=1")
    assert not path.exists()


def test_nothing_waits_for_a_manager_that_does_not_read(manager):
    for _ in range(2000):
        notify("STATUS=" + "x" * 1000)
    assert 0 < len(received(manager)) < 2000


# -- the watchdog -----------------------------------------------------------------------------------------------------


def test_it_is_fed_when_the_count_of_work_has_grown_and_only_then(manager, watchdog_of, clock):
    watchdog = watchdog_of(4.0)
    watchdog.feed(1)
    assert received(manager) == ["WATCHDOG=1"]
    for _ in range(100):  # 25 intervals without progress
        clock.advance(1.0)
        watchdog.feed(1)
    assert received(manager) == []
    watchdog.feed(2)
    assert received(manager) == ["WATCHDOG=1"]


def test_it_is_fed_at_most_four_times_an_interval(manager, watchdog_of, clock):
    watchdog = watchdog_of(4.0)
    n_fed = 0
    for count in range(4000):  # 10 intervals, with progress every 10 ms
        watchdog.feed(count)
        n_fed += len(received(manager))
        clock.advance(0.01)
    assert n_fed == 40


def test_progress_that_came_too_soon_is_fed_later(manager, watchdog_of, clock):
    watchdog = watchdog_of(4.0)
    watchdog.feed(1)
    clock.advance(1.0)
    watchdog.feed(2)
    assert received(manager) == ["WATCHDOG=1"]
    clock.advance(0.1)
    watchdog.feed(2)
    assert received(manager) == ["WATCHDOG=1"]


def test_the_watchdog_of_another_process_is_left_alone(manager, watchdog_of):
    watchdog = watchdog_of(1.0, pid=os.getppid())
    watchdog.feed(1)
    watchdog.set_interval_above(60)
    assert received(manager) == [] and watchdog.interval_us == 0


def test_our_own_watchdog_is_fed(manager, watchdog_of):
    watchdog_of(1.0, pid=os.getpid()).feed(1)
    assert received(manager) == ["WATCHDOG=1"]


def test_without_a_watchdog_nothing_is_sent(manager, clock):
    watchdog = Watchdog(clock)
    watchdog.feed(1)
    watchdog.set_interval_above(60)
    assert received(manager) == []


def test_the_interval_is_longer_than_a_stall_and_never_shorter_than_in_the_unit(manager, watchdog_of):
    watchdog = watchdog_of(15.0)
    watchdog.set_interval_above(120.0)
    watchdog.set_interval_above(2.0)
    assert received(manager) == ["WATCHDOG_USEC=125000000\nWATCHDOG=1", "WATCHDOG_USEC=15000000\nWATCHDOG=1"]


def test_no_thread_feeds_the_watchdog(manager, watchdog_of):
    """A timer would go on feeding it while the pipeline hangs."""
    before = len(os.listdir("/proc/self/task"))
    watchdog_of(0.1).feed(1)
    assert len(os.listdir("/proc/self/task")) == before


def test_the_interval_after_a_slow_warm_up_is_that_of_the_frames(manager, monkeypatch):
    """One slow frame at the start, and a supervisor that hangs later would be noticed after three minutes."""
    monkeypatch.setenv("WATCHDOG_USEC", "15000000")
    with InProcess() as running:
        running.open_camera()
        running.model.emit(ModelReady(vision="fake", load_s=1.0, warmup_ms=60_000.0))
        running.turn()
        running.apply_instruction()
        assert any("WATCHDOG_USEC=185000000" in sent for sent in received(manager))
        running.answer(stages_ms=StageTimes(queue=9e9, encode=100.0, prefill=50.0, decode=50.0, check=0.0))
        assert any("WATCHDOG_USEC=15000000" in sent for sent in received(manager))
        running.answer(stages_ms=StageTimes(queue=0.0, encode=1.0, prefill=1.0, decode=1.0, check=0.0))
        assert not any("WATCHDOG_USEC" in sent for sent in received(manager)), "the limit has not changed"
