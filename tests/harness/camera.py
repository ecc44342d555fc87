"""For tests of the camera: a clock that the test moves, a camera process, and the files and sockets that feed it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import zmq

from edge_agent.camera.clock import Clock
from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraEvent, decode_camera_event
from edge_agent.ipc.frame_slot import Frame, Slot
from edge_agent.time_units import NS_PER_S
from edge_agent.wire.codec import encode
from edge_agent.wire.pushed_frame import pack_pushed_frame
from tests.harness import ROOT

ENV = os.environ | {"PYTHONPATH": str(ROOT)}
HANG_S = 60.0  # a test that waits longer than this has failed; no test asserts on less


class FakeClock(Clock):
    """Moves when the camera sleeps, by advance(), and by step_ns each time it is read. Real time plays no part."""

    def __init__(self, step_ns: int = 0, on_sleep: Callable[[], object] = lambda: None) -> None:
        self.time_ns, self.step_ns, self.on_sleep = 1000 * NS_PER_S, step_ns, on_sleep
        self.pauses_s: list[float] = []

    def now_ns(self) -> int:
        self.time_ns += self.step_ns
        return self.time_ns

    def sleep_until(self, wake_ns: int) -> None:
        self.pauses_s.append(max(0, wake_ns - self.time_ns) / NS_PER_S)
        self.time_ns = max(self.time_ns, wake_ns)
        self.on_sleep()

    def advance(self, duration_s: float) -> None:
        self.time_ns += round(duration_s * NS_PER_S)


class CameraProcess:
    """The supervisor's side: a slot, the events socket, and a camera process that can be killed and started again."""

    def __init__(self, source: object, env: dict[str, str] | None = None, **config: object) -> None:
        self.config = CameraConfig(source=str(source), **config)
        self.env = ENV | (env or {})
        self.slot = Slot.create()
        self.seq = 0  # of the last frame that frame() returned
        self.start()

    def start(self) -> None:
        self.events, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.events.settimeout(HANG_S)
        fds = (self.slot.fd, self.slot.wake_fd, theirs.fileno())
        command = [sys.executable, "-m", "edge_agent.camera", *arguments_of(fds)]
        self.process = subprocess.Popen(command, pass_fds=fds, env=self.env, stderr=subprocess.PIPE)
        theirs.close()
        self.events.send(encode(self.config))

    def event(self) -> CameraEvent:
        return decode_camera_event(self.events.recv(65536))

    def remaining_events(self) -> list[CameraEvent]:
        """The events still in the socket of a process that has ended."""
        events = []
        while data := self.events.recv(65536):
            events.append(decode_camera_event(data))
        return events

    def frame(self) -> Frame:
        """The newest frame that was not returned before; its image is a copy, checked to be whole."""
        end_s = time.monotonic() + HANG_S
        while time.monotonic() < end_s:
            frame = self.frame_or_none()
            if frame is not None:
                return frame
            self.slot.wait(0.2)
        raise AssertionError("no frame came")

    def frame_or_none(self) -> Frame | None:
        frame = self.slot.take_newest(self.seq)
        if frame is None:
            return None
        self.seq = frame.seq
        frame = frame._replace(image=frame.image.copy())
        return frame if self.slot.was_not_overwritten(frame) else None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        self.events.close()

    def close(self) -> None:
        self.kill()
        self.slot.close()


@contextlib.contextmanager
def camera_processes() -> Iterator[Callable[..., CameraProcess]]:
    """start(source, **config) starts a camera process; all of them end with the block."""
    processes: list[CameraProcess] = []

    def start(source: object, **config: object) -> CameraProcess:
        processes.append(CameraProcess(source, **config))
        return processes[-1]

    try:
        yield start
    finally:
        for process in processes:
            process.close()


def arguments_of(fds: tuple[int, int, int]) -> list[str]:
    """The command line of a child process for its slot, wake-up and events descriptors."""
    return [str(word) for pair in zip(("--slot", "--wake", "--events"), fds, strict=True) for word in pair]


def wait_until(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.01)


def has_ended(pid: int) -> bool:
    """Whether a process, which need not be our child, has ended. A zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# -- files ------------------------------------------------------------------------------------------------------------


def counting_video(path: Path, n_frames: int, fps: float = 30) -> Path:
    """Frame k has grey level 4k; 64 frames at most."""
    out = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), fps, (160, 120))
    for k in range(n_frames):
        out.write(np.full((120, 160, 3), 4 * k, np.uint8))
    out.release()
    return path


def number_of(image: np.ndarray) -> int:
    """The number of a frame of counting_video()."""
    return round(float(image.mean()) / 4)


def photograph(name: str = "astronaut") -> np.ndarray:
    """(H, W, 3) uint8, RGB."""
    photographs = pytest.importorskip("skimage.data", reason="scikit-image's photographs are not installed")
    return getattr(photographs, name)()


# -- pushed frames ----------------------------------------------------------------------------------------------------


class Pusher:
    """The process that owns the camera, with this clock."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.clock = clock
        self.socket = zmq.Context.instance().socket(zmq.PUSH)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDTIMEO, round(HANG_S * 1000))
        self.socket.connect(f"ipc://{path}")

    def send(self, frame_id: int, t_capture_ns: int | None = None, image=None, **changed) -> int:
        """Push a grey frame of 20x12 pixels, or `image`, with some fields changed. Returns its stamp."""
        stamp_ns = self.clock.now_ns() if t_capture_ns is None else t_capture_ns
        image = np.full((12, 20, 3), frame_id % 256, np.uint8) if image is None else image
        fields = {"width": image.shape[1], "height": image.shape[0], "format": "rgb8", "data": image.tobytes()}
        self.socket.send(pack_pushed_frame(frame_id, stamp_ns, **(fields | changed)))
        return stamp_ns


# -- GStreamer --------------------------------------------------------------------------------------------------------

GST_LAUNCH = r'''#!{python} -SE
"""In the place of gst-launch-1.0: the first word of the pipeline says what this program does."""
import os, re, sys, time
text = " ".join(sys.argv[1:])
behaviour = sys.argv[2]
fd = int(re.search(r"fdsink fd=(\d+)", text)[1])
size = int(re.search(r"width=(\d+)", text)[1]) * int(re.search(r"height=(\d+)", text)[1]) * 3
def frames(make):
    k = 0
    while True:
        data = make(k)
        while data:
            data = data[os.write(fd, data):]
        k += 1
if behaviour == "noise":
    frames(lambda k: os.urandom(size))
elif behaviour == "prints":
    def make(k):
        print("a line on standard output", flush=True)
        return b"\xff" * size
    frames(make)
elif behaviour == "five-frames":
    frames(lambda k: os.urandom(size) if k < 5 else sys.exit("five frames are enough"))
elif behaviour == "closes-its-log":
    os.close(1)
    os.close(2)
    frames(lambda k: os.urandom(size) if k < 5 else os._exit(0))
elif behaviour == "says":
    sys.exit(sys.argv[3])
elif behaviour == "says-locale":
    sys.exit("the locale is " + os.environ["LC_ALL"])
elif behaviour == "silent":
    time.sleep(600)
elif behaviour == "one-frame":
    frames(lambda k: os.urandom(size) if k < 1 else time.sleep(600))
sys.exit("no such element: " + behaviour)
'''


def install_fake_gstreamer(folder: Path) -> dict[str, str]:
    """Write the program into `folder`; returns the environment that finds it."""
    program = folder / "gst-launch-1.0"
    program.write_text(re.sub(r"\{python\}", sys.executable, GST_LAUNCH, count=1))
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}
