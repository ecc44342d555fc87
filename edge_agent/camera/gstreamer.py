"""A GStreamer pipeline in a gst-launch-1.0 child; its frames come through a pipe."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import select
import shlex
import subprocess
import time
from fractions import Fraction

from edge_agent.camera.source import STALL_S, CapturedFrame, SourceError, SourceItems, check_size
from edge_agent.config import CameraConfig
from edge_agent.ipc.frame_slot import Slot
from edge_agent.ipc.worker import die_with_parent

GST_START_S = 8.0  # a CSI pipeline takes seconds to its first frame


def read_gstreamer(config: CameraConfig, slot: Slot) -> SourceItems:
    width, height = config.width, config.height
    if width is None or height is None:
        raise SourceError(
            "unreadable", "gst: needs camera.width and camera.height, the size of its frames", heals=False
        )
    if width % 4:
        detail = f"gst: camera.width must be a multiple of 4 (GStreamer pads rows to 4 bytes), found {width}"
        raise SourceError("unreadable", detail, heals=False)
    check_size(height, width)
    process, frames_fd = start_pipeline(config)
    try:
        said_fd, said = process.stdout.fileno(), b""
        poll = select.poll()
        poll.register(frames_fd, select.POLLIN)
        poll.register(said_fd, select.POLLIN)
        patience_s = GST_START_S
        while True:
            image = slot.write(height, width)
            free = image.data.cast("B")
            heard_s = time.monotonic()
            while len(free):
                ready = dict(poll.poll(200))
                if said_fd in ready:
                    said = (said + os.read(said_fd, 65536))[-500:]
                if frames_fd in ready:
                    n_bytes = os.readv(frames_fd, [free])
                    if n_bytes == 0:
                        said = (said + os.read(said_fd, 65536))[-500:]
                        said_last = " ".join(said.decode(errors="replace").split())
                        raise SourceError("unreadable", f"gst: the pipeline ended: {said_last or 'without a word'}")
                    free, heard_s = free[n_bytes:], time.monotonic()
                elif time.monotonic() - heard_s > patience_s:
                    raise SourceError("stalled", f"gst: no frame in {patience_s:g} s")
            patience_s = STALL_S
            yield CapturedFrame(image, time.monotonic_ns(), "arrival", config.fps)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.close(frames_fd)


def start_pipeline(config: CameraConfig) -> tuple[subprocess.Popen, int]:
    """gst-launch-1.0 as our child, and the pipe its frames come out of: not its stdout, where CSI plug-ins print."""
    frames_fd, write_fd = os.pipe()
    caps = f"video/x-raw,format=RGB,width={config.width},height={config.height}"
    rate = []
    if config.fps:
        rate = ["videorate", "drop-only=true", "!"]  # never repeats a frame to reach a rate
        fps = Fraction(config.fps).limit_denominator(1001)
        caps += f",framerate={fps.numerator}/{fps.denominator}"
    pipeline = shlex.split(config.source.removeprefix("gst:"))
    try:
        process = subprocess.Popen(
            ["gst-launch-1.0", "-q", *pipeline, "!", *rate, "videoconvert", "!", caps, "!", "fdsink", f"fd={write_fd}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(write_fd,),
            start_new_session=True,  # Ctrl-C in a terminal is for the supervisor
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
    except FileNotFoundError:
        os.close(frames_fd)
        raise SourceError("absent", "gst: gst-launch-1.0 is not installed (gstreamer1.0-tools)", heals=False) from None
    finally:
        os.close(write_fd)
    with contextlib.suppress(PermissionError):  # the system's limit may be lower; then it is only more wake-ups
        fcntl.fcntl(frames_fd, fcntl.F_SETPIPE_SZ, 1 << 20)
    return process, frames_fd
