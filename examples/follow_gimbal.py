"""Keeps the camera on a target and comes near it slowly: waypoints become gimbal angles and a forward speed.

The daemon runs with `task.action_space: waypoint`, and the instruction names the target. Its camera is fixed to the
vehicle and looks forward; the gimbal carries another one. An answer says where the target is, from the vehicle. The
gimbal turns there at a limited rate. The vehicle moves only while the gimbal points ahead, slower the nearer the target
is, and stops at a distance. Without a valid waypoint both stand still: the gimbal keeps its angles, and the speed is 0.
A target that is lost is not searched for.

python examples/follow_gimbal.py                  # beside a daemon; --runtime-dir DIR: its folder of sockets
edge-agent rehearse all --action-space waypoint -- python examples/follow_gimbal.py --runtime-dir {dir}
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from typing import NamedTuple

from edge_agent.client import ChunkPlayer, Client
from edge_agent.client.chunk_player import ChunkStep

PERIOD_S = 0.05
MAX_RATE_RAD_S = 0.6  # of the gimbal: faster blurs the picture that the model sees
PITCH_RAD = (-math.pi / 2, 0.3)  # what the gimbal can do; down is negative, as in MAVLink
YAW_RAD = (-2.7, 2.7)  # clockwise from above, from the nose of the vehicle
AHEAD_RAD = 0.35  # the vehicle goes only where its camera looks
STAND_OFF_M = 3.0  # horizontal distance at which it stops
SPEED_PER_M = 0.2  # speed for each metre that is left, in 1/s
MAX_SPEED_M_S = {"slow": 0.5, "normal": 1.0}  # by `pace`


class Angles(NamedTuple):
    pitch_rad: float
    yaw_rad: float


class Waypoint(NamedTuple):
    forward_m: float
    right_m: float
    down_m: float
    pace: str


def waypoint_of(step: ChunkStep | None) -> Waypoint | None:
    """The waypoint of a valid action; None: there is none, or one of its values is missing or of another type."""
    if step is None or step.type != "waypoint" or step.values.get("pace") not in MAX_SPEED_M_S:
        return None
    numbers = [step.values.get(name) for name in ("forward_m", "right_m", "down_m")]
    if not all(isinstance(number, float) for number in numbers):
        return None
    return Waypoint(*numbers, step.values["pace"])


def angles_to(waypoint: Waypoint, before: Angles) -> Angles:
    """Where the camera has to look. Straight below there is no direction: the yaw stays as before."""
    distance_m = math.hypot(waypoint.forward_m, waypoint.right_m)
    yaw_rad = math.atan2(waypoint.right_m, waypoint.forward_m) if distance_m > 0.1 else before.yaw_rad
    pitch_rad = -math.atan2(waypoint.down_m, distance_m)
    return Angles(min(max(pitch_rad, PITCH_RAD[0]), PITCH_RAD[1]), min(max(yaw_rad, YAW_RAD[0]), YAW_RAD[1]))


def turned(angles: Angles, wanted: Angles, seconds: float) -> Angles:
    """The angles after some time at the largest rate. The time is that of one turn at most, whatever has passed."""
    step_rad = MAX_RATE_RAD_S * min(seconds, 2 * PERIOD_S)
    return Angles(*(now + min(max(goal - now, -step_rad), step_rad) for now, goal in zip(angles, wanted, strict=True)))


def speed_to(waypoint: Waypoint, angles: Angles) -> float:
    """m/s forward: less near the target, 0 at the stand-off distance and while camera or target are not ahead."""
    is_ahead = abs(angles.yaw_rad) < AHEAD_RAD and abs(math.atan2(waypoint.right_m, waypoint.forward_m)) < AHEAD_RAD
    left_m = math.hypot(waypoint.forward_m, waypoint.right_m) - STAND_OFF_M
    return min(max(SPEED_PER_M * left_m, 0.0), MAX_SPEED_M_S[waypoint.pace]) if is_ahead else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Point a gimbal at the waypoints of a running edge-agent.")
    parser.add_argument("--runtime-dir", default="", metavar="DIR", help="the daemon's folder of sockets")
    angles, previous, turned_ns = Angles(0.0, 0.0), "", time.monotonic_ns()
    with Client(parser.parse_args().runtime_dir) as agent:
        player = ChunkPlayer(agent)
        while True:
            player.take(agent.next_answer(timeout_s=PERIOD_S))  # a refusal ends the waypoint before it
            now_ns = time.monotonic_ns()
            waypoint = waypoint_of(player.step())  # no waypoint after its expiry
            if waypoint is None:
                command = "hold"
            else:
                angles = turned(angles, angles_to(waypoint, angles), (now_ns - turned_ns) / 1e9)
                told = {**waypoint._asdict(), **angles._asdict(), "speed_m_s": speed_to(waypoint, angles)}
                pairs = (f"{name}={round(value, 3) if name != 'pace' else value}" for name, value in told.items())
                command = " ".join(["waypoint", *pairs])
            turned_ns = now_ns
            if command != previous:  # to the gimbal and to the autopilot
                print(f"@{now_ns} {command}", flush=True)
            previous = command


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
