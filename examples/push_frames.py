"""Pushes frames to a daemon, as a simulator or a flight stack does that owns the camera.

edge-agent run --bundle BUNDLE --camera zmq:ipc:///tmp/frames
python examples/push_frames.py ipc:///tmp/frames                     # generated frames
python examples/push_frames.py ipc:///tmp/frames a.jpg b.png         # image files, in turn; needs the daemon's packages
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from edge_agent.client import FramePusher
from edge_agent.errors import UserError

WIDTH, HEIGHT, SQUARE = 640, 480, 80  # pixels


def generated_frames() -> Iterator[bytes]:
    """A white square that moves over a green ground: HEIGHT x WIDTH pixels of 3 bytes, RGB."""
    ground, square = bytes((40, 90, 40)), bytes((255, 255, 255)) * SQUARE
    for left in itertools.cycle(range(0, WIDTH - SQUARE, 8)):
        line = ground * left + square + ground * (WIDTH - SQUARE - left)
        empty = ground * WIDTH
        yield empty * 200 + line * SQUARE + empty * (HEIGHT - SQUARE - 200)


def image_frames(paths: list[str]) -> Iterator[object]:
    """The images, in turn, without end: (H, W, 3) uint8 arrays, RGB."""
    from edge_agent.camera.picture import read_picture

    for path in itertools.cycle(paths):
        yield read_picture(Path(path))[..., ::-1]  # it is BGR


def main() -> None:
    parser = argparse.ArgumentParser(description="Push frames to a running edge-agent.")
    parser.add_argument("endpoint", help="the camera.source of the daemon without zmq:, such as ipc:///tmp/frames")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files; default: generated frames")
    parser.add_argument("--rate", type=float, default=10.0, metavar="HZ", help="frames per second (default: 10)")
    parser.add_argument("--count", type=int, metavar="N", help="stop after N frames")
    options = parser.parse_args()
    frames = image_frames(options.images) if options.images else generated_frames()
    size = {} if options.images else {"width": WIDTH, "height": HEIGHT}
    with FramePusher(options.endpoint) as pusher:
        for frame_id, frame in enumerate(itertools.islice(frames, options.count)):
            sent = pusher.push(frame, frame_id=frame_id, t_capture_ns=time.monotonic_ns(), **size)
            print(f"frame {frame_id}: {'sent' if sent else 'dropped, no daemon takes it'}", flush=True)
            time.sleep(1 / options.rate)


if __name__ == "__main__":
    try:
        with contextlib.suppress(KeyboardInterrupt):
            main()
    except UserError as error:  # an image that is damaged, for example
        raise SystemExit(str(error)) from None
