"""edge-agent ros2: says what is missing where ROS 2 is not installed, and runs the node."""

from __future__ import annotations

import argparse

from edge_agent.cli.commands import EX_CONFIG, CommandFailed

HINT = "source /opt/ros/DISTRO/setup.bash first, and use the Python that ROS was built for; docs/ros2.md"


def run_command(arguments: argparse.Namespace) -> int:
    """Returns the exit status. Raises CommandFailed."""
    try:
        from edge_agent.ros2 import process
    except ImportError as error:  # also a library of another Python
        raise CommandFailed(f"edge-agent ros2 needs ROS 2 ({error}): {HINT}", EX_CONFIG) from None
    return process.run(arguments.runtime_dir, arguments.dry_run, arguments.ros_args)
