"""Newest frame -> image embeddings, in the model process: takes it from the slot and encodes it. It answers nothing.

It tells the camera process the size of the images that it wants, so that a frame is resized before it is published. A
frame from before the request, or of another number of image tokens, is resized here. A frame that was resized for a
model process that has ended is not used.

With `overlap`, a thread of its own encodes while the main thread answers the previous frame. It starts as late as
possible, so that the embeddings are ready exactly when the previous answer is done and are as fresh as they can be.
Native code does not hold the interpreter's lock, so both really run; on shared cores that gains nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import msgspec
import numpy as np

from edge_agent.ipc.events import StopReason
from edge_agent.ipc.frame_slot import Frame, Slot
from edge_agent.model.constrained import NonFiniteError
from edge_agent.model.frame_buffer import FrameBuffer
from edge_agent.model.image_encoder import ImageEncoder, NoImages
from edge_agent.model.token_budget import EMA_WEIGHT, TokenBudget
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.codec import encode

IDLE_S = 1.0  # a job without a frame ends after this time


class EncodedFrame(NamedTuple):
    """The result of one job. The frame's image belongs to the camera again. Times: CLOCK_MONOTONIC."""

    frame: Frame
    deadline_ns: int
    embeddings: FrameBuffer | None  # None: stop_reason says why
    stop_reason: StopReason
    n_tokens: int  # image tokens
    max_tokens: int  # as the budget selected
    taken_ns: int
    resized_ns: int
    done_ns: int

    @property
    def encode_ms(self) -> float:
        """Resize, which is a copy where the camera process has done it, and encode."""
        return (self.done_ns - self.taken_ns) / NS_PER_MS


class FrameEncoder:
    """Owns the thread, if there is one; close() ends it.

    The thread reads the slot and uses the encoder and one of its two buffers. Everything else, the token budget too,
    belongs to the main thread: a job gets the budget as an argument, and its result holds what it selected.
    """

    def __init__(
        self,
        slot: Slot,
        images: ImageEncoder | NoImages,
        deadline_ms: float,
        *,
        overlap: bool,
        clock: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """deadline_ms: from capture to answer. clock: CLOCK_MONOTONIC, nanoseconds; sleep: seconds."""
        self._slot, self._images, self._deadline_ms = slot, images, deadline_ms
        self._clock, self._sleep = clock, sleep
        self.budget = TokenBudget.of(images.max_tokens)
        self.expected_answer_ms = 0.0  # running estimate of prefill and decode
        self._taken_seq = 0  # of the last frame that was taken
        self._min_interval_ns = self._not_before_ns = 0  # the governor's pause: from one frame's beginning to the next
        self._first_request = self._request_images(self.budget.tokens)
        self._pool = ThreadPoolExecutor(1, "frame-encoder") if overlap else None
        self._job: Future[EncodedFrame | None] | None = None
        self._done_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        os.close(self._done_fd)

    def limit(self, max_image_tokens: int, min_interval_ms: float) -> None:
        """The governor's limits, from the next frame on; 0: none."""
        self.budget = msgspec.structs.replace(self.budget, limit=max_image_tokens)
        self._not_before_ns += round(min_interval_ms * NS_PER_MS) - self._min_interval_ns
        self._min_interval_ns = round(min_interval_ms * NS_PER_MS)

    def rest_ns(self) -> int:
        """How long next() gives no frame because of the limit; 0 with `overlap`, whose thread waits by itself."""
        return 0 if self._pool is not None else max(0, self._not_before_ns - self._clock())

    def fileno(self) -> int:
        """For select.poll: readable when next() may have a frame."""
        return self._done_fd if self._job is not None else self._slot.fileno()

    def next(self) -> EncodedFrame | None:
        """The newest frame that was not returned before, or None."""
        if self._pool is None:
            return None if self.rest_ns() else self._note_selection(self._encode_newest(self.budget))
        if self._job is None:
            self._job = self._submit(self._pool, self._not_before_ns)
        if not self._job.done():
            return None
        encoded, self._job = self._note_selection(self._job.result()), None
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._done_fd)
        if encoded is None:
            return None
        waited_ms = (self._clock() - encoded.done_ns) / NS_PER_MS
        if waited_ms > encoded.encode_ms and self._slot.latest_seq > encoded.frame.seq:
            # Encoding a newer frame takes less time than this one has already waited.
            self._job = self._submit(self._pool, self._not_before_ns)
            return None
        delay_ms = max(0.0, self.expected_answer_ms - encoded.encode_ms)
        not_before_ns = max(self._clock() + round(delay_ms * NS_PER_MS), self._not_before_ns)
        self._job = self._submit(self._pool, not_before_ns)
        return encoded

    def record(self, encoded: EncodedFrame, prefill_ms: float, decode_ms: float) -> None:
        """The times of an answered frame, for the budget and for the start of the next job."""
        self.budget = self.budget.record(encoded.n_tokens, encoded.encode_ms + prefill_ms, decode_ms)
        answer_ms = prefill_ms + decode_ms
        weight = EMA_WEIGHT if self.expected_answer_ms else 1.0
        self.expected_answer_ms += weight * (answer_ms - self.expected_answer_ms)

    def record_late(self, encoded: EncodedFrame) -> None:
        """The time of a frame whose encoding alone passed the deadline: the next frames get fewer image tokens."""
        self.budget = self.budget.record(encoded.n_tokens, encoded.encode_ms, self.budget.rest_ms)

    def _note_selection(self, encoded: EncodedFrame | None) -> EncodedFrame | None:
        if encoded is not None:
            self.budget = msgspec.structs.replace(self.budget, tokens=encoded.max_tokens)
            self._not_before_ns = encoded.taken_ns + self._min_interval_ns
        return encoded

    def _submit(self, pool: ThreadPoolExecutor, not_before_ns: int) -> Future[EncodedFrame | None]:
        job = pool.submit(self._encode_later, not_before_ns, self.budget)
        job.add_done_callback(lambda _: os.eventfd_write(self._done_fd, 1))
        return job

    # -- in the thread, if there is one

    def _encode_later(self, not_before_ns: int, budget: TokenBudget) -> EncodedFrame | None:
        self._sleep(max(0, not_before_ns - self._clock()) / NS_PER_S)
        if (encoded := self._encode_newest(budget)) is not None:
            return encoded
        poll = select.poll()
        poll.register(self._slot, select.POLLIN)
        return self._encode_newest(budget) if poll.poll(round(IDLE_S * 1000)) else None

    def _encode_newest(self, budget: TokenBudget) -> EncodedFrame | None:
        frame, taken_ns = self._slot.take_newest(self._taken_seq), self._clock()
        if frame is None:
            return None
        if 0 < frame.image_request < self._first_request:  # for a process that has ended
            self._taken_seq = frame.seq
            return None
        deadline_ns = frame.t_capture_ns + round(self._deadline_ms * NS_PER_MS)
        max_tokens = budget.select((deadline_ns - taken_ns) / NS_PER_MS).tokens
        if max_tokens != self._requested_tokens:
            self._request_images(max_tokens)
        image = self._images.resize(frame.image, max_tokens)
        resized_ns = self._clock()
        if not self._slot.was_not_overwritten(frame):
            return None  # the camera process overwrote this buffer while we read it: there is a newer frame
        self._taken_seq = frame.seq
        embeddings, stop_reason = self._encode(image) if resized_ns <= deadline_ns else (None, "late")
        return EncodedFrame(
            frame, deadline_ns, embeddings, stop_reason, self._images.n_tokens(image), max_tokens,
            taken_ns, resized_ns, self._clock(),
        )  # fmt: skip

    def _request_images(self, max_tokens: int) -> int:
        """Ask the camera process for images of at most max_tokens image tokens. Returns the number of the request."""
        self._requested_tokens = max_tokens
        return self._slot.request_images(encode(self._images.request(max_tokens)))

    def _encode(self, image: np.ndarray) -> tuple[FrameBuffer | None, StopReason]:
        try:
            return self._images.encode(image), ""
        except NonFiniteError:
            return None, "not-finite"
