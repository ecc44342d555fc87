"""The governor's limit in the model process: fewer image tokens, a pause between two frames, no descriptions."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from edge_agent.ipc.events import Heartbeat, LimitLoad, SetInstruction, decode_model_event
from edge_agent.ipc.frame_slot import Slot
from edge_agent.ipc.image_grid import ImageRequest
from edge_agent.ipc.token_sizes import token_sizes
from edge_agent.ipc.worker import MAX_EVENT_BYTES
from edge_agent.model.frame_buffer import FrameBuffer
from edge_agent.model.frame_encoder import FrameEncoder
from edge_agent.model.loop import HEARTBEAT_NS, ModelLoop
from edge_agent.model.supervisor_channel import SupervisorChannel
from edge_agent.model.token_budget import TokenBudget
from edge_agent.wire.codec import encode
from tests.harness.clock import FakeClock

MS = 1_000_000  # nanoseconds
START_NS = 10**12


class FakeImages:
    """Encodes in 20 ms of the fake clock."""

    max_tokens = 256

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.begun_ms: list[int] = []  # when a frame was taken
        self.sizes: list[int] = []

    def request(self, max_tokens: int) -> ImageRequest:
        return ImageRequest(unit=28, longest_side=1540, max_tokens=max_tokens)

    def resize(self, picture: np.ndarray, max_tokens: int) -> np.ndarray:
        self.sizes.append(max_tokens)
        self.begun_ms.append((self.clock.now_ns - START_NS) // MS)
        return picture.copy()

    def n_tokens(self, _image: np.ndarray) -> int:
        return 2

    def encode(self, _image: np.ndarray) -> FrameBuffer:
        self.clock.advance_ms(20)
        buffer = FrameBuffer(8, 4)
        buffer.embeddings(2)[:] = 0
        return buffer


class Rig:
    def __init__(self, *, overlap: bool = False) -> None:
        self.slot, self.clock, self.n_frames = Slot.create(), FakeClock(START_NS), 0
        self.images = FakeImages(self.clock)
        self.frames = FrameEncoder(
            self.slot, self.images, 60_000, overlap=overlap, clock=self.clock, sleep=self.clock.advance
        )

    def publish(self) -> None:
        self.n_frames += 1
        self.slot.write(4, 4)[:] = 0
        self.slot.publish(self.n_frames, self.clock.now_ns, "driver")

    def close(self) -> None:
        self.frames.close()
        self.slot.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


# -- image tokens -----------------------------------------------------------------------------------------------------


def test_the_sizes_of_a_frame():
    assert token_sizes(256) == [256, 192, 128, 96, 64]
    assert [token_sizes(n) for n in (8, 64)] == [[8], [64]]


@pytest.mark.parametrize(
    ("limit", "sizes"), [(0, [256, 192, 128, 96, 64]), (128, [128, 96, 64]), (100, [96, 64]), (8, [64])]
)
def test_a_budget_stays_within_the_limit(limit, sizes):
    budget = TokenBudget(256, 256, limit=limit)
    assert budget.sizes == sizes and budget.select(1e6).tokens == sizes[0]


def test_the_deadline_still_counts_below_the_limit():
    budget = TokenBudget(256, 256, limit=128).record(128, 1280.0, 0.0)
    assert budget.select(1100).tokens == 96


def test_the_next_frame_has_fewer_tokens_and_the_one_after_the_limit_has_all(rig):
    for limit in (0, 96, 0):
        rig.frames.limit(limit, 0.0)
        rig.publish()
        assert rig.frames.next() is not None
    assert rig.images.sizes == [256, 96, 256]


# -- the rate ---------------------------------------------------------------------------------------------------------


def answer_for(rig: Rig, ms: int, step_ms: int = 10) -> list[int]:
    """A new frame each 10 ms, and a loop that always asks for the next one: when frames were begun."""
    before = len(rig.images.begun_ms)
    end_ns = rig.clock.now_ns + ms * MS
    while rig.clock.now_ns < end_ns:
        rig.publish()
        rig.frames.next()
        rig.clock.advance_ms(step_ms)
    return rig.images.begun_ms[before:]


def test_frames_begin_at_the_interval_and_without_a_limit_at_once(rig):
    free = answer_for(rig, 300)
    assert np.diff(free).tolist() == [30] * (len(free) - 1)  # 20 ms to encode, 10 until the next frame
    rig.frames.limit(64, 100.0)
    limited = answer_for(rig, 1000)
    assert set(np.diff(limited).tolist()) <= {100, 110}
    rig.frames.limit(0, 0.0)
    assert set(np.diff(answer_for(rig, 300)).tolist()) == {30}


def test_the_frame_after_the_pause_is_the_newest(rig):
    rig.frames.limit(64, 500.0)
    rig.publish()
    assert rig.frames.next().frame.frame_id == 1
    for _ in range(10):
        rig.publish()
        assert rig.frames.next() is None
        rig.clock.advance_ms(40)
    assert 0 < rig.frames.rest_ns() <= 500 * MS
    rig.clock.advance_ms(500)
    assert rig.frames.rest_ns() == 0
    assert rig.frames.next().frame.frame_id == 11


def test_a_new_limit_counts_from_the_last_frame(rig):
    rig.publish()
    rig.frames.next()  # it ends 20 ms after its beginning
    rig.frames.limit(64, 200.0)
    assert rig.frames.rest_ns() == 180 * MS
    rig.frames.limit(64, 50.0)
    assert rig.frames.rest_ns() == 30 * MS
    rig.frames.limit(0, 0.0)
    assert rig.frames.rest_ns() == 0


def test_with_overlap_the_thread_waits_and_the_loop_does_not():
    with contextlib.closing(Rig(overlap=True)) as rig:
        rig.frames.limit(64, 400.0)
        for _ in range(4):
            rig.publish()
            while rig.frames.next() is None:
                time.sleep(0.001)
            assert rig.frames.rest_ns() == 0
        begun = rig.images.begun_ms
        assert min(np.diff(begun)) >= 400


# -- the loop ---------------------------------------------------------------------------------------------------------


class LoopRig(Rig):
    """A loop whose engine counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        ours, self.supervisor = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.supervisor.setblocking(False)
        self.ours, self.texts, self.n_warm = ours, [], 0
        text = SimpleNamespace(describing=False, idle=True, request="", start=lambda lane, *_: self.texts.append(lane))
        self.engine = SimpleNamespace(
            text=text,
            cache=SimpleNamespace(frame_end_position=5, frame_id=1),
            keep_warm=self._keep_warm,
            instruction="",
            adapter="",
            instruct=lambda *_: None,
        )
        self.channel = SupervisorChannel(ours)
        self.loop = ModelLoop(self.engine, self.frames, self.slot, self.channel, "What is there?", self.clock)

    def _keep_warm(self) -> None:
        self.n_warm += 1

    def send(self, command: object) -> None:
        self.supervisor.send(encode(command))
        for received in self.channel.take_commands():
            self.loop._apply(received)

    def heartbeats(self) -> int:
        n = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                n += isinstance(decode_model_event(self.supervisor.recv(MAX_EVENT_BYTES)), Heartbeat)
        return n

    def close(self) -> None:
        super().close()
        self.ours.close()
        self.supervisor.close()


@pytest.fixture
def loop() -> Iterator[LoopRig]:
    made = LoopRig()
    made.send(SetInstruction(instruction_id=1, text="a"))
    made.heartbeats()
    yield made
    made.close()


def test_the_command_reaches_the_frames_and_stops_the_descriptions(loop):
    loop.loop._start_text()
    assert loop.texts == ["describe"]
    loop.send(LimitLoad(max_image_tokens=96, min_interval_ms=250.0, describe=False))
    assert (loop.frames.budget.limit, loop.frames._min_interval_ns) == (96, 250 * MS)
    loop.engine.cache.frame_id = 2
    loop.loop._start_text()
    assert loop.texts == ["describe"]
    loop.send(LimitLoad())
    loop.loop._start_text()
    assert loop.texts == ["describe", "describe"]


def test_a_limit_is_no_reason_to_abandon_an_answer(loop):
    loop.supervisor.send(encode(LimitLoad(max_image_tokens=96)))
    assert not loop.channel.has_urgent()


def test_the_loop_sleeps_during_the_pause_although_frames_wait(loop, monkeypatch):
    """Else it would turn without end: the slot is readable."""
    loop.send(LimitLoad(max_image_tokens=64, min_interval_ms=300.0))
    loop.publish()
    loop.frames.next()
    loop.publish()
    waited: list[float] = []
    real_poll = select.poll

    def poll():
        made = real_poll()
        return SimpleNamespace(
            register=made.register, poll=lambda timeout_ms: waited.append(timeout_ms) or made.poll(0)
        )

    monkeypatch.setattr("edge_agent.model.loop.select.poll", poll)
    loop.loop._wait()
    assert waited == [280] and loop.heartbeats() == 0 and loop.n_warm == 0
    loop.clock.advance_ms(280)
    loop.loop._wait()  # the frame is there
    assert waited == [280, 1000] and loop.heartbeats() == 0


def test_a_pause_that_is_longer_than_a_heartbeat_has_heartbeats(loop, monkeypatch):
    """A slow model at a low rate must not look like one that hangs."""
    loop.send(LimitLoad(max_image_tokens=64, min_interval_ms=10_000.0))
    loop.publish()
    loop.frames.next()
    nothing = SimpleNamespace(register=lambda *_: None, poll=lambda ms: loop.clock.advance_ms(ms) or [])
    monkeypatch.setattr("edge_agent.model.loop.select.poll", lambda: nothing)
    for _ in range(5):
        loop.loop._wait()
    assert loop.heartbeats() == 5 and loop.n_warm == 5
    assert HEARTBEAT_NS == 1000 * MS
