"""The bridge flies a real autopilot in simulation: EDGE_AGENT_SITL=/path/to/arducopter, or …/bin/px4. Minutes.

The pilot of tests/harness/sitl.py arms, takes off and changes the mode; the bridge only sends setpoints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from pymavlink.dialects.v20 import common as mavlink

from tests.harness.bridge_rig import Bridge
from tests.harness.fake_daemon import FakeDaemon, make_action, make_reply
from tests.harness.sitl import PX4, Kind, Pilot, binary, simulation

HEIGHT_M = 10.0
CONFIG = {
    "hold_s": 2.0,
    "land": True,
    "limits": {"speed_m_s": 3, "up_m_s": 1.5, "down_m_s": 1.5, "yaw_rate_rad_s": 0.8},
    "fence": {"min_altitude_m": 2, "max_altitude_m": 60, "radius_m": 200},
}
STILL = {"forward_m_s": 0.0, "right_m_s": 0.0, "down_m_s": 0.0, "yaw_rate_rad_s": 0.0}
PERIOD_S = 0.2  # between two actions


class Flight(NamedTuple):
    kind: Kind
    pilot: Pilot
    daemon: FakeDaemon
    bridge: Bridge
    seq: list[int]

    def publish(self, type: str = "move", **values: float) -> None:
        self.seq[0] += 1
        shown = STILL | values if type == "move" else {}
        self.daemon.publish("actions", make_action(self.seq[0], valid_ms=500, type=type, values=shown))

    def fly(self, seconds: float, **values: float) -> None:
        """Publish moves for some time."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            self.publish(**values)
            next_s = time.monotonic() + PERIOD_S
            while time.monotonic() < next_s:
                self.pilot.step()

    def enter_external_mode(self) -> None:
        """As the pilot. PX4 accepts it only while setpoints come."""
        until_s = time.monotonic() + 60
        while self.pilot.custom_mode != self.kind.external_custom_mode:
            self.fly(1.5)
            main, sub = self.kind.external_mode
            self.pilot.send(
                mavlink.MAVLink_command_long_message(1, 1, mavlink.MAV_CMD_DO_SET_MODE, 0, 1, main, sub, 0, 0, 0, 0)
            )
            self.fly(1.5)
            assert time.monotonic() < until_s, f"mode refused: {self.pilot.texts[-8:]}, {self.bridge.log[-8:]}"

    def position(self) -> Any:
        return self.pilot.newest["LOCAL_POSITION_NED"]

    def yaw(self) -> float:
        return float(self.pilot.newest["ATTITUDE"].yaw)


@pytest.fixture
def flight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flight]:
    path, kind = binary()
    folder, runtime = tmp_path_factory.mktemp("sitl"), tmp_path_factory.mktemp("r")
    config = CONFIG | {"runtime_dir": str(runtime), "connection": kind.bridge_connection}
    with simulation(path, kind, folder), FakeDaemon(runtime) as daemon:
        pilot = Pilot(kind)
        bridge = Bridge(config, runtime)
        try:
            with daemon.answering(lambda request: [make_reply(request, refused={})]):
                yield Flight(kind, pilot, daemon, bridge, [0])
        finally:
            bridge.close()
            pilot.close()


def take_off(flight: Flight) -> None:
    pilot = flight.pilot
    pilot.wait(lambda: "HEARTBEAT" in pilot.newest, "HEARTBEAT")
    for name, rate_hz in {"LOCAL_POSITION_NED": 10, "ATTITUDE": 10, "GLOBAL_POSITION_INT": 5}.items():
        pilot.ask_for(name, rate_hz)
    pilot.wait(lambda: "LOCAL_POSITION_NED" in pilot.newest and "GLOBAL_POSITION_INT" in pilot.newest, "a position")
    if flight.kind is not PX4:
        pilot.command(mavlink.MAV_CMD_DO_SET_MODE, 1, *flight.kind.external_mode)
    pilot.command(mavlink.MAV_CMD_COMPONENT_ARM_DISARM, 1)
    # PX4 takes the height above sea level.
    above_m = pilot.newest["GLOBAL_POSITION_INT"].alt / 1000 - pilot.height_m if flight.kind is PX4 else 0.0
    nan = math.nan if flight.kind is PX4 else 0.0
    pilot.command(mavlink.MAV_CMD_NAV_TAKEOFF, 0, 0, 0, nan, nan, nan, above_m + HEIGHT_M)
    pilot.wait(lambda: pilot.height_m > HEIGHT_M - 1.0 and pilot.speed_m_s < 0.3, "the height", 90)


@pytest.mark.timeout(900)
def test_the_bridge_flies_a_real_autopilot(flight: Flight):
    """Every axis, a change of the mode, the loss of the daemon, and a landing: one flight, because a start takes a
    minute."""
    pilot = flight.pilot
    take_off(flight)
    assert "edge-agent" not in " ".join(pilot.texts) and pilot.companion, "the bridge's heartbeat is forwarded"
    flight.enter_external_mode()
    check_axes(flight)
    check_pilot_takes_over(flight)
    check_lost_daemon(flight)
    check_landing(flight)
    assert flight.bridge.process.poll() is None, flight.bridge.log[-20:]


def check_axes(flight: Flight) -> None:
    """The signs of all four axes, from the autopilot's own estimate."""
    for values, expected in (
        ({"forward_m_s": 1.5}, (1.5, 0.0, 0.0)),
        ({"forward_m_s": -1.5}, (-1.5, 0.0, 0.0)),
        ({"right_m_s": 1.5}, (0.0, 1.5, 0.0)),
        ({"down_m_s": -0.8}, (0.0, 0.0, -0.8)),
        ({"down_m_s": 0.8}, (0.0, 0.0, 0.8)),
    ):
        flight.fly(5.0, **values)
        p, yaw = flight.position(), flight.yaw()
        forward, right = p.vx * math.cos(yaw) + p.vy * math.sin(yaw), -p.vx * math.sin(yaw) + p.vy * math.cos(yaw)
        assert (forward, right, p.vz) == pytest.approx(expected, abs=0.4), values
        flight.fly(3.0)
    before = flight.yaw()
    flight.fly(4.0, yaw_rate_rad_s=0.3)
    assert math.remainder(flight.yaw() - before, math.tau) == pytest.approx(1.2, abs=0.5)
    assert pilot_speed(flight) < 0.5


def pilot_speed(flight: Flight) -> float:
    return flight.pilot.speed_m_s


def check_pilot_takes_over(flight: Flight) -> None:
    """In another mode the vehicle stops, whatever the model wants."""
    pilot = flight.pilot
    flight.fly(3.0, forward_m_s=1.5)
    pilot.command(mavlink.MAV_CMD_DO_SET_MODE, 1, *flight.kind.other_mode)
    flight.fly(5.0, forward_m_s=1.5)
    assert pilot.custom_mode != flight.kind.external_custom_mode and pilot_speed(flight) < 0.4
    flight.enter_external_mode()


def check_lost_daemon(flight: Flight) -> None:
    """Hold, then silence: PX4 leaves OFFBOARD by itself, ArduCopter stays in GUIDED and stands still."""
    pilot = flight.pilot
    flight.fly(3.0, forward_m_s=1.5)
    pilot.wait(lambda: pilot.speed_m_s < 0.3, "the vehicle stops", 30)
    if flight.kind is PX4:
        pilot.wait(lambda: pilot.custom_mode != flight.kind.external_custom_mode, "PX4's fail-safe", 30)
    flight.enter_external_mode()


def check_landing(flight: Flight) -> None:
    pilot = flight.pilot
    until_s = time.monotonic() + 20
    while pilot.custom_mode != flight.kind.land_custom_mode:
        flight.publish("land")
        for _ in range(8):
            pilot.step()
        assert time.monotonic() < until_s, f"{pilot.texts[-8:]}, {flight.bridge.log[-8:]}"
    pilot.wait(lambda: not pilot.is_armed, "landed and disarmed", 120)
    assert abs(pilot.height_m) < 1.0
