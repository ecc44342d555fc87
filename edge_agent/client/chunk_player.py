"""Plays the steps of an action chunk at their times, and never after the action's expiry.

    with Client() as agent:
        player = ChunkPlayer(agent)
        while True:
            player.take(agent.next_answer(0.02))        # 0.02 s: shorter than a step
            step = player.step()
            if step is None:
                hold()
            else:
                fly(step.type, step.values)

Step k begins at t_pub_ns + k * chunk_step_ms. The last step stays until valid_until_ns. An action without a chunk has
one step. It opens no socket and starts no thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from edge_agent.client.client import Client
from edge_agent.time_units import NS_PER_MS
from edge_agent.wire.messages import Action, Refusal


class ChunkStep(NamedTuple):
    step_index: int  # 0: the first step of the action
    type: str  # the action's type, such as "move"
    values: dict[str, float | int | str | bool]  # SI units, by the names of the action space


class ChunkPlayer:
    """Holds one action, the newest."""

    def __init__(self, client: Client, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """client: whose actions are played; it knows of a pause and of a suspend. clock: CLOCK_MONOTONIC in
        nanoseconds."""
        self._client, self._clock = client, clock
        self._action: Action | None = None

    def take(self, answer: Action | Refusal | None) -> None:
        """Takes what Client.next_answer returned.

        A newer action replaces the current one at once. A refusal means hold. None: nothing new, the current action
        goes on until its expiry.
        """
        if isinstance(answer, Refusal):
            self._action = None
        elif answer is not None and (self._action is None or answer.t_pub_ns >= self._action.t_pub_ns):
            self._action = answer

    def step(self) -> ChunkStep | None:
        """The step that is due now. None: hold."""
        action, now_ns = self._action, self._clock()
        if action is None or not self._client.is_valid(action):
            self._action = None  # an expired action stays expired
            return None
        index = 0
        if action.chunk and action.chunk_step_ms > 0:
            elapsed_ns = max(0, now_ns - action.t_pub_ns)
            index = min(elapsed_ns // (action.chunk_step_ms * NS_PER_MS), len(action.chunk))
        return ChunkStep(index, action.type, action.values if index == 0 else action.chunk[index - 1])
