"""The model process: newest frame -> eyes -> engine -> events; words in between; commands between two steps.

    python -m edge_agent.model --slot FD --wake FD --events FD

It checks nothing and publishes nothing: what it says is a proposal. It may crash, hang or be killed at any moment; the
supervisor starts another one.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque

import msgspec
import numpy as np

from edge_agent.actions.vehicle_state import render_vehicle_state
from edge_agent.ipc.events import (
    AskQuestion,
    Heartbeat,
    InstructionApplied,
    Proposal,
    SetInstruction,
    SetPaused,
    decode_model_command,
)
from edge_agent.ipc.frame_slot import Slot
from edge_agent.ipc.worker import MAX_EVENT_BYTES
from edge_agent.model.engine import ACTION_QUESTION, NS_PER_MS, Engine, InstructionRefused
from edge_agent.model.frame_encoder import EncodedFrame, FrameEncoder
from edge_agent.wire.codec import encode
from edge_agent.wire.control import StateValue
from edge_agent.wire.messages import StageTimes

HEARTBEAT_S = 1.0  # without frames: one decode step so often, which is also how the supervisor knows that we can
WARM_UP_FRAME = (480, 640, 3)
EMA_WEIGHT = 0.3  # weight of the newest answer in the running estimate of what one takes
_decode_vehicle_state = msgspec.msgpack.Decoder(dict[str, tuple[StateValue, int]]).decode


class ModelLoop:
    """Newest frame in, one proposal out, words in between; commands are taken between two steps."""

    def __init__(self, engine: Engine, slot: Slot, events: socket.socket) -> None:
        self.engine, self.slot, self.events = engine, slot, events
        overlap = engine.config.vision.overlap
        self.eyes = FrameEncoder(engine, slot, engine.language.on_gpu if overlap is None else overlap)
        self.instruction_id = -1
        self.paused = False
        self.questions: deque[AskQuestion] = deque()
        self.described_id = 0  # the frame last described: once is enough
        self.waiting: deque[SetInstruction | SetPaused] = deque()  # commands that came while a frame was answered
        engine.cancelled = self._cancelled
        self.answer_ms = 0.0  # about what answering a frame takes
        self.idle_since = time.monotonic()

    def turn(self) -> None:
        engine = self.engine
        self._commands()
        if self.instruction_id < 0:  # nothing was asked of us yet
            self._wait()
            return
        glance = self.eyes.next(self.answer_ms) if not self.paused or self.questions else None
        if glance is not None:
            self._answer(glance)
            self.idle_since = time.monotonic()
        if self.questions and engine.sentence is not None and engine.sentence.lane == "describe":
            engine.end("new-question")  # somebody waits for an answer; nobody waits for a description
        if engine.sentence is None:
            self._begin()
        if engine.sentence is not None:
            if glance is None or not engine.language.rides:  # else it came along, and the next frame goes first
                engine.step()
            self.idle_since = time.monotonic()
        elif glance is None or self.paused:
            self._wait()

    def _commands(self) -> None:
        self._read()
        while self.waiting:
            command = self.waiting.popleft()
            if isinstance(command, SetPaused):
                self.paused = command.paused
            else:
                self._instruct(command)

    def _read(self) -> None:
        while select.select([self.events], [], [], 0)[0]:
            payload = self.events.recv(MAX_EVENT_BYTES)
            if not payload:
                raise BrokenPipeError  # the supervisor is gone
            command = decode_model_command(payload)
            (self.questions if isinstance(command, AskQuestion) else self.waiting).append(command)

    def _cancelled(self) -> bool:
        """Between two steps of an answer: whether what came means that nobody wants it any more."""
        self._read()
        return any(not isinstance(command, SetPaused) or command.paused for command in self.waiting)

    def _instruct(self, command: SetInstruction) -> None:
        engine, error = self.engine, ""
        try:
            engine.instruct(
                engine.instruction if command.text is None else command.text,
                engine.adapter if command.adapter is None else command.adapter,
            )
            self.instruction_id = command.instruction_id
        except InstructionRefused as refused:
            error = str(refused)
        engine.emit(
            InstructionApplied(
                instruction_id=command.instruction_id, text=engine.instruction, adapter=engine.adapter, error=error
            )
        )

    def _answer(self, glance: EncodedFrame) -> None:
        engine, frame = self.engine, glance.frame
        if self.paused:
            if glance.rows is not None:  # else the question waits for a better one
                engine.look(glance.rows, frame.frame_id)
            return
        started_ns = time.monotonic_ns()
        text, stop_reason, stages = "", glance.stop_reason, {"prefill": 0.0, "decode": 0.0}
        if glance.rows is not None and started_ns > glance.deadline_ns:
            stop_reason = "late"
        elif glance.rows is not None:
            text, stop_reason, stages = engine.respond(
                glance.rows, frame.frame_id, glance.deadline_ns, self._state(started_ns)
            )
            self.eyes.budget.note(glance.n_tokens, glance.encode_ms + stages["prefill"], stages["decode"])
            took_ms = stages["prefill"] + stages["decode"]
            self.answer_ms += (EMA_WEIGHT if self.answer_ms else 1.0) * (took_ms - self.answer_ms)
        engine.span(f"frame {frame.frame_id} waits", "slot", frame.t_capture_ns, glance.taken_ns)
        waited_ms = (glance.taken_ns - frame.t_capture_ns + started_ns - glance.done_ns) / NS_PER_MS
        engine.emit(
            Proposal(
                frame_id=frame.frame_id,
                t_capture_ns=frame.t_capture_ns,
                capture_clock=frame.capture_clock,
                frame_seq=frame.seq,
                instruction_id=self.instruction_id,
                text=text,
                stop_reason=stop_reason,
                stages_ms=StageTimes(queue=waited_ms, encode=glance.encode_ms, check=0.0, **stages),
            )
        )

    def _state(self, now_ns: int) -> str:
        """What the controller last said of its vehicle, in the words of the action space."""
        if self.engine.action_space.vehicle_state is None:
            return ""
        facts = _decode_vehicle_state(self.slot.read_vehicle_state() or encode({}))
        return render_vehicle_state(self.engine.action_space, facts, now_ns)

    def _begin(self) -> None:
        engine = self.engine
        if not engine.frame_stop:
            return
        if self.questions:
            ask = self.questions.popleft()
            engine.begin("answer", ask.request, ask.question)
        elif (describe := engine.config.language.describe_prompt) and self.described_id != engine.frame_id:
            self.described_id = engine.frame_id
            engine.begin("describe", "", describe)

    def _wait(self) -> None:
        """Until a frame or a command comes; without either, a step now and then keeps caches and clocks warm."""
        poll = select.poll()
        poll.register(self.events, select.POLLIN)
        if not self.paused or self.questions:
            poll.register(self.eyes, select.POLLIN)
        if not poll.poll(HEARTBEAT_S * 1000) or time.monotonic() - self.idle_since > HEARTBEAT_S:
            self.engine.keep_warm()
            self.engine.emit(Heartbeat("idle"))
            self.idle_since = time.monotonic()


def warm_up(engine: Engine) -> float:
    """A whole frame through everything, milliseconds: the first one allocates, and must not be the vehicle's. Of the
    camera's size where that is configured: TensorRT makes an engine for each."""
    start = time.monotonic()
    camera = engine.config.camera
    size = (camera.height or WARM_UP_FRAME[0], camera.width or WARM_UP_FRAME[1], 3)
    image = engine.preprocessor.image(np.full(size, 128, np.uint8))
    quiet, engine.emit = engine.emit, lambda event: None
    try:
        engine.instruct("")
        engine.act(image, 0, time.monotonic_ns() + 10**12)
        engine.begin("describe", "", ACTION_QUESTION)
        if engine.sentence is not None:
            engine.end("")
    finally:
        engine.emit = quiet
    return (time.monotonic() - start) * 1000
