"""Images of a ROS topic through the daemon to velocities, and back after kill -9. Only the model is a fake one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tests.harness import rig
from tests.harness.ros2 import Peer, node_process, ros_environment

PIXELS = bytes(range(256)) * 27  # 48 x 48, three channels


def config(bundle: Path, frames: str) -> dict:
    return {"bundle": str(bundle), "camera": {"source": f"zmq:{frames}"}, "task": {"instruction": "Hold position."}}


def test_images_become_velocities_until_the_daemon_is_killed(toy_bundle, tmp_path):
    environment, frames = ros_environment(1 + os.getpid() % 100, tmp_path), f"ipc://{tmp_path}/frames"
    with (
        contextlib.closing(Peer(environment)) as peer,
        node_process(environment, tmp_path, "--ros-args", "-p", f"frames:={frames}") as node,
    ):
        image = {"width": 48, "height": 48, "encoding": "rgb8", "is_bigendian": 0, "step": 144, "data": PIXELS.hex()}
        peer.tell(do="stream", period_s=0.05, **image)

        def wait_for_speed(speed: float) -> None:
            peer.wait_for("/cmd_vel", lambda message: message["linear.x"] == speed, peer.mark())

        with rig.daemon(tmp_path, config(toy_bundle, frames), fake={}) as daemon:
            wait_for_speed(1.0)
            reply = peer.call("/edge_agent/instruct", "Find the blue box.")
            assert (reply["success"], reply["message"]) == (True, "Find the blue box.")
            wait_for_speed(1.0)
            since = peer.mark()
            assert peer.call("/edge_agent/pause")["success"]
            peer.wait_for("/cmd_vel", lambda message: message["linear.x"] == 0, since)
            assert peer.call("/edge_agent/resume")["success"]
            wait_for_speed(1.0)
            since = peer.mark()
            daemon.process.kill()
            peer.wait_for("/cmd_vel", lambda message: message["linear.x"] == 0, since)
        since = peer.mark()
        with rig.daemon(tmp_path, config(toy_bundle, frames), fake={}):
            why = "started again with another instruction"
            peer.wait_for("/diagnostics", lambda message: why in str(message["entries"]), peer.mark())
            assert peer.all("/cmd_vel", since) == []
            assert peer.call("/edge_agent/instruct", "Find the blue box.")["success"]
            wait_for_speed(1.0)
            answer = peer.call("/edge_agent/ask", "x" * 3000)
            assert not answer["success"] and "2000" in answer["message"]
    assert node.process.returncode == 0
