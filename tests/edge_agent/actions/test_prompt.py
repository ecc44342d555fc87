"""The description for the model, and the JSON schema that restricts its answers."""

from __future__ import annotations

import pytest

from edge_agent.actions.grammar import json_schema
from edge_agent.actions.prompt import describe_action_space
from edge_agent.actions.space import ActionSpace, ActionType, ChoiceField, NumberField, load_action_space

ROVER = ActionSpace(
    name="rover",
    valid_for_ms=400,
    actions={
        "drive": ActionType(
            about="drive on",
            fields={
                "v": NumberField(name="speed_m_s", about="speed", unit="m/s", min=-1.0, max=2.5, step=0.5),
                "gear": NumberField(min=1.0, max=3.0, step=1.0),
                "horn": ChoiceField(one_of=["on", "off"]),
            },
        ),
        "stop": ActionType(),
    },
)


def test_the_description_is_exactly_this():
    """A trained model depends on every character."""
    assert describe_action_space(ROVER) == (
        "drive: drive on; v (speed, m/s, -1 to 2.5), gear (1 to 3), horn (on or off)\nstop"
    )
    assert describe_action_space(load_action_space("velocity_body")) == (
        "Velocities are in the body frame (x forward, y right, z down).\n"
        "move: fly with this velocity; vx (forward, m/s, -2 to 2), vy (right, m/s, -2 to 2), vz (down, m/s, -1 to 1), "
        "yaw (turn clockwise, rad/s, -0.8 to 0.8)\n"
        "search: the target is not in the picture\n"
        "hold: stay where you are\n"
        "land: land here"
    )
    assert "pace (how fast: slow or normal)" in describe_action_space(load_action_space("waypoint"))


def test_the_schema():
    assert json_schema(ROVER) == {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "action": {"const": "drive"},
                    "v": {"enum": [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5]},
                    "gear": {"type": "integer", "minimum": 1, "maximum": 3, "multipleOf": 1},
                    "horn": {"enum": ["on", "off"]},
                },
                "required": ["action", "v", "gear", "horn"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"action": {"const": "stop"}},
                "required": ["action"],
                "additionalProperties": False,
            },
        ]
    }


@pytest.mark.parametrize("name", ["velocity_body", "velocity_body_action_tokens", "waypoint"])
def test_the_action_type_is_the_first_key_of_every_answer(name):
    for answer in json_schema(load_action_space(name))["anyOf"]:
        assert next(iter(answer["properties"])) == "action"
        assert answer["required"] == list(answer["properties"])
