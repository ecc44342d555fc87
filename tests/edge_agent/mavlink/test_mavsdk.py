"""MAVSDK as an independent peer: it takes the simulated autopilot for a real one, sees the bridge beside it, and is the
pilot while the bridge flies. make test installs it."""

from __future__ import annotations

import importlib.util
import math
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from models.autopilot.autopilot import Autopilot
from models.autopilot.bodies import PointMass
from models.autopilot.driver import Driver
from models.autopilot.flavours import ARDUCOPTER, PX4, Flavour
from models.autopilot.ports import UdpListener, UdpSender
from tests.harness.bridge_rig import Rig, rig
from tests.harness.mavsdk_peer import MavsdkPeer, mavsdk_peer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mavsdk") is None, reason="mavsdk is not installed; make venv installs it"
)
BOTH = pytest.mark.parametrize("flavour", [PX4, ARDUCOPTER], ids=lambda flavour: flavour.name)
EXTERNAL = {"PX4": "mode 6 0", "ArduCopter": "mode 4 0"}
NAMES = {"PX4": ("PX4", "HOLD", "OFFBOARD"), "ArduCopter": ("ARDUPILOT", "STABILIZED", "OFFBOARD")}


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def connected() -> Iterator[Callable[[Flavour], tuple[Autopilot, Driver, MavsdkPeer]]]:
    """An autopilot 2 m above the ground that looks east, and MAVSDK connected to it."""
    open_things: list = []

    def connect(flavour: Flavour) -> tuple[Autopilot, Driver, MavsdkPeer]:
        port = free_port()
        autopilot = Autopilot(flavour, PointMass(2.0, math.pi / 2), time.monotonic_ns)
        driver = Driver(autopilot, [UdpSender(port)])
        open_things.append(driver.close)
        peer = MavsdkPeer(f"udpin://127.0.0.1:{port}")
        open_things.append(peer.close)
        peer.wait(lambda: peer.newest.get("mode"))
        return autopilot, driver, peer

    yield connect
    for close in reversed(open_things):
        close()


@BOTH
def test_mavsdk_agrees_with_the_simulated_autopilot(connected, flavour: Flavour):
    autopilot, driver, peer = connected(flavour)
    kind, first_mode, _ = NAMES[flavour.name]
    assert peer.newest["connected"] == {"autopilot": kind, "vehicle": "MULTICOPTER"}
    assert peer.newest["mode"] == first_mode and peer.newest["armed"] is False
    with driver.lock:
        for name, interval_ns in {"GLOBAL_POSITION_INT": 1, "LOCAL_POSITION_NED": 1, "BATTERY_STATUS": 2}.items():
            driver.links[0].set_interval(name, interval_ns * 100_000_000)
    peer.wait(lambda: {"position", "ned", "battery_percent", "landed", "heading_deg"} <= peer.newest.keys())
    latitude, longitude, height = peer.newest["position"]
    assert (latitude, longitude) == pytest.approx((47.397742, 8.545594), abs=1e-6)
    assert height == pytest.approx(2.0, abs=0.01) and peer.newest["ned"][2] == pytest.approx(-2.0, abs=0.01)
    assert peer.newest["heading_deg"] == pytest.approx(90.0, abs=0.2)
    assert peer.newest["battery_percent"] == pytest.approx(87.0) and peer.newest["landed"] == "IN_AIR"
    assert peer.command("arm") == "SUCCESS"
    peer.wait(lambda: peer.newest["armed"])
    assert peer.command("land") == "SUCCESS"
    peer.wait(lambda: peer.newest["mode"] == "LAND")
    assert autopilot.is_landing
    peer.wait(lambda: not peer.newest["armed"] and peer.newest["landed"] == "ON_GROUND")


def test_px4_refuses_mavsdk_offboard_without_setpoints(connected):
    autopilot, _, peer = connected(PX4)
    peer.command(EXTERNAL["PX4"])
    peer.wait(lambda: any("refused" in text for text in peer.texts))
    assert autopilot.mode == "AUTO.LOITER"


@pytest.fixture
def piloted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Flavour], tuple[Rig, MavsdkPeer]]]:
    """The bridge on one link of the autopilot, MAVSDK on the other."""
    open_things: list = []

    def make(flavour: Flavour) -> tuple[Rig, MavsdkPeer]:
        port = free_port()
        made = rig(tmp_path_factory.mktemp("m"), flavour, port=UdpListener(), land=True, more_ports=[UdpSender(port)])
        bridge = made.__enter__()
        open_things.append(lambda: made.__exit__(None, None, None))
        ground = mavsdk_peer(f"udpin://127.0.0.1:{port}")
        peer = ground.__enter__()
        open_things.append(lambda: ground.__exit__(None, None, None))
        peer.wait(lambda: peer.newest.get("mode"))
        return bridge, peer

    yield make
    for close in reversed(open_things):
        close()


@BOTH
def test_mavsdk_is_the_pilot_while_the_bridge_flies(piloted, flavour: Flavour):
    bridge, peer = piloted(flavour)
    external = flavour.external_mode
    with bridge.driver.lock:
        bridge.autopilot.body = PointMass(2.0)
    assert peer.command("arm") == "SUCCESS"
    bridge.driver.wait(lambda: bridge.publish() and bridge.autopilot.accepts_external_mode())
    assert bridge.moves_since(0) == []  # armed, but in the mode of the pilot
    peer.command(EXTERNAL[flavour.name])
    bridge.driver.wait(lambda: bridge.publish() and bridge.moves_since(0))
    assert bridge.autopilot.mode == external
    peer.wait(lambda: peer.newest["mode"] == NAMES[flavour.name][2])
    peer.wait(lambda: any(beat["component_id"] == 191 for beat in peer.heartbeats))
    beat = next(beat for beat in peer.heartbeats if beat["component_id"] == 191)
    assert (beat["type"], beat["autopilot"]) == (18, 8)  # onboard controller, no autopilot
    peer.wait(lambda: any(text.startswith("edge-agent") for text in peer.texts))
    assert peer.command("land") == "SUCCESS"
    bridge.publish_until_held()
    bridge.publish_and_see_hold()
    assert bridge.autopilot.is_landing
    peer.wait(lambda: peer.newest["landed"] == "ON_GROUND")
    assert bridge.wrong() == []


def test_the_action_land_is_a_landing_in_mavsdk(piloted):
    bridge, peer = piloted(ARDUCOPTER)
    bridge.fly()

    def is_landing() -> bool:
        bridge.publish(type="land", values={})  # the second one counts, after a HEARTBEAT
        return peer.newest["mode"] == "LAND"

    peer.wait(is_landing)
    assert bridge.autopilot.mode == "LAND"
