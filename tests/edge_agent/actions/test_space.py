"""Action spaces: the ready ones load, and every mistake in a YAML file is one line that names the place."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from edge_agent.actions.envelope import CheckedAction, parse_answer
from edge_agent.actions.space import (
    MAX_VALID_FOR_MS,
    READY_SPACES,
    ChoiceField,
    NumberField,
    load_action_space,
)
from edge_agent.errors import ConfigError

READY = ("velocity_body", "velocity_body_action_tokens", "waypoint")
VELOCITY, WAYPOINT = load_action_space("velocity_body"), load_action_space("waypoint")
SPACE = {
    "name": "rover",
    "valid_for_ms": 400,
    "actions": {
        "drive": {
            "about": "drive on",
            "fields": {
                "v": {"name": "speed_m_s", "about": "speed", "unit": "m/s", "min": -1, "max": 2.5, "step": 0.5},
                "gear": {"min": 1, "max": 3, "step": 1},
                "horn": {"one_of": ["on", "off"]},
            },
        },
        "stop": {},
    },
}
STATE = {"text": "Altitude {altitude_m}. ", "values": {"altitude_m": {"unit": "m"}}}


def changed(path: str, value: object) -> dict:
    """SPACE with one value replaced, or removed if value is ..."""
    space = json.loads(json.dumps(SPACE))
    *steps, last = path.split(".")
    inner = space
    for step in steps:
        inner = inner[step]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return space


def write_yaml(tmp_path: Path, space: object) -> str:
    path = tmp_path / "rover.yaml"
    path.write_text(yaml.safe_dump(space, sort_keys=False), encoding="utf-8")
    return str(path)


def error_of(tmp_path: Path, space: object) -> str:
    """The one line of the ConfigError, without the file's path."""
    file = write_yaml(tmp_path, space)
    with pytest.raises(ConfigError) as caught:
        load_action_space(file)
    line = str(caught.value)
    assert line.startswith(f"{file}: ") and "\n" not in line
    return line.removeprefix(f"{file}: ")


# -- ready spaces -----------------------------------------------------------------------------------------------------


def test_every_ready_space_loads():
    assert sorted(path.stem for path in READY_SPACES.glob("*.yaml")) == sorted(READY)
    for name in READY:
        assert load_action_space(name).name == name


def test_an_action_expires_before_an_autopilot_declares_the_link_lost():
    assert MAX_VALID_FOR_MS < 1000  # PX4's COM_OF_LOSS_T, the shortest time-out of an autopilot
    assert all(load_action_space(name).valid_for_ms <= MAX_VALID_FOR_MS for name in READY)


def test_ranges_of_the_ready_spaces():
    """The largest request to a vehicle, written a second time: a typing error in the YAML file fails here."""
    ranges = {
        (space.name, field.name): (field.min, field.max)
        for space in (VELOCITY, WAYPOINT)
        for action in space.actions.values()
        for field in action.fields.values()
        if isinstance(field, NumberField)
    }
    assert ranges == {
        ("velocity_body", "forward_m_s"): (-2, 2),
        ("velocity_body", "right_m_s"): (-2, 2),
        ("velocity_body", "down_m_s"): (-1, 1),
        ("velocity_body", "yaw_rate_rad_s"): (-0.8, 0.8),
        ("waypoint", "forward_m"): (-20, 20),
        ("waypoint", "right_m"): (-20, 20),
        ("waypoint", "down_m"): (-5, 5),
    }
    assert set(VELOCITY.actions) == {"move", "search", "hold", "land"}
    assert set(WAYPOINT.actions) == {"waypoint", "search", "hold", "land"}


# -- spaces from a file -----------------------------------------------------------------------------------------------


def test_a_space_is_read_by_its_path(tmp_path):
    space = load_action_space(write_yaml(tmp_path, SPACE))
    assert list(space.actions) == ["drive", "stop"] and space.valid_for_ms == 400
    assert space.actions["stop"].fields == {}
    assert space.actions["drive"].fields == {
        "v": NumberField(name="speed_m_s", about="speed", unit="m/s", min=-1.0, max=2.5, step=0.5),
        "gear": NumberField(min=1.0, max=3.0, step=1.0),
        "horn": ChoiceField(one_of=["on", "off"]),
    }
    assert parse_answer('{"action":"drive","v":1.5,"gear":2,"horn":"on"}', space) == CheckedAction(
        "drive", {"speed_m_s": 1.5, "gear": 2.0, "horn": "on"}, {}
    )


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("name", ..., "top level: name: missing; expected keys name, about, valid_for_ms, codec, horizon"),
        ("name", "Rover", "name: expected `str` matching regex"),
        ("name", "", "name: expected `str` matching regex"),
        ("name", "a" * 33, "name: expected `str` matching regex"),
        ("valid_for_ms", ..., "top level: valid_for_ms: missing"),
        ("valid_for_ms", 0, "valid_for_ms: expected `int` >= 1, found 0"),
        ("valid_for_ms", 901, "valid_for_ms: expected `int` <= 900, found 901"),
        ("valid_for_ms", 400.5, "valid_for_ms: expected `int`, found 400.5"),
        ("valid_for", 400, "top level: unknown key 'valid_for'; expected one of name, "),
        ("actions", {}, "actions: expected a mapping of length >= 1, found a mapping"),
        ("actions", ["drive"], "actions: expected a mapping, found ['drive']"),
        ("actions.Drive", {}, "actions: key: expected `str` matching regex '^[a-z][a-z0-9_]{0,31}$', found 'Drive'"),
        ("actions.drive.field", {}, "actions.drive: unknown key 'field'; expected one of about, fields; did you mean"),
        ("actions.drive.fields", ["v"], "actions.drive.fields: expected a mapping, found ['v']"),
        ("actions.drive.fields.VX", {"one_of": ["a"]}, "actions.drive.fields: key: expected `str` matching regex"),
    ],
)
def test_a_mistake_in_the_space_is_named(tmp_path, path, value, line):
    assert error_of(tmp_path, changed(path, value)).startswith(line)


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("v", 3, ": expected a mapping, found 3"),
        ("v.maximum", 3, ": unknown key 'maximum'; expected one of name, about, unit, min, max, step, q01, q99"),
        ("v.min", "fast", ".min: expected `float`, found 'fast'"),
        ("v.min", ..., ": min: missing"),
        ("v.max", ..., ": max: missing"),
        ("v.step", ..., ": step: missing"),
        ("v.min", math.nan, ": min, max and step must be finite; found min nan, max 2.5, step 0.5"),
        ("v.max", math.inf, ": min, max and step must be finite; found min -1, max inf, step 0.5"),
        ("v.step", math.inf, ": min, max and step must be finite"),
        ("v.step", 0, ".step: expected `float` > 0.0, found 0"),
        ("v.step", 1 / 3, ".step: must be a decimal fraction such as 0.01 or 0.25, with at most 6 digits behind"),
        ("v.step", 1e-7, ".step: must be a decimal fraction such as 0.01"),
        ("v.step", 0.1 + 0.2, ".step: must be a decimal fraction such as 0.01"),
        ("v.step", 0.00053, ".step: 6603 values from min to max; expected at most 5000; found min -1, max 2.5, step"),
        ("v.max", 2.0**63, ": min and max must be within 1e+09; found min -1, max 9.22337e+18"),
        ("v.min", -(2**63), ": min and max must be within 1e+09"),
        ("v.max", 1.7e308, ": min and max must be within 1e+09"),
        ("v.step", 3.6, ": min must be below max, and step at most max - min; found min -1, max 2.5, step 3.6"),
        ("v.min", 2.5, ": min must be below max"),
        ("v.min", 3, ": min must be below max"),
        ("v.q01", 1.0, ": expected both q01 and q99, or neither; found q01 1.0, q99 None"),
        ("v.q99", 1.0, ": expected both q01 and q99, or neither; found q01 None, q99 1.0"),
        ("gear", {"about": "which"}, ": expected min, max and step for a number, or one_of for a choice"),
        ("horn.min", 0, ": expected either one_of, or min, max and step; found one_of and min"),
        ("horn.unit", "m", ": expected either one_of, or min, max and step; found one_of and unit"),
        ("horn.q01", 1.0, ": expected either one_of, or min, max and step; found one_of and q01"),
        ("horn.word", "a", ": unknown key 'word'; expected one of name, about, one_of"),
        ("horn.one_of", [], ".one_of: expected a list of length >= 1, found []"),
        ("horn.one_of", ["on", "on"], ".one_of: the words must differ; found ['on', 'on']"),
        ("horn.one_of", ["On"], ".one_of[0]: expected `str` matching regex"),
        ("horn.one_of", ['a"b'], ".one_of[0]: expected `str` matching regex"),
        ("gear.name", "v m", ".name: expected `str` matching regex"),
    ],
)
def test_a_mistake_in_a_field_is_named(tmp_path, field, value, line):
    where = f"actions.drive.fields.{field.partition('.')[0]}"
    assert error_of(tmp_path, changed(f"actions.drive.fields.{field}", value)).startswith(where + line)


@pytest.mark.parametrize(
    ("low", "high", "step"),
    [
        (-2.1, 2.1, 0.07),
        (-2.1, 2.1, 0.035),
        (-1, 1, 0.53),
        (0.1, 0.4, 0.3),  # in binary, 0.4 - 0.1 is above 0.3
        (0.9, 1.2, 0.3),  # and 1.2 - 0.9 is below it
        (-1e9, 1e9, 0.1),
        (0, 1, 1e-6),
    ],
)
def test_a_step_is_judged_as_the_decimal_fraction_that_was_written(tmp_path, low, high, step):
    space = changed("actions.drive.fields.gear", {"min": low, "max": high, "step": step})
    assert load_action_space(write_yaml(tmp_path, space)).actions["drive"].fields["gear"].step == step


@pytest.mark.parametrize(("q01", "q99"), [(1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (math.nan, 1.0)])
def test_quantiles_are_finite_and_in_order(tmp_path, q01, q99):
    field = {"min": -2.0, "max": 2.0, "step": 0.01, "q01": q01, "q99": q99}
    line = error_of(tmp_path, changed("actions.drive.fields.gear", field))
    assert line.startswith("actions.drive.fields.gear: q01 must be below q99, both finite; found q01 ")
    space = load_action_space(
        write_yaml(tmp_path, changed("actions.drive.fields.gear", field | {"q01": -0.5, "q99": 1.5}))
    )
    assert space.actions["drive"].fields["gear"] == NumberField(min=-2.0, max=2.0, step=0.01, q01=-0.5, q99=1.5)


@pytest.mark.parametrize("key", ["action", "chunk"])
def test_the_keys_of_an_answer_are_reserved(tmp_path, key):
    line = error_of(tmp_path, changed(f"actions.drive.fields.{key}", {"one_of": ["a"]}))
    assert line == f"actions.drive.fields: {key!r} is reserved; rename the field"


def test_two_fields_cannot_have_one_name_on_the_wire(tmp_path):
    for key, name in [("gear", "speed_m_s"), ("v", "horn")]:
        line = error_of(tmp_path, changed(f"actions.drive.fields.{key}.name", name))
        assert line == f"actions.drive.fields: two fields have the name {name!r} on the wire; rename one"


def test_the_longest_validity_is_allowed(tmp_path):
    assert load_action_space(write_yaml(tmp_path, changed("valid_for_ms", 900))).valid_for_ms == 900


def test_an_unknown_name_lists_the_ready_spaces(tmp_path):
    for name in ("velocity", "", str(tmp_path / "none.yaml"), "../spaces/velocity_body", str(tmp_path)):
        with pytest.raises(ConfigError) as caught:
            load_action_space(name)
        assert str(caught.value) == (
            "task.action_space: expected one of velocity_body, velocity_body_action_tokens, waypoint, or the path of "
            f"a YAML file; found {name!r}"
        )


def test_a_file_that_is_not_a_space_is_refused(tmp_path):
    path = tmp_path / "rover.yaml"
    for raw in (b"", b"- a", b"a: [", b"text", b"\xff\xfe", b"\x00"):
        path.write_bytes(raw)
        with pytest.raises(ConfigError) as caught:
            load_action_space(str(path))
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


# -- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"chunk_step_ms": 100}, "chunk_step_ms: must be 0 when horizon is 1; found 100"),
        ({"horizon": 4, "chunk_step_ms": 100}, "horizon: must be 1 with codec json; found 4"),
        (
            {"codec": "action_tokens", "horizon": 4},
            "chunk_step_ms: must be at least 1 when horizon is above 1; found 0",
        ),
        (
            {"codec": "action_tokens", "horizon": 5, "chunk_step_ms": 81},
            "chunk_step_ms: 5 steps must end within valid_for_ms 400; found 5 steps of 81 ms",
        ),
        ({"codec": "bins"}, "codec: expected one of json, action_tokens, found 'bins'"),
        ({"horizon": 17}, "horizon: expected `int` <= 16, found 17"),
    ],
)
def test_a_chunk_ends_while_its_action_is_valid(tmp_path, changes, line):
    assert error_of(tmp_path, SPACE | changes) == line
    whole = SPACE | {"codec": "action_tokens", "horizon": 5, "chunk_step_ms": 80}
    assert load_action_space(write_yaml(tmp_path, whole)).horizon == 5


# -- vehicle state ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["Height.", "{altitude}", "{altitude_m!r}", "{altitude_m} }", "{altitude_m} {", "{altitude_m} {mode}"]
)
def test_the_text_of_the_vehicle_state_names_each_value_and_nothing_else(tmp_path, text):
    assert error_of(tmp_path, SPACE | {"vehicle_state": STATE | {"text": text}}) == (
        f"vehicle_state.text: must contain each of {{altitude_m}} and no other brace; found {text!r}"
    )
    assert load_action_space(write_yaml(tmp_path, SPACE | {"vehicle_state": STATE})).vehicle_state is not None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"txt": "a"}, "vehicle_state: unknown key 'txt'; expected one of text, values; did you mean 'text'?"),
        ({"values": {"altitude_m": {"decimals": 7}}}, "vehicle_state.values.altitude_m.decimals: expected `int` <= 6"),
        ({"values": {"Altitude": {}}}, "vehicle_state.values: key: expected `str` matching regex"),
        ({"values": {}}, "vehicle_state.values: expected a mapping of length >= 1"),
    ],
)
def test_a_mistake_in_the_vehicle_state_is_named(tmp_path, changes, line):
    assert error_of(tmp_path, SPACE | {"vehicle_state": STATE | changes}).startswith(line)
