"""Values that the controller pushes about its vehicle: checked, and rendered into the prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from edge_agent.actions.space import ActionSpace
from edge_agent.wire.control import StateValue

MAX_STATE_NUMBER = 1e9  # a number of more digits is none that a vehicle has
_WORD = re.compile("[a-z0-9_-]{1,32}")
_MAX_VALUE_TOKENS = 34  # tokens at most, of a number or a word, without its unit


def check_vehicle_state(values: Mapping[str, StateValue], space: ActionSpace) -> str:
    """Why a controller's values cannot be taken; empty: they can."""
    known = space.vehicle_state.values if space.vehicle_state is not None else {}
    for key, value in values.items():
        if key not in known:
            return f"values.{key[:40]}: expected one of {', '.join(known) or 'none: this action space has no state'}"
        if isinstance(value, str):
            if not _WORD.fullmatch(value):
                return f"values.{key}: expected a number, a bool or a word of a-z, 0-9, _ and -; found {value[:40]!r}"
        elif not abs(value) <= MAX_STATE_NUMBER:  # NaN too
            return f"values.{key}: expected a number within ±{MAX_STATE_NUMBER:g}; found {value}"
    return "" if values else "values: expected at least one"


def render_vehicle_state(space: ActionSpace, facts: Mapping[str, tuple[StateValue, int]], now_ns: int) -> str:
    """facts: key -> value and when it came, CLOCK_MONOTONIC. -> text that stands behind the frame; "" without state.
    What never came, or is older than it may be, is unknown: never a guess, never a value of before."""
    if space.vehicle_state is None:
        return ""

    def said(found: re.Match) -> str:
        key = found[1]
        rule, (value, then_ns) = space.vehicle_state.values[key], facts.get(key, ("", 0))
        if key not in facts or not 0 <= now_ns - then_ns <= rule.max_age_ms * 1_000_000:
            return "unknown"
        if isinstance(value, bool | str):
            return value if isinstance(value, str) else "yes" if value else "no"
        return f"{value:.{rule.decimals}f} {rule.unit}".rstrip()

    return re.sub(r"[{](.*?)[}]", said, space.vehicle_state.text)


def max_vehicle_state_tokens(space: ActionSpace, count: Callable[[str], int]) -> int:
    """An upper bound of what render_state may give. count: text -> tokens."""
    if space.vehicle_state is None:
        return 0
    return count(space.vehicle_state.text) + sum(
        _MAX_VALUE_TOKENS + count(rule.unit) for rule in space.vehicle_state.values.values()
    )
