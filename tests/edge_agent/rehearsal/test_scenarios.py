"""Every rule of a controller has a scenario: a controller without it fails there, and a right one passes them all."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edge_agent.actions.space import load_action_space
from edge_agent.rehearsal import SCENARIOS, judge, play
from edge_agent.rehearsal.player import SPACES
from edge_agent.rehearsal.records import Note
from tests.harness import ROOT
from tests.harness.plain_controller import PlainController

TRIES = 3
AT_ONCE = 8  # scenarios that are played at the same time: most of their time is waiting

# Rule that is taken out of the controller -> the scenario that shows it, and a part of what is said.
RULES = {
    "moving": ("normal-flight", "none of the valid actions was followed"),
    "expiry": ("silence", "no hold"),
    "expiry by its own stamp": ("expired", "had to be discarded"),
    "expired on arrival": ("expired-after-valid", "hold came only when the action had expired"),
    "refusals": ("refusals", "hold came only when the action had expired"),
    "newest only": ("burst", "none of the valid actions"),
    "values, not clamped": ("clamped", "belongs to no action"),
    "times of a chunk": ("chunk", "too early"),
    "types without values": ("action-types", "hold came only when the action had expired"),
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
    "size": ("not-messages", "65 536 bytes"),
    "one frame": ("not-messages", "belongs to no action"),
    "unknown keys": ("unknown-keys", "none of the valid actions was followed"),
    "text is no command": ("text", "belongs to no action"),
    "requests beside the flight": ("silent-control", "none of the valid actions was followed"),
    "actions before a reply": ("old-actions", "before the reply"),
}
ENDINGS = ("slow-rate", "hanging-daemon", "paused", "stopped-daemon", "killed-daemon", "half-message")
REQUESTS = {"silent-control": ("stats",), "old-actions": ("pause", "resume")}


def faults_of(name: str, folder: Path, without: str = "", patience_s: float = 10.0) -> list[str]:
    with PlainController(folder, without, REQUESTS.get(name, ())) as controller:
        events = play(SCENARIOS[name], folder, controller.commands, patience_s=patience_s)
    assert not [event for event in events if isinstance(event, Note)]
    return judge(events, controller.commands)


def play_all(folder: Path, rows: list[tuple[str, str]], patience_s: float) -> list[list[str]]:
    """The faults of each row: a scenario and the rule that is taken out."""

    def faults(i: int) -> list[str]:
        (folder / str(i)).mkdir()
        return faults_of(rows[i][0], folder / str(i), rows[i][1], patience_s)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(faults, range(len(rows))))


def test_a_controller_that_keeps_every_rule_passes_every_scenario(tmp_path):
    found = play_all(tmp_path, [(name, "") for name in SCENARIOS], patience_s=10.0)
    assert dict(zip(SCENARIOS, found, strict=True)) == {name: [] for name in SCENARIOS}


def test_a_controller_without_a_rule_fails_the_scenario_about_it(tmp_path):
    """On a busy machine a controller may not read a message before the next one: then it gets another try."""
    left: dict[str, list[str]] = {rule: [] for rule in RULES}
    for i in range(TRIES):
        (tmp_path / f"try {i}").mkdir()
        found = play_all(tmp_path / f"try {i}", [(RULES[rule][0], rule) for rule in left], patience_s=1.0)
        found_of = dict(zip(left, found, strict=True))
        left = {rule: faults for rule, faults in found_of.items() if RULES[rule][1] not in " ".join(faults)}
    assert left == {}


def test_a_controller_that_repeats_its_last_command_fails_wherever_the_actions_end(tmp_path):
    found = play_all(tmp_path, [(name, "expiry") for name in ENDINGS], patience_s=1.0)
    for name, faults in zip(ENDINGS, found, strict=True):
        assert "no hold" in " ".join(faults) and "the action had expired by" in " ".join(faults), name
    assert {*ENDINGS, *(scenario for scenario, _ in RULES.values())} == set(SCENARIOS), "every scenario is about a rule"


def test_the_page_for_writers_of_a_controller_lists_every_scenario():
    page = (ROOT / "docs" / "controller.md").read_text(encoding="utf-8").split("\n## Rehearse\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([a-z-]+)` \|", page, flags=re.MULTILINE) == list(SCENARIOS)


def test_a_waypoint_controller_is_told_waypoints():
    """Every scenario can be played in both spaces: the types and the names are those of the space."""
    for space, (kind, forward, _, others) in SPACES.items():
        actions = load_action_space(space).actions
        assert {forward, *others} == {field.name or key for key, field in actions[kind].fields.items()}
        assert {"search", "hold"} <= actions.keys()
