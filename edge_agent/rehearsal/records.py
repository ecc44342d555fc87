"""What a rehearsal records: what was sent, what the controller had to do by then, and what it commanded.

A controller under test prints one line for each command that it gives to its vehicle:

    >>> parse_command("@123456789 move forward_m_s=0.101 right_m_s=0", read_ns=123460000)
    Command(t_ns=123456789, type='move', values={'forward_m_s': 0.101, 'right_m_s': 0.0}, read_ns=123460000)
"""

from __future__ import annotations

import contextlib
import math
import re
from typing import Literal, NamedTuple

Value = float | int | str | bool
HOLD = "hold"
# Types of commands. A line with another first word is no command: a controller may print what else it likes.
TYPES = ("move", "waypoint", "search", "land", HOLD, "drive")
FORWARD = ("forward_m_s", "forward_m")  # the number that tells which action a command came from, in units of 0.001

_LINE = re.compile(rf"(?:@(\d{{1,19}})\s+)?({'|'.join(TYPES)})((?:\s+[^\s=]+=\S*)*)\s*")


class Command(NamedTuple):
    """One command that the controller gave to its vehicle."""

    t_ns: int  # CLOCK_MONOTONIC before the controller checked that the action is valid; without it, read_ns
    type: str
    values: dict[str, Value]
    read_ns: int = 0  # CLOCK_MONOTONIC when it was read, after the check; 0: unknown

    def __str__(self) -> str:
        return " ".join([self.type, *(f"{name}={value}" for name, value in self.values.items())])


class Sent(NamedTuple):
    """One message that was put on the wire, and what a right controller does with its action."""

    t_ns: int
    text: str  # what it is, for people
    rule: Literal["follow", "discard", "none"]  # none: there is no action in it
    type: str = ""  # action type
    steps: tuple[dict[str, Value], ...] = ()  # the values, then those of the entries of a chunk
    t_pub_ns: int = 0
    valid_until_ns: int = 0
    chunk_step_ns: int = 0


class Due(NamedTuple):
    """What the controller had to do before the script went on. The numbers of commands say what it did meanwhile."""

    t_ns: int  # from when it was due
    what: Literal["hold", "follow"]
    why: str
    begin: int  # number of commands when it was due
    end: int  # number of commands when the script went on
    before_ns: int = 0  # hold: the time by which only a controller that ignored the message still moves; 0: none
    ends: tuple[str, ...] = (HOLD,)  # hold: types of commands that end the movement
    keys: frozenset[int] = frozenset()  # follow: of the actions, one of which had to be followed


class Note(NamedTuple):
    """A line for people: what this rehearsal could not judge."""

    t_ns: int
    text: str


Event = Sent | Due | Note


def key_of(values: dict[str, Value]) -> int | None:
    """The number by which a command is attributed to an action; None: there is none."""
    for name in FORWARD:
        value = values.get(name)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)
        if isinstance(value, int | float) and math.isfinite(value):
            return round(value * 1000)
    return None


def keys_of(steps: tuple[dict[str, Value], ...]) -> frozenset[int]:
    """The numbers of an action and of its chunk."""
    return frozenset(key for step in steps if (key := key_of(step)) is not None)


def parse_command(line: str, read_ns: int) -> Command | None:
    """The command in a line of the controller; None: there is none."""
    found = _LINE.fullmatch(line.strip())
    if found is None:
        return None
    stamp, command_type, pairs = found.groups()
    values: dict[str, Value] = {}
    for pair in pairs.split():
        name, _, text = pair.partition("=")
        try:
            values[name] = float(text)
        except ValueError:
            values[name] = text
    return Command(int(stamp) if stamp else read_ns, command_type, values, read_ns)
