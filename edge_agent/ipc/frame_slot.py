"""The newest-frame slot: shared memory that one camera process writes and any number of processes read.

There is no queue: a reader gets the newest frame or nothing, and sees from the sequence number how many it missed. The
slot opens no camera and converts no pixels; whether a frame is too old to act on is the reader's question.

    >>> slot = Slot.create()                      # the supervisor; passes slot.fd and slot.wake_fd to its children
    >>> image = slot.write(480, 640)              # the camera fills the free buffer in place ...
    >>> image[:] = 7
    >>> slot.publish(1, 5_000_000, "arrival")     # ... and now it is the newest frame
    1
    >>> frame = slot.newest(after_seq=0)          # the model; frame.image is a view, not a copy
    >>> int(frame.image.max())
    7
    >>> slot.still_valid(frame)                   # asked after the work: False means throw the result away
    True

Three buffers in turn: frame `seq` lies in buffer `seq % 3`. The writer fills the buffer of `latest + 1` and only then
moves `latest`, so the newest frame and the one before it are never touched, and a writer killed in the middle of a
frame leaves nothing but a free buffer half filled. Everything that must outlive the writer is in the memory itself.

Beside the frames lies a small note that the supervisor writes and the model reads: what the controller knows of its
vehicle. There too only the newest counts.

Memory order: pixels and record first, `latest` last; a reader reads in the opposite order and asks again afterwards. On
x86 stores are seen in the order they were made. ARM promises no such thing, so `_fence()` stands between the two.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import threading
from typing import NamedTuple

import numpy as np

MAX_IMAGE_BYTES = 7680 * 4320 * 3  # 8K; a memfd is sparse, so untouched pages of a buffer cost nothing
N_BUFFERS = 3
CLOCKS = ("driver", "arrival", "sender")  # the code in shared memory is the place in this tuple; append only

HEADER_BYTES = 65536  # buffers start on a page boundary, also where pages have 64 KiB
TOTAL_BYTES = HEADER_BYTES + N_BUFFERS * MAX_IMAGE_BYTES
MAGIC = int.from_bytes(b"EDGEFR01", "big")

# Header words, 64 bits each: an aligned word is loaded and stored in one piece.
_MAGIC, _LATEST, _SEEN, _STATES, _RECORDS = 0, 1, 2, 3, 8
_RECORD_WORDS = 8  # per buffer: frame_id, t_capture_ns, clock, height, width
MAX_VEHICLE_STATE_BYTES = 16384
_STATE = 1024  # where in the header the notes begin: two, written in turn, each its length and its bytes
_STATE_WORDS = (8 + MAX_VEHICLE_STATE_BYTES) // 8

_lock = threading.Lock()


def _fence() -> None:
    """A full memory barrier: what is above is done before what is below.

    Leaving a lock is a release and entering the next an acquire; ARMv8 keeps a release before a later acquire.
    """
    with _lock:
        pass
    with _lock:
        pass


class Frame(NamedTuple):
    seq: int  # counts published frames for as long as the slot exists; seq - previous seq - 1 frames were dropped
    frame_id: int
    t_capture_ns: int  # CLOCK_MONOTONIC of this boot
    capture_clock: str  # who stamped it: one of CLOCKS
    image: np.ndarray  # (H, W, 3) uint8, RGB, read-only, in shared memory: ask still_valid() after using it


class Slot:
    """Owns the memory and the two descriptors. One process writes; of the readers only the model calls newest()."""

    def __init__(self, fd: int, wake_fd: int):
        size_bytes = os.fstat(fd).st_size
        if size_bytes != TOTAL_BYTES:
            raise ValueError(f"frame slot: expected {TOTAL_BYTES} bytes of shared memory, found {size_bytes}")
        self.fd = fd
        self.wake_fd = wake_fd
        self._bytes = np.frombuffer(mmap.mmap(fd, TOTAL_BYTES), np.uint8)
        self._header = memoryview(self._bytes)[:HEADER_BYTES].cast("q")
        self._shape = (0, 0)

    @classmethod
    def create(cls) -> Slot:
        fd = os.memfd_create("edge-agent-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, TOTAL_BYTES)
        # Nobody may shrink it: touching a page that is gone is SIGBUS for every other process.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        slot = cls(fd, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        slot._header[_MAGIC] = MAGIC
        return slot

    @classmethod
    def attach(cls, fd: int, wake_fd: int) -> Slot:
        """The slot behind inherited descriptors, which then belong to this object."""
        slot = cls(fd, wake_fd)
        if slot._header[_MAGIC] != MAGIC:
            raise ValueError(f"frame slot: expected magic {MAGIC:#x}, found {slot._header[_MAGIC]:#x}")
        return slot

    def close(self) -> None:
        """Close the descriptors. The mapping goes when the last frame's view goes, never under a reader's feet."""
        os.close(self.fd)
        os.close(self.wake_fd)
        del self._header, self._bytes

    def fileno(self) -> int:
        """For select.poll: readable when a frame was published since newest() was last called."""
        return self.wake_fd

    @property
    def latest_seq(self) -> int:
        """How many frames were ever published; 0 before the first."""
        return self._header[_LATEST]

    # -- the writer

    def write(self, height: int, width: int) -> np.ndarray:
        """The free buffer as (height, width, 3) uint8 RGB, to be filled in place and then published."""
        if height < 1 or width < 1 or height * width * 3 > MAX_IMAGE_BYTES:
            raise ValueError(f"frame slot: {width}x{height} does not fit, the limit is {MAX_IMAGE_BYTES} bytes")
        self._shape = (height, width)
        _fence()  # no pixel of the new frame before the publication that freed its buffer
        return self._image(self._header[_LATEST] + 1, height, width)

    def publish(self, frame_id: int, t_capture_ns: int, capture_clock: str) -> int:
        """Make the image filled since write() the newest frame; returns its sequence number."""
        seq = self._header[_LATEST] + 1
        record = (frame_id, t_capture_ns, CLOCKS.index(capture_clock), *self._shape)
        for word, value in enumerate(record, _RECORDS + seq % N_BUFFERS * _RECORD_WORDS):
            self._header[word] = value
        _fence()
        self._header[_LATEST] = seq
        os.eventfd_write(self.wake_fd, 1)
        return seq

    def wanted(self) -> bool:
        """Whether the model is done with the newest frame and asks for another: a file not played in real time waits
        for this, so that every frame of it is seen once and none grows old in the slot."""
        return self._header[_SEEN] >= self._header[_LATEST]

    # -- the note

    def write_note(self, payload: bytes) -> None:
        """Replace the note. For one process, the supervisor."""
        if len(payload) > MAX_VEHICLE_STATE_BYTES:
            raise ValueError(f"note of {len(payload)} bytes, the limit is {MAX_VEHICLE_STATE_BYTES}")
        n = self._header[_STATES] + 1
        first = _STATE + n % 2 * _STATE_WORDS
        self._header[first] = len(payload)
        start = (first + 1) * 8
        self._bytes[start : start + len(payload)] = np.frombuffer(payload, np.uint8)
        _fence()
        self._header[_STATES] = n

    def read_note(self) -> bytes:
        """The newest note; empty before the first."""
        while n := self._header[_STATES]:
            _fence()
            first = _STATE + n % 2 * _STATE_WORDS
            start, size = (first + 1) * 8, self._header[first]
            payload = self._bytes[start : start + min(max(size, 0), MAX_VEHICLE_STATE_BYTES)].tobytes()
            _fence()
            if self._header[_STATES] == n:  # the writer goes to the other one next, and then comes back to this
                return payload
        return b""

    # -- the readers

    def newest(self, after_seq: int) -> Frame | None:
        """The newest frame if it is newer than `after_seq`, the last one seen. For the model, nobody else: it tells the
        writer that all up to `after_seq` is done with, and clears the wake-up (first: a frame published meanwhile sets
        it again)."""
        with contextlib.suppress(BlockingIOError):  # nothing published since; there may still be a newer frame
            os.eventfd_read(self.wake_fd)
        self._header[_SEEN] = after_seq
        return self.peek(after_seq)

    def peek(self, after_seq: int) -> Frame | None:
        """The same for onlookers (preview, recorder): leaves neither mark nor wake-up changed."""
        while (seq := self._header[_LATEST]) > after_seq:
            _fence()
            first = _RECORDS + seq % N_BUFFERS * _RECORD_WORDS
            frame_id, t_capture_ns, clock, height, width = self._header[first : first + 5]
            if self._free_of_writer(seq):  # otherwise the record may be half of a newer frame's
                image = self._image(seq, height, width)
                image.flags.writeable = False
                return Frame(seq, frame_id, t_capture_ns, CLOCKS[clock], image)
        return None

    def still_valid(self, frame: Frame) -> bool:
        """Whether everything read from frame.image until now was this frame: the writer had not come round to it."""
        return self._free_of_writer(frame.seq)

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a frame was published since newest() was last called; False when there was none."""
        poll = select.poll()
        poll.register(self.wake_fd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def _free_of_writer(self, seq: int) -> bool:
        _fence()
        return self._header[_LATEST] < seq + N_BUFFERS - 1

    def _image(self, seq: int, height: int, width: int) -> np.ndarray:
        start = HEADER_BYTES + seq % N_BUFFERS * MAX_IMAGE_BYTES
        return self._bytes[start : start + height * width * 3].reshape(height, width, 3)
