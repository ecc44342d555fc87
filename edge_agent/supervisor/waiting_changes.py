"""When a change of the instruction or the adapter may go to the model process: a flood must not end every answer.

Each change cancels the answer in progress. So after MAX_CHANGES changes without an answer between them, the next one
waits until a frame was answered under the last one. Of the changes of one kind that wait, the newest wins.

A pure table of who waits: it sends nothing, and the caller gives the time.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

from edge_agent.ipc.events import SetInstruction
from edge_agent.time_units import NS_PER_S

MAX_CHANGES = 4  # without an answer between them. A controller that corrects itself is never delayed
MAX_WAIT_NS = 5 * NS_PER_S  # also if no frame is answered: then nothing is lost by another change

Sender = TypeVar("Sender")


class Waiting(NamedTuple, Generic[Sender]):
    """A change that is not sent yet. sender: whatever the caller wants back with it."""

    sender: Sender
    change: SetInstruction
    since_ns: int


class WaitingChanges(Generic[Sender]):
    """At most one instruction and one adapter, in the order of their arrival."""

    def __init__(self) -> None:
        self._waiting: list[Waiting[Sender]] = []
        self._n_changes = 0  # sent since the last answer

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def must_wait(self) -> bool:
        """Whether a change that comes now has to wait."""
        return bool(self._waiting) or self._n_changes >= MAX_CHANGES

    def add(self, sender: Sender, change: SetInstruction, now_ns: int) -> Sender | None:
        """Let a change wait. Returns the sender of the older change that it replaces, if there is one."""
        is_adapter = change.text is None
        older = next((waiting for waiting in self._waiting if (waiting.change.text is None) == is_adapter), None)
        if older is not None:
            self._waiting.remove(older)
        # It waits as long as the one that it replaces would have: a flood does not extend the time.
        since_ns = now_ns if older is None else older.since_ns
        self._waiting.append(Waiting(sender, change, since_ns))
        return older.sender if older is not None else None

    def note_sent(self) -> None:
        """A change was sent to the model process."""
        self._n_changes += 1

    def note_answer(self) -> None:
        """A frame was answered under the instruction in force, or the model process is a new one."""
        self._n_changes = 0

    def take_due(self, now_ns: int) -> list[Waiting[Sender]]:
        """The changes that may be sent now."""
        is_due = any(now_ns - waiting.since_ns > MAX_WAIT_NS for waiting in self._waiting)
        return self.take_all() if is_due or self._n_changes < MAX_CHANGES else []

    def take_all(self) -> list[Waiting[Sender]]:
        taken, self._waiting = self._waiting, []
        return taken
