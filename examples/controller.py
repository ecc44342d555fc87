"""The smallest controller: it prints what the robot should do, and "hold" when no valid action arrives.

hold: stop, or keep the position; never repeat the last command.

pip install .                                     # in a clone of this repository: msgspec and pyzmq, nothing else
python examples/controller.py                     # beside a daemon; --runtime-dir DIR: its folder of sockets
"""

from __future__ import annotations

import argparse
import contextlib

from edge_agent.client import ChunkPlayer, Client

PERIOD_S = 0.05  # 20 turns per second, more than an autopilot needs


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the actions of a running edge-agent.")
    parser.add_argument("--runtime-dir", default="", metavar="DIR", help="the daemon's folder of sockets")
    previous = ""
    with Client(parser.parse_args().runtime_dir) as agent:
        player = ChunkPlayer(agent)
        while True:
            player.take(agent.next_answer(timeout_s=PERIOD_S))
            step = player.step()  # never after the action's expiry
            if step is None:
                command = "hold"  # no action, a refusal, or an expired action
            else:
                command = " ".join([step.type, *(f"{name}={value}" for name, value in step.values.items())])
            if command != previous:  # a robot would get the command at every turn
                print(command, flush=True)
            previous = command


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
