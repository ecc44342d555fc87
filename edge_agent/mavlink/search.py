"""The action `search`: on in the direction of the last move, then a square spiral; back up to the highest place.

A target is lost from sight when the vehicle tilts, or flies low: then it is ahead, and more is seen from higher up.

>>> search = Search(speed_m_s=0.5)
>>> search.velocity(place)                              # toward the next corner
Velocity(forward_m_s=0.5, ...)
"""

from __future__ import annotations

import math

from edge_agent.mavlink.autopilot import Place
from edge_agent.mavlink.setpoint import Velocity, to_body, to_local

LEG_M = 3.0  # the spiral's first side; every second side is longer by it
MAX_LEGS = 24
REACHED_M = 0.8
MIN_MOVE_M_S = 0.05  # a slower move has no direction


class Search:
    """Where the search is. reset() when another action was followed: the next search begins where the vehicle is.
    forget() when the pilot took over."""

    def __init__(self, speed_m_s: float, radius_m: float) -> None:
        """radius_m: corners that are farther from home are moved toward home."""
        self._speed_m_s, self._radius_m = speed_m_s, radius_m
        self._corners: list[tuple[float, float]] = []  # north and east of home, the next one first
        self._last_move: tuple[float, float] | None = None  # its direction, north and east
        self._top_up_m = -math.inf

    def reset(self) -> None:
        self._corners = []

    def forget(self) -> None:
        self._corners, self._last_move, self._top_up_m = [], None, -math.inf

    def note_move(self, place: Place, move: Velocity) -> None:
        """A move is followed from here."""
        self._top_up_m = max(self._top_up_m, place.up_m)
        speed_m_s = math.hypot(move.forward_m_s, move.right_m_s)
        if speed_m_s > MIN_MOVE_M_S:
            self._last_move = to_local(place.yaw_rad, move.forward_m_s / speed_m_s, move.right_m_s / speed_m_s)

    def velocity(self, place: Place) -> Velocity:
        """Toward the next corner, and up if it was higher before; zero when the search is finished."""
        self._top_up_m = max(self._top_up_m, place.up_m)
        if not self._corners:
            self._corners = self._plan(place)
        away = self._away(place)
        while math.hypot(*away) < REACHED_M and len(self._corners) > 1:
            self._corners.pop(0)
            away = self._away(place)
        distance_m = math.hypot(*away)
        down_m_s = -min(self._top_up_m - place.up_m, self._speed_m_s)
        if distance_m < REACHED_M:
            return Velocity(down_m_s=down_m_s)
        speed_m_s = self._speed_m_s * min(1.0, distance_m)  # slower within the last metre
        forward, right = to_body(place.yaw_rad, away[0] / distance_m * speed_m_s, away[1] / distance_m * speed_m_s)
        return Velocity(forward, right, down_m_s)

    def _away(self, place: Place) -> tuple[float, float]:
        north_m, east_m = self._corners[0]
        return north_m - place.north_m, east_m - place.east_m

    def _plan(self, place: Place) -> list[tuple[float, float]]:
        corners, corner, heading = [], (place.north_m, place.east_m), (1.0, 0.0)
        if self._last_move is not None:
            corner = self._inside(corner[0] + self._last_move[0] * LEG_M, corner[1] + self._last_move[1] * LEG_M)
            corners.append(corner)
        for leg in range(MAX_LEGS):
            length_m = LEG_M * (leg // 2 + 1)
            corner = corner[0] + heading[0] * length_m, corner[1] + heading[1] * length_m
            heading = (-heading[1], heading[0])
            corners.append(self._inside(*corner))
        return corners

    def _inside(self, north_m: float, east_m: float) -> tuple[float, float]:
        """The point, or the one on the way home that is inside the radius."""
        distance_m = math.hypot(north_m, east_m)
        share = min(1.0, self._radius_m / distance_m) if distance_m else 1.0
        return north_m * share, east_m * share
