"""Values of the wire -> the axes of ROS. What rclpy makes of them is in test_node.py."""

from __future__ import annotations

import math

import pytest
import yaml

from edge_agent.ros2.motion import NO_SPACE, SPACES, NotUsable, OwnSpace, Velocity, Waypoint, line_of, motion_of
from tests.harness import ROOT

REST = {"forward_m_s": 0.0, "right_m_s": 0.0, "down_m_s": 0.0, "yaw_rate_rad_s": 0.0}
HERE = {"forward_m": 0.0, "right_m": 0.0, "down_m": 0.0, "pace": "normal"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"forward_m_s": 0.5}, Velocity(x_m_s=0.5)),
        ({"right_m_s": 0.5}, Velocity(y_m_s=-0.5)),
        ({"down_m_s": 0.5}, Velocity(z_m_s=-0.5)),
        ({"yaw_rate_rad_s": 0.5}, Velocity(yaw_rad_s=-0.5)),
        ({"forward_m_s": 1, "right_m_s": -2.0, "down_m_s": 3.0, "yaw_rate_rad_s": -4.0}, Velocity(1, 2, -3, 4)),
    ],
)
def test_an_axis_of_a_velocity_and_its_sign(values, expected):
    assert motion_of("velocity_body", "move", REST | values, NO_SPACE) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"forward_m": 0.5, "pace": "slow"}, Waypoint(x_m=0.5)),
        ({"right_m": 0.5}, Waypoint(y_m=-0.5)),
        ({"down_m": 0.5}, Waypoint(z_m=-0.5)),
    ],
)
def test_an_axis_of_a_waypoint_and_its_sign(values, expected):
    assert motion_of("waypoint", "waypoint", HERE | values, NO_SPACE) == expected


def test_zero_has_no_sign():
    found = motion_of("velocity_body", "move", REST, NO_SPACE)
    assert found is not None and [math.copysign(1, value) for value in found] == [1, 1, 1, 1]


@pytest.mark.parametrize("space", SPACES)
def test_the_table_is_that_of_the_action_space(space):
    content = yaml.safe_load((ROOT / f"edge_agent/actions/spaces/{space}.yaml").read_text())
    fields = {name: (row or {}).get("fields", {}) for name, row in content["actions"].items()}
    names = {name: {field.get("name", key) for key, field in row.items()} for name, row in fields.items()}
    assert names == {name: set(values) for name, values in SPACES[space].items()}
    for action_type, values in SPACES[space].items():
        if not values:
            assert motion_of(space, action_type, {}, NO_SPACE) is None


def without(values: dict, name: str) -> dict:
    return {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize(
    ("space", "action_type", "values"),
    [
        *(("velocity_body", "move", without(REST, name)) for name in REST),
        *(("waypoint", "waypoint", without(HERE, name)) for name in HERE),
        ("velocity_body", "move", {}),
        ("velocity_body", "move", REST | {"boost": 2.0}),
        ("velocity_body", "hold", {"forward_m_s": 1.0}),
        ("velocity_body", "drive", REST),
        ("velocity_body", "drive", {}),
        ("velocity_body", "waypoint", HERE),
        ("rover", "move", REST),
        ("", "move", REST),
        ("velocity_body", "move", REST | {"forward_m_s": "fast"}),
        ("velocity_body", "move", REST | {"forward_m_s": True}),
        ("velocity_body", "move", REST | {"forward_m_s": math.nan}),
        ("velocity_body", "move", REST | {"forward_m_s": -math.inf}),
        ("waypoint", "waypoint", HERE | {"pace": "fast"}),
        ("waypoint", "waypoint", HERE | {"pace": 1.0}),
        ("waypoint", "waypoint", HERE | {"pace": "slow right_m=9"}),
        ("velocity_body", "hold\n@1 move", {}),
        ("velocity_body", "", {}),
    ],
)
def test_nothing_is_guessed(space, action_type, values):
    with pytest.raises(NotUsable, match="expected"):
        motion_of(space, action_type, values, NO_SPACE)


def test_an_action_space_of_ones_own():
    rover = OwnSpace("rover", ("forward_m_s", "yaw_rate_rad_s"))
    assert motion_of("rover", "drive", {"forward_m_s": 1.0, "yaw_rate_rad_s": 0.5}, rover) == Velocity(1, 0, 0, -0.5)
    assert motion_of("rover", "stop", {}, rover) is None
    assert motion_of("velocity_body", "move", REST, rover) == Velocity()
    for values in ({"forward_m_s": 1.0}, REST, {"speed_m_s": 1.0}):
        with pytest.raises(NotUsable, match="drive: expected forward_m_s, yaw_rate_rad_s"):
            motion_of("rover", "drive", values, rover)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("", (), ""),
        ("rover", ("forward_m_s", "yaw_rate_rad_s"), ""),
        ("arm", ("forward_m",), ""),
        ("", ("forward_m_s",), "expected action_space too"),
        ("rover", (), "found ''"),
        ("rover", ("forward_m_s", "forward_m"), "found 'forward_m_s,forward_m'"),
        ("waypoint", ("forward_m",), "needs no parameter"),
    ],
)
def test_a_mistake_in_the_parameters(name, values, expected):
    found = OwnSpace(name, values).mistake()
    assert expected in found and bool(found) == bool(expected)


def test_a_line():
    assert line_of("move", {"forward_m_s": 0.25, "right_m_s": 0.0}) == "move forward_m_s=0.25 right_m_s=0"
    assert line_of("waypoint", {"forward_m": -3.125, "pace": "slow"}) == "waypoint forward_m=-3.125 pace=slow"
    assert line_of("land", {}) == "land"
