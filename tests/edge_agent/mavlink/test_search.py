"""The search: where it goes first, how far, and that it climbs back and never descends."""

from __future__ import annotations

import math

import pytest

from edge_agent.mavlink.autopilot import Place
from edge_agent.mavlink.search import LEG_M, Search
from edge_agent.mavlink.setpoint import Velocity, to_local

SPEED_M_S, RADIUS_M = 1.0, 10.0


def place(north_m: float = 0.0, east_m: float = 0.0, up_m: float = 5.0, yaw_rad: float = 0.0) -> Place:
    return Place(0, north_m, east_m, up_m, 0.0, 0.0, 0.0, yaw_rad)


def flown(search: Search, start: Place, steps: int) -> list[Place]:
    """The places of a vehicle that follows every velocity for half a second."""
    places = [start]
    for _ in range(steps):
        here = places[-1]
        wanted = search.velocity(here)
        north, east = to_local(here.yaw_rad, wanted.forward_m_s, wanted.right_m_s)
        places.append(
            here._replace(
                north_m=here.north_m + north / 2, east_m=here.east_m + east / 2, up_m=here.up_m - wanted.down_m_s / 2
            )
        )
    return places


@pytest.mark.parametrize("yaw_rad", [0.0, 1.0, math.pi])
def test_it_begins_in_the_direction_of_the_last_move(yaw_rad):
    search = Search(SPEED_M_S, RADIUS_M)
    search.note_move(place(yaw_rad=yaw_rad), Velocity(forward_m_s=0.0, right_m_s=0.5))
    search.note_move(place(yaw_rad=yaw_rad), Velocity(forward_m_s=0.01, down_m_s=0.3))  # too slow for a direction
    for here in flown(search, place(yaw_rad=yaw_rad), 3)[:3]:
        wanted = search.velocity(here)
        assert wanted.right_m_s == pytest.approx(SPEED_M_S) and abs(wanted.forward_m_s) < 1e-9
    search.forget()
    assert to_local(yaw_rad, *search.velocity(place(yaw_rad=yaw_rad))[:2]) == pytest.approx((SPEED_M_S, 0.0))


def test_it_climbs_to_where_a_move_was_followed_and_never_descends():
    search = Search(SPEED_M_S, RADIUS_M)
    search.note_move(place(up_m=6.0), Velocity(down_m_s=0.5))
    search.note_move(place(up_m=2.0), Velocity(down_m_s=0.5))
    heights_m = [here.up_m for here in flown(search, place(up_m=2.0), 20)]
    assert heights_m == sorted(heights_m) and heights_m[-1] == pytest.approx(6.0, abs=0.01)
    assert search.velocity(place(up_m=7.0)).down_m_s == 0.0
    search.forget()
    assert search.velocity(place(up_m=2.0)).down_m_s == 0.0


@pytest.mark.parametrize("start", [(0.0, 0.0), (6.0, -3.0), (-7.9, 0.0)])
def test_it_covers_its_circle_and_stays_inside(start):
    places = flown(Search(SPEED_M_S, RADIUS_M), place(*start), 1200)
    assert max(math.hypot(here.north_m, here.east_m) for here in places) <= RADIUS_M + 0.5
    quarters = {(here.north_m > LEG_M / 2, here.east_m > LEG_M / 2) for here in places}
    assert len(quarters) == 4
    assert places[-1] == places[-2], "it ends"
