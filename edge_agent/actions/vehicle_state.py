"""The vehicle state: values that the controller pushes. They are checked here and written into the prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from edge_agent.actions.space import PLACEHOLDER, ActionSpace, VehicleStateField
from edge_agent.time_units import NS_PER_MS
from edge_agent.wire.control import StateValue

MAX_STATE_NUMBER = 1e9  # no quantity of a vehicle is larger; bounds the length of the prompt
_WORD = re.compile("[a-z0-9_-]{1,32}")
_MAX_VALUE_TOKENS = 34  # upper bound for a number or a word, without its unit


def check_vehicle_state(values: Mapping[str, StateValue], space: ActionSpace) -> str:
    """Check the values of one request. Returns an error line for the controller, or "" if all values are valid."""
    keys = space.vehicle_state.values if space.vehicle_state is not None else {}
    for key, value in values.items():
        if key not in keys:
            expected = f"one of {', '.join(keys)}" if keys else "no values: this action space has no vehicle_state"
            return f"values.{key[:40]}: expected {expected}"
        if isinstance(value, str):
            if not _WORD.fullmatch(value):
                return (
                    f"values.{key}: expected a number, a bool or a word of 1 to 32 characters (a-z, 0-9, _ and -); "
                    f"found {value[:40]!r}"
                )
        elif not abs(value) <= MAX_STATE_NUMBER:  # true for NaN as well
            return f"values.{key}: expected a number within ±{MAX_STATE_NUMBER:g}; found {value}"
    return "" if values else "values: expected at least one value"


def render_vehicle_state(space: ActionSpace, values: Mapping[str, tuple[StateValue, int]], now_ns: int) -> str:
    """The vehicle state as text that follows the frame in the prompt; "" if the action space has no vehicle_state.

    values: key -> (value, time of its arrival in ns of CLOCK_MONOTONIC). A value that never arrived, or is older than
    its max_age_ms, or carries a time in the future, is written as "unknown".
    """
    if space.vehicle_state is None:
        return ""
    fields = space.vehicle_state.values

    def rendered(placeholder: re.Match[str]) -> str:
        key = placeholder[1]
        if key not in values:
            return "unknown"
        value, arrival_ns = values[key]
        if not 0 <= now_ns - arrival_ns <= fields[key].max_age_ms * NS_PER_MS:
            return "unknown"
        return _render_value(value, fields[key])

    return PLACEHOLDER.sub(rendered, space.vehicle_state.text)


def _render_value(value: StateValue, field: VehicleStateField) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.{field.decimals}f} {field.unit}".rstrip()


def max_vehicle_state_tokens(space: ActionSpace, count_tokens: Callable[[str], int]) -> int:
    """An upper bound for the number of tokens of render_vehicle_state(). count_tokens: text -> number of tokens."""
    if space.vehicle_state is None:
        return 0
    return count_tokens(space.vehicle_state.text) + sum(
        _MAX_VALUE_TOKENS + count_tokens(field.unit) for field in space.vehicle_state.values.values()
    )
