"""The node in every scenario of a rehearsal: judged by what an independent ROS process receives, and by --dry-run."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from edge_agent.rehearsal import SCENARIOS, Command, judge, parse_command, play
from tests.harness.fake_daemon import FakeDaemon, make_action
from tests.harness.ros2 import Peer, node_process, ros_environment

N_NODES = 4  # at the same time: most of the time of a scenario is waiting
NAMES = list(SCENARIOS)
INSTRUCTION = "Land on the red disc."  # of the scenarios


def command_of(twist: dict[str, Any]) -> Command:
    """A velocity as its receiver understands it: x forward, y left, z up, yaw counter-clockwise.

    The time is that of the stamp, by this machine's two clocks. A zero velocity is a hold.
    """
    t_ns = twist["stamp_ns"] - (time.time_ns() - time.monotonic_ns())
    values = {
        "forward_m_s": twist["linear.x"],
        "right_m_s": -twist["linear.y"],
        "down_m_s": -twist["linear.z"],
        "yaw_rate_rad_s": -twist["angular.z"],
    }
    return Command(t_ns, "move" if any(values.values()) else "hold", values, twist["at_ns"])


class Commands(Sequence[Command]):
    """What comes from now on; it grows."""

    def __init__(self, read: Callable[[], list[Command]]) -> None:
        """read: all commands so far."""
        self._read, self._begin = read, len(read())

    def __len__(self) -> int:
        return len(self._read()) - self._begin

    def __getitem__(self, index: Any) -> Any:
        return self._read()[self._begin :][index]


def faults(names: Sequence[str], folder: Path, read: Callable[[], list[Command]], space: str) -> dict[str, list[str]]:
    """Play scenarios one after the other to a node that stays: for it, the daemon is started again each time."""
    found = {}
    for name in names:
        commands = Commands(read)
        found[name] = judge(play(SCENARIOS[name], folder, commands, space=space), commands)
    return found


def test_every_scenario_by_what_another_ros_process_receives(tmp_path):
    environment = ros_environment(1 + os.getpid() % 100, tmp_path)
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(contextlib.closing(Peer(environment)))

        def play_to_a_node(i: int) -> dict[str, list[str]]:
            topic, folder = f"/robot_{i}/cmd_vel", tmp_path / str(i)
            folder.mkdir()
            peer.tell(do="listen_to", topic=topic, type="TwistStamped")
            with node_process(environment, folder, "--ros-args", "-r", f"__ns:=/robot_{i}"):
                read = functools.partial(commands_of, peer, topic)
                wait_until_heard(folder, read)
                return faults(NAMES[i::N_NODES], folder, read, "velocity_body")

        pool = stack.enter_context(ThreadPoolExecutor(N_NODES))
        results = pool.map(play_to_a_node, range(N_NODES))
        found = {name: lines for result in results for name, lines in result.items()}
    assert found == {name: [] for name in NAMES}


def commands_of(peer: Peer, topic: str) -> list[Command]:
    return [command_of(message) for message in peer.all(topic)]


def wait_until_heard(folder: Path, read: Callable[[], list[Command]]) -> None:
    """What a publisher sends before it has found its subscriber is lost."""
    with FakeDaemon(folder) as daemon:
        daemon.wait_for_subscriber("actions")
        for seq in itertools.count():
            if read():
                return
            daemon.publish("actions", make_action(seq, instruction=INSTRUCTION))
            time.sleep(0.02)


WAYPOINT_NAMES = ("normal-flight", "refusals", "chunk", "missing-fields", "killed-daemon")


def test_waypoints_by_the_lines_of_a_dry_run(tmp_path):
    environment = ros_environment(1 + os.getpid() % 100, tmp_path)
    with node_process(environment, tmp_path, "--dry-run") as node:

        def read() -> list[Command]:
            return [command for line in node.lines if (command := parse_command(line, time.monotonic_ns()))]

        assert faults(WAYPOINT_NAMES, tmp_path, read, "waypoint") == {name: [] for name in WAYPOINT_NAMES}
    assert node.process.returncode == 0
