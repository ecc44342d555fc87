"""Which action is a command now, and when the vehicle must hold. No ROS, no socket; the clock is injected.

    follower = Follower(client)
    for command in follower.step(client.next_answer(follower.wait_s())):
        publish(command)                                # each one at once, and once

Each action, and each step of a chunk, becomes one command while it is valid. After an expiry, a refusal, a new session
or a stop there is one hold, and then nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from edge_agent.client.chunk_player import ChunkPlayer
from edge_agent.client.client import Client
from edge_agent.ros2.motion import NO_SPACE, NotUsable, OwnSpace, Velocity, Waypoint, line_of, motion_of
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.messages import Action, Refusal

MAX_WAIT_S = 0.02  # status and text are read in each turn


class Command(NamedTuple):
    """What the vehicle is told now."""

    read_ns: int  # CLOCK_MONOTONIC, read before it was checked that the action is valid
    line: str  # `move forward_m_s=0.25`; an own hold: `hold`
    motion: Velocity | Waypoint | None  # None: stop, or keep the position
    captured_ns: int = 0  # of the action's image, CLOCK_MONOTONIC
    why: str = ""  # of an own hold


class Follower:
    """Call its methods under one lock, together with the publication of what they return."""

    def __init__(
        self,
        client: Client,
        max_age_ms: float = 0,
        own: OwnSpace = NO_SPACE,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """client: knows whether an action is valid. max_age_ms: of an image at publication; 0: no limit. own: another
        action space that is followed."""
        self.why = "no action has come yet"  # the vehicle holds; "": it follows an action
        self.commands = 0
        self.not_usable = 0  # actions that this node cannot carry out
        self._client, self._max_age_ms, self._own, self._clock = client, max_age_ms, own, clock
        self._player = ChunkPlayer(client, clock)
        self._action: Action | None = None  # the one that is followed
        self._step_index = -1  # of the newest command
        self._needs_hold = False  # the newest command was another one than hold: also search and land end in a hold
        self._newest_pub_ns = 0
        self._session: int | None = None
        self._task: tuple[str, str] | None = None  # instruction and adapter that are followed; None: any
        self._valid_from_ns = 0
        self._is_stopped = ""

    def step(self, answer: Action | Refusal | None) -> list[Command]:
        """What is due now, in this order. answer: what Client.next_answer returned."""
        commands: list[Command] = []
        has_ended = self._action is not None and not self._still_valid(self._action)
        if has_ended and not isinstance(answer, Refusal):  # else it says why
            commands += self._hold("the action has expired and no newer one has come")
        if isinstance(answer, Refusal):
            self._newest_pub_ns = max(self._newest_pub_ns, min(answer.t_pub_ns, self._clock()))
            commands += self._hold(f"refusal: {answer.reason} {answer.detail}".rstrip())
        elif answer is not None and answer.t_pub_ns > self._newest_pub_ns:
            self._newest_pub_ns = answer.t_pub_ns
            commands += self._take(answer)
        return commands + self._due()

    def stop(self, why: str) -> list[Command]:
        """Follow nothing until go(): a pause, or the end of this program."""
        self._is_stopped = why
        return self._hold(why)

    def go(self) -> None:
        self._is_stopped = ""

    def end_actions(self, why: str, task: tuple[str, str] | None = None) -> list[Command]:
        """After a reply of the daemon: no action that was published before now is followed.

        task: the instruction and the adapter that the daemon has taken; they are followed in a new session, too.
        """
        self._valid_from_ns = self._clock()
        if task is not None:
            self._task = task
        return self._hold(why)

    def wait_s(self) -> float:
        """How long to wait for an answer: until something is due."""
        action = self._action
        if action is None:
            return MAX_WAIT_S
        due_ns = action.valid_until_ns
        if self._step_index < len(action.chunk):
            due_ns = min(due_ns, action.t_pub_ns + (self._step_index + 1) * action.chunk_step_ms * NS_PER_MS)
        return min(MAX_WAIT_S, max(0, due_ns - self._clock()) / NS_PER_S)

    def _take(self, action: Action) -> list[Command]:
        commands: list[Command] = []
        task = (action.instruction, action.adapter)
        if action.session != self._session:
            if self._session is not None:
                commands += self._hold("the daemon has started again")
            if self._task not in (None, task):
                return commands + self._hold(
                    "the daemon has started again with another instruction or adapter "
                    f"({task[0][:100]!r}, {task[1]!r}); call the service instruct"
                )
            self._session = action.session
        if self._is_stopped:
            return commands + self._hold(self._is_stopped)
        if not self._still_valid(action):
            return commands
        if 0 < self._max_age_ms < action.age_ms:
            return commands + self._hold(f"an image of {action.age_ms:.0f} ms; max_age_ms is {self._max_age_ms:g}")
        self._task, self._action, self._step_index = task, action, -1
        self._player.take(action)
        return commands

    def _due(self) -> list[Command]:
        """The step of the action that is due, if it was not given yet."""
        action, read_ns = self._action, self._clock()
        if action is None:
            return []
        step = self._player.step() if self._still_valid(action) else None
        if step is None:
            return self._hold("the action has expired and no newer one has come")
        if step.step_index == self._step_index:
            return []
        try:
            motion = motion_of(action.action_space, step.type, step.values, self._own)
        except NotUsable as error:
            self.not_usable += 1
            return self._hold(str(error))
        self._step_index = step.step_index
        self._needs_hold, self.why, self.commands = step.type != "hold", "", self.commands + 1
        return [Command(read_ns, line_of(step.type, step.values), motion, action.t_capture_ns)]

    def _hold(self, why: str) -> list[Command]:
        """One hold, if something else was commanded before."""
        self._action, self.why = None, why
        needs_hold, self._needs_hold = self._needs_hold, False
        return [Command(self._clock(), "hold", None, why=why)] if needs_hold else []

    def _still_valid(self, action: Action) -> bool:
        return action.t_pub_ns > self._valid_from_ns and self._client.is_valid(action)
