"""The envelope: the model's text -> a checked action or a rejection. The last check of an action before the wire.

The grammar already keeps the model inside the action space. This file does not rely on the grammar and checks
everything again.

    >>> from edge_agent.actions.space import load_action_space
    >>> space = load_action_space("velocity_body")
    >>> parse_answer('{"action":"move","vx":9,"vy":0,"vz":0,"yaw":0}', space).clamped
    {'forward_m_s': 9.0}
"""

from __future__ import annotations

import math

import msgspec

from edge_agent.actions.space import ActionSpace, ActionType, ChoiceField, NumberField, wire_name
from edge_agent.wire.messages import ActionValue, RefusalReason


class CheckedAction(msgspec.Struct, frozen=True):
    """What the model asks for. Every value is inside the range of its field."""

    type: str
    values: dict[str, ActionValue]  # by the field's name on the wire
    clamped: dict[str, float]  # what the model had written, where it was clamped; "chunk.0.NAME" for a later step
    chunk: list[dict[str, ActionValue]] = []  # the values of the steps after the first


class Rejection(msgspec.Struct, frozen=True):
    """Why an answer of the model is not an action."""

    reason: RefusalReason
    detail: str


def parse_answer(text: str, space: ActionSpace) -> CheckedAction | Rejection:
    """Read one answer of the model. Never raises.

    A number outside its range is clamped to the range, and `clamped` reports it. Anything else that does not fit the
    action space rejects the whole answer.
    """
    try:
        answer = msgspec.json.decode(text.encode())
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        return Rejection("invalid", f"not JSON: {error}")
    if not isinstance(answer, dict):
        return Rejection("invalid", f"expected an object, found {type(answer).__name__}")
    name = answer.pop("action", None)
    action = space.actions.get(name) if isinstance(name, str) else None
    if action is None:
        return Rejection("invalid", f"action: expected one of {', '.join(space.actions)}, found {str(name)[:40]!r}")
    n_later_steps = space.horizon - 1 if action.fields else 0
    chunk = answer.pop("chunk", []) if n_later_steps else []
    if not isinstance(chunk, list) or len(chunk) != n_later_steps:
        return Rejection("invalid", f"{name}: chunk: expected a list of {n_later_steps} steps")
    steps: list[dict[str, ActionValue]] = []
    clamped: dict[str, float] = {}
    for i, step in enumerate([answer, *chunk]):
        values = _parse_step(step, action, name, f"chunk.{i - 1}." if i else "", clamped)
        if isinstance(values, Rejection):
            return values
        steps.append(values)
    return CheckedAction(name, steps[0], clamped, steps[1:])


def _parse_step(
    step: object, action: ActionType, name: str, prefix: str, clamped: dict[str, float]
) -> dict[str, ActionValue] | Rejection:
    """The values of one step by their names on the wire. Writes to `clamped`: prefix + name -> the model's number."""
    if not isinstance(step, dict) or step.keys() != action.fields.keys():
        keys = sorted(step)[:10] if isinstance(step, dict) else type(step).__name__
        return Rejection("invalid", f"{prefix}{name}: expected fields {sorted(action.fields)}, found {keys}")
    values: dict[str, ActionValue] = {}
    for key, field in action.fields.items():
        if isinstance(field, ChoiceField):
            if step[key] not in field.one_of:
                detail = f"{name}.{key}: expected one of {field.one_of}, found {str(step[key])[:40]!r}"
                return Rejection("invalid", detail)
            values[wire_name(key, field)] = step[key]
            continue
        number = _parse_number(step[key], f"{name}.{key}")
        if isinstance(number, Rejection):
            return number
        values[wire_name(key, field)] = value = _clamp(number, field)
        if value != number:
            clamped[prefix + wire_name(key, field)] = number
    return values


def _parse_number(value: object, where: str) -> float | Rejection:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Rejection("invalid", f"{where}: expected a number, found {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an integer above the range of float64
        number = math.inf
    return number if math.isfinite(number) else Rejection("not-finite", where)


def _clamp(number: float, field: NumberField) -> float:
    return min(max(number, field.min), field.max)
