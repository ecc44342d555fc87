"""edge-agent check: what the daemon would refuse at its start, part by part, without serving.

Each part is checked by the code that the daemon runs for it. Camera and vocabulary are opened in processes of their
own, as in the daemon.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_agent.actions.space import encode_action_space, load_action_space
from edge_agent.bundle.lora_check import verify_adapters
from edge_agent.bundle.manifest import Bundle, Manifest
from edge_agent.bundle.model_start import encode_model_start, fit_to_bundle
from edge_agent.bundle.verify import verify_bundle
from edge_agent.cli.commands import EX_CONFIG
from edge_agent.cli.daemon import read_config, require_onnxruntime
from edge_agent.config import CameraConfig, Config
from edge_agent.errors import ConfigError, UserError

PROBE_S = 10.0  # for the first frame
PROBE_EXIT_S = 2.0  # more, for the process
PROMPT_TIMEOUT_S = 120.0  # a vocabulary of 131072 tokens takes two seconds; a slow disk more


def check(arguments: argparse.Namespace) -> int:
    """Print one line per part. Goes on after a fault, so that one run shows every fault."""
    config = read_config(arguments)
    require_onnxruntime(config)
    status, bundle, space, raw_space = 0, None, None, b""
    try:
        space = load_action_space(config.task.action_space)
        raw_space = encode_action_space(space)
        _print_ok("actions", f"{space.name}: {', '.join(space.actions)}")
    except ConfigError as error:
        status = _print_fault("actions", str(error))
    status = _check_runtime_folder(config) or status
    try:
        bundle, line = _check_bundle(config)
        _print_ok("bundle", line)
    except UserError as error:
        status = _print_fault("bundle", str(error))
    except OSError as error:  # a disk that fails
        status = _print_fault("bundle", f"{error.filename or config.bundle}: {error.strerror or error}")
    camera_status, frames = _check_camera(config)
    status = camera_status or status
    if warning := config.tuned.difference(frames, bundle.id if bundle is not None else ""):
        _print_warning("tuned", warning)
    _print_ok("cpu", _describe_threads(config))
    if bundle is not None:
        if bundle.manifest.vision is None and space is not None and space.vehicle_state is None:
            _print_warning("actions", f"{space.name} has no vehicle_state, and the bundle is a text-only model: every "
                           "frame is refused (no-state); use an action space with a vehicle_state")  # fmt: skip
        has_memory = _check_memory(config, bundle.manifest) == 0
        status = status if has_memory else EX_CONFIG
        if raw_space and has_memory:
            status = _check_context(config, bundle, raw_space) or status
    return status


def _print_ok(part: str, line: str) -> None:
    print(f"ok    {part:8} {line}")


def _print_warning(part: str, line: str) -> None:
    print(f"WARN  {part:8} {line}")


def _print_fault(part: str, line: str) -> int:
    """Returns the exit status of check."""
    print(f"FAIL  {part:8} {line}")
    return EX_CONFIG


def _check_runtime_folder(config: Config) -> int:
    """Returns the exit status of check."""
    from edge_agent.supervisor.runtime_folder import EndpointError, check_folder
    from edge_agent.wire.endpoints import runtime_dir

    try:
        _print_ok("sockets", check_folder(runtime_dir(config.runtime_dir)))
    except EndpointError as error:
        return _print_fault("sockets", str(error))
    return 0


def _check_bundle(config: Config) -> tuple[Bundle, str]:
    """The verified bundle, and one line about it. Raises BundleError, ConfigError, OSError."""
    verified = verify_bundle(config.bundle, config.trusted_keys)
    verified = verify_adapters(config.language.adapters, verified, config.trusted_keys)
    manifest = verified.manifest
    signed = ", signed" if config.trusted_keys else ""
    if manifest.vision is None:
        signed += "; a text-only model: it answers from the vehicle's state, and a frame only says when"
    return verified, (
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
    from edge_agent.bundle.gpu_memory import probe_gpu
    from edge_agent.bundle.memory_plan import NotEnoughMemoryError, adapters_mib, plan_memory

    free_mib = health.mem_available_mib()
    with contextlib.suppress(ConfigError):  # said with the context
        config = fit_to_bundle(config, manifest)
    gpu = probe_gpu(config)
    try:
        plan = plan_memory(config, manifest, free_mib, adapters_mib(config), gpu)
    except NotEnoughMemoryError as error:
        return _print_fault("memory", str(error).removeprefix("memory: "))
    limit = ", the limit of a control group" if free_mib is not None and free_mib == memory_left_mib() else ""
    _print_ok("memory", _describe_memory(plan.parts_mib, free_mib) + limit)
    if plan.card_parts_mib and gpu is not None:
        _print_ok("memory", f"of the GPU: {_describe_memory(plan.card_parts_mib, gpu.free_mib)}")
    for key, value in plan.reductions.items():
        print(f"      memory   low memory: {key} is reduced to {value}")
    return 0


def _describe_memory(parts_mib: dict[str, float], free_mib: float | None) -> str:
    parts = ", ".join(f"{name} {mib:.0f}" for name, mib in parts_mib.items() if mib >= 1)
    free = "unknown" if free_mib is None else f"{free_mib:.0f}"
    return f"about {sum(parts_mib.values()):.0f} MiB needed ({parts}), {free} MiB available"


# -- the context -------------------------------------------------------------------------------------------------------


def _check_context(config: Config, bundle: Bundle, space: bytes) -> int:
    """Whether the texts fit and the grammar can be compiled, as the model process finds at its start. Returns the exit
    status of check."""
    try:
        start = encode_model_start(config, bundle, space)
    except ConfigError as error:
        return _print_fault("context", str(error))
    command = [sys.executable, "-m", "edge_agent.model", "--check"]
    try:
        done = subprocess.run(command, input=start, capture_output=True, timeout=PROMPT_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return _print_fault("context", f"the vocabulary was not read in {PROMPT_TIMEOUT_S:g} s")
    if done.returncode:
        return _print_fault("context", _last_line(done.stderr))
    _print_ok("context", done.stdout.decode().strip())
    return 0


def _last_line(stderr: bytes) -> str:
    return (stderr.decode(errors="replace").strip().splitlines() or ["the process ended without a word"])[-1]


# -- the camera --------------------------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """What reading one frame gave."""

    is_open: bool
    line: str  # the size and rate of the frames, or why there is none
    formats: tuple[str, ...] = ()  # pixel formats of a V4L2 device
    clock: str = ""  # who stamps the frames

    @property
    def frames(self) -> str:
        """The size of the frames: "640x480"; "" if it is unknown."""
        size = re.match(r"[0-9]+x[0-9]+(?= |$)", self.line) if self.is_open else None
        return size[0] if size else ""


def _check_camera(config: Config) -> tuple[int, str]:
    """The exit status of check, and the size of the frames: "640x480", or "" if it is unknown."""
    probe = probe_camera(config.camera)
    if probe.is_open:
        _print_ok("camera", f"{config.camera.source}: {probe.line}")
    elif warning := _why_no_pushed_frame(config, probe.line):
        _print_warning("camera", warning)
    else:
        return _print_fault("camera", f"camera.source: {probe.line}"), ""
    return 0, probe.frames


def probe_camera(config: CameraConfig) -> Probe:
    """Read one frame in a child process: a driver can block a read for ever, and a child can be killed."""
    child = subprocess.Popen(
        [sys.executable, "-m", "edge_agent.camera", "--probe", str(PROBE_S)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, error = child.communicate(msgspec.json.encode(config), timeout=PROBE_S + PROBE_EXIT_S)
    except subprocess.TimeoutExpired:
        child.kill()  # not waited for: a child inside a driver call can stay in the kernel for ever
        return Probe(False, f"{config.source}: no frame in {PROBE_S + PROBE_EXIT_S:g} s")
    if child.returncode:
        return Probe(False, _last_line(error))
    found = msgspec.json.decode(out)
    return Probe(True, found["line"], tuple(found["formats"]), found["clock"])


def _why_no_pushed_frame(config: Config, line: str) -> str:
    """A warning if a pusher may still come; "": it is a fault. line: what the probe says."""
    from edge_agent.wire.endpoints import runtime_dir

    source = config.camera.source
    if not source.startswith("zmq:ipc:///"):
        return ""
    folder = Path(source.removeprefix("zmq:ipc://")).parent
    is_made_later = folder == runtime_dir(config.runtime_dir) and not folder.exists()
    if not line.startswith("stalled: ") and not is_made_later:
        return ""
    return (
        f"{source}: nobody pushes frames now; start the process that does (FramePusher). Without frames the daemon "
        "ends after 15 s with status 69, and systemd starts it again"
    )


HANDLERS = {"check": check}
