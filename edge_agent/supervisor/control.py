"""Requests of controllers: one reply per request. A repeated request is carried out again, and that does no harm.

No reply is remembered: an operation says what shall be, not what shall change, so its repetition changes nothing, and
its reply is always about now. A remembered reply to `pause` would be wrong after a `resume`. Only a question that is in
progress is known by its id: its repetition does not ask twice.

OPERATIONS says of each operation what it needs and when it is answered. An operation that is answered later waits for
the model process: for InstructionApplied, or for the last piece of an answer. The model process knows a question by a
number of the supervisor's own, so two controllers may use the same id.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from edge_agent.actions.space import ActionSpace
from edge_agent.actions.vehicle_state import check_vehicle_state
from edge_agent.ipc.events import AskQuestion, CancelQuestion, InstructionApplied, SetInstruction, SetPaused, TextDelta
from edge_agent.ipc.frame_slot import Slot
from edge_agent.supervisor.gate import ControlState, Instruction
from edge_agent.supervisor.managed_worker import Clock, Readiness
from edge_agent.supervisor.model_worker import ModelWorker
from edge_agent.supervisor.pause_file import keep_pause
from edge_agent.supervisor.publisher import Publisher, Sender
from edge_agent.supervisor.status import StatusReporter
from edge_agent.supervisor.waiting_changes import WaitingChanges
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.codec import encode
from edge_agent.wire.control import MAX_ID_CHARS, BadRequest, Operation, Reply, Request, StateValue, read_request
from edge_agent.wire.messages import PROTOCOL_VERSION, TextMessage, TextStopReason

MAX_TEXT_CHARS = 2000  # of an instruction or a question
MAX_ANSWER_CHARS = 12_000  # of the whole answer in the reply; the pieces on the text stream are not cut
MAX_ERROR_CHARS = 500
MAX_REFUSED_VALUES, MAX_REFUSAL_CHARS = 64, 300  # of one vehicle_state: the reply must fit in a message
MAX_PENDING_REQUESTS = 8  # questions and instructions that the model has not answered yet
ASK_TIMEOUT_S = 60.0
REPLACED = "replaced: a newer one came before this one was given to the model; nothing was changed by this one"
NOT_KEPT = "paused, but a restarted daemon would act: the pause cannot be written to the runtime folder; see the log"


@dataclass
class Pending:
    """A request that the model process has to answer."""

    sender: Sender
    request_id: str
    started_ns: int
    expires_ns: int = 0  # CLOCK_MONOTONIC when its sender stops waiting; 0: never
    question: str = ""
    parts: list[str] = field(default_factory=list)  # of the answer to a question


class VehicleState:
    """The newest value per key that controllers pushed, written beside the frames for the model process."""

    def __init__(self, slot: Slot, space: ActionSpace, clock: Clock = time.monotonic_ns) -> None:
        self._slot, self._space, self._clock = slot, space, clock
        self._values: dict[str, tuple[StateValue, int]] = {}  # key -> value, and when it came

    def update(self, values: dict[str, Any]) -> dict[str, str]:
        """Take the values. Returns key -> why its value cannot be taken, of the first 64; the other values are taken.

        None means that the value is unknown from now on.
        """
        now_ns = self._clock()
        refused: dict[str, str] = {}
        for key, value in values.items():
            checked, error = check_vehicle_state(key, value, self._space)
            if error and len(refused) < MAX_REFUSED_VALUES:
                refused[key[:MAX_ID_CHARS]] = error[:MAX_REFUSAL_CHARS]
            elif error:
                continue
            elif checked is None:
                self._values.pop(key, None)
            else:
                self._values[key] = checked, now_ns
        self._slot.write_vehicle_state(encode(self._values))
        return refused


class Control:
    """Answers requests. Changes the control state, and owns the requests that wait for the model process."""

    def __init__(
        self,
        adapters: tuple[str, ...],
        model: ModelWorker,
        status: StatusReporter,
        publisher: Publisher,
        vehicle_state: VehicleState,
        clock: Clock = time.monotonic_ns,
    ) -> None:
        """adapters: names of the configured adapters."""
        self.adapters = ("", *adapters)
        self.control_state: ControlState = status.control_state
        self.model, self.status, self.publisher, self.vehicle_state = model, status, publisher, vehicle_state
        self.clock = clock
        self._questions: dict[str, Pending] = {}  # the number given to the model process -> request
        self._instructions: dict[int, Pending] = {}  # Instruction.number -> request
        self._changes: WaitingChanges[Pending] = WaitingChanges()  # requests that are not sent yet
        self._question_numbers = itertools.count(1)
        self._instruction_numbers = itertools.count(self.control_state.instruction.number + 1)
        self._unsent_cancels: list[str] = []  # questions that the model process still has to be told to end
        self._sent_paused: bool | None = None  # what the model process knows; None: it is not loaded

    # -- requests -----------------------------------------------------------------------------------------------------

    def handle(self, sender: Sender, payload: bytes) -> None:
        """Carry out one request, or refuse it; the reply follows now or later."""
        try:
            request = read_request(payload)
        except BadRequest as bad:
            self._refuse(sender, bad.id, str(bad))
            return
        rule = OPERATIONS[request.op]
        if unmet := self._precondition_error(rule, request, sender):
            self._refuse(sender, request.id, unmet)
        else:
            rule.carry_out(self, Pending(sender, request.id, self.clock(), request.expires_ns), request)

    def _precondition_error(self, rule: OperationRule, request: Request, sender: Sender) -> str:
        """Why the operation cannot be carried out now; "": it can."""
        if not rule.never_expires and (expired := self._expired(request.expires_ns)):
            return expired
        n_chars = len(request.text.strip())
        if rule.needs_text and not 0 < n_chars <= MAX_TEXT_CHARS:
            return f"text: expected 1 to {MAX_TEXT_CHARS} characters, found {n_chars}"
        if rule.model_must_be and self.model.readiness not in rule.model_must_be:
            reason = self.model.full_reason()
            return f"the model is not ready ({reason.text if reason is not None else 'starting'}); try again"
        has_place = request.op == "ask" and self._question_of(sender, request.id) is not None  # it is repeated
        is_full = len(self._questions) + len(self._instructions) >= MAX_PENDING_REQUESTS
        if rule.answered_later and is_full and not has_place:
            return f"{MAX_PENDING_REQUESTS} requests are waiting already; try again"
        return ""

    def _expired(self, expires_ns: int) -> str:
        """Why a request is too late; "": it is not."""
        late_ns = self.clock() - expires_ns
        if not expires_ns or late_ns <= 0:
            return ""
        return f"expired {late_ns / NS_PER_MS:.0f} ms ago, when its sender stopped waiting; send it again"

    def _instruct(self, pending: Pending, request: Request) -> None:
        self._send_instruction(pending, SetInstruction(instruction_id=0, text=request.text.strip()))

    def _switch_adapter(self, pending: Pending, request: Request) -> None:
        name = request.text.strip()
        if name not in self.adapters:
            expected = ", ".join(map(repr, self.adapters))
            error = f"adapter: expected one of {expected}, found {name[:MAX_ID_CHARS]!r}"
            self._refuse(pending.sender, pending.request_id, error)
            return
        self._send_instruction(pending, SetInstruction(instruction_id=0, adapter=name))

    def _send_instruction(self, pending: Pending, change: SetInstruction) -> None:
        """Send a change to the model process, now or when an answer has gone out."""
        if self._changes or (self._answers_frames and self._changes.must_wait()):
            replaced = self._changes.add(pending, change, self.clock())
            if replaced is not None:
                self._refuse(replaced.sender, replaced.request_id, REPLACED)
        else:
            self._send_change(pending, change)

    @property
    def _answers_frames(self) -> bool:
        """Whether a change cancels answers."""
        return self.status.state()[0] == "running"

    def _send_change(self, pending: Pending, change: SetInstruction) -> None:
        in_force = self.control_state.instruction
        text, adapter = change.text, change.adapter
        if self.model.readiness is Readiness.REFUSED:  # the process is new, and holds neither text nor adapter
            text = in_force.text if text is None else text
            adapter = in_force.adapter if adapter is None else adapter
        elif not self._instructions and text in (None, in_force.text) and adapter in (None, in_force.adapter):
            self._reply(pending, {"instruction": in_force.text, "adapter": in_force.adapter})  # nothing changes
            return
        number = next(self._instruction_numbers)
        command = SetInstruction(instruction_id=number, text=text, adapter=adapter)
        if self._send_command(pending, encode(command)):
            self._instructions[number] = pending
            self._changes.note_sent()

    def note_answer(self) -> None:
        """A frame was answered under the instruction in force."""
        self._changes.note_answer()

    def send_changes(self) -> None:
        """Once per turn: send the changes that have waited long enough."""
        is_due = not self._answers_frames
        for pending, change, _ in self._changes.take_all() if is_due else self._changes.take_due(self.clock()):
            if expired := self._expired(pending.expires_ns):
                self._refuse(pending.sender, pending.request_id, expired)
            else:
                self._send_change(pending, change)

    def _ask(self, pending: Pending, request: Request) -> None:
        question = request.text.strip()
        same_id = self._question_of(pending.sender, request.id)
        if same_id is None:
            number = str(next(self._question_numbers))
            if self._send_command(pending, encode(AskQuestion(number, question))):
                pending.question = question
                self._questions[number] = pending
        elif self._questions[same_id].question == question:
            self._questions[same_id].sender = pending.sender  # the envelope of a REQ may be another one
        else:
            error = f"id {request.id!r}: another question with this id is in progress; use a new id for each request"
            self._refuse(pending.sender, request.id, error)

    def _cancel(self, pending: Pending, request: Request) -> None:
        number = self._question_of(pending.sender, request.text)
        if number is not None:
            self._abandon(number, "cancelled", "cancelled by its sender")
        self._reply(pending, {"cancelled": number is not None})

    def _question_of(self, sender: Sender, request_id: str) -> str | None:
        """The number of a question in progress; None: the sender has asked none with this id on this connection."""
        for number, pending in self._questions.items():
            if (pending.sender.connection, pending.request_id) == (sender.connection, request_id):
                return number
        return None

    def _send_command(self, pending: Pending, command: bytes) -> bool:
        """Whether the model process took the command. If not, the request is refused, and nothing waits."""
        sent = self.model.send(command)
        if not sent:
            self._refuse(pending.sender, pending.request_id, "the model process takes no commands now; try again")
        return sent

    def _push_vehicle_state(self, pending: Pending, request: Request) -> None:
        if request.values:
            self._reply(pending, {"refused": self.vehicle_state.update(request.values)})
        else:
            self._refuse(pending.sender, pending.request_id, "values: expected at least one value")

    def _pause(self, pending: Pending, request: Request) -> None:
        paused = request.op == "pause"
        self.control_state.paused = paused  # from this moment the gate lets no action through
        is_kept = keep_pause(self.publisher.folder, paused)
        self.sync_model()
        if paused and not is_kept:
            self._refuse(pending.sender, pending.request_id, NOT_KEPT)
        else:
            self._reply(pending, {"paused": paused})

    def _stats(self, pending: Pending, request: Request) -> None:
        self._reply(pending, self.status.counts() | {"state": self.status.state()[0]})

    # -- the model process --------------------------------------------------------------------------------------------

    def send_control_state(self) -> bool:
        """Send the instruction in force and the pause to a loaded model process. False: it takes no commands."""
        self._sent_paused = None
        instruction = self.control_state.instruction
        command = SetInstruction(instruction_id=instruction.number, text=instruction.text, adapter=instruction.adapter)
        if not self.model.send(encode(SetPaused(self.control_state.paused))) or not self.model.send(encode(command)):
            return False
        self._sent_paused = self.control_state.paused
        return True

    def sync_model(self) -> None:
        """Once per turn: send again what the model process has not taken, a pause or resume and the end of questions.

        Without this, a resume command that the process did not take would leave a paused model in a running daemon.
        """
        while self._unsent_cancels and self.model.send(encode(CancelQuestion(self._unsent_cancels[0]))):
            del self._unsent_cancels[0]
        if self._sent_paused not in (None, self.control_state.paused):
            paused = self.control_state.paused
            self._sent_paused = paused if self.model.send(encode(SetPaused(paused))) else self._sent_paused

    def instruction_applied(self, event: InstructionApplied) -> bool:
        """Take in the answer to SetInstruction. False: the model process refuses the instruction in force."""
        pending = self._instructions.pop(event.instruction_id, None)
        if event.error:
            if pending is not None:
                self._refuse(pending.sender, pending.request_id, event.error)
            return pending is not None
        self.control_state.instruction = Instruction(event.instruction_id, event.text, event.adapter)
        if pending is not None:
            self._reply(pending, {"instruction": event.text, "adapter": event.adapter})
        return True

    def publish_text(self, event: TextDelta) -> None:
        """Publish a piece of text, and add it to the answer of its question.

        A piece for a question whose request was refused meanwhile is dropped: the end of its text was published then.
        """
        pending = self._questions.get(event.request)
        if event.request and pending is None:
            return
        self.publisher.send(
            "text",
            TextMessage,
            lane=event.lane,
            frame_id=event.frame_id,
            text=event.text,
            request=pending.request_id if pending is not None else "",
            final=event.final,
            stop_reason=event.stop_reason,
        )
        if pending is not None and event.lane == "answer":
            self._collect_answer(pending, event)

    def _collect_answer(self, pending: Pending, event: TextDelta) -> None:
        """Keep a piece of an answer. After the last piece, reply with the whole answer."""
        pending.parts.append(event.text)
        if event.final:
            del self._questions[event.request]
            text = "".join(pending.parts)[:MAX_ANSWER_CHARS]
            if error := event.error or _why_empty(text, event.stop_reason):
                self._refuse(pending.sender, pending.request_id, error)
                return
            self._reply(pending, {"text": text, "frame_id": event.frame_id, "stop_reason": event.stop_reason})

    def refuse_pending(self, reason: str) -> None:
        """Refuse every request that waits for a model process which has ended."""
        self._sent_paused = None
        for number in list(self._questions):
            self._abandon(number, "model-restart", f"the model process was lost ({reason}); ask again")
        self._unsent_cancels.clear()
        waiting = [pending for pending, _, _ in self._changes.take_all()]
        self._changes.note_answer()  # the next process has no answer to lose yet
        for pending in [*self._instructions.values(), *waiting]:
            error = f"the model process was lost ({reason}); the instruction and the adapter before stay in force"
            self._refuse(pending.sender, pending.request_id, error)
        self._instructions.clear()

    def check_timeouts(self) -> None:
        """End the questions that the model process has not answered in time, and those whose sender is gone."""
        state, reason = self.status.state()
        why = reason.text if reason is not None else state
        for number, pending in list(self._questions.items()):
            if self.clock() - pending.started_ns > ASK_TIMEOUT_S * NS_PER_S:
                self._abandon(number, "late", f"no answer in {ASK_TIMEOUT_S:g} s ({why})")
            elif not self.publisher.is_connected(pending.sender):
                self._abandon(number, "cancelled", "its sender is gone")

    def _abandon(self, number: str, stop_reason: TextStopReason, error: str) -> None:
        """End a question: in the model process, on the text stream, and with a refusal of its request."""
        pending = self._questions.pop(number)
        self._unsent_cancels.append(number)
        self.sync_model()
        self.publisher.send(
            "text",
            TextMessage,
            lane="answer",
            frame_id=0,
            text="",
            request=pending.request_id,
            final=True,
            stop_reason=stop_reason,
        )
        self._refuse(pending.sender, pending.request_id, error)

    # -- replies ------------------------------------------------------------------------------------------------------

    def _reply(self, pending: Pending, result: dict[str, Any]) -> None:
        reply = Reply(v=PROTOCOL_VERSION, id=pending.request_id, ok=True, result=result)
        self._send_reply(pending.sender, reply)

    def _refuse(self, sender: Sender, request_id: str, error: str) -> None:
        self._send_reply(sender, Reply(v=PROTOCOL_VERSION, id=request_id, ok=False, error=error[:MAX_ERROR_CHARS]))

    def _send_reply(self, sender: Sender, reply: Reply) -> None:
        self.publisher.reply(sender, encode(reply))


def _why_empty(answer: str, stop_reason: TextStopReason) -> str:
    """Why an answer says nothing; "": it says something. An empty answer is not a success."""
    if answer.strip():
        return ""
    return f"the answer is empty (stop_reason {stop_reason!r}); ask again, or in other words"


class OperationRule(NamedTuple):
    """One row of OPERATIONS."""

    carry_out: Callable[[Control, Pending, Request], None]
    needs_text: bool  # Request.text: 1 to MAX_TEXT_CHARS characters
    model_must_be: frozenset[Readiness]  # empty: the operation needs no model process
    answered_later: bool  # the reply follows when the model process has answered
    never_expires: bool  # carried out although the sender has stopped waiting: a late stop is on the safe side


_ANY: frozenset[Readiness] = frozenset()
_READY = frozenset({Readiness.READY})
_LOADED = frozenset({Readiness.READY, Readiness.REFUSED})

# fmt: off
OPERATIONS: dict[Operation, OperationRule] = {
    #                               carry out                     needs text  model    later  never expires
    "instruct":      OperationRule(Control._instruct,             True,       _LOADED, True,  False),
    "adapter":       OperationRule(Control._switch_adapter,       False,      _LOADED, True,  False),
    "ask":           OperationRule(Control._ask,                  True,       _READY,  True,  False),
    "cancel":        OperationRule(Control._cancel,               False,      _ANY,    False, True),
    "vehicle_state": OperationRule(Control._push_vehicle_state,   False,      _ANY,    False, False),
    "pause":         OperationRule(Control._pause,                False,      _ANY,    False, True),
    "resume":        OperationRule(Control._pause,                False,      _ANY,    False, False),
    "stats":         OperationRule(Control._stats,                False,      _ANY,    False, False),
}
# fmt: on
