"""The examples are started and rehearsed as the controllers that they are: every scenario, with our own client."""

from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from edge_agent.client.chunk_player import ChunkStep
from edge_agent.rehearsal import SCENARIOS, rehearse
from examples import follow_gimbal
from examples.follow_gimbal import Angles, Waypoint
from tests.harness import ROOT

AT_ONCE = 6  # scenarios that are played at the same time: most of their time is waiting


@pytest.mark.parametrize(("name", "space"), [("controller.py", "velocity_body"), ("follow_gimbal.py", "waypoint")])
def test_an_example_passes_every_scenario(monkeypatch, name, space):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, str(ROOT / "examples" / name), "--runtime-dir", "{dir}"]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(lambda scenario: rehearse(scenario, command, space=space), SCENARIOS))
    assert {result.scenario: result.faults for result in results} == {scenario: [] for scenario in SCENARIOS}


# -- the gimbal -------------------------------------------------------------------------------------------------------

AHEAD = Angles(0.0, 0.0)


@pytest.mark.parametrize(
    ("waypoint", "angles"),
    [
        ((10.0, 0.0, 0.0), (0.0, 0.0)),
        ((10.0, 10.0, 0.0), (0.0, math.pi / 4)),  # to the right: clockwise
        ((10.0, -10.0, 0.0), (0.0, -math.pi / 4)),
        ((10.0, 0.0, 10.0), (-math.pi / 4, 0.0)),  # below: pitch is negative
        ((10.0, 0.0, -10.0), (0.3, 0.0)),  # above, as far as the gimbal goes
        ((0.0, 0.0, 5.0), (-math.pi / 2, 0.0)),  # straight below: the yaw stays
        ((-10.0, 0.1, 0.0), (0.0, 2.7)),  # behind, as far as the gimbal goes
        ((-10.0, -0.1, 0.0), (0.0, -2.7)),
    ],
)
def test_the_camera_looks_at_the_waypoint(waypoint, angles):
    assert follow_gimbal.angles_to(Waypoint(*waypoint, "slow"), AHEAD) == pytest.approx(angles)


@pytest.mark.parametrize(
    ("waypoint", "yaw_rad", "speed_m_s"),
    [
        ((4.0, 0.0, 2.0, "normal"), 0.0, 0.2),
        ((20.0, 0.0, 2.0, "normal"), 0.0, 1.0),
        ((20.0, 0.0, 2.0, "slow"), 0.0, 0.5),
        ((3.0, 0.0, 2.0, "normal"), 0.0, 0.0),
        ((1.0, 0.0, 2.0, "normal"), 0.0, 0.0),  # never backwards
        ((20.0, 0.0, 2.0, "normal"), 0.5, 0.0),  # the camera still looks to the side
        ((5.0, 5.0, 2.0, "normal"), 0.0, 0.0),  # the target is at the side
        ((-20.0, 0.0, 2.0, "normal"), 0.0, 0.0),  # behind
    ],
)
def test_the_speed_falls_with_the_distance_and_is_zero_where_the_camera_does_not_look(waypoint, yaw_rad, speed_m_s):
    assert follow_gimbal.speed_to(Waypoint(*waypoint), Angles(0.0, yaw_rad)) == pytest.approx(speed_m_s)


@pytest.mark.parametrize(("seconds", "yaw_rad"), [(0.05, 0.03), (0.1, 0.06), (10.0, 0.06)])
def test_the_gimbal_turns_at_a_limited_rate_also_after_a_stall(seconds, yaw_rad):
    assert follow_gimbal.turned(AHEAD, Angles(0.0, 1.0), seconds) == pytest.approx((0.0, yaw_rad))
    assert follow_gimbal.turned(AHEAD, Angles(0.0, -0.01), seconds) == pytest.approx((0.0, -0.01))


COMPLETE = {"forward_m": 1.0, "right_m": 0.0, "down_m": 0.0, "pace": "slow"}


@pytest.mark.parametrize(
    "step",
    [
        None,
        ChunkStep(0, "land", {}),
        ChunkStep(0, "drive", COMPLETE),
        ChunkStep(0, "waypoint", COMPLETE | {"pace": "fast"}),
        ChunkStep(0, "waypoint", COMPLETE | {"down_m": "0.5"}),
        ChunkStep(0, "waypoint", {"forward_m": 1.0, "right_m": 0.0, "pace": "slow"}),
    ],
)
def test_what_is_no_complete_waypoint_moves_nothing(step):
    assert follow_gimbal.waypoint_of(step) is None
    assert follow_gimbal.waypoint_of(ChunkStep(0, "waypoint", COMPLETE)) == Waypoint(**COMPLETE)
