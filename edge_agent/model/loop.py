"""The loop of the model process: newest frame in, one proposal out, at most one token of text between two frames.

It checks nothing and publishes nothing: its results are proposals. It may crash, hang or be killed at any moment; the
supervisor starts another process.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable
from typing import cast

import msgspec

from edge_agent.actions.space import ActionSpace
from edge_agent.actions.vehicle_state import render_vehicle_state, unknown_values
from edge_agent.ipc.events import (
    CancelQuestion,
    Heartbeat,
    InstructionApplied,
    LimitLoad,
    Proposal,
    SetPaused,
)
from edge_agent.ipc.frame_slot import Slot
from edge_agent.model.action_lane import Decision
from edge_agent.model.engine import Engine
from edge_agent.model.frame_encoder import EncodedFrame, FrameEncoder
from edge_agent.model.prompt import InstructionRefused
from edge_agent.model.supervisor_channel import LaneCommand, SupervisorChannel
from edge_agent.suspend import SuspendDetector
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.codec import encode
from edge_agent.wire.control import StateValue
from edge_agent.wire.messages import CaptureClock, StageTimes

# Without frames, one real decode step per interval. It keeps caches warm and serves as the heartbeat.
HEARTBEAT_NS = NS_PER_S
_decode_vehicle_state = msgspec.msgpack.Decoder(dict[str, tuple[StateValue, int]]).decode


class ModelLoop:
    """step() is one turn. Between two calls only the encoder thread works."""

    def __init__(
        self,
        engine: Engine,
        frames: FrameEncoder,
        slot: Slot,
        supervisor: SupervisorChannel,
        describe_prompt: str,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """slot: its vehicle-state record is read for each frame. describe_prompt: asked about frames while there is no
        question; empty: no descriptions. clock: CLOCK_MONOTONIC, nanoseconds."""
        self.engine, self.frames, self.slot, self.supervisor = engine, frames, slot, supervisor
        self._describe_prompt, self._clock = describe_prompt, clock
        self.suspend = SuspendDetector(clock)
        self.instruction_id = -1  # below 0: no instruction yet
        self.paused = False
        self._may_describe = True
        self._last_described_frame = 0  # its id; a frame is described once
        self._last_work_ns = clock()

    def step(self) -> None:
        """Apply commands, answer the newest frame, then decode one token of text; wait when there is none of these."""
        for command in self.supervisor.take_commands():
            self._apply(command)
        if self.instruction_id < 0:
            self._wait()
            return
        frame = self.frames.next() if self._needs_frame else None
        was_evaluated = frame is not None and self._answer(frame)
        has_text = self._start_text()
        if has_text and not (was_evaluated and self.engine.llama.can_batch_text):  # else its token was in that batch
            self.engine.text.step()
        if frame is not None or has_text:
            self._last_work_ns = self._clock()
        if not has_text and (frame is None or self.paused):
            self._wait()

    @property
    def _needs_frame(self) -> bool:
        return self.instruction_id >= 0 and (not self.paused or bool(self.supervisor.pending_questions))

    def _apply(self, command: LaneCommand) -> None:
        if isinstance(command, SetPaused):
            self.paused = command.paused
            return
        if isinstance(command, CancelQuestion):
            self._cancel(command.request)
            return
        if isinstance(command, LimitLoad):
            self.frames.limit(command.max_image_tokens, command.min_interval_ms)
            self._may_describe = command.describe
            return
        engine, error = self.engine, ""
        try:
            engine.instruct(
                engine.instruction if command.text is None else command.text,
                engine.adapter if command.adapter is None else command.adapter,
            )
            self.instruction_id = command.instruction_id
        except InstructionRefused as refused:
            error = str(refused)
        self.supervisor.send(
            InstructionApplied(
                instruction_id=command.instruction_id, text=engine.instruction, adapter=engine.adapter, error=error
            )
        )

    def _cancel(self, request: str) -> None:
        """Forget a question that waits, or end the answer to it."""
        questions, text = self.supervisor.pending_questions, self.engine.text
        for question in [question for question in questions if question.request == request]:
            questions.remove(question)
        if text.request == request:
            text.stop("cancelled")

    def _answer(self, encoded: EncodedFrame) -> bool:
        """One frame -> one proposal; while paused, the frame is only evaluated, for the question that waits.

        Returns whether the language model evaluated the frame.
        """
        frame_id = encoded.frame.frame_id
        if self.paused:
            # Without embeddings the question waits for a better frame.
            return encoded.embeddings is not None and self.engine.actions.prefill_only(encoded.embeddings, frame_id)
        started_ns, events = self._clock(), self.supervisor.events
        decision = Decision("", encoded.stop_reason, 0.0, 0.0)
        was_evaluated = encoded.embeddings is not None and started_ns <= encoded.deadline_ns
        if encoded.embeddings is not None and not was_evaluated:
            decision = Decision("", "late", 0.0, 0.0)
            self.frames.record_late(encoded)
        elif encoded.embeddings is not None:
            state, missing = self._vehicle_state(started_ns)
            if missing and not self.engine.prompt.has_images:  # the model would know nothing about the vehicle
                was_evaluated = self.engine.actions.prefill_only(encoded.embeddings, frame_id)
                decision = Decision(missing, "no-state", 0.0, 0.0)
            else:
                decision = self.engine.actions.decide(
                    encoded.embeddings, frame_id, encoded.deadline_ns, state, self.supervisor.has_urgent, events
                )
                self.frames.record(encoded, decision.prefill_ms, decision.decode_ms)
        self.supervisor.send(self._proposal(encoded, started_ns, decision))
        events.span(f"frame {frame_id} waits", "slot", encoded.frame.t_capture_ns, encoded.taken_ns)
        events.span("resize", "encoder", encoded.taken_ns, encoded.resized_ns)
        if encoded.embeddings is not None:
            events.span("encode", "encoder", encoded.resized_ns, encoded.done_ns)
        return was_evaluated

    def _proposal(self, encoded: EncodedFrame, started_ns: int, decision: Decision) -> Proposal:
        frame = encoded.frame
        queue_ns = encoded.taken_ns - frame.t_capture_ns + started_ns - encoded.done_ns
        return Proposal(
            frame_id=frame.frame_id,
            t_capture_ns=frame.t_capture_ns,
            capture_clock=cast(CaptureClock, frame.capture_clock),
            frame_seq=frame.seq,
            instruction_id=self.instruction_id,
            text=decision.text,
            stop_reason=decision.stop_reason,
            stages_ms=StageTimes(
                queue=queue_ns / NS_PER_MS,
                encode=encoded.encode_ms,
                prefill=decision.prefill_ms,
                decode=decision.decode_ms,
                check=0.0,
            ),
        )

    def _vehicle_state(self, now_ns: int) -> tuple[str, str]:
        """The newest values that the controller sent of its vehicle, in the words of the action space; what of them is
        missing, for people, or empty."""
        space: ActionSpace = self.engine.prompt.action_space
        if space.vehicle_state is None:
            return "", "the action space has no vehicle_state"
        values = _decode_vehicle_state(self.slot.read_vehicle_state() or encode({}))
        resumed_ns = self.suspend.resumed_ns()  # CLOCK_MONOTONIC, by which their age is counted, stood still
        known = {key: (value, arrival_ns) for key, (value, arrival_ns) in values.items() if arrival_ns >= resumed_ns}
        missing = ", ".join(unknown_values(space, known, now_ns))
        return render_vehicle_state(space, known, now_ns), missing and f"no fresh value of {missing}"

    def _start_text(self) -> bool:
        """Start the next question or description, if the lane is free -> whether there is a text to continue."""
        text, questions = self.engine.text, self.supervisor.pending_questions
        if questions and text.describing:
            text.stop("new-question")  # somebody waits for an answer; nobody waits for a description
        if text.idle and self.engine.cache.frame_end_position:
            frame_id = self.engine.cache.frame_id
            if questions:
                question = questions.popleft()
                text.start("answer", question.request, question.question, self.supervisor.events)
            elif self._describe_prompt and self._may_describe and self._last_described_frame != frame_id:
                self._last_described_frame = frame_id
                text.start("describe", "", self._describe_prompt, self.supervisor.events)
        return not text.idle

    def _wait(self) -> None:
        """Until a frame or a command arrives, the governor's pause before a frame is over, or a heartbeat is due."""
        poll = select.poll()
        poll.register(self.supervisor, select.POLLIN)
        rest_ns = self.frames.rest_ns() if self._needs_frame else 0
        if self._needs_frame and not rest_ns:
            poll.register(self.frames, select.POLLIN)
        timeout_ns = min(rest_ns or HEARTBEAT_NS, HEARTBEAT_NS)
        arrived = poll.poll(math.ceil(timeout_ns / NS_PER_MS))
        if (not arrived and timeout_ns == HEARTBEAT_NS) or self._clock() - self._last_work_ns > HEARTBEAT_NS:
            self.engine.keep_warm()
            self.supervisor.send(Heartbeat("idle"))
            self._last_work_ns = self._clock()
