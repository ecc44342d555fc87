"""The camera process: writes the frames of one source into the newest-frame slot, and opens a failed source again.

A string names the source:

    /dev/video0, v4l2:/dev/v4l/by-id/..., 0    a V4L2 camera; the by-id name stays the same after a replug
    clip.mp4                                   a video file, at its own rate or (realtime: false) at the model's rate
    frames/                                    a folder of images in the order of their names
    gst:nvarguscamerasrc sensor-id=0 ! nvvidconv ! video/x-raw,format=RGBA
                                               a GStreamer pipeline, here a CSI camera; runs in gst-launch-1.0
    zmq:ipc:///run/edge-agent/frames           frames pushed by the process that owns the camera: wire/pushed_frame.py

The supervisor starts this process (ipc/worker.py) and sends the CameraConfig as first message. The process answers with
CameraOpened, CameraFault and CameraEnded. It reports a live source that fails in a CameraFault and opens it again,
without a limit. A permanent error (for example, no such file) ends the process with EX_CONFIG. The process cannot leave
a read() that hangs: the supervisor kills it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator
from typing import NamedTuple

from edge_agent.camera.clock import MONOTONIC, Clock
from edge_agent.camera.files import read_folder, read_video
from edge_agent.camera.gstreamer import read_gstreamer
from edge_agent.camera.pushed import read_pushed_frames
from edge_agent.camera.source import (
    CapturedFrame,
    SourceError,
    SourceItems,
    detect_frozen,
    fingerprint,
    wait_for_reader,
)
from edge_agent.camera.v4l2 import read_v4l2
from edge_agent.config import CameraConfig
from edge_agent.ipc.backoff import Backoff
from edge_agent.ipc.events import CameraEnded, CameraEvent, CameraFault, CameraOpened
from edge_agent.ipc.frame_slot import Slot
from edge_agent.suspend import SuspendDetector
from edge_agent.time_units import NS_PER_S

FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 5.0  # before a failed source is opened again
PROBE_TIMEOUT_S = 10.0
MAX_DETAIL_CHARACTERS = 1000

SOURCES: dict[str, Callable[[CameraConfig, Slot, Clock], SourceItems]] = {
    "v4l2": read_v4l2,
    "gst": read_gstreamer,
    "zmq": read_pushed_frames,
    "video": read_video,
    "folder": read_folder,
}
# Devices: they can freeze, and a frame can wait in the driver while the machine is suspended. A pushed frame has a
# stamp that shows both; a file may repeat an image.
LIVE_KINDS = {"v4l2", "gst"}
PROBE_FREEZE_S = 5.0  # how long the probe looks at identical images at most


def source_kind(source: str) -> str:
    """The row of SOURCES that a source string means. Raises SourceError."""
    if "\0" in source:
        raise SourceError("absent", f"{source!r}: a name cannot contain a zero character", "source-name")
    prefix = source.partition(":")[0]
    if prefix in ("v4l2", "gst", "zmq") and ":" in source:
        return prefix
    if source.isdigit() or source.startswith("/dev/"):
        return "v4l2"
    if "://" in source:
        detail = f"{source}: expected /dev/videoN, v4l2:, gst:, zmq:ipc://, a file or a folder"
        raise SourceError("absent", detail, "source-name")
    return "folder" if os.path.isdir(source) else "video"


def open_source(
    config: CameraConfig, slot: Slot, clock: Clock = MONOTONIC
) -> Generator[CapturedFrame | CameraFault | CameraOpened, None, None]:
    """The frames of a source. CameraOpened comes before the first frame and before a new size. Raises SourceError."""
    kind = source_kind(config.source)
    height_width: tuple[int, int] | None = None
    items = SOURCES[kind](config, slot, clock)
    with contextlib.closing(detect_frozen(items, slot, clock, config) if kind in LIVE_KINDS else items) as items:
        for item in items:
            if isinstance(item, CapturedFrame) and item.size != height_width:
                height, width = height_width = item.size
                description = f"{kind} {config.source}{item.remark and f' ({item.remark})'}"
                yield CameraOpened(width=width, height=height, fps=item.fps, description=description)
            yield item


class Probed(NamedTuple):
    """What a probe found."""

    line: str  # for people: "640x480 at 30 fps", and a remark
    capture_clock: str  # who stamps the frames, see CaptureClock


def probe(config: CameraConfig, timeout_s: float = PROBE_TIMEOUT_S, clock: Clock = MONOTONIC) -> Probed:
    """Open the source, and read its first frames. Raises SourceError.

    Of a device that can freeze, it reads until an image differs from the first one.

    A camera can hang in read() for ever: call this in a process that you can kill.
    """
    slot, end_ns = Slot.create(), clock.now_ns() + round(timeout_s * NS_PER_S)
    found, first = "", b""
    with contextlib.closing(slot), contextlib.closing(open_source(config, slot, clock)) as items:
        for item in items:
            if isinstance(item, CameraOpened):
                found = f"{item.width}x{item.height}" + (f" at {item.fps:g} fps" if item.fps else "")
                remark = item.description.removeprefix(f"{source_kind(config.source)} {config.source}")
                found += remark
                end_ns = min(end_ns, clock.now_ns() + round(PROBE_FREEZE_S * NS_PER_S))
            elif isinstance(item, CameraFault):
                if clock.now_ns() > end_ns:
                    raise SourceError(item.reason, item.detail)
            elif source_kind(config.source) not in LIVE_KINDS or clock.now_ns() > end_ns:
                return Probed(found, item.capture_clock)
            else:
                this = fingerprint(item.pixels)
                if first not in (b"", this):
                    return Probed(found, item.capture_clock)
                first = this
    raise SourceError("unreadable", f"{config.source}: no frame")


def run(
    config: CameraConfig,
    slot: Slot,
    send: Callable[[CameraEvent], object],
    clock: Clock = MONOTONIC,
    suspend: SuspendDetector | None = None,
) -> int:
    """Publish the frames of the source. Returns 0 at the end of the source, or EX_CONFIG after a permanent error."""
    backoff, suspend = Backoff(FIRST_PAUSE_S, MAX_PAUSE_S), suspend or SuspendDetector()
    while True:
        try:
            newest = slot.peek(0)
            frame_id, resumed_ns = newest.frame_id if newest else 0, suspend.resumed_ns()
            for item in open_source(config, slot, clock):
                if isinstance(item, CapturedFrame):
                    if source_kind(config.source) in LIVE_KINDS and suspend.resumed_ns() != resumed_ns:
                        # A frame that waited in the driver would be stamped now.
                        raise SourceError("clock", "the machine was suspended; the source is opened again")
                    frame_id = frame_id + 1 if item.frame_id is None else item.frame_id
                    slot.publish(frame_id, item.t_capture_ns, item.capture_clock)
                    backoff.note_success(clock.now_ns())
                elif isinstance(item, CameraFault):
                    send(CameraFault(item.reason, item.detail[:MAX_DETAIL_CHARACTERS]))
                else:
                    send(item)
            if not config.realtime:
                wait_for_reader(slot, clock)  # until the model has taken the last frame, too
            send(CameraEnded())
            return 0
        except SourceError as error:
            send(CameraFault(error.reason, error.detail[:MAX_DETAIL_CHARACTERS]))
            if not error.retryable:
                return os.EX_CONFIG
        clock.sleep_until(clock.now_ns() + round(backoff.next_pause_s() * NS_PER_S))
