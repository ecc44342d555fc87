"""What the follower makes of an action: landing, search, waypoints, limits and fence."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest

from edge_agent.mavlink.config import BridgeConfig, Fence, Limits
from edge_agent.mavlink.modes import ARDUPILOT, PX4
from edge_agent.mavlink.setpoint import Position, Velocity
from edge_agent.time_units import NS_PER_S
from tests.harness.mavlink_rig import DISARMED, POSCTL, Rig

FORWARD = {"forward_m_s": 0.25}


@pytest.fixture(params=[PX4, ARDUPILOT], ids=["px4", "ardupilot"])
def rig(request) -> Rig:
    return Rig(kind=request.param)


# -- land, search, waypoint -------------------------------------------------------------------------------------------


def landing(kind: int) -> Rig:
    return Rig(BridgeConfig(land=True), kind)


@pytest.mark.parametrize("kind", [PX4, ARDUPILOT])
def test_land_stops_the_vehicle_and_asks_once(kind):
    rig = landing(kind)
    rig.take(values=FORWARD)
    rig.take("land")
    assert rig.sent == ["move", "hold"] and rig.outbox.lands == []  # the pilot may have changed the mode meanwhile
    rig.pass_time(0.1)
    rig.take("land")
    assert len(rig.outbox.lands) == 1
    rig.take("land")  # under way
    assert len(rig.outbox.lands) == 1
    rig.pass_time(1.1)
    rig.take("land")
    assert len(rig.outbox.lands) == 2


@pytest.mark.parametrize(
    "change",
    [lambda rig: rig.heartbeat(DISARMED), lambda rig: rig.heartbeat(mode=POSCTL), lambda rig: rig.move_to(east=60)],
    ids=["disarmed", "mode", "outside"],
)
def test_land_is_not_asked_for_when_the_bridge_may_not_fly(change):
    rig = landing(PX4)
    rig.clock.advance(0.05)
    change(rig)
    rig.take("land")
    assert rig.outbox.lands == [] and rig.sent == ["hold"]


def test_land_is_allowed_below_the_fence():
    rig = landing(PX4)
    rig.clock.advance(0.05)
    rig.move_to(up=0.3)
    rig.take("land")
    rig.clock.advance(0.05)
    rig.heartbeat()
    rig.follower.turn()
    rig.take("land")
    assert len(rig.outbox.lands) == 1 and rig.follower.is_following


@pytest.mark.parametrize(
    "between",
    [
        lambda rig: None,  # no HEARTBEAT since the first one
        lambda rig: (rig.heartbeat(), rig.clock.advance(0.6), rig.move_to()),  # an old one
        lambda rig: (rig.heartbeat(), rig.take(values=FORWARD)),  # the model has changed its mind
        lambda rig: (rig.heartbeat(mode=POSCTL), rig.heartbeat()),  # the pilot flew
        lambda rig: rig.pass_time(4.0),  # another landing
    ],
    ids=["none", "old", "another action", "the pilot", "long ago"],
)
def test_land_needs_a_heartbeat_after_the_first_land(between):
    """MAV_CMD_NAV_LAND is obeyed in every mode: the pilot's last word must be known."""
    rig = landing(PX4)
    rig.clock.advance(0.05)
    rig.take("land")
    rig.clock.advance(0.05)
    between(rig)
    rig.take("land")
    assert rig.outbox.lands == []


def test_search_flies_a_spiral_one_setpoint_for_each_action():
    rig = Rig(BridgeConfig(search_m_s=0.5))
    rig.take("search")
    (sent,) = rig.outbox.sent
    assert sent.setpoint.type == "search" and math.hypot(*sent.setpoint.target[:2]) == pytest.approx(0.5)
    rig.pass_time(0.3)
    assert rig.sent == ["search"]


@pytest.mark.parametrize(
    ("search_radius_m", "fence_m", "has_turned"),
    [(6.0, 50.0, True), (100.0, 7.5, True), (100.0, 50.0, False)],
    ids=["its own circle", "0.8 of the fence", "room"],
)
def test_the_search_turns_at_its_circle(search_radius_m, fence_m, has_turned):
    """The spiral begins 3 m to the north; that is 2.4 m outside of a circle of 6 m."""
    rig = Rig(BridgeConfig(search_m_s=1.0, search_radius_m=search_radius_m, fence=Fence(1.0, 30.0, fence_m)))
    rig.clock.advance(0.05)
    rig.move_to(north=5.4)
    rig.take("search")
    north_m_s, east_m_s, *_ = rig.outbox.sent[-1].setpoint.target
    assert (abs(east_m_s) > abs(north_m_s)) == has_turned


def test_a_waypoint_is_relative_to_the_pose_of_its_image(rig):
    """The vehicle flew on and turned since then."""
    rig.clock.advance(0.05)
    image_ns = rig.clock.now_ns
    rig.move_to(north=1, east=2, up=10, yaw=math.pi / 2)
    for i in range(1, 5):
        rig.clock.advance(0.05)
        rig.move_to(north=1 + i, east=2, up=11, yaw=math.pi / 2 + i / 10)
    action = rig.action("waypoint", {"forward_m": 5.0, "right_m": 1.0, "down_m": 2.0, "pace": "slow"})
    rig.follower.take(msgspec.structs.replace(action, t_capture_ns=image_ns))
    target = rig.outbox.sent[-1].setpoint.target
    assert isinstance(target, Position)
    # Forward is east, right is south.
    assert target == pytest.approx((1 - 1, 2 + 5, -10 + 2, math.pi / 2), abs=1e-5)
    assert ("pace", "pace has no effect: the autopilot's speed limit counts") in rig.outbox.words


def test_a_position_that_jumps_ends_the_waypoint_and_the_poses_of_before(rig):
    """The estimator has moved the local frame: a target of before lies somewhere else in it."""
    rig.clock.advance(0.1)
    rig.move_to(velocity=(2, 0, 0))
    rig.take("waypoint", {"forward_m": 4.0, "right_m": 0.0, "down_m": 0.0, "pace": "slow"})
    rig.clock.advance(0.05)
    captured_ns = rig.clock.now_ns
    rig.clock.advance(0.05)
    rig.move_to(north=0.2, velocity=(2, 0, 0))
    rig.follower.turn()
    assert rig.sent == ["waypoint"]
    rig.clock.advance(0.05)
    rig.move_to(north=5.3, velocity=(2, 0, 0))
    rig.follower.turn()
    assert rig.sent == ["waypoint", "hold"]
    values = {"forward_m": 4.0, "right_m": 0.0, "down_m": 0.0, "pace": "slow"}
    rig.take("waypoint", values, t_capture_ns=captured_ns)
    assert rig.follower.why == "pose at the image's time is unknown"


def test_a_waypoint_without_a_pose_is_hold(rig):
    action = rig.action("waypoint", {"forward_m": 5.0, "right_m": 1.0, "down_m": 2.0})
    rig.follower.take(msgspec.structs.replace(action, t_capture_ns=action.t_pub_ns - NS_PER_S))
    assert (rig.sent, rig.follower.why) == (["hold"], "pose at the image's time is unknown")


@pytest.mark.parametrize(
    "values",
    [
        {"forward_m": 51.0, "right_m": 0.0, "down_m": 0.0},
        {"forward_m": 0.0, "right_m": -51.0, "down_m": 0.0},
        {"forward_m": 0.0, "right_m": 0.0, "down_m": 9.5},
        {"forward_m": 0.0, "right_m": 0.0, "down_m": -21.0},
    ],
)
def test_a_waypoint_outside_the_fence_is_hold(rig, values):
    rig.pass_time(0.1)
    rig.take("waypoint", values)
    assert rig.sent == ["hold"] and rig.follower.why.startswith("fence ahead: ")


# -- limits and fence -------------------------------------------------------------------------------------------------


def test_a_fast_action_is_slowed_down_and_counted(rig):
    limits = Limits(speed_m_s=1.0, acceleration_m_s2=50)
    rig = Rig(BridgeConfig(limits=limits), rig.kind)
    rig.take(values={"forward_m_s": 3.0, "right_m_s": 4.0, "down_m_s": -5.0, "yaw_rate_rad_s": 2.0})
    assert rig.outbox.sent[0].setpoint.target == pytest.approx((0.6, 0.8, -1.0, 0.8), abs=1e-6)
    assert {name for name in rig.follower.counts if name.startswith("limited")} == {
        "limited: speed_m_s", "limited: up_m_s", "limited: yaw_rate_rad_s",
    }  # fmt: skip


def test_the_velocity_grows_no_faster_than_the_acceleration(rig):
    rig.take(values=FORWARD)
    for _ in range(10):
        rig.clock.advance(0.1)
        rig.move_to()
        rig.take(values={"forward_m_s": 2.0})
    speeds = [s.setpoint.target[0] for s in rig.outbox.sent]
    assert all(b - a <= 0.5 + 1e-6 for a, b in itertools.pairwise(speeds))
    assert speeds[-1] == 2.0


def test_it_grows_no_faster_when_actions_come_quickly(rig):
    rig.take(values={})
    for _ in range(100):
        rig.clock.advance(0.01)
        if rig.seq % 5 == 0:
            rig.heartbeat()
            rig.move_to()
        rig.take(values={"forward_m_s": 2.0})
    speeds = [s.setpoint.target[0] for s in rig.outbox.sent]
    assert all(b - a <= 0.5 + 1e-6 for a, b in zip(speeds, speeds[10:], strict=False))
    assert speeds[-1] == 2.0


def test_a_hold_between_two_actions_does_not_make_the_second_one_slow(rig):
    rig.take(values={"forward_m_s": 1.0})
    rig.pass_time(0.5)
    assert rig.sent == ["move", "hold"]
    rig.clock.advance(0.001)
    rig.take(values={"forward_m_s": 1.0})
    assert rig.outbox.sent[-1].setpoint.target == Velocity(1.0, 0, 0, 0)


@pytest.mark.parametrize(
    ("place", "values", "why"),
    [
        ({"up": 31}, {}, "fence: above 30 m"),
        ({"up": 0.5}, {}, "fence: below 1 m"),
        ({"north": 51}, {"forward_m_s": -1.0}, "fence: more than 50 m from home"),
        ({"north": 49.5}, {"forward_m_s": 1.0}, "fence ahead: more than 50 m from home"),
        ({"up": 29.5}, {"down_m_s": -1.0}, "fence ahead: above 30 m"),
        ({"up": 1.5}, {"down_m_s": 1.0}, "fence ahead: below 1 m"),
        ({"north": 49.5, "velocity": (3, 0, 0)}, {}, "fence ahead: more than 50 m from home"),
        ({"east": 49.5, "yaw": math.pi / 2}, {"forward_m_s": 1.0}, "fence ahead: more than 50 m from home"),
    ],
)
def test_a_setpoint_that_leads_out_of_the_fence_is_hold(rig, place, values, why):
    rig.clock.advance(0.05)
    rig.move_to(**place)
    rig.take(values=values)
    assert (rig.sent, rig.follower.why) == (["hold"], why)
    assert rig.outbox.words[-1] == ("hold", f"hold: {why}")


def test_inside_the_fence_and_away_from_its_edge_is_flown(rig):
    rig.clock.advance(0.05)
    rig.move_to(north=49.5)
    rig.take(values={"forward_m_s": -1.0})
    assert rig.sent == ["move"]


def test_a_vehicle_that_leaves_the_fence_in_the_middle_of_an_action_holds(rig):
    rig.take(values=FORWARD)
    rig.clock.advance(0.05)
    rig.move_to(up=30.5)
    rig.follower.turn()
    assert rig.sent == ["move", "hold"]


def test_home_from_the_origin_needs_no_home_position():
    rig = Rig(BridgeConfig(home="origin", fence=Fence(max_altitude_m=12)))
    rig.autopilot._home_kind = "origin"
    rig.autopilot._home = None
    rig.take(values=FORWARD)
    assert rig.sent == ["move"]
