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
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_agent.errors import ConfigError
from edge_agent.strict_yaml import convert, parse_yaml, read_text

READY_SPACES = Path(__file__).parent / "spaces"
_NAME = Meta(pattern="^[a-z][a-z0-9_]{0,31}$")
MAX_VALID_FOR_MS = (
    900  # below PX4's 1 s offboard time-out: an expired action is gone before the autopilot gives up on us
)


class ActionField(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A number with a range and a step, or one of several words."""

    name: Annotated[str, _NAME] | None = None  # what controllers see; says quantity and unit. Default: the key itself
    about: str = ""
    unit: str = ""
    min: float | None = None
    max: float | None = None
    step: Annotated[float, Meta(gt=0)] | None = None  # the model's resolution; fewer digits are fewer tokens
    q01: float | None = None  # codec action_tokens: the range that its 256 steps divide; default min and max
    q99: float | None = None
    one_of: list[Annotated[str, _NAME]] | None = None


class ActionType(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    about: str = ""
    fields: dict[Annotated[str, _NAME], ActionField] = {}


class VehicleStateField(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Something the controller knows and pushes: a number, yes or no, or a short word."""

    unit: Annotated[str, Meta(max_length=16)] = ""
    decimals: Annotated[int, Meta(ge=0, le=6)] = 1
    max_age_ms: Annotated[int, Meta(ge=1)] = 1000  # an older value is unknown


class VehicleStatePrompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    text: Annotated[str, Meta(min_length=1, max_length=500)]  # stands before "Action?"; {key} becomes the value
    values: Annotated[dict[Annotated[str, _NAME], VehicleStateField], Meta(min_length=1, max_length=64)]


class ActionSpace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: Annotated[str, _NAME]
    about: str = ""
    valid_for_ms: Annotated[int, Meta(ge=1, le=MAX_VALID_FOR_MS)]
    actions: Annotated[dict[Annotated[str, _NAME], ActionType], Meta(min_length=1, max_length=256)]
    codec: Literal["json", "action_tokens"] = "json"  # how the model writes an answer; see bins.py
    horizon: Annotated[int, Meta(ge=1, le=16)] = 1  # codec action_tokens: steps in an answer
    chunk_step_ms: Annotated[int, Meta(ge=0)] = 0  # from one to the next
    vehicle_state: VehicleStatePrompt | None = None


def load_action_space(name_or_path: str) -> ActionSpace:
    """A ready space by name, or a YAML file by path. Raises ConfigError."""
    ready = READY_SPACES / f"{name_or_path}.yaml"
    path = ready if "/" not in name_or_path and ready.is_file() else Path(name_or_path)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in READY_SPACES.glob("*.yaml")))
        raise ConfigError(
            f"task.action_space: expected one of {known}, or the path of a YAML file; found {name_or_path!r}"
        )
    space = convert(parse_yaml(read_text(path), str(path)), ActionSpace, str(path))
    _check_steps(space, str(path))
    if space.vehicle_state is not None:
        _check_vehicle_state_prompt(space.vehicle_state, str(path))
    for verb_name, verb in space.actions.items():
        names = [field.name or key for key, field in verb.fields.items()]
        if len(set(names)) < len(names) or "action" in verb.fields:
            raise ConfigError(f"{path}: actions.{verb_name}.fields: names must differ, and none may be 'action'")
        if "chunk" in verb.fields:
            raise ConfigError(f"{path}: actions.{verb_name}.fields: 'chunk' means the steps that follow; rename it")
        for key, field in verb.fields.items():
            _check_field(field, f"{path}: actions.{verb_name}.fields.{key}")
    return space


def _check_steps(space: ActionSpace, where: str) -> None:
    if space.horizon == 1 and not space.chunk_step_ms:
        return
    if space.codec != "action_tokens":
        raise ConfigError(
            f"{where}: horizon: expected 1 with codec json, found {space.horizon}; chunk_step_ms belongs to it"
        )
    if not 0 < space.chunk_step_ms * space.horizon <= space.valid_for_ms or space.horizon == 1:
        raise ConfigError(
            f"{where}: chunk_step_ms: expected one with a horizon of several steps that end within valid_for_ms "
            f"{space.valid_for_ms}, found {space.horizon} of {space.chunk_step_ms} ms"
        )


def _check_vehicle_state_prompt(state: VehicleStatePrompt, where: str) -> None:
    named = re.findall(r"[{](.*?)[}]", state.text)
    if set(named) != set(state.values) or state.text.count("{") != len(named) or state.text.count("}") != len(named):
        raise ConfigError(
            f"{where}: vehicle_state.text: expected each of {', '.join(state.values)} as {{key}}, and no other "
            f"brace; found {state.text!r}"
        )


def _check_field(field: ActionField, where: str) -> None:
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
