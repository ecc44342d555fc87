"""Entry of the camera process, started by the supervisor: python -m edge_agent.camera --slot FD --wake FD --events FD

With --probe SECONDS it reads one frame instead. The CameraConfig comes as JSON on standard input, and one line of JSON
goes to standard output: the size of the frame, who stamps it, the pixel formats of the device. A camera can hang in the
driver for ever, so `edge-agent check` and `edge-agent doctor` run the probe in a child process that they can kill.
"""

from __future__ import annotations

import json
import sys

import cv2
import msgspec

from edge_agent.camera.process import probe, run, source_kind
from edge_agent.camera.source import SourceError
from edge_agent.camera.v4l2 import device_path, pixel_formats
from edge_agent.config import CameraConfig
from edge_agent.ipc.worker import attach_to_supervisor
from edge_agent.wire.codec import encode


def main() -> int:
    if sys.argv[1:2] == ["--probe"]:
        config = msgspec.json.decode(sys.stdin.buffer.read(), type=CameraConfig)
        try:
            found = probe(config, float(sys.argv[2]))
            is_device = source_kind(config.source) == "v4l2"
            formats = pixel_formats(device_path(config.source)) if is_device else ()
            print(json.dumps({"line": found.line, "clock": found.capture_clock, "formats": formats}))
        except SourceError as error:
            sys.exit(f"{error.reason}: {error.detail}")
        return 0
    attached = attach_to_supervisor()
    cv2.setNumThreads(1)  # the cores belong to the model process
    config = msgspec.msgpack.decode(attached.first, type=CameraConfig)
    try:
        return run(config, attached.slot, lambda event: attached.events.send(encode(event)))
    except BrokenPipeError:  # the supervisor closed its socket
        return 0


if __name__ == "__main__":
    sys.exit(main())
