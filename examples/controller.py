"""The smallest controller: it prints what the robot should do, and "hold" when there is no valid action.

hold: stop, or keep the position; never repeat the last command.

pip install .                                     # in a clone of this repository: msgspec and pyzmq, nothing else
python examples/controller.py                     # beside a daemon; --runtime-dir DIR: its folder of sockets
edge-agent rehearse all -- python examples/controller.py --runtime-dir {dir}          # proves that it holds
"""

from __future__ import annotations

import argparse
import contextlib
import time

from edge_agent.client import ChunkPlayer, Client
from edge_agent.client.chunk_player import ChunkStep

PERIOD_S = 0.05  # 20 turns per second, more than an autopilot needs
SPEEDS = ("forward_m_s", "right_m_s", "down_m_s", "yaw_rate_rad_s")  # of `move` in the action space velocity_body


def command_of(step: ChunkStep | None) -> str:
    """What the vehicle is told: a complete `move`, or hold. A real controller may also search and land."""
    if step is None or step.type != "move" or not all(isinstance(step.values.get(name), float) for name in SPEEDS):
        return "hold"
    return " ".join(["move", *(f"{name}={step.values[name]}" for name in SPEEDS)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the actions of a running edge-agent.")
    parser.add_argument("--runtime-dir", default="", metavar="DIR", help="the daemon's folder of sockets")
    previous = ""
    with Client(parser.parse_args().runtime_dir) as agent:
        player = ChunkPlayer(agent)
        while True:
            player.take(agent.next_answer(timeout_s=PERIOD_S))  # a refusal ends the action before it
            now_ns = time.monotonic_ns()
            command = command_of(player.step())  # no step after the action's expiry
            if command != previous:  # a robot would get the command at every turn
                print(f"@{now_ns} {command}", flush=True)
            previous = command


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
