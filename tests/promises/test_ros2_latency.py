"""From an action on the socket to a velocity in another process of the ROS graph; from its end to the zero."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from tests.harness.fake_daemon import FakeDaemon, make_action, make_refusal
from tests.harness.ros2 import Peer, node_process, ros_environment

pytestmark = pytest.mark.promise
N_ACTIONS, N_DEATHS = 300, 10
VALID_MS = 400
REST = {"forward_m_s": 0.0, "right_m_s": 0.0, "down_m_s": 0.0, "yaw_rate_rad_s": 0.0}


def test_an_action_becomes_a_velocity_and_its_end_a_zero(tmp_path: Path):
    """at_ns is taken by the peer, in Python: DDS and two interpreters are in the figure."""
    environment, seq = ros_environment(1 + os.getpid() % 100, tmp_path), iter(range(10**6))
    peer = Peer(environment)

    def move(daemon: FakeDaemon) -> tuple[float, int]:
        n = next(seq)
        action = make_action(n, type="move", values=REST | {"forward_m_s": n / 1000}, valid_ms=VALID_MS)
        daemon.publish("actions", action)
        return n / 1000, action.t_pub_ns

    delays_ms, expiries_ms, refusals_ms = [], [], []
    with node_process(environment, tmp_path) as node:
        for _ in range(N_DEATHS):
            with FakeDaemon(tmp_path) as daemon:
                daemon.wait_for_subscriber("actions")
                while not peer.all("/cmd_vel"):
                    move(daemon)
                    time.sleep(0.05)
                for _ in range(N_ACTIONS // N_DEATHS):
                    speed, sent_ns = move(daemon)
                    found = peer.wait_for("/cmd_vel", lambda message, speed=speed: message["linear.x"] == speed)
                    delays_ms.append((found["at_ns"] - sent_ns) / 1e6)
                    time.sleep(0.02)
                refused_ns, since = time.monotonic_ns(), peer.mark()
                daemon.publish("actions", make_refusal(next(seq), t_pub_ns=refused_ns))
                refusals_ms.append((wait_for_zero(peer, since) - refused_ns) / 1e6)
                _, sent_ns = move(daemon)
                time.sleep(0.02)
                since = peer.mark()
            expiries_ms.append((wait_for_zero(peer, since) - sent_ns) / 1e6 - VALID_MS)
        with FakeDaemon(tmp_path) as daemon:
            daemon.wait_for_subscriber("actions")
            move(daemon)
            time.sleep(0.05)
            since, ended_ns = peer.mark(), time.monotonic_ns()
            node.process.terminate()
            sigterm_ms = (wait_for_zero(peer, since) - ended_ns) / 1e6
    peer.close()
    p50, p99 = np.percentile(delays_ms, [50, 99])
    figures = {"action_p50_ms": p50, "action_p99_ms": p99, "zero_after_expiry_max_ms": max(expiries_ms)}
    figures |= {"zero_after_refusal_max_ms": max(refusals_ms), "zero_after_sigterm_ms": sigterm_ms}
    print(json.dumps({"promise": "ros2"} | {name: round(float(value), 2) for name, value in figures.items()}))
    assert p99 < 20 and max(expiries_ms) < 40 and max(refusals_ms) < 40 and sigterm_ms < 100


def wait_for_zero(peer: Peer, since: int) -> int:
    """When it arrived, CLOCK_MONOTONIC."""
    at_ns: int = peer.wait_for("/cmd_vel", lambda message: message["linear.x"] == 0, since)["at_ns"]
    return at_ns
