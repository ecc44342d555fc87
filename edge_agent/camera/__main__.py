"""Entry of the camera process, started by the supervisor: python -m edge_agent.camera --slot FD --wake FD --events FD

With --probe SECONDS it reads one frame instead. The CameraConfig comes as JSON on standard input, and the size of the
frame goes to standard output. A camera can hang in the driver for ever, so `edge-agent check` runs the probe in a child
process that it can kill.
"""

from __future__ import annotations

import sys

import cv2
import msgspec

from edge_agent.camera.process import probe, run
from edge_agent.camera.source import SourceError
from edge_agent.config import CameraConfig
from edge_agent.ipc.worker import attach_to_supervisor
from edge_agent.wire.codec import encode


def main() -> int:
    if sys.argv[1:2] == ["--probe"]:
        config = msgspec.json.decode(sys.stdin.buffer.read(), type=CameraConfig)
        try:
            print(probe(config, float(sys.argv[2])))
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
