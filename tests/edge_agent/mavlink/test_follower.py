"""The state machine of the bridge: what is sent, when, and what never is."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest

from edge_agent.mavlink.config import BridgeConfig
from edge_agent.mavlink.follower import HOLD_HZ
from edge_agent.mavlink.modes import ARDUPILOT, PX4
from edge_agent.mavlink.setpoint import HOLD, Velocity
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from tests.harness.fake_daemon import make_refusal
from tests.harness.mavlink_rig import ARMED, DISARMED, LOITER, POSCTL, STILL, Rig

FORWARD = {"forward_m_s": 0.25}
HOLD_S = BridgeConfig().hold_s


@pytest.fixture(params=[PX4, ARDUPILOT], ids=["px4", "ardupilot"])
def rig(request) -> Rig:
    return Rig(kind=request.param)


# -- one action -------------------------------------------------------------------------------------------------------


def test_an_action_is_one_setpoint_and_then_hold(rig):
    action = rig.take(values=FORWARD)
    assert [s.setpoint.target for s in rig.outbox.sent] == [Velocity(0.25, 0, 0, 0)]
    rig.pass_time(0.49)
    assert rig.sent == ["move"]  # nothing between the setpoint and the expiry
    rig.pass_time(0.02)
    assert rig.sent == ["move", "hold"]
    assert rig.outbox.sent[1].t_ns == action.valid_until_ns


def test_hold_is_sent_at_a_fixed_rate_for_a_bounded_time_and_then_nothing(rig):
    rig.take(values=FORWARD)
    taken_ns = rig.clock.now_ns
    rig.pass_time(10)
    holds = [s.t_ns for s in rig.outbox.sent[1:]]
    assert set(rig.sent[1:]) == {"hold"}
    assert [b - a for a, b in itertools.pairwise(holds)] == [NS_PER_S // HOLD_HZ] * (len(holds) - 1)
    assert taken_ns + (HOLD_S - 0.2) * NS_PER_S < holds[-1] < taken_ns + HOLD_S * NS_PER_S
    assert ("silent", "nothing is sent any more: no new action in time") in rig.outbox.words
    assert rig.follower.due_ns() is None


def test_a_valid_action_ends_the_silence(rig):
    rig.take(values=FORWARD)
    rig.pass_time(5)
    del rig.outbox.sent[:]
    rig.take(values=FORWARD)
    assert rig.sent == ["move"]
    assert rig.outbox.words[-1] == ("follow", "actions again")


def test_nothing_is_sent_before_the_first_action(rig):
    rig.follower.take(make_refusal(0))
    rig.pass_time(3)
    assert rig.sent == []


def test_a_refusal_is_hold_at_once(rig):
    rig.take(values=FORWARD)
    rig.pass_time(0.1)
    rig.follower.take(make_refusal(5))
    assert rig.sent == ["move", "hold"]
    assert rig.follower.why == "refusal: late"


def test_refusals_do_not_make_the_hold_longer(rig):
    rig.take(values=FORWARD)
    taken_ns = rig.clock.now_ns
    for n in range(100):
        rig.follower.take(make_refusal(n + 5))
        rig.pass_time(0.05)
    assert rig.outbox.sent[-1].t_ns < taken_ns + HOLD_S * NS_PER_S


def test_an_action_that_is_not_valid_any_more_is_not_sent(rig):
    action = rig.action(values=FORWARD)
    rig.clock.advance(0.5)
    rig.follower.take(action)
    assert rig.sent == []
    assert rig.follower.counts["expired before use"] == 1


def test_an_action_that_came_too_late_ends_the_one_before(rig):
    rig.take(values=FORWARD, valid_ms=900)
    late = rig.action(values=FORWARD, valid_ms=1)
    rig.clock.advance(0.1)
    rig.follower.take(late)
    assert rig.sent == ["move", "hold"]


def test_the_clock_is_read_right_before_the_setpoint(rig):
    """The action expires while the follower decides."""
    action = rig.action(values=FORWARD)
    rig.clock.on_read = lambda clock: setattr(clock, "now_ns", clock.now_ns + 100 * NS_PER_MS)
    rig.follower.take(action)
    assert rig.sent == ["hold"]


def test_a_loop_that_stood_still_sends_no_late_hold(rig):
    rig.take(values=FORWARD)
    rig.clock.advance(HOLD_S + 1)
    rig.follower.turn()
    assert rig.sent == ["move"]


def test_a_link_that_does_not_take_it_is_hold_and_the_action_is_not_sent_later(rig):
    rig.outbox.takes = False
    rig.take(values=FORWARD)
    rig.pass_time(0.1)
    rig.outbox.takes = True
    rig.pass_time(0.3)
    assert set(rig.sent) == {"hold"}


def test_after_a_suspend_nothing_of_before_counts(rig):
    rig.take(values=FORWARD)
    rig.follower.forget("the machine was suspended")
    rig.pass_time(3)
    assert rig.sent == ["move"]


def test_the_model_says_hold(rig):
    rig.take("hold")
    assert [s.setpoint for s in rig.outbox.sent] == [HOLD]


# -- chunks -----------------------------------------------------------------------------------------------------------


def chunk(n: int) -> list[dict[str, float]]:
    return [{"forward_m_s": 0.1 * i, "right_m_s": 0, "down_m_s": 0, "yaw_rate_rad_s": 0} for i in range(2, n + 1)]


def test_each_step_of_a_chunk_is_sent_once_when_it_begins(rig):
    action = rig.take(values={"forward_m_s": 0.1}, chunk=chunk(4), chunk_step_ms=100)
    rig.pass_time(0.6, step_s=0.005)
    moves = [s for s in rig.outbox.sent if s.setpoint.type == "move"]
    assert [s.t_ns - action.t_pub_ns for s in moves] == [i * 100 * NS_PER_MS for i in range(4)]
    assert [round(s.setpoint.target[0], 3) for s in moves] == [0.1, 0.2, 0.3, 0.4]
    assert rig.outbox.sent[4].setpoint == HOLD


def test_a_step_that_was_missed_is_left_out(rig):
    action = rig.action(values={"forward_m_s": 0.1}, chunk=chunk(4), chunk_step_ms=100)
    rig.clock.advance(0.15)
    rig.follower.take(action)
    rig.clock.advance(0.25)
    rig.follower.turn()
    assert [round(s.setpoint.target[0], 3) for s in rig.outbox.sent] == [0.2, 0.4]


def test_a_bad_step_ends_the_chunk(rig):
    steps = chunk(4)
    del steps[1]["down_m_s"]
    rig.take(values={"forward_m_s": 0.1}, chunk=steps, chunk_step_ms=100)
    rig.pass_time(0.45)
    assert rig.sent[:3] == ["move", "move", "hold"] and set(rig.sent[2:]) == {"hold"}
    assert rig.follower.why == "no down_m_s in the values"


# -- the autopilot's word ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["disarmed", "mode", "silence", "no position", "restart", "second sender"])
def test_what_the_autopilot_says_ends_an_action_for_good(rig, change):
    rig.take(values=FORWARD, valid_ms=900)
    rig.pass_time(0.1)
    if change == "disarmed":
        rig.heartbeat(DISARMED)
    elif change == "mode":
        rig.heartbeat(mode=POSCTL if rig.kind == PX4 else LOITER)
    elif change == "silence":
        rig.pass_time(0.7, telemetry=False)
    elif change == "no position":
        rig.hear_nan_position()
    elif change == "restart":
        rig.boot_ns = rig.clock.now_ns - NS_PER_S
        rig.move_to()
    else:
        rig.heartbeat(sequence=100)
        for sequence in (10, 101, 11, 102, 12, 103, 13):
            rig.heartbeat(sequence=sequence)
    rig.follower.turn()
    assert rig.sent[:2] == ["move", "hold"]
    rig.clock.advance(0.01)
    rig.fly()  # all is as before
    rig.pass_time(0.1)
    assert set(rig.sent[1:]) == {"hold"}


@pytest.mark.parametrize("change", ["disarmed", "mode"])
def test_a_change_that_is_over_before_the_next_turn_counts_too(rig, change):
    rig.take(values=FORWARD)
    if change == "disarmed":
        rig.heartbeat(DISARMED)
    else:
        rig.heartbeat(mode=POSCTL if rig.kind == PX4 else LOITER)
    rig.heartbeat()
    rig.follower.turn()
    assert rig.sent == ["move", "hold"]


@pytest.mark.parametrize("base_mode, mode", [(DISARMED, None), (None, "other")], ids=["disarmed", "mode"])
def test_not_engaged_is_hold_while_actions_come(rig, base_mode, mode):
    """PX4 enters OFFBOARD only while setpoints come: this is longer than hold_s. Ten a second, however many actions.
    To ArduPilot, hold would be the end of a take-off in GUIDED."""
    mode = mode and (POSCTL if rig.kind == PX4 else LOITER)
    rig.heartbeat(**{"base_mode": base_mode} if base_mode else {}, mode=mode)
    for _ in range(200):
        rig.take(values=FORWARD)
        rig.clock.advance(0.05)
        rig.heartbeat(**{"base_mode": base_mode} if base_mode else {}, mode=mode)
    assert rig.sent == ["hold"] * (100 if rig.kind == PX4 else 20)


def test_a_take_off_in_guided_is_left_alone():
    """Actions come all the time, while the pilot arms in GUIDED and takes off."""
    rig = Rig(kind=ARDUPILOT)
    for up_m, base_mode in [(0.0, DISARMED)] * 100 + [(0.0, ARMED)] * 20 + [(0.5, ARMED)] * 20:
        rig.clock.advance(0.05)
        rig.heartbeat(base_mode)
        rig.move_to(up=up_m)
        rig.follower.turn()
        rig.take(values=FORWARD)
        if base_mode == ARMED:
            assert not rig.follower.is_holding
    rig.clock.advance(0.05)
    rig.move_to(up=5.0)
    rig.take(values=FORWARD)
    assert rig.sent[-1] == "move"


def test_a_restart_that_is_over_before_the_next_turn_counts_too(rig):
    rig.take(values=FORWARD)
    rig.boot_ns = rig.clock.now_ns - NS_PER_S
    rig.move_to()
    rig.clock.advance(0.01)
    rig.fly()
    assert rig.autopilot.why_not_engaged(rig.clock.now_ns) == ""
    rig.follower.turn()
    assert rig.sent == ["move", "hold"]


def test_a_heartbeat_gets_old_in_the_middle_of_an_action():
    rig = Rig()
    for _ in range(24):
        rig.clock.advance(0.1)
        rig.move_to()
    rig.take(values=FORWARD)
    rig.clock.advance(0.2)
    rig.move_to()
    rig.follower.turn()
    assert (rig.sent, rig.follower.why) == (["move", "hold"], "no HEARTBEAT any more")


def test_the_last_check_is_asked(rig, monkeypatch):
    monkeypatch.setattr("edge_agent.mavlink.follower.rounded", lambda velocity: Velocity(math.nan))
    rig.take(values=FORWARD)
    assert (rig.sent, rig.follower.why) == (["hold"], "a number that is not finite")


def test_a_heartbeat_gets_old():
    rig = Rig()
    for _ in range(26):
        rig.clock.advance(0.1)
        rig.move_to()
    rig.take(values=FORWARD)
    assert (rig.sent, rig.follower.why) == (["hold"], "no HEARTBEAT any more")


# -- a new session ----------------------------------------------------------------------------------------------------


def test_a_new_session_with_the_same_instruction_is_followed_after_a_hold(rig):
    rig.take(values=FORWARD)
    rig.take(values=FORWARD, session=2)
    assert rig.sent == ["move", "hold"]
    rig.take(values=FORWARD, session=2)
    assert rig.sent == ["move", "hold", "move"]


@pytest.mark.parametrize("changes", [{"instruction": "Land."}, {"adapter": "night"}], ids=["instruction", "adapter"])
def test_a_new_session_with_another_instruction_waits_for_the_pilot(rig, changes):
    rig.take(values=FORWARD)
    for _ in range(5):
        rig.take(values=FORWARD, session=2, **changes)
        rig.pass_time(0.1)
    assert set(rig.sent[1:]) == {"hold"}
    assert rig.follower.why == "restarted with another instruction"
    rig.heartbeat(mode=POSCTL if rig.kind == PX4 else LOITER)
    rig.heartbeat()
    rig.take(values=FORWARD, session=2, **changes)
    assert rig.sent[-1] == "move"


def test_a_new_instruction_in_the_same_session_is_followed(rig):
    rig.take(values=FORWARD)
    rig.take(values=FORWARD, instruction="Land.")
    assert rig.sent == ["move", "move"]


def test_silence_of_the_autopilot_is_not_the_pilot(rig):
    rig.take(values=FORWARD)
    rig.clock.advance(10)
    rig.follower.turn()
    rig.fly()
    rig.take(values=FORWARD, session=2, instruction="Land.")
    assert rig.follower.why == "restarted with another instruction"


# -- what an action says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type", "values", "why"),
    [
        ("hover", {}, "action type: hover is unknown here"),
        ("drive", {"speed_m_s": 1.0}, "action type: drive is unknown here"),
        ("search", {}, "the model searches"),
        ("land", {}, "land is not allowed: land: true"),
        ("waypoint", {"forward_m": 1.0}, "no right_m in the values"),
        ("waypoint", {"forward_m": 1.0, "right_m": "x", "down_m": 0.0}, "right_m is not a number"),
        ("waypoint", {"forward_m": 1e9, "right_m": 0.0, "down_m": 0.0}, "a waypoint more than 1000 m away"),
    ],
)
def test_an_action_that_cannot_be_followed_is_hold(rig, type, values, why):
    rig.take(type, values)
    assert (rig.sent, rig.follower.why) == (["hold"], why)


@pytest.mark.parametrize("name", ["forward_m_s", "right_m_s", "down_m_s", "yaw_rate_rad_s"])
@pytest.mark.parametrize("value", [None, "fast", math.nan, math.inf, -math.inf])
def test_a_move_with_a_number_that_is_none_is_hold(rig, name, value):
    action = rig.action(values=FORWARD)
    values = dict(action.values) | {name: value}
    if value is None:
        del values[name]
    rig.follower.take(msgspec.structs.replace(action, values=values))
    assert rig.sent == ["hold"]


def test_an_old_image_is_hold(rig):
    rig.take(values=FORWARD, age_ms=1001)
    assert (rig.sent, rig.follower.why) == (["hold"], "image too old: 1001 ms")


# -- hold has an end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reason",
    ["another instruction", "an old image", "no telemetry", "no HEARTBEAT", "outside of the fence", "an unknown type"],
)
def test_actions_that_are_not_followed_do_not_make_hold_longer(rig, reason):
    """The autopilot's fail-safe must come, although the daemon goes on."""
    rig.take(values=FORWARD)
    followed_ns = rig.clock.now_ns
    for n in range(60):
        rig.clock.advance(0.1)
        changes: dict[str, object] = {"values": FORWARD}
        if reason != "no HEARTBEAT":
            rig.heartbeat()
        if reason not in ("no telemetry", "no HEARTBEAT"):
            rig.move_to(up=100.0 if reason == "outside of the fence" else 10.0)
        if n >= 25 or reason not in ("no telemetry", "no HEARTBEAT"):
            rig.follower.turn()
        if reason == "another instruction":
            changes |= {"session": 77, "instruction": "Land somewhere."}
        elif reason == "an old image":
            changes |= {"age_ms": 5000.0}
        elif reason == "an unknown type":
            changes = {"type": "dance"}
        if n >= 25 or reason != "no HEARTBEAT":
            rig.take(**changes)
    rig.pass_time(3.0, telemetry=False)
    holds = [sent.t_ns for sent in rig.outbox.sent if sent.setpoint.type == "hold"]
    moves = [sent.t_ns for sent in rig.outbox.sent if sent.setpoint.type == "move"]
    last_followed_ns = max(moves, default=followed_ns)
    assert all(t_ns < last_followed_ns + BridgeConfig().hold_s * NS_PER_S for t_ns in holds)
    assert rig.outbox.sent[-1].t_ns < rig.clock.now_ns - NS_PER_S
    assert "nothing is sent any more" in rig.outbox.words[-1][1]


def test_the_reason_of_a_hold_is_the_newest(rig):
    rig.take("hold")
    rig.follower.take(make_refusal(rig.seq + 1))
    rig.pass_time(3.0)
    assert rig.follower.why.startswith("refusal: ")
    assert rig.outbox.words[-1][1].startswith("nothing is sent any more: refusal: ")


def test_no_step_of_a_chunk_begins_while_telemetry_is_unread(rig):
    later = [STILL | {"forward_m_s": speed} for speed in (0.2, 0.3)]
    rig.take(values=STILL | {"forward_m_s": 0.1}, chunk=later, chunk_step_ms=100)
    rig.clock.advance(0.12)
    rig.follower.turn(may_follow=False)
    assert len(rig.outbox.sent) == 1
    rig.follower.turn()
    assert [round(sent.setpoint.target[0], 3) for sent in rig.outbox.sent] == [0.1, 0.2]


def test_following_is_said_when_something_is_followed(rig):
    rig.clock.advance(0.05)
    rig.move_to(up=0.0)
    rig.take(values=FORWARD)
    assert not any(text.startswith("following") for _, text in rig.outbox.words)
