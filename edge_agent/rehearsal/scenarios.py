"""The table of scenarios: a script each, and what a right controller does. Every scenario ends with a hold.

for name, scenario in SCENARIOS.items():
    print(f"{name}: {scenario.about} A right controller {scenario.right}.")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edge_agent.rehearsal import scripts
from edge_agent.rehearsal.player import SETTLE_S, Player, ScriptEnded
from edge_agent.rehearsal.records import Command, Event


class Scenario(NamedTuple):
    script: Callable[[Player], None]
    about: str  # what happens
    right: str  # what a right controller does


SCENARIOS: dict[str, Scenario] = {
    "normal-flight": Scenario(
        scripts.normal_flight,
        "Ten actions per second, each valid for 300 ms; then no more.",
        "follows each action while it stands, and holds when the last one has expired",
    ),
    "slow-rate": Scenario(
        scripts.slow_rate,
        "One action each half second, valid for 200 ms.",
        "holds between two actions",
    ),
    "burst": Scenario(
        scripts.burst,
        "100 actions per second for a second.",
        "reads until its socket is empty and follows the newest action, never an older one after it",
    ),
    "clamped": Scenario(
        scripts.clamped,
        "Actions with `clamped`: the model had written 9.5.",
        "follows `values`; `clamped` is for the log",
    ),
    "chunk": Scenario(
        scripts.chunk,
        "Actions with a chunk of four more steps.",
        "follows each step at its time, or the first one to the end; none after the expiry or after a newer action",
    ),
    "action-types": Scenario(
        scripts.action_types,
        "The action types search and hold, which have no values.",
        "ends the movement: its own search, or hold",
    ),
    "silence": Scenario(
        scripts.silence,
        "The actions stop, status goes on; later actions come again.",
        "holds when the last action has expired; follows the next one",
    ),
    "hanging-daemon": Scenario(
        scripts.hanging_daemon,
        "The daemon hangs: the connections stay, nothing comes; later it goes on.",
        "holds when the last action has expired, without waiting for the end of a connection",
    ),
    "refusals": Scenario(
        scripts.refusals,
        "A refusal of every reason, while an action stands.",
        "holds at the refusal, and does not wait for the expiry",
    ),
    "paused": Scenario(
        scripts.paused,
        "Somebody else pauses the daemon, and resumes it.",
        "holds until actions come again",
    ),
    "silent-control": Scenario(
        scripts.silent_control,
        "Requests get no reply.",
        "holds as always while a request waits; follows, unless it waits for `instruct` or `adapter`",
    ),
    "old-actions": Scenario(
        scripts.old_actions,
        "After the reply to a `pause`, `instruct` or `adapter` of the controller: an action from before the reply.",
        "discards it",
    ),
    "stopped-daemon": Scenario(
        scripts.stopped_daemon,
        "The daemon stops, with a last status, and is started again.",
        "holds; follows the new session, which counts `seq` from 0",
    ),
    "killed-daemon": Scenario(
        scripts.killed_daemon,
        "The daemon is killed and started again; then messages of the old session.",
        "holds; follows the new session; discards messages of the old one",
    ),
    "half-message": Scenario(
        scripts.half_message,
        "The daemon is killed in the middle of a message, and started again.",
        "discards the half, holds, and follows the new session",
    ),
    "expired": Scenario(
        scripts.expired,
        "Actions that had expired when they were sent.",
        "discards them",
    ),
    "expired-after-valid": Scenario(
        scripts.expired_after_valid,
        "A valid action stands; the next message, an action, had expired when it was sent. Also right after a refusal.",
        "holds at once: the newest message says what counts",
    ),
    "future-stamps": Scenario(
        scripts.future_stamps,
        "Actions with `t_pub_ns` in the future.",
        "discards them, and does not keep them until their time",
    ),
    "wrong-times": Scenario(
        scripts.wrong_times,
        "Valid for more than 1 s, captured after the publication, valid for no time.",
        "discards them: their clock is another one",
    ),
    "replayed": Scenario(
        scripts.replayed,
        "Sequence numbers again, with new stamps; the bytes of older actions again.",
        "discards them, also while it holds after a refusal",
    ),
    "gaps": Scenario(
        scripts.gaps,
        "Lost messages: `seq` jumps.",
        "follows the next action",
    ),
    "unknown-keys": Scenario(
        scripts.unknown_keys,
        "Keys that a later release adds, keys in another order, integers for floats.",
        "follows the action and ignores what it does not know",
    ),
    "unknown-kinds": Scenario(
        scripts.unknown_kinds,
        "Another `kind`, a word that is in no list, an action type and an action space that it does not know.",
        "discards the message, or holds",
    ),
    "wrong-version": Scenario(
        scripts.wrong_version,
        "Messages with another `v`.",
        "discards them",
    ),
    "missing-fields": Scenario(
        scripts.missing_fields,
        "Each required field left out; one of the values left out.",
        "discards the message; never takes 0 for what is missing",
    ),
    "wrong-types": Scenario(
        scripts.wrong_types,
        "Fields and values of other types.",
        "discards the message",
    ),
    "not-finite": Scenario(
        scripts.not_finite,
        "NaN and infinity in `values`.",
        "discards the message",
    ),
    "not-messages": Scenario(
        scripts.not_messages,
        "Other topics, two ZeroMQ frames, bytes that are no messages, more than 65 536 bytes.",
        "discards them, and follows the next action",
    ),
    "text": Scenario(
        scripts.text_lane,
        "The model's text of an action on stream text, before any check.",
        "does not act on text",
    ),
}  # fmt: skip


def play(scenario: Scenario, folder: Path, commands: Sequence[Command] | None = None, **options: Any) -> list[Event]:
    """Play a scenario in a runtime folder, from the first subscriber to the last hold. What was sent and was due.

    commands: those of the controller, which grow while it runs; None: they are not known. options: of Player. Raises
    EndpointError.
    """
    player = Player(folder, commands, **options)
    try:
        player.wait_for_controller()
        scenario.script(player)
        player.hold("the end of the scenario")
        player.wait(SETTLE_S)
    except ScriptEnded:
        pass
    finally:
        player.close()
    return player.events
