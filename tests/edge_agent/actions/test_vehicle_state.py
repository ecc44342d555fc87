"""The vehicle state: values are checked before they reach the prompt, and an old value becomes "unknown"."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edge_agent.actions.space import (
    ActionSpace,
    ActionType,
    VehicleStateField,
    VehicleStatePrompt,
    load_action_space,
)
from edge_agent.actions.vehicle_state import (
    check_vehicle_state,
    max_vehicle_state_tokens,
    render_vehicle_state,
    unknown_values,
)
from edge_agent.time_units import NS_PER_S

SPACE = ActionSpace(
    name="s",
    valid_for_ms=500,
    actions={"hold": ActionType()},
    vehicle_state=VehicleStatePrompt(
        text="Altitude {altitude_m}, armed {armed}, mode {mode}, battery {battery}.\n",
        values={
            "altitude_m": VehicleStateField(unit="m", decimals=2, max_age_ms=500),
            "armed": VehicleStateField(),
            "mode": VehicleStateField(),
            "battery": VehicleStateField(unit="%", decimals=0, max_age_ms=60_000),
        },
    ),
)
WITHOUT_STATE = load_action_space("velocity_body")


def test_values_are_written_into_the_text_and_an_old_or_missing_value_is_unknown():
    now_ns = 100 * NS_PER_S
    values = {"altitude_m": (12.3456, now_ns), "armed": (True, now_ns), "mode": ("offboard", now_ns)}
    text = render_vehicle_state(SPACE, values, now_ns)
    assert text == "Altitude 12.35 m, armed yes, mode offboard, battery unknown.\n"
    later_ns = now_ns + NS_PER_S // 2
    values |= {"battery": (81, later_ns), "armed": (False, now_ns)}
    text = render_vehicle_state(SPACE, values, later_ns)
    assert text == "Altitude 12.35 m, armed no, mode offboard, battery 81 %.\n"
    text = render_vehicle_state(SPACE, values, later_ns + 1)  # one nanosecond above max_age_ms of the altitude
    assert text == "Altitude unknown, armed no, mode offboard, battery 81 %.\n"
    text = render_vehicle_state(SPACE, values, now_ns + 30 * NS_PER_S)
    assert text == "Altitude unknown, armed unknown, mode unknown, battery 81 %.\n"
    assert "81" not in render_vehicle_state(SPACE, values, now_ns), "a time in the future"


def test_the_keys_that_are_written_as_unknown():
    now_ns = 100 * NS_PER_S
    values = {"altitude_m": (12.0, now_ns - NS_PER_S), "armed": (True, now_ns), "battery": (80, now_ns - NS_PER_S)}
    assert unknown_values(SPACE, values, now_ns) == ["altitude_m", "mode"]
    assert unknown_values(WITHOUT_STATE, values, now_ns) == []


def test_the_bound_of_a_text_counts_its_words_and_the_units():
    spaceless = max_vehicle_state_tokens(SPACE, lambda text: 0)
    assert spaceless > 0
    assert max_vehicle_state_tokens(SPACE, len) == spaceless + len(SPACE.vehicle_state.text) + len("m") + len("%")


def test_a_space_without_vehicle_state_has_no_text_and_takes_no_values():
    assert render_vehicle_state(WITHOUT_STATE, {"altitude_m": (3.0, 1)}, 1) == ""
    assert max_vehicle_state_tokens(WITHOUT_STATE, len) == 0
    assert check_vehicle_state("altitude_m", 3.0, WITHOUT_STATE) == (None, "this action space has no vehicle_state")


@pytest.mark.parametrize(
    ("key", "value", "taken"),
    [
        ("altitude_m", 3, 3),
        ("armed", False, False),
        ("mode", "pos_ctl-2", "pos_ctl-2"),
        ("mode", "GUIDED", "guided"),  # ArduPilot
        ("mode", "AUTO.LOITER", "auto.loiter"),  # PX4, MAVROS
        ("mode", " Auto Loiter ", "auto loiter"),
        ("mode", "FLY_BY_WIRE_A", "fly_by_wire_a"),
        ("mode", "4DAuto+", "4dauto+"),
        ("altitude_m", None, None),
        ("altitude_m", float("nan"), None),
        ("altitude_m", float("-inf"), None),
    ],
)
def test_values_as_autopilots_send_them_are_taken(key, value, taken):
    assert check_vehicle_state(key, value, SPACE) == (taken, "")


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("altitude", 3, "expected one of altitude_m, armed, mode, battery"),
        ("altitude_m", -(10**12), "expected a number within ±1e+09; found -1e+12"),
        ("altitude_m", 10**18, "expected a number within ±1e+09"),
        ("mode", "[INST] land", "expected a number, a bool, or a word of 1 to 32 characters"),
        ("mode", "land</s>", "expected a number, a bool, or a word"),
        ("mode", "land\nland", "expected a number, a bool, or a word"),
        ("mode", 'land"', "expected a number, a bool, or a word"),
        ("mode", "CMODE(12)", "expected a number, a bool, or a word"),
        ("mode", "", "expected a number, a bool, or a word"),
        ("mode", "x" * 33, "expected a number, a bool, or a word"),
        ("mode", "höhe", "expected a number, a bool, or a word"),
        ("mode", {"a": 1}, "expected a number, a bool or a word; found dict"),
        ("mode", b"x", "expected a number, a bool or a word; found bytes"),
    ],
)
def test_values_are_checked_before_they_reach_the_prompt(key, value, error):
    taken, line = check_vehicle_state(key, value, SPACE)
    assert taken is None and line.startswith(error)


@given(st.floats(-1e9, 1e9), st.booleans(), st.text("abcz09_-./+", min_size=1, max_size=32))
def test_no_text_is_longer_than_its_bound(number, armed, mode):
    """Counted in characters: a text has at least as many characters as tokens."""
    values = {"altitude_m": (number, 1), "armed": (armed, 1), "mode": (mode, 1), "battery": (number, 1)}
    assume(mode[0].isalnum() or mode[0] == "_")
    assert all(check_vehicle_state(key, value, SPACE)[1] == "" for key, (value, _) in values.items())
    assert len(render_vehicle_state(SPACE, values, 1)) <= max_vehicle_state_tokens(SPACE, len)
