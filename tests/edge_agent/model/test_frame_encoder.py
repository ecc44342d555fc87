"""The newest frame is encoded once, in time, before the answer or beside the previous one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np
import pytest

from edge_agent.ipc.frame_slot import Slot
from edge_agent.ipc.image_grid import ImageRequest
from edge_agent.model.constrained import NonFiniteError
from edge_agent.model.frame_buffer import FrameBuffer
from edge_agent.model.frame_encoder import EncodedFrame, FrameEncoder
from edge_agent.wire.codec import encode

DEADLINE_MS = 2000
MS = 1_000_000  # nanoseconds
HANG_S = 60.0  # bounds a hang; nothing is measured


class FakeClock:
    """Nanoseconds that pass only when a test, an encoder or a sleep says so."""

    def __init__(self) -> None:
        self.now_ns = 10**12
        self.sleeps_s: list[float] = []
        self.in_sleep: Callable[[], None] = lambda: None  # called by the sleeping thread before the time passes

    def __call__(self) -> int:
        return self.now_ns

    def pass_ms(self, ms: float) -> None:
        self.now_ns += round(ms * MS)

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.sleeps_s.append(seconds)
            self.in_sleep()
            self.now_ns += round(seconds * 1e9)


class FakeImages:
    """Encodes for encode_ms of the fake clock; notes which thread encoded which frame, and when."""

    max_tokens = 256

    def __init__(self, clock: FakeClock, encode_ms: float = 0.0) -> None:
        self.clock, self.encode_ms = clock, encode_ms
        self.fails: Exception | None = None
        self.before_resize: Callable[[], None] = lambda: None
        self.sizes: list[int] = []
        self.encoded: list[tuple[str, int, int]] = []  # thread, first pixel, time

    def request(self, max_tokens: int) -> ImageRequest:
        return ImageRequest(unit=28, longest_side=1540, max_tokens=max_tokens)

    def resize(self, picture: np.ndarray, max_tokens: int) -> np.ndarray:
        self.before_resize()
        self.sizes.append(max_tokens)
        return picture.copy()

    def n_tokens(self, image: np.ndarray) -> int:
        return image.shape[0] * image.shape[1] // 28**2

    def encode(self, image: np.ndarray) -> FrameBuffer:
        self.encoded.append((threading.current_thread().name, int(image[0, 0, 0]), self.clock.now_ns))
        self.clock.pass_ms(self.encode_ms)
        if self.fails is not None:
            raise self.fails
        buffer = FrameBuffer(8, 4)
        buffer.embeddings(2)[:] = image[0, 0, 0]
        return buffer


class Rig:
    def __init__(
        self, slot: Slot, *, overlap: bool, encode_ms: float = 0.0, earlier_requests: Sequence[bytes] = ()
    ) -> None:
        self.slot, self.clock = slot, FakeClock()
        for payload in earlier_requests:
            slot.request_images(payload)
        self.images = FakeImages(self.clock, encode_ms)
        self.frames = FrameEncoder(
            slot, self.images, DEADLINE_MS, overlap=overlap, clock=self.clock, sleep=self.clock.sleep
        )

    def publish(self, frame_id: int, image_request: int = 0, age_ms: float = 0.0) -> None:
        self.slot.write(56, 28, image_request)[:] = frame_id
        self.slot.publish(frame_id, self.clock.now_ns - round(age_ms * MS), "driver")

    def next(self) -> EncodedFrame:
        """The next frame, once the thread has it."""
        until_s = time.monotonic() + HANG_S
        while time.monotonic() < until_s:
            if (encoded := self.frames.next()) is not None:
                return encoded
            time.sleep(0.001)
        raise AssertionError("no frame")

    def next_or_none(self) -> EncodedFrame | None:
        """The result of one job, or of one call without overlap."""
        encoded = self.frames.next()
        if encoded is None and self.frames._job is not None:
            self.wait_for_job()
            encoded = self.frames.next()
        return encoded

    def wait_for_job(self) -> EncodedFrame | None:
        return self.frames._job.result(HANG_S)


@pytest.fixture
def make() -> Iterator[Callable[..., Rig]]:
    """make(overlap=…) -> Rig, closed afterwards."""
    rigs: list[Rig] = []

    def make(**options: object) -> Rig:
        rigs.append(Rig(Slot.create(), **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.frames.close()
        rig.slot.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_the_newest_frame_is_encoded_once(make, overlap):
    rig = make(overlap=overlap)
    for frame_id in (1, 2, 3):
        rig.publish(frame_id)
    encoded = rig.next()
    assert encoded.frame.frame_id == 3 and (encoded.embeddings.image_rows == 3).all()
    assert (encoded.stop_reason, encoded.n_tokens, encoded.max_tokens) == ("", 2, 256)
    assert encoded.deadline_ns == encoded.frame.t_capture_ns + DEADLINE_MS * MS
    rig.publish(4)
    assert rig.next().frame.frame_id == 4, "the third frame was not encoded again before it"
    assert [pixel for _, pixel, _ in rig.images.encoded] == [3, 4]
    assert {name.startswith("frame-encoder") for name, _, _ in rig.images.encoded} == {overlap}


def test_the_times_of_a_frame_are_those_of_its_stages(make):
    rig = make(overlap=False, encode_ms=30.0)
    rig.images.before_resize = lambda: rig.clock.pass_ms(4.0)
    rig.publish(1, age_ms=7.0)
    encoded = rig.next()
    assert encoded.taken_ns - encoded.frame.t_capture_ns == 7 * MS
    assert (encoded.resized_ns - encoded.taken_ns, encoded.done_ns - encoded.resized_ns) == (4 * MS, 30 * MS)
    assert encoded.encode_ms == 34.0


def test_with_overlap_the_next_frame_is_encoded_so_that_it_is_ready_when_the_answer_is(make):
    """Encoding takes 50 ms and answering 300: it starts 250 ms after the answer did, with the newest frame of then."""
    rig = make(overlap=True, encode_ms=50.0)
    rig.frames.expected_answer_ms = 300.0
    rig.publish(1)
    rig.clock.in_sleep = lambda: (rig.publish(2), rig.publish(3))  # while the first frame is answered
    first = rig.next()
    answering_ns = first.done_ns
    second = rig.wait_for_job()
    assert (first.frame.frame_id, second.frame.frame_id) == (1, 3)
    assert rig.clock.sleeps_s == [pytest.approx(0.25)]
    assert rig.images.encoded[1][2] - answering_ns == 250 * MS
    assert second.done_ns - answering_ns == 300 * MS


def test_embeddings_that_waited_longer_than_encoding_takes_give_way_to_a_newer_frame(make):
    rig = make(overlap=True, encode_ms=20.0)
    rig.publish(1)
    rig.next()
    rig.publish(2)
    rig.wait_for_job()
    rig.clock.pass_ms(300)  # the answer took longer than expected
    rig.publish(3)
    assert rig.next().frame.frame_id == 3
    rig.publish(4)
    rig.wait_for_job()
    rig.clock.pass_ms(300)
    assert rig.next().frame.frame_id == 4, "there is no newer frame: these embeddings are the freshest"


@pytest.mark.parametrize("overlap", [False, True])
def test_a_frame_after_its_deadline_is_not_encoded(make, overlap):
    rig = make(overlap=overlap)
    rig.publish(1, age_ms=DEADLINE_MS + 1)
    encoded = rig.next()
    assert (encoded.stop_reason, encoded.embeddings, rig.images.encoded) == ("late", None, [])


@pytest.mark.parametrize("overlap", [False, True])
def test_embeddings_that_are_not_finite_are_dropped_and_other_errors_are_raised(make, overlap):
    rig = make(overlap=overlap)
    rig.images.fails = NonFiniteError("NaN")
    rig.publish(1)
    encoded = rig.next()
    assert (encoded.stop_reason, encoded.embeddings) == ("not-finite", None)
    rig.images.fails = RuntimeError("the encoder is gone")
    rig.publish(2)
    with pytest.raises(RuntimeError, match="the encoder is gone"):
        rig.next()


def test_a_frame_that_the_camera_overwrote_is_dropped(make):
    rig = make(overlap=False)
    rig.images.before_resize = lambda: (rig.publish(2), rig.publish(3))
    rig.publish(1)
    assert rig.frames.next() is None and rig.images.encoded == []
    rig.images.before_resize = lambda: None
    assert rig.next().frame.frame_id == 3


# -- image tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_frames_get_fewer_tokens_when_answers_would_be_late_and_all_of_them_again_later(make, overlap):
    """A whole frame takes 2560 + 40 ms here, 10 ms a token; of the 2000 ms until its deadline, 90 % may be used."""
    rig = make(overlap=overlap)

    def answer(per_token_ms: float, decode_ms: float) -> int:
        """Answer a frame that takes this time -> the image tokens that were selected for it."""
        rig.publish(rig.slot.latest_seq + 1)
        encoded = rig.next()
        n_tokens = encoded.max_tokens
        rig.frames.record(encoded._replace(n_tokens=n_tokens), per_token_ms * n_tokens, decode_ms)
        rig.frames.expected_answer_ms = 0.0  # or the next job would sleep, and age a frame that is there already
        return n_tokens

    assert answer(10.0, 40.0) == 256, "nothing is measured yet"
    assert [answer(10.0, 40.0) for _ in range(3)][-1] == 128 == rig.frames.budget.tokens
    for _ in range(30):
        answer(0.1, 4.0)
    assert answer(0.1, 4.0) == 256


def test_the_encoder_thread_uses_the_budget_of_its_job_and_writes_none(make):
    """The main thread records times while a job is under way: neither changes the other's numbers."""
    rig = make(overlap=True)
    rig.frames.expected_answer_ms = 300.0
    sleeping, resume = threading.Event(), threading.Event()

    def in_sleep() -> None:  # the second job, before it takes its frame
        sleeping.set()
        assert resume.wait(HANG_S)

    rig.clock.in_sleep = in_sleep
    rig.publish(1)
    encoded = rig.next()
    try:
        assert sleeping.wait(HANG_S)
        rig.frames.record(encoded._replace(n_tokens=256), 1e6, 1e6)  # from now on everything is late
        recorded = rig.frames.budget
        rig.publish(2)
    finally:
        resume.set()
    assert rig.wait_for_job().max_tokens == 256 and rig.images.sizes == [256, 256]
    assert rig.frames.budget == recorded, "the job selected from the main thread's budget"
    rig.clock.in_sleep = lambda: None
    assert rig.next().frame.frame_id == 2
    rig.publish(3)
    assert rig.next().max_tokens == 64 and rig.frames.budget.tokens == 64


# -- images of the size that was asked for ---------------------------------------------------------------------------


def request_of(slot: Slot) -> ImageRequest:
    return msgspec.msgpack.decode(slot.read_image_request()[1], type=ImageRequest)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_size_of_the_images_is_asked_for_before_the_first_frame(make, overlap):
    rig = make(overlap=overlap)
    assert request_of(rig.slot) == ImageRequest(unit=28, longest_side=1540, max_tokens=256)
    rig.publish(1)  # as captured: the camera process did not know the request yet
    assert rig.next().frame.image_request == 0
    rig.publish(2, image_request=1)
    assert rig.next().frame.frame_id == 2


@pytest.mark.parametrize("overlap", [False, True])
def test_a_frame_that_was_resized_for_a_process_that_has_ended_is_not_used(make, overlap):
    """The other model may take other images. Its last request had this number, or one before."""
    rig = make(overlap=overlap, earlier_requests=[b"of another model", b"of the same one"])
    for frame_id, image_request in ((1, 1), (2, 2)):
        rig.publish(frame_id, image_request)
        assert rig.next_or_none() is None and rig.images.encoded == []
    rig.publish(3, image_request=3)
    assert rig.next().frame.frame_id == 3
    rig.publish(4)
    assert rig.next().frame.frame_id == 4


def test_a_frame_that_is_not_used_does_not_stop_a_file_that_waits_for_the_model(make):
    rig = make(overlap=False, earlier_requests=[b"of another model"])
    rig.publish(1, image_request=1)
    assert rig.frames.next() is None and not rig.slot.reader_is_idle()
    assert rig.frames.next() is None and rig.slot.reader_is_idle()


def test_a_process_that_asks_for_the_same_images_uses_the_frames_of_the_one_before_it(make):
    same = encode(ImageRequest(unit=28, longest_side=1540, max_tokens=256))
    rig = make(overlap=False, earlier_requests=[b"of another model", same])
    rig.publish(1, image_request=2)
    assert rig.next().frame.frame_id == 1
    rig.publish(2, image_request=1)
    assert rig.next_or_none() is None


def test_another_number_of_image_tokens_is_asked_for_and_earlier_frames_of_this_process_are_used(make):
    rig = make(overlap=False)
    rig.publish(1, image_request=1)
    encoded = rig.next()
    rig.frames.record(encoded._replace(n_tokens=256), 1e6, 1e6)  # everything is late from now on
    rig.publish(2, image_request=1)  # the camera process cannot know yet
    assert rig.next().max_tokens == 64 and rig.images.sizes == [256, 64]
    assert request_of(rig.slot).max_tokens == 64 and rig.slot.read_image_request()[0] == 2
    rig.publish(3, image_request=2)
    assert rig.next().max_tokens == 64 and rig.slot.read_image_request()[0] == 2, "asked for once"


def test_the_expected_answer_time_follows_the_measured_one(make):
    rig = make(overlap=False)
    rig.publish(1)
    encoded = rig.next()
    rig.frames.record(encoded, 100.0, 50.0)
    assert rig.frames.expected_answer_ms == 150.0, "the first measurement counts whole"
    rig.frames.record(encoded, 200.0, 50.0)
    assert rig.frames.expected_answer_ms == pytest.approx(150.0 + 0.3 * 100.0)


def test_closing_waits_for_a_job_and_ends_the_thread():
    slot = Slot.create()
    rig = Rig(slot, overlap=True)
    before = threading.active_count()
    rig.publish(1)
    rig.next()
    rig.frames.close()
    assert not any(thread.name.startswith("frame-encoder") for thread in threading.enumerate())
    assert threading.active_count() <= before
    slot.close()
