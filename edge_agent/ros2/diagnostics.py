"""What the node reports on /diagnostics: three entries, of the daemon's status and of the node's counters. Pure.

Levels are those of diagnostic_msgs/DiagnosticStatus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec

from edge_agent.time_units import NS_PER_S
from edge_agent.wire.messages import DaemonState, Status

OK, WARN, ERROR, STALE = range(4)
MAX_STATUS_AGE_NS = 1 * NS_PER_S  # PROTOCOL.md: without a status for 1 s, the daemon does not run
MAX_IMAGE_AGE_NS = 2 * NS_PER_S
MAX_VALUE_CHARS = 500

LEVELS: dict[DaemonState, int] = {
    "starting": WARN,
    "running": OK,
    "paused": WARN,
    "no-frames": ERROR,
    "stalled": ERROR,
    "fault": ERROR,
    "stopping": WARN,
}


class Entry(NamedTuple):
    """One diagnostic_msgs/DiagnosticStatus."""

    name: str
    level: int
    message: str
    values: dict[str, str]


def daemon_entry(status: Status | None, age_ns: int) -> Entry:
    """status: the newest; age_ns: since it arrived."""
    if status is None or age_ns > MAX_STATUS_AGE_NS:
        message = "no status from the daemon: it does not run, or its runtime folder is another one"
        return Entry("daemon", STALE, message, {} if status is None else {"last_state": status.state})
    level = LEVELS[status.state]
    if status.reason or status.paused:
        level = max(level, WARN)
    message = f"{status.state}: {status.reason}" if status.reason else status.state
    if status.paused and status.state != "paused":
        message += " (paused)"
    return Entry("daemon", level, message, dict(_flat(msgspec.to_builtins(status))))


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Fields of fields get a name with a point: model_worker.rss_mib."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "unknown" if value is None else str(value)[:MAX_VALUE_CHARS]


def commands_entry(why: str, counters: dict[str, int], listeners: list[str]) -> Entry:
    """why: the vehicle holds; "": it follows an action. listeners: what is wrong with those who receive commands."""
    values = {name: str(count) for name, count in counters.items()}
    if listeners:
        return Entry("commands", ERROR, "; ".join(listeners), values)
    return Entry("commands", WARN if why else OK, f"hold: {why}" if why else "follows the actions", values)


class FrameCounters:
    """Of the images that come in. Call it from one thread."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], int]) -> None:
        """say: called with a line when a kind of refusal begins."""
        self.pushed = 0
        self.not_taken = 0  # no daemon was connected, or it was busy
        self.refused: dict[str, int] = {}
        self._say, self._clock = say, clock
        self._said: set[str] = set()  # reasons since the last image that was taken
        self._newest: tuple[int, int, str] = (clock(), WARN, "no image has come")

    def push(self, was_taken: bool) -> None:
        self._said.clear()
        if was_taken:
            self.pushed += 1
            self._newest = (self._clock(), OK, "images are pushed")
        else:
            self.not_taken += 1
            self._newest = (self._clock(), WARN, "no daemon takes frames: camera.source, or it is busy")

    def refuse(self, reason: str, line: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1
        self._newest = (self._clock(), ERROR, f"{reason}: {line}")
        if reason not in self._said:
            self._said.add(reason)
            self._say(f"image refused ({reason}): {line}")

    def entry(self, publishers: list[str]) -> Entry:
        """publishers: what is wrong with those who publish images."""
        at_ns, level, message = self._newest
        if self._clock() - at_ns > MAX_IMAGE_AGE_NS:
            level, message = WARN, "no image has come for 2 s"
        if publishers:
            level, message = ERROR, "; ".join(publishers)
        values = {"pushed": str(self.pushed), "not_taken": str(self.not_taken)}
        values |= {f"refused.{reason}": str(count) for reason, count in sorted(self.refused.items())}
        return Entry("frames", level, message, values)
