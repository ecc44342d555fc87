"""Rates of the camera process in real time. Each test prints its figure before it compares it with the budget."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_agent.ipc.events import CameraFault, CameraOpened
from tests.harness.camera import CameraProcess, camera_processes, counting_video

pytestmark = pytest.mark.promise
needs_gst = pytest.mark.skipif(shutil.which("gst-launch-1.0") is None, reason="gst-launch-1.0 is not installed")


@pytest.fixture
def camera_process() -> Iterator[Callable[..., CameraProcess]]:
    with camera_processes() as start:
        yield start


def report(name: str, **figures: float) -> None:
    print(json.dumps({"promise": name} | {key: round(value, 3) for key, value in figures.items()}))


def rate_hz(camera: CameraProcess, n_frames: int) -> float:
    """Published frames per second, from the stamps of two frames about n_frames apart."""
    first = last = camera.frame()
    while last.seq - first.seq < n_frames:
        last = camera.frame()
    return 1e9 * (last.seq - first.seq) / (last.t_capture_ns - first.t_capture_ns)


@needs_gst
def test_a_gstreamer_pipeline_at_30_hz(camera_process):
    camera = camera_process("gst:videotestsrc is-live=true pattern=snow", width=320, height=240, fps=30)
    camera.frame()
    found_hz = rate_hz(camera, 30)
    report("gst at 30 Hz", rate_hz=found_hz)
    assert 26 < found_hz < 34


def test_a_folder_at_20_hz(camera_process, tmp_path: Path):
    for k in range(3):
        cv2.imwrite(str(tmp_path / f"{k}.png"), np.full((20, 30, 3), k, np.uint8))
    found_hz = rate_hz(camera_process(tmp_path, fps=20), 30)
    report("folder at 20 Hz", rate_hz=found_hz)
    assert found_hz == pytest.approx(20, rel=0.1)


def test_a_video_keeps_its_stamps_on_time(camera_process, tmp_path: Path):
    """Each stamp against the time that the video's rate of 15 Hz gives for it."""
    camera = camera_process(counting_video(tmp_path / "v.avi", 60, fps=15), loop=False)
    frames = [camera.frame()]
    while frames[-1].seq < 60:
        frames.append(camera.frame())
    first = frames[0]
    errors_ms = [abs((f.t_capture_ns - first.t_capture_ns) / 1e6 - (f.seq - first.seq) * 1000 / 15) for f in frames]
    report("video at 15 Hz", worst_error_ms=max(errors_ms))
    assert max(errors_ms) < 30


@needs_gst
def test_a_frozen_camera_is_found_in_a_second(camera_process):
    camera = camera_process("gst:videotestsrc is-live=true pattern=black", width=320, height=240, fps=60)
    first = camera.frame()
    assert isinstance(camera.event(), CameraOpened)
    fault = camera.event()
    published_s = (camera.slot.peek(0).t_capture_ns - first.t_capture_ns) / 1e9
    report("frozen camera", published_s=published_s, frames=camera.slot.latest_seq)
    assert isinstance(fault, CameraFault) and fault.reason == "frozen"
    assert 0.9 < published_s < 1.5


def test_an_absent_device_is_tried_again_after_half_a_second_and_a_second(camera_process):
    camera = camera_process("/dev/video97")
    camera.event()
    start_s = time.monotonic()
    camera.event()
    camera.event()
    waited_s = time.monotonic() - start_s
    report("two pauses of the back-off", waited_s=waited_s)
    assert 1.4 < waited_s < 2.0


def test_the_process_ends_soon_after_its_socket_is_closed(camera_process, tmp_path: Path):
    camera = camera_process(counting_video(tmp_path / "v.avi", 10), realtime=False)
    camera.frame()
    start_s = time.monotonic()
    camera.events.close()
    camera.process.wait(60)
    ended_s = time.monotonic() - start_s
    report("end of the camera process", ended_s=ended_s)
    assert ended_s < 1
