"""The supervisor's and the camera's side of the model process's loop, in the process of the test."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

from edge_agent.actions.space import load_action_space
from edge_agent.bundle.manifest import read_manifest
from edge_agent.ipc.events import InstructionApplied, Proposal, SetInstruction, TextDelta, decode_model_event
from edge_agent.ipc.frame_slot import Slot
from edge_agent.ipc.worker import MAX_EVENT_BYTES
from edge_agent.model.frame_encoder import FrameEncoder
from edge_agent.model.load import load_model
from edge_agent.model.loop import ModelLoop
from edge_agent.model.supervisor_channel import SupervisorChannel
from edge_agent.wire.codec import encode
from tests.harness import toy
from tests.harness.clock import FakeClock
from tests.harness.rig import TASK, config_of

MS = 1_000_000  # nanoseconds


class LoopRig:
    """The supervisor's and the camera's side of a loop in this process. `waits` counts the turns without work."""

    def __init__(self, folder: Path, space: str = "velocity_body", *, trace: bool = False, **changes: object) -> None:
        config = config_of(folder, **changes)
        self.clock, self.slot = FakeClock(), Slot.create()
        ours, self.supervisor = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.supervisor.setblocking(False)
        self.socket = ours
        self.model = load_model(config, read_manifest(folder), load_action_space(space))
        self.channel = SupervisorChannel(ours, trace=trace)
        self.frames = FrameEncoder(
            self.slot, self.model.images, config.task.deadline_ms, overlap=False, clock=self.clock
        )
        self.loop = ModelLoop(
            self.model.engine, self.frames, self.slot, self.channel, config.language.describe_prompt, self.clock
        )
        self.model.engine.actions._clock = self.clock
        self.waits = 0
        self.loop._wait = self._count_wait
        self.events: list = []

    def _count_wait(self) -> None:
        self.waits += 1

    def close(self) -> None:
        self.frames.close()
        self.model.close()
        self.slot.close()
        self.socket.close()
        self.supervisor.close()

    def send(self, command: object) -> None:
        self.supervisor.send(encode(command))

    def publish(self, frame_id: int, age_ms: float = 0.0, seed: int = 0, clock: str = "driver") -> int:
        """A frame into the slot; returns its time of capture."""
        captured_ns = self.clock.now_ns - round(age_ms * MS)
        self.slot.write(120, 160)[:] = toy.toy_image(120, 160, seed=seed)
        self.slot.publish(frame_id, captured_ns, clock)
        return captured_ns

    def step(self, n_turns: int = 1) -> list:
        """The events of these turns."""
        new: list = []
        for _ in range(n_turns):
            self.loop.step()
            new += self.received()
        self.events += new
        return new

    def received(self) -> list:
        """What the supervisor finds in its socket."""
        events: list = []
        with contextlib.suppress(BlockingIOError):
            while True:
                events.append(decode_model_event(self.supervisor.recv(MAX_EVENT_BYTES)))
        return events

    def instruct(
        self, instruction_id: int = 0, text: str | None = TASK, adapter: str | None = None
    ) -> InstructionApplied:
        self.send(SetInstruction(instruction_id=instruction_id, text=text, adapter=adapter))
        (applied,) = [event for event in self.step() if isinstance(event, InstructionApplied)]
        return applied

    def propose(self, frame_id: int, **frame: object) -> Proposal:
        """Publish a frame and take one turn."""
        self.publish(frame_id, **frame)
        (proposal,) = [event for event in self.step() if isinstance(event, Proposal)]
        return proposal

    def deltas_of(self, request: str, max_turns: int = 200) -> list[TextDelta]:
        """Turns until the answer to a question is complete."""
        for _ in range(max_turns):
            deltas = [event for event in self.events if isinstance(event, TextDelta) and event.request == request]
            if deltas and deltas[-1].final:
                return deltas
            self.step()
        raise AssertionError(f"no answer to {request} in {max_turns} turns")

    def proposals(self) -> list[Proposal]:
        return [event for event in self.events if isinstance(event, Proposal)]
