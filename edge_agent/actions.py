"""What the robot may do: an action space from YAML -> a JSON schema for the decoder; text -> Asked or Rejected.

Pure: no clock, no sockets, no model. The grammar already keeps the model inside the space; `read` trusts none of that
and checks everything again, because this is the last code that sees an action before it leaves.

    >>> space = load("velocity_body")
    >>> read('{"action":"move","vx":9,"vy":0,"vz":0,"yaw":0}', space).clamped
    {'forward_m_s': 9.0}
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_agent.config import ConfigError, checked, parse_yaml, read_text

READY_SPACES = Path(__file__).parent / "action_spaces"
_NAME = Meta(pattern="^[a-z][a-z0-9_]{0,31}$")
MAX_VALID_FOR_MS = (
    900  # below PX4's 1 s offboard time-out: an expired action is gone before the autopilot gives up on us
)


class Field(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A number with a range and a step, or one of several words."""

    name: Annotated[str, _NAME] | None = None  # what controllers see; says quantity and unit. Default: the key itself
    about: str = ""
    unit: str = ""
    min: float | None = None
    max: float | None = None
    step: Annotated[float, Meta(gt=0)] | None = None  # the model's resolution; fewer digits are fewer tokens
    one_of: list[Annotated[str, _NAME]] | None = None


class Verb(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    about: str = ""
    fields: dict[Annotated[str, _NAME], Field] = {}


class Space(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: Annotated[str, _NAME]
    about: str = ""
    valid_for_ms: Annotated[int, Meta(ge=1, le=MAX_VALID_FOR_MS)]
    actions: Annotated[dict[Annotated[str, _NAME], Verb], Meta(min_length=1)]


class Asked(msgspec.Struct, frozen=True):
    """What the model asks for, inside the envelope."""

    action: str
    values: dict[str, float | int | str | bool]
    clamped: dict[str, float]  # field -> what was asked before the envelope changed it


class Rejected(msgspec.Struct, frozen=True):
    reason: str  # messages.RefusalReason
    detail: str


def load(name_or_path: str) -> Space:
    """A ready space by name, or a YAML file by path. Raises ConfigError."""
    ready = READY_SPACES / f"{name_or_path}.yaml"
    path = ready if "/" not in name_or_path and ready.is_file() else Path(name_or_path)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in READY_SPACES.glob("*.yaml")))
        raise ConfigError(f"task.space: expected one of {known}, or the path of a YAML file; found {name_or_path!r}")
    space = checked(parse_yaml(read_text(path), str(path)), Space, str(path))
    for verb_name, verb in space.actions.items():
        names = [field.name or key for key, field in verb.fields.items()]
        if len(set(names)) < len(names) or "action" in verb.fields:
            raise ConfigError(f"{path}: actions.{verb_name}.fields: names must differ, and none may be 'action'")
        for key, field in verb.fields.items():
            _check_field(field, f"{path}: actions.{verb_name}.fields.{key}")
    return space


def _check_field(field: Field, where: str) -> None:
    numbers = (field.min, field.max, field.step)
    if field.one_of is not None:
        if any(n is not None for n in numbers) or field.unit or not field.one_of:
            raise ConfigError(f"{where}: expected either one_of, or min, max and step; found both")
        if len(set(field.one_of)) < len(field.one_of):
            raise ConfigError(f"{where}: one_of: the words must differ")
        return
    if any(n is None or not math.isfinite(n) for n in numbers):
        raise ConfigError(f"{where}: expected finite min, max and step, or one_of; found {numbers}")
    if not _is_decimal(field.step):
        raise ConfigError(
            f"{where}: step: expected one like 0.01, 0.05, 0.25 or 1; found {field.step}, which has no end"
        )
    if not field.min < field.max or field.step > field.max - field.min:
        raise ConfigError(f"{where}: expected min < max and a step within; found {numbers}")


def _is_decimal(step: float) -> bool:
    """Whether shifting the point gives a whole number in floating point, which is how the grammar reads a step."""
    for _ in range(7):
        if step.is_integer():
            return True
        step *= 10
    return False


def schema(space: Space) -> dict:
    """The JSON schema of every answer the space allows: one compact object, `action` first, fields in their order."""
    return {"anyOf": [_verb_schema(name, verb) for name, verb in space.actions.items()]}


def _verb_schema(name: str, verb: Verb) -> dict:
    properties: dict[str, dict] = {"action": {"const": name}}
    for key, field in verb.fields.items():
        if field.one_of is not None:
            properties[key] = {"enum": field.one_of}
        else:
            whole = all(float(n).is_integer() for n in (field.min, field.max, field.step))
            properties[key] = {
                "type": "integer" if whole else "number",
                "minimum": int(field.min) if whole else field.min,
                "maximum": int(field.max) if whole else field.max,
                "multipleOf": int(field.step) if whole else field.step,
            }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def describe(space: Space) -> str:
    """The space in the model's words, for the pinned prefix."""
    lines = [space.about] if space.about else []
    for name, verb in space.actions.items():
        fields = []
        for key, field in verb.fields.items():
            if field.one_of is not None:
                what, join = [field.about, " or ".join(field.one_of)], ": "
            else:
                what, join = [field.about, field.unit, f"{field.min:g} to {field.max:g}"], ", "
            fields.append(f"{key} ({join.join(filter(None, what))})")
        said = "; ".join(part for part in (verb.about, ", ".join(fields)) if part)
        lines.append(f"{name}: {said}" if said else name)
    return "\n".join(lines)


def read(text: str, space: Space) -> Asked | Rejected:
    """The model's text -> a request inside the envelope, or why it is none. Numbers outside a range are clamped and
    reported; everything else that does not fit is rejected whole."""
    try:
        answer = msgspec.json.decode(text.encode())
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        return Rejected("invalid", f"not JSON: {error}")
    if not isinstance(answer, dict):
        return Rejected("invalid", f"expected an object, found {type(answer).__name__}")
    name = answer.pop("action", None)
    verb = space.actions.get(name) if isinstance(name, str) else None
    if verb is None:
        return Rejected("invalid", f"action: expected one of {', '.join(space.actions)}, found {str(name)[:40]!r}")
    if answer.keys() != verb.fields.keys():
        return Rejected("invalid", f"{name}: expected fields {sorted(verb.fields)}, found {sorted(answer)[:10]}")
    values: dict[str, float | int | str | bool] = {}
    clamped: dict[str, float] = {}
    for key, field in verb.fields.items():
        value, wire_name = answer[key], field.name or key
        if field.one_of is not None:
            if value not in field.one_of:
                return Rejected("invalid", f"{name}.{key}: expected one of {field.one_of}, found {str(value)[:40]!r}")
            values[wire_name] = value
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            return Rejected("invalid", f"{name}.{key}: expected a number, found {type(value).__name__}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            return Rejected("not-finite", f"{name}.{key}")
        values[wire_name] = min(max(number, field.min), field.max)
        if values[wire_name] != number:
            clamped[wire_name] = number
    return Asked(name, values, clamped)
