"""Compares the commands of a controller with what was sent. The order of events decides, never an elapsed time.

An empty list is a pass. A command is attributed to the action that has its forward number: each action of a scenario
has another one. What is wrong:

- a command of an action outside its time, or of a message that had to be discarded, or of no message at all;
- a command of an action after a command of a newer one, or again after a hold;
- a command with more than the action asks for: a controller may do less, never more;
- no hold where one was due, and no command at all where a valid action had to be followed.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_agent.rehearsal.records import FORWARD, HOLD, Command, Due, Event, Sent, Value, key_of
from edge_agent.time_units import NS_PER_MS, NS_PER_S

ROUNDING = 0.0006  # of a printed number


def judge(events: Sequence[Event], commands: Sequence[Command]) -> list[str]:
    """What the controller did wrong, one line each; of many commands with the same fault, the first one."""
    start_ns = next((event.t_ns for event in events if isinstance(event, Sent)), 0)
    return _wrong_commands(events, commands, start_ns) + _what_is_missing(events, commands, start_ns)


def is_done(due: Due, commands: Sequence[Command]) -> bool:
    """Whether the controller had done what was due when the script went on."""
    if due.what == "follow":
        return any(command.type != HOLD and key_of(command.values) in due.keys for command in _during(due, commands))
    if due.end and commands[due.end - 1].type not in due.ends:
        return False
    hold = _first_hold(due, commands)
    return not due.before_ns or (hold is not None and hold.t_ns < due.before_ns)


def hold_delays_ms(events: Sequence[Event], commands: Sequence[Command]) -> list[float]:
    """From when a hold was due to the hold, in ms; without those holds that were there before."""
    holds = [(due, _first_hold(due, commands)) for due in events if isinstance(due, Due) and due.what == "hold"]
    return [max(0, hold.t_ns - due.t_ns) / NS_PER_MS for due, hold in holds if hold is not None]


def _during(due: Due, commands: Sequence[Command]) -> Sequence[Command]:
    return commands[due.begin : due.end]


def _first_hold(due: Due, commands: Sequence[Command]) -> Command | None:
    """The hold that ended a movement; None: it was there before."""
    if due.begin and commands[due.begin - 1].type in due.ends:
        return None
    return next((command for command in _during(due, commands) if command.type in due.ends), None)


def _at(t_ns: int, start_ns: int) -> str:
    return f"at {max(0, t_ns - start_ns) / NS_PER_S:.3f} s"


def _what_is_missing(events: Sequence[Event], commands: Sequence[Command], start_ns: int) -> list[str]:
    lines = []
    for due in events:
        if not isinstance(due, Due) or is_done(due, commands):
            continue
        found = f"the last command was {commands[due.end - 1]}" if due.end else "there was no command"
        if due.what == "follow":
            asked = "print a line such as `move forward_m_s=0.101` for each command"
            lines.append(f"{_at(due.t_ns, start_ns)}: none of the valid actions was followed ({due.why}); {asked}")
        elif due.before_ns and commands[due.end - 1].type in due.ends:
            lines.append(f"{_at(due.t_ns, start_ns)}: hold came only when the action had expired ({due.why})")
        else:
            lines.append(f"{_at(due.t_ns, start_ns)}: no hold ({due.why}); {found}")
    return lines


# -- each command -----------------------------------------------------------------------------------------------------


def _wrong_commands(events: Sequence[Event], commands: Sequence[Command], start_ns: int) -> list[str]:
    sent = [event for event in events if isinstance(event, Sent)]
    places: dict[int | None, tuple[int, int]] = {  # forward number -> message, step of its chunk
        key: (i, k)
        for i, message in enumerate(sent)
        for k, step in enumerate(message.steps)
        if (key := key_of(step)) is not None
    }
    found: dict[tuple[int | None, str], str] = {}  # message and fault -> the line
    newest, has_held = -1, False  # the message that was followed last, and whether a hold ended it
    for command in commands:
        if command.type == HOLD:
            has_held = True
            continue
        place = places.get(key_of(command.values)) or _of_type(command, sent)
        if place is None:
            fault = "belongs to no action that was sent"
        else:
            index, step = place
            fault = _fault(command, sent[index], step)
            if not fault and index < newest:
                fault = "went back to an older action"
            elif not fault and index == newest and has_held:
                fault = "moved with the same action again after a hold"
            if index >= newest:
                newest, has_held = index, False
        if fault:
            message = "" if place is None else f" (message: {sent[place[0]].text})"
            line = f"{_at(command.t_ns, start_ns)}: {command}: {fault}{message}"
            found.setdefault((place[0] if place else None, fault.split(" by ")[0]), line)
    return list(found.values())


def _of_type(command: Command, sent: Sequence[Sent]) -> tuple[int, int] | None:
    """The place of the newest action without values that has the type of the command and was sent before it was read.
    None: there is none."""
    if key_of(command.values) is not None:
        return None
    for i in reversed(range(len(sent))):
        message = sent[i]
        is_before = message.t_pub_ns <= (command.read_ns or command.t_ns)
        if message.steps and not message.steps[0] and message.type == command.type and is_before:
            return i, 0
    return None


def _fault(command: Command, message: Sent, step: int) -> str:
    """Why a controller must not give this command on this message; "": it may."""
    if message.rule == "discard":
        return "this message had to be discarded"
    if command.type != message.type:
        return f"the type of the action is {message.type}"
    if command.t_ns >= message.valid_until_ns:
        return f"the action had expired by {(command.t_ns - message.valid_until_ns) / NS_PER_MS:.1f} ms"
    if (command.read_ns or command.t_ns) < message.t_pub_ns + step * message.chunk_step_ns:
        return "it is too early for this step of the chunk" if step else "the action was not published yet"
    has_next = 0 < step < len(message.steps) - 1  # who does not know chunks follows the first step to the end
    if has_next and command.t_ns >= message.t_pub_ns + (step + 1) * message.chunk_step_ns:
        return "it is too late for this step of the chunk"
    for name, value in message.steps[step].items():
        if name in command.values and name not in FORWARD and not _is_within(command.values[name], value):
            return f"{name} of the action is {value}"
    return ""


def _is_within(commanded: Value, asked: Value) -> bool:
    """Whether a number is not larger than asked and has the same sign; a word must be the same."""
    if isinstance(asked, str) or isinstance(commanded, str):
        return commanded == asked
    return min(0.0, asked) - ROUNDING <= commanded <= max(0.0, asked) + ROUNDING
