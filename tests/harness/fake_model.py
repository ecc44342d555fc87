"""A model process that fails on request: real worker, real socket, real messages, and no model behind them.

$FAKE_MODEL is JSON; every key is optional:

    text              list of answers, one after the other
    delay_ms          duration of an answer
    after, then       after this number of answers: hang, abort, segv, exit or garbage
    stop_reason       of every proposal
    instruction_id    of every proposal, in place of the right one
    future            true: every frame is stamped one second in the future
    vehicle_state     true: the record of the slot is published as text, in hexadecimal
    timed             true: stages_ms.queue is the time from capture until the answer was ready
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import time
from typing import NoReturn

from edge_agent.ipc.events import (
    AskQuestion,
    Heartbeat,
    InstructionApplied,
    ModelReady,
    Proposal,
    SetInstruction,
    SetPaused,
    TextDelta,
    TraceSpan,
    decode_model_command,
)
from edge_agent.ipc.frame_slot import Frame
from edge_agent.ipc.worker import MAX_EVENT_BYTES, attach_to_supervisor
from edge_agent.wire.codec import encode
from edge_agent.wire.messages import StageTimes

MOVE = '{"action":"move","vx":1,"vy":0,"vz":0,"yaw":0}'


class FakeModel:
    def __init__(self) -> None:
        self.behaviour = json.loads(os.environ.get("FAKE_MODEL", "{}"))
        self.slot, self.events, _, self.trace = attach_to_supervisor()
        self.events.setblocking(False)
        self.instruction_id, self.paused = -1, False
        self.text, self.adapter = "", ""
        self.last_seq = self.n_answers = 0

    def run(self) -> NoReturn:
        self.emit(ModelReady(vision="fake", load_s=0.0, warmup_ms=0.0))
        while True:
            self.take_commands()
            frame = self.slot.take_newest(self.last_seq)
            if frame is None or self.instruction_id < 0:
                self.slot.wait(0.05)
                self.emit(Heartbeat("idle"))
                continue
            self.last_seq = frame.seq
            if not self.paused:
                self.answer(frame)

    def emit(self, event: object) -> None:
        self.events.setblocking(True)
        self.events.send(encode(event))
        self.events.setblocking(False)

    def take_commands(self) -> None:
        while True:
            try:
                command = decode_model_command(self.events.recv(MAX_EVENT_BYTES))
            except BlockingIOError:
                return
            if isinstance(command, SetInstruction):
                self.follow(command)
            elif isinstance(command, SetPaused):
                self.paused = command.paused
            elif isinstance(command, AskQuestion):
                for piece in ("a ", "pad"):
                    self.emit(TextDelta(lane="answer", frame_id=self.last_seq, text=piece, request=command.request))
                self.emit(
                    TextDelta(lane="answer", frame_id=self.last_seq, text="", request=command.request, final=True)
                )

    def follow(self, command: SetInstruction) -> None:
        error = "too long" if command.text == "refuse this" else ""
        if not error:
            self.instruction_id = command.instruction_id
            self.text = self.text if command.text is None else command.text
            self.adapter = self.adapter if command.adapter is None else command.adapter
        self.emit(
            InstructionApplied(instruction_id=command.instruction_id, text=self.text, adapter=self.adapter, error=error)
        )

    def answer(self, frame: Frame) -> None:
        behaviour, start_ns = self.behaviour, time.monotonic_ns()
        if behaviour.get("vehicle_state"):
            record = self.slot.read_vehicle_state().hex()
            self.emit(TextDelta(lane="describe", frame_id=self.last_seq, text=record))
        if self.n_answers >= behaviour.get("after", 1 << 60):
            misbehave(behaviour["then"], self.events)
        time.sleep(behaviour.get("delay_ms", 0) / 1000)
        waited_ms = (time.monotonic_ns() - frame.t_capture_ns) / 1e6 if behaviour.get("timed") else 0.0
        texts = behaviour.get("text", [MOVE])
        self.emit(
            Proposal(
                frame_id=frame.frame_id,
                t_capture_ns=frame.t_capture_ns + (10**9 if behaviour.get("future") else 0),
                capture_clock=frame.capture_clock,
                frame_seq=frame.seq,
                instruction_id=behaviour.get("instruction_id", self.instruction_id),
                text=texts[self.n_answers % len(texts)],
                stop_reason=behaviour.get("stop_reason", ""),
                stages_ms=StageTimes(queue=waited_ms, encode=0, prefill=0, decode=0, check=0),
            )
        )
        if self.trace:
            self.emit(TraceSpan(name="decode", thread="language", start_ns=start_ns, stop_ns=time.monotonic_ns()))
        self.n_answers += 1


def misbehave(how: str, events: socket.socket) -> None:
    if how == "abort":
        os.abort()
    elif how == "segv":
        ctypes.string_at(1)
    elif how == "exit":
        sys.exit(3)
    elif how == "garbage":
        events.send(b"\xc1 not msgpack")
        time.sleep(60)
    else:  # hang: the process runs, its socket is open, and it makes no progress
        time.sleep(600)


if __name__ == "__main__":
    FakeModel().run()
