"""The limits and the last check. Every velocity that leaves them stays inside, whatever goes in."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.mavlink.autopilot import Place
from edge_agent.mavlink.config import Fence, Limits
from edge_agent.mavlink.envelope import (
    limit_change,
    limit_speeds,
    rounded,
    why_not_on_the_wire,
    why_not_velocity,
    why_outside,
)
from edge_agent.mavlink.setpoint import HOLD, Position, Setpoint, Velocity
from edge_agent.time_units import NS_PER_S

NUMBER = st.floats(-1e6, 1e6)
VELOCITY = st.builds(Velocity, NUMBER, NUMBER, NUMBER, NUMBER)
LIMITS = Limits(speed_m_s=1.7, up_m_s=0.9, down_m_s=0.6, yaw_rate_rad_s=0.3, acceleration_m_s2=3.0)


@given(VELOCITY, st.none() | VELOCITY, st.floats(0, 10), VELOCITY)
def test_whatever_is_asked_stays_inside(wanted, last, step_s, measured):
    slower, _ = limit_speeds(wanted, LIMITS)
    final, _ = limit_change(slower, last, step_s, measured, LIMITS.acceleration_m_s2)
    final = rounded(final)
    assert why_not_on_the_wire(Setpoint("move", final), LIMITS) == ""
    assert math.hypot(final.forward_m_s, final.right_m_s) <= LIMITS.speed_m_s * (1 + 1e-12)
    assert -LIMITS.up_m_s <= final.down_m_s <= LIMITS.down_m_s and abs(final.yaw_rate_rad_s) <= LIMITS.yaw_rate_rad_s
    for asked, sent in zip(wanted, final, strict=True):  # never another direction, never faster than asked
        assert sent * asked >= 0 and abs(sent) <= abs(asked)


SLOW = st.builds(Velocity, *[st.floats(-3, 3)] * 3, st.just(0.0))


@given(SLOW, SLOW, st.floats(0, 2))
def test_the_change_is_at_most_the_acceleration_or_a_braking(wanted, last, step_s):
    final, is_changed = limit_change(wanted, last, step_s, last, 2.0)
    change = math.dist(final[:3], last[:3])
    assert is_changed == (final != wanted) or final == pytest.approx(wanted)
    if change > 2.0 * min(step_s, 1.0) + 1e-9:  # then nothing along the wanted direction was nearer
        size = math.hypot(*wanted[:3])
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            assert math.dist([share * x for x in wanted[:3]], last[:3]) >= change - 1e-6 * size


def test_the_direction_is_kept_when_a_speed_is_reduced():
    slower, reduced = limit_speeds(Velocity(3.0, 4.0), Limits(speed_m_s=1.0))
    assert slower[:2] == pytest.approx((0.6, 0.8)) and reduced == ["speed_m_s"]


def test_within_the_limits_nothing_changes():
    asked = Velocity(1.0, -0.5, 0.5, -0.2)
    assert limit_speeds(asked, LIMITS) == (asked, [])
    assert limit_change(asked, asked, 0.0, asked, 1.0) == (asked, False)


def test_a_start_from_rest_grows_with_the_time():
    assert limit_change(Velocity(2.0), Velocity(), 0.1, Velocity(), 5.0) == (Velocity(0.5, 0, 0, 0), True)
    assert limit_change(Velocity(2.0), None, 0.0, Velocity(), 5.0) == (Velocity(2.0), False)
    assert limit_change(Velocity(2.0), None, 0.0, Velocity(-4.0), 5.0)[0].forward_m_s == pytest.approx(1.0)


def test_a_turn_back_stops_first():
    assert limit_change(Velocity(-2.0), Velocity(2.0), 0.1, Velocity(2.0), 5.0)[0][:3] == (0, 0, 0)


# -- the fence --------------------------------------------------------------------------------------------------------

FENCE = Fence(min_altitude_m=2, max_altitude_m=20, radius_m=10)


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ((0, 0, 2), ""),
        ((0, 0, 20), ""),
        ((6, 8, 10), ""),
        ((0, 0, 1.99), "below 2 m"),
        ((0, 0, 20.01), "above 20 m"),
        ((-6.01, 8, 10), "more than 10 m from home"),
    ],
)
def test_the_sides_of_the_fence(place, why):
    assert why_outside(*place, FENCE) == why


def test_old_telemetry_is_carried_on_by_its_velocity():
    """0.4 s ago it was 9.9 m away, and flew on with 1 m/s."""
    place = Place(0, 9.9, 0, 10, 1.0, 0, 0, 0)
    assert why_not_velocity(Velocity(), place, NS_PER_S * 4 // 10, NS_PER_S, FENCE).startswith("fence: more than")


def test_a_vehicle_that_was_outside_is_not_inside_because_it_flies_back():
    place = Place(0, 10.1, 0, 10, -1.0, 0, 0, 0)
    assert why_not_velocity(Velocity(), place, NS_PER_S * 4 // 10, NS_PER_S, FENCE).startswith("fence: more than")


def test_the_way_is_as_long_as_the_action_stands():
    place = Place(0, 9.0, 0, 10, 0, 0, 0, 0)
    assert why_not_velocity(Velocity(1.0), place, 0, NS_PER_S // 2, FENCE) == ""  # 0.5 m, and 0.25 m to stop
    assert why_not_velocity(Velocity(1.0), place, 0, NS_PER_S, FENCE).startswith("fence ahead: more than")


# -- the last check ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (Velocity(math.nan), "a number that is not finite"),
        (Velocity(0, 0, 0, math.inf), "a number that is not finite"),
        (Velocity(1e39), "a number that does not fit a float32"),
        (Velocity(0.1), "a number that is not rounded for the wire"),
        (Velocity(2.5), "a velocity outside the limits"),
        (Velocity(1.5, 1.5), "a velocity outside the limits"),
        (Velocity(0, 0, 1.5), "a velocity outside the limits"),
        (Velocity(0, 0, -1.5), "a velocity outside the limits"),
        (Velocity(0, 0, 0, -1.0), "a velocity outside the limits"),
        (Position(0, math.nan, 0, 0), "a number that is not finite"),
        (Position(1.0, 2.0, -3.0, 0.5), ""),
        (HOLD.target, ""),
    ],
)
def test_the_last_check(target, why):
    assert why_not_on_the_wire(Setpoint("move", target), Limits()) == why
