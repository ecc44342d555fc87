"""Every rule of a controller has a scenario: a controller without it fails there, and a right one passes them all."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edge_agent.actions.space import load_action_space
from edge_agent.rehearsal import SCENARIOS, judge, play
from edge_agent.rehearsal.player import SPACES
from edge_agent.rehearsal.records import Note
from tests.harness import ROOT
from tests.harness.plain_controller import PlainController

AT_ONCE = 6  # scenarios that are played at the same time: most of their time is waiting

# Rule that is taken out of the controller -> the scenario that shows it, and a part of what is said.
RULES = {
    "moving": ("normal-flight", "none of the valid actions was followed"),
    "expiry": ("silence", "no hold"),
    "expiry by its own stamp": ("expired", "had to be discarded"),
    "refusals": ("refusals", "hold came only when the action had expired"),
    "newest only": ("burst", "none of the valid actions"),
    "values, not clamped": ("clamped", "belongs to no action"),
    "times of a chunk": ("chunk", "too early"),
    "action type": ("unknown-kinds", "had to be discarded"),
    "seq": ("replayed", "had to be discarded"),
    "sessions": ("stopped-daemon", "none of the valid actions was followed"),
    "ended sessions": ("killed-daemon", "the session that has ended"),
    "gaps": ("gaps", "none of the valid actions was followed"),
    "future": ("future-stamps", "had to be discarded"),
    "future, kept": ("future-stamps", "had to be discarded"),
    "validity of 1 s": ("wrong-times", "valid for 10 s"),
    "capture before publication": ("wrong-times", "captured after its publication"),
    "version": ("wrong-version", "`v` is"),
    "kind": ("unknown-kinds", "another `kind`"),
    "required fields": ("missing-fields", "without `"),
    "types": ("wrong-types", "had to be discarded"),
    "finite": ("not-finite", "one of the values is nan"),
    "topic": ("not-messages", "topic"),
    "one frame": ("not-messages", "belongs to no action"),
    "unknown keys": ("unknown-keys", "none of the valid actions was followed"),
    "text is no command": ("text", "belongs to no action"),
    "requests beside the flight": ("silent-control", "none of the valid actions was followed"),
    "actions before a reply": ("old-actions", "before the reply"),
}
REQUESTS = {"silent-control": ("stats",), "old-actions": ("pause", "resume")}


def faults_of(name: str, folder: Path, without: str = "", patience_s: float = 10.0) -> list[str]:
    with PlainController(folder, without, REQUESTS.get(name, ())) as controller:
        events = play(SCENARIOS[name], folder, controller.commands, patience_s=patience_s)
    assert not [event for event in events if isinstance(event, Note)]
    return judge(events, controller.commands)


def test_a_controller_that_keeps_every_rule_passes_every_scenario(tmp_path):
    def faults(name: str) -> list[str]:
        (tmp_path / name).mkdir()
        return faults_of(name, tmp_path / name)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert dict(zip(SCENARIOS, pool.map(faults, SCENARIOS), strict=True)) == {name: [] for name in SCENARIOS}


@pytest.mark.parametrize("rule", RULES)
def test_a_controller_without_a_rule_fails_the_scenario_about_it(tmp_path, rule):
    scenario, said = RULES[rule]
    faults = faults_of(scenario, tmp_path, rule, patience_s=1.0)
    assert said in " ".join(faults)


def test_the_page_for_writers_of_a_controller_lists_every_scenario():
    page = (ROOT / "docs" / "controller.md").read_text(encoding="utf-8").split("\n## Rehearse\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([a-z-]+)` \|", page, flags=re.MULTILINE) == list(SCENARIOS)


def test_a_waypoint_controller_is_told_waypoints():
    """Every scenario can be played in both spaces: the types and the names are those of the space."""
    for space, (kind, forward, _, others) in SPACES.items():
        actions = load_action_space(space).actions
        assert {forward, *others} == {field.name or key for key, field in actions[kind].fields.items()}
        assert {"search", "hold"} <= actions.keys()
