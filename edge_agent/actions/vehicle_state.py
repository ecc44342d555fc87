"""The vehicle state: values that the controller pushes. They are checked here and written into the prompt."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from edge_agent.actions.space import PLACEHOLDER, ActionSpace, VehicleStateField
from edge_agent.time_units import NS_PER_MS
from edge_agent.wire.control import StateValue

MAX_STATE_NUMBER = 1e9  # no quantity of a vehicle is larger; bounds the length of the prompt
# The mode names of PX4, ArduPilot and MAVROS fit, for example AUTO.LOITER and "Auto Loiter". Brackets, quotes and
# control characters do not: they would look like a part of the prompt.
_WORD = re.compile("[A-Za-z0-9_][A-Za-z0-9_./ +-]{0,31}")
_MAX_VALUE_TOKENS = 34  # upper bound for a number or a word, without its unit


def check_vehicle_state(key: str, value: Any, space: ActionSpace) -> tuple[StateValue | None, str]:
    """Check one value -> (the value to use, why it cannot be taken). None as the value: it is unknown.

    Words are written in lower case. None and numbers that are not finite mean "unknown", as autopilots send them.
    """
    keys = space.vehicle_state.values if space.vehicle_state is not None else {}
    if key not in keys:
        return None, f"expected one of {', '.join(keys)}" if keys else "this action space has no vehicle_state"
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None, ""
    if isinstance(value, str):
        word = value.strip()
        if _WORD.fullmatch(word):
            return word.lower(), ""
        expected = "a number, a bool, or a word of 1 to 32 characters (letters, digits, space and _ . / + -)"
        return None, f"expected {expected}; found {value[:40]!r}"
    if not isinstance(value, bool | int | float):
        return None, f"expected a number, a bool or a word; found {type(value).__name__}"
    if abs(value) > MAX_STATE_NUMBER:
        return None, f"expected a number within ±{MAX_STATE_NUMBER:g}; found {value:g}"
    return value, ""


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
        if not _is_fresh(arrival_ns, fields[key], now_ns):
            return "unknown"
        return _render_value(value, fields[key])

    return PLACEHOLDER.sub(rendered, space.vehicle_state.text)


def unknown_values(space: ActionSpace, values: Mapping[str, tuple[StateValue, int]], now_ns: int) -> list[str]:
    """The keys of the action space's vehicle state that render_vehicle_state() would write as "unknown"."""
    fields = space.vehicle_state.values if space.vehicle_state is not None else {}
    return [key for key in fields if key not in values or not _is_fresh(values[key][1], fields[key], now_ns)]


def _is_fresh(arrival_ns: int, field: VehicleStateField, now_ns: int) -> bool:
    return 0 <= now_ns - arrival_ns <= field.max_age_ms * NS_PER_MS


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
