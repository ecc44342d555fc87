"""Commands that talk to a running daemon: listen, status, ask, instruct, adapter, vehicle-state, pause, resume.

They need the base install only: msgspec and pyzmq.
"""

from __future__ import annotations

import argparse
import contextlib
import json

import msgspec

from edge_agent.apps import terminal
from edge_agent.apps.wire_log import printable
from edge_agent.cli.commands import EX_USAGE, CommandFailed
from edge_agent.client import Client, RequestRefused
from edge_agent.wire.control import StateValue
from edge_agent.wire.messages import Status

STATUS_TIMEOUT_S = 2.0  # the daemon publishes its status five times a second
REQUEST_TIMEOUT_S = 30.0  # of requests that wait for the model
CONSTANTS = {"true": True, "false": False, "null": None, "none": None, "unknown": None}
STOP_TIMEOUT_S = 2.0  # the supervisor alone replies, at once


def run_command(name: str, arguments: argparse.Namespace) -> int:
    """Returns the exit status. Raises CommandFailed, and TimeoutError if no daemon answers."""
    with Client(arguments.runtime_dir) as client:
        try:
            if name == "listen":
                _read_status(client)  # streams are silent where no daemon runs
            HANDLERS[name](client, arguments)
        except RequestRefused as error:
            raise CommandFailed(str(error)) from None
    return 0


def listen(client: Client, arguments: argparse.Namespace) -> None:
    terminal.run(client, seconds=arguments.seconds, as_json=arguments.json)


def status(client: Client, arguments: argparse.Namespace) -> None:
    current = _read_status(client)
    if arguments.json:
        print(msgspec.json.encode(current).decode())
        return
    for name, value in msgspec.structs.asdict(current).items():
        plain = msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else value
        print(f"{name:18} {printable(str(plain))}")


def ask(client: Client, arguments: argparse.Namespace) -> None:
    """Prints each piece of the answer when it arrives."""
    for piece in client.ask_stream(arguments.text):
        print(printable(piece), end="", flush=True)
    print()


def instruct(client: Client, arguments: argparse.Namespace) -> None:
    client.instruct(arguments.text, REQUEST_TIMEOUT_S)


def adapter(client: Client, arguments: argparse.Namespace) -> None:
    client.adapter(arguments.text, REQUEST_TIMEOUT_S)


def vehicle_state(client: Client, arguments: argparse.Namespace) -> None:
    refused = client.vehicle_state(**dict(map(parse_pair, arguments.values)))
    if refused:
        raise CommandFailed("; ".join(f"{key}: {printable(why)}" for key, why in refused.items()))


def pause(client: Client, _arguments: argparse.Namespace) -> None:
    client.pause(STOP_TIMEOUT_S)


def resume(client: Client, _arguments: argparse.Namespace) -> None:
    client.resume(STOP_TIMEOUT_S)


def parse_pair(pair: str) -> tuple[str, StateValue | None]:
    """altitude_m=3.5 -> ("altitude_m", 3.5). "true", "True", "false" and "null" are no words. Everything else that is
    not a number is a string.

    Raises CommandFailed if there is no "=".
    """
    key, equals_sign, text = pair.partition("=")
    if not equals_sign:
        raise CommandFailed(f"expected KEY=VALUE, found {pair!r}", EX_USAGE)
    if text.lower() in CONSTANTS:
        return key, CONSTANTS[text.lower()]
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, int | float):
            return key, value
    return key, text


def _read_status(client: Client) -> Status:
    """The newest status. Raises TimeoutError if no daemon publishes one."""
    current = client.status(STATUS_TIMEOUT_S)
    if current is None:
        raise TimeoutError(
            f"{client.folder}: no daemon answers; start one with edge-agent run, or give the daemon's --runtime-dir"
        )
    return current


HANDLERS = {
    "listen": listen,
    "status": status,
    "ask": ask,
    "instruct": instruct,
    "adapter": adapter,
    "vehicle-state": vehicle_state,
    "pause": pause,
    "resume": resume,
}
