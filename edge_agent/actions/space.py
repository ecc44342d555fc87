"""An action space: the action types a robot accepts and the range of every field. Read from YAML and checked.

This file knows no clock, no socket and no model. The other files of this folder use the action space: prompt.py
describes it to the model, grammar.py and action_tokens.py restrict what the model can write, envelope.py checks what
the model wrote.

    >>> space = load_action_space("velocity_body")
    >>> list(space.actions)
    ['move', 'search', 'hold', 'land']
    >>> space.actions["move"].fields["vx"].max
    2.0
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_agent.actions.decimals import (
    MAX_DECIMALS,
    decimal,
    has_exact_grammar,
    is_decimal_fraction,
    n_multiples,
)
from edge_agent.errors import ConfigError
from edge_agent.strict_yaml import convert, parse_yaml, read_text

READY_SPACES = Path(__file__).parent / "spaces"
# Below the offboard time-out of PX4 (1 s): an action expires before the autopilot declares the link lost.
MAX_VALID_FOR_MS = 900
PLACEHOLDER = re.compile("[{](.*?)[}]")  # {key} in the text of the vehicle state
MAX_NUMBER = 1e9  # of min and max, as of the vehicle state
MAX_LISTED = 5000  # values of a field that the grammar has to list: see grammar.py
_NAME = Meta(pattern="^[a-z][a-z0-9_]{0,31}$")
_NUMBER_KEYS = {"min", "max", "step", "unit", "q01", "q99"}


class NumberField(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A field of an action that is a number with a range and a step."""

    name: Annotated[str, _NAME] | None = None  # name on the wire: quantity and unit. Default: the key in the YAML file
    about: str = ""
    unit: str = ""
    min: float
    max: float
    step: Annotated[float, Meta(gt=0)]  # the resolution of the model's answer; fewer digits are fewer tokens
    q01: float | None = None  # codec action_tokens: the range that the 256 tokens divide. Default: min to max
    q99: float | None = None


class ChoiceField(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A field of an action that is one of several words."""

    name: Annotated[str, _NAME] | None = None  # name on the wire. Default: the key in the YAML file
    about: str = ""
    one_of: Annotated[list[Annotated[str, _NAME]], Meta(min_length=1)]


ActionField = NumberField | ChoiceField


class ActionType(msgspec.Struct, frozen=True, kw_only=True):
    """One action type, for example `move`, with its fields by key. The model writes the keys."""

    about: str = ""
    fields: dict[str, ActionField] = {}


class VehicleStateField(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A value that the controller knows and pushes: a number, a bool or a short word."""

    unit: Annotated[str, Meta(max_length=16)] = ""
    decimals: Annotated[int, Meta(ge=0, le=6)] = 1
    max_age_ms: Annotated[int, Meta(ge=1)] = 1000  # an older value is shown to the model as "unknown"


class VehicleStatePrompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The text that tells the model the vehicle state, and the values that the text shows."""

    text: Annotated[str, Meta(min_length=1, max_length=500)]  # before "Action?" in the prompt; {key} becomes the value
    values: Annotated[dict[Annotated[str, _NAME], VehicleStateField], Meta(min_length=1, max_length=64)]


class _SpaceSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: Annotated[str, _NAME]
    about: str = ""
    valid_for_ms: Annotated[int, Meta(ge=1, le=MAX_VALID_FOR_MS)]
    codec: Literal["json", "action_tokens"] = "json"  # how the model writes an answer: grammar.py or action_tokens.py
    horizon: Annotated[int, Meta(ge=1, le=16)] = 1  # codec action_tokens: number of steps in one answer
    chunk_step_ms: Annotated[int, Meta(ge=0)] = 0  # time from one step to the next
    vehicle_state: VehicleStatePrompt | None = None


class ActionSpace(_SpaceSettings, frozen=True, kw_only=True):
    """Everything that the model can ask the vehicle to do."""

    actions: dict[str, ActionType]


# The same as in the YAML file, where a field is a mapping whose keys decide between NumberField and ChoiceField.
class _ActionTypeInFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    about: str = ""
    fields: dict[Annotated[str, _NAME], dict[str, object]] = {}


class _ActionSpaceInFile(_SpaceSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    actions: Annotated[dict[Annotated[str, _NAME], _ActionTypeInFile], Meta(min_length=1, max_length=256)]


def load_action_space(name_or_path: str) -> ActionSpace:
    """Read a ready action space by its name, or a YAML file by its path. Raises ConfigError."""
    ready = READY_SPACES / f"{name_or_path}.yaml"
    path = ready if "/" not in name_or_path and ready.is_file() else Path(name_or_path)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in READY_SPACES.glob("*.yaml")))
        raise ConfigError(
            f"task.action_space: expected one of {names}, or the path of a YAML file; found {name_or_path!r}"
        )
    return _read_space(parse_yaml(read_text(path), str(path)), str(path))


def encode_action_space(space: ActionSpace) -> bytes:
    """For another process, which must not read the file again: it can have changed."""
    return msgspec.msgpack.encode(space)


def decode_action_space(raw: bytes) -> ActionSpace:
    """What encode_action_space has encoded."""
    return _read_space(msgspec.msgpack.decode(raw), "action space")


def _read_space(value: object, file: str) -> ActionSpace:
    """Raises ConfigError."""
    space = convert(value, _ActionSpaceInFile, file)
    _check_horizon(space, file)
    if space.vehicle_state is not None:
        _check_vehicle_state_prompt(space.vehicle_state, file)
    actions = {name: _read_action_type(action, name, file) for name, action in space.actions.items()}
    return ActionSpace(**(msgspec.structs.asdict(space) | {"actions": actions}))


def wire_name(key: str, field: ActionField) -> str:
    """The name of a field in Action.values."""
    return field.name or key


def _read_action_type(action: _ActionTypeInFile, action_name: str, file: str) -> ActionType:
    where = f"actions.{action_name}.fields"
    fields: dict[str, ActionField] = {}
    for key, value in action.fields.items():
        if key in ("action", "chunk"):  # keys of the model's answer: the action type, and the later steps
            raise ConfigError(f"{file}: {where}: {key!r} is reserved; rename the field")
        fields[key] = _read_field(value, f"{where}.{key}", file)
    names = [wire_name(key, field) for key, field in fields.items()]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{file}: {where}: two fields have the name {repeated[0]!r} on the wire; rename one")
    return ActionType(about=action.about, fields=fields)


def _read_field(value: dict[str, object], where: str, file: str) -> ActionField:
    if "one_of" in value:
        if number_keys := sorted(value.keys() & _NUMBER_KEYS):
            raise ConfigError(
                f"{file}: {where}: expected either one_of, or min, max and step; found one_of and {number_keys[0]}"
            )
        choice = convert(value, ChoiceField, file, where)
        if len(set(choice.one_of)) < len(choice.one_of):
            raise ConfigError(f"{file}: {where}.one_of: the words must differ; found {choice.one_of}")
        return choice
    if not value.keys() & _NUMBER_KEYS:
        raise ConfigError(f"{file}: {where}: expected min, max and step for a number, or one_of for a choice")
    number = convert(value, NumberField, file, where)
    _check_number_field(number, f"{file}: {where}")
    return number


def _check_number_field(field: NumberField, where: str) -> None:
    limits = f"min {field.min:g}, max {field.max:g}, step {field.step:g}"
    if not all(map(math.isfinite, (field.min, field.max, field.step))):
        raise ConfigError(f"{where}: min, max and step must be finite; found {limits}")
    if max(abs(field.min), abs(field.max)) > MAX_NUMBER:
        raise ConfigError(f"{where}: min and max must be within {MAX_NUMBER:.0e}; found {limits}")
    if not is_decimal_fraction(field.step):
        raise ConfigError(
            f"{where}.step: must be a decimal fraction such as 0.01 or 0.25, with at most {MAX_DECIMALS} digits behind "
            f"the point; found {field.step!r}"
        )
    if field.min >= field.max or decimal(field.step) > decimal(field.max) - decimal(field.min):
        raise ConfigError(f"{where}: min must be below max, and step at most max - min; found {limits}")
    n = n_multiples(field.min, field.max, field.step)
    if n > MAX_LISTED and not has_exact_grammar(field.min, field.max, field.step):
        raise ConfigError(
            f"{where}.step: {n} values from min to max; expected at most {MAX_LISTED}; found {limits}; take a larger "
            "step, or one of 0.1, 0.01, 0.001 with limits that are multiples of it"
        )
    if field.q01 is None and field.q99 is None:
        return
    if field.q01 is None or field.q99 is None:
        raise ConfigError(f"{where}: expected both q01 and q99, or neither; found q01 {field.q01}, q99 {field.q99}")
    if not (math.isfinite(field.q01) and math.isfinite(field.q99) and field.q01 < field.q99):
        raise ConfigError(f"{where}: q01 must be below q99, both finite; found q01 {field.q01:g}, q99 {field.q99:g}")


def _check_horizon(space: _SpaceSettings, where: str) -> None:
    if space.horizon == 1:
        if space.chunk_step_ms:
            raise ConfigError(f"{where}: chunk_step_ms: must be 0 when horizon is 1; found {space.chunk_step_ms}")
        return
    if space.codec != "action_tokens":
        raise ConfigError(f"{where}: horizon: must be 1 with codec {space.codec}; found {space.horizon}")
    if space.chunk_step_ms == 0:
        raise ConfigError(f"{where}: chunk_step_ms: must be at least 1 when horizon is above 1; found 0")
    if space.chunk_step_ms * space.horizon > space.valid_for_ms:
        raise ConfigError(
            f"{where}: chunk_step_ms: {space.horizon} steps must end within valid_for_ms {space.valid_for_ms}; "
            f"found {space.horizon} steps of {space.chunk_step_ms} ms"
        )


def _check_vehicle_state_prompt(state: VehicleStatePrompt, where: str) -> None:
    keys = PLACEHOLDER.findall(state.text)
    if set(keys) != set(state.values) or not state.text.count("{") == state.text.count("}") == len(keys):
        expected = ", ".join(f"{{{key}}}" for key in state.values)
        raise ConfigError(
            f"{where}: vehicle_state.text: must contain each of {expected} and no other brace; found {state.text!r}"
        )
