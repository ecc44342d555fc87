"""Signs and frames on the wire, against pymavlink's own decoder and against what both autopilots do with a packet."""

from __future__ import annotations

import math
import struct

import pytest

from edge_agent.mavlink.dialect import mavlink
from edge_agent.mavlink.setpoint import (
    HOLD,
    Position,
    Setpoint,
    Velocity,
    encode,
    line,
    to_body,
    to_local,
    toward_zero,
)
from edge_agent.time_units import NS_PER_MS
from tests.harness.mavlink_rig import Rig

YAW_0, EAST, SOUTH = 0.0, math.pi / 2, math.pi


def over_the_wire(setpoint: Setpoint):
    """Packed and decoded as a receiver does it."""
    sender, receiver = mavlink.MAVLink(None, 1, 191), mavlink.MAVLink(None)
    (message,) = receiver.parse_buffer(encode(setpoint, 5 * 2**32 * NS_PER_MS, 1, 1).pack(sender))
    return message


def as_autopilot(message, yaw_rad: float) -> tuple[float, float, float, float]:
    """North, east and down velocity and yaw rate, as PX4 and ArduCopter read the packet: a turn by the yaw alone."""
    assert message.coordinate_frame == mavlink.MAV_FRAME_BODY_NED
    cos, sin = math.cos(yaw_rad), math.sin(yaw_rad)
    return message.vx * cos - message.vy * sin, message.vx * sin + message.vy * cos, message.vz, message.yaw_rate


@pytest.mark.parametrize(
    ("values", "yaw_rad", "north_east_down_yaw"),
    [
        ({"forward_m_s": 1.0}, YAW_0, (1, 0, 0, 0)),
        ({"forward_m_s": 1.0}, EAST, (0, 1, 0, 0)),
        ({"forward_m_s": 1.0}, SOUTH, (-1, 0, 0, 0)),
        ({"right_m_s": 1.0}, YAW_0, (0, 1, 0, 0)),
        ({"right_m_s": 1.0}, EAST, (-1, 0, 0, 0)),
        ({"right_m_s": -1.0}, YAW_0, (0, -1, 0, 0)),
        ({"down_m_s": 1.0}, EAST, (0, 0, 1, 0)),
        ({"down_m_s": -1.0}, YAW_0, (0, 0, -1, 0)),
        ({"yaw_rate_rad_s": 0.5}, EAST, (0, 0, 0, 0.5)),  # clockwise from above: positive about down
        ({"yaw_rate_rad_s": -0.5}, YAW_0, (0, 0, 0, -0.5)),
    ],
)
def test_a_move_keeps_its_signs(values, yaw_rad, north_east_down_yaw):
    rig = Rig()
    rig.clock.advance(0.05)
    rig.move_to(yaw=yaw_rad)
    rig.take(values=values)
    message = over_the_wire(rig.outbox.sent[0].setpoint)
    assert as_autopilot(message, yaw_rad) == pytest.approx(north_east_down_yaw, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "yaw_rad", "north_east_down"),
    [
        ((5, 0, 0), YAW_0, (5, 0, -10)),
        ((5, 0, 0), EAST, (0, 5, -10)),
        ((0, 5, 0), YAW_0, (0, 5, -10)),
        ((0, 5, 0), SOUTH, (0, -5, -10)),
        ((0, 0, 2), EAST, (0, 0, -8)),
        ((0, 0, -2), YAW_0, (0, 0, -12)),
    ],
)
def test_a_waypoint_keeps_its_signs(values, yaw_rad, north_east_down):
    rig = Rig()
    for _ in range(3):
        rig.clock.advance(0.05)
        rig.move_to(yaw=yaw_rad)
    rig.take("waypoint", dict(zip(("forward_m", "right_m", "down_m"), values, strict=True)))
    message = over_the_wire(rig.outbox.sent[0].setpoint)
    assert message.coordinate_frame == mavlink.MAV_FRAME_LOCAL_NED
    assert (message.x, message.y, message.z) == pytest.approx(north_east_down, abs=1e-5)
    assert math.remainder(message.yaw - yaw_rad, math.tau) == pytest.approx(0, abs=1e-5)


# Which groups of fields PX4 and ArduCopter use: by the bits of the mask, 1 means ignore.
BITS = {"position": 0b111, "velocity": 0b111 << 3, "acceleration": 0b111 << 6, "force": 1 << 9, "yaw": 1 << 10,
        "yaw rate": 1 << 11}  # fmt: skip


@pytest.mark.parametrize(
    ("setpoint", "used"),
    [
        (HOLD, {"velocity", "yaw rate"}),
        (Setpoint("move", Velocity(1, 2, 3, 4)), {"velocity", "yaw rate"}),
        (Setpoint("waypoint", Position(1, 2, 3, 0.5)), {"position", "yaw"}),
    ],
)
def test_the_mask_ignores_all_that_is_not_meant(setpoint, used):
    message = over_the_wire(setpoint)
    groups = {name for name, bits in BITS.items() if not message.type_mask & bits} - {"force"}
    assert groups == used
    assert not message.type_mask & BITS["force"]
    assert all(message.type_mask & bits in (0, bits) for bits in BITS.values())  # a whole group or none of it
    assert (message.target_system, message.target_component) == (1, 1)


def test_hold_is_zero_velocity_and_zero_yaw_rate():
    message = over_the_wire(HOLD)
    assert as_autopilot(message, EAST) == (0, 0, 0, 0)
    assert {getattr(message, name) for name in ("x", "y", "z", "afx", "afy", "afz", "yaw")} == {0}


@pytest.mark.parametrize("number", [0.1, -0.1, 2.0, 0.8, -1e-45, 1e-300, 0.0, 3.3333333, 16777217.0])
def test_rounding_for_the_wire_never_makes_a_number_larger(number):
    rounded = toward_zero(number)
    assert struct.unpack("<f", struct.pack("<f", rounded))[0] == rounded
    assert abs(rounded) <= abs(number)
    assert rounded == pytest.approx(number, rel=2e-7, abs=1e-44)


def test_the_turns_are_each_others_opposite():
    for yaw in (0.3, 1.9, -2.7):
        assert to_body(yaw, *to_local(yaw, 0.7, -0.4)) == pytest.approx((0.7, -0.4))


def test_lines_for_rehearse():
    assert line(HOLD) == "hold"
    assert line(Setpoint("move", Velocity(toward_zero(0.123), 0.0, -0.5, 0.25))) == (
        "move forward_m_s=0.123 right_m_s=0 down_m_s=-0.5 yaw_rate_rad_s=0.25"
    )
