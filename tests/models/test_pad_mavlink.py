"""The demo flight through the bridge: the world as an autopilot's vehicle, and one landing with the trained model."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_agent.wire.messages import Action, Refusal
from models.autopilot.autopilot import Autopilot
from models.autopilot.flavours import ARDUCOPTER
from models.pad_pilot.fly import DaemonLink
from models.pad_pilot.fly_mavlink import WorldBody, fly_mavlink
from models.pad_pilot.lessons import Grounds
from models.pad_pilot.scene import Pad
from models.pad_pilot.task import Order
from models.pad_pilot.world import World
from tests.harness import ROOT
from tests.harness.clock import FakeClock

sys.path.insert(0, str(ROOT / "benchmarks"))

import flight as benchmark
import mavlink_bridge

CHECKPOINT = ROOT / "models" / "pad_pilot" / "checkpoint"


def calm(*pads: Pad, wind_m_s: float = 0.0) -> World:
    world = World(1, Grounds([], 1, n=2), wind_m_s=wind_m_s)
    world.pads, world.objects = list(pads), []
    world.position_m[:2] = 0
    return world


@pytest.mark.parametrize(
    ("velocity", "moved"),
    [((1, 0, 0), (1, 0, 0)), ((0, 1, 0), (0, 1, 0)), ((0, 0, 1), (0, 0, 1)), ((-1, 0.5, -0.5), (-1, 0.5, -0.5))],
)
@pytest.mark.parametrize("yaw_rad", [0.0, 1.0, -2.5])
def test_the_world_flies_north_east_and_down_whatever_its_yaw(velocity: tuple, moved: tuple, yaw_rad: float):
    world = calm()
    world.yaw_rad, body, before = yaw_rad, WorldBody(world), np.array(WorldBody(world).position_m)
    body.fly(velocity, 0.3, 4.0)
    direction = (np.array(body.position_m) - before) / np.linalg.norm(np.array(body.position_m) - before)
    assert direction == pytest.approx(np.array(moved) / np.linalg.norm(moved), abs=0.05)
    assert np.array(body.velocity_m_s) == pytest.approx(np.array(velocity), abs=0.06)
    assert math.remainder(body.attitude_rad[2] - yaw_rad - 1.2, math.tau) == pytest.approx(0, abs=0.02)


def test_an_autopilot_keeps_its_place_in_the_wind_and_lands_there():
    """Zero velocity is hold, as in both autopilots; a landing goes straight down."""
    world, clock = calm(wind_m_s=4.0), FakeClock()
    world.wind_mean_m_s[:] = (2.0, -2.0)
    autopilot = Autopilot(ARDUCOPTER, WorldBody(world), clock)
    autopilot.real_time = False
    assert autopilot.arm() and autopilot.set_mode("GUIDED")
    autopilot.fly(20.0)
    assert np.abs(world.position_m[:2]).max() < 0.6
    autopilot.set_mode("LAND")
    autopilot.fly(10.0)
    assert world.is_landed and np.abs(world.position_m[:2]).max() < 1.0
    autopilot.step()
    assert not autopilot.is_armed


class PatientLink:
    """For a busy machine: pushes a picture again until there is an answer."""

    def __init__(self, link: DaemonLink) -> None:
        self.link, self.client = link, link.client

    def answer(self, picture: np.ndarray, timeout_s: float = 0.0) -> Action | Refusal:
        for _ in range(benchmark.PUSHES):
            if (answer := self.link.answer(picture, benchmark.PUSH_TIMEOUT_S)) is not None:
                return answer
        raise AssertionError("no answer")


def test_the_model_lands_through_the_bridge(build):
    """Daemon, bridge and autopilot, each as it is. The landing is the autopilot's own, by the bridge's command."""
    bundle: Path = build(CHECKPOINT, "Q4_K_M")
    world = calm(Pad("red", "disc", 0.8, -0.6, 0.5, 0.3), Pad("blue", "square", -1.5, 1.5, 0.5, 1.0), wind_m_s=1.0)
    mission = [("Land on the red disc.", Order("land", "red", "disc"))]
    with (
        benchmark.pilot(bundle, "onnxruntime") as link,
        mavlink_bridge.bridge_process(link.client.folder, "ardupilot") as vehicle,
    ):
        (result,) = fly_mavlink(PatientLink(link), vehicle, world, mission)
        sources = {item.source for item in vehicle.driver.received}
    assert result.outcome == "right", result
    assert vehicle.counts.landings == 1 and vehicle.counts.followed >= 2 and sources == {(1, 191)}
