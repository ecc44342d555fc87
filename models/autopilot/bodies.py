"""What an autopilot flies in a simulation: a thing with a position that follows a velocity.

Axes are NED: north, east, down. Angles are radians, clockwise from above for yaw.
"""

from __future__ import annotations

import math
from typing import Protocol

Vector = tuple[float, float, float]
ORIGIN_LAT_DEG, ORIGIN_LON_DEG, ORIGIN_ALT_M = 47.397742, 8.545594, 488.0  # of every position; PX4's simulation


class Body(Protocol):
    """position_m, velocity_m_s: north, east, down from the origin."""

    @property
    def position_m(self) -> Vector: ...
    @property
    def velocity_m_s(self) -> Vector: ...
    @property
    def attitude_rad(self) -> Vector: ...  # roll, pitch, yaw
    @property
    def is_landed(self) -> bool: ...
    def fly(self, velocity_m_s: Vector, yaw_rate_rad_s: float, seconds: float) -> None: ...


class PointMass:
    """Follows a velocity with a lag and a limited acceleration. The ground is at 0 m."""

    LAG_S, MAX_ACCELERATION_M_S2, TICK_S = 0.3, 4.0, 0.01

    def __init__(self, height_m: float = 0.0, yaw_rad: float = 0.0) -> None:
        self.position_m: Vector = (0.0, 0.0, -height_m)
        self.velocity_m_s: Vector = (0.0, 0.0, 0.0)
        self.attitude_rad: Vector = (0.0, 0.0, yaw_rad)

    @property
    def is_landed(self) -> bool:
        return self.position_m[2] >= 0

    def fly(self, velocity_m_s: Vector, yaw_rate_rad_s: float, seconds: float) -> None:
        n_ticks = max(1, math.ceil(seconds / self.TICK_S))
        tick_s, limit = seconds / n_ticks, self.MAX_ACCELERATION_M_S2
        for _ in range(n_ticks):
            wanted = [(target - now) / self.LAG_S for target, now in zip(velocity_m_s, self.velocity_m_s, strict=True)]
            north, east, down = (
                now + min(max(a, -limit), limit) * tick_s for a, now in zip(wanted, self.velocity_m_s, strict=True)
            )
            position = [p + v * tick_s for p, v in zip(self.position_m, (north, east, down), strict=True)]
            if position[2] >= 0:  # on the ground
                position[2], north, east, down = 0.0, 0.0, 0.0, min(0.0, down)
            self.velocity_m_s, self.position_m = (north, east, down), (position[0], position[1], position[2])
            yaw_rad = self.attitude_rad[2] + yaw_rate_rad_s * tick_s
            self.attitude_rad = (0.0, 0.0, math.remainder(yaw_rad, 2 * math.pi))
