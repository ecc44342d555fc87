"""A supervisor inside the test's own process: workers, sockets and clock are small fakes that the test drives.

with supervisor_of(config) as (supervisor, clock, publisher):
    supervisor.start()
    supervisor.model.worker.emit(ModelReady(...))
    supervisor.poll_once()
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from edge_agent.actions.space import load_action_space
from edge_agent.config import CameraConfig, Config
from edge_agent.ipc.events import (
    CameraOpened,
    InstructionApplied,
    ModelReady,
    Proposal,
    SetInstruction,
    decode_model_command,
)
from edge_agent.supervisor import process
from edge_agent.wire.codec import encode
from edge_agent.wire.control import Reply, Request, decode_reply
from edge_agent.wire.messages import StageTimes

NS_PER_S = 1_000_000_000
MOVE = '{"action":"move","vx":1,"vy":0,"vz":0,"yaw":0}'


class FakeClock:
    """A monotonic clock in nanoseconds that stands still until the test moves it."""

    def __init__(self, start_s: float = 1000.0) -> None:
        self.now_ns = round(start_s * NS_PER_S)

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, seconds: float) -> None:
        self.now_ns += round(seconds * NS_PER_S)


class FakeWorker:
    """In place of ipc.worker.Worker: the test emits its events and reads the commands that it was sent."""

    pids = itertools.count(100_000)

    def __init__(self) -> None:
        self.socket, self._theirs = socket.socketpair()
        self.pid = next(self.pids)
        self.process = SimpleNamespace(pid=self.pid)
        self.exit_status: int | None = None
        self.takes_messages = True  # False: its socket is full
        self.in_kernel = False  # True: killed, but stuck in a driver; the process stays
        self.killed = False
        self.commands: list = []
        self._events: list[bytes] = []

    def emit(self, *events: object) -> None:
        self._events += [event if isinstance(event, bytes) else encode(event) for event in events]

    def send(self, message: bytes) -> bool:
        if self.takes_messages:
            self.commands.append(decode_model_command(message))
        return self.takes_messages

    def receive(self) -> list[bytes]:
        events, self._events = self._events, []
        return events

    def kill(self) -> None:
        self.killed = True
        self.socket.close()
        self._theirs.close()
        if self.exit_status is None and not self.in_kernel:
            self.exit_status = -signal.SIGKILL


class FakePublisher:
    """In place of supervisor.publisher.Publisher: keeps what would have left."""

    folder = Path("/nowhere")

    def __init__(self) -> None:
        self._control, self._status = socket.socketpair(), socket.socketpair()
        self.control, self.status = self._control[0], self._status[0]
        self.published: list[tuple[str, object]] = []
        self.replies: list[Reply] = []
        self._requests: list[tuple[list[bytes], bytes]] = []
        self._seq = dict.fromkeys(("actions", "text", "status"), 0)

    def request(self, op: str, text: str = "", request_id: str = "", sender: bytes = b"controller", **more) -> None:
        request_id = request_id or f"request-{len(self.replies)}-{len(self._requests)}"
        payload = encode(Request(v=1, id=request_id, op=op, text=text, **more))
        self._requests.append(([sender], payload))

    def requests(self) -> list[tuple[list[bytes], bytes]]:
        requests, self._requests = self._requests, []
        return requests

    def reply(self, sender: list[bytes], payload: bytes) -> None:
        self.replies.append(decode_reply(payload))

    def next_seq(self, stream: str) -> int:
        return self._seq[stream]

    def publish(self, stream: str, message: object) -> None:
        self._seq[stream] += 1
        self.published.append((stream, message))

    def new_subscriber(self) -> bool:
        return False

    def close(self) -> None:
        for one in (*self._control, *self._status):
            one.close()

    def stream(self, name: str) -> list:
        return [message for stream, message in self.published if stream == name]


def default_config(**changes) -> Config:
    return Config(bundle="none", camera=CameraConfig(source="zmq:ipc:///none"), **changes)


class InProcess:
    """A supervisor with fake workers, a fake publisher and a fake clock, one turn at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: Config | None = None) -> None:
        self.config = config or default_config()
        self.clock, self.publisher = FakeClock(), FakePublisher()
        self.frame_id = 0
        monkeypatch.setattr(process.time, "monotonic_ns", self.clock)
        monkeypatch.setattr(process, "Worker", lambda *_: FakeWorker())
        bundle = SimpleNamespace(id="0" * 16, manifest=SimpleNamespace(model=SimpleNamespace(family="fake", size="0B")))
        space = load_action_space("velocity_body")
        trace = SimpleNamespace(span=lambda *_: None, close=lambda: None)
        self.supervisor = process.Supervisor(self.config, bundle, space, self.publisher, trace)
        self.supervisor.camera.start()
        self.supervisor._start_model()

    @property
    def model(self) -> FakeWorker:
        return self.supervisor.model.worker

    @property
    def camera(self) -> FakeWorker:
        return self.supervisor.camera.worker

    @property
    def state(self) -> tuple[str, str]:
        return self.supervisor._state()

    def turn(self, seconds: float = 0.0) -> None:
        self.clock.advance(seconds)
        self.supervisor._model_events()
        self.supervisor._camera_events()
        for sender, payload in self.publisher.requests():
            self.supervisor._request(sender, payload)
        self.supervisor._watch()
        self.supervisor._say_status()

    def open_camera(self) -> None:
        self.camera.emit(CameraOpened(width=6, height=4, fps=30.0, description="fake"))
        self.push_frame()

    def push_frame(self) -> None:
        slot = self.supervisor.slot
        self.frame_id += 1
        slot.write(4, 6)[:] = 0
        slot.publish(self.frame_id, self.clock(), "driver")

    def load_model(self, error: str = "") -> None:
        """The model process reports that it is loaded, and answers the instruction that it is then sent."""
        self.model.emit(ModelReady(vision="fake", load_s=0.0, warmup_ms=0.0))
        self.turn()
        command = next(c for c in self.model.commands if isinstance(c, SetInstruction))
        self.apply(command, error)

    def apply(self, command: SetInstruction, error: str = "") -> None:
        text, adapter = command.text or "", command.adapter or ""
        self.model.emit(
            InstructionApplied(instruction_id=command.instruction_id, text=text, adapter=adapter, error=error)
        )
        self.turn()

    def answer(self, **changes) -> None:
        """The model answers a new frame."""
        self.push_frame()
        proposal = Proposal(
            frame_id=self.frame_id,
            t_capture_ns=self.clock(),
            capture_clock="driver",
            frame_seq=self.supervisor.slot.latest_seq,
            instruction_id=self.supervisor.instruction_id,
            text=MOVE,
            stop_reason="",
            stages_ms=StageTimes(queue=0, encode=0, prefill=0, decode=0, check=0),
        )
        self.model.emit(msgspec.structs.replace(proposal, **changes))
        self.turn()

    def make_ready(self) -> None:
        self.open_camera()
        self.load_model()
        self.answer()
        assert self.state == ("running", "")

    def close(self) -> None:
        for worker in (self.model, self.camera):
            if worker is not None:
                worker.kill()
        self.supervisor.slot.close()
        self.publisher.close()


@contextlib.contextmanager
def in_process(monkeypatch: pytest.MonkeyPatch, config: Config | None = None) -> Iterator[InProcess]:
    running = InProcess(monkeypatch, config)
    try:
        yield running
    finally:
        running.close()
