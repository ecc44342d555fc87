"""The model's text to a checked action or a rejection. The last code that sees an action before the wire."""

from __future__ import annotations

import math

import msgspec

from edge_agent.actions.space import ActionSpace, ActionType


class CheckedAction(msgspec.Struct, frozen=True):
    """What the model asks for, inside the envelope."""

    type: str
    values: dict[str, float | int | str | bool]
    clamped: dict[str, float]  # field -> what was asked before the envelope changed it; of a later step: "chunk.0.…"
    chunk: list[dict[str, float | int | str | bool]] = []  # the steps after this one


class Rejection(msgspec.Struct, frozen=True):
    reason: str  # messages.RefusalReason
    detail: str


def parse_answer(text: str, space: ActionSpace) -> CheckedAction | Rejection:
    """The model's text -> a request inside the envelope, or why it is none. Numbers outside a range are clamped and
    reported; everything else that does not fit is rejected whole."""
    try:
        answer = msgspec.json.decode(text.encode())
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        return Rejection("invalid", f"not JSON: {error}")
    if not isinstance(answer, dict):
        return Rejection("invalid", f"expected an object, found {type(answer).__name__}")
    name = answer.pop("action", None)
    verb = space.actions.get(name) if isinstance(name, str) else None
    if verb is None:
        return Rejection("invalid", f"action: expected one of {', '.join(space.actions)}, found {str(name)[:40]!r}")
    chunk = answer.pop("chunk", []) if space.horizon > 1 and verb.fields else []
    if not isinstance(chunk, list) or len(chunk) != (space.horizon - 1 if verb.fields else 0):
        return Rejection("invalid", f"{name}: expected {space.horizon - 1} later steps")
    steps: list[dict[str, float | int | str | bool]] = []
    clamped: dict[str, float] = {}
    for i, step in enumerate([answer, *chunk]):
        found = _parse_step(step, verb, name, f"chunk.{i - 1}." if i else "", clamped)
        if isinstance(found, Rejection):
            return found
        steps.append(found)
    return CheckedAction(name, steps[0], clamped, steps[1:])


def _parse_step(
    answer: object, verb: ActionType, name: str, at: str, clamped: dict[str, float]
) -> dict[str, float | int | str | bool] | Rejection:
    """One step's values by their wire names; what the envelope changed goes to `clamped`, with `at` before its name."""
    if not isinstance(answer, dict) or answer.keys() != verb.fields.keys():
        found = sorted(answer)[:10] if isinstance(answer, dict) else type(answer).__name__
        return Rejection("invalid", f"{at}{name}: expected fields {sorted(verb.fields)}, found {found}")
    values: dict[str, float | int | str | bool] = {}
    for key, field in verb.fields.items():
        value, wire_name = answer[key], field.name or key
        if field.one_of is not None:
            if value not in field.one_of:
                return Rejection("invalid", f"{name}.{key}: expected one of {field.one_of}, found {str(value)[:40]!r}")
            values[wire_name] = value
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            return Rejection("invalid", f"{name}.{key}: expected a number, found {type(value).__name__}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            return Rejection("not-finite", f"{name}.{key}")
        values[wire_name] = min(max(number, field.min), field.max)
        if values[wire_name] != number:
            clamped[at + wire_name] = number
    return values
