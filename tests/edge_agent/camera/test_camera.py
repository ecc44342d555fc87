"""The camera process through its front door: real child processes, videos, images, pushers and pipelines.

Only V4L2 has a stand-in, for want of a device: a small class in the place of cv2.VideoCapture.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.camera import files, process, source
from edge_agent.camera.pushed import check_pushed_frame, read_pushed_frames
from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraEnded, CameraFault, CameraOpened, decode_camera_event
from edge_agent.ipc.frame_slot import Slot
from edge_agent.wire.codec import encode
from edge_agent.wire.pushed_frame import pack_pushed_frame
from tests.harness import ROOT

ENV = os.environ | {"PYTHONPATH": str(ROOT)}
needs_gst = pytest.mark.skipif(shutil.which("gst-launch-1.0") is None, reason="gst-launch-1.0 is not installed")


class Rig:
    """The supervisor's side: a slot, the events socket, and a camera process that can be killed and started again."""

    def __init__(self, source: object, **config):
        self.config = CameraConfig(source=str(source), **config)
        self.slot = Slot.create()
        self.seq = 0
        self.start()

    def start(self) -> None:
        self.events, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = (self.slot.fd, self.slot.wake_fd, there.fileno())
        command = [sys.executable, "-m", "edge_agent.camera", "--slot", fds[0], "--wake", fds[1], "--events", fds[2]]
        self.process = subprocess.Popen([str(c) for c in command], pass_fds=fds, env=ENV, stderr=subprocess.PIPE)
        there.close()
        self.events.send(encode(self.config))

    def event(self, timeout_s: float = 10):
        self.events.settimeout(timeout_s)
        return decode_camera_event(self.events.recv(65536))

    def events_for(self, time_s: float) -> list:
        end_s, events = time.monotonic() + time_s, []
        while (left_s := end_s - time.monotonic()) > 0:
            try:
                events.append(self.event(left_s))
            except TimeoutError:
                break
        return events

    def frame(self):
        frame = self.frame_within(10)
        assert frame is not None, "no frame came"
        return frame

    def frame_within(self, time_s: float):
        """The newest frame not seen yet, or None; its image is a copy, checked to be whole."""
        end_s = time.monotonic() + time_s
        while (left_s := end_s - time.monotonic()) > 0:
            frame = self.slot.take_newest(self.seq)
            if frame is None:
                self.slot.wait(left_s)
                continue
            self.seq = frame.seq
            frame = frame._replace(image=frame.image.copy())
            if self.slot.was_not_overwritten(frame):
                return frame
        return None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        self.events.close()

    def close(self) -> None:
        self.kill()
        self.slot.close()


@pytest.fixture
def rig():
    """rig(source, **config) starts a camera process; all end with the test."""
    rigs = []

    def start(source, **config):
        rigs.append(Rig(source, **config))
        return rigs[-1]

    yield start
    for one in rigs:
        one.close()


def gone(pid: int, within_s: float = 1.0) -> bool:
    """Whether a process that need not be our child has ended (a zombie has)."""
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


def number_of(image: np.ndarray) -> int:
    """Which frame of counting_video() this is: its grey says so."""
    return round(float(image.mean()) / 4)


def counting_video(path: Path, n_frames: int, fps: float = 30) -> Path:
    """Frame k is grey level 4k, for up to 64 frames."""
    out = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), fps, (160, 120))
    for k in range(n_frames):
        out.write(np.full((120, 160, 3), 4 * k, np.uint8))
    out.release()
    return path


def photograph(name: str = "astronaut") -> np.ndarray:
    skimage_data = pytest.importorskip("skimage.data", reason="scikit-image's photographs are not installed")
    return getattr(skimage_data, name)()  # (H, W, 3) uint8, RGB


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_every_frame_of_a_video_arrives_once(rig, tmp_path):
    """As fast as they are taken, by a reader who is slow now and then."""
    one = rig(counting_video(tmp_path / "v.avi", 30), realtime=False, loop=False)
    frames = []
    for _ in range(30):
        frames.append(one.frame())
        time.sleep(0.02 if len(frames) % 7 == 0 else 0)
    assert [number_of(f.image) for f in frames] == list(range(30))
    assert [f.seq for f in frames] == [f.frame_id for f in frames] == list(range(1, 31))
    opened = one.event()
    assert opened == CameraOpened(160, 120, 30.0, f"video {one.config.source}")
    assert one.slot.take_newest(one.seq) is None  # done with the last one
    assert one.event() == CameraEnded() and one.process.wait(5) == 0
    assert all(a.t_capture_ns < b.t_capture_ns for a, b in itertools.pairwise(frames))
    assert frames[-1].t_capture_ns < time.monotonic_ns() and {f.capture_clock for f in frames} == {"arrival"}


def test_the_last_frame_is_not_ended_before_it_was_seen(rig, tmp_path):
    one = rig(counting_video(tmp_path / "v.avi", 2), realtime=False, loop=False)
    assert number_of(one.frame().image) == 0 and number_of(one.frame().image) == 1
    assert [type(e) for e in one.events_for(0.3)] == [CameraOpened]


def test_a_video_in_real_time_keeps_its_rate_and_the_newest_frame_wins(rig, tmp_path):
    one = rig(counting_video(tmp_path / "v.avi", 30, fps=15), loop=False)
    frames = []
    while len(frames) < 7:
        frames.append(one.frame())
        time.sleep(0.2)  # a model at 5 Hz
    for before, after in itertools.pairwise(frames):
        n_dropped = after.seq - before.seq - 1
        assert n_dropped == number_of(after.image) - number_of(before.image) - 1 >= 2
        assert abs((after.t_capture_ns - before.t_capture_ns) * 15e-9 - n_dropped - 1) < 0.9  # of a busy machine
    assert [type(one.event()) for _ in range(2)] == [CameraOpened, CameraEnded]
    last = one.slot.peek(0)
    assert last.seq == 30 and abs((last.t_capture_ns - frames[0].t_capture_ns) * 15e-9 - (30 - frames[0].seq)) < 0.9


def test_a_video_that_fell_behind_catches_up(rig, tmp_path):
    one = rig(counting_video(tmp_path / "v.avi", 64), loop=False)
    before = one.frame()
    os.kill(one.process.pid, signal.SIGSTOP)
    time.sleep(0.8)
    while one.frame_within(0.001):
        pass
    stopped_seq = one.seq
    os.kill(one.process.pid, signal.SIGCONT)
    after = one.frame()
    passed = number_of(after.image) - number_of(before.image)
    elapsed = (after.t_capture_ns - before.t_capture_ns) * 30e-9
    assert abs(passed - elapsed) < 3 and elapsed > 20
    assert after.seq - stopped_seq <= 2  # what was passed over was never published


def test_catching_up_ends_where_decoding_is_slower_than_the_video(monkeypatch):
    """After a second's worth of frames passed over, one has to be shown."""
    now_ns, n_grabbed = 0, 0

    class SlowCapture:
        def grab(self):
            nonlocal now_ns, n_grabbed
            now_ns, n_grabbed = now_ns + 30_000_000, n_grabbed + 1
            return n_grabbed < 1000

    monkeypatch.setattr("time.monotonic_ns", lambda: now_ns)
    now_ns = 100_000_000
    due_ns = files.catch_up(SlowCapture(), 0, 20_000_000)
    assert n_grabbed == 50 and due_ns == now_ns


def test_a_video_loops(rig, tmp_path):
    one = rig(counting_video(tmp_path / "v.avi", 3), realtime=False)
    assert [number_of(one.frame().image) for _ in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]


def test_frame_ids_and_seq_go_on_after_kill_9(rig, tmp_path):
    one = rig(counting_video(tmp_path / "v.avi", 10), realtime=False)
    before = [one.frame() for _ in range(4)][-1]
    one.kill()
    last = one.slot.peek(0)
    one.start()
    after = [one.frame() for _ in range(4)][-1]
    assert (before.seq, before.frame_id) == (4, 4) and (after.seq, after.frame_id) == (8, 8)
    assert last.frame_id == 4 and number_of(after.image) == 3


def test_the_colours_of_a_photograph_are_right(rig, tmp_path):
    """PNG loses nothing: what scikit-image reads and what lies in the slot must be equal, byte for byte."""
    rgb = photograph()
    cv2.imwrite(str(tmp_path / "a.png"), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    frame = rig(tmp_path).frame()
    assert frame.image.flags.c_contiguous and np.array_equal(frame.image, rgb)


def test_a_folder_is_played_in_the_order_of_its_names(rig, tmp_path):
    for name, grey in (("c.bmp", 30), ("a.png", 10), ("B.PNG", 5), ("b.webp", 20), ("d.jpg", 40)):
        cv2.imwrite(str(tmp_path / name), np.full((20, 30, 3), grey, np.uint8))
    (tmp_path / "notes.txt").write_text("not an image")
    one = rig(tmp_path, realtime=False, loop=False)
    assert [round(float(one.frame().image.mean())) for _ in range(5)] == [5, 10, 20, 30, 40]
    assert one.frame_within(0.05) is None
    assert one.event() == CameraOpened(30, 20, None, f"folder {tmp_path}") and one.event() == CameraEnded()


def test_a_folder_in_real_time_has_the_rate_asked_for(rig, tmp_path):
    for k in range(3):
        cv2.imwrite(str(tmp_path / f"{k}.png"), np.full((20, 30, 3), k, np.uint8))
    one = rig(tmp_path, fps=20)
    stamps_s = [one.frame().t_capture_ns / 1e9 for _ in range(16)]
    assert abs((stamps_s[-1] - stamps_s[0]) / 15 - 0.05) < 0.015
    assert one.event().fps == 20


def test_a_corrupt_image_is_named_once_and_passed_over(rig, tmp_path):
    for name, grey in (("a.png", 10), ("c.png", 30)):
        cv2.imwrite(str(tmp_path / name), np.full((20, 30, 3), grey, np.uint8))
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    one = rig(tmp_path, realtime=False)
    assert [round(float(one.frame().image.mean())) for _ in range(6)] == [10, 30] * 3
    faults = [e for e in one.events_for(0.3) if isinstance(e, CameraFault)]
    assert [(f.reason, str(tmp_path / "b.png") in f.detail) for f in faults] == [("unreadable", True)]


def test_images_of_changing_size_are_announced(rig, tmp_path):
    for name, width in (("a.png", 30), ("b.png", 50), ("c.png", 50)):
        cv2.imwrite(str(tmp_path / name), np.zeros((20, width, 3), np.uint8))
    one = rig(tmp_path, realtime=False, loop=False)
    assert [one.frame().image.shape for _ in range(3)] == [(20, 30, 3), (20, 50, 3), (20, 50, 3)]
    assert [(e.width, e.height) for e in (one.event(), one.event())] == [(30, 20), (50, 20)]


def write_corrupt_video(path: Path) -> Path:
    path.write_bytes(os.urandom(20000))
    return path


def empty_folder(path: Path) -> Path:
    path.mkdir()
    return path


def folder_of_rubbish(path: Path) -> Path:
    path.mkdir()
    (path / "a.jpg").write_bytes(b"\xff\xd8\xff rubbish")
    return path


@pytest.mark.parametrize(
    ("source", "reason", "said"),
    [
        (lambda tmp: tmp / "nowhere.mp4", "absent", "nowhere.mp4: no such file or folder"),
        (lambda tmp: write_corrupt_video(tmp / "broken.mp4"), "unreadable", "broken.mp4: no frame in it"),
        (lambda tmp: empty_folder(tmp / "empty"), "absent", "empty: no image in this folder"),
        (lambda tmp: folder_of_rubbish(tmp / "rubbish"), "unreadable", "rubbish: none of the 1 images"),
        (lambda tmp: "rtsp://10.0.0.1/stream", "absent", "rtsp://10.0.0.1/stream: expected"),
        (lambda tmp: "zmq:tcp://*:5555", "unreadable", "zmq:tcp://*:5555: expected zmq:ipc:///absolute/path"),
        (lambda tmp: "gst:videotestsrc", "unreadable", "camera.width and camera.height"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_cannot_heal_is_named_and_ends_the_process(rig, tmp_path, source, reason, said):
    one = rig(source(tmp_path))
    events = [one.event()]
    assert one.process.wait(10) == os.EX_CONFIG
    events += one_by_one(one)
    assert events[-1].reason == reason and said in events[-1].detail, events
    assert one.slot.latest_seq == 0
    if (cv2.getVersionMajor(), cv2.getVersionMinor()) >= (4, 8):  # older ones cannot silence FFmpeg
        assert one.process.stderr.read() == b""


def one_by_one(one: Rig) -> list:
    """The events still in the socket of a camera process that has ended."""
    events = []
    while data := one.events.recv(65536):
        events.append(decode_camera_event(data))
    return events


def test_a_playlist_in_a_file_reaches_no_network(rig, tmp_path):
    """FFmpeg follows playlists, but from a file to files only, unless somebody sets its protocol_whitelist."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        (tmp_path / "v.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n")
        one = rig(tmp_path / "v.m3u8")
        assert one.event().reason == "unreadable"
        with pytest.raises(TimeoutError):
            server.accept()


# ---------------------------------------------------------------------------------------------------------------------
# Life and death


def test_the_process_ends_when_the_supervisor_closes_its_socket(rig, tmp_path):
    one = rig(counting_video(tmp_path / "v.avi", 10), realtime=False)  # waits for a reader who never comes
    assert isinstance(one.event(), CameraOpened)
    one.process.send_signal(signal.SIGINT)  # Ctrl-C reaches the whole group; it is the supervisor's to act on
    time.sleep(0.05)
    assert one.process.poll() is None
    one.events.close()
    assert one.process.wait(1) == 0


PARENT = """
import subprocess, sys, time
camera = subprocess.Popen([sys.executable, "-m", "edge_agent.camera", *sys.argv[1:]], pass_fds={fds})
print(camera.pid, flush=True)
time.sleep(60)
"""


def test_the_process_dies_with_its_parent(tmp_path):
    """Even while somebody else keeps the socket open, as a forked child of the supervisor would."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, closing(Slot.create()) as slot:
        fds = (slot.fd, slot.wake_fd, there.fileno())
        names = ("--slot", "--wake", "--events")
        arguments = [str(word) for pair in zip(names, fds, strict=True) for word in pair]
        command = [sys.executable, "-c", PARENT.format(fds=fds), *arguments]
        parent = subprocess.Popen(command, pass_fds=fds, env=ENV, stdout=subprocess.PIPE, text=True)
        pid = int(parent.stdout.readline())
        here.send(encode(CameraConfig(source=str(counting_video(tmp_path / "v.avi", 10)), realtime=False)))
        here.settimeout(10)
        assert isinstance(decode_camera_event(here.recv(65536)), CameraOpened)
        parent.kill()
        assert gone(pid)
        parent.wait()
        parent.stdout.close()


def test_an_absent_device_is_named_and_waited_for(rig):
    """With growing pauses, by a process that stays: the camera may come."""
    one = rig("/dev/video97")
    faults = [one.event()]
    begin_s = time.monotonic()
    faults += [one.event() for _ in range(2)]
    assert {(f.reason, f.detail) for f in faults} == {("absent", "/dev/video97: No such file or directory")}
    assert 1.4 < time.monotonic() - begin_s < 3 and one.process.poll() is None


def test_a_device_that_is_no_camera_is_unreadable(rig):
    fault = rig("v4l2:/dev/null").event()
    assert fault.reason == "unreadable" and fault.detail.startswith("/dev/null: opens, but is no V4L2 camera")


# ---------------------------------------------------------------------------------------------------------------------
# GStreamer


@needs_gst
def test_gst_frames_arrive_in_colour_and_at_their_rate(rig):
    one = rig("gst:videotestsrc is-live=true pattern=red", width=320, height=240, fps=30)
    first = one.frame()
    assert (first.image.reshape(-1, 3).mean(0) > [245, -1, -1]).all() and first.image[:, :, 1:].max() < 10
    assert first.image.shape == (240, 320, 3)
    frames = [one.frame() for _ in range(15)]
    rate_hz = 1e9 * (frames[-1].seq - first.seq) / (frames[-1].t_capture_ns - first.t_capture_ns)
    assert 26 < rate_hz < 34
    assert (one.event().width, frames[0].capture_clock) == (320, "arrival")


@needs_gst
def test_gst_prints_on_stdout_do_not_enter_the_picture(rig):
    """nvarguscamerasrc prints there; fakesink's messages with -v would, too."""
    one = rig("gst:videotestsrc is-live=true pattern=white ! identity dump=true", width=16, height=8)
    assert all((one.frame().image > 240).all() for _ in range(20))


@needs_gst
def test_a_frozen_device_is_found_and_stays_found(rig):
    """Black test pictures are all alike. After the fault nothing is published, not even when it is opened again."""
    one = rig("gst:videotestsrc is-live=true pattern=black", width=320, height=240, fps=60)
    first = one.frame()
    events = one.events_for(2.4)
    assert [type(e) for e in events[:2]] == [CameraOpened, CameraFault]
    faults = [e for e in events if isinstance(e, CameraFault)]
    assert {f.reason for f in faults} == {"frozen"} and len(faults) >= 2
    published_s = (one.slot.peek(0).t_capture_ns - first.t_capture_ns) / 1e9
    assert 0.9 < published_s < 1.5 and 30 <= one.slot.latest_seq < 90


@needs_gst
def test_a_static_scene_with_noise_is_not_frozen(rig):
    """The colour bars stand still but for a patch of snow."""
    one = rig("gst:videotestsrc is-live=true pattern=smpte", width=640, height=480, fps=60)
    one.frame()
    assert [type(e) for e in one.events_for(1.5)] == [CameraOpened] and one.slot.latest_seq > 40


@needs_gst
def test_a_pipeline_that_fails_says_why_and_is_tried_again(rig):
    one = rig("gst:videotestsrc ! nosuchelement", width=320, height=240)
    faults = [one.event(), one.event()]
    assert all(f.reason == "unreadable" and "nosuchelement" in f.detail for f in faults)
    assert one.process.poll() is None


@needs_gst
def test_a_pipeline_that_stops_is_opened_again(rig):
    one = rig("gst:videotestsrc is-live=true pattern=snow num-buffers=5", width=320, height=240)
    assert isinstance(one.event(), CameraOpened)
    n_fds = len(os.listdir(f"/proc/{one.process.pid}/fd"))
    assert "the pipeline ended" in one.event().detail and isinstance(one.event(), CameraOpened)
    while one.frame().frame_id <= 5:
        pass  # until one comes from after the pause
    assert len(os.listdir(f"/proc/{one.process.pid}/fd")) == n_fds


@needs_gst
def test_the_pipeline_dies_with_the_camera_process(rig):
    one = rig("gst:videotestsrc is-live=true pattern=snow", width=320, height=240)
    one.frame()
    children = Path(f"/proc/{one.process.pid}/task/{one.process.pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGSTOP)  # nor may it be alive enough to notice a closed pipe
    one.kill()
    assert gone(int(children[0]))


@needs_gst
def test_gst_with_padded_rows_is_refused(rig):
    one = rig("gst:videotestsrc", width=642, height=480)
    assert "multiple of 4" in one.event().detail and one.process.wait(5) == os.EX_CONFIG


# ---------------------------------------------------------------------------------------------------------------------
# Pushed frames


class Pusher:
    """The process that owns the camera, or something that says so."""

    def __init__(self, path: Path):
        self.socket = zmq.Context.instance().socket(zmq.PUSH)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDTIMEO, 5000)
        self.socket.connect(f"ipc://{path}")

    def send(self, frame_id: int, t_capture_ns: int | None = None, image=None, **changed) -> int:
        stamp_ns = time.monotonic_ns() if t_capture_ns is None else t_capture_ns
        image = np.full((12, 20, 3), frame_id % 256, np.uint8) if image is None else image
        fields = {"width": image.shape[1], "height": image.shape[0], "format": "rgb8", "data": image.tobytes()}
        self.socket.send(pack_pushed_frame(frame_id, stamp_ns, **(fields | changed)))
        return stamp_ns


@pytest.fixture
def pushed(rig, tmp_path):
    one = rig(f"zmq:ipc://{tmp_path}/frames")
    pusher = Pusher(tmp_path / "frames")
    yield one, pusher
    pusher.socket.close()


def test_pushed_frames_keep_their_number_and_stamp(pushed):
    one, pusher = pushed
    for frame_id in (1000, 1001, 17):  # a pusher that starts again counts anew: its business
        stamp_ns = pusher.send(frame_id)
        frame = one.frame()
        assert (frame.frame_id, frame.t_capture_ns, frame.capture_clock) == (frame_id, stamp_ns, "sender")
        assert (frame.image == frame_id % 256).all()
    opened = one.event()
    assert (opened.width, opened.height, opened.fps) == (20, 12, None)


def test_pushed_formats(pushed):
    one, pusher = pushed
    rgb = np.random.default_rng(1).integers(0, 256, (33, 47, 3), np.uint8)
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    size = {"width": 47, "height": 33}
    pusher.send(1, **size, format="rgb8", data=rgb.tobytes())
    assert np.array_equal(one.frame().image, rgb)
    pusher.send(2, **size, format="bgr8", data=bgr.tobytes())
    assert np.array_equal(one.frame().image, rgb)
    pusher.send(3, **size, format="gray8", data=rgb[:, :, 0].tobytes())
    assert np.array_equal(one.frame().image, np.repeat(rgb[:, :, :1], 3, axis=2))
    photo = photograph()
    jpeg = cv2.imencode(".jpg", cv2.cvtColor(photo, cv2.COLOR_RGB2BGR))[1].tobytes()
    pusher.send(4, width=photo.shape[1], height=photo.shape[0], format="jpeg", data=jpeg)
    assert np.abs(one.frame().image.astype(int) - photo).mean() < 4


def test_the_newest_pushed_frame_wins(pushed):
    one, pusher = pushed
    pusher.send(1)
    one.frame()
    os.kill(one.process.pid, signal.SIGSTOP)
    for frame_id in range(2, 30):
        pusher.send(frame_id)
        time.sleep(0.002)
    os.kill(one.process.pid, signal.SIGCONT)
    last = None
    while frame := one.frame_within(0.3):
        last = frame
    assert last.frame_id == 29 and one.slot.latest_seq < 28  # of what waited some was passed over; how much is chance


PNG = cv2.imencode(".png", np.zeros((12, 20, 3), np.uint8))[1].tobytes()
JPEG = cv2.imencode(".jpg", np.zeros((12, 20, 3), np.uint8))[1].tobytes()


@pytest.mark.parametrize(
    ("stamp_ms", "changed", "reason", "said"),
    [
        (50, {}, "clock", "stamped -"),
        (-1500, {}, "clock", "ms ago"),
        (-29000, {}, "clock", "ms ago"),
        (-300, {}, "clock", "before the one before"),
        (0, {"width": 21}, "unreadable", "21x12 rgb8 is 756 bytes, found 720"),
        (0, {"data": b""}, "unreadable", "found 0"),
        (0, {"width": 0}, "unreadable", "width"),
        (0, {"format": "rgba8"}, "unreadable", "format"),
        (0, {"width": 60000, "height": 60000}, "too-large", "60000x60000"),
        (0, {"format": "jpeg", "data": PNG + JPEG[-2:]}, "unreadable", "not one whole JPEG"),
        (0, {"format": "jpeg", "data": JPEG[:-20]}, "unreadable", "not one whole JPEG"),
        (0, {"format": "jpeg", "data": JPEG[:4] + JPEG[-2:]}, "unreadable", "expected 20x12, found 0x0"),
        (0, {"format": "jpeg", "data": JPEG, "width": 40}, "unreadable", "expected 40x12, found 20x12"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_refused_message_is_named_and_harms_nothing(tmp_path, stamp_ms, changed, reason, said):
    """In this process, through the real socket: what a child does with it is the same code."""
    with closing(Slot.create()) as slot:
        source = read_pushed_frames(CameraConfig(source=f"zmq:ipc://{tmp_path}/f"), slot)
        pusher = Pusher(tmp_path / "f")
        with closing(source), closing(pusher.socket):

            def answer(frame_id: int, stamp_ms: float = 0, **changed):
                pusher.send(frame_id, time.monotonic_ns() + round(stamp_ms * 1e6), **changed)
                return next(source)

            assert answer(1).frame_id == 1
            fault = answer(2, stamp_ms, **changed)
            assert isinstance(fault, CameraFault) and fault.reason == reason and said in fault.detail, fault
            assert answer(3).frame_id == 3


def test_garbage_is_counted_and_told_once_a_second(pushed):
    one, pusher = pushed
    pusher.socket.send(b"F\xc1 garbage")
    assert one.event().reason == "unreadable"
    begin_s = time.monotonic()
    while time.monotonic() - begin_s < 1.8:
        pusher.socket.send(b"F\xc1 garbage")
        pusher.socket.send(b"A" + pack_pushed_frame(9, time.monotonic_ns(), 2, 1, "rgb8", b"abcdef")[1:])
        pusher.socket.send_multipart([b"F", b"two parts"])
        time.sleep(0.005)
    faults = one.events_for(0.3)
    assert 1 <= len(faults) <= 2 and {f.reason for f in faults} == {"unreadable"}
    assert int(faults[0].detail.split(": ")[1].split()[0]) > 20 and one.slot.latest_seq == 0
    pusher.send(1)
    assert one.frame().frame_id == 1


@given(st.binary(max_size=200), st.booleans())
@settings(deadline=None)  # a busy machine is no finding
def test_no_message_raises_anything_but_a_refusal(data, cut):
    good = pack_pushed_frame(1, 10**9, 2, 1, "rgb8", b"abcdef")
    message = good[: len(data)] + data if cut else b"F" + data
    try:
        frame = check_pushed_frame(memoryview(message), 0, 10**9 + 5)
    except source.SourceError as broken:
        assert broken.reason in ("unreadable", "clock", "too-large")
    else:
        assert len(frame.data) == frame.width * frame.height * 3 or frame.format != "rgb8"


def test_a_silent_pusher_has_stalled_and_may_come_back(pushed):
    one, pusher = pushed
    fault = one.event()
    assert fault.reason == "stalled" and "no frame pushed for 2 s" in fault.detail
    pusher.send(1)
    assert one.frame().frame_id == 1


def test_a_second_camera_process_does_not_take_the_frames(rig, pushed):
    one, pusher = pushed
    pusher.send(1)
    assert one.frame().frame_id == 1
    second = rig(one.config.source)
    assert second.event().reason == "busy"
    pusher.send(2)
    assert one.frame().frame_id == 2
    one.kill()  # and when the first is gone, the second has it
    for frame_id in range(3, 100):
        pusher.send(frame_id)
        if second.frame_within(0.05):
            break
    assert second.seq and second.slot.peek(0).frame_id >= 3


def test_an_old_frame_is_not_new_again_after_a_restart(pushed):
    one, pusher = pushed
    stamp_ns = pusher.send(5)
    assert one.frame().frame_id == 5
    one.kill()
    one.start()
    time.sleep(0.6)
    pusher.send(5, stamp_ns)
    fault = one.event()
    assert fault.reason == "clock" and one.slot.latest_seq == 1


# ---------------------------------------------------------------------------------------------------------------------
# V4L2, with a stand-in for the device


class FakeCapture:
    """In the place of cv2.VideoCapture: hands out the images it is given, with the driver's stamp, then nothing."""

    def __init__(self, images, stamp_ms=lambda now_ms: 0.0):
        self.images = iter(images)
        self.stamp_ms = stamp_ms
        self.wishes = {}
        self.released = False

    def isOpened(self):
        return True

    def set(self, wish, value):
        self.wishes[wish] = value

    def get(self, what):
        return 30.0 if what == cv2.CAP_PROP_FPS else self.stamp_ms(time.monotonic() * 1000)

    def grab(self):
        self.image = next(self.images, None)
        return self.image is not None

    def retrieve(self, image=None):
        return (False, None) if isinstance(self.image, str) else (True, self.image)

    def release(self):
        self.released = True


@pytest.fixture
def device(monkeypatch):
    """device(FakeCapture) -> the items of a V4L2 source, until it breaks: (items, Broken)."""
    monkeypatch.setattr("edge_agent.camera.v4l2.check_device", lambda device: None)
    slot = Slot.create()

    def play(capture, **config):
        monkeypatch.setattr("cv2.VideoCapture", lambda *arguments: capture)
        items, broken = [], None
        try:
            for item in process.open_source(CameraConfig(source="/dev/video0", **config), slot):
                items.append(item)
                if isinstance(item, source.CapturedFrame):
                    slot.publish(1, item.t_capture_ns, item.capture_clock)
        except source.SourceError as caught:
            broken = caught
        assert capture.released
        return items, broken

    yield play
    slot.close()


def noise(n_frames: int):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(n_frames)]


def test_v4l2_frames_are_rgb_and_asked_for_as_configured(device):
    images = noise(3)
    capture = FakeCapture(images)
    (opened, *captured), broken = device(capture, width=64, height=48, fps=30)
    assert opened == CameraOpened(64, 48, 30.0, "v4l2 /dev/video0")
    assert np.array_equal(captured[2].image, images[2][:, :, ::-1])
    assert (capture.wishes[cv2.CAP_PROP_FRAME_WIDTH], capture.wishes[cv2.CAP_PROP_BUFFERSIZE]) == (64, 1)
    assert broken.reason == "absent" and broken.heals  # grab() gave up, and there is no /dev/video0 here


@pytest.mark.parametrize(
    ("offset_ms", "clock"),
    [(-20, "driver"), (-999, "driver"), (-29_000, "arrival"), (40, "arrival"), (-1e9, "arrival"), (float("-inf"), "")],
)
def test_v4l2_takes_the_drivers_stamp_only_when_it_can_be_true(device, offset_ms, clock):
    begin_ns = time.monotonic_ns()
    if not clock:
        items, _ = device(FakeCapture(noise(2)))  # a driver without stamps: 0
        clock = "arrival"
    else:
        items, _ = device(FakeCapture(noise(2), lambda now_ms: now_ms + offset_ms))
    stamps_ns = [item.t_capture_ns for item in items[1:]]
    assert len(stamps_ns) == 2 and {item.capture_clock for item in items[1:]} == {clock}
    shift_ns = offset_ms * 1_000_000 if clock == "driver" else 0
    assert all(begin_ns + shift_ns - 1e5 <= stamp <= time.monotonic_ns() + shift_ns for stamp in stamps_ns)


def test_v4l2_the_same_exposure_twice_is_one_frame(device):
    stamp_ms = time.monotonic() * 1000
    items, _ = device(FakeCapture(noise(5), lambda now_ms: stamp_ms))
    assert len(items) == 2  # CameraOpened and one frame


def paced(images, period_s: float):
    for image in images:
        time.sleep(period_s)
        yield image


def test_v4l2_frozen_takes_thirty_frames_and_a_second(device):
    image = noise(1)[0]
    items, broken = device(FakeCapture(paced([image] * 400, 0.01)))
    assert broken.reason == "frozen" and 30 < len(items) < 105  # a second at 100 Hz, or less
    items, broken = device(FakeCapture(paced([image] * 400, 0.01)))
    assert broken.reason == "frozen" and items == []  # opened again and still the same


def test_v4l2_one_bit_of_noise_is_not_frozen(device):
    """The lowest bit of one row: a sensor's noise is in all of them."""
    image = noise(1)[0]

    def images():
        for k in range(130):
            image[0, :, 0] ^= k & 1
            yield image.copy()

    items, broken = device(FakeCapture(paced(images(), 0.01)))
    assert broken.reason == "absent" and len(items) == 131


def test_v4l2_a_black_flash_is_not_frozen(device):
    """Fewer than thirty frames alike, however long they take."""
    image = noise(1)[0]
    items, broken = device(FakeCapture(paced([image] * 25, 0.05)))
    assert broken.reason == "absent" and len(items) == 26


def test_v4l2_buffers_without_an_image(device, monkeypatch):
    monkeypatch.setattr("edge_agent.camera.v4l2.STALL_S", 0.1)
    items, broken = device(FakeCapture(paced([*noise(1), *["bad jpeg"] * 20, *noise(1)], 0.01)))
    assert len(items) == 2 and broken.reason == "unreadable" and "no image in 0.1 s" in broken.detail


def test_v4l2_sixteen_bit_pixels_are_refused(device):
    _, broken = device(FakeCapture([np.zeros((48, 64), np.uint16)]))
    assert broken.reason == "unreadable" and "uint16" in broken.detail


def test_v4l2_a_silent_device_has_stalled(device, monkeypatch):
    monkeypatch.setattr("os.path.exists", lambda path: True)
    _, broken = device(FakeCapture([]))
    assert broken.reason == "stalled"


# ---------------------------------------------------------------------------------------------------------------------
# Probe


def test_probe_says_what_is_there(tmp_path):
    assert process.probe(CameraConfig(source=str(counting_video(tmp_path / "v.avi", 3)))) == "160x120 at 30 fps"
    with pytest.raises(source.SourceError, match=r"absent: /dev/video97: No such file or directory"):
        process.probe(CameraConfig(source="97"))


def test_probe_waits_for_a_pusher_but_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("edge_agent.camera.pushed.STALL_S", 0.1)
    config = CameraConfig(source=f"zmq:ipc://{tmp_path}/f")
    with pytest.raises(source.SourceError, match="stalled"):
        process.probe(config, timeout_s=0.25)
    pusher = Pusher(tmp_path / "f")
    late = threading.Timer(0.4, pusher.send, [1])
    late.start()
    assert process.probe(config, timeout_s=10) == "20x12"
    late.join()
    pusher.socket.close()


def test_the_process_refuses_a_configuration_it_does_not_know(rig, tmp_path):
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, closing(Slot.create()) as slot:
        fds = (slot.fd, slot.wake_fd, there.fileno())
        arguments = ["--slot", str(fds[0]), "--wake", str(fds[1]), "--events", str(fds[2])]
        here.send(msgspec.msgpack.encode({"source": "x", "sauce": 1}))
        command = [sys.executable, "-m", "edge_agent.camera", *arguments]
        done = subprocess.run(command, pass_fds=fds, env=ENV, stderr=subprocess.PIPE, timeout=10)
        assert done.returncode == 1 and b"unknown field `sauce`" in done.stderr
