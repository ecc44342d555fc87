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

from edge_agent.actions.space import encode_action_space, load_action_space
from edge_agent.bundle.lora_check import verify_adapters
from edge_agent.bundle.manifest import VISION, Manifest, read_manifest
from edge_agent.bundle.model_start import encode_model_start
from edge_agent.bundle.verify import verify_bundle
from edge_agent.cli.commands import EX_USAGE, CommandFailed, add_arguments
from edge_agent.config import CameraConfig, Config, check_texts, load_config
from edge_agent.errors import FAULTS, ConfigError, encodable
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
    """The configuration of --config, with --bundle and --camera in place of the file's values. Raises ConfigError.

    With both --bundle and --camera no file is needed.
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
        raise ConfigError("expected --config FILE, or --bundle DIR and --camera SOURCE")
    check_texts(config, arguments.config or "arguments")
    return config


def require_onnxruntime(config: Config) -> None:
    backend = resolve(config, gpu=False).vision_backend  # a GPU does not change the backend
    with contextlib.suppress(BundleError):  # reported later, with everything else about the bundle
        if VISION not in read_manifest(config.bundle).manifest.files:
            return
    if backend == "onnxruntime" and importlib.util.find_spec("onnxruntime") is None:
        raise CommandFailed(
            "vision.backend: onnxruntime is not installed; for a CPU: pip install 'edge-agent[cpu]', for an NVIDIA "
            "GPU: pip install 'edge-agent[gpu]'",
            FAULTS["installation"].exit_status,
        )


# -- check ------------------------------------------------------------------------------------------------------------


def check(arguments: argparse.Namespace) -> int:
    """Print one line per part. Goes on after a fault, so that one run shows every fault."""
    config = read_config(arguments)
    require_onnxruntime(config)
    status, manifest, raw_space = 0, None, b""
    try:
        space = load_action_space(config.task.action_space)
        raw_space = encode_action_space(space)
        _print_ok("actions", f"{space.name}: {', '.join(space.actions)}")
    except ConfigError as error:
        status = _print_fault("actions", str(error))
    try:
        manifest, line = _check_bundle(config, raw_space)
        _print_ok("bundle", line)
    except (BundleError, ConfigError) as error:
        status = _print_fault("bundle", str(error))
    opened, line = probe_camera(config.camera)
    if opened:
        _print_ok("camera", line)
    else:
        status = _print_fault("camera", f"camera.source: {line}")
    _print_ok("cpu", _describe_threads(config))
    if manifest is not None:
        status = _check_memory(config, manifest) or status
    return status


def _print_ok(part: str, line: str) -> None:
    print(f"ok    {part:8} {line}")


def _print_fault(part: str, line: str) -> int:
    """Returns the exit status of check."""
    print(f"FAIL  {part:8} {line}")
    return EX_CONFIG


def _check_bundle(config: Config, space: bytes) -> tuple[Manifest, str]:
    """The manifest, and one line about it. Raises BundleError, ConfigError."""
    verified = verify_bundle(config.bundle, config.trusted_keys)
    verified = verify_adapters(config.language.adapters, verified, config.trusted_keys)
    encode_model_start(config, verified, space)  # run refuses texts that are too long in all
    manifest = verified.manifest
    signed = ", signed" if config.trusted_keys else ""
    if manifest.vision is None:
        signed += "; a text-only model: it answers from the vehicle's state, and a frame only says when"
    return manifest, (
        f"{verified.id}: {manifest.model.family} {manifest.model.size} {manifest.recipe}, "
        f"{verified.file_bytes / 1e6:.1f} MB, every hash is right{signed}"
    )


def _describe_threads(config: Config) -> str:
    """How many threads the model process uses, and why."""
    from edge_agent.board.control_groups import allowed_cores, available_cores, cpu_quota

    quota = cpu_quota()
    limit = "no quota of processor time" if quota is None else f"a quota of {quota:g} processors"
    source = "cpu_threads" if config.cpu_threads else f"{allowed_cores()} cores allowed, {limit}"
    return f"{config.cpu_threads or available_cores()} threads ({source})"


def _check_memory(config: Config, manifest: Manifest) -> int:
    """Returns the exit status of check."""
    from edge_agent.board import health
    from edge_agent.board.control_groups import memory_left_mib
    from edge_agent.bundle.memory_plan import NotEnoughMemoryError, adapters_mib, plan_memory

    free_mib = health.mem_available_mib()
    try:
        plan = plan_memory(config, manifest, free_mib, adapters_mib(config))
    except NotEnoughMemoryError as error:
        return _print_fault("memory", str(error).removeprefix("memory: "))
    parts = ", ".join(f"{name} {mib:.0f}" for name, mib in plan.parts_mib.items() if mib >= 1)
    free = "unknown" if free_mib is None else f"{free_mib:.0f}"
    limit = ", the limit of a control group" if free_mib is not None and free_mib == memory_left_mib() else ""
    _print_ok("memory", f"about {plan.mib:.0f} MiB needed ({parts}), {free} MiB available{limit}")
    for key, value in plan.reductions.items():
        print(f"      memory   low memory: {key} is reduced to {value}")
    return 0


def probe_camera(config: CameraConfig) -> tuple[bool, str]:
    """Read one frame. Returns whether it arrived, and one line.

    In a child process: a driver can block a read for ever, and a child can be killed.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "edge_agent.camera", "--probe"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, error = child.communicate(msgspec.json.encode(config).decode(), timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()  # not waited for: a child inside a driver call can stay in the kernel for ever
        return False, f"{config.source}: no frame in {PROBE_TIMEOUT_S:g} s"
    if child.returncode:
        return False, (error.strip().splitlines() or ["the probe failed"])[-1]
    return True, f"{config.source}: {out.strip()}"


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
