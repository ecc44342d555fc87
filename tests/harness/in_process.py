"""A supervisor inside the test's own process. Workers, publisher and clock are small fakes that the test drives.

    with InProcess() as running:
        running.make_ready()
        running.publisher.request("ask", "what?")
        running.turn(seconds=61.0)               # the clock moves, then one turn of the loop

Nothing here waits, and no time passes unless a test says so.
"""

from __future__ import annotations

import itertools
import signal
import socket
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.actions.space import load_action_space
from edge_agent.bundle.manifest import Bundle, EmbeddingInfo, Manifest, ModelInfo, VisionInfo
from edge_agent.config import CameraConfig, Config
from edge_agent.ipc.events import (
    CameraOpened,
    InstructionApplied,
    ModelReady,
    Proposal,
    SetInstruction,
    decode_model_command,
)
from edge_agent.supervisor.process import Supervisor
from edge_agent.supervisor.publisher import Sender
from edge_agent.supervisor.status import Counters
from edge_agent.supervisor.trace import Trace
from edge_agent.wire.codec import encode
from edge_agent.wire.control import Reply, Request, decode_reply
from edge_agent.wire.messages import Header, StageTimes
from edge_agent.wire.streams import pack
from tests.harness.clock import FakeClock

MOVE = '{"action":"move","vx":1,"vy":0,"vz":0,"yaw":0}'


FAKE_BUNDLE = Bundle(
    folder=Path("/nowhere"),
    id="0" * 16,
    manifest=Manifest(
        format=1,
        created_by="a test",
        files={},
        model=ModelInfo(
            family="fake",
            size="0B",
            variant="",
            parameters=1,
            layers=1,
            hidden=1,
            vocab=1,
            context=1,
            kv_bytes_per_token=1,
            special={},
            embedding=EmbeddingInfo(offset=0, ggml_type="F32", row_bytes=4),
        ),
        vision=VisionInfo(patch=14, merge=2, image_size=1540, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        recipe="",
        bytes_by_type={},
        source_dtype="",
        source_sha256={},
        licence="",
    ),
)


class FakeWorker:
    """In place of ipc.worker.Worker. The test emits its events and reads the commands that it got."""

    pids = itertools.count(100_000)

    def __init__(self, module: str = "", slot: object = None, first: bytes = b"", flags: tuple[str, ...] = ()) -> None:
        self.module, self.first, self.flags = module, first, flags
        self.socket, self._other_end = socket.socketpair()
        self.pid = next(self.pids)
        self.exit_status: int | None = None
        self.hung_up = False
        self.takes_messages = True  # False: its socket is full
        self.in_kernel = False  # True: SIGKILL does not end it: it hangs in a driver call
        self.killed = False
        self.commands: list[Any] = []
        self._events: list[bytes] = []
        self.stderr = b""

    def read_stderr(self) -> bytes:
        written, self.stderr = self.stderr, b""
        return written

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
        self._other_end.close()
        if self.exit_status is None and not self.in_kernel:
            self.exit_status = -signal.SIGKILL


class FakePublisher:
    """In place of supervisor.publisher.Publisher. Keeps what would have left, packed as it would be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gone: set[bytes] = set()  # senders whose connection has ended
        self._pairs = socket.socketpair(), socket.socketpair()
        self._pairs[0][1].send(b"x")  # always readable: the loop never waits
        self.lost = ""  # why an endpoint is lost
        self.published: list[tuple[str, Header]] = []
        self.replies: list[Reply] = []
        self.reply_senders: list[bytes] = []
        self.new_subscriber = False
        self._requests: list[tuple[Sender, bytes]] = []
        self._request_numbers = itertools.count(1)

    def request(self, op: str, text: str = "", request_id: str = "", sender: bytes = b"controller", **more: Any) -> str:
        """A controller sends a request. Its id. sender: stands for its connection."""
        request_id = request_id or f"request-{next(self._request_numbers)}"
        self.request_bytes(encode(Request(v=1, id=request_id, op=op, text=text, **more)), sender)
        return request_id

    def request_bytes(self, payload: bytes, sender: bytes = b"controller") -> None:
        self._requests.append((Sender(sender), payload))

    def filenos(self) -> list[int]:
        return [pair[0].fileno() for pair in self._pairs]

    def serve(self) -> None:
        pass

    def lost_endpoint(self) -> str:
        return self.lost

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    def requests(self) -> list[tuple[Sender, bytes]]:
        requests, self._requests = self._requests, []
        return requests

    def is_connected(self, sender: Sender) -> bool:
        return sender.connection not in self.gone

    def reply(self, sender: Sender, payload: bytes) -> None:
        self.reply_senders.append(sender.connection)
        self.replies.append(decode_reply(payload))

    def send(self, stream: str, message_type: type, *, t_pub_ns: int = 0, **fields: Any) -> Header:
        message = message_type(v=1, session=1, seq=len(self.stream(stream)), t_pub_ns=t_pub_ns, bundle_id="", **fields)
        pack(stream, message)  # raises what the real one raises
        self.published.append((stream, message))
        return message

    def stream(self, name: str) -> list[Any]:
        return [message for stream, message in self.published if stream == name]

    def has_new_subscriber(self) -> bool:
        new, self.new_subscriber = self.new_subscriber, False
        return new

    def close(self) -> None:
        for pair in self._pairs:
            for end in pair:
                end.close()


class FakeVerification:
    """In place of supervisor.verification.Verification. It is done when the test says so."""

    def __init__(self, bundle: Bundle | None = FAKE_BUNDLE) -> None:
        self.bundle, self.error = bundle, None
        self.progress = "verifying the bundle, 40%"

    def start(self) -> None:
        pass

    def result(self) -> Bundle | None:
        if self.error is not None:
            raise self.error
        return self.bundle


def fake_config(**changes: Any) -> Config:
    return Config(**({"bundle": "none", "camera": CameraConfig(source="zmq:ipc:///none")} | changes))


class InProcess:
    """A supervisor with fakes around it, one turn of its loop at a time."""

    def __init__(
        self,
        config: Config | None = None,
        folder: Path | None = None,
        verification: FakeVerification | None = None,
    ) -> None:
        """folder: of the sockets; what a daemon leaves for the next one is there. None: one of its own."""
        self.config = config or fake_config()
        self._own_folder = tempfile.TemporaryDirectory()
        self.clock, self.publisher = FakeClock(), FakePublisher(folder or Path(self._own_folder.name))
        self.frame_id, self.verification = 0, verification or FakeVerification()
        space = load_action_space(self.config.task.action_space)
        self.supervisor = Supervisor(
            self.config, self.verification, space, self.publisher, Trace(""), clock=self.clock, start_worker=FakeWorker
        )
        self.supervisor.start()
        self.turn()

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        self.supervisor.close()
        self.publisher.close()
        self._own_folder.cleanup()

    @property
    def model(self) -> FakeWorker:
        return self.supervisor.model.worker

    @property
    def camera(self) -> FakeWorker:
        return self.supervisor.camera.worker

    @property
    def counters(self) -> Counters:
        return self.supervisor.counters

    @property
    def state(self) -> tuple[str, str]:
        """The daemon's state and the text of its reason."""
        state, reason = self.supervisor.status.state()
        return state, reason.text if reason is not None else ""

    def turn(self, seconds: float = 0.0) -> None:
        self.clock.advance(seconds)
        self.supervisor.poll_once()

    # -- what the two child processes do ------------------------------------------------------------------------------

    def open_camera(self) -> None:
        self.camera.emit(CameraOpened(width=6, height=4, fps=30.0, description="fake"))
        self.push_frame()

    def push_frame(self) -> None:
        slot = self.supervisor.slot
        self.frame_id += 1
        slot.write(4, 6)[:] = 0
        slot.publish(self.frame_id, self.clock(), "driver")

    def load_model(self, error: str = "") -> None:
        """The model process reports that it is loaded, and answers the instruction that it then gets."""
        self.model.emit(ModelReady(vision="fake", load_s=0.0, warmup_ms=0.0, language="fake too"))
        self.turn()
        if self.model is not None:
            self.apply_instruction(error)

    def apply_instruction(self, error: str = "") -> None:
        """The model process answers the newest SetInstruction that it got."""
        command = [command for command in self.model.commands if isinstance(command, SetInstruction)][-1]
        in_force = self.supervisor.control_state.instruction
        text = in_force.text if command.text is None else command.text
        adapter = in_force.adapter if command.adapter is None else command.adapter
        number = command.instruction_id
        self.model.emit(InstructionApplied(instruction_id=number, text=text, adapter=adapter, error=error))
        self.turn()

    def answer(self, **changes: Any) -> None:
        """The model process answers a new frame."""
        self.push_frame()
        proposal = proposal_of(
            frame_id=self.frame_id,
            t_capture_ns=self.clock(),
            frame_seq=self.supervisor.slot.latest_seq,
            instruction_id=self.supervisor.control_state.instruction.number,
        )
        self.model.emit(msgspec.structs.replace(proposal, **changes))
        self.turn()

    def make_ready(self) -> None:
        self.open_camera()
        self.load_model()
        self.answer()
        assert self.state == ("running", "")

    def end_model_process(self, exit_status: int = -signal.SIGABRT) -> None:
        """The model process ends. Its successor is not started yet."""
        self.model.exit_status = exit_status
        self.turn()

    def restart_model(self) -> None:
        """The model process ends, and its successor is started."""
        self.end_model_process()
        self.turn(6.0)  # longer than the longest pause
        self.push_frame()
        assert self.model is not None


def request(running: InProcess, op: str, text: str = "", **more) -> Reply | None:
    """Send a request; its reply, if it came in the same turn."""
    n_replies = len(running.publisher.replies)
    running.publisher.request(op, text, **more)
    running.turn()
    replies = running.publisher.replies[n_replies:]
    assert len(replies) <= 1
    return replies[0] if replies else None


def commands(running: InProcess, command_type: type) -> list:
    return [command for command in running.model.commands if isinstance(command, command_type)]


def proposal_of(**changes: Any) -> Proposal:
    """A proposal of frame 1, captured at time 0, whose answer is MOVE."""
    proposal = Proposal(
        frame_id=1,
        t_capture_ns=0,
        capture_clock="driver",
        frame_seq=1,
        instruction_id=0,
        text=MOVE,
        stop_reason="",
        stages_ms=StageTimes(queue=0, encode=0, prefill=0, decode=0, check=0),
    )
    return msgspec.structs.replace(proposal, **changes)
