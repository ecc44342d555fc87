"""The simulated world, against the differential equation that it integrates. Flights by the rule, without a model."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.pad_pilot import task
from models.pad_pilot.lessons import PAD_RADIUS_M, Grounds
from models.pad_pilot.scene import Pad, sights
from models.pad_pilot.task import Order
from models.pad_pilot.world import (
    DRAG_PER_S,
    G_M_S2,
    GUST_TIME_S,
    LAG_S,
    MAX_ACCELERATION_M_S2,
    MAX_PAD_OFFSET_M,
    World,
    random_pads,
)

pytestmark = pytest.mark.filterwarnings("error")

GROUNDS = Grounds([], 7, 2)
# Velocity follows v' = (set_point - v) / LAG + DRAG (wind - v). This is a first-order lag with these two constants.
RATE_PER_S = 1 / LAG_S + DRAG_PER_S
SPEED_SHARE = 1 / (1 + LAG_S * DRAG_PER_S)  # share of the set-point that is reached in still air: 95 %


def calm(seed: int = 0, yaw_rad: float = 0.0) -> World:
    """A world without wind."""
    world = World(seed, GROUNDS, wind_m_s=0.0)
    world.yaw_rad = yaw_rad
    return world


# -- velocity ---------------------------------------------------------------------------------------------------------


def test_velocity_follows_the_set_point_with_its_lag():
    """Against the closed form v (1 - e^-kt). The set-point is small: the limit of acceleration is not reached."""
    assert 0.8 / LAG_S < MAX_ACCELERATION_M_S2
    world = calm()
    start = world.position_m.copy()
    for n in range(1, 31):
        world.fly(0.8, 0, 0, 0, 0.1)
        t = n * 0.1
        settled = 1 - math.exp(-RATE_PER_S * t)
        assert world.velocity_m_s == pytest.approx((0.8 * SPEED_SHARE * settled, 0, 0), abs=0.01)
        north = 0.8 * SPEED_SHARE * (t - settled / RATE_PER_S)
        assert world.position_m - start == pytest.approx((north, 0, 0), abs=0.02)
    assert world.time_s == pytest.approx(3.0)


def test_wind_does_not_change_the_vertical_speed():
    """There is no vertical drag, so the vehicle reaches the whole speed of the set-point."""
    world = World(1, GROUNDS, wind_m_s=8.0)
    world.fly(0, 0, -0.5, 0, LAG_S)
    assert world.velocity_m_s[2] == pytest.approx(0.5 * (1 - math.exp(-1)), abs=0.02)
    world.fly(0, 0, -0.5, 0, 5)
    assert world.velocity_m_s[2] == pytest.approx(0.5, abs=1e-3)
    before_m = world.position_m[2]
    world.fly(0, 0, 0.5, 0, 4)
    assert world.position_m[2] < before_m - 1


def test_the_acceleration_is_limited():
    world = calm()
    speeds = [0.0]
    for _ in range(40):
        world.fly(2, 0, 0, 0, 0.02)
        speeds.append(world.velocity_m_s[0])
    rises = np.diff(speeds) / 0.02
    assert rises.max() == pytest.approx(MAX_ACCELERATION_M_S2) and rises[0] == rises.max() and rises[-1] < 2


@pytest.mark.parametrize(
    ("yaw_rad", "forward", "right", "north", "east"),
    [
        (0, 1, 0, 1, 0),
        (0, 0, 1, 0, 1),
        (math.pi / 2, 1, 0, 0, 1),  # facing east
        (math.pi / 2, 0, 1, -1, 0),
        (math.pi, 1, 0, -1, 0),
        (-math.pi / 2, 1, 0, 0, -1),
        (math.pi / 6, 1, 0, 0.8660, 0.5),
        (math.pi / 6, 0, -1, 0.5, -0.8660),
    ],
)
def test_set_points_are_in_the_body_frame(yaw_rad, forward, right, north, east):
    world = calm(yaw_rad=yaw_rad)
    world.fly(forward, right, 0, 0, 4)
    assert world.velocity_m_s == pytest.approx((north * SPEED_SHARE, east * SPEED_SHARE, 0), abs=1e-3)


def test_yaw_turns_clockwise_at_the_rate_of_the_set_point():
    world = calm(yaw_rad=1.0)
    world.fly(0, 0, 0, 0.4, 2.5)
    assert world.yaw_rad == pytest.approx(2.0) and world.pose.yaw_rad == world.yaw_rad
    before = sights(world.pads, world.pose)
    world.fly(0, 0, 0, 0.5, 0.02)
    for was, now in zip(before, sights(world.pads, world.pose), strict=True):  # turning right, pads move to the left
        assert was.right * now.down - was.down * now.right < 0


def test_many_short_flights_are_the_same_as_one_long_flight():
    """For any duration of a piece: a part of a tick is flown in the next call. It is not rounded."""
    at_once = World(9, GROUNDS)
    at_once.fly(0.6, -0.2, 0.1, 0.3, 6.0)
    assert at_once.time_s == pytest.approx(6.0)
    for n, piece_s in ((1200, 0.005), (1000, 0.006), (600, 0.01), (200, 0.03), (181, 6 / 181), (24, 0.25)):
        world = World(9, GROUNDS)
        for _ in range(n):
            world.fly(0.6, -0.2, 0.1, 0.3, piece_s)
        assert world.pose == at_once.pose and world.time_s == at_once.time_s, piece_s


def test_less_than_a_tick_moves_nothing_yet():
    world = calm()
    before = world.pose
    world.fly(1, 0, 0, 0.5, 0.0)
    world.fly(1, 0, 0, 0.5, 0.019)
    assert world.pose == before and world.time_s == 0
    world.fly(1, 0, 0, 0.5, 0.002)
    assert world.pose != before and world.time_s == pytest.approx(0.02)


# -- wind -------------------------------------------------------------------------------------------------------------


def test_without_wind_a_hovering_vehicle_does_not_move():
    world = calm(3)
    before = world.pose
    world.fly(0, 0, 0, 0, 10)
    assert world.pose == before and not world.is_landed and world.time_s == 10


def test_wind_drifts_the_vehicle_downwind():
    """A steady wind of 3 m/s: DRAG (wind - v) against v / LAG leaves 3 * 0.0525 / 1.0525, 15 cm/s."""
    world = calm()
    world.wind_mean_m_s = np.array([0.0, 3.0])
    world.fly(0, 0, 0, 0, 4)
    drift_m_s = 3 * LAG_S * DRAG_PER_S * SPEED_SHARE
    assert drift_m_s == pytest.approx(0.15, abs=0.01)
    assert world.velocity_m_s == pytest.approx((0, drift_m_s, 0), abs=1e-3)
    # It tilts into the wind, which comes from the left: left side down, so that the thrust balances the drag.
    assert world.tilt_rad == pytest.approx((-math.atan2(drift_m_s / LAG_S, G_M_S2), 0), abs=1e-3)


def test_wind_has_the_given_limit_and_gusts_are_half_of_the_wind():
    winds = [World(seed, GROUNDS, wind_m_s=4.0) for seed in range(200)]
    speeds = np.array([np.hypot(*w.wind_mean_m_s) for w in winds])
    assert speeds.max() <= 4 and speeds.mean() == pytest.approx(2, abs=0.3)
    assert [w.gust_std_m_s for w in winds] == pytest.approx(speeds / 2)
    angles = np.array([math.atan2(*w.wind_mean_m_s) for w in winds])
    assert all((angles > low).sum() > 20 for low in (-3, 0, 2)) and (angles < -2).sum() > 20  # from all sides


def test_gusts_come_and_go():
    """Over a long time they have the standard deviation of the world. Within half a second they change little."""
    world = calm()
    world.gust_std_m_s, gusts = 2.0, []
    world.position_m[2] = 1000.0
    for _ in range(800):
        world.fly(0, 0, 0, 0, 0.5)
        gusts.append(world._gust_m_s.copy())
    gusts = np.array(gusts)
    assert gusts.std(0) == pytest.approx([2, 2], rel=0.12)
    assert np.corrcoef(gusts[1:, 0], gusts[:-1, 0])[0, 1] == pytest.approx(math.exp(-0.5 / GUST_TIME_S), abs=0.07)


# -- tilt -------------------------------------------------------------------------------------------------------------


def below(world: World) -> Pad:
    return Pad("red", "disc", *world.position_m[:2], 0.5, 0.0)


@pytest.mark.parametrize("yaw_rad", [0.0, 2.0, -1.0])
@pytest.mark.parametrize(
    ("forward", "right", "where"),
    [
        (1, 0, (0, -1)),  # nose down: the camera points back, so the pad below is at the top of the picture
        (-1, 0, (0, 1)),
        (0, 1, (1, 0)),  # right side down: the camera points to the left, so the pad below is on the right
        (0, -1, (-1, 0)),
    ],
)
def test_acceleration_tilts_the_vehicle_and_moves_the_picture(yaw_rad, forward, right, where):
    world = calm(yaw_rad=yaw_rad)
    world.fly(forward, right, 0, 0, 0.2)
    roll, pitch = world.tilt_rad
    assert np.sign(np.round([-pitch, roll], 9)).tolist() == [forward, right]
    assert max(abs(roll), abs(pitch)) < math.atan2(MAX_ACCELERATION_M_S2, G_M_S2)
    (sight,) = sights([below(world)], world.pose)
    off = math.hypot(sight.right, sight.down)
    assert off > 0.1 and (sight.right / off, sight.down / off) == pytest.approx(where, abs=1e-6)


def test_braking_tilts_the_vehicle_back_and_then_it_is_level():
    world = calm()
    world.fly(1.5, 0, 0, 0, 3)
    world.fly(0, 0, 0, 0, 0.2)
    assert world.tilt_rad[1] > 0.1  # nose up
    world.fly(0, 0, 0, 0, 5)
    assert world.tilt_rad == pytest.approx((0, 0), abs=1e-3)


def test_the_tilt_at_full_acceleration_follows_from_physics():
    """The thrust is along the vertical body axis. It carries the weight and gives the acceleration a: atan(a / g)."""
    world = calm()
    for _ in range(100):
        world.velocity_m_s[:] = 0  # so that the acceleration stays at its limit
        world.fly(2, 0, 0, 0, 0.02)
    assert world.tilt_rad == pytest.approx((0, -math.atan(3.0 / 9.81)), abs=1e-3)


# -- landing ----------------------------------------------------------------------------------------------------------


def test_landing_ends_on_the_ground_and_the_vehicle_stays_there():
    world = World(2, GROUNDS)
    world.fly(0.3, 0, 0.7, 0, 5)
    assert not world.is_landed and 0.5 < world.position_m[2] < 2
    world.fly(0.3, 0, 0.7, 0, 10)
    assert world.is_landed and 0 <= world.position_m[2] <= 0.1 and not world.velocity_m_s.any()
    position_m = world.position_m.copy()
    world.fly(1, 1, -1, 0.5, 5)
    assert (world.position_m == position_m).all() and world.is_landed
    assert world.time_s == pytest.approx(20)  # the time still advances
    assert world.picture().shape == (140, 140, 3)  # from a height of five centimetres


# -- a world ----------------------------------------------------------------------------------------------------------


def flight(seed: int) -> list[tuple]:
    world = World(seed, GROUNDS)
    poses = [world.pose]
    for n in range(10):
        world.fly(0.5 * math.sin(n), 0.3, 0.1, 0.05, 0.5)
        poses.append(tuple(map(float, world.pose)))
    return [*poses, *world.pads, world.light, world.picture().tobytes()]


def test_the_same_seed_gives_the_same_flight():
    first, same, other = flight(5), flight(5), flight(6)
    assert first == same
    assert not any(a == b for a, b in zip(first, other, strict=True))


def test_taking_pictures_does_not_change_a_flight():
    """The number and the size of the pictures do not matter: the gusts use another random generator."""
    observed, unobserved = World(7, GROUNDS), World(7, GROUNDS)
    observed.light = unobserved.light = observed.light._replace(noise=8.0, motion_blur_px=3)  # both draw numbers
    for n in range(6):
        for size_px in ((140, 140), (126, 168))[: n % 3]:
            observed.picture(size_px)
        for world in (observed, unobserved):
            world.fly(0.4, 0.1, 0, 0.1, 0.5)
        assert observed.pose == unobserved.pose
    assert observed.gust_std_m_s > 0
    assert not np.array_equal(observed.picture(), observed.picture())  # noise is new each time


def test_a_picture_shows_the_ground_below_the_vehicle():
    """The pad below the vehicle is in the middle of the picture, for each size of the picture."""
    world = calm(4)
    plain = {"gain": (1, 1, 1), "gamma": 1.0, "noise": 0, "jpeg_quality": 0, "shadow": None, "motion_blur_px": 0}
    world.light = world.light._replace(**plain)
    disc = next((pad for pad in world.pads if pad.shape != "ring"), None)
    world.pads = [disc._replace(colour="red")]
    world.position_m[:] = disc.north_m, disc.east_m, 3.0
    for size_px in ((140, 140), (126, 168), (280, 280)):
        picture = world.picture(size_px)
        red, green, blue = picture[size_px[0] // 2, size_px[1] // 2].astype(int)
        assert picture.shape == (*size_px, 3) and picture.dtype == np.uint8 and red > 2 * max(green, blue)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 8))
def test_random_pads_do_not_touch_and_are_of_different_kinds(seed, n):
    pads = random_pads(np.random.default_rng(seed), n)
    assert len(pads) == n == len({(pad.colour, pad.shape) for pad in pads})
    for pad in pads:
        assert max(abs(pad.north_m), abs(pad.east_m)) <= MAX_PAD_OFFSET_M
        assert PAD_RADIUS_M[0] <= pad.radius_m <= PAD_RADIUS_M[1]
    for a, b in itertools.combinations(pads, 2):
        assert math.hypot(a.north_m - b.north_m, a.east_m - b.east_m) > a.radius_m + b.radius_m


def test_every_kind_of_pad_is_in_some_world():
    rng = np.random.default_rng(1)
    assert len({(pad.colour, pad.shape) for _ in range(60) for pad in random_pads(rng, 5)}) == 20


def test_objects_do_not_touch_the_pads():
    worlds = [World(seed, GROUNDS) for seed in range(40)]
    pairs = [(item[0], pad) for world in worlds for item in world.objects for pad in world.pads]
    assert len(pairs) > 100
    assert all(np.hypot(*(outline - (pad.north_m, pad.east_m)).T).min() > pad.radius_m for outline, pad in pairs)


def test_offset_and_nearest():
    world = calm()
    world.pads = [Pad("red", "disc", 3.0, 4.0, 0.5, 0.0), Pad("blue", "ring", -1.0, 0.0, 0.5, 0.0)]
    world.position_m[:] = 0, 0, 5
    assert world.offset_m(world.pads[0]) == 5 and world.nearest() is world.pads[1]
    world.position_m[:2] = 3, 3
    assert world.offset_m(world.pads[0]) == 1 and world.nearest() is world.pads[0]


# -- flights by the rule ----------------------------------------------------------------------------------------------


def flown_by_the_rule(seed: int, kind: str) -> tuple[str, float, int] | None:
    """A flight to the nearest pad, with the action of the rule every half second.

    Returns how it ended, the distance from the centre of the pad in radii, and the number of steps. None: the pad is
    not in the first picture; the rule does not search.
    """
    world = World(seed, GROUNDS)
    target = world.nearest()
    order, action, n_holds = Order(kind, target.colour, target.shape), {"action": "hold"}, 0
    if not any(s.pad == target and task.is_in_picture(s) for s in sights(world.pads, world.pose)):
        return None
    for n_steps in range(1, 60):
        # In a band, where two actions are right, the previous action continues.
        action = task.action(order, sights(world.pads, world.pose)) or action
        n_holds = n_holds + 1 if action["action"] == "hold" else 0
        if n_holds == 2:
            return "hold", world.offset_m(target) / target.radius_m, n_steps
        if action["action"] == "land":
            world.fly(0, 0, 0.7, 0, 5)
            return "land" if world.is_landed else "in the air", world.offset_m(target) / target.radius_m, n_steps
        world.fly(*(action.get(key, 0.0) for key in ("vx", "vy", "vz", "yaw")), 0.5)
    return "lost", world.offset_m(target) / target.radius_m, n_steps


@pytest.mark.parametrize(("kind", "how"), [("land", "land"), ("goto", "hold")])
def test_the_rule_alone_reaches_its_pad_in_any_wind(kind, how):
    """A model learns this rule. In the last metre of a landing no picture is used, and a gust can move the vehicle."""
    ends = [end for seed in range(60) if (end := flown_by_the_rule(seed, kind))]
    assert len(ends) > 40 and np.median([n for *_, n in ends]) < 25
    assert np.mean([end == how and off < 1 for end, off, _ in ends]) > 0.9, ends
    assert np.mean([end == how and off < 2 for end, off, _ in ends]) > 0.97, ends
