"""Commands that need the daemon's packages: run, bench. Imported when one of them is called.

The native code is not loaded here either: run starts it in processes of its own, bench imports it last.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys

import msgspec

from edge_agent.bundle.manifest import VISION, read_manifest
from edge_agent.bundle.verify import verify_bundle
from edge_agent.cli.commands import EX_USAGE, CommandFailed, add_arguments
from edge_agent.config import CameraConfig, Config, check_texts, load_config
from edge_agent.errors import FAULTS, BundleError, ConfigError, encodable
from edge_agent.profile import resolve
from edge_agent.strict_yaml import convert


def run(arguments: argparse.Namespace) -> int:
    """Serve until stopped. Returns the supervisor's exit status."""
    from edge_agent.supervisor import process

    config = read_config(arguments)
    require_onnxruntime(config)
    try:
        return process.run(config, trace_path=arguments.trace or "")
    except BrokenPipeError as error:  # of a command that prints, this means: nobody reads the rest. Not of a daemon
        raise RuntimeError("the supervisor wrote to a socket that is closed") from error


def read_config(arguments: argparse.Namespace) -> Config:
    """The configuration of --config, with --bundle and --camera in place of the file's values.

    With both --bundle and --camera no file is needed. Raises ConfigError, and CommandFailed without either.
    """
    bundle, source = arguments.bundle, arguments.camera
    for flag, name in (("--bundle", bundle), ("--camera", source)):
        if name and name != encodable(name):  # it goes to the child processes as UTF-8
            raise ConfigError(f"{flag}: {encodable(name)}: a name that is not UTF-8; rename it, or give a link to it")
    if arguments.config:
        config = load_config(arguments.config)
        camera = msgspec.structs.replace(config.camera, source=source or config.camera.source)
        config = msgspec.structs.replace(config, bundle=bundle or config.bundle, camera=camera)
    elif bundle and source:
        config = Config(bundle=bundle, camera=CameraConfig(source=source))
    else:
        raise CommandFailed("expected --config FILE, or --bundle DIR and --camera SOURCE", EX_USAGE)
    check_texts(config, arguments.config or "arguments")
    return config


def require_onnxruntime(config: Config) -> None:
    backend = resolve(config, gpu=False).vision_backend  # a GPU does not change the backend
    with contextlib.suppress(BundleError):  # reported later, with everything else about the bundle
        if VISION not in read_manifest(config.bundle).manifest.files:
            return
    if backend == "onnxruntime" and importlib.util.find_spec("onnxruntime") is None:
        raise CommandFailed(
            "vision.backend: onnxruntime is not installed; in the folder of its source: pip install '.[cpu]', for an "
            "NVIDIA GPU: pip install '.[gpu]'",
            FAULTS["installation"].exit_status,
        )


# -- bench ------------------------------------------------------------------------------------------------------------


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of edge-agent bench, for benchmarks/bench.py too."""
    add_arguments(parser, "bench")


def bench_config(arguments: argparse.Namespace) -> Config:
    """The configuration with the arguments of bench in place of its values. Raises ConfigError."""
    arguments.camera = "none"
    config = msgspec.to_builtins(read_config(arguments))
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
    """Print a table on stderr, and one line of JSON as the last line of stdout."""
    if arguments.n < 1:
        raise CommandFailed(f"-n: expected 1 or more, found {arguments.n}", EX_USAGE)
    config = bench_config(arguments)
    require_onnxruntime(config)
    verify_bundle(config.bundle, config.trusted_keys)
    from edge_agent.tools import bench

    figures = bench.run(config, arguments.frames, arguments.n, _show_progress)
    for name, value in bench.table(figures):
        print(f"{name:20} {value}", file=sys.stderr)
    print(json.dumps(figures))
    return 0


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rframe {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


HANDLERS = {"run": run, "bench": run_bench}
