"""The action `search`: a square spiral around the place where the search began, at one height.

>>> search = Search(speed_m_s=0.5)
>>> search.velocity(place)                              # toward the next corner
Velocity(forward_m_s=0.5, ...)
"""

from __future__ import annotations

import math

from edge_agent.mavlink.autopilot import Place
from edge_agent.mavlink.setpoint import Velocity, to_body

LEG_M = 3.0  # the spiral's first side; every second side is longer by it
MAX_LEGS = 24
REACHED_M = 0.8


class Search:
    """Where the spiral is. reset() when another action was followed: the next search begins where the vehicle is."""

    def __init__(self, speed_m_s: float, radius_m: float) -> None:
        """radius_m: of the fence; corners outside of it are moved onto its edge."""
        self._speed_m_s, self._radius_m = speed_m_s, radius_m
        self._corners: list[tuple[float, float]] = []  # north and east of home, the next one first

    def reset(self) -> None:
        self._corners = []

    def velocity(self, place: Place) -> Velocity:
        """Toward the next corner; zero when the spiral is finished."""
        if not self._corners:
            self._corners = _spiral(place.north_m, place.east_m, 0.8 * self._radius_m)
        away = self._away(place)
        while math.hypot(*away) < REACHED_M and len(self._corners) > 1:
            self._corners.pop(0)
            away = self._away(place)
        distance_m = math.hypot(*away)
        if distance_m < REACHED_M:
            return Velocity()
        speed_m_s = self._speed_m_s * min(1.0, distance_m)  # slower within the last metre
        forward, right = to_body(place.yaw_rad, away[0] / distance_m * speed_m_s, away[1] / distance_m * speed_m_s)
        return Velocity(forward, right)

    def _away(self, place: Place) -> tuple[float, float]:
        north_m, east_m = self._corners[0]
        return north_m - place.north_m, east_m - place.east_m


def _spiral(north_m: float, east_m: float, radius_m: float) -> list[tuple[float, float]]:
    corners, heading = [], (1.0, 0.0)
    for leg in range(MAX_LEGS):
        length_m = LEG_M * (leg // 2 + 1)
        north_m, east_m = north_m + heading[0] * length_m, east_m + heading[1] * length_m
        heading = (-heading[1], heading[0])
        distance_m = math.hypot(north_m, east_m)
        share = min(1.0, radius_m / distance_m) if distance_m else 1.0
        corners.append((north_m * share, east_m * share))
    return corners
