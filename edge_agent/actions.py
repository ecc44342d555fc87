"""What the robot may do: an action space from YAML -> a JSON schema for the decoder; text -> Asked or Rejected; and
what the robot says of itself, as text for the model.

Pure: no clock, no sockets, no model. The grammar already keeps the model inside the space; `read` trusts none of that
and checks everything again, because this is the last code that sees an action before it leaves.

    >>> space = load("velocity_body")
    >>> read('{"action":"move","vx":9,"vy":0,"vz":0,"yaw":0}', space).clamped
    {'forward_m_s': 9.0}
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_agent.config import ConfigError, checked, parse_yaml, read_text
from edge_agent.messages import Fact

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
    q01: float | None = None  # codec bins: the range that its 256 steps divide; default min and max
    q99: float | None = None
    one_of: list[Annotated[str, _NAME]] | None = None


class Verb(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    about: str = ""
    fields: dict[Annotated[str, _NAME], Field] = {}


class StateValue(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Something the controller knows and pushes: a number, yes or no, or a short word."""

    unit: Annotated[str, Meta(max_length=16)] = ""
    decimals: Annotated[int, Meta(ge=0, le=6)] = 1
    max_age_ms: Annotated[int, Meta(ge=1)] = 1000  # an older value is unknown


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    text: Annotated[str, Meta(min_length=1, max_length=500)]  # stands before "Action?"; {key} becomes the value
    values: Annotated[dict[Annotated[str, _NAME], StateValue], Meta(min_length=1, max_length=64)]


class Space(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: Annotated[str, _NAME]
    about: str = ""
    valid_for_ms: Annotated[int, Meta(ge=1, le=MAX_VALID_FOR_MS)]
    actions: Annotated[dict[Annotated[str, _NAME], Verb], Meta(min_length=1, max_length=256)]
    codec: Literal["json", "bins"] = "json"  # how the model writes an answer; see bins.py
    horizon: Annotated[int, Meta(ge=1, le=16)] = 1  # codec bins: steps in an answer
    step_ms: Annotated[int, Meta(ge=0)] = 0  # from one to the next
    state: State | None = None


class Asked(msgspec.Struct, frozen=True):
    """What the model asks for, inside the envelope."""

    action: str
    values: dict[str, float | int | str | bool]
    clamped: dict[str, float]  # field -> what was asked before the envelope changed it; of a later step: "later.0.…"
    later: list[dict[str, float | int | str | bool]] = []  # the steps after this one


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
    _check_steps(space, str(path))
    if space.state is not None:
        _check_state(space.state, str(path))
    for verb_name, verb in space.actions.items():
        names = [field.name or key for key, field in verb.fields.items()]
        if len(set(names)) < len(names) or "action" in verb.fields:
            raise ConfigError(f"{path}: actions.{verb_name}.fields: names must differ, and none may be 'action'")
        if "later" in verb.fields:
            raise ConfigError(f"{path}: actions.{verb_name}.fields: 'later' means the steps that follow; rename it")
        for key, field in verb.fields.items():
            _check_field(field, f"{path}: actions.{verb_name}.fields.{key}")
    return space


def _check_steps(space: Space, where: str) -> None:
    if space.horizon == 1 and not space.step_ms:
        return
    if space.codec != "bins":
        raise ConfigError(f"{where}: horizon: expected 1 with codec json, found {space.horizon}; step_ms belongs to it")
    if not 0 < space.step_ms * space.horizon <= space.valid_for_ms or space.horizon == 1:
        raise ConfigError(
            f"{where}: step_ms: expected one with a horizon of several steps that end within valid_for_ms "
            f"{space.valid_for_ms}, found {space.horizon} of {space.step_ms} ms"
        )


def _check_state(state: State, where: str) -> None:
    named = re.findall(r"[{](.*?)[}]", state.text)
    if set(named) != set(state.values) or state.text.count("{") != len(named) or state.text.count("}") != len(named):
        raise ConfigError(
            f"{where}: state.text: expected each of {', '.join(state.values)} as {{key}}, and no other brace; found "
            f"{state.text!r}"
        )


def _check_field(field: Field, where: str) -> None:
    numbers = (field.min, field.max, field.step)
    if field.one_of is not None:
        if any(n is not None for n in (*numbers, field.q01, field.q99)) or field.unit or not field.one_of:
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
    ends = (field.q01, field.q99)
    if ends != (None, None) and not (None not in ends and all(map(math.isfinite, ends)) and field.q01 < field.q99):
        raise ConfigError(f"{where}: expected finite q01 < q99, or neither; found {ends}")


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
    later = answer.pop("later", []) if space.horizon > 1 and verb.fields else []
    if not isinstance(later, list) or len(later) != (space.horizon - 1 if verb.fields else 0):
        return Rejected("invalid", f"{name}: expected {space.horizon - 1} later steps")
    steps: list[dict[str, float | int | str | bool]] = []
    clamped: dict[str, float] = {}
    for i, step in enumerate([answer, *later]):
        found = _read_step(step, verb, name, f"later.{i - 1}." if i else "", clamped)
        if isinstance(found, Rejected):
            return found
        steps.append(found)
    return Asked(name, steps[0], clamped, steps[1:])


def _read_step(
    answer: object, verb: Verb, name: str, at: str, clamped: dict[str, float]
) -> dict[str, float | int | str | bool] | Rejected:
    """One step's values by their wire names; what the envelope changed goes to `clamped`, with `at` before its name."""
    if not isinstance(answer, dict) or answer.keys() != verb.fields.keys():
        found = sorted(answer)[:10] if isinstance(answer, dict) else type(answer).__name__
        return Rejected("invalid", f"{at}{name}: expected fields {sorted(verb.fields)}, found {found}")
    values: dict[str, float | int | str | bool] = {}
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
            clamped[at + wire_name] = number
    return values


# -- what the vehicle says of itself -----------------------------------------------------------------------------------

MAX_FACT = 1e9  # a number of more digits is none that a vehicle has
_WORD = re.compile("[a-z0-9_-]{1,32}")
_LONGEST_FACT = 34  # tokens at most, of a number or a word, without its unit


def check_facts(values: Mapping[str, Fact], space: Space) -> str:
    """Why a controller's values cannot be taken; empty: they can."""
    known = space.state.values if space.state is not None else {}
    for key, value in values.items():
        if key not in known:
            return f"values.{key[:40]}: expected one of {', '.join(known) or 'none: this action space has no state'}"
        if isinstance(value, str):
            if not _WORD.fullmatch(value):
                return f"values.{key}: expected a number, a bool or a word of a-z, 0-9, _ and -; found {value[:40]!r}"
        elif not abs(value) <= MAX_FACT:  # NaN too
            return f"values.{key}: expected a number within ±{MAX_FACT:g}; found {value}"
    return "" if values else "values: expected at least one"


def render_state(space: Space, facts: Mapping[str, tuple[Fact, int]], now_ns: int) -> str:
    """facts: key -> value and when it came, CLOCK_MONOTONIC. -> text that stands behind the frame; "" without state.
    What never came, or is older than it may be, is unknown: never a guess, never a value of before."""
    if space.state is None:
        return ""

    def said(found: re.Match) -> str:
        key = found[1]
        rule, (value, then_ns) = space.state.values[key], facts.get(key, ("", 0))
        if key not in facts or not 0 <= now_ns - then_ns <= rule.max_age_ms * 1_000_000:
            return "unknown"
        if isinstance(value, bool | str):
            return value if isinstance(value, str) else "yes" if value else "no"
        return f"{value:.{rule.decimals}f} {rule.unit}".rstrip()

    return re.sub(r"[{](.*?)[}]", said, space.state.text)


def most_state_tokens(space: Space, count: Callable[[str], int]) -> int:
    """An upper bound of what render_state may give. count: text -> tokens."""
    if space.state is None:
        return 0
    return count(space.state.text) + sum(_LONGEST_FACT + count(rule.unit) for rule in space.state.values.values())
