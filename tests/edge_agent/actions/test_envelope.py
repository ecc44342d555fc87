"""The envelope: any text becomes an action inside the ranges, or a rejection. The last check before the wire."""

from __future__ import annotations

import json
import math
from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_agent.actions.envelope import CheckedAction, Rejection, parse_answer
from edge_agent.actions.space import ActionSpace, ActionType, ChoiceField, NumberField, load_action_space, wire_name
from edge_agent.wire.messages import RefusalReason

VELOCITY, WAYPOINT = load_action_space("velocity_body"), load_action_space("waypoint")
STILL = '{"action":"move","vx":0,"vy":0,"vz":0,"yaw":0}'


@pytest.mark.parametrize(
    ("text", "values", "clamped"),
    [
        ('{"action":"move","vx":0.25,"vy":-0.5,"vz":1,"yaw":0.12}', (0.25, -0.5, 1.0, 0.12), {}),
        ('{"action":"move","vx":2,"vy":-2,"vz":-1,"yaw":-0.8}', (2.0, -2.0, -1.0, -0.8), {}),
        ('{"action":"move","vx":9,"vy":0,"vz":0,"yaw":0}', (2.0, 0.0, 0.0, 0.0), {"forward_m_s": 9.0}),
        (
            '{"action":"move","vx":-2.0000001,"vy":1e300,"vz":0,"yaw":-1e3}',
            (-2.0, 2.0, 0.0, -0.8),
            {"forward_m_s": -2.0000001, "right_m_s": 1e300, "yaw_rate_rad_s": -1000.0},
        ),
        ('  {"yaw":0,"vz":0,"vy":0,"vx":0,"action":"move"}\n', (0.0, 0.0, 0.0, 0.0), {}),
        ('{"action":"move","vx":18446744073709551616,"vy":0,"vz":0,"yaw":0}', (2.0, 0, 0, 0), {"forward_m_s": 2.0**64}),
    ],
)
def test_numbers_are_clamped_and_every_clamp_is_reported(text, values, clamped):
    names = ("forward_m_s", "right_m_s", "down_m_s", "yaw_rate_rad_s")
    checked = parse_answer(text, VELOCITY)
    assert checked == CheckedAction("move", dict(zip(names, values, strict=True)), clamped)
    assert all(type(value) is float for value in checked.values.values())


@pytest.mark.parametrize(
    ("text", "reason", "detail"),
    [
        ("", "invalid", "not JSON"),
        ("move", "invalid", "not JSON"),
        (STILL[:-1], "invalid", "not JSON"),
        (STILL + STILL, "invalid", "not JSON"),
        (STILL + "</s>", "invalid", "not JSON"),
        ("\ud800", "invalid", "not JSON"),
        ("[]", "invalid", "expected an object, found list"),
        ("null", "invalid", "expected an object, found NoneType"),
        ("{}", "invalid", "expected one of move, search, hold, land"),
        ('{"action":"dance"}', "invalid", "found 'dance'"),
        ('{"action":["move"]}', "invalid", "found"),
        ('{"action":{"a":1}}', "invalid", "found"),
        ('{"action":"move"}', "invalid", "move: expected fields ['vx', 'vy', 'vz', 'yaw'], found []"),
        ('{"action":"hold","vx":1}', "invalid", "hold: expected fields [], found ['vx']"),
        (STILL.replace('"vx"', '"forward_m_s"'), "invalid", "expected fields"),
        (STILL.replace('"vx":0', '"vx":"0"'), "invalid", "move.vx: expected a number, found str"),
        (STILL.replace('"vx":0', '"vx":true'), "invalid", "move.vx: expected a number, found bool"),
        (STILL.replace('"vx":0', '"vx":null'), "invalid", "move.vx: expected a number, found NoneType"),
        (STILL.replace('"vx":0', '"vx":[0]'), "invalid", "move.vx: expected a number, found list"),
        (STILL.replace('"vx":0', '"vx":NaN'), "invalid", "not JSON"),
        (STILL.replace('"vx":0', '"vx":-Infinity'), "invalid", "not JSON"),
        (STILL.replace('"vx":0', '"vx":1e999'), "invalid", "not JSON"),
        (STILL.replace('"vx":0', '"vx":' + "9" * 400), "not-finite", "move.vx"),
    ],
)
def test_everything_else_is_rejected_whole_with_a_reason(text, reason, detail):
    rejection = parse_answer(text, VELOCITY)
    assert isinstance(rejection, Rejection) and rejection.reason == reason and detail in rejection.detail


@pytest.mark.parametrize("pace", ['"SLOW"', '"fast"', "null", "1", "true", "[]", "{}", '["slow"]', '""'])
def test_an_unknown_word_is_rejected(pace):
    rejection = parse_answer(f'{{"action":"waypoint","x":0,"y":0,"z":0,"pace":{pace}}}', WAYPOINT)
    assert isinstance(rejection, Rejection) and "waypoint.pace: expected one of ['slow', 'normal']" in rejection.detail


@pytest.mark.parametrize("space", [VELOCITY, WAYPOINT], ids=("velocity_body", "waypoint"))
def test_every_prefix_of_an_answer_is_rejected(space):
    name, fields = next((name, action.fields) for name, action in space.actions.items() if action.fields)
    answer = {"action": name} | {
        key: field.one_of[0] if isinstance(field, ChoiceField) else field.max for key, field in fields.items()
    }
    text = json.dumps(answer, separators=(",", ":"))
    assert isinstance(parse_answer(text, space), CheckedAction)
    for end in range(len(text)):
        assert parse_answer(text[:end], space).reason == "invalid"


# Values that JSON can hold, and those that only careless writers of JSON can.
numbers = (
    st.floats()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 5e-324, -0.0, 2.0, -0.8, 0.8000000000000002])
)
leaves = st.none() | st.booleans() | numbers | st.text(max_size=8) | st.sampled_from(["slow", "normal", "move", "hold"])
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))
KEYS = ["action", "vx", "vy", "vz", "yaw", "x", "y", "z", "pace", "forward_m_s"]
TYPES = ["move", "search", "hold", "land", "waypoint", "fly"]


@st.composite
def answers(draw) -> str:
    """Text that is nearly an answer: a known action type, its keys, and sometimes one mistake."""
    name = draw(st.sampled_from(TYPES))
    keys = {"move": ["vx", "vy", "vz", "yaw"], "waypoint": ["x", "y", "z", "pace"]}.get(name, [])
    pairs = [("action", name)] + [(key, draw(numbers | leaves if key != "pace" else leaves)) for key in keys]
    for _ in range(draw(st.integers(0, 2))):  # extra, repeated and missing keys
        pairs.append((draw(st.sampled_from(KEYS) | st.text(max_size=4)), draw(values)))
    if draw(st.booleans()) and draw(st.booleans()):
        del pairs[draw(st.integers(0, len(pairs) - 1))]
    inside = ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in pairs)
    return "{" + inside + "}"


any_text = (
    answers()
    | st.text()
    | values.map(json.dumps)
    | answers().flatmap(lambda text: st.integers(0, len(text)).map(lambda end: text[:end]))
)


@pytest.mark.parametrize("space", [VELOCITY, WAYPOINT], ids=("velocity_body", "waypoint"))
@settings(deadline=None, max_examples=100)
@given(text=any_text)
@example(text="[" * 100_000)
@example(text='{"a":' * 100_000)
@example(text='{"action":' + "[" * 100_000)
@example(text=STILL.replace("0", "0" * 100_000, 1))
@example(text=STILL.replace("0", "1" * 100_000, 1))
@example(text=STILL.replace('"vx":0', '"vx":1,"vx":1e9'))
@example(text='{"action":"hold","action":"land"}')
def test_any_text_is_a_finite_action_inside_the_ranges_or_a_rejection(space, text):
    check_any_text(space, text)


@pytest.mark.soak
@pytest.mark.parametrize("space", [VELOCITY, WAYPOINT], ids=("velocity_body", "waypoint"))
@settings(deadline=None, max_examples=5000)
@given(text=any_text)
def test_much_more_text(space, text):
    check_any_text(space, text)


def check_any_text(space: ActionSpace, text: str) -> None:
    result = parse_answer(text, space)
    if isinstance(result, Rejection):
        assert result.reason in get_args(RefusalReason)
        return
    fields = {wire_name(key, field): field for key, field in space.actions[result.type].fields.items()}
    assert result.values.keys() == fields.keys() and result.clamped.keys() <= fields.keys()
    answer = json.loads(text)
    written = {wire_name(key, field): answer[key] for key, field in space.actions[result.type].fields.items()}
    for name, field in fields.items():
        value = result.values[name]
        if isinstance(field, ChoiceField):
            assert value in field.one_of and value == written[name] and name not in result.clamped
            continue
        assert type(value) is float and math.isfinite(value) and field.min <= value <= field.max
        if field.min <= written[name] <= field.max:
            assert value == written[name] and name not in result.clamped
        else:
            assert value == (field.max if written[name] > field.max else field.min)
            assert result.clamped[name] == float(written[name]) and math.isfinite(result.clamped[name])


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6), number=st.floats(allow_nan=False, allow_infinity=False))
def test_any_range_holds(low, span, number):
    field = NumberField(min=low, max=low + span, step=span / 2)
    space = ActionSpace(name="s", valid_for_ms=1, actions={"go": ActionType(fields={"v": field})})
    result = parse_answer(json.dumps({"action": "go", "v": number}), space)
    assert result == CheckedAction("go", {"v": sorted([low, number, low + span])[1]}, result.clamped)
    assert result.clamped == ({} if low <= number <= low + span else {"v": number})
