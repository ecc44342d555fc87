"""The newest-frame slot: shared memory that one camera process writes and any number of processes read.

There is no queue. A reader gets the newest frame or nothing, and the sequence number tells how many frames it missed.
The slot opens no camera and converts no pixels. Whether a frame is too old to act on is for the reader to decide.

    >>> slot = Slot.create()                      # the supervisor; it passes slot.fd and slot.wake_fd to its children
    >>> image = slot.write(480, 640)              # the camera process fills the free buffer in place ...
    >>> image[:] = 7
    >>> slot.publish(1, 5_000_000, "arrival")     # ... and makes it the newest frame
    1
    >>> frame = slot.take_newest(after_seq=0)     # the model process; frame.image is a view, not a copy
    >>> int(frame.image.max())
    7
    >>> slot.was_not_overwritten(frame)           # after the work: if False, throw the result away
    True

Three buffers take turns: frame `seq` is in buffer `seq % 3`. The writer fills the buffer of frame `latest + 1` and then
sets `latest`, so it never touches the newest frame and the frame before it. A writer that is killed in the middle of a
frame leaves a half filled buffer that nobody reads. Everything that must outlive the writer is in the shared memory.

Beside the frames are two records of which only the newest counts: the vehicle state, from the supervisor to the model
process, and the image request (image_grid.py), from the model process to the camera process. A frame tells which
request its image was made for.

Memory order: the writer writes pixels and record first and `latest` last. A reader reads in the opposite order, and
reads `latest` again at the end. x86 makes stores visible in the order of the program. ARM does not, so `_fence()`
separates the two.

Risk: `_fence()` is two uncontended Python locks. It rests on an assumption about CPython: that releasing a lock is a
release operation and acquiring one an acquire operation, also when nobody waits for the lock. That is true of the
semaphores and of the PyMutex that CPython makes its locks of, but the language does not promise it, and a test on x86
cannot find a violation. So run test_no_torn_frame_passes_as_valid on an aarch64 machine before each
release, and after each change of the Python version.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the supervisor, which has a slot and looks at no image, starts without numpy
    import numpy as np
    import numpy.typing as npt

    Image = npt.NDArray[np.uint8]

MAX_IMAGE_BYTES = 7680 * 4320 * 3  # 8K; a memfd is sparse, so untouched pages of a buffer cost nothing
N_BUFFERS = 3
CLOCKS = ("driver", "arrival", "sender")  # shared memory holds the index in this tuple; only append

HEADER_BYTES = 65536  # buffers start on a page boundary, also where pages have 64 KiB
TOTAL_BYTES = HEADER_BYTES + N_BUFFERS * MAX_IMAGE_BYTES
MAGIC = int.from_bytes(b"EDGEFR01", "big")

# Indices of the header words. Each has 64 bits: the processor loads and stores an aligned word in one piece.
_MAGIC, _LATEST, _DONE, _RECORDS = 0, 1, 2, 8
_RECORD_WORDS = 8  # per buffer: frame_id, t_capture_ns, clock, height, width, image request
MAX_VEHICLE_STATE_BYTES, MAX_IMAGE_REQUEST_BYTES = 16384, 256
# Only the camera process uses these two records: length, then bytes.
_SOURCE_IDENTITY, _FINGERPRINT = 6144, 6784  # index of the first word
MAX_SOURCE_IDENTITY_BYTES, MAX_FINGERPRINT_BYTES = 4096, 64

_lock = threading.Lock()


def _fence() -> None:
    """A full memory barrier: all loads and stores before it take effect before all loads and stores after it.

    Leaving a lock is a release, and entering the next lock is an acquire. ARMv8 keeps a release before a later acquire.
    The module's docstring states the risk.
    """
    with _lock:
        pass
    with _lock:
        pass


class Frame(NamedTuple):
    """One frame in the slot."""

    seq: int  # counts the frames published since the slot exists; seq - previous seq - 1 frames were dropped
    frame_id: int
    t_capture_ns: int  # CLOCK_MONOTONIC
    capture_clock: str  # who set t_capture_ns: one of CLOCKS
    image: Image  # (H, W, 3) uint8, RGB, read-only, in shared memory: call was_not_overwritten() after using it
    image_request: int = 0  # number of the image request that gave the image its size; 0: it is as captured


class _NewestRecord(NamedTuple):
    """Bytes of which only the newest count. There are two places, written in turn, so that a reader has one that is
    whole. One process writes it."""

    counter: int  # index of the word that counts the records
    first: int  # index of the first of the two places: length, then bytes
    max_bytes: int

    def write(self, header: memoryview, payload: bytes) -> int:
        """Replace the record. Returns its number."""
        n: int = header[self.counter] + 1
        place = self._place(n)
        header[place] = len(payload)
        header.cast("B")[8 * (place + 1) : 8 * (place + 1) + len(payload)] = payload
        _fence()
        header[self.counter] = n
        return n

    def read(self, header: memoryview) -> tuple[int, bytes]:
        """Number and bytes of the newest record; (0, b"") before the first."""
        while n := header[self.counter]:
            _fence()
            place = self._place(n)
            n_bytes = min(max(header[place], 0), self.max_bytes)
            payload = bytes(header.cast("B")[8 * (place + 1) : 8 * (place + 1) + n_bytes])
            _fence()
            if header[self.counter] == n:  # the writer has not begun to write this place again
                return n, payload
        return 0, b""

    def _place(self, n: int) -> int:
        return self.first + n % 2 * (8 + self.max_bytes) // 8


_VEHICLE_STATE = _NewestRecord(3, 1024, MAX_VEHICLE_STATE_BYTES)
_IMAGE_REQUEST = _NewestRecord(4, 6912, MAX_IMAGE_REQUEST_BYTES)


class Slot:
    """Owns the memory and the two descriptors. One process writes; only the model process calls take_newest()."""

    def __init__(self, fd: int, wake_fd: int) -> None:
        """fd: a memfd of TOTAL_BYTES. wake_fd: an eventfd. Raises ValueError when the size is wrong."""
        size_bytes = os.fstat(fd).st_size
        if size_bytes != TOTAL_BYTES:
            raise ValueError(f"frame slot: expected {TOTAL_BYTES} bytes of shared memory, found {size_bytes}")
        self.fd = fd
        self.wake_fd = wake_fd
        memory = mmap.mmap(fd, TOTAL_BYTES)
        self._bytes = memoryview(memory)  # (TOTAL_BYTES,)
        self._header = self._bytes[:HEADER_BYTES].cast("q")
        self._shape = (0, 0)
        self._image_request = 0

    @classmethod
    def create(cls) -> Slot:
        """A new, empty slot."""
        fd = os.memfd_create("edge-agent-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, TOTAL_BYTES)
        # Nobody may shrink the memory: a process that touches a page which is gone gets SIGBUS.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        slot = cls(fd, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        slot._header[_MAGIC] = MAGIC
        return slot

    @classmethod
    def attach(cls, fd: int, wake_fd: int) -> Slot:
        """The slot behind inherited descriptors. This object owns them. Raises ValueError when they are not a slot."""
        slot = cls(fd, wake_fd)
        if slot._header[_MAGIC] != MAGIC:
            raise ValueError(f"frame slot: expected magic {MAGIC:#x}, found {slot._header[_MAGIC]:#x}")
        return slot

    def close(self) -> None:
        """Close the descriptors. The memory stays mapped until the last view of a frame is deleted."""
        os.close(self.fd)
        os.close(self.wake_fd)
        del self._header, self._bytes

    def fileno(self) -> int:
        """For select.poll: readable when a frame was published since the last take_newest()."""
        return self.wake_fd

    @property
    def latest_seq(self) -> int:
        """How many frames were ever published."""
        return self._header[_LATEST]

    # -- the writer ---------------------------------------------------------------------------------------------------

    def write(self, height: int, width: int, image_request: int = 0) -> Image:
        """The free buffer as (height, width, 3) uint8 RGB: fill it in place, then publish it.

        image_request: the number of the request that the image is made for; 0: it is as captured. Raises ValueError
        when the image is larger than MAX_IMAGE_BYTES, or empty.
        """
        if height < 1 or width < 1 or height * width * 3 > MAX_IMAGE_BYTES:
            raise ValueError(f"frame slot: {width}x{height} does not fit, the limit is {MAX_IMAGE_BYTES} bytes")
        self._shape, self._image_request = (height, width), image_request
        _fence()  # no pixel may be written before the publication that freed this buffer
        return self._image(self._header[_LATEST] + 1, height, width)

    def publish(self, frame_id: int, t_capture_ns: int, capture_clock: str) -> int:
        """Make the image that was filled since write() the newest frame. Returns its sequence number."""
        seq = self._header[_LATEST] + 1
        record = (frame_id, t_capture_ns, CLOCKS.index(capture_clock), *self._shape, self._image_request)
        for word, value in enumerate(record, _RECORDS + seq % N_BUFFERS * _RECORD_WORDS):
            self._header[word] = value
        _fence()
        self._header[_LATEST] = seq
        os.eventfd_write(self.wake_fd, 1)
        return seq

    def reader_is_idle(self) -> bool:
        """Whether the model process is done with the newest frame. The reader of a file that is not played in real time
        waits for this, so that the model gets every frame and none grows old in the slot."""
        return self._header[_DONE] >= self._header[_LATEST]

    # -- what outlives the camera process: only the camera process calls these ----------------------------------------

    def write_source_identity(self, payload: bytes) -> None:
        """Which camera was opened. Raises ValueError when the record is too large."""
        self._write_own_record(_SOURCE_IDENTITY, "source identity", payload, MAX_SOURCE_IDENTITY_BYTES)

    def read_source_identity(self) -> bytes:
        """What was written; empty before."""
        return self._read_own_record(_SOURCE_IDENTITY)

    def write_fingerprint(self, payload: bytes) -> None:
        """Of the newest image as captured: the image in the slot may be smaller. Raises ValueError as above."""
        self._write_own_record(_FINGERPRINT, "fingerprint", payload, MAX_FINGERPRINT_BYTES)

    def read_fingerprint(self) -> bytes:
        """What was written; empty before."""
        return self._read_own_record(_FINGERPRINT)

    def _write_own_record(self, first: int, name: str, payload: bytes, max_bytes: int) -> None:
        _check_length(name, payload, max_bytes)
        start = (first + 1) * 8
        self._header[first] = 0  # a process that is killed here leaves no record, not half of one
        self._bytes[start : start + len(payload)] = payload
        self._header[first] = len(payload)

    def _read_own_record(self, first: int) -> bytes:
        start = (first + 1) * 8
        return bytes(self._bytes[start : start + self._header[first]])

    # -- records of which only the newest counts ----------------------------------------------------------------------

    def write_vehicle_state(self, payload: bytes) -> None:
        """Replace the record. Only the supervisor calls this. Raises ValueError when the record is too large."""
        _check_length("vehicle state", payload, MAX_VEHICLE_STATE_BYTES)
        _VEHICLE_STATE.write(self._header, payload)

    def read_vehicle_state(self) -> bytes:
        """The newest record; empty before the first."""
        return _VEHICLE_STATE.read(self._header)[1]

    def request_images(self, payload: bytes) -> int:
        """Ask for images of another size. Only the model process calls this. Returns the number of the request; the
        same request again keeps its number. Raises ValueError when the request is too large."""
        _check_length("image request", payload, MAX_IMAGE_REQUEST_BYTES)
        number, newest = _IMAGE_REQUEST.read(self._header)
        return number if number and newest == payload else _IMAGE_REQUEST.write(self._header, payload)

    def read_image_request(self) -> tuple[int, bytes]:
        """Number and bytes of the newest request; (0, b"") before the first."""
        return _IMAGE_REQUEST.read(self._header)

    # -- the readers --------------------------------------------------------------------------------------------------

    def take_newest(self, after_seq: int) -> Frame | None:
        """The newest frame, if it is newer than `after_seq`, the frame taken before. Only the model process calls this.

        It tells the writer that the reader is done with all frames up to `after_seq`, and clears the wake-up. It clears
        the wake-up first, so that a frame published meanwhile sets it again.
        """
        with contextlib.suppress(BlockingIOError):  # the wake-up was not set; there may still be a newer frame
            os.eventfd_read(self.wake_fd)
        self._header[_DONE] = after_seq
        return self.peek(after_seq)

    def peek(self, after_seq: int) -> Frame | None:
        """As take_newest(), without any effect on writer and wake-up: for a preview or a recorder."""
        while (seq := self._header[_LATEST]) > after_seq:
            _fence()
            first = _RECORDS + seq % N_BUFFERS * _RECORD_WORDS
            frame_id, t_capture_ns, clock, height, width, image_request = self._header[first : first + 6]
            if self._is_intact(seq):  # otherwise the record may belong in part to a newer frame
                image = self._image(seq, height, width)
                image.flags.writeable = False
                return Frame(seq, frame_id, t_capture_ns, CLOCKS[clock], image, image_request)
        return None

    def newest_capture_ns(self) -> int:
        """When the newest frame was captured; 0: there is none."""
        while seq := self._header[_LATEST]:
            _fence()
            t_capture_ns: int = self._header[_RECORDS + seq % N_BUFFERS * _RECORD_WORDS + 1]
            if self._is_intact(seq):
                return t_capture_ns
        return 0

    def was_not_overwritten(self, frame: Frame) -> bool:
        """Whether everything that was read from frame.image until now belonged to this frame."""
        return self._is_intact(frame.seq)

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a frame was published since the last take_newest(); False when none came in time."""
        poll = select.poll()
        poll.register(self.wake_fd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def _is_intact(self, seq: int) -> bool:
        """Whether the writer has not begun to write the buffer of frame `seq` again."""
        _fence()
        return self._header[_LATEST] < seq + N_BUFFERS - 1

    def _image(self, seq: int, height: int, width: int) -> Image:
        import numpy as np

        start = HEADER_BYTES + seq % N_BUFFERS * MAX_IMAGE_BYTES
        return np.frombuffer(self._bytes, np.uint8, height * width * 3, start).reshape(height, width, 3)


def _check_length(name: str, payload: bytes, max_bytes: int) -> None:
    if len(payload) > max_bytes:
        raise ValueError(f"{name} of {len(payload)} bytes, the limit is {max_bytes}")
