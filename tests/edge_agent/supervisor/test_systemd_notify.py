"""What systemd hears: with a socket that listens as systemd's does."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from edge_agent.supervisor.systemd import Watchdog, notify


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


def heard(manager: socket.socket) -> list[str]:
    """Every datagram that waits."""
    found = []
    while True:
        try:
            found.append(manager.recv(4096).decode())
        except BlockingIOError:
            return found


def watched(monkeypatch, interval_s: float, pid: int | None = None) -> Watchdog:
    monkeypatch.setenv("WATCHDOG_USEC", str(round(interval_s * 1e6)))
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(pid))
    return Watchdog()


# -- messages ---------------------------------------------------------------------------------------------------------


def test_lines_arrive_as_one_datagram(manager):
    notify("READY=1", "STATUS=ministral3 3B")
    notify("STOPPING=1")
    assert heard(manager) == ["READY=1\nSTATUS=ministral3 3B", "STOPPING=1"]


def test_nobody_listening_is_no_error(tmp_path, monkeypatch):
    notify("READY=1")  # no NOTIFY_SOCKET
    for path in ("", str(tmp_path / "nowhere"), f"@edge-agent-nobody-{os.getpid()}", str(tmp_path), "x" * 500):
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        notify("READY=1")


def test_a_manager_that_does_not_read_never_makes_us_wait(manager):
    start_s = time.monotonic()
    for _ in range(2000):
        notify("STATUS=" + "x" * 1000)
    assert time.monotonic() - start_s < 5
    assert 0 < len(heard(manager)) < 2000


# -- the watchdog -----------------------------------------------------------------------------------------------------


def test_the_watchdog_is_fed_when_progress_grew_and_only_then(manager, monkeypatch):
    watchdog = watched(monkeypatch, 0.1)
    watchdog.feed(1)
    assert heard(manager) == ["WATCHDOG=1"]
    until_s = time.monotonic() + 0.3
    while time.monotonic() < until_s:  # three intervals without progress
        watchdog.feed(1)
        time.sleep(0.002)
    assert heard(manager) == []
    watchdog.feed(2)
    assert heard(manager) == ["WATCHDOG=1"]


def test_progress_at_any_rate_feeds_at_most_four_times_an_interval(manager, monkeypatch):
    interval_s = 0.2
    watchdog = watched(monkeypatch, interval_s)
    start_s, progress = time.monotonic(), 0
    while time.monotonic() - start_s < 3 * interval_s:
        progress += 1
        watchdog.feed(progress)
        time.sleep(0.001)
    pings = heard(manager)
    assert set(pings) == {"WATCHDOG=1"} and 7 <= len(pings) <= 13


def test_progress_that_came_too_soon_is_not_lost(manager, monkeypatch):
    watchdog = watched(monkeypatch, 0.2)
    watchdog.feed(1)
    watchdog.feed(2)  # within a quarter of the interval: held back
    assert heard(manager) == ["WATCHDOG=1"]
    time.sleep(0.06)
    watchdog.feed(2)
    assert heard(manager) == ["WATCHDOG=1"]


def test_the_watchdog_of_another_process_is_left_alone(manager, monkeypatch):
    watchdog = watched(monkeypatch, 0.01, pid=os.getppid())
    for progress in range(5):
        watchdog.feed(progress)
        time.sleep(0.01)
    watchdog.allow(60)
    assert heard(manager) == []


def test_our_own_watchdog_is_fed(manager, monkeypatch):
    watched(monkeypatch, 1.0, pid=os.getpid()).feed(1)
    assert heard(manager) == ["WATCHDOG=1"]


def test_without_a_watchdog_nothing_is_said(manager):
    watchdog = Watchdog()
    watchdog.feed(1)
    watchdog.allow(60)
    watchdog.allow(None)
    assert heard(manager) == []


def test_more_time_can_be_asked_for_and_given_back(manager, monkeypatch):
    watchdog = watched(monkeypatch, 5)
    watchdog.allow(120.0)
    watchdog.allow(None)
    assert heard(manager) == ["WATCHDOG_USEC=120000000\nWATCHDOG=1", "WATCHDOG_USEC=5000000\nWATCHDOG=1"]


def test_no_thread_feeds_the_watchdog(manager, monkeypatch):
    """A timer would go on feeding it while the pipeline hangs."""
    before = len(os.listdir("/proc/self/task"))
    watchdog = watched(monkeypatch, 0.1)
    watchdog.feed(1)
    heard(manager)
    time.sleep(0.3)
    assert heard(manager) == [] and len(os.listdir("/proc/self/task")) == before


def test_a_socket_file_that_is_gone_is_no_error(tmp_path, monkeypatch):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(path))
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    notify("READY=1")
    Path(path).unlink()
    notify("READY=1")
