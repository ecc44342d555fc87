"""The newest-frame slot, with real shared memory and real writer processes that are killed for real."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing

import msgspec
import numpy as np
import pytest

from edge_agent.ipc import frame_slot
from edge_agent.ipc.frame_slot import (
    MAX_FINGERPRINT_BYTES,
    MAX_IMAGE_BYTES,
    MAX_IMAGE_REQUEST_BYTES,
    MAX_SOURCE_IDENTITY_BYTES,
    MAX_VEHICLE_STATE_BYTES,
    TOTAL_BYTES,
    Slot,
)
from edge_agent.wire.pushed_frame import pack_pushed_frame
from tests.harness import ROOT

ENV = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def slot():
    with closing(Slot.create()) as slot:
        yield slot


def publish(slot: Slot, value: int, height: int = 4, width: int = 6) -> int:
    slot.write(height, width)[:] = value
    return slot.publish(value, 1000 + value, "driver")


def writer(slot: Slot, body: str) -> subprocess.Popen:
    """Another process that runs `body` with the slot attached as `slot`. Its standard output is a pipe."""
    code = (
        "import time\nfrom edge_agent.ipc.frame_slot import Slot\n"
        f"slot = Slot.attach({slot.fd}, {slot.wake_fd})\n{body}"
    )
    fds = (slot.fd, slot.wake_fd)
    return subprocess.Popen([sys.executable, "-c", code], pass_fds=fds, env=ENV, stdout=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_frame_arrives_as_it_was_published(slot):
    assert slot.take_newest(0) is None and slot.latest_seq == 0
    assert publish(slot, 7) == 1
    frame = slot.take_newest(0)
    assert (frame.seq, frame.frame_id, frame.t_capture_ns, frame.capture_clock) == (1, 7, 1007, "driver")
    assert frame.image.shape == (4, 6, 3) and frame.image.dtype == np.uint8 and (frame.image == 7).all()
    assert not frame.image.flags.writeable
    assert slot.take_newest(after_seq=1) is None


def test_the_view_is_the_shared_memory_and_not_a_copy(slot):
    written = slot.write(4, 6)
    slot.publish(1, 1, "arrival")
    assert np.shares_memory(written, slot.take_newest(0).image)


def test_newest_wins_and_the_gap_in_seq_is_the_drops(slot):
    publish(slot, 1)
    last_seq = slot.take_newest(0).seq
    for value in (2, 3, 4, 5):
        publish(slot, value)
    frame = slot.take_newest(last_seq)
    assert frame.frame_id == 5 and frame.seq - last_seq - 1 == 3


def test_a_frame_stays_intact_until_two_newer_ones_are_published(slot):
    publish(slot, 1)
    frame = slot.take_newest(0)
    publish(slot, 2)
    slot.write(4, 6)[:] = 3  # filled and not yet published: frame 1 is still whole
    assert slot.was_not_overwritten(frame) and (frame.image == 1).all()
    slot.publish(3, 0, "arrival")
    assert not slot.was_not_overwritten(frame)  # from now on the writer may write into its buffer
    slot.write(4, 6)[:] = 4
    assert (frame.image == 4).all()  # and here it does


def test_a_reader_that_is_overtaken_reads_again(slot, monkeypatch):
    """Three frames between reading the sequence number and reading the record that belongs to it."""
    publish(slot, 1)

    def three_more():
        monkeypatch.undo()
        for value in (2, 3, 4):
            publish(slot, value, 8, 8)

    monkeypatch.setattr("edge_agent.ipc.frame_slot._fence", three_more)
    frame = slot.take_newest(0)
    assert (frame.seq, frame.frame_id, frame.image.shape) == (4, 4, (8, 8, 3))


def test_peek_changes_nothing_for_writer_and_reader(slot):
    publish(slot, 1)
    assert slot.peek(0).frame_id == 1
    assert slot.wait(0) and not slot.reader_is_idle()
    slot.take_newest(0)
    assert not slot.wait(0)


def test_the_reader_is_idle_when_it_asks_for_more_than_the_newest(slot):
    assert slot.reader_is_idle()  # there is no frame: a writer need not wait
    publish(slot, 1)
    assert not slot.reader_is_idle()
    slot.take_newest(0)  # the reader has it now, and works on it
    assert not slot.reader_is_idle()
    slot.take_newest(1)
    assert slot.reader_is_idle()


def test_wait_ends_when_another_process_publishes(slot):
    assert not slot.wait(0.01)
    other = writer(slot, "time.sleep(0.1); slot.write(2, 2); slot.publish(1, 1, 'sender')")
    assert slot.wait(60) and slot.take_newest(0).capture_clock == "sender"
    kill(other)


def test_the_newest_vehicle_state_is_read_and_the_frames_stay_intact(slot):
    assert slot.read_vehicle_state() == b""
    image = slot.write(4, 4)
    image[:] = 5
    slot.publish(1, 2, "driver")
    for n in (1, 16384, 0, 7, 300):
        slot.write_vehicle_state(bytes([n % 256]) * n)
        assert slot.read_vehicle_state() == bytes([n % 256]) * n
    frame = slot.take_newest(0)
    assert (frame.frame_id, frame.t_capture_ns) == (1, 2) and (frame.image == 5).all()
    with pytest.raises(ValueError, match="vehicle state of 16385 bytes"):
        slot.write_vehicle_state(bytes(16385))
    assert slot.read_vehicle_state() == bytes([300 % 256]) * 300


def test_the_identity_of_the_source_is_kept_beside_frames_and_vehicle_state(slot):
    assert slot.read_source_identity() == b""
    slot.write_vehicle_state(b"v" * MAX_VEHICLE_STATE_BYTES)
    slot.write_vehicle_state(b"w" * MAX_VEHICLE_STATE_BYTES)
    for record in (b"x" * MAX_SOURCE_IDENTITY_BYTES, b"camera", b""):
        slot.write_source_identity(record)
        slot.write(1, 1)[:] = 9
        slot.publish(1, 1, "arrival")
        assert slot.read_source_identity() == record
    assert slot.read_vehicle_state() == b"w" * MAX_VEHICLE_STATE_BYTES and slot.peek(0).image.max() == 9
    with pytest.raises(ValueError, match="source identity of 4097 bytes, the limit is 4096"):
        slot.write_source_identity(bytes(4097))


def test_a_request_for_images_gets_a_number_that_comes_back_with_the_frames(slot):
    assert slot.read_image_request() == (0, b"")
    publish(slot, 1)
    assert slot.take_newest(0).image_request == 0, "as captured"
    assert slot.request_images(b"small") == 1 and slot.read_image_request() == (1, b"small")
    slot.write(4, 4, image_request=1)[:] = 2
    assert slot.request_images(b"large") == 2 and slot.read_image_request() == (2, b"large")
    slot.publish(2, 2, "driver")
    assert slot.take_newest(1).image_request == 1, "the request that the image was made for, not the newest"
    publish(slot, 3)
    assert slot.take_newest(2).image_request == 0
    with pytest.raises(ValueError, match="image request of 257 bytes, the limit is 256"):
        slot.request_images(bytes(257))


def test_the_same_request_again_keeps_its_number(slot):
    """A model process that was started again can use the frames of the one before it."""
    assert [slot.request_images(payload) for payload in (b"a", b"a", b"b", b"b", b"a", b"a")] == [1, 1, 2, 2, 3, 3]
    with closing(Slot.attach(os.dup(slot.fd), os.dup(slot.wake_fd))) as other:
        assert other.read_image_request() == (3, b"a") and other.request_images(b"a") == 3


def test_the_records_do_not_touch_each_other(slot):
    slot.write_vehicle_state(b"v" * MAX_VEHICLE_STATE_BYTES)
    slot.write_vehicle_state(b"w" * MAX_VEHICLE_STATE_BYTES)
    slot.write_source_identity(b"i" * MAX_SOURCE_IDENTITY_BYTES)
    slot.write_fingerprint(b"f" * MAX_FINGERPRINT_BYTES)
    slot.request_images(b"r" * MAX_IMAGE_REQUEST_BYTES)
    slot.request_images(b"s" * MAX_IMAGE_REQUEST_BYTES)
    publish(slot, 9)
    assert slot.read_vehicle_state() == b"w" * MAX_VEHICLE_STATE_BYTES
    assert slot.read_source_identity() == b"i" * MAX_SOURCE_IDENTITY_BYTES
    assert slot.read_fingerprint() == b"f" * MAX_FINGERPRINT_BYTES
    assert slot.read_image_request() == (2, b"s" * MAX_IMAGE_REQUEST_BYTES)
    assert slot.peek(0).image.min() == 9
    with pytest.raises(ValueError, match="fingerprint of 65 bytes"):
        slot.write_fingerprint(bytes(65))


def test_no_torn_request_is_read(slot):
    child = writer(
        slot,
        "import itertools\nfor n in itertools.cycle(range(1, 251)): slot.request_images(bytes([n]) * n)",
    )
    seen: set[int] = set()
    until_s = time.monotonic() + 120
    while len(seen) < 100 and time.monotonic() < until_s:
        number, payload = slot.read_image_request()
        if number:
            assert len(set(payload)) == 1 and len(payload) == payload[0] == (number - 1) % 250 + 1
            seen.add(number)
    kill(child)
    assert len(seen) >= 100


def test_the_largest_vehicle_state_that_control_accepts_fits():
    """64 keys and words of the greatest length, with their times."""
    longest = {f"{n:02}".ljust(32, "x"): ("w" * 32, 2**63 - 1) for n in range(64)}
    assert len(msgspec.msgpack.encode(longest)) <= frame_slot.MAX_VEHICLE_STATE_BYTES


def test_no_torn_vehicle_state_is_read(slot):
    """A process writes records without a pause. A record that is whole holds one value only."""
    child = writer(
        slot,
        "import itertools\n"
        "for n in itertools.cycle(range(256)): slot.write_vehicle_state(bytes([n]) * (1000 + 10 * n))",
    )
    values: set[int] = set()
    until_s = time.monotonic() + 120
    while len(values) < 100 and time.monotonic() < until_s:
        if record := slot.read_vehicle_state():
            assert len(set(record)) == 1 and len(record) == 1000 + 10 * record[0]
            values.add(record[0])
    kill(child)
    assert len(values) >= 100


def test_eight_k_fits_and_no_more(slot):
    assert slot.write(4320, 7680).nbytes == slot.write(7680, 4320).nbytes == MAX_IMAGE_BYTES
    for height, width in ((4321, 7680), (0, 10), (10, -1)):
        with pytest.raises(ValueError, match=f"{width}x{height}"):
            slot.write(height, width)


def test_memory_is_used_only_where_it_was_touched(slot):
    publish(slot, 1, 480, 640)
    assert os.fstat(slot.fd).st_blocks * 512 < 2 << 20 < TOTAL_BYTES


def test_no_process_can_shrink_the_shared_memory(slot):
    with pytest.raises(PermissionError):
        os.ftruncate(slot.fd, 0)


def test_attach_refuses_memory_that_is_not_a_slot(slot):
    fd = os.memfd_create("other")
    with pytest.raises(ValueError, match=f"expected {TOTAL_BYTES} bytes of shared memory, found 0"):
        Slot.attach(fd, slot.wake_fd)
    os.ftruncate(fd, TOTAL_BYTES)
    with pytest.raises(ValueError, match="magic"):
        Slot.attach(fd, slot.wake_fd)
    os.close(fd)


def test_a_view_stays_valid_after_the_slot_is_closed():
    slot = Slot.create()
    publish(slot, 9)
    frame = slot.take_newest(0)
    slot.close()
    assert (frame.image == 9).all()


FAST_WRITER = """
n = slot.latest_seq
while True:
    n += 1
    slot.write({height}, {width})[:] = n % 251
    slot.publish(n, n, "arrival")
    if n % 50 == 0:
        time.sleep(0.005)  # on a busy machine no reader would ever be the faster one
"""


def test_no_torn_frame_passes_as_valid(slot):
    """The writer writes as fast as it can. Every tenth frame is read so slowly that it is overwritten meanwhile."""
    other = writer(slot, FAST_WRITER.format(height=480, width=640))
    seq, n_frames, n_valid, n_torn = 0, 0, 0, 0
    until_s = time.monotonic() + 300
    while (n_frames < 300 or n_valid <= 20 or n_torn <= 2) and time.monotonic() < until_s:
        slot.wait(1)
        frame = slot.take_newest(seq)
        if frame is None:
            continue
        seq, n_frames = frame.seq, n_frames + 1
        whole = (frame.image[:240] == frame.frame_id % 251).all()
        while n_frames % 10 == 0 and slot.latest_seq < seq + 4:
            time.sleep(0.001)
        whole &= (frame.image[240:] == frame.frame_id % 251).all()
        if slot.was_not_overwritten(frame):
            assert whole, f"frame {frame.seq} is torn"
            n_valid += 1
        else:
            n_torn += not whole
    kill(other)
    assert n_valid > 20 and n_torn > 2, (n_frames, n_valid, n_torn)  # otherwise the test shows nothing


def test_a_writer_killed_in_the_middle_of_a_frame(slot):
    body = """
slot.write(480, 640)[:] = 1
slot.publish(41, 1, "arrival")
slot.write(480, 640)[:240] = 2
print("half", flush=True)
time.sleep(60)
"""
    other = writer(slot, body)
    assert other.stdout.readline() == "half\n"
    kill(other)
    frame = slot.take_newest(0)
    assert (frame.seq, frame.frame_id) == (1, 41) and (frame.image == 1).all()
    other = writer(slot, "slot.write(480, 640)[:] = 3; print(slot.publish(42, 1, 'arrival'), flush=True)")
    assert other.stdout.readline() == "2\n"
    assert slot.was_not_overwritten(frame) and (frame.image == 1).all()
    assert (slot.take_newest(1).image == 3).all()
    kill(other)


def test_writers_killed_at_random_moments(slot):
    """Whatever the moment, the newest frame is whole, and seq goes on where it stopped."""
    seq = 0
    for _ in range(10):
        other = writer(slot, FAST_WRITER.format(height=240, width=320))
        assert slot.wait(60)
        slot.take_newest(0)
        time.sleep(random.uniform(0, 0.02))
        os.kill(other.pid, signal.SIGKILL)
        kill(other)
        frame = slot.take_newest(0)
        assert frame.seq > seq and frame.seq == frame.frame_id == slot.latest_seq
        assert (frame.image == frame.frame_id % 251).all() and slot.was_not_overwritten(frame)
        seq = frame.seq


def test_it_needs_numpy_and_the_standard_library_only():
    code = (
        "import sys, edge_agent.ipc.frame_slot\n"
        "print([m for m in ('cv2', 'msgspec', 'zmq', 'yaml') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], env=ENV, text=True) == "[]\n"


def test_pack_frame_is_one_topic_byte_and_one_map():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    message = pack_pushed_frame(5, 17, 4, 2, "rgb8", image.data)
    fields = {"frame_id": 5, "t_capture_ns": 17, "width": 4, "height": 2, "format": "rgb8", "data": image.tobytes()}
    assert message[:1] == b"F" and msgspec.msgpack.decode(message[1:]) == {"v": 1} | fields
