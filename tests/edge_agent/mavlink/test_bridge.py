"""The bridge with a real client, real sockets and a fake daemon; and as a program of its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from edge_agent.client import Client
from edge_agent.mavlink.autopilot import Autopilot
from edge_agent.mavlink.bridge import Bridge, Log
from edge_agent.mavlink.config import BridgeConfig, Connection
from edge_agent.mavlink.dialect import mavlink
from edge_agent.mavlink.link import Link
from edge_agent.mavlink.state_push import StatePush
from edge_agent.mavlink.words import MAX_CHUNKS, Words, chunks, printable, status_texts
from tests.harness import ROOT
from tests.harness.clock import FakeClock
from tests.harness.fake_daemon import HANG_S, FakeDaemon, make_action, make_refusal, make_reply, make_status
from tests.harness.mavlink_rig import heartbeat

MOVE = {"type": "move", "values": {"forward_m_s": 0.25, "right_m_s": 0.0, "down_m_s": 0.0, "yaw_rate_rad_s": 0.1}}


class FakeAutopilot:
    """The other end of a udpout link: hears everything, and says that it flies."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self._peer: Any = None
        self._sender, self._receiver = mavlink.MAVLink(None, 1, 1), mavlink.MAVLink(None)
        self.heard: list[Any] = []

    def send(self, message: Any) -> None:
        self.socket.sendto(message.pack(self._sender), self._peer)
        self._sender.seq = (self._sender.seq + 1) % 256

    def fly(self) -> None:
        boot_ms = time.monotonic_ns() // 1_000_000 % 2**32
        self.send(heartbeat())
        self.send(mavlink.MAVLink_home_position_message(0, 0, 0, 0, 0, 0, [1, 0, 0, 0], 0, 0, 0))
        self.send(mavlink.MAVLink_local_position_ned_message(boot_ms, 0, 0, -5, 0, 0, 0))
        self.send(mavlink.MAVLink_attitude_message(boot_ms, 0, 0, 0, 0, 0, 0))

    def hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, self._peer = self.socket.recvfrom(2048, socket.MSG_DONTWAIT)
                self.heard += self._receiver.parse_buffer(data) or []

    def of(self, name: str) -> list[Any]:
        return [message for message in self.heard if message.get_type() == name]


class Flight:
    """A bridge between the two, turned by the test."""

    def __init__(self, folder: Path, config: BridgeConfig | None = None) -> None:
        self.autopilot = FakeAutopilot()
        self.config = msgspec.structs.replace(config or BridgeConfig(), runtime_dir=str(folder))
        self.agent = Client(str(folder))
        link = Link(Connection("udpout", "127.0.0.1", self.autopilot.port), 1, time.monotonic_ns)
        self.bridge = Bridge(self.config, self.agent, link, Autopilot(peer=link.fixed_peer), Log())
        self._close = (self.bridge.close, link.close, self.agent.close, self.autopilot.socket.close)

    def close(self) -> None:
        for close in self._close:
            close()

    def turn_until(self, is_done: Callable[[], Any], flies: bool = True) -> None:
        end_s = time.monotonic() + HANG_S
        while not is_done():
            assert time.monotonic() < end_s, [m.get_type() for m in self.autopilot.heard]
            if flies and self.autopilot._peer:
                self.autopilot.fly()
            self.bridge.turn()
            self.autopilot.hear()

    def setpoints(self) -> list[tuple[float, float]]:
        return [(m.vx, m.yaw_rate) for m in self.autopilot.of("SET_POSITION_TARGET_LOCAL_NED")]


@pytest.fixture
def daemon(tmp_path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as opened:
        yield opened


@pytest.fixture
def flight(daemon, tmp_path) -> Iterator[Flight]:
    made = Flight(tmp_path)
    made.bridge.turn()
    daemon.wait_for_subscriber("actions")
    made.turn_until(lambda: not made.bridge._autopilot.why_not_engaged(time.monotonic_ns()))
    yield made
    made.close()


def test_an_action_becomes_one_setpoint_and_a_refusal_hold(daemon, flight):
    daemon.publish("actions", make_action(1, valid_ms=1000, **MOVE))
    flight.turn_until(flight.setpoints)
    assert flight.setpoints() == [pytest.approx((0.25, 0.1))]
    daemon.publish("actions", make_refusal(2))
    flight.turn_until(lambda: len(flight.setpoints()) > 1)
    assert flight.setpoints()[1] == (0, 0)
    assert flight.bridge.follower.counts["ended: refusal"] == 1


@pytest.mark.parametrize("n_before", [0, 100], ids=["alone", "behind more than one turn reads"])
def test_what_the_autopilot_says_before_an_action_counts_for_it(daemon, flight, monkeypatch, n_before):
    """The HEARTBEAT arrives while the bridge reads the action: it was there before the action was published."""
    read = flight.agent.next_answer

    def read_late(timeout_s: float) -> Any:
        answer = read(timeout_s)
        if answer is not None:
            for _ in range(n_before):
                flight.autopilot.send(mavlink.MAVLink_vfr_hud_message(0, 0, 0, 0, 0, 0))
            flight.autopilot.send(heartbeat(base_mode=mavlink.MAV_MODE_FLAG_CUSTOM_MODE_ENABLED))
        return answer

    monkeypatch.setattr(flight.agent, "next_answer", read_late)
    daemon.publish("actions", make_action(1, **MOVE))
    flight.turn_until(flight.setpoints, flies=False)
    assert flight.setpoints()[0] == (0, 0)


def test_our_heartbeat_is_that_of_an_onboard_controller(flight):
    flight.turn_until(lambda: flight.autopilot.of("HEARTBEAT"))
    beat = flight.autopilot.of("HEARTBEAT")[0]
    assert (beat.get_srcSystem(), beat.get_srcComponent()) == (1, 191)
    assert (beat.type, beat.autopilot) == (mavlink.MAV_TYPE_ONBOARD_CONTROLLER, mavlink.MAV_AUTOPILOT_INVALID)
    assert beat.base_mode == 0


def test_it_never_arms_and_never_changes_the_mode(daemon, flight):
    for seq in range(1, 6):
        daemon.publish("actions", make_action(seq, **MOVE))
        flight.turn_until(lambda seq=seq: len(flight.setpoints()) >= seq)
    flight.turn_until(lambda: len(flight.autopilot.of("COMMAND_LONG")) >= 5)
    allowed = {mavlink.MAV_CMD_SET_MESSAGE_INTERVAL, mavlink.MAV_CMD_REQUEST_MESSAGE}
    assert {message.command for message in flight.autopilot.of("COMMAND_LONG")} <= allowed
    kinds = {message.get_type() for message in flight.autopilot.heard}
    assert kinds <= {"HEARTBEAT", "COMMAND_LONG", "SET_POSITION_TARGET_LOCAL_NED", "STATUSTEXT", "TIMESYNC"}


def test_the_pilot_is_told_why_the_vehicle_holds(daemon, flight):
    daemon.publish("actions", make_action(1, **MOVE, valid_ms=50))
    flight.turn_until(lambda: any("hold" in m.text for m in flight.autopilot.of("STATUSTEXT")))
    texts = flight.autopilot.of("STATUSTEXT")
    assert texts[0].text.startswith("edge-agent following: Hold position.")
    assert any(m.severity == mavlink.MAV_SEVERITY_WARNING for m in texts)


def test_the_state_of_the_vehicle_goes_to_the_daemon(daemon, flight):
    with daemon.answering(lambda request: [make_reply(request, refused={"mode": "not a key"})]) as requests:
        flight.turn_until(lambda: [r for r in requests if "altitude_m" in r.values])
    values = next(r for r in requests if "altitude_m" in r.values).values
    assert values["altitude_m"] == 5 and values["heading_deg"] == 0


def test_a_key_that_the_action_space_does_not_have_is_said_once(tmp_path):
    said: list[tuple[str, str]] = []
    push = StatePush(str(tmp_path), lambda topic, text: said.append((topic, text)))
    push.close()
    for why in ("not a key", "not a key", "not a number", "not a key"):
        agent = SimpleNamespace(status=lambda _s: None, vehicle_state=lambda why=why, **_values: {"mode": why})
        push._turn(agent, {"mode": "GUIDED"})
    reasons = [text.rpartition(": ")[2] for topic, text in said if topic == "state mode"]
    assert reasons == ["not a key", "not a number", "not a key"]


def test_control_that_never_answers_delays_nothing(daemon, flight):
    """Nobody reads its socket. The thread that pushes the state waits for seconds; the loop does not."""
    for seq in range(1, 20):
        daemon.publish("actions", make_action(seq, **MOVE))
        flight.turn_until(lambda seq=seq: len(flight.setpoints()) >= seq)
    assert {setpoint[0] for setpoint in flight.setpoints()} == {0.25}


def test_a_daemon_that_says_that_it_stops_is_hold_at_once(daemon, flight):
    daemon.wait_for_subscriber("status")
    daemon.publish("status", make_status())
    daemon.publish("actions", make_action(1, **MOVE, valid_ms=900))
    flight.turn_until(flight.setpoints)
    daemon.publish("status", msgspec.structs.replace(make_status(), seq=1, state="stopping"))
    numbers = itertools.count(2)

    def has_ended() -> bool:
        daemon.publish("actions", make_action(next(numbers), **MOVE, valid_ms=900))  # a busy machine: none expires
        return flight.bridge.follower.counts["ended: the daemon stops"] > 0

    flight.turn_until(has_ended)


def test_land_reads_the_answer_of_the_autopilot(daemon, tmp_path, capsys):
    flight = Flight(tmp_path, BridgeConfig(land=True))
    flight.bridge.turn()
    daemon.wait_for_subscriber("actions")
    flight.turn_until(lambda: not flight.bridge._autopilot.why_not_engaged(time.monotonic_ns()))
    numbers = itertools.count(1)

    def lands() -> list[Any]:
        daemon.publish("actions", make_action(next(numbers), type="land"))
        return [m for m in flight.autopilot.of("COMMAND_LONG") if m.command == mavlink.MAV_CMD_NAV_LAND]

    flight.turn_until(lands)
    assert flight.setpoints()[0] == (0, 0) and lands()[0].target_system == 1
    flight.autopilot.send(mavlink.MAVLink_command_ack_message(mavlink.MAV_CMD_NAV_LAND, mavlink.MAV_RESULT_DENIED))
    said: list[str] = []

    def refused() -> bool:
        said.append(capsys.readouterr().err)
        return "landing refused by the autopilot, result 2" in "".join(said)

    flight.turn_until(refused)
    flight.close()


def test_a_suspend_ends_everything(daemon, flight):
    daemon.publish("actions", make_action(1, **MOVE, valid_ms=900))
    flight.turn_until(flight.setpoints)
    flight.bridge._suspend.resumed_ns = lambda: time.monotonic_ns()
    flight.bridge.turn()
    assert not flight.bridge.follower.is_following and not flight.bridge.follower.is_holding
    assert flight.bridge._autopilot.heartbeat is None
    flight.bridge._suspend.resumed_ns = lambda value=flight.bridge._resumed_ns: value
    flight.turn_until(lambda: flight.bridge._wire.is_open)
    assert len(flight.setpoints()) == 1


# -- words ------------------------------------------------------------------------------------------------------------


def test_the_same_thing_is_not_said_again_and_again():
    clock = FakeClock()
    words = Words(clock)
    assert words.is_due("hold", "hold: disarmed")
    clock.advance(0.5)
    assert not words.is_due("hold", "hold: mode")
    clock.advance(0.6)
    assert words.is_due("hold", "hold: mode") and words.is_due("silent", "x")
    clock.advance(4)
    assert not words.is_due("hold", "hold: mode")
    clock.advance(1)
    assert words.is_due("hold", "hold: mode")


def test_a_long_text_is_cut_into_parts_that_belong_together():
    parts = list(status_texts("hold", "x" * 500, 7))
    assert len(parts) == MAX_CHUNKS and [part.chunk_seq for part in parts] == [0, 1, 2] and parts[0].id == 7
    assert next(iter(status_texts("hold", "short", 7))).id == 0
    assert chunks("naïve") == [b"na?ve"]
    assert printable("a\nb\x1b[31m") == "a?b?[31m"


# -- the program ------------------------------------------------------------------------------------------------------


def program(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edge_agent.cli.main", "mavlink", *arguments]
    env = os.environ | environment
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_dry_run_prints_each_setpoint_and_ends_at_sigterm(daemon, tmp_path):
    running = program("--dry-run", "--json", "--runtime-dir", str(tmp_path))
    daemon.wait_for_subscriber("actions")
    daemon.publish("actions", make_action(1, **MOVE, valid_ms=100))
    assert running.stdout is not None
    stamp, *rest = running.stdout.readline().split()
    assert rest == ["move", "forward_m_s=0.25", "right_m_s=0", "down_m_s=0", "yaw_rate_rad_s=0.1"]
    assert stamp[0] == "@" and int(stamp[1:]) < time.monotonic_ns()
    assert running.stdout.readline().split()[1:] == ["hold"]
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=HANG_S)
    assert running.returncode == 0 and set(out.split()[1::2]) <= {"hold"}
    lines = [json.loads(line) for line in err.splitlines()]
    assert lines[0]["topic"] == "follow" and lines[-1]["counts"]["sent: move"] == 1


def test_systemd_hears_of_it(tmp_path, daemon):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(HANG_S)
        running = program("--dry-run", "--runtime-dir", str(tmp_path), NOTIFY_SOCKET=str(path), WATCHDOG_USEC="100000")
        assert [manager.recv(99) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
        running.send_signal(signal.SIGSTOP)  # a loop that does not turn does not feed
        manager.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            while True:
                manager.recv(99)
        running.send_signal(signal.SIGCONT)
        manager.settimeout(HANG_S)
        assert manager.recv(99) == b"WATCHDOG=1"
        running.terminate()
        running.communicate(timeout=HANG_S)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((), 78, "expected --connection, or `connection` in the file of --config"),
        (("--connection", "udp:1"), 78, "--connection: expected udpout:ADDRESS:PORT"),
        (("--config", "no-such.yaml"), 78, "no-such.yaml: cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_start_is_one_line(tmp_path, arguments, status, words):
    done = program("--runtime-dir", str(tmp_path), *arguments)
    out, err = done.communicate(timeout=HANG_S)
    assert (done.returncode, out) == (status, "") and words in err and err.count("\n") == 1


def test_without_pymavlink_the_command_says_what_to_install(tmp_path, monkeypatch):
    import importlib.util

    from edge_agent.cli import main
    from edge_agent.cli.commands import CommandFailed

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pymavlink" else find(name))
    arguments = main.make_parser().parse_args(["mavlink", "--dry-run", "--runtime-dir", str(tmp_path)])
    with pytest.raises(CommandFailed, match=r"pip install '.\[mavlink\]'.*pymavlink") as caught:
        main.run_command(arguments)
    assert caught.value.exit_status == 78


def test_the_thread_of_the_state_ends_with_the_bridge(flight):
    names = {thread.name for thread in threading.enumerate()}
    assert "vehicle state" in names
