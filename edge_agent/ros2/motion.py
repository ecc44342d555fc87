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
PACES = ("slow", "normal")  # has no place in a PoseStamped; it stands on the topic of actions
VELOCITY, WAYPOINT = (*VELOCITY_FIELDS,), (*WAYPOINT_FIELDS, "pace")
# Action space -> action type -> the names of all its values. PROTOCOL.md has the same table.
SPACES: dict[str, dict[str, tuple[str, ...]]] = {
    "velocity_body": {"move": VELOCITY, "search": (), "hold": (), "land": ()},
    "velocity_body_action_tokens": {"move": VELOCITY, "search": (), "hold": (), "land": ()},
    "waypoint": {"waypoint": WAYPOINT, "land": (), "hold": (), "search": ()},
}
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


class OwnSpace(NamedTuple):
    """An action space that is not one of ours: a type of it has all of these values, or none."""

    name: str
    values: tuple[str, ...]

    def mistake(self) -> str:
        """What is wrong with it, in one line; "": nothing."""
        if not self.name:
            return "values: expected action_space too" if self.values else ""
        if self.name in SPACES:
            return f"action_space: {self.name} needs no parameter; expected the name of an action space of your own"
        if self.values and (set(self.values) <= set(VELOCITY) or set(self.values) <= set(WAYPOINT_FIELDS)):
            return ""
        found = ",".join(self.values)
        return f"values: expected some of {','.join(VELOCITY)}, or some of {','.join(WAYPOINT_FIELDS)}; found {found!r}"


NO_SPACE = OwnSpace("", ())


def motion_of(
    space: str, action_type: str, values: Mapping[str, ActionValue], own: OwnSpace
) -> Velocity | Waypoint | None:
    """None: a type without values, such as hold, search and land. An axis that an own action space does not have is 0.

    Raises NotUsable: nothing is guessed about what is not known here, and nothing is 0 because it is missing.
    """
    for name in (action_type, *values, *(value for value in values.values() if isinstance(value, str))):
        if not _NAME.fullmatch(name):
            raise NotUsable(f"expected names of letters, digits and _ . + -, found {name[:64]!r}")
    if space not in SPACES and space != own.name:
        raise NotUsable(f"expected an action space that is known here, found {space[:64]!r}")
    expected = (own.values if values else ()) if space == own.name else SPACES[space].get(action_type)
    if expected is None:
        raise NotUsable(f"{space}: expected one of the types {', '.join(SPACES[space])}, found {action_type}")
    if values.keys() != set(expected):
        found = ", ".join(sorted(values)) or "no values"
        raise NotUsable(f"{action_type}: expected {', '.join(expected) or 'no values'}; found {found}")
    if "pace" in values and values["pace"] not in PACES:
        raise NotUsable(f"pace: expected one of {', '.join(PACES)}, found {values['pace']!r}")
    if not values:
        return None
    if values.keys() <= VELOCITY_FIELDS.keys():
        return Velocity(*(_number(values, name, factor) for name, (_, factor) in VELOCITY_FIELDS.items()))
    return Waypoint(*(_number(values, name, factor) for name, (_, factor) in WAYPOINT_FIELDS.items()))


def _number(values: Mapping[str, ActionValue], name: str, factor: float) -> float:
    value = values.get(name, 0.0)  # 0: an axis that the own action space does not have
    if isinstance(value, bool) or not isinstance(value, float | int) or not math.isfinite(value):
        raise NotUsable(f"{name}: expected a finite number, found {value!r}")
    return factor * value + 0.0  # + 0.0: no -0.0


def line_of(action_type: str, values: Mapping[str, ActionValue]) -> str:
    """An action as one line of text: `move forward_m_s=0.25 right_m_s=0`."""
    pairs = (f"{name}={value}" if isinstance(value, str) else f"{name}={value:.9g}" for name, value in values.items())
    return " ".join((action_type, *pairs))
