"""The model process: newest frame -> eyes -> engine -> events; words in between; commands between two steps.

    python -m edge_agent.model --slot FD --wake FD --events FD

It checks nothing and publishes nothing: what it says is a proposal. It may crash, hang or be killed at any moment; the
supervisor starts another one.
"""

from __future__ import annotations

import ctypes
import gc
import os
import select
import socket
import sys
import time
from collections import deque

import msgspec
import numpy as np

from edge_agent import actions, bundle, health, memory, vision, worker
from edge_agent.config import Config, ConfigError
from edge_agent.engine import ACT_CLOSING, NS_PER_MS, Engine, Refused
from edge_agent.eyes import Eyes, Glance
from edge_agent.frames import Slot
from edge_agent.language import LanguageError
from edge_agent.messages import (
    Ask,
    CannotStart,
    Fact,
    Instruct,
    Instructed,
    Note,
    Progress,
    Proposal,
    Ready,
    SetPaused,
    Stages,
    decode_model_command,
    encode,
)

KEEP_WARM_S = 1.0  # without frames: one decode step so often, which is also how the supervisor knows that we can
WARM_UP_FRAME = (480, 640, 3)
NEWEST = 0.3  # weight of the newest answer in the running estimate of what one takes

_libc = ctypes.CDLL(None)
_decode_facts = msgspec.msgpack.Decoder(dict[str, tuple[Fact, int]]).decode


class Loop:
    """Newest frame in, one proposal out, words in between; commands are taken between two steps."""

    def __init__(self, engine: Engine, slot: Slot, events: socket.socket) -> None:
        self.engine, self.slot, self.events = engine, slot, events
        overlap = engine.config.vision.overlap
        self.eyes = Eyes(engine, slot, engine.language.on_gpu if overlap is None else overlap)
        self.task_id = -1
        self.paused = False
        self.questions: deque[Ask] = deque()
        self.described_id = 0  # the frame last described: once is enough
        self.waiting: deque[Instruct | SetPaused] = deque()  # commands that came while a frame was answered
        engine.cancelled = self._cancelled
        self.answer_ms = 0.0  # about what answering a frame takes
        self.idle_since = time.monotonic()

    def turn(self) -> None:
        engine = self.engine
        self._commands()
        if self.task_id < 0:  # nothing was asked of us yet
            self._wait()
            return
        glance = self.eyes.next(self.answer_ms) if not self.paused or self.questions else None
        if glance is not None:
            self._answer(glance)
            self.idle_since = time.monotonic()
        if self.questions and engine.sentence is not None and engine.sentence.lane == "describe":
            engine.end("asked")  # somebody waits for an answer; nobody waits for a description
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
            payload = self.events.recv(worker.MAX_EVENT_BYTES)
            if not payload:
                raise BrokenPipeError  # the supervisor is gone
            command = decode_model_command(payload)
            (self.questions if isinstance(command, Ask) else self.waiting).append(command)

    def _cancelled(self) -> bool:
        """Between two steps of an answer: whether what came means that nobody wants it any more."""
        self._read()
        return any(not isinstance(command, SetPaused) or command.paused for command in self.waiting)

    def _instruct(self, command: Instruct) -> None:
        engine, error = self.engine, ""
        try:
            engine.instruct(
                engine.task if command.text is None else command.text,
                engine.adapter if command.adapter is None else command.adapter,
            )
            self.task_id = command.task_id
        except Refused as refused:
            error = str(refused)
        engine.emit(Instructed(task_id=command.task_id, text=engine.task, adapter=engine.adapter, error=error))

    def _answer(self, glance: Glance) -> None:
        engine, frame = self.engine, glance.frame
        if self.paused:
            if glance.rows is not None:  # else the question waits for a better one
                engine.look(glance.rows, frame.frame_id)
            return
        started_ns = time.monotonic_ns()
        text, cut, stages = "", glance.cut, {"prefill": 0.0, "decode": 0.0}
        if glance.rows is not None and started_ns > glance.deadline_ns:
            cut = "late"
        elif glance.rows is not None:
            text, cut, stages = engine.respond(glance.rows, frame.frame_id, glance.deadline_ns, self._state(started_ns))
            self.eyes.budget.note(glance.n_tokens, glance.encode_ms + stages["prefill"], stages["decode"])
            took_ms = stages["prefill"] + stages["decode"]
            self.answer_ms += (NEWEST if self.answer_ms else 1.0) * (took_ms - self.answer_ms)
        engine.span(f"frame {frame.frame_id} waits", "slot", frame.t_capture_ns, glance.taken_ns)
        waited_ms = (glance.taken_ns - frame.t_capture_ns + started_ns - glance.done_ns) / NS_PER_MS
        engine.emit(
            Proposal(
                frame_id=frame.frame_id,
                t_capture_ns=frame.t_capture_ns,
                capture_clock=frame.capture_clock,
                frame_seq=frame.seq,
                task_id=self.task_id,
                text=text,
                cut=cut,
                stages_ms=Stages(queue=waited_ms, encode=glance.encode_ms, post=0.0, **stages),
            )
        )

    def _state(self, now_ns: int) -> str:
        """What the controller last said of its vehicle, in the words of the action space."""
        if self.engine.space.state is None:
            return ""
        facts = _decode_facts(self.slot.read_note() or encode({}))
        return actions.render_state(self.engine.space, facts, now_ns)

    def _begin(self) -> None:
        engine = self.engine
        if not engine.frame_stop:
            return
        if self.questions:
            ask = self.questions.popleft()
            engine.begin("answer", ask.request, ask.question)
        elif (describe := engine.config.language.describe) and self.described_id != engine.frame_id:
            self.described_id = engine.frame_id
            engine.begin("describe", "", describe)

    def _wait(self) -> None:
        """Until a frame or a command comes; without either, a step now and then keeps caches and clocks warm."""
        poll = select.poll()
        poll.register(self.events, select.POLLIN)
        if not self.paused or self.questions:
            poll.register(self.eyes, select.POLLIN)
        if not poll.poll(KEEP_WARM_S * 1000) or time.monotonic() - self.idle_since > KEEP_WARM_S:
            self.engine.keep_warm()
            self.engine.emit(Progress("idle"))
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
        engine.begin("describe", "", ACT_CLOSING)
        if engine.sentence is not None:
            engine.end("")
    finally:
        engine.emit = quiet
    return (time.monotonic() - start) * 1000


def main() -> int:
    slot, events, first = worker.attach()
    config = msgspec.msgpack.decode(first, type=Config)

    def emit(event: object) -> None:
        events.send(encode(event))

    start = time.monotonic()
    try:
        model_bundle = bundle.read_manifest(config.bundle)  # the supervisor has verified the files
        planned = memory.plan(config, model_bundle.manifest, health.mem_available_mib(), memory.adapters_mib(config))
        for key, value in planned.given_up.items():
            emit(Note(f"memory is short: {key} is {value} instead of what was configured"))
        config = planned.config
        engine = Engine(config, model_bundle, actions.load(config.task.space), emit)
        emit(Progress("warm-up"))
        warmup_ms = warm_up(engine)
        gc.collect()
        _libc.malloc_trim(0)  # what loading took and left, 10 MB of a full vocabulary
    except (LanguageError, vision.VisionError, bundle.BundleError, memory.TooLittle, ValueError) as error:
        emit(CannotStart(reason=str(error), configured=False))
        return 1
    except (Refused, ConfigError) as error:
        emit(CannotStart(reason=str(error), configured=True))
        return 1
    emit(Ready(vision=engine.encoder.provider, load_s=time.monotonic() - start, warmup_ms=warmup_ms))
    loop = Loop(engine, slot, events)
    while True:
        loop.turn()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the supervisor is gone
