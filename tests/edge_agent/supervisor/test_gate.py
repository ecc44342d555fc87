"""The gate: which proposal becomes an action, and which reason a refusal has."""

from __future__ import annotations

import pytest

from edge_agent.actions.envelope import CheckedAction, Rejection
from edge_agent.actions.space import load_action_space
from edge_agent.supervisor.gate import ControlState, Gate, Instruction
from edge_agent.time_units import NS_PER_MS
from tests.harness.in_process import proposal_of

DEADLINE_MS = 2000


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate(load_action_space("velocity_body"), DEADLINE_MS)


def check(gate: Gate, *, age_ms: float = 100.0, paused: bool = False, ready: bool = True, **changes):
    """The decision about a proposal of instruction 4 whose frame is age_ms old."""
    control_state = ControlState(Instruction(4, "Hold.", ""), paused)
    captured_ns = 10_000 * NS_PER_MS
    proposal = proposal_of(**({"t_capture_ns": captured_ns, "instruction_id": 4} | changes))
    return gate.check(proposal, control_state, model_is_ready=ready, now_ns=captured_ns + round(age_ms * NS_PER_MS))


def test_an_answer_inside_the_envelope_is_an_action(gate):
    assert check(gate) == CheckedAction(
        "move", {"forward_m_s": 1.0, "right_m_s": 0.0, "down_m_s": 0.0, "yaw_rate_rad_s": 0.0}, {}
    )


def test_a_number_outside_the_envelope_is_clamped_and_reported(gate):
    action = check(gate, text='{"action":"move","vx":9.5,"vy":-7,"vz":0.5,"yaw":-99}')
    assert action.values == {"forward_m_s": 2.0, "right_m_s": -2.0, "down_m_s": 0.5, "yaw_rate_rad_s": -0.8}
    assert action.clamped == {"forward_m_s": 9.5, "right_m_s": -7.0, "yaw_rate_rad_s": -99.0}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text": "not json"}, "invalid"),
        ({"text": '{"action":"explode"}'}, "invalid"),
        ({"text": '{"action":"move","vx":1}'}, "invalid"),
        ({"text": '{"action":"move","vx":NaN,"vy":0,"vz":0,"yaw":0}'}, "invalid"),
        ({"stop_reason": "length"}, "truncated"),
        ({"stop_reason": "grammar"}, "truncated"),
        ({"stop_reason": "not-finite"}, "not-finite"),
        ({"stop_reason": "no-state", "text": "no fresh value of altitude_m"}, "no-state"),
        ({"stop_reason": "late"}, "late"),
        ({"stop_reason": "cancelled"}, "stale-instruction"),
        ({"instruction_id": 3}, "stale-instruction"),
        ({"instruction_id": 5}, "stale-instruction"),
        ({"ready": False}, "stale-instruction"),
        ({"age_ms": DEADLINE_MS + 0.1}, "late"),
        ({"age_ms": -0.1}, "future-timestamp"),
        ({"paused": True}, "paused"),
    ],
)
def test_everything_else_is_refused_with_its_reason(gate, changes, reason):
    rejection = check(gate, **changes)
    assert isinstance(rejection, Rejection) and rejection.reason == reason


def test_a_missing_state_is_named(gate):
    assert check(gate, stop_reason="no-state", text="no fresh value of mode").detail == "no fresh value of mode"


@pytest.mark.parametrize("age_ms", [0.0, DEADLINE_MS])
def test_the_limits_of_the_age_are_still_valid(gate, age_ms):
    assert isinstance(check(gate, age_ms=age_ms), CheckedAction)


def test_the_detail_of_a_rejection(gate):
    assert check(gate, age_ms=2300).detail == "2300 ms old, deadline_ms is 2000"
    assert check(gate, age_ms=-12.34).detail == "the frame is stamped 12.3 ms in the future"
    assert check(gate, stop_reason="length", text="x" * 300).detail == f"after {'x' * 200!r}"


def test_pause_is_checked_before_everything_else(gate):
    """A controller that has paused gets one reason, whatever else is wrong with the frame."""
    assert check(gate, paused=True, ready=False, age_ms=-5, stop_reason="late").reason == "paused"


@pytest.mark.parametrize(("captured_ns", "is_refused"), [(0, True), (999, True), (1000, False), (2000, False)])
def test_a_frame_from_before_a_suspend_is_late_however_young_it_looks(gate, captured_ns, is_refused):
    proposal = proposal_of(t_capture_ns=captured_ns, instruction_id=4)
    control_state = ControlState(Instruction(4, "", ""))
    result = gate.check(proposal, control_state, model_is_ready=True, now_ns=3000, resumed_ns=1000)
    assert isinstance(result, Rejection) == is_refused
    if is_refused:
        assert result == Rejection("late", "the machine was suspended since the frame was captured")
