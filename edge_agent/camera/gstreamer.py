"""A GStreamer pipeline in a gst-launch-1.0 child process. Its frames come through a pipe."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import select
import shlex
import subprocess
from fractions import Fraction

import numpy as np

from edge_agent.camera.clock import Clock
from edge_agent.camera.source import (
    FRAME_POLL_MS,
    STALL_S,
    CapturedFrame,
    SourceError,
    SourceItems,
    check_size,
    into_slot,
)
from edge_agent.config import CameraConfig
from edge_agent.errors import fault_of
from edge_agent.ipc.frame_slot import Slot
from edge_agent.ipc.worker import die_with_parent
from edge_agent.time_units import NS_PER_S

GST_START_S = 8.0  # a CSI pipeline takes seconds to its first frame
KILL_TIMEOUT_S = 1.0  # a killed child that does not end within this time hangs in a driver
LAST_MESSAGE_S = 1.0  # how long to wait for the child's last message after its last frame
MAX_LOG_BYTES = 1000  # of the child's messages: the last ones say why it ended
# gst-launch-1.0 writes one of these if it cannot make the pipeline: a mistake in it, or an element that is not
# installed. Everything else may be the hardware, which can come back.
PERMANENT_MESSAGES = ("erroneous pipeline", "pipeline could not be constructed")

# Killed children that have not ended yet. While there is one, its camera is in use, and no other pipeline is started.
_unfinished: list[subprocess.Popen[bytes]] = []


def read_gstreamer(config: CameraConfig, slot: Slot, clock: Clock) -> SourceItems:
    width, height = frame_size(config)
    process, frames_fd = start_pipeline(config, width, height)
    try:
        output = PipelineOutput(process, frames_fd, clock)
        timeout_s = GST_START_S
        pixels = np.empty((height, width, 3), np.uint8)
        while True:
            output.read_frame(pixels.data.cast("B"), timeout_s)
            timeout_s, arrival_ns = STALL_S, clock.now_ns()
            image = into_slot(pixels, slot, config, conversion=None)
            yield CapturedFrame(image, arrival_ns, "arrival", config.fps, captured=pixels)
    finally:
        os.close(frames_fd)
        stop_pipeline(process)


def frame_size(config: CameraConfig) -> tuple[int, int]:
    """Width and height in pixels. Raises SourceError if they are not configured or the size is not possible."""
    width, height = config.width, config.height
    if width is None or height is None:
        detail = "gst: needs camera.width and camera.height, the size of its frames"
        raise SourceError("unreadable", detail, "source-pipeline")
    if width % 4:
        detail = f"gst: camera.width must be a multiple of 4 (GStreamer pads rows to 4 bytes), found {width}"
        raise SourceError("unreadable", detail, "source-pipeline")
    check_size(height, width, config.max_pixels)
    return width, height


class PipelineOutput:
    """The two outputs of the child: frames from `frames_fd`, messages from its standard output."""

    def __init__(self, process: subprocess.Popen[bytes], frames_fd: int, clock: Clock) -> None:
        assert process.stdout is not None
        self.frames_fd, self.log_fd, self.clock = frames_fd, process.stdout.fileno(), clock
        self.log = b""
        self.poll = select.poll()
        self.poll.register(self.frames_fd, select.POLLIN)
        self.poll.register(self.log_fd, select.POLLIN)

    def read_frame(self, buffer: memoryview, timeout_s: float) -> None:
        """Fill the buffer with one frame. Raises SourceError at the pipeline's end, or after timeout_s without data."""
        last_data_ns = self.clock.now_ns()
        while len(buffer):
            ready = dict(self.poll.poll(FRAME_POLL_MS))
            if self.log_fd in ready:
                self.read_log()
            if self.frames_fd in ready:
                n_bytes = os.readv(self.frames_fd, [buffer])
                if n_bytes == 0:
                    if select.select([self.log_fd], [], [], LAST_MESSAGE_S)[0]:
                        self.read_log()
                    log = " ".join(self.log.decode(errors="replace").split())
                    is_permanent = any(message in log for message in PERMANENT_MESSAGES)
                    detail = f"gst: the pipeline ended: {log or 'without a message'}"
                    raise SourceError("unreadable", detail, "source-pipeline" if is_permanent else "source-device")
                buffer, last_data_ns = buffer[n_bytes:], self.clock.now_ns()
            elif self.clock.now_ns() - last_data_ns > timeout_s * NS_PER_S:
                raise SourceError("stalled", f"gst: no frame in {timeout_s:g} s")

    def read_log(self) -> None:
        chunk = os.read(self.log_fd, 65536)
        self.log = (self.log + chunk)[-MAX_LOG_BYTES:]
        if not chunk:  # closed: poll() would report it at once, again and again
            with contextlib.suppress(KeyError):
                self.poll.unregister(self.log_fd)


def start_pipeline(config: CameraConfig, width: int, height: int) -> tuple[subprocess.Popen[bytes], int]:
    """Start gst-launch-1.0. Returns the child process and the descriptor of the pipe that its frames come from.

    The frames do not use the child's standard output, because CSI plug-ins print messages there. Raises SourceError.
    """
    _unfinished[:] = [process for process in _unfinished if process.poll() is None]
    if _unfinished:
        detail = f"gst: the previous pipeline (process {_unfinished[0].pid}) was killed, but still hangs in a driver"
        raise SourceError("busy", detail)
    command = ["gst-launch-1.0", "-q", *pipeline_of(config, width, height)]
    frames_fd, write_fd = os.pipe()
    try:
        process = subprocess.Popen(
            [*command, "!", "fdsink", f"fd={write_fd}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(write_fd,),
            env=os.environ | {"LC_ALL": "C"},  # PERMANENT_MESSAGES are English
            start_new_session=True,  # Ctrl-C in a terminal is for the supervisor
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
    except OSError as error:
        os.close(frames_fd)
        if isinstance(error, FileNotFoundError):
            detail = "gst: gst-launch-1.0 is not installed (gstreamer1.0-tools)"
            raise SourceError("absent", detail, "installation") from None
        fault = fault_of(error, "installation")
        raise SourceError("unreadable", f"gst: gst-launch-1.0: {error.strerror}", fault) from None
    finally:
        os.close(write_fd)
    with contextlib.suppress(PermissionError):  # the system's limit may be lower; a small pipe only wakes us more often
        fcntl.fcntl(frames_fd, fcntl.F_SETPIPE_SZ, 1 << 20)
    return process, frames_fd


def pipeline_of(config: CameraConfig, width: int, height: int) -> list[str]:
    """The configured pipeline and the conversion to frames of width x height RGB pixels, as words of a command."""
    try:
        source = shlex.split(config.source.removeprefix("gst:"))
    except ValueError as error:  # for example a quotation that does not end
        raise SourceError("unreadable", f"gst: the pipeline cannot be read: {error}", "source-pipeline") from None
    last = source[max((i + 1 for i, word in enumerate(source) if word == "!"), default=0) :]
    if not last:
        detail = "gst: the pipeline is empty or ends in '!'; expected elements, for example videotestsrc"
        raise SourceError("unreadable", detail, "source-pipeline")
    if last[0].endswith("sink"):
        detail = f"gst: the pipeline may not end in a sink, because its frames come here; leave {last[0]} out"
        raise SourceError("unreadable", detail, "source-pipeline")
    caps = f"video/x-raw,format=RGB,width={width},height={height}"
    rate = []
    if config.fps:
        rate = ["videorate", "drop-only=true", "!"]  # never repeats a frame to reach the rate
        fps = Fraction(config.fps).limit_denominator(1001)
        caps += f",framerate={fps.numerator}/{fps.denominator}"
    return [*source, "!", *rate, "videoconvert", "!", caps]


def stop_pipeline(process: subprocess.Popen[bytes]) -> None:
    """Kill the child. Waits KILL_TIMEOUT_S at most: a child inside a driver's call cannot end before the call does."""
    process.kill()
    try:
        process.wait(KILL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        _unfinished.append(process)
    assert process.stdout is not None
    process.stdout.close()
