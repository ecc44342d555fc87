"""For flight.py: a simulated autopilot, and a bridge process between it and a daemon."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from models.autopilot.autopilot import Autopilot
from models.autopilot.bodies import PointMass
from models.autopilot.driver import Driver
from models.autopilot.flavours import ARDUCOPTER, PX4
from models.autopilot.ports import UdpListener
from models.pad_pilot.fly import AREA_M, SEARCH_M_S, DaemonLink, Result, Step
from models.pad_pilot.fly_mavlink import MavlinkVehicle, fly_mavlink
from models.pad_pilot.task import Order
from models.pad_pilot.world import World

BIN = Path(sys.executable).parent
FLAVOURS = {"px4": PX4, "ardupilot": ARDUCOPTER}
# Without a pace the world is several times faster than the bridge's clock, by which it limits the acceleration.
FAST_ACCELERATION_M_S2 = 50.0
FENCE_M = 8.0  # room to brake outside of the square in which the pads are


def bridge_config(runtime: str, port: int, pace_s: float) -> dict:
    limits = {"speed_m_s": 3.0, "up_m_s": 1.5, "down_m_s": 1.5}
    if not pace_s:
        limits["acceleration_m_s2"] = FAST_ACCELERATION_M_S2
    return {
        "connection": f"udpout:127.0.0.1:{port}",
        "runtime_dir": runtime,
        "land": True,
        "search_m_s": SEARCH_M_S,
        "search_radius_m": math.sqrt(2) * AREA_M,  # the corners of the square that fly.py searches
        "max_image_age_ms": 2000,  # as long as fly.py waits for an answer
        "limits": limits,
        "fence": {"min_altitude_m": 0.05, "max_altitude_m": 12.0, "radius_m": FENCE_M},
    }


@contextlib.contextmanager
def bridge_process(runtime: str | Path, autopilot: str, pace_s: float = 0.0) -> Iterator[MavlinkVehicle]:
    """edge-agent mavlink between the daemon of this folder and a simulated autopilot."""
    vehicle = Autopilot(FLAVOURS[autopilot], PointMass(5.0), time.monotonic_ns)
    port = UdpListener()
    config, log = Path(runtime) / "mavlink.yaml", Path(runtime) / "mavlink.log"
    config.write_text(yaml.safe_dump(bridge_config(str(runtime), port.port, pace_s)))
    with Driver(vehicle, [port]) as driver, log.open("wb") as output:
        bridge = subprocess.Popen([BIN / "edge-agent", "mavlink", "--config", config], stdout=output, stderr=output)
        try:
            driver.wait(lambda: bridge.poll() is not None or any(item.source == (1, 191) for item in driver.received))
            if bridge.poll() is not None:
                sys.exit(f"edge-agent mavlink has ended:\n{log.read_text()}")
            yield MavlinkVehicle(driver)
        finally:
            bridge.terminate()
            bridge.wait(10)


def flown_through(
    vehicle: MavlinkVehicle, pace_s: float
) -> Callable[[DaemonLink, World, list[tuple[str, Order]], Callable[[Step], None]], list[Result]]:
    """How flight.py flies a mission."""

    def fly(
        link: DaemonLink, world: World, mission: list[tuple[str, Order]], on_step: Callable[[Step], None]
    ) -> list[Result]:
        return fly_mavlink(link, vehicle, world, mission, on_step, pace_s)

    return fly
