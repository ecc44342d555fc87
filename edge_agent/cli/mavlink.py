"""The command mavlink. Needs the extra `mavlink`: pymavlink and pyyaml."""

from __future__ import annotations

import argparse
import time

import msgspec

from edge_agent.errors import ConfigError
from edge_agent.mavlink import bridge
from edge_agent.mavlink.config import FORMS, BridgeConfig, load_config, parse_connection
from edge_agent.mavlink.dry_run import Dry
from edge_agent.mavlink.link import Link


def run_command(arguments: argparse.Namespace) -> int:
    """Returns the exit status. Raises ConfigError."""
    config = load_config(arguments.config) if arguments.config else BridgeConfig()
    given = {"connection": arguments.connection, "runtime_dir": arguments.runtime_dir}
    config = msgspec.structs.replace(config, **{key: value for key, value in given.items() if value})
    if not config.connection and not arguments.dry_run:
        raise ConfigError(f"expected --connection, or `connection` in the file of --config: {FORMS}")
    link = None
    if config.connection:
        link = Link(parse_connection(config.connection), config.target_system, time.monotonic_ns)
    if arguments.dry_run:
        return bridge.run(config, Dry(link, config), arguments.json, print_sent=True)
    assert link is not None
    return bridge.run(config, link, arguments.json)
