"""Newest frame -> rows, in the model process: takes it from the slot, resizes, encodes. It answers nothing.

With `overlap`, this happens in a thread of its own while the frame before is answered, begun so late that the rows are
ready when they are wanted: they would only grow old. Native code does not hold the interpreter's lock, so both really
run; where they share the same cores, nothing is won by it.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from edge_agent.ipc.events import StopReason
from edge_agent.ipc.frame_slot import Frame, Slot
from edge_agent.model.constrained import NonFiniteError
from edge_agent.model.engine import NS_PER_MS, Engine
from edge_agent.model.token_budget import TokenBudget

IDLE_S = 1.0  # without a frame, a look ends


class EncodedFrame(NamedTuple):
    """A frame that was looked at. Its image belongs to the camera again."""

    frame: Frame
    deadline_ns: int
    rows: np.ndarray | None  # (n, hidden) float32; None: `cut` says why
    stop_reason: StopReason
    n_tokens: int
    taken_ns: int
    done_ns: int

    @property
    def encode_ms(self) -> float:
        """Resizing belongs to it."""
        return (self.done_ns - self.taken_ns) / NS_PER_MS


class FrameEncoder:
    """Owns the thread, if there is one; close() ends it."""

    def __init__(self, engine: Engine, slot: Slot, overlap: bool) -> None:
        self.engine, self.slot = engine, slot
        self.budget = TokenBudget(engine.config.vision.max_image_tokens)
        self.seen_seq = 0
        self._pool = ThreadPoolExecutor(1, "eyes") if overlap else None
        self._future: Future[EncodedFrame | None] | None = None
        self._done_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        os.close(self._done_fd)

    def fileno(self) -> int:
        """For select.poll: readable when next() may have something."""
        return self._done_fd if self._future is not None else self.slot.fileno()

    def next(self, answer_ms: float) -> EncodedFrame | None:
        """The newest frame that was not seen yet, or None. answer_ms: what answering it will take, about."""
        if self._pool is None:
            return self._look()
        if self._future is None:
            self._begin(0)
        if not self._future.done():
            return None
        glance, self._future = self._future.result(), None
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._done_fd)
        if glance is None:
            return None
        waited_ms = (time.monotonic_ns() - glance.done_ns) / NS_PER_MS
        if waited_ms > glance.encode_ms and self.slot.latest_seq > glance.frame.seq:
            self._begin(0)  # to look again is quicker than this one is fresh
            return None
        self._begin(time.monotonic_ns() + round(max(0.0, answer_ms - glance.encode_ms) * NS_PER_MS))
        return glance

    def _begin(self, not_before_ns: int) -> None:
        self._future = self._pool.submit(self._look_later, not_before_ns)
        self._future.add_done_callback(lambda _: os.eventfd_write(self._done_fd, 1))

    def _look_later(self, not_before_ns: int) -> EncodedFrame | None:
        time.sleep(max(0, not_before_ns - time.monotonic_ns()) / 1e9)
        if (glance := self._look()) is not None:
            return glance
        poll = select.poll()
        poll.register(self.slot, select.POLLIN)
        return self._look() if poll.poll(IDLE_S * 1000) else None

    def _look(self) -> EncodedFrame | None:
        frame, taken_ns = self.slot.take_newest(self.seen_seq), time.monotonic_ns()
        if frame is None:
            return None
        engine = self.engine
        deadline_ns = frame.t_capture_ns + round(engine.config.task.deadline_ms * NS_PER_MS)
        engine.preprocessor.max_tokens = self.budget.choose((deadline_ns - taken_ns) / NS_PER_MS)
        image = engine.preprocessor.image(frame.image)
        engine.span("resize", "eyes", taken_ns)
        if not self.slot.was_not_overwritten(frame):
            return None  # the camera came round while we read: there is a newer one
        self.seen_seq = frame.seq
        rows, stop_reason = None, ""
        if time.monotonic_ns() > deadline_ns:
            stop_reason = "late"
        else:
            try:
                rows = engine.see(image)
            except NonFiniteError:
                stop_reason = "not-finite"
        n_tokens = image.shape[0] * image.shape[1] // engine.preprocessor.unit**2
        return EncodedFrame(frame, deadline_ns, rows, stop_reason, n_tokens, taken_ns, time.monotonic_ns())
