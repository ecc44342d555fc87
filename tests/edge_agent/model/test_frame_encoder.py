"""What looks at frames in the model process: the newest one, in time, beside the answer or before it."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from edge_agent.config import CameraConfig, Config, TaskConfig, VisionConfig
from edge_agent.ipc.frame_slot import Slot
from edge_agent.model.constrained import NonFiniteError
from edge_agent.model.frame_encoder import EncodedFrame, FrameEncoder

DEADLINE_MS = 2000
CONFIG = Config(
    bundle="", camera=CameraConfig(source=""), vision=VisionConfig(max_image_tokens=64),
    task=TaskConfig(deadline_ms=DEADLINE_MS),
)  # fmt: skip


class Engine:
    """Looks for as long as it is told, and notes who looked at what, and when."""

    def __init__(self, see_s: float = 0.0) -> None:
        self.config, self.see_s = CONFIG, see_s
        self.preprocessor = SimpleNamespace(image=lambda frame, max_tokens: frame.copy(), unit=28)
        self.fails: Exception | None = None
        self.looks: list[tuple[str, int, float]] = []  # thread, first pixel, when it began

    def see(self, image: np.ndarray) -> np.ndarray:
        self.looks.append((threading.current_thread().name, int(image[0, 0, 0]), time.monotonic()))
        time.sleep(self.see_s)
        if self.fails is not None:
            raise self.fails
        return np.full((2, 4), image[0, 0, 0], np.float32)

    def span(self, *_: object) -> None:
        pass


@pytest.fixture
def slot():
    made = Slot.create()
    yield made
    made.close()


@pytest.fixture
def made(slot):
    """made(engine, overlap) -> Eyes, closed afterwards."""
    all_eyes: list[FrameEncoder] = []

    def make(engine: Engine, overlap: bool) -> FrameEncoder:
        all_eyes.append(FrameEncoder(engine, slot, overlap))
        return all_eyes[-1]

    yield make
    for eyes in all_eyes:
        eyes.close()


def publish(slot: Slot, frame_id: int, age_ms: float = 0.0) -> None:
    slot.write(56, 28)[:] = frame_id
    slot.publish(frame_id, time.monotonic_ns() - round(age_ms * 1e6), "driver")


def wait_for(eyes: FrameEncoder, answer_ms: float = 0.0, seconds: float = 3.0) -> EncodedFrame:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        if (glance := eyes.next(answer_ms)) is not None:
            return glance
        time.sleep(0.002)
    raise AssertionError("no glance")


@pytest.mark.parametrize("overlap", [False, True])
def test_the_newest_frame_is_seen_once(slot, made, overlap):
    engine = Engine()
    eyes = made(engine, overlap)
    for frame_id in (1, 2, 3):
        publish(slot, frame_id)
    glance = wait_for(eyes)
    assert glance.frame.frame_id == 3 and (glance.rows == 3).all() and glance.stop_reason == "" and glance.n_tokens == 2
    assert glance.deadline_ns == glance.frame.t_capture_ns + DEADLINE_MS * 1_000_000
    time.sleep(0.05)
    assert eyes.next(0.0) is None
    publish(slot, 4)
    assert wait_for(eyes).frame.frame_id == 4
    assert [pixel for _, pixel, _ in engine.looks] == [3, 4]
    assert {name.startswith("eyes") for name, _, _ in engine.looks} == {overlap}


def test_with_overlap_the_next_frame_is_seen_while_one_is_answered_and_no_sooner_than_needed(slot, made):
    """Looking takes 50 ms, answering 300: it begins about 250 ms after the answer did."""
    engine = Engine(see_s=0.05)
    eyes = made(engine, overlap=True)
    publish(slot, 1)
    first = wait_for(eyes, answer_ms=300.0)
    answering_since = time.monotonic()
    publish(slot, 2)  # would be taken at once
    time.sleep(0.15)
    publish(slot, 3)  # is the newest when it is time to look
    time.sleep(0.15)
    second = wait_for(eyes, answer_ms=300.0)
    assert (first.frame.frame_id, second.frame.frame_id) == (1, 3)
    began_after = engine.looks[1][2] - answering_since
    assert 0.2 < began_after < 0.32
    assert time.monotonic() - answering_since < 0.45, "it was ready when the answer was"


def test_rows_that_waited_longer_than_a_new_look_takes_are_not_used(slot, made):
    engine = Engine(see_s=0.02)
    eyes = made(engine, overlap=True)
    publish(slot, 1)
    wait_for(eyes)
    publish(slot, 2)
    time.sleep(0.3)  # the answer took longer than it ever did
    publish(slot, 3)
    assert wait_for(eyes).frame.frame_id == 3
    publish(slot, 4)
    time.sleep(0.3)
    assert wait_for(eyes).frame.frame_id == 4  # but nothing newer came: these are the best there are


@pytest.mark.parametrize("overlap", [False, True])
def test_what_came_too_late_is_not_looked_at(slot, made, overlap):
    engine = Engine()
    publish(slot, 1, age_ms=DEADLINE_MS + 1)
    glance = wait_for(made(engine, overlap))
    assert (glance.stop_reason, glance.rows, engine.looks) == ("late", None, [])


@pytest.mark.parametrize("overlap", [False, True])
def test_rows_that_are_not_finite_are_none_and_errors_reach_who_asks(slot, made, overlap):
    engine = Engine()
    eyes = made(engine, overlap)
    engine.fails = NonFiniteError()
    publish(slot, 1)
    glance = wait_for(eyes)
    assert (glance.stop_reason, glance.rows) == ("not-finite", None)
    engine.fails = RuntimeError("the encoder is gone")
    publish(slot, 2)
    with pytest.raises(RuntimeError, match="the encoder is gone"):
        wait_for(eyes)


def test_the_camera_coming_round_means_no_glance(slot, made):
    engine = Engine()

    def slow(frame: np.ndarray, max_tokens: int) -> np.ndarray:
        image = frame.copy()
        for frame_id in (2, 3):
            publish(slot, frame_id)
        return image

    engine.preprocessor.image = slow
    publish(slot, 1)
    eyes = made(engine, overlap=False)
    assert eyes.next(0.0) is None and engine.looks == []
    engine.preprocessor.image = lambda frame, max_tokens: frame.copy()
    assert wait_for(eyes).frame.frame_id == 3


def test_the_encoder_thread_uses_the_budget_of_its_job_and_writes_none(slot):
    """The main thread records times while a job is under way: neither changes the other's numbers."""
    engine, sleeping, go_on, sizes = Engine(), threading.Event(), threading.Event(), []

    def sleep(seconds: float) -> None:
        if seconds > 0:  # the second job, which begins when the first frame is nearly answered
            sleeping.set()
            assert go_on.wait(30)

    engine.preprocessor.image = lambda frame, max_tokens: sizes.append(max_tokens) or frame.copy()
    eyes = FrameEncoder(engine, slot, overlap=True, sleep=sleep)
    try:
        eyes.budget = eyes.budget.of(256)
        publish(slot, 1)
        wait_for(eyes, answer_ms=60_000.0)
        assert sleeping.wait(30)
        eyes.budget = recorded = eyes.budget.record(256, 1e6, 1e6)  # from now on everything is late
        publish(slot, 2)
        go_on.set()
        assert eyes._future.result().max_tokens == 256
        assert eyes.budget == recorded and sizes == [256, 256], "the job selected from the main thread's budget"
        assert wait_for(eyes).frame.frame_id == 2
        publish(slot, 3)
        assert wait_for(eyes).max_tokens == 64 and eyes.budget.tokens == 64
    finally:
        go_on.set()
        eyes.close()


def test_closing_waits_for_a_look_and_then_is_over(slot):
    eyes = FrameEncoder(Engine(see_s=0.2), slot, overlap=True)
    publish(slot, 1)
    eyes.next(0.0)
    eyes.close()
    assert not any(thread.name.startswith("eyes") for thread in threading.enumerate())
