"""The values of an action -> a velocity or a waypoint in the axes of ROS (REP 103: x forward, y left, z up). Pure.

On the wire the axes are forward, right, down, and the yaw rate is clockwise from above: the last three change sign.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from edge_agent.wire.messages import ActionValue

# Value on the wire -> the field of the ROS message that it becomes, and its factor. docs/ros2.md has the same table.
VELOCITY_FIELDS = {
    "forward_m_s": ("linear.x", 1.0),
    "right_m_s": ("linear.y", -1.0),
    "down_m_s": ("linear.z", -1.0),
    "yaw_rate_rad_s": ("angular.z", -1.0),
}
WAYPOINT_FIELDS = {
    "forward_m": ("position.x", 1.0),
    "right_m": ("position.y", -1.0),
    "down_m": ("position.z", -1.0),
}
WAYPOINT_WORDS = {"pace"}  # has no place in a PoseStamped; it stands on the topic of actions
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")  # of an action type, a value and a word: no line can hold two


class Velocity(NamedTuple):
    """geometry_msgs/Twist."""

    x_m_s: float = 0.0
    y_m_s: float = 0.0
    z_m_s: float = 0.0
    yaw_rad_s: float = 0.0  # counter-clockwise from above


class Waypoint(NamedTuple):
    """The position of geometry_msgs/Pose, from where the vehicle was when the image was taken."""

    x_m: float = 0.0
    y_m: float = 0.0
    z_m: float = 0.0


class NotUsable(ValueError):
    """An action that this node cannot carry out. One line."""


def motion_of(action_type: str, values: Mapping[str, ActionValue]) -> Velocity | Waypoint | None:
    """None: a type without values, such as hold, search and land. An axis that the action space does not have is 0.

    Raises NotUsable: nothing is guessed about a value that is not known here.
    """
    for name in (action_type, *values, *(value for value in values.values() if isinstance(value, str))):
        if not _NAME.fullmatch(name):
            raise NotUsable(f"expected names of letters, digits and _ . + -, found {name[:64]!r}")
    if not values:
        return None
    if values.keys() <= VELOCITY_FIELDS.keys():
        return Velocity(*(_number(values, name, factor) for name, (_, factor) in VELOCITY_FIELDS.items()))
    if values.keys() <= WAYPOINT_FIELDS.keys() | WAYPOINT_WORDS and values.keys() & WAYPOINT_FIELDS.keys():
        return Waypoint(*(_number(values, name, factor) for name, (_, factor) in WAYPOINT_FIELDS.items()))
    known = f"all of {', '.join(VELOCITY_FIELDS)}, or of {', '.join(WAYPOINT_FIELDS)}, pace"
    raise NotUsable(f"{action_type}: found the values {', '.join(sorted(values))}; expected some or {known}")


def _number(values: Mapping[str, ActionValue], name: str, factor: float) -> float:
    value = values.get(name, 0.0)
    if not isinstance(value, float | int) or not math.isfinite(value):
        raise NotUsable(f"{name}: expected a finite number, found {value!r}")
    return factor * value + 0.0  # + 0.0: no -0.0


def line_of(action_type: str, values: Mapping[str, ActionValue]) -> str:
    """An action as one line of text: `move forward_m_s=0.25 right_m_s=0`."""
    pairs = (f"{name}={value}" if isinstance(value, str) else f"{name}={value:.9g}" for name, value in values.items())
    return " ".join((action_type, *pairs))
