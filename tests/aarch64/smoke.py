"""Runs on ARM64, perhaps under an emulator: imports, the frame slot, a picture, and one message over real sockets.

llama.cpp and onnxruntime are not part of it: the first has no wheel, the second crashes under qemu-user (not on a
board). Ends with one line.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
import sys
import tempfile
import threading
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
NEEDS = ("llama_cpp", "onnxruntime")


def import_everything() -> int:
    """Every module of edge_agent. One that needs llama.cpp or onnxruntime may fail for that reason alone."""
    import edge_agent

    n_imported = 0
    for module in pkgutil.walk_packages(edge_agent.__path__, "edge_agent."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
            n_imported += 1
        except ModuleNotFoundError as error:
            if error.name not in NEEDS:
                raise
    return n_imported


def one_frame() -> None:
    """Shared memory with the fence of this processor."""
    from edge_agent.ipc.frame_slot import Slot

    with closing(Slot.create()) as slot:
        slot.write(4, 6)[:] = 7
        slot.publish(1, 1000, "driver")
        frame = slot.take_newest(0)
        assert frame is not None and (frame.image == 7).all() and slot.was_not_overwritten(frame)


def one_picture() -> None:
    import cv2
    import numpy as np
    import simplejpeg

    image = np.full((48, 64, 3), 90, np.uint8)
    assert abs(int(simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(image)).mean()) - 90) < 3
    assert cv2.resize(image, (32, 24), interpolation=cv2.INTER_AREA).shape == (24, 32, 3)


def one_message() -> None:
    """A piece of text, from the daemon's publisher to the client."""
    from edge_agent.client import Client
    from edge_agent.supervisor.publisher import Publisher
    from edge_agent.wire.messages import TextMessage

    with tempfile.TemporaryDirectory() as folder:
        publisher, ended = Publisher(Path(folder)), threading.Event()

        def publish() -> None:
            while not ended.wait(0.02):
                publisher.serve()
                publisher.send("text", TextMessage, lane="answer", frame_id=1, text="A red box.", final=True)

        thread = threading.Thread(target=publish)
        thread.start()
        try:
            with Client(folder) as client:
                received = client.next_text(60.0)
                assert received is not None and received.text == "A red box.", received
        finally:
            ended.set()
            thread.join()
            publisher.close()


def main() -> None:
    assert platform.machine() == "aarch64", platform.machine()
    n_modules = import_everything()
    one_frame()
    one_picture()
    one_message()
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"ok: {n_modules} modules, a frame, a picture and a message on {platform.machine()}, Python {python}")
    os._exit(0)  # the emulator may hang while it ends threads


if __name__ == "__main__":
    main()
