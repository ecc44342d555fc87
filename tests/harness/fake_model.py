"""A model process that fails on request: the real worker, socket and messages, no model behind them.

$FAKE_MODEL is JSON: {"text": what it answers, "delay_ms": how long it takes, "after": answers until it misbehaves,
"then": hang | abort | segv | exit | garbage | silent, "stop_reason": …, "instruction_id": a wrong one, "future": true,
"note": true: the slot's note is published as text, in hex, "timed": true: stages_ms.queue is all the time until the
answer was ready}.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time

from edge_agent.ipc.events import (
    Heartbeat,
    InstructionApplied,
    ModelReady,
    Proposal,
    SetInstruction,
    SetPaused,
    TextDelta,
    decode_model_command,
)
from edge_agent.ipc.worker import MAX_EVENT_BYTES, attach_to_supervisor
from edge_agent.wire.codec import encode
from edge_agent.wire.messages import StageTimes


def main() -> None:
    slot, events, _ = attach_to_supervisor()
    law = json.loads(os.environ.get("FAKE_MODEL", "{}"))

    def emit(event: object) -> None:
        events.send(encode(event))

    emit(ModelReady(vision="fake", load_s=0.0, warmup_ms=0.0))
    seen, answered, instruction_id, paused = 0, 0, -1, False
    text, adapter = "", ""
    events.setblocking(False)
    while True:
        try:
            command = decode_model_command(events.recv(MAX_EVENT_BYTES))
            if isinstance(command, SetInstruction):
                instruction_id = command.instruction_id
                error = "too long" if command.text == "refuse this" else ""
                if not error:
                    text = text if command.text is None else command.text
                    adapter = adapter if command.adapter is None else command.adapter
                emit(InstructionApplied(instruction_id=instruction_id, text=text, adapter=adapter, error=error))
            elif isinstance(command, SetPaused):
                paused = command.paused
            else:
                for piece in ("a ", "pad"):
                    emit(TextDelta(lane="answer", frame_id=seen, text=piece, request=command.request))
                emit(TextDelta(lane="answer", frame_id=seen, text="", request=command.request, final=True))
        except BlockingIOError:
            pass
        frame = slot.newest(seen)
        if frame is None or instruction_id < 0:
            slot.wait(0.05)
            emit(Heartbeat("idle"))
            continue
        seen = frame.seq
        if paused:
            continue
        if law.get("note"):
            emit(TextDelta(lane="describe", frame_id=seen, text=slot.read_note().hex()))
        if answered >= law.get("after", 1 << 60):
            misbehave(law["then"], events)
        time.sleep(law.get("delay_ms", 0) / 1000)
        waited_ms = (time.monotonic_ns() - frame.t_capture_ns) / 1e6 if law.get("timed") else 0.0
        texts = law.get("text", ['{"action":"move","vx":1,"vy":0,"vz":0,"yaw":0}'])
        emit(
            Proposal(
                frame_id=frame.frame_id,
                t_capture_ns=frame.t_capture_ns + (10**9 if law.get("future") else 0),
                capture_clock=frame.capture_clock,
                frame_seq=frame.seq,
                instruction_id=law.get("instruction_id", instruction_id),
                text=texts[answered % len(texts)],
                stop_reason=law.get("stop_reason", ""),
                stages_ms=StageTimes(queue=waited_ms, encode=0, prefill=0, decode=0, check=0),
            )
        )
        answered += 1


def misbehave(how: str, events) -> None:
    if how == "abort":
        os.abort()
    elif how == "segv":
        ctypes.string_at(1)
    elif how == "exit":
        sys.exit(3)
    elif how == "garbage":
        events.send(b"\xc1 not msgpack")
        time.sleep(60)
    else:  # hang: alive, its socket open, no progress
        time.sleep(600)


if __name__ == "__main__":
    main()
