"""The camera process: publishes the frames of one source, reports faults, opens a failed source again."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator

from edge_agent.camera.files import read_folder, read_video
from edge_agent.camera.gstreamer import read_gstreamer
from edge_agent.camera.pushed import read_pushed_frames
from edge_agent.camera.source import CapturedFrame, SourceError, SourceItems, detect_frozen, wait_for_reader
from edge_agent.camera.v4l2 import read_v4l2
from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraEnded, CameraEvent, CameraFault, CameraOpened
from edge_agent.ipc.frame_slot import Slot

BACKOFF_S, MAX_BACKOFF_S = 0.5, 5.0


SOURCES: dict[str, Callable[[CameraConfig, Slot], SourceItems]] = {
    "v4l2": read_v4l2,
    "gst": read_gstreamer,
    "zmq": read_pushed_frames,
    "video": read_video,
    "folder": read_folder,
}
CAN_FREEZE = {"v4l2", "gst"}  # a pusher's repeated frame shows in its stamp; a file may stand still as it likes


def source_kind(source: str) -> str:
    """Which row of SOURCES a source string means. Raises Broken."""
    prefix = source.partition(":")[0]
    if prefix in ("v4l2", "gst", "zmq") and ":" in source:
        return prefix
    if source.isdigit() or source.startswith("/dev/"):
        return "v4l2"
    if "://" in source:
        detail = f"{source}: expected /dev/videoN, v4l2:, gst:, zmq:ipc://, a file or a folder"
        raise SourceError("absent", detail, heals=False)
    return "folder" if os.path.isdir(source) else "video"


def open_source(config: CameraConfig, slot: Slot) -> Generator[CapturedFrame | CameraFault | CameraOpened, None, None]:
    """The frames of a source, the first and every change of size announced by CameraOpened. Raises Broken."""
    kind, shape = source_kind(config.source), None
    items = SOURCES[kind](config, slot)
    for item in detect_frozen(items, slot) if kind in CAN_FREEZE else items:
        if isinstance(item, CapturedFrame) and item.image.shape != shape:
            shape = item.image.shape
            yield CameraOpened(width=shape[1], height=shape[0], fps=item.fps, description=f"{kind} {config.source}")
        yield item


def probe(config: CameraConfig, timeout_s: float = 10.0) -> str:
    """Open the source, read one frame, and say "640x480 at 30 fps". Raises Broken.

    A camera can hang in read() for ever: call this in a process that you can kill.
    """
    slot, give_up_s = Slot.create(), time.monotonic() + timeout_s
    with contextlib.closing(slot), contextlib.closing(open_source(config, slot)) as items:
        for item in items:
            if isinstance(item, CameraOpened):
                return f"{item.width}x{item.height}" + (f" at {item.fps:g} fps" if item.fps else "")
            if isinstance(item, CameraFault) and time.monotonic() > give_up_s:
                raise SourceError(item.reason, item.detail)
    raise SourceError("unreadable", f"{config.source}: no frame")


# The process.


def run(config: CameraConfig, slot: Slot, send: Callable[[CameraEvent], None]) -> int:
    """Publish the source's frames until it ends (0) or cannot heal (EX_CONFIG)."""
    backoff_s = BACKOFF_S
    while True:
        try:
            newest = slot.peek(0)
            frame_id = newest.frame_id if newest else 0
            for item in open_source(config, slot):
                if isinstance(item, CapturedFrame):
                    frame_id = frame_id + 1 if item.frame_id is None else item.frame_id
                    slot.publish(frame_id, item.t_capture_ns, item.capture_clock)
                    backoff_s = BACKOFF_S
                else:
                    send(item)
            if not config.realtime:
                wait_for_reader(slot)  # the last frame is looked at, too
            send(CameraEnded())
            return 0
        except SourceError as broken:
            send(CameraFault(broken.reason, broken.detail[:1000]))
            if not broken.heals:
                return os.EX_CONFIG
        time.sleep(backoff_s)
        backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
