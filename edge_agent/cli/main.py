"""edge-agent: run, check, bench, listen, ask, instruct and the rest. Parses arguments, prints, sets the exit status.

Exit status: 0 fine; 1 failed; 2 wrong arguments; 69 no camera yet; 75 no daemon answers; 78 configuration, bundle or
source is wrong (systemd does not retry that one).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from edge_agent.bundle.manifest import Manifest
from edge_agent.config import CameraConfig, Config, load_config
from edge_agent.errors import BundleError, ConfigError, UserError
from edge_agent.strict_yaml import convert
from edge_agent.wire.endpoints import runtime_dir

EPILOG = """examples:
  edge-agent check  --config /etc/edge-agent.yaml
  edge-agent run    --bundle bundles/3b --camera /dev/video0
  edge-agent listen
  edge-agent bench  --bundle bundles/3b --frames clip.mp4
  edge-agent ask "What is in front of us?"
  edge-agent instruct "Land on the blue square."
"""
PROBE_S = 12.0
EX_NO_DAEMON = os.EX_TEMPFAIL


def main() -> None:
    arguments = _parser().parse_args()
    try:
        sys.exit(arguments.run(arguments))
    except UserError as error:
        _fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except TimeoutError as error:
        _fail(str(error), EX_NO_DAEMON)
    except OSError as error:
        _fail(f"{error.filename or 'edge-agent'}: {error.strerror or error}", 1)


def _fail(line: str, status: int) -> None:
    print(f"edge-agent: {line}", file=sys.stderr)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-agent",
        description="Camera frames in, checked robot actions and language out over ZeroMQ, on the device, offline.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    for name, run, text in (
        ("run", _run, "serve: camera, model, endpoints, until stopped"),
        ("check", _check, "validate configuration, bundle, camera and memory without serving; exit 78 on trouble"),
    ):
        command = add(name, run, text)
        command.add_argument("--config", metavar="FILE", help="YAML; systemd/edge-agent.yaml explains every key")
        command.add_argument("--bundle", metavar="DIR", help="instead of, or over, the file's bundle")
        command.add_argument("--camera", metavar="SOURCE", help="instead of, or over, the file's camera.source")
        if name == "run":
            command.add_argument("--trace", metavar="FILE", help="a timeline of what is done when, for ui.perfetto.dev")

    bench_arguments(add("bench", run_bench, "how fast a bundle answers on this machine: no camera, no sockets"))

    command = add("keygen", _keygen, "a key pair to sign bundles with: FILE stays where they are built")
    command.add_argument("file", metavar="FILE", help="the private key; FILE.pub goes to the devices")

    for name, run, text in (
        ("listen", _listen, "show actions, words and status as a controller hears them"),
        ("status", _status, "what the daemon is doing"),
        ("ask", _ask, "a question about what the camera sees, answered in words"),
        ("instruct", _instruct, "give the daemon a new instruction"),
        ("adapter", _adapter, "switch to one of the configured adapters, or without NAME to none"),
        ("vehicle-state", _vehicle_state, "tell the model what the vehicle knows of itself, as a controller does"),
        ("pause", _pause, "no more actions, from now on"),
        ("resume", _resume, "actions again"),
    ):
        command = add(name, run, text)
        if name in ("ask", "instruct"):
            command.add_argument("text", metavar="TEXT")
        if name == "adapter":
            command.add_argument("text", metavar="NAME", nargs="?", default="")
        if name == "vehicle-state":
            command.add_argument(
                "values", metavar="KEY=VALUE", nargs="+", help="as the action space's state names them"
            )
        command.add_argument("--runtime-dir", default="", metavar="DIR", help="the daemon's runtime folder")
        if name in ("listen", "status"):
            command.add_argument("--json", action="store_true", help="one JSON line per message")
        if name == "listen":
            command.add_argument("--seconds", type=float, metavar="S", help="stop after so long")
    return parser


def bench_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="FILE", help="as for run; its camera is not opened")
    command.add_argument("--bundle", metavar="DIR", help="instead of, or over, the file's bundle")
    command.add_argument("--frames", type=Path, metavar="DIR|VIDEO", help="pictures to answer (default: made up)")
    command.add_argument("-n", type=int, default=60, metavar="N", help="frames to answer (default 60)")
    command.add_argument("--max-image-tokens", type=int, metavar="N", help="over the file's vision.max_image_tokens")
    command.add_argument("--backend", choices=("onnxruntime", "mtmd"), help="over the file's vision.backend")
    command.add_argument("--action-space", help="over the file's task.action_space")
    command.add_argument("--instruction", metavar="TEXT", help="over the file's task.instruction")
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="where the time goes, as a picture")


def _config(arguments: argparse.Namespace) -> Config:
    """The file, with --bundle and --camera over it; both flags together need no file."""
    if arguments.config:
        config = load_config(arguments.config)
        if arguments.bundle:
            config = msgspec.structs.replace(config, bundle=arguments.bundle)
        if arguments.camera:
            config = msgspec.structs.replace(
                config, camera=msgspec.structs.replace(config.camera, source=arguments.camera)
            )
    elif arguments.bundle and arguments.camera:
        config = Config(bundle=arguments.bundle, camera=CameraConfig(source=arguments.camera))
    else:
        raise ConfigError("expected --config FILE, or --bundle DIR and --camera SOURCE")
    return config


def _run(arguments: argparse.Namespace) -> int:
    from edge_agent.supervisor.process import run
    from edge_agent.supervisor.publisher import EndpointError

    try:
        config = _config(arguments)
        return run(config, trace_path=arguments.trace or "")
    except EndpointError as error:
        _fail(str(error), os.EX_CONFIG)


def _check(arguments: argparse.Namespace) -> int:
    """One line per thing checked; goes on after a failure, so that one run shows all of them."""
    from edge_agent.actions.space import load_action_space
    from edge_agent.bundle.lora_check import verify_adapters
    from edge_agent.bundle.verify import verify_bundle

    config, status, manifest = _config(arguments), 0, None
    try:
        space = load_action_space(config.task.action_space)
        print(f"ok    actions  {space.name}: {', '.join(space.actions)}")
    except ConfigError as error:
        status = _bad("actions", str(error))
    try:
        verified = verify_bundle(config.bundle, config.trusted_keys)
        verify_adapters(config.language.adapters, verified, config.trusted_keys)
        manifest = verified.manifest
        print(
            f"ok    bundle   {verified.id}: {manifest.model.family} {manifest.model.size} {manifest.recipe}, "
            f"{verified.file_bytes / 1e6:.1f} MB, every hash right{', signed' if config.trusted_keys else ''}"
        )
    except (BundleError, ConfigError) as error:
        status = _bad("bundle", str(error))
    seen, line = _probe(config.camera)
    status = (print(f"ok    camera   {line}") or status) if seen else _bad("camera", f"camera.source: {line}")
    if manifest is not None:
        status = _check_memory(config, manifest) or status
    return status


def _check_memory(config: Config, manifest: Manifest) -> int:
    from edge_agent.board import health
    from edge_agent.bundle.memory_plan import NotEnoughMemoryError, adapters_mib, plan_memory

    free_mib = health.mem_available_mib()
    try:
        planned = plan_memory(config, manifest, free_mib, adapters_mib(config))
    except NotEnoughMemoryError as error:
        return _bad("memory", str(error).removeprefix("memory: "))
    parts = ", ".join(f"{name} {mib:.0f}" for name, mib in planned.parts_mib.items() if mib >= 1)
    free = "unknown" if free_mib is None else f"{free_mib:.0f}"
    print(f"ok    memory   about {planned.mib:.0f} MiB needed ({parts}), {free} MiB available")
    for key, value in planned.given_up.items():
        print(f"      memory   is short: it would be served with {key}: {value}")
    return 0


def bench_config(arguments: argparse.Namespace) -> Config:
    """The configuration that bench's own arguments ask for. Raises ConfigError."""
    arguments.camera = "none"
    config = msgspec.to_builtins(_config(arguments))
    for table, key in (
        ("vision", "max_image_tokens"),
        ("vision", "backend"),
        ("task", "action_space"),
        ("task", "instruction"),
    ):
        if (value := getattr(arguments, key)) is not None:
            config[table][key] = value
    return convert(config, Config, "bench")


def run_bench(arguments: argparse.Namespace) -> int:
    """A table on stderr, one JSON line last on stdout."""
    from rich.console import Console
    from rich.progress import track

    from edge_agent.bundle.verify import verify_bundle
    from edge_agent.tools import bench

    if arguments.n < 1:
        _fail(f"-n: expected 1 or more, found {arguments.n}", 2)
    config = bench_config(arguments)
    verify_bundle(config.bundle, config.trusted_keys)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    steps = iter(track(range(arguments.n), "frames", console=console, transient=True))
    try:
        figures = bench.run(config, arguments.frames, arguments.n, lambda done, total: next(steps, None))
    except bench.BENCH_ERRORS as error:
        _fail(str(error), 1)
    for what, how_much in bench.table(figures):
        console.print(f"{what:20} {how_much}", markup=False)
    if arguments.plot is not None:
        bench.plot([figures], arguments.plot)
    print(json.dumps(figures))
    return 0


def _keygen(arguments: argparse.Namespace) -> int:
    from edge_agent.bundle import signing

    try:
        public = signing.keygen(Path(arguments.file))
    except signing.SigningError as error:
        _fail(str(error), 1)
    print(
        f"{arguments.file}: private, for edge-quantize build --sign\n{public}: public, for `trusted_keys` in "
        "the configuration"
    )
    return 0


def _bad(what: str, line: str) -> int:
    print(f"FAIL  {what:8} {line}")
    return os.EX_CONFIG


def _probe(config: CameraConfig) -> tuple[bool, str]:
    """Read one frame in a child process: a camera can hang in the driver for ever, a child can be killed."""
    child = subprocess.Popen(
        [sys.executable, "-m", "edge_agent.camera", "--probe"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, error = child.communicate(msgspec.json.encode(config).decode(), timeout=PROBE_S)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.communicate()
        return False, f"{config.source}: no frame in {PROBE_S:g} s"
    if child.returncode:
        return False, (error.strip().splitlines() or ["the probe failed"])[-1]
    return True, f"{config.source}: {out.strip()}"


def _client(arguments: argparse.Namespace):
    from edge_agent.client import Client

    return Client(arguments.runtime_dir)


def _listen(arguments: argparse.Namespace) -> int:
    from edge_agent.apps import terminal

    with _client(arguments) as client:
        if client.status(2.0) is None:
            raise TimeoutError(
                f"{client.folder}: no daemon answers; start one with edge-agent run, or give --runtime-dir"
            )
        terminal.show(client, arguments.seconds, arguments.json)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from edge_agent.apps.terminal import printable

    with _client(arguments) as client:
        status = client.status(2.0)
    if status is None:
        raise TimeoutError(f"{runtime_dir(arguments.runtime_dir)}: no daemon answers; is edge-agent running?")
    if arguments.json:
        print(msgspec.json.encode(status).decode())
        return 0
    for name in status.__struct_fields__:
        value = getattr(status, name)
        if isinstance(value, msgspec.Struct):
            value = msgspec.to_builtins(value)
        print(f"{name:18} {printable(str(value))}")
    return 0


def _ask(arguments: argparse.Namespace) -> int:
    """Print the answer's pieces as they are decoded."""
    from edge_agent.apps.terminal import printable
    from edge_agent.client import RequestRefused

    with _client(arguments) as client:
        try:
            for piece in client.ask_stream(arguments.text):
                print(printable(piece), end="", flush=True)
            print()
        except RequestRefused as error:
            _fail(str(error), 1)
    return 0


def _vehicle_state(arguments: argparse.Namespace) -> int:
    from edge_agent.client import RequestRefused

    values = {}
    for pair in arguments.values:
        key, sign, value = pair.partition("=")
        if not sign:
            _fail(f"expected KEY=VALUE, found {pair!r}", 2)
        values[key] = value
        with contextlib.suppress(ValueError):
            if isinstance(found := json.loads(value), bool | int | float):
                values[key] = found
    with _client(arguments) as client:
        try:
            client.request("vehicle_state", "", 5.0, values=values)
        except RequestRefused as error:
            _fail(str(error), 1)
    return 0


def _simple(operation: str):
    def run(arguments: argparse.Namespace) -> int:
        from edge_agent.client import RequestRefused

        with _client(arguments) as client:
            try:
                client.request(operation, getattr(arguments, "text", ""), 30.0)
            except RequestRefused as error:
                _fail(str(error), 1)
        return 0

    return run


_instruct, _adapter, _pause, _resume = map(_simple, ("instruct", "adapter", "pause", "resume"))


if __name__ == "__main__":
    main()
