"""The bridge's own limits, whatever the daemon has checked: speeds, yaw rate, rate of change, and a fence.

Pure functions. A speed or a rate that is too large is reduced, and the reduction has a name. A setpoint that leads out
of the fence is not sent at all.

    >>> reduced, what = limit_speeds(Velocity(forward_m_s=9.0), Limits())
    >>> reduced.forward_m_s, what
    (2.0, ['speed_m_s'])
"""

from __future__ import annotations

import math

from edge_agent.mavlink.autopilot import Place
from edge_agent.mavlink.config import Fence, Limits
from edge_agent.mavlink.setpoint import Position, Setpoint, Velocity, to_local, toward_zero
from edge_agent.time_units import NS_PER_S

BRAKING_M_S2 = 2.0  # what both autopilots reach with their parameters as delivered
RESPONSE_S = 1.0  # in this time an autopilot reaches a velocity


def limit_speeds(wanted: Velocity, limits: Limits) -> tuple[Velocity, list[str]]:
    """The velocity within the limits, and the names of the limits that reduced it."""
    reduced: list[str] = []
    forward, right, down, yaw_rate = wanted
    speed = math.hypot(forward, right)
    if speed > limits.speed_m_s:
        forward, right = forward / speed * limits.speed_m_s, right / speed * limits.speed_m_s
        reduced.append("speed_m_s")
    if down > limits.down_m_s:
        down = limits.down_m_s
        reduced.append("down_m_s")
    if -down > limits.up_m_s:
        down = -limits.up_m_s
        reduced.append("up_m_s")
    if abs(yaw_rate) > limits.yaw_rate_rad_s:
        yaw_rate = math.copysign(limits.yaw_rate_rad_s, yaw_rate)
        reduced.append("yaw_rate_rad_s")
    return Velocity(forward, right, down, yaw_rate), reduced


def limit_change(
    wanted: Velocity, last: Velocity | None, step_s: float, measured: Velocity, acceleration_m_s2: float
) -> tuple[Velocity, bool]:
    """The velocity slowed down until it differs no more from an earlier setpoint, and from the measured velocity, than
    the acceleration allows. Returns whether it was changed.

    Only its length changes: the vehicle never flies in a direction that nobody asked for, or faster than was asked.
    So braking is not limited; nor is hold. last: the earlier setpoint, step_s before; None: it was no velocity."""
    share = _share(wanted, measured, acceleration_m_s2 * RESPONSE_S)
    if last is not None:
        share = min(share, _share(wanted, last, acceleration_m_s2 * min(step_s, RESPONSE_S)))
    if share == 1.0:
        return wanted, False
    forward, right, down = (number * share for number in wanted[:3])
    return Velocity(forward, right, down, wanted.yaw_rate_rad_s), True


def _share(wanted: Velocity, start: Velocity, max_change_m_s: float) -> float:
    """The largest share of the wanted velocity, 0 to 1, that is so near to start; if none is, the nearest."""
    square = sum(number * number for number in wanted[:3])
    if math.dist(wanted[:3], start[:3]) <= max_change_m_s or not square:
        return 1.0
    nearest = sum(a * b for a, b in zip(wanted[:3], start[:3], strict=True)) / square
    off_square = sum((nearest * a - b) ** 2 for a, b in zip(wanted[:3], start[:3], strict=True))
    beyond = math.sqrt(max(0.0, max_change_m_s**2 - off_square) / square)
    return min(1.0, max(0.0, nearest + beyond))


def rounded(velocity: Velocity) -> Velocity:
    """As float32, toward zero: no limit is passed on the wire by rounding."""
    return Velocity(*(toward_zero(number) for number in velocity))


# -- fence ------------------------------------------------------------------------------------------------------------


def why_outside(north_m: float, east_m: float, up_m: float, fence: Fence) -> str:
    """Which side of the fence the point is beyond; "": it is inside."""
    if up_m > fence.max_altitude_m:
        return f"above {fence.max_altitude_m:g} m"
    if up_m < fence.min_altitude_m:
        return f"below {fence.min_altitude_m:g} m"
    if math.hypot(north_m, east_m) > fence.radius_m:
        return f"more than {fence.radius_m:g} m from home"
    return ""


def why_not_velocity(target: Velocity, place: Place, now_ns: int, until_ns: int, fence: Fence) -> str:
    """Why a velocity must not be flown until until_ns; "": vehicle and way stay inside the fence.

    Looked at: the place now, where the present motion can be stopped, and where this one can be. Both autopilots turn
    a velocity into the local frame when it arrives, so a yaw rate does not bend the way."""
    age_s = max(0, now_ns - place.t_ns) / NS_PER_S
    motion = (place.north_m_s, place.east_m_s, -place.down_m_s)
    here = (place.north_m + motion[0] * age_s, place.east_m + motion[1] * age_s, place.up_m + motion[2] * age_s)
    if why := why_outside(place.north_m, place.east_m, place.up_m, fence) or why_outside(*here, fence):
        return f"fence: {why}"
    if why := why_outside(*_stopped(here, motion), fence):
        return f"fence ahead: {why}"
    north_m_s, east_m_s = to_local(place.yaw_rad, target.forward_m_s, target.right_m_s)
    velocity = (north_m_s, east_m_s, -target.down_m_s)
    flown_s = max(0, until_ns - now_ns) / NS_PER_S
    ahead = [here[i] + velocity[i] * flown_s for i in range(3)]
    if why := why_outside(*_stopped((ahead[0], ahead[1], ahead[2]), velocity), fence):
        return f"fence ahead: {why}"
    return ""


def _stopped(place: tuple[float, float, float], velocity: tuple[float, float, float]) -> tuple[float, float, float]:
    """Where a vehicle is when it has braked."""
    horizontal_m_s = math.hypot(velocity[0], velocity[1])
    way_s = horizontal_m_s / (2 * BRAKING_M_S2)
    climb_s = abs(velocity[2]) / (2 * BRAKING_M_S2)
    return place[0] + velocity[0] * way_s, place[1] + velocity[1] * way_s, place[2] + velocity[2] * climb_s


def why_not_position(target: Position, here: Position, place: Place, fence: Fence) -> str:
    """Why a position of the local frame must not be flown to; "": it is inside. A straight way to it is, too.

    here: the vehicle in the local frame, at the time of place."""
    point = (
        place.north_m + target.north_m - here.north_m,
        place.east_m + target.east_m - here.east_m,
        place.up_m + here.down_m - target.down_m,
    )
    around = (place.north_m, place.east_m, place.up_m)
    if why := why_outside(*around, fence):
        return f"fence: {why}"
    if why := why_outside(*_stopped(around, (place.north_m_s, place.east_m_s, -place.down_m_s)), fence):
        return f"fence ahead: {why}"
    why = why_outside(*point, fence)
    return f"fence ahead: {why}" if why else ""


# -- the last check ---------------------------------------------------------------------------------------------------


def why_not_on_the_wire(setpoint: Setpoint, limits: Limits) -> str:
    """The last check before a setpoint is packed: its numbers as they are on the wire. "": it may be sent."""
    target = setpoint.target
    try:
        sent = [toward_zero(number) for number in target]
    except (OverflowError, TypeError):
        return "a number that does not fit a float32"
    if not all(map(math.isfinite, sent)):
        return "a number that is not finite"
    if isinstance(target, Position):
        return ""
    velocity = Velocity(*sent)
    if velocity != target:
        return "a number that is not rounded for the wire"
    if limit_speeds(velocity, _with_margin(limits))[1]:
        return "a velocity outside the limits"
    return ""


def _with_margin(limits: Limits) -> Limits:
    """hypot of two float32 can be larger than the limit by the last bit of a float64."""
    return Limits(
        limits.speed_m_s * (1 + 1e-12),
        limits.up_m_s,
        limits.down_m_s,
        limits.yaw_rate_rad_s,
        limits.acceleration_m_s2,
    )
