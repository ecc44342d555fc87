"""GStreamer pipelines: a stand-in for gst-launch-1.0 everywhere, and the real program where it is installed."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import signal
import subprocess
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from edge_agent.camera import gstreamer
from edge_agent.camera.process import open_source
from edge_agent.camera.source import CapturedFrame, SourceError
from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraOpened
from tests.harness.camera import FakeClock, has_ended, install_fake_gstreamer, wait_until

needs_gst = pytest.mark.skipif(shutil.which("gst-launch-1.0") is None, reason="gst-launch-1.0 is not installed")


@pytest.fixture
def fake_gst(tmp_path, monkeypatch):
    """gst-launch-1.0 is the stand-in, in this process and in camera processes that get this environment."""
    env = install_fake_gstreamer(tmp_path)
    monkeypatch.setenv("PATH", env["PATH"])
    return env


def gst(pipeline: str, width: int = 16, height: int = 8, **config) -> CameraConfig:
    return CameraConfig(source=f"gst:{pipeline}", width=width, height=height, **config)


def error_of(config: CameraConfig, slot, clock) -> SourceError:
    with pytest.raises(SourceError) as caught:
        list(open_source(config, slot, clock))
    return caught.value


# -- the stand-in -----------------------------------------------------------------------------------------------------


def test_frames_arrive_whole(fake_gst, slot, clock):
    with closing(open_source(gst("noise", 640, 480, fps=30), slot, clock)) as items:
        assert next(items) == CameraOpened(640, 480, 30.0, "gst gst:noise")
        first = next(items)
        assert first.image.shape == (480, 640, 3) and first.image.std() > 70  # not a half of it is zero
        assert (first.t_capture_ns, first.capture_clock) == (clock.time_ns, "arrival")
        slot.publish(1, first.t_capture_ns, first.capture_clock)
        copy = first.image.copy()
        assert not np.array_equal(next(items).image, copy) and np.array_equal(slot.peek(0).image, copy)


def test_messages_on_standard_output_do_not_enter_the_image(fake_gst, slot, clock):
    with closing(open_source(gst("prints"), slot, clock)) as items:
        frames = [item for item in itertools.islice(items, 21) if isinstance(item, CapturedFrame)]
        assert len(frames) == 20 and all((frame.image == 255).all() for frame in frames)


def test_a_pipeline_that_fails_gives_its_message(fake_gst, slot, clock):
    error = error_of(gst("nosuchelement"), slot, clock)
    assert error.reason == "unreadable" and error.retryable
    assert error.detail == "gst: the pipeline ended: no such element: nosuchelement"


# Message of gst-launch-1.0 -> whether the pipeline is tried again. What is wrong in the configuration does not heal.
MESSAGES = {
    'WARNING: erroneous pipeline: no element "nosuch"': False,
    "WARNING: erroneous pipeline: syntax error": False,
    'WARNING: erroneous pipeline: no property "x" in element "videotestsrc"': False,
    'WARNING: erroneous pipeline: could not set property "pattern" in element "videotestsrc" to "banana"': False,
    "WARNING: erroneous pipeline: could not link appsink0 to videoconvert1": False,
    "ERROR: pipeline could not be constructed: syntax error.": False,
    "ERROR: from element /GstPipeline:pipeline0/GstV4l2Src:v4l2src0: Cannot identify device '/dev/video9'.": True,
    "ERROR: from element /GstPipeline:pipeline0/GstV4l2Src:v4l2src0: Device '/dev/video0' is busy": True,
    "ERROR: from element /GstPipeline:pipeline0/GstNvArgusCameraSrc:src: TIMEOUT": True,
    "ERROR: from element /GstPipeline:pipeline0/GstFileSrc:filesrc0: Resource not found.": True,
    "ERROR: from element x: Internal data stream error. streaming stopped, reason not-negotiated (-4)": True,
}


@pytest.mark.parametrize(("message", "is_retried"), MESSAGES.items())
def test_a_mistake_in_the_pipeline_is_permanent_and_a_fault_of_the_hardware_is_not(
    fake_gst, slot, clock, message, is_retried
):
    error = error_of(gst(f"says {shlex.quote(message)}"), slot, clock)
    assert error.retryable == is_retried and message in error.detail


def test_the_messages_are_asked_for_in_english(fake_gst, slot, clock, monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert error_of(gst("says-locale"), slot, clock).detail.endswith("the locale is C")


@pytest.mark.parametrize("sink", ["appsink", "appsink name=a drop=true", "fakesink", "autovideosink sync=false"])
def test_a_pipeline_may_not_end_in_a_sink(slot, clock, sink):
    """As it is copied from a script for OpenCV. Nothing is started."""
    error = error_of(gst(f"videotestsrc ! videoconvert ! video/x-raw,format=BGR ! {sink}"), slot, clock)
    assert (
        not error.retryable
        and f"may not end in a sink, because its frames come here; leave {sink.split()[0]} out" in (error.detail)
    )


@pytest.mark.parametrize("pipeline", ["", " ", "videotestsrc !", "!"])
def test_a_pipeline_without_a_last_element_is_permanent(slot, clock, pipeline):
    error = error_of(gst(pipeline), slot, clock)
    assert not error.retryable and "is empty or ends in '!'" in error.detail


@pytest.mark.parametrize("pipeline", ["fakesrc name=sink", "x ! sinkhole", "tee name=t ! fakesink t. ! queue"])
def test_an_element_that_only_looks_like_a_sink_is_taken(pipeline):
    assert gstreamer.pipeline_of(gst(pipeline), 16, 8)[-3:] == [
        "videoconvert",
        "!",
        "video/x-raw,format=RGB,width=16,height=8",
    ]


def test_a_pipeline_that_ends_without_a_message(fake_gst, slot, clock):
    assert error_of(gst("closes-its-log"), slot, clock).detail == "gst: the pipeline ended: without a message"


@pytest.mark.parametrize(("pipeline", "limit"), [("silent", "8 s"), ("one-frame", "2 s")])
def test_a_silent_pipeline_has_stalled(fake_gst, slot, pipeline, limit):
    """Eight seconds before the first frame, two after it; on a clock that runs ahead once the first frame is there."""
    clock = FakeClock()
    with closing(open_source(gst(pipeline), slot, clock)) as items, pytest.raises(SourceError) as caught:
        if pipeline == "one-frame":
            assert [type(next(items)) for _ in range(2)] == [CameraOpened, CapturedFrame]
        clock.step_ns = 1_000_000_000
        next(items)
    assert caught.value.reason == "stalled" and caught.value.detail == f"gst: no frame in {limit}"


def test_a_pipeline_that_stops_is_opened_again(camera_process, fake_gst):
    camera = camera_process("gst:five-frames", width=16, height=8, env=fake_gst)
    assert isinstance(camera.event(), CameraOpened)
    wait_until(lambda: camera.frame_or_none() is not None)
    assert "the pipeline ended: five frames are enough" in camera.event().detail
    n_fds = len(os.listdir(f"/proc/{camera.process.pid}/fd"))
    assert isinstance(camera.event(), CameraOpened) and "the pipeline ended" in camera.event().detail
    while camera.frame().frame_id <= 5:
        pass  # until a frame of the second pipeline comes
    assert len(os.listdir(f"/proc/{camera.process.pid}/fd")) == n_fds


def test_the_pipeline_dies_with_the_camera_process(camera_process, fake_gst):
    camera = camera_process("gst:noise", width=16, height=8, env=fake_gst)
    camera.frame()
    children = Path(f"/proc/{camera.process.pid}/task/{camera.process.pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGSTOP)  # so that it cannot notice a closed pipe
    camera.kill()
    wait_until(lambda: has_ended(int(children[0])))


class StuckProcess:
    """A killed child inside a driver's call: it ends only when the test says so."""

    pid = 4711

    def __init__(self) -> None:
        self.stdout = open("/dev/null", "rb")  # noqa: SIM115  stop_pipeline closes it
        self.n_kills, self.ended = 0, False

    def kill(self) -> None:
        self.n_kills += 1

    def wait(self, timeout_s: float | None = None) -> int:
        assert timeout_s is not None, "waits for ever"
        raise subprocess.TimeoutExpired("gst-launch-1.0", timeout_s)

    def poll(self) -> int | None:
        return -9 if self.ended else None


def test_a_child_that_hangs_in_a_driver_does_not_block_the_camera(fake_gst, slot, clock):
    """SIGKILL has no effect inside the driver. No second pipeline opens the same camera until the first has ended."""
    stuck = StuckProcess()
    gstreamer.stop_pipeline(stuck)
    assert stuck.n_kills == 1 and stuck.stdout.closed
    error = error_of(gst("noise"), slot, clock)
    assert error.reason == "busy" and error.retryable and "process 4711" in error.detail
    stuck.ended = True
    with closing(open_source(gst("noise"), slot, clock)) as items:
        assert isinstance(next(items), CameraOpened)


# -- refused before anything starts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CameraConfig(source="gst:videotestsrc"), "needs camera.width and camera.height"),
        (gst("videotestsrc", 642, 480), "must be a multiple of 4"),
        (gst("videotestsrc", 7680, 4320), "camera.max_megapixels allows 13"),
        (gst("videotestsrc", 7680, 4321, max_megapixels=33.1776), "the limit is"),
        (gst("videotestsrc pattern='red"), "No closing quotation"),
    ],
    ids=["no size", "padded rows", "too large", "larger than the slot", "a quotation without an end"],
)
def test_a_pipeline_that_cannot_work_is_a_permanent_error(slot, clock, config, words):
    error = error_of(config, slot, clock)
    assert not error.retryable and words in error.detail


def test_without_gstreamer_the_error_names_the_package(slot, clock, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    n_fds = len(os.listdir("/proc/self/fd"))
    error = error_of(gst("videotestsrc"), slot, clock)
    assert error.reason == "absent" and "gstreamer1.0-tools" in error.detail and not error.retryable
    (tmp_path / "gst-launch-1.0").write_text("not executable")
    assert error_of(gst("videotestsrc"), slot, clock).detail == "gst: gst-launch-1.0: Permission denied"
    assert len(os.listdir("/proc/self/fd")) <= n_fds  # less: the garbage of another test was collected


def test_the_rate_is_limited_by_dropping_frames_only():
    words = gstreamer.pipeline_of(gst("videotestsrc pattern=red", fps=29.97), 16, 8)
    assert words[:7] == ["videotestsrc", "pattern=red", "!", "videorate", "drop-only=true", "!", "videoconvert"]
    assert words[-1] == "video/x-raw,format=RGB,width=16,height=8,framerate=2997/100"


# -- the real program -------------------------------------------------------------------------------------------------


@needs_gst
def test_real_frames_arrive_in_colour(slot, clock):
    with closing(open_source(gst("videotestsrc pattern=red", 320, 240, fps=30), slot, clock)) as items:
        assert next(items) == CameraOpened(320, 240, 30.0, "gst gst:videotestsrc pattern=red")
        image = next(items).image
    assert image[:, :, 0].min() > 245 and image[:, :, 1:].max() < 10


@needs_gst
def test_real_messages_on_standard_output_do_not_enter_the_image(slot, clock):
    """nvarguscamerasrc prints there; identity with dump=true does, too."""
    with closing(open_source(gst("videotestsrc pattern=white ! identity dump=true"), slot, clock)) as items:
        frames = [item for item in itertools.islice(items, 21) if isinstance(item, CapturedFrame)]
        assert len(frames) == 20 and all((frame.image > 240).all() for frame in frames)


@needs_gst
def test_a_real_frozen_device_is_found_and_found_again(slot):
    """Black test images are identical. On a clock on which a frame takes more than 10 ms."""
    clock = FakeClock(step_ns=10_000_000)
    items = []
    for n_items in (None, 0):  # opened again, nothing is published
        items.clear()
        with pytest.raises(SourceError) as caught:
            for item in open_source(gst("videotestsrc pattern=black", 320, 240), slot, clock):
                items.append(item)
                if isinstance(item, CapturedFrame):
                    slot.publish(1, item.t_capture_ns, item.capture_clock)
        assert caught.value.reason == "frozen"
        assert len(items) >= 29 if n_items is None else items == []


@needs_gst
def test_a_real_static_scene_with_noise_is_not_frozen(slot):
    """The colour bars do not move, except for a patch of snow."""
    clock = FakeClock(step_ns=10_000_000)
    pipeline = "videotestsrc pattern=smpte num-buffers=100"
    with closing(open_source(gst(pipeline, 640, 480), slot, clock)) as items, pytest.raises(SourceError) as caught:
        for item in items:
            if isinstance(item, CapturedFrame):
                slot.publish(1, item.t_capture_ns, item.capture_clock)
    assert "the pipeline ended" in caught.value.detail and slot.latest_seq == 100


@needs_gst
def test_real_black_images_are_taken_where_the_configuration_allows_them(slot):
    clock = FakeClock(step_ns=10_000_000)
    config = gst("videotestsrc pattern=black num-buffers=90", 320, 240, identical_frames_s=0)
    with pytest.raises(SourceError, match="the pipeline ended"):
        for item in open_source(config, slot, clock):
            if isinstance(item, CapturedFrame):
                slot.publish(1, item.t_capture_ns, item.capture_clock)
    assert slot.latest_seq == 90


@needs_gst
@pytest.mark.parametrize(
    "pipeline",
    [
        "videotestsrc ! nosuchelement",
        "videotestsrc pattern=banana",
        "videotestsrc nosuch=1",
        "videotestsrc ! audioconvert",
        "videotestsrc ! video/x-h264",
        "videotestsrc ! ! queue",
        "videotestsrc ! (",
        "videotestsrc ! appsink ! queue",
        "gst-launch-1.0 videotestsrc",
    ],
)
def test_a_real_mistake_is_permanent_in_every_language(slot, clock, monkeypatch, pipeline):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("LANGUAGE", "de")
    assert not error_of(gst(pipeline, 320, 240), slot, clock).retryable


@needs_gst
def test_a_real_fault_of_a_source_is_tried_again(slot, clock, tmp_path):
    assert error_of(gst(f"filesrc location={tmp_path}/none ! decodebin", 320, 240), slot, clock).retryable


@needs_gst
def test_a_real_pipeline_that_fails_gives_its_message(slot, clock):
    error = error_of(gst("videotestsrc ! nosuchelement", 320, 240), slot, clock)
    assert error.reason == "unreadable" and "nosuchelement" in error.detail
