"""Values of the wire -> the axes of ROS. What rclpy makes of them is in test_node.py."""

from __future__ import annotations

import math

import pytest

from edge_agent.ros2.motion import NotUsable, Velocity, Waypoint, line_of, motion_of


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"forward_m_s": 0.5}, Velocity(x_m_s=0.5)),
        ({"right_m_s": 0.5}, Velocity(y_m_s=-0.5)),
        ({"down_m_s": 0.5}, Velocity(z_m_s=-0.5)),
        ({"yaw_rate_rad_s": 0.5}, Velocity(yaw_rad_s=-0.5)),
        ({"forward_m_s": 1, "right_m_s": -2.0, "down_m_s": 3.0, "yaw_rate_rad_s": -4.0}, Velocity(1, 2, -3, 4)),
        ({"forward_m": 0.5, "pace": "slow"}, Waypoint(x_m=0.5)),
        ({"right_m": 0.5}, Waypoint(y_m=-0.5)),
        ({"down_m": 0.5, "pace": "normal"}, Waypoint(z_m=-0.5)),
        ({}, None),
    ],
)
def test_an_axis_and_its_sign(values, expected):
    assert motion_of("move", values) == expected


def test_zero_has_no_sign():
    found = motion_of("move", {"forward_m_s": 0.0, "right_m_s": 0.0, "down_m_s": 0.0, "yaw_rate_rad_s": 0.0})
    assert found is not None and [math.copysign(1, value) for value in found] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("action_type", "values"),
    [
        ("drive", {"speed_m_s": 1.0}),
        ("move", {"forward_m_s": 1.0, "boost": 2.0}),
        ("move", {"forward_m_s": 1.0, "forward_m": 1.0}),
        ("move", {"forward_m_s": "fast"}),
        ("move", {"forward_m_s": math.nan}),
        ("move", {"forward_m_s": math.inf}),
        ("waypoint", {"pace": "slow"}),
        ("hold\n@1 move", {}),
        ("", {}),
        ("waypoint", {"forward_m": 1.0, "pace": "slow right_m=9"}),
    ],
)
def test_nothing_is_guessed(action_type, values):
    with pytest.raises(NotUsable, match="expected"):
        motion_of(action_type, values)


def test_a_line():
    assert line_of("move", {"forward_m_s": 0.25, "right_m_s": 0.0}) == "move forward_m_s=0.25 right_m_s=0"
    assert line_of("waypoint", {"forward_m": -3.125, "pace": "slow"}) == "waypoint forward_m=-3.125 pace=slow"
    assert line_of("land", {}) == "land"
