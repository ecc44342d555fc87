"""The camera process: which source a string means, back-off, start and end, the probe."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from edge_agent.camera.process import SOURCES, probe, run, source_kind
from edge_agent.camera.source import CapturedFrame, SourceError, check_size
from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraFault, CameraOpened, decode_camera_event
from edge_agent.ipc.frame_slot import Slot
from edge_agent.suspend import SuspendDetector
from edge_agent.wire.codec import encode
from tests.harness.camera import (
    ENV,
    HANG_S,
    FakeClock,
    Pusher,
    arguments_of,
    counting_video,
    has_ended,
    number_of,
    wait_until,
)
from tests.harness.pictures import counting_mkv

# -- which source a string means --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("0", "v4l2"),
        ("/dev/video0", "v4l2"),
        ("v4l2:/dev/v4l/by-id/x", "v4l2"),
        ("gst:videotestsrc", "gst"),
        ("zmq:ipc:///x", "zmq"),
        ("gst", "video"),
        ("clip.mp4", "video"),
        ("/tmp", "folder"),
    ],
)
def test_the_kind_of_a_source(source, kind):
    assert source_kind(source) == kind


def corrupt_video(path: Path) -> Path:
    path.write_bytes(bytes(range(256)) * 80)
    return path


def folder_of(path: Path, **files: bytes) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / f"{name}.jpg").write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("source", "reason", "words"),
    [
        (lambda tmp: tmp / "nowhere.mp4", "absent", "nowhere.mp4: no such file or folder"),
        (lambda tmp: corrupt_video(tmp / "broken.mp4"), "unreadable", "broken.mp4: contains no frame"),
        (lambda tmp: folder_of(tmp / "empty"), "absent", "empty: no image in this folder"),
        (lambda tmp: folder_of(tmp / "bad", a=b"\xff\xd8\xff bad"), "unreadable", "none of its 1 images can be used"),
        (lambda tmp: "rtsp://10.0.0.1/stream", "absent", "rtsp://10.0.0.1/stream: expected"),
        (lambda tmp: "zmq:tcp://*:5555", "unreadable", "zmq:tcp://*:5555: expected zmq:ipc:///absolute/path"),
        (lambda tmp: "gst:videotestsrc", "unreadable", "camera.width and camera.height"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_permanent_error_is_reported_and_ends_the_process(slot, clock, tmp_path, source, reason, words):
    events = []
    config = CameraConfig(source=str(source(tmp_path)))
    assert run(config, slot, events.append, clock) == os.EX_CONFIG
    assert events[-1].reason == reason and words in events[-1].detail, events
    assert slot.latest_seq == 0 and clock.pauses_s in ([], [0])  # it was not tried again


def test_a_folder_that_disappears_is_a_permanent_error(slot, clock, tmp_path):
    folder = folder_of(tmp_path / "folder")
    cv2.imwrite(str(folder / "a.png"), np.zeros((20, 30, 3), np.uint8))
    events = []

    def send(event: object) -> None:
        events.append(event)
        shutil.rmtree(folder, ignore_errors=True)

    assert run(CameraConfig(source=str(folder)), slot, send, clock) == os.EX_CONFIG
    assert events[-1] == CameraFault("absent", f"{folder}: No such file or directory")


def test_a_pipe_is_not_a_video(slot, clock, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    events = []
    assert run(CameraConfig(source=str(tmp_path / "pipe")), slot, events.append, clock) == os.EX_CONFIG
    assert events == [CameraFault("absent", f"{tmp_path}/pipe: not a regular file")]


def test_a_frame_larger_than_the_slot_is_a_permanent_error():
    check_size(4320, 7680)
    with pytest.raises(SourceError, match="frames of 7681x4320") as caught:
        check_size(4320, 7681)
    assert not caught.value.retryable


# -- back-off ---------------------------------------------------------------------------------------------------------


class Enough(Exception):
    """Ends run(), which otherwise tries for ever."""


def test_an_absent_device_is_tried_again_with_growing_pauses(slot):
    events = []

    def stop() -> None:
        if len(clock.pauses_s) == 7:
            raise Enough

    clock = FakeClock(on_sleep=stop)
    with pytest.raises(Enough):
        run(CameraConfig(source="/dev/video97"), slot, events.append, clock)
    assert clock.pauses_s == pytest.approx([0.5, 1, 2, 4, 5, 5, 5])
    assert events == [CameraFault("absent", "/dev/video97: No such file or directory")] * 7


@pytest.mark.parametrize(("kind", "is_live"), [("v4l2", True), ("gst", True), ("zmq", False), ("video", False)])
def test_after_a_suspend_a_device_is_opened_again(slot, monkeypatch, kind, is_live):
    """A frame that waited in the driver meanwhile would be stamped at its arrival, and look new."""
    clock, boottime = FakeClock(), FakeClock()
    n_opened = 0

    def device(config, slot, clock):
        nonlocal n_opened
        n_opened += 1
        for i in range(4):
            if i == 2 and n_opened == 1:
                boottime.advance(60.0)
            slot.write(4, 4)[:] = i
            yield CapturedFrame(slot.write(4, 4), clock.now_ns(), "arrival")
        raise Enough

    monkeypatch.setitem(SOURCES, kind, device)
    monkeypatch.setattr("edge_agent.camera.process.source_kind", lambda source: kind)
    monkeypatch.setattr("edge_agent.camera.process.detect_frozen", lambda items, *_: items)
    events = []
    with pytest.raises(Enough):
        run(CameraConfig(source="0"), slot, events.append, clock, SuspendDetector(clock.now_ns, boottime.now_ns))
    suspended = [event for event in events if isinstance(event, CameraFault)]
    if is_live:
        assert suspended == [CameraFault("clock", "the machine was suspended; the source is opened again")]
        assert (n_opened, slot.latest_seq) == (2, 2 + 4)
    else:
        assert (suspended, n_opened, slot.latest_seq) == ([], 1, 4)


@pytest.mark.parametrize(("seconds", "pauses_s"), [(0, [0.5, 1, 2, 4]), (11, [0.5, 1, 0.5, 1])])
def test_only_a_good_period_makes_the_pauses_short_again(slot, monkeypatch, seconds, pauses_s):
    """A device that opens at the third attempt, gives frames for some seconds and fails again."""
    n_opened = 0

    def device(config, slot, clock):
        nonlocal n_opened
        n_opened += 1
        if n_opened == 3:
            for i in range(seconds + 1):
                clock.time_ns += 1_000_000_000 * (i > 0)
                yield CapturedFrame(slot.write(4, 4), clock.now_ns(), "arrival")
        raise SourceError("stalled", "no frame")

    def stop() -> None:
        if len(clock.pauses_s) == 4:
            raise Enough

    clock = FakeClock(on_sleep=stop)
    monkeypatch.setitem(SOURCES, "v4l2", device)
    monkeypatch.setattr("edge_agent.camera.process.LIVE_KINDS", set())
    with pytest.raises(Enough):
        run(CameraConfig(source="0"), slot, lambda event: None, clock)
    assert clock.pauses_s == pytest.approx(pauses_s)


def test_a_process_whose_device_is_absent_stays_and_tries_again(camera_process):
    camera = camera_process("/dev/video97")
    expected = CameraFault("absent", "/dev/video97: No such file or directory")
    assert [camera.event(), camera.event()] == [expected] * 2 and camera.process.poll() is None


# -- start and end ----------------------------------------------------------------------------------------------------


def test_a_permanent_error_ends_the_process_and_nothing_is_printed(camera_process, tmp_path):
    camera = camera_process(corrupt_video(tmp_path / "broken.mp4"))
    assert camera.event().reason == "unreadable"
    assert camera.process.wait(HANG_S) == os.EX_CONFIG and camera.remaining_events() == []
    if (cv2.getVersionMajor(), cv2.getVersionMinor()) >= (4, 8):  # older versions cannot silence FFmpeg
        assert camera.process.stderr.read() == b""


def test_the_process_ends_when_the_supervisor_closes_its_socket(camera_process, tmp_path):
    """Also while it waits for a reader. Ctrl-C reaches the whole process group, but only the supervisor acts on it."""
    camera = camera_process(counting_video(tmp_path / "v.avi", 10), realtime=False)
    assert camera.frame().frame_id == 1
    camera.process.send_signal(signal.SIGINT)
    assert [camera.frame().frame_id, camera.frame().frame_id] == [2, 3]
    camera.events.close()
    assert camera.process.wait(HANG_S) == 0


def test_frame_ids_and_seq_continue_after_kill_9(camera_process, tmp_path):
    camera = camera_process(counting_video(tmp_path / "v.avi", 10), realtime=False)
    before = [camera.frame() for _ in range(4)][-1]
    camera.kill()
    last = camera.slot.peek(0)
    camera.start()
    after = [camera.frame() for _ in range(4)][-1]
    assert (before.seq, before.frame_id) == (4, 4) and (after.seq, after.frame_id) == (8, 8)
    assert last.frame_id == 4 and number_of(after.image) == 3


PARENT = """
import subprocess, sys, time
camera = subprocess.Popen([sys.executable, "-m", "edge_agent.camera", *sys.argv[1:]], pass_fds={fds})
print(camera.pid, flush=True)
time.sleep(600)
"""


def test_the_process_dies_with_its_parent(tmp_path):
    """Even while another process keeps the socket open, as a forked child of the supervisor could."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, closing(Slot.create()) as slot:
        fds = (slot.fd, slot.wake_fd, theirs.fileno())
        command = [sys.executable, "-c", PARENT.format(fds=fds), *arguments_of(fds)]
        parent = subprocess.Popen(command, pass_fds=fds, env=ENV, stdout=subprocess.PIPE, text=True)
        pid = int(parent.stdout.readline())
        ours.send(encode(CameraConfig(source=str(counting_video(tmp_path / "v.avi", 10)), realtime=False)))
        ours.settimeout(HANG_S)
        assert isinstance(decode_camera_event(ours.recv(65536)), CameraOpened)
        parent.kill()
        wait_until(lambda: has_ended(pid))
        parent.wait()
        parent.stdout.close()


def test_the_process_refuses_an_unknown_configuration(slot):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        fds = (slot.fd, slot.wake_fd, theirs.fileno())
        ours.send(msgspec.msgpack.encode({"source": "x", "sauce": 1}))
        command = [sys.executable, "-m", "edge_agent.camera", *arguments_of(fds)]
        done = subprocess.run(command, pass_fds=fds, env=ENV, stderr=subprocess.PIPE, timeout=HANG_S)
        assert done.returncode == 1 and b"unknown field `sauce`" in done.stderr


# -- the probe --------------------------------------------------------------------------------------------------------


def test_the_probe_returns_size_and_rate(clock, tmp_path):
    assert (
        probe(CameraConfig(source=str(counting_video(tmp_path / "v.avi", 3))), clock=clock).line == "160x120 at 30 fps"
    )
    with pytest.raises(SourceError, match=r"absent: /dev/video97: No such file or directory"):
        probe(CameraConfig(source="97"), clock=clock)


def test_the_probe_waits_for_a_pusher_until_its_timeout(tmp_path):
    """Two stalls of two seconds are reported before three seconds are over; then a frame comes, or the probe ends."""
    config = CameraConfig(source=f"zmq:ipc://{tmp_path}/frames")
    clock = FakeClock(step_ns=500_000_000)
    with pytest.raises(SourceError, match="stalled"):
        probe(config, timeout_s=3, clock=clock)
    assert clock.time_ns > 1003 * 10**9
    clock.step_ns = 0
    pusher = Pusher(tmp_path / "frames", clock)
    with closing(pusher.socket):
        pusher.send(1)
        assert probe(config, clock=clock).line == "20x12"


def test_the_probe_as_a_command(tmp_path):
    def run_probe(source: object) -> subprocess.CompletedProcess:
        config = msgspec.json.encode(CameraConfig(source=str(source)))
        command = [sys.executable, "-m", "edge_agent.camera", "--probe", "10"]
        return subprocess.run(command, input=config, env=ENV, capture_output=True, timeout=HANG_S)

    found = run_probe(counting_video(tmp_path / "v.avi", 3))
    assert found.returncode == 0 and found.stdout.count(b"\n") == 1
    assert msgspec.json.decode(found.stdout) == {"line": "160x120 at 30 fps", "clock": "arrival", "formats": []}
    absent = run_probe(tmp_path / "none.mp4")
    assert absent.returncode == 1 and absent.stderr.startswith(b"absent: ") and absent.stderr.count(b"\n") == 1


def device_of(images: list[int], capture_clock: str = "arrival"):
    """A device that gives an image of each grey level, one every 20 ms, then the last one again and again."""

    def device(config, slot, clock):
        for grey in itertools.chain(images, itertools.repeat(images[-1])):
            clock.advance(0.02)
            image = slot.write(8, 8)
            image[:] = grey
            yield CapturedFrame(image, clock.now_ns(), capture_clock, 30.0, remark="a remark")

    return device


@pytest.mark.parametrize(
    ("images", "config", "capture_clock", "looked_s"),
    [
        ([1, 2], {}, "arrival", 0.04),
        ([1] * 20 + [2], {}, "arrival", 0.42),
        ([1], {"identical_frames_s": 0}, "arrival", 5.0),
        ([1], {}, "driver", 5.0),
        ([1], {"identical_frames_s": 60}, "arrival", 5.0),
    ],
    ids=["moving", "still at first", "allowed for ever", "proven by stamps", "allowed for a minute"],
)
def test_the_probe_looks_until_an_image_differs(clock, monkeypatch, images, config, capture_clock, looked_s):
    monkeypatch.setitem(SOURCES, "v4l2", device_of(images, capture_clock))
    start_ns = clock.time_ns
    assert probe(CameraConfig(source="0", **config), clock=clock) == ("8x8 at 30 fps (a remark)", capture_clock)
    assert (clock.time_ns - start_ns) / 1e9 == pytest.approx(looked_s, abs=0.05)


def test_the_probe_finds_a_device_that_shows_the_same_image(clock, monkeypatch):
    """The fault that the daemon would have after a second, with the key that allows a still picture."""
    monkeypatch.setitem(SOURCES, "v4l2", device_of([1]))
    with pytest.raises(SourceError, match=r"frozen: the same 8x8 image .* camera\.identical_frames_s") as caught:
        probe(CameraConfig(source="0"), clock=clock)
    assert caught.value.reason == "frozen"


def test_the_probe_says_the_true_rate_of_a_recording(clock, tmp_path):
    path = counting_mkv(tmp_path / "v.mkv", [100 * k for k in range(10)], header_fps=1000)
    assert probe(CameraConfig(source=str(path)), clock=clock).line == "64x48 at 10 fps"


# -- what goes to the supervisor --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "detail", ["x" * 10**6, "\udcfc.jpg", "\ud800", "ü" * 10**6], ids=["long", "Latin-1", "lone", "wide"]
)
@pytest.mark.parametrize("is_end", [False, True])
def test_any_detail_of_a_fault_fits_into_an_event(slot, clock, monkeypatch, detail, is_end):
    def device(config, slot, clock):
        error = SourceError("unreadable", detail, "source-file")
        if is_end:
            raise error
        yield CameraFault(error.reason, error.detail)

    monkeypatch.setitem(SOURCES, "v4l2", device)
    events = []
    run(CameraConfig(source="0"), slot, lambda event: events.append(encode(event)), clock)
    assert decode_camera_event(events[0]).reason == "unreadable" and len(events[0]) < 10_000


@pytest.mark.parametrize("source", ["a\0b.mp4", "/dev/video\0", "zmq:ipc:///a\0b"])
def test_a_source_with_a_zero_character_is_a_permanent_error(slot, clock, source):
    events = []
    assert run(CameraConfig(source=source), slot, events.append, clock) == os.EX_CONFIG
    assert "zero character" in events[0].detail
