"""The table of commands of edge-agent: what each one does, its arguments, and the file of this room that runs it.

Data only: this file loads neither the daemon nor the client, so `edge-agent --help` works on every install.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from edge_agent.errors import UserError

EX_FAILED = 1
EX_USAGE = 2  # argparse's own status for wrong arguments
EX_NO_DAEMON = os.EX_TEMPFAIL  # 75
EX_CONFIG = os.EX_CONFIG  # 78: as EX_USAGE, systemd does not retry it


class CommandFailed(UserError):
    """One line for the user, and the exit status of the program."""

    def __init__(self, line: str, exit_status: int = EX_FAILED) -> None:
        super().__init__(line)
        self.exit_status = exit_status


class Argument(NamedTuple):
    """The arguments of one call of argparse's add_argument."""

    flag: str
    options: dict[str, Any]


class Command(NamedTuple):
    # The file of this room that runs the command.
    file: Literal["daemon", "check", "doctor", "control", "bundles", "installed", "tune", "rehearse", "ros2", "mavlink"]
    summary: str  # one line, in edge-agent --help
    details: str  # the following lines, in edge-agent COMMAND --help
    arguments: tuple[Argument, ...]


def _argument(flag: str, **options: Any) -> Argument:
    return Argument(flag, options)


_CONFIG = _argument("--config", metavar="FILE", help="configuration file; systemd/edge-agent.yaml explains every key")
_BUNDLE = _argument("--bundle", metavar="DIR", help="folder of the bundle; replaces `bundle` of the file")
_CAMERA = _argument("--camera", metavar="SOURCE", help="video device, video file, folder of images, gst:PIPELINE or "
                    "zmq:ENDPOINT; replaces `camera.source` of the file")  # fmt: skip
_RUNTIME_DIR = _argument("--runtime-dir", default="", metavar="DIR", help="the daemon's folder of sockets; default: "
                         "$RUNTIME_DIRECTORY, /run/edge-agent, or that of a daemon this user started")  # fmt: skip
_JSON = _argument("--json", action="store_true", help="print every message as one line of JSON")

# Command -> what it is. The order is the order in --help.
COMMANDS: dict[str, Command] = {
    "run": Command(
        "daemon",
        "start the daemon: camera, model and sockets",
        "Runs until SIGTERM or Ctrl-C. Give --config, or --bundle and --camera.",
        (
            _CONFIG, _BUNDLE, _CAMERA,
            _argument("--trace", metavar="FILE", help="write a timeline of every frame; open it in ui.perfetto.dev"),
        ),
    ),
    "check": Command(
        "check",
        "check everything that the daemon needs, without starting it",
        "Prints one line per part (action space, sockets, bundle, camera, processor, memory, context) and goes on "
        "after a fault. WARN: the daemon starts, and serves when the remedy is done. Exit status 78 if "
        "any part has a fault.",
        (_CONFIG, _BUNDLE, _CAMERA),
    ),
    "doctor": Command(
        "doctor",
        "say what is wrong with this machine: board, GPU, memory, disk, camera, installation",
        "Prints one line per check, and a remedy below each that did not pass. Needs no network, and changes nothing. "
        "Without --config, --bundle and --camera, it takes the configuration that the installed unit names. Exit "
        "status 0 if everything passed, 1 if there are warnings, 78 if something failed.",
        (
            _CONFIG, _BUNDLE, _CAMERA,
            _argument("--root", default="", metavar="DIR", help="examine a copy of another machine's files below DIR; "
                      "docs/doctor.md says which"),
            _argument("--json", action="store_true", help="print one line of JSON instead"),
        ),
    ),
    "bench": Command(
        "daemon",
        "measure how fast a bundle answers on this machine",
        "Runs the model alone, without camera and sockets. Prints a table on stderr and one line of JSON on stdout.",
        (
            _argument("--config", metavar="FILE", help="configuration file, as for run; its camera is not opened"),
            _BUNDLE,
            _argument("--frames", type=Path, metavar="PATH", help="folder of images or a video; default: generated"),
            _argument("-n", type=int, default=60, metavar="N", help="number of frames to answer (default: 60)"),
            _argument("--max-image-tokens", type=int, metavar="N", help="replaces vision.max_image_tokens"),
            _argument("--backend", choices=("onnxruntime", "mtmd"), help="replaces vision.backend"),
            _argument("--action-space", metavar="SPACE", help="replaces task.action_space"),
            _argument("--instruction", metavar="TEXT", help="replaces task.instruction"),
        ),
    ),
    "tune": Command(
        "tune",
        "find the fastest configuration of this board by measurement",
        "Runs the daemon for some seconds with each of about ten configurations: vision encoder (onnxruntime with the "
        "provider that runs here, and mtmd, each with the precision of its file), threads, overlap, draft, KV cache. "
        "Chooses by the mean age of information, and lowers image tokens only where the deadline is missed otherwise. "
        "Stop the daemon and other work first. No controller hears these runs. Prints a table on "
        "stderr and one line of JSON on stdout; the file is changed only with --write.",
        (
            _CONFIG, _BUNDLE, _CAMERA,
            _argument("--deadline-ms", type=int, metavar="N", help="replaces task.deadline_ms for the measurement"),
            _argument("--seconds", type=float, default=4.0, metavar="S", help="measure each configuration for S "
                      "seconds (default: 4)"),
            _argument("--tensorrt", action="store_true", help="also try onnxruntime with TensorRT, which first makes "
                      "an engine for minutes; without this, only where vision.tensorrt is true"),
            _argument("--write", action="store_true", help="set the chosen keys in the configuration file; everything "
                      "else in it stays as it is"),
        ),
    ),
    "rehearse": Command(
        "rehearse",
        "play scripted streams to a controller, and say whether it holds when it must",
        "Needs no camera, no model and no daemon: it publishes on the sockets itself. Without a scenario, it lists "
        "them. After -- comes the command of the controller, in which {dir} stands for the folder of the sockets. The "
        "controller prints one line for each command that it gives to its vehicle; docs/controller.md has the form. "
        "Exit status 1 if it did something wrong. Without --, the scenarios move whatever controller is connected to "
        "--runtime-dir: take the propellers off.",
        (
            _argument("scenarios", metavar="SCENARIO", nargs="*", help="names from the list, or all"),
            _argument("--runtime-dir", default="", metavar="DIR", help="folder of the sockets; default, with a "
                      "command: a temporary folder"),
            _argument("--action-space", choices=("velocity_body", "waypoint"), default="velocity_body", help="of the "
                      "actions (default: velocity_body)"),
            _argument("--json", action="store_true", help="print one line of JSON per scenario, or per message"),
        ),
    ),
    "bundle": Command("installed", "wrap, install, list, verify or roll back bundles", "", ()),
    "keygen": Command(
        "bundles",
        "make a pair of keys that sign bundles",
        "FILE is the private key: keep it where bundles are built. FILE.pub is the public key: copy it to the devices.",
        (_argument("file", metavar="FILE", help="path of the new private key; an existing file is not overwritten"),),
    ),
    "listen": Command(
        "control",
        "show actions, text and status as they are published",
        "On a terminal with the package rich installed: a live screen. Otherwise: one line per message.",
        (_RUNTIME_DIR, _JSON, _argument("--seconds", type=float, metavar="S", help="stop after S seconds")),
    ),
    "status": Command(
        "control",
        "print the daemon's state",
        "Exit status 75 if no daemon answers.",
        (_RUNTIME_DIR, _JSON),
    ),
    "ask": Command(
        "control",
        "ask the model a question about the newest frame",
        "Prints the answer while the model writes it.",
        (_argument("text", metavar="TEXT", help="the question"), _RUNTIME_DIR),
    ),
    "instruct": Command(
        "control",
        "give the model a new instruction",
        "Returns when the model has taken the instruction; the next frame is answered under it.",
        (_argument("text", metavar="TEXT", help="the instruction, 1 to 2000 characters"), _RUNTIME_DIR),
    ),
    "adapter": Command(
        "control",
        "switch to one of the configured LoRA adapters",
        "Without NAME: switch the adapter off.",
        (
            _argument("text", metavar="NAME", nargs="?", default="", help="a name from language.adapters"),
            _RUNTIME_DIR,
        ),
    ),
    "vehicle-state": Command(
        "control",
        "send values of the vehicle's state, such as its altitude, to the model",
        "A controller does the same with Client.vehicle_state().",
        (
            _argument("values", metavar="KEY=VALUE", nargs="+", help="a key of the action space's state, its value"),
            _RUNTIME_DIR,
        ),
    ),
    "pause": Command("control", "stop publishing actions", "", (_RUNTIME_DIR,)),
    "resume": Command("control", "publish actions again after a pause", "", (_RUNTIME_DIR,)),
    "mavlink": Command(
        "mavlink",
        "fly a PX4 or ArduPilot vehicle by the actions: the MAVLink bridge",
        "Sends each action as one setpoint, while it is valid and the autopilot itself says that it is armed and in "
        "OFFBOARD or GUIDED. Otherwise it sends hold for a bounded time, and then nothing. Never arms, never changes "
        "the mode. Runs until SIGTERM or Ctrl-C. docs/mavlink.md describes the wiring and the parameters of the "
        "autopilot.",
        (
            _argument("--config", metavar="FILE", help="configuration file of the bridge; "
                      "systemd/edge-agent-mavlink.yaml explains every key"),
            _argument("--connection", default="", metavar="LINK", help="udpout:ADDRESS:PORT, udpin:ADDRESS:PORT, "
                      "tcp:ADDRESS:PORT or serial:DEVICE:BAUD; replaces `connection` of the file"),
            _RUNTIME_DIR,
            _argument("--dry-run", action="store_true", help="print each setpoint and send nothing; without a "
                      "connection, assume an autopilot that takes setpoints"),
            _argument("--json", action="store_true", help="write the log as lines of JSON"),
        ),
    ),
    "ros2": Command(
        "ros2",
        "put the daemon on a ROS 2 graph: velocities, text and diagnostics out, images in",
        "Needs rclpy: source the setup.bash of ROS 2 first. Runs until SIGTERM or Ctrl-C, and ends with a hold. "
        "docs/ros2.md lists the topics, services and parameters.",
        (
            _RUNTIME_DIR,
            _argument("--dry-run", action="store_true", help="print each command as one line instead of publishing it: "
                      "@CLOCK_MONOTONIC in ns, type, values"),
            _argument("--ros-args", nargs=argparse.REMAINDER, default=[], metavar="ARG", help="the last option: what "
                      "follows is for ROS, such as -r cmd_vel:=/drone/cmd_vel -p frames:=ipc:///run/edge-agent/frames"),
        ),
    ),
}  # fmt: skip


_STORE = _argument("--store", type=Path, metavar="DIR", help="folder of the installed bundles; default: that of "
                   "`bundle` in the configuration, else /var/lib/edge-agent/bundles")  # fmt: skip
_DEVICE_CONFIG = _argument("--config", type=Path, metavar="FILE", help="configuration whose `trusted_keys` must have "
                           "signed the bundle; default: /etc/edge-agent.yaml if it exists")  # fmt: skip

# The commands below `edge-agent bundle`.
BUNDLE_COMMANDS: dict[str, Command] = {
    "wrap": Command(
        "bundles",
        "make a bundle of GGUF files that another tool made",
        "Copies the files as they are, with their hashes and the facts of their headers. Frames need an mmproj; a "
        "language model alone answers from the vehicle's state. Of a split file give the first part: the parts beside "
        "it are merged. docs/bundle.md lists the families that are served.",
        (
            _argument("files", nargs="+", type=Path, metavar="FILE", help="LANGUAGE.gguf [MMPROJ.gguf] OUT: the model, "
                      "its vision encoder, and the folder to make"),
            _argument("--layout", default="", metavar="LAYOUT", help="prompt layout: mistral, chatml, gemma, llama3 "
                      "or a YAML file; default: found by the special tokens of the vocabulary"),
            _argument("--link", action="store_true", help="share the files' bytes with the bundle instead of a copy; "
                      "on one file system only, and not for the parts of a split file"),
            _argument("--sign", type=Path, metavar="KEY", help="private key (edge-agent keygen) that signs the bundle"),
        ),
    ),
    "install": Command(
        "installed",
        "copy a bundle into the store, verify it, and make it the current one",
        "The bundle before it stays for a rollback. A restart of the daemon serves the new one. A bundle with a lower "
        "counter than one that was current here is refused.",
        (_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle"), _STORE, _DEVICE_CONFIG),
    ),
    "list": Command(
        "installed",
        "show the installed bundles: name, model, date, counter, state, size",
        "Reads the manifests only.",
        (_STORE, _DEVICE_CONFIG, _argument("--json", action="store_true", help="print one line of JSON")),
    ),
    "verify": Command(
        "installed",
        "verify signature, hashes and headers of installed bundles",
        "Exit status 78 if any of them has a fault.",
        (
            _argument("bundle", nargs="?", default="", metavar="BUNDLE", help="a name from list, `current`, or a "
                      "folder; default: all that are installed"),
            _STORE, _DEVICE_CONFIG,
        ),
    ),
    "rollback": Command(
        "installed",
        "verify the previous bundle and make it the current one",
        "A restart of the daemon serves it. The bundle that was current becomes the previous one.",
        (
            _argument("--allow-lower-counter", action="store_true", help="also if its counter is lower than that of a "
                      "bundle that was current here"),
            _STORE, _DEVICE_CONFIG,
        ),
    ),
}  # fmt: skip


def add_bundle_commands(parser: argparse.ArgumentParser) -> None:
    """The parsers of `edge-agent bundle install` and its siblings."""
    group = parser.add_subparsers(required=True, metavar="COMMAND", dest="bundle_command")
    for name, row in BUNDLE_COMMANDS.items():
        description = f"{row.summary[0].upper()}{row.summary[1:]}. {row.details}"
        sub = group.add_parser(name, help=row.summary, description=description)
        for argument in row.arguments:
            sub.add_argument(argument.flag, **argument.options)


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    for argument in COMMANDS[command].arguments:
        parser.add_argument(argument.flag, **argument.options)
