"""edge-agent: parses the arguments, runs the command, prints one line for an error, sets the exit status.

This file loads only the standard library and edge_agent.errors. The files that run the commands are imported when a
command is called: `edge-agent status` needs msgspec and pyzmq, `edge-agent run` needs the packages of the daemon.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
from collections.abc import Callable, Mapping

from edge_agent.cli.commands import (
    BUNDLE_COMMANDS,
    COMMANDS,
    EX_CONFIG,
    EX_FAILED,
    EX_NO_DAEMON,
    CommandFailed,
    add_arguments,
    add_bundle_commands,
)
from edge_agent.errors import UserError

EPILOG = """examples:
  edge-agent doctor
  edge-agent check --config /etc/edge-agent.yaml
  edge-agent run --bundle bundles/3b --camera /dev/video0
  edge-agent listen
  edge-agent ask "What is in front of us?"
  edge-agent instruct "Land on the blue square."
  edge-agent bench --bundle bundles/3b --frames clip.mp4
  edge-agent rehearse all -- python examples/controller.py --runtime-dir {dir}
  edge-agent tune --config /etc/edge-agent.yaml --write
  edge-agent mavlink --connection serial:/dev/ttyTHS1:921600
  edge-agent bundle install bundles/3b
  edge-agent bundle rollback
  edge-agent bundle wrap LANGUAGE.gguf MMPROJ.gguf bundles/3b

exit status:
  0   success
  1   failed, or refused by the daemon; doctor: there are warnings; rehearse: the controller failed
  2   wrong arguments
  69  the camera delivered no frame
  75  no daemon answers
  78  the configuration, the bundle, the installation or the machine has a fault; a restart does not help
"""
# What setup.cfg's extra `agent` installs, by the names to import.
DAEMON_MODULES = ("cryptography", "cv2", "gguf", "llama_cpp", "llguidance", "numpy", "simplejpeg", "yaml")
MAVLINK_MODULES = ("pymavlink", "yaml")  # extra `mavlink`


def main() -> None:
    words, controller = split_controller(sys.argv[1:])
    arguments = make_parser().parse_args(words)
    arguments.controller = controller
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without "°" shows "?"
    try:
        sys.exit(run_command(arguments))
    except UserError as error:
        _fail(str(error), error.exit_status)
    except TimeoutError as error:
        _fail(str(error), EX_NO_DAEMON)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.filename or 'edge-agent'}: {error.strerror or error}", EX_FAILED)


def split_controller(words: list[str]) -> tuple[list[str], list[str]]:
    """The arguments of `rehearse`, and behind `--` the command of the controller. Every other command is unchanged."""
    if words[:1] != ["rehearse"] or "--" not in words:
        return words, []
    i = words.index("--")
    return words[:i], words[i + 1 :]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-agent",
        description="Runs a vision-language model on camera frames, offline. Publishes checked actions and text over "
        "ZeroMQ.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, row in COMMANDS.items():
        description = f"{row.summary[0].upper()}{row.summary[1:]}. {row.details}".rstrip()
        command = commands.add_parser(name, help=row.summary, description=description)
        add_arguments(command, name)
        if name == "bundle":
            add_bundle_commands(command)
    return parser


def run_command(arguments: argparse.Namespace) -> int:
    """Returns the exit status. Raises UserError, OSError, and TimeoutError if no daemon answers."""
    name = arguments.command
    file = COMMANDS[name].file
    if name == "bundle":
        name, file = f"bundle {arguments.bundle_command}", BUNDLE_COMMANDS[arguments.bundle_command].file
    if file == "control":
        from edge_agent.cli import control

        return control.run_command(name, arguments)
    if file == "ros2":
        from edge_agent.cli import ros2

        return ros2.run_command(arguments)
    if file == "mavlink":
        _require_mavlink()
        from edge_agent.cli import mavlink

        return mavlink.run_command(arguments)
    handlers: Mapping[str, Callable[[argparse.Namespace], int]]
    if file == "rehearse":
        from edge_agent.cli import rehearse

        return rehearse.HANDLERS[name](arguments)
    _require_daemon(name)
    if file == "daemon":
        from edge_agent.cli import daemon

        handlers = daemon.HANDLERS
    elif file == "tune":
        from edge_agent.cli import tune

        handlers = tune.HANDLERS
    elif file == "check":
        from edge_agent.cli import check

        handlers = check.HANDLERS
    elif file == "installed":
        from edge_agent.cli import installed

        handlers = installed.HANDLERS
    elif file == "doctor":
        from edge_agent.cli import doctor

        handlers = doctor.HANDLERS
    else:
        from edge_agent.cli import bundles

        handlers = bundles.HANDLERS
    return handlers[name](arguments)


def _require_daemon(command: str) -> None:
    """Raise CommandFailed if a package of the daemon is not installed. Imports none of them."""
    missing = [name for name in DAEMON_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandFailed(
            f"edge-agent {command} needs the daemon; in the folder of its source: pip install '.[agent]', with "
            f"onnxruntime for a CPU '.[cpu]', for an NVIDIA GPU '.[gpu]' (not installed here: {', '.join(missing)})",
            EX_CONFIG,
        )


def _require_mavlink() -> None:
    missing = [name for name in MAVLINK_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandFailed(
            "edge-agent mavlink needs pymavlink; in the folder of its source: pip install '.[mavlink]' (not installed "
            f"here: {', '.join(missing)})",
            EX_CONFIG,
        )


def _fail(line: str, status: int) -> None:
    prefix = "" if line.startswith("edge-agent ") else "edge-agent: "
    print(f"{prefix}{line}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
