"""The bridge process on links that break, with peers that pretend, and with processes that are killed.

In every test: no setpoint but hold outside the validity of its action, none twice. What is judged is the order of
events, not how long they take.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pymavlink.dialects.v20 import common as mavlink

from models.autopilot.autopilot import Autopilot
from models.autopilot.bodies import PointMass
from models.autopilot.driver import Driver
from models.autopilot.flavours import ARDUCOPTER, PX4, Flavour
from models.autopilot.link import LineFaults
from models.autopilot.ports import SerialPort, TcpListener, UdpListener, UdpSender
from tests.harness.bridge_rig import SHORT_HOLD_S, DaemonProcess, Rig, is_hold, name_of, rig

BOTH = pytest.mark.parametrize("flavour", [PX4, ARDUCOPTER], ids=lambda flavour: flavour.name)


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("l")  # a socket's path has at most 107 bytes


@pytest.fixture(scope="module")
def shared_copter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("c"), ARDUCOPTER) as made:
        yield made


@pytest.fixture
def copter(shared_copter: Rig) -> Iterator[Rig]:
    """It flies when the test begins."""
    shared_copter.fly()
    yield shared_copter
    assert shared_copter.wrong() == [] and shared_copter.bridge.process.poll() is None, shared_copter.report()


def words(rig: Rig) -> str:
    return "\n".join(rig.bridge.log)


# -- links -------------------------------------------------------------------------------------------------------------


def test_a_serial_port_that_vanishes_and_returns(folder: Path):
    port = SerialPort(folder / "ttyTHS1")
    with rig(folder, ARDUCOPTER, port=port, connection=f"serial:{port.path}:921600") as made:
        made.fly()
        made.follow_one()
        with made.driver.lock:
            port.unplug()
        made.driver.wait(lambda: "link lost" in words(made))
        for _ in range(5):  # nobody hears them, and they must not be sent when the port is back
            made.publish()
        with made.driver.lock:
            port.plug_in()
        back_ns = time.monotonic_ns()
        made.driver.wait(lambda: made.setpoints_since(back_ns) or made.publish() is None)
        assert is_hold(made.setpoints_since(back_ns)[0]), made.report()
        made.fly()
        assert made.wrong() == [] and made.bridge.process.poll() is None


def test_a_tcp_connection_that_ends_is_made_again(folder: Path):
    port = TcpListener()
    with rig(folder, ARDUCOPTER, port=port, connection=f"tcp:127.0.0.1:{port.port}") as made:
        made.fly()
        with made.driver.lock:
            port.drop()
        made.driver.wait(lambda: len(port.filenos()) == 2)  # the listener, and a new connection
        made.fly()
        assert made.wrong() == [] and made.bridge.process.poll() is None


def test_an_autopilot_that_sends_to_the_bridge(folder: Path):
    """As PX4's simulation does: it sends to port 14540, and nobody else may."""
    number = free_port()
    with rig(folder, PX4, port=UdpSender(number), connection=f"udpin:127.0.0.1:{number}") as made:
        made.fly()
        assert made.wrong() == []


def test_a_link_that_is_cut_and_comes_back(copter: Rig):
    copter.follow_one()
    with copter.driver.lock:
        copter.link.is_cut = True
    losses = copter.autopilot.losses
    copter.driver.wait(lambda: copter.autopilot.losses > losses or copter.publish() is None)
    assert copter.autopilot.mode == "GUIDED" and copter.autopilot.target.velocity_m_s == (0, 0, 0)
    with copter.driver.lock:
        copter.link.is_cut = False
    copter.fly()


@pytest.mark.parametrize(
    ("flavour", "shares"),
    [(PX4, {"lose": 0.3, "duplicate": 0.2, "delay": 0.2}), (ARDUCOPTER, {"flip": 0.3, "cut": 0.2})],
    ids=["PX4", "ArduCopter"],
)
def test_a_line_that_loses_and_damages_packets(folder: Path, flavour: Flavour, shares: dict[str, float]):
    """From the autopilot. In the other direction a packet that comes twice would be the line's doing, not the
    bridge's."""
    with rig(folder, flavour) as made:
        made.fly()
        with made.driver.lock:
            made.link.faults = LineFaults(seed=3, **shares)
            made.link.faults.directions = {"out"}
        for _ in range(40):
            made.publish()
        assert made.wrong() == [] and made.bridge.process.poll() is None, made.report()
        made.fly()
        made.wait_for_hold(made.publish().t_pub_ns)


def test_a_flood_of_garbage_does_not_stop_the_bridge(copter: Rig):
    for i in range(2000):
        with copter.driver.lock:
            copter.link.port.send(os.urandom(1 + i % 300))
    copter.follow_one()
    unknown = bytes([0xFD, 4, 0, 0, 0, 1, 1, 0xFF, 0xFF, 0xFF, 1, 2, 3, 4, 5, 6])
    for _ in range(500):
        with copter.driver.lock:
            copter.link.port.send(unknown)
    copter.fly()


# -- peers -------------------------------------------------------------------------------------------------------------


def test_a_wrong_system_id_gets_nothing_but_a_word(folder: Path):
    with rig(folder, ARDUCOPTER, target_system=7) as made:
        with made.driver.lock:
            made.autopilot.arm(), made.autopilot.set_mode("GUIDED")
        made.driver.wait(
            lambda: made.publish() and "no HEARTBEAT from system 7" in words(made) and "1/1" in words(made)
        )
        assert made.moves_since(0) == [], made.report()
        targets = {getattr(item.message, "target_system", 7) for item in made.driver.received}
        assert targets <= {0, 7}


def test_mavlink_1_is_held_with_the_parameter_to_set(folder: Path):
    with rig(folder, ARDUCOPTER) as made:
        with made.driver.lock:
            made.link.is_mavlink1 = True
            made.autopilot.arm(), made.autopilot.set_mode("GUIDED")
        made.driver.wait(lambda: made.publish() and "SERIALn_PROTOCOL" in words(made))
        assert made.moves_since(0) == [], made.report()


def test_two_autopilots_with_one_id_on_one_link_are_held(copter: Rig):
    """A second one of another kind, then a second one of the same kind whose numbers and clock are its own."""
    other = mavlink.MAVLink(None, srcSystem=1, srcComponent=1)
    beat = mavlink.MAVLink_heartbeat_message(2, mavlink.MAV_AUTOPILOT_PX4, 0x81, 6 << 16, 4, 3)
    with copter.driver.lock:
        copter.link.port.send(beat.pack(other))
    copter.wait_for_hold(time.monotonic_ns())
    copter.driver.wait(lambda: copter.publish() and "differ" in words(copter))
    copter.publish_and_see_hold()
    copter.restart_bridge()  # it would hold for seconds


def test_two_autopilots_of_one_kind_with_one_id_are_held(folder: Path):
    """Both send to the bridge's port, from two addresses."""
    number = free_port()
    with rig(folder, ARDUCOPTER, port=UdpSender(number), connection=f"udpin:127.0.0.1:{number}") as made:
        made.fly()
        second = Autopilot(ARDUCOPTER, PointMass(3.0), time.monotonic_ns)
        with Driver(second, [UdpSender(number)]) as driver:
            made.driver.wait(
                lambda: made.publish() and is_hold(made.driver.setpoints[-1]) and "two senders" in words(made)
            )
            for _ in range(5):  # hold, or nothing: hold has an end
                made.publish()
            assert is_hold(made.driver.setpoints[-1])
            assert [item for item in driver.setpoints if not is_hold(item)] == []
        assert made.wrong() == [] and made.bridge.process.poll() is None


def test_another_vehicle_on_the_link_changes_nothing(copter: Rig):
    """It has another id: its position, mode and heartbeat are not those of our autopilot. What the bridge has heard
    before an action counts for it, so with them it would follow none."""
    other, n_followed = mavlink.MAVLink(None, srcSystem=2, srcComponent=1), 0
    for i in range(20):
        for message in (
            mavlink.MAVLink_heartbeat_message(2, mavlink.MAV_AUTOPILOT_PX4, 0x01, 4 << 16, 3, 3),
            mavlink.MAVLink_local_position_ned_message(i, 9e9, 9e9, 9e9, 0, 0, 0),
        ):
            with copter.driver.lock:
                copter.link.port.send(message.pack(other))
        action = copter.publish(valid_ms=900)
        n_followed += copter.driver.happens(lambda action=action: copter.is_followed(action), 0.9)
    assert n_followed > 5, copter.report()  # 20 but on a busy machine, where telemetry and actions may be too old


def test_a_stranger_cannot_command_the_bridge(copter: Rig):
    """udpout: what comes from another address than the autopilot's does not count."""
    with UdpSenderTo(copter) as stranger:
        lie = mavlink.MAVLink_heartbeat_message(2, mavlink.MAV_AUTOPILOT_ARDUPILOTMEGA, 0x51, 5, 4, 3)
        stranger.send(lie)
    copter.driver.wait(lambda: copter.publish() and copter.moves_since(time.monotonic_ns() - 10**8))


class UdpSenderTo:
    """Sends to the port from which the bridge sends to the autopilot."""

    def __init__(self, rig: Rig) -> None:
        port = rig.link.port
        assert isinstance(port, UdpListener)
        self._address = list(port.peers)[-1]  # that of the newest bridge
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def __enter__(self) -> UdpSenderTo:
        return self

    def __exit__(self, *_error: object) -> None:
        self._socket.close()

    def send(self, message: object) -> None:
        packed = message.pack(mavlink.MAVLink(None, srcSystem=1, srcComponent=1))  # type: ignore[attr-defined]
        self._socket.sendto(packed, self._address)


# -- processes ---------------------------------------------------------------------------------------------------------


@BOTH
def test_kill_9_of_the_daemon(folder: Path, flavour: Flavour):
    """Hold after the last action's expiry, then silence, then the autopilot's own fail-safe."""
    with rig(folder, flavour, hold_s=SHORT_HOLD_S) as made:
        made.end_daemon()
        daemon = DaemonProcess(folder, rate_hz=10.0, valid_ms=500)
        made.follow(daemon)
        made.driver.wait(lambda: len(made.moves_since(0)) > 10)
        losses, killed_ns = made.autopilot.losses, daemon.kill()
        made.wait_for_hold(killed_ns)
        last_ns = made.wait_for_silence()
        last_move = made.moves_since(0)[-1]
        until_ns = daemon.published[name_of(last_move)][1]
        assert made.holds_since(last_move.t_ns)[0].t_ns >= until_ns and last_ns > until_ns
        if flavour is PX4:
            made.driver.wait(lambda: made.autopilot.mode == "AUTO.LOITER" and made.autopilot.losses > losses)
        made.wait_for_heartbeats(2)
        assert made.setpoints_since(last_ns + 1) == [], "it goes on after its silence"
        for item in made.moves_since(0):
            t_pub_ns, until_ns = daemon.published[name_of(item)]
            assert t_pub_ns <= item.t_ns < until_ns


@BOTH
def test_kill_9_of_the_bridge(folder: Path, flavour: Flavour):
    """The autopilot stops by itself, and a bridge that is started again follows only what is published then."""
    with rig(folder, flavour) as made:
        made.fly()
        losses = made.autopilot.losses
        made.bridge.process.send_signal(signal.SIGKILL)
        made.bridge.process.wait()
        made.driver.wait(lambda: made.autopilot.losses > losses)
        assert made.autopilot.target.velocity_m_s == (0, 0, 0)
        assert made.autopilot.mode == ("AUTO.LOITER" if flavour is PX4 else "GUIDED")
        for _ in range(3):
            made.publish()
        made.restart_bridge()
        made.fly()
        assert made.wrong() == []


def test_a_bridge_that_was_stopped_sends_nothing_old(copter: Rig):
    copter.follow_one()
    copter.bridge.process.send_signal(signal.SIGSTOP)
    for _ in range(5):
        copter.publish(valid_ms=100)
    last = copter.publish(valid_ms=100)
    copter.driver.happens(lambda: time.monotonic_ns() > last.valid_until_ns, 1.0)
    copter.bridge.process.send_signal(signal.SIGCONT)
    woken_ns = time.monotonic_ns()
    copter.wait_for_hold(woken_ns)
    assert copter.moves_since(woken_ns) == []
    copter.fly()


def test_the_last_that_a_bridge_sends_before_sigterm_ends_it_is_hold(copter: Rig):
    copter.follow_one()
    copter.bridge.process.send_signal(signal.SIGTERM)
    assert copter.bridge.process.wait(60) == 0
    copter.driver.wait(lambda: is_hold(copter.driver.setpoints[-1]))
    copter.restart_bridge()
