"""The bridge process against autopilots, links and daemons that misbehave. The autopilot judges what arrives.

In every test: no setpoint but hold outside the validity of its action, none twice. What is judged is the order of
events, not how long they take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pymavlink.dialects.v20 import common as mavlink

from edge_agent.time_units import NS_PER_S
from models.autopilot.flavours import ARDUCOPTER, PX4
from tests.harness.bridge_rig import BRIDGE, Rig, commands, name_of, rig

NAN = float("nan")
FLAVOURS = [PX4, ARDUCOPTER]


@pytest.fixture(scope="module", params=FLAVOURS, ids=lambda flavour: flavour.name)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("b"), request.param) as made:
        yield made


@pytest.fixture(scope="module")
def copter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("c"), ARDUCOPTER) as made:
        yield made


@pytest.fixture
def checked() -> Iterator[Callable[[Rig], Rig]]:
    """checked(rig): a rig whose vehicle flies; nothing wrong may have arrived when the test ends."""
    rigs: list[Rig] = []

    def check(made: Rig) -> Rig:
        made.fly()
        rigs.append(made)
        return made

    yield check
    for made in rigs:
        assert made.wrong() == [], made.report()
        assert made.bridge.process.poll() is None, made.report()


# -- actions -----------------------------------------------------------------------------------------------------------


def test_one_setpoint_for_each_action_then_hold(both: Rig, checked):
    rig = checked(both)
    began_ns = time.monotonic_ns()
    actions = [rig.follow_one() for _ in range(10)]
    names = [name_of(item) for item in rig.moves_since(began_ns)]
    assert names == sorted(set(names)) and {action.values["yaw_rate_rad_s"] for action in actions} <= set(names)

    def is_held_when_it_has_expired() -> bool:
        action = rig.follow_one()
        moved_ns = rig.wait_for_move(action).t_ns
        return rig.wait_for_hold(moved_ns).t_ns >= action.valid_until_ns

    assert any(is_held_when_it_has_expired() for _ in range(5))  # on a busy machine the telemetry may be old before


@pytest.mark.parametrize("reason", ["late", "invalid", "paused"])
def test_a_refusal_is_hold_at_once(copter: Rig, checked, reason: str):
    rig = checked(copter)

    def is_at_once() -> bool:
        action = rig.follow_one()
        refused = rig.refuse(reason)
        return rig.wait_for_hold(refused.t_pub_ns).t_ns < action.valid_until_ns

    assert any(is_at_once() for _ in range(5))  # on a busy machine the action may expire first


def changed(seconds: float = 0.0, **fields: Any) -> Callable[[Rig], None]:
    """Publish an action whose time stamps are moved by seconds, with other fields."""

    def publish(rig: Rig) -> None:
        rig.publish(now_ns=time.monotonic_ns() + round(seconds * NS_PER_S), **fields)

    return publish


@pytest.mark.parametrize(
    "publish",
    [
        changed(-1.0),  # expired on arrival
        changed(2.0),  # from the future
        changed(valid_ms=5000),  # longer than any action may be valid
        changed(values={"forward_m_s": 1.9}),  # names are missing
        changed(values={}),
        changed(type="dance", values={}),
        changed(type="land", values={}),  # land is not allowed by this configuration
        changed(type="search", values={}),
        changed(age_ms=3000),
    ],
    ids=["expired", "future", "too long", "a name", "no names", "unknown", "land", "search", "old image"],
)
def test_an_action_that_must_not_be_followed_is_not(copter: Rig, checked, publish: Callable[[Rig], None]):
    rig = checked(copter)
    rig.follow_one()
    began_ns = time.monotonic_ns()
    publish(rig)
    before = set(rig.published)
    rig.wait_for_hold(began_ns)
    rig.follow_one()  # later than the one that must not be followed
    assert before.isdisjoint(name_of(item) for item in rig.moves_since(began_ns)), rig.report()
    assert commands(rig.driver, mavlink.MAV_CMD_NAV_LAND) == []


def test_a_message_that_comes_twice_is_followed_once(copter: Rig, checked):
    rig = checked(copter)
    action = rig.follow_one()
    for _ in range(5):
        rig.daemon.publish("actions", action)
    rig.follow_one()
    names = [name_of(item) for item in rig.moves_since(action.t_pub_ns)]
    assert names.count(action.values["yaw_rate_rad_s"]) == 1


def test_a_new_session_is_followed_only_with_the_same_instruction(copter: Rig, checked):
    rig = checked(copter)
    rig.session += 1
    rig._seq = 0
    first = rig.publish()
    rig.wait_for_hold(first.t_pub_ns)
    rig.follow_one()
    assert first.values["yaw_rate_rad_s"] not in [name_of(item) for item in rig.moves_since(first.t_pub_ns)]
    rig.session += 1
    for _ in range(3):
        other = rig.publish(instruction="Land on the red disc.")
        rig.wait_for_hold(other.t_pub_ns)
        assert rig.moves_since(other.t_pub_ns) == []


@pytest.mark.parametrize("axis", ["forward_m_s", "right_m_s", "down_m_s", "yaw_rate_rad_s"])
@pytest.mark.parametrize("sign", [1, -1])
def test_all_four_axes_arrive_with_their_signs(copter: Rig, axis: str, sign: int):
    copter.fly()
    values = {"forward_m_s": 0.0, "right_m_s": 0.0, "down_m_s": 0.0, "yaw_rate_rad_s": 0.0} | {axis: 0.25 * sign}
    began_ns = time.monotonic_ns()

    def moves() -> list[Any]:
        return [item.message for item in copter.moves_since(began_ns) if name_of(item) in (0, 0.25 * sign)]

    copter.driver.wait(lambda: copter.publish(values=values) and copter.driver.happens(moves, 0.5))
    m = moves()[0]
    assert [m.vx, m.vy, m.vz, m.yaw_rate] == list(values.values())
    assert (m.coordinate_frame, m.type_mask) == (mavlink.MAV_FRAME_BODY_NED, 0x5C7)


# -- the autopilot -----------------------------------------------------------------------------------------------------


def test_the_bridge_never_arms_and_never_changes_the_mode(both: Rig, checked):
    rig = checked(both)
    numbers = {item.message.command for item in rig.driver.received if item.type == "COMMAND_LONG"}
    assert numbers <= {mavlink.MAV_CMD_SET_MESSAGE_INTERVAL, mavlink.MAV_CMD_REQUEST_MESSAGE, mavlink.MAV_CMD_NAV_LAND}
    kinds = {item.type for item in rig.driver.received}
    assert kinds <= {"HEARTBEAT", "STATUSTEXT", "COMMAND_LONG", "SET_POSITION_TARGET_LOCAL_NED", "TIMESYNC"}
    beats = [item.message for item in rig.driver.received if item.type == "HEARTBEAT"]
    assert {(m.type, m.autopilot) for m in beats} <= {
        (mavlink.MAV_TYPE_ONBOARD_CONTROLLER, mavlink.MAV_AUTOPILOT_INVALID)
    }
    assert {item.source for item in rig.driver.received} == {(1, BRIDGE)}


@pytest.mark.parametrize("what", ["mode", "disarm"])
def test_a_change_by_the_pilot_ends_the_action_and_it_is_not_taken_up_again(both: Rig, checked, what: str):
    """The pilot takes over in the middle of an action, and gives back before it expires."""
    rig = checked(both)
    rig.follow_one()
    with rig.driver.lock:
        if what == "mode":
            rig.autopilot.set_mode("AUTO.LOITER" if rig.flavour is PX4 else "LOITER")
        else:
            rig.autopilot.disarm()
        changed_ns = time.monotonic_ns()
        rig.link.tell("HEARTBEAT")
    rig.wait_for_hold(changed_ns)
    with rig.driver.lock:
        rig.autopilot.arm()
        rig.autopilot.set_mode(rig.flavour.external_mode)
        rig.link.tell("HEARTBEAT")
    rig.wait_for_hold(time.monotonic_ns())
    assert rig.moves_since(changed_ns) == [], rig.report()


@pytest.mark.parametrize("mode", ["STABILIZE", "LOITER", "AUTO", "RTL", "LAND", "BRAKE"])
def test_in_another_mode_there_is_only_hold(copter: Rig, checked, mode: str):
    rig = checked(copter)
    with rig.driver.lock:
        rig.autopilot.set_mode(mode)
        rig.link.tell("HEARTBEAT")
    rig.wait_for_hold(time.monotonic_ns())
    rig.publish_and_see_hold()


def test_a_disarmed_vehicle_gets_only_hold(both: Rig, checked):
    rig = checked(both)
    with rig.driver.lock:
        rig.autopilot.disarm()
        rig.link.tell("HEARTBEAT")
    rig.wait_for_hold(time.monotonic_ns())
    rig.publish_and_see_hold()


def test_a_restart_of_the_autopilot_is_hold_until_it_is_flown_again(both: Rig, checked):
    rig = checked(both)
    with rig.driver.lock:
        rig.autopilot.restart()
        rig.link.tell("HEARTBEAT")
    rig.wait_for_hold(time.monotonic_ns())
    rig.publish_and_see_hold()
    rig.fly()


@pytest.mark.parametrize("seconds", [-100.0, 100.0, 2**32 / 1000 - 2])
def test_a_jump_of_the_autopilots_clock_is_survived(copter: Rig, checked, seconds: float):
    rig = checked(copter)
    with rig.driver.lock:
        rig.autopilot.jump_clock(seconds)
    rig.fly()


# -- telemetry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("LOCAL_POSITION_NED", {"x": NAN}),
        ("LOCAL_POSITION_NED", {"vz": float("inf")}),
        ("ATTITUDE", {"yaw": NAN}),
        ("HEARTBEAT", {"autopilot": mavlink.MAV_AUTOPILOT_GENERIC}),
        ("HEARTBEAT", {"system_status": mavlink.MAV_STATE_EMERGENCY}),
        ("HEARTBEAT", {"base_mode": 0}),
        ("GLOBAL_POSITION_INT", {"lat": 2**31 - 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value),
)
def test_telemetry_that_cannot_be_is_hold(copter: Rig, checked, message: str, fields: dict[str, Any]):
    rig = checked(copter)
    with rig.driver.lock:
        rig.link.changed = {message: fields}
        rig.link.tell(message)
    rig.wait_for_hold(time.monotonic_ns())
    rig.publish_and_see_hold()
    assert rig.autopilot.is_armed and rig.autopilot.mode == "GUIDED"
    if message == "HEARTBEAT":
        rig.restart_bridge()  # the contradiction with the HEARTBEATs of before keeps it in hold for seconds


@pytest.mark.parametrize("message", ["HEARTBEAT", "LOCAL_POSITION_NED", "ATTITUDE", "GLOBAL_POSITION_INT"])
def test_a_message_that_stops_coming_is_hold(copter: Rig, checked, message: str):
    """While new actions come all the time: only what is old tells the bridge."""
    rig = checked(copter)
    with rig.driver.lock:
        rig.link.silent = {message}
    rig.publish_until_held()
    rig.publish_and_see_hold()
    assert rig.autopilot.is_armed and rig.autopilot.mode == "GUIDED"


def test_state_is_pushed_and_what_stops_coming_becomes_unknown(copter: Rig, checked):
    rig = checked(copter)
    with rig.driver.lock:
        rig.autopilot.battery_percent = 42.0
        rig.link.changed = {"SYS_STATUS": {"battery_remaining": -1}, "BATTERY_STATUS": {"battery_remaining": -1}}

    n_before = len(rig.requests)

    def pushed(key: str) -> list[Any]:
        return [request.values[key] for request in rig.requests[n_before:] if key in (request.values or {})]

    rig.driver.wait(lambda: all(pushed(key)[-1:] not in ([], [None]) for key in ("altitude_m", "mode", "gps_fix")))
    assert abs(pushed("altitude_m")[-1] - 20.0) < 1.0 and pushed("mode")[-1] == "GUIDED"
    assert -1 not in pushed("battery_percent") and 0 not in pushed("battery_percent")
    with rig.driver.lock:
        rig.link.silent = {"LOCAL_POSITION_NED", "ATTITUDE", "GLOBAL_POSITION_INT"}
    rig.driver.wait(lambda: pushed("altitude_m")[-1] is None and pushed("heading_deg")[-1] is None)
