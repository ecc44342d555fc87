"""docs/controller.md against the code: the tables have every key of an action space, and the examples load."""

from __future__ import annotations

import re

import msgspec
import pytest
import yaml

from edge_agent.actions.space import (
    ActionSpace,
    ActionType,
    ChoiceField,
    NumberField,
    VehicleStateField,
    VehicleStatePrompt,
    load_action_space,
)
from tests.harness import ROOT

PAGE = (ROOT / "docs" / "controller.md").read_text(encoding="utf-8")
HOLD = {"name": "s", "valid_for_ms": 400, "actions": {"hold": {}}}


def keys_of_table(section: str, head: str) -> set[str]:
    """The code spans in the first cells of the table with this first cell in its head."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = text.split(f"\n| {head} |")[1].split("\n\n")[0].splitlines()[2:]
    return {key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])}


def examples(section: str) -> list[dict]:
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"(?:^    .*\n)+", text, flags=re.MULTILINE)
    return [yaml.safe_load(re.sub("^    ", "", block, flags=re.MULTILINE)) for block in blocks]


@pytest.mark.parametrize(
    ("section", "head", "structs"),
    [
        ("Action spaces", "key of the file", [ActionSpace]),
        ("Action spaces", "key of an action type", [ActionType]),
        ("Action spaces", "key of a field", [NumberField, ChoiceField]),
        ("Vehicle state", "key", [VehicleStatePrompt, VehicleStateField]),
    ],
)
def test_a_table_has_every_key(section, head, structs):
    assert keys_of_table(section, head) == {
        field.name for struct in structs for field in msgspec.structs.fields(struct)
    }


@pytest.mark.parametrize("section", ["Action spaces", "Vehicle state", "Action tokens"])
def test_an_example_loads(tmp_path, section):
    (example,) = examples(section)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HOLD | example))
    assert isinstance(load_action_space(str(tmp_path / "space.yaml")), ActionSpace)
