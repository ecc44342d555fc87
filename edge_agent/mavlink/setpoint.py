"""Setpoints: what is put on the wire, and the turns between the body frame and the local frame.

Both frames of MAVLink have their third axis down. Body: forward, right, down; PX4 and ArduPilot turn it by the yaw
alone, so "forward" is level. Local: north, east, down. A yaw rate is positive clockwise from above. These are also the
signs of the action spaces, so nothing changes its sign on the way.

    >>> round(to_local(math.pi / 2, 1.0, 0.0)[1], 6)        # the nose points east: forward is east
    1.0
"""

from __future__ import annotations

import math
import struct
from typing import Any, Literal, NamedTuple

from edge_agent.mavlink.dialect import mavlink
from edge_agent.time_units import NS_PER_MS

FLOAT32 = struct.Struct("<f")
BITS32 = struct.Struct("<I")
_IGNORE_POSITION = (
    mavlink.POSITION_TARGET_TYPEMASK_X_IGNORE
    | mavlink.POSITION_TARGET_TYPEMASK_Y_IGNORE
    | mavlink.POSITION_TARGET_TYPEMASK_Z_IGNORE
)
_IGNORE_VELOCITY = (
    mavlink.POSITION_TARGET_TYPEMASK_VX_IGNORE
    | mavlink.POSITION_TARGET_TYPEMASK_VY_IGNORE
    | mavlink.POSITION_TARGET_TYPEMASK_VZ_IGNORE
)
_IGNORE_ACCELERATION = (
    mavlink.POSITION_TARGET_TYPEMASK_AX_IGNORE
    | mavlink.POSITION_TARGET_TYPEMASK_AY_IGNORE
    | mavlink.POSITION_TARGET_TYPEMASK_AZ_IGNORE
)
# Which fields count, by kind of setpoint. ArduPilot takes all three parts of a group or none.
VELOCITY_MASK = _IGNORE_POSITION | _IGNORE_ACCELERATION | mavlink.POSITION_TARGET_TYPEMASK_YAW_IGNORE  # 1479
POSITION_MASK = _IGNORE_VELOCITY | _IGNORE_ACCELERATION | mavlink.POSITION_TARGET_TYPEMASK_YAW_RATE_IGNORE  # 2552
MAX_BOOT_MS = 2**32


class Velocity(NamedTuple):
    """Body frame. Every number is finite and fits a float32 exactly once the envelope has seen it."""

    forward_m_s: float = 0.0
    right_m_s: float = 0.0
    down_m_s: float = 0.0
    yaw_rate_rad_s: float = 0.0


class Position(NamedTuple):
    """Local frame of the autopilot: from its origin."""

    north_m: float
    east_m: float
    down_m: float
    yaw_rad: float


class Setpoint(NamedTuple):
    """One message SET_POSITION_TARGET_LOCAL_NED. type: the action type that it carries out, or "hold"."""

    type: Literal["move", "search", "waypoint", "hold"]
    target: Velocity | Position


HOLD = Setpoint("hold", Velocity())


def encode(setpoint: Setpoint, now_ns: int, system: int, component: int) -> Any:
    """The message of pymavlink. now_ns: CLOCK_MONOTONIC; neither PX4 nor ArduPilot reads time_boot_ms."""
    boot_ms = now_ns // NS_PER_MS % MAX_BOOT_MS
    target = setpoint.target
    if isinstance(target, Position):
        return mavlink.MAVLink_set_position_target_local_ned_message(
            boot_ms, system, component, mavlink.MAV_FRAME_LOCAL_NED, POSITION_MASK,
            target.north_m, target.east_m, target.down_m, 0, 0, 0, 0, 0, 0, target.yaw_rad, 0,
        )  # fmt: skip
    return mavlink.MAVLink_set_position_target_local_ned_message(
        boot_ms, system, component, mavlink.MAV_FRAME_BODY_NED, VELOCITY_MASK,
        0, 0, 0, target.forward_m_s, target.right_m_s, target.down_m_s, 0, 0, 0, 0, target.yaw_rate_rad_s,
    )  # fmt: skip


def line(setpoint: Setpoint) -> str:
    """For people and for rehearse: "move forward_m_s=0.25 right_m_s=0 ...". Six digits: a float32 has no more."""
    if setpoint.type == "hold":
        return "hold"
    values = setpoint.target._asdict()
    return " ".join([setpoint.type, *(f"{name}={value:.6g}" for name, value in values.items())])


def to_local(yaw_rad: float, forward: float, right: float) -> tuple[float, float]:
    """North and east of a vector of the body frame."""
    cos, sin = math.cos(yaw_rad), math.sin(yaw_rad)
    return forward * cos - right * sin, forward * sin + right * cos


def to_body(yaw_rad: float, north: float, east: float) -> tuple[float, float]:
    """Forward and right of a vector of the local frame."""
    cos, sin = math.cos(yaw_rad), math.sin(yaw_rad)
    return north * cos + east * sin, -north * sin + east * cos


def toward_zero(number: float) -> float:
    """The nearest float32 that is not larger in size. A limit then still holds on the wire. Raises OverflowError."""
    (nearest,) = FLOAT32.unpack(FLOAT32.pack(number))
    if abs(nearest) <= abs(number):
        return float(nearest)
    (bits,) = BITS32.unpack(FLOAT32.pack(nearest))
    return float(FLOAT32.unpack(BITS32.pack(bits - 1))[0])  # sign and size are apart: one less is nearer to zero
