"""The gate: a proposal of the model becomes an action inside the envelope, or a refusal with its reason.

Every check of a proposal is here. It opens no socket and reads no clock: the caller gives the time.

    >>> control_state = ControlState(Instruction(number=4, text="Land.", adapter=""))
    >>> Gate(space, deadline_ms=2000).check(proposal, control_state, model_is_ready=True, now_ns=now_ns)
    Rejection(reason='late', detail='2300 ms old, deadline_ms is 2000')
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from edge_agent.actions.envelope import CheckedAction, Rejection, parse_answer
from edge_agent.actions.space import ActionSpace
from edge_agent.ipc.events import Proposal
from edge_agent.time_units import NS_PER_MS

MAX_QUOTED_CHARS = 200


class Instruction(NamedTuple):
    """An instruction and an adapter together; a change of either is a new number."""

    number: int
    text: str
    adapter: str  # name of the LoRA adapter; "" without one


@dataclass
class ControlState:
    """What controllers have set by requests: the instruction in force, and whether the daemon is paused."""

    instruction: Instruction
    paused: bool = False


class Gate:
    """Decides about one proposal at a time; keeps no state."""

    def __init__(self, space: ActionSpace, deadline_ms: int) -> None:
        """deadline_ms: an answer that is older, from capture, is refused."""
        self.space, self.deadline_ms = space, deadline_ms

    def check(
        self, proposal: Proposal, control_state: ControlState, *, model_is_ready: bool, now_ns: int, resumed_ns: int = 0
    ) -> CheckedAction | Rejection:
        """now_ns: CLOCK_MONOTONIC. model_is_ready: the model process answers under the instruction in force.
        resumed_ns: when the machine last resumed from a suspend."""
        stop_reason = proposal.stop_reason
        if control_state.paused:
            return Rejection("paused", "")
        is_stale = proposal.instruction_id != control_state.instruction.number or not model_is_ready
        if is_stale or stop_reason == "cancelled":
            return Rejection("stale-instruction", "")
        if too_old := self.check_age(proposal, now_ns, resumed_ns):
            return too_old
        if stop_reason == "late":
            return self._late(proposal, now_ns)
        if stop_reason == "not-finite":
            return Rejection("not-finite", _quote(proposal.text))
        if stop_reason == "no-state":
            return Rejection("no-state", proposal.text[:MAX_QUOTED_CHARS])
        if stop_reason:
            return Rejection("truncated", _quote(proposal.text))
        return parse_answer(proposal.text, self.space)

    def check_age(self, proposal: Proposal, now_ns: int, resumed_ns: int = 0) -> Rejection | None:
        """Asked again with the time of publication: the process may have been stopped since check()."""
        age_ns = now_ns - proposal.t_capture_ns
        if age_ns < 0:
            return Rejection("future-timestamp", f"the frame is stamped {-age_ns / NS_PER_MS:.1f} ms in the future")
        if proposal.t_capture_ns < resumed_ns:
            return Rejection("late", "the machine was suspended since the frame was captured")
        return self._late(proposal, now_ns) if age_ns > self.deadline_ms * NS_PER_MS else None

    def _late(self, proposal: Proposal, now_ns: int) -> Rejection:
        age_ms = (now_ns - proposal.t_capture_ns) / NS_PER_MS
        return Rejection("late", f"{age_ms:.0f} ms old, deadline_ms is {self.deadline_ms}")


def _quote(text: str) -> str:
    return f"after {text[:MAX_QUOTED_CHARS]!r}"
