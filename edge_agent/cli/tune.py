"""The command tune: measures, prints a table, and sets the chosen keys in the configuration file."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.board.control_groups import available_cores
from edge_agent.bundle.files import sync_folder
from edge_agent.bundle.lora_check import verify_adapters
from edge_agent.bundle.manifest import VISION, Bundle
from edge_agent.bundle.model_start import fit_to_bundle
from edge_agent.bundle.verify import verify_bundle
from edge_agent.cli.check import probe_camera
from edge_agent.cli.commands import EX_CONFIG, EX_USAGE, CommandFailed
from edge_agent.cli.daemon import read_config, require_onnxruntime
from edge_agent.config import Config, TunedConfig, load_config_text
from edge_agent.doctor.accelerator import CPU_PROVIDER
from edge_agent.doctor.collect import ask_onnxruntime
from edge_agent.doctor.hardware import model_name
from edge_agent.doctor.machine import Answers, LocalFiles, Machine, OnnxruntimeAnswer
from edge_agent.errors import ConfigError
from edge_agent.wire.endpoints import is_listening, runtime_dir
from edge_agent.yaml_edit import set_keys

BAR_WIDTH = 24
NOT_TUNED = msgspec.to_builtins(TunedConfig())
MAX_BUSY_CORES = 0.25  # of other programs
COMMENT = "tune"  # the first word of the comments that tune writes, and that a later tune replaces


def tune(arguments: argparse.Namespace) -> int:
    """Print the table on stderr, and one line of JSON as the last line of stdout."""
    config = _config(arguments)
    require_onnxruntime(config)
    verified = verify_bundle(config.bundle, config.trusted_keys)
    if verified.manifest.vision is None:
        raise CommandFailed(f"{config.bundle}: a text-only model; tune measures answers to frames", EX_CONFIG)
    config = fit_to_bundle(config, verified.manifest)
    verified = verify_adapters(config.language.adapters, verified, config.trusted_keys)
    folder = runtime_dir(config.runtime_dir)
    if is_listening(folder / "control"):
        raise CommandFailed(
            f"a daemon runs in {folder}; it holds the camera and the cores: stop it first (systemctl stop edge-agent)"
        )
    frames = _frame_size(config)
    file = Path(arguments.config).resolve() if arguments.write else None
    from edge_agent.tools import tune as search

    if file is not None:  # a file that cannot be changed is found before the minutes of measuring, not after them
        in_force = search.values_in_force(config, gpu=False)
        try:
            _edited(file, in_force | {f"tuned.{key}": default for key, default in NOT_TUNED.items()}, "")
        except ConfigError as error:  # it lists these values, which are no results
            problem, is_its_form, _ = str(error).partition("; set by hand")
            if not is_its_form:
                raise
            raise ConfigError(f"{problem}; run tune without --write, and set the printed keys by hand") from None
        if not (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)):
            raise CommandFailed(f"{file}: cannot be written by this user; run tune without --write, or with sudo")
    if (others := busy_cores()) > MAX_BUSY_CORES:
        print(f"other programs use {others:.1f} cores: the figures hold only while they do", file=sys.stderr)
    encoders = _encoders(config, verified, arguments.tensorrt)
    tuned = search.tune(config, verified.manifest, encoders, _show, arguments.seconds)
    figures = _figures(tuned, config, frames, verified.id)
    for line in _conclusion(tuned):
        print(line, file=sys.stderr)
    print(json.dumps(figures), flush=True)  # before the file: minutes of measuring are not lost with it
    if file is not None:
        _write(file, tuned, figures)
    return 0


def _config(arguments: argparse.Namespace) -> Config:
    if arguments.write and not arguments.config:
        raise CommandFailed("--write: expected --config FILE, the file to change", EX_USAGE)
    if not 0.5 <= arguments.seconds <= 600:
        raise CommandFailed(f"--seconds: expected 0.5 to 600, found {arguments.seconds:g}", EX_USAGE)
    config = read_config(arguments)
    deadline_ms = arguments.deadline_ms
    if deadline_ms is None:
        return config
    if not 1 <= deadline_ms <= 600_000:
        raise CommandFailed(f"--deadline-ms: expected 1 to 600000, found {deadline_ms}", EX_USAGE)
    return msgspec.structs.replace(config, task=msgspec.structs.replace(config.task, deadline_ms=deadline_ms))


def _encoders(config: Config, bundle: Bundle, tensorrt: bool) -> tuple[Any, ...]:
    """The rows of encoder_choices.encoder_choices(). tensorrt: try TensorRT even if the configuration does not."""
    from edge_agent.tools.encoder_choices import encoder_choices, weight_types

    types = weight_types(bundle)
    answer = ask_onnxruntime() if VISION in types else OnnxruntimeAnswer()
    providers = {CPU_PROVIDER: answer.error} if answer.error else answer.providers
    return encoder_choices(types, providers, tensorrt=tensorrt or config.vision.tensorrt)


def _frame_size(config: Config) -> str:
    """For example 1280x720. Raises ConfigError if the camera gives no frame."""
    camera = config.camera
    if camera.source.startswith("zmq:"):
        return f"{camera.width or 640}x{camera.height or 480}"
    probe = probe_camera(camera)
    if not probe.frames:
        raise ConfigError(f"camera.source: {probe.line}")
    return probe.frames


def board_name() -> str:
    """What the board calls itself, for people."""
    return model_name(Machine(LocalFiles(), Answers(architecture=platform.machine())))[:80]


def busy_cores(read: Callable[[], str] = lambda: Path("/proc/stat").read_text(), wait_s: float = 0.5) -> float:
    """How many cores other programs use now. read: returns the text of /proc/stat."""
    before = _cpu_ticks(read())
    time.sleep(wait_s)
    busy, total = (after - first for after, first in zip(_cpu_ticks(read()), before, strict=True))
    return busy / total * available_cores() if total > 0 else 0.0


def _cpu_ticks(stat: str) -> tuple[int, int]:
    """Busy and all ticks of all cores, from the first line of /proc/stat; idle is the fourth number, waiting for a disk
    the fifth. (0, 0): the line is another."""
    numbers = [int(word) for word in stat.partition("\n")[0].split()[1:9] if word.isdigit()]
    return (sum(numbers) - numbers[3] - numbers[4], sum(numbers)) if len(numbers) >= 5 else (0, 0)


# -- what is printed --------------------------------------------------------------------------------------------------


def _show(name: str, result: Any, number: int, about: int) -> None:
    """result: Measured, or None when a candidate begins."""
    if result is None:
        if sys.stderr.isatty():
            bar = ("#" * round(BAR_WIDTH * (number - 1) / about)).ljust(BAR_WIDTH, ".")
            print(f"\r\033[K[{bar}] {number} of about {about}: {name}", end="", file=sys.stderr, flush=True)
        return
    start = "\r\033[K" if sys.stderr.isatty() else ""
    print(f"{start}{_result(result)}  {name}", file=sys.stderr, flush=True)


def _result(result: Any) -> str:
    if result.mean_age_ms is None:
        return f"{'-':>9}     {result.problem}:"
    late = f", {result.refused['late']} late" if result.refused.get("late") else ""
    return f"{result.mean_age_ms:9.1f} ms  {result.actions_per_s:6.1f}/s{late}"


def _conclusion(tuned: Any) -> list[str]:
    if tuned.best == tuned.start:
        return [f"mean age of information: {tuned.start_ms:g} ms as configured; nothing tried is better"]
    before = "no valid actions in time" if tuned.start_ms is None else f"{tuned.start_ms:g} ms"
    changed = [f"  {key}: {value}" for key, value in tuned.best.items() if tuned.start[key] != value]
    if tuned.best["vision.tensorrt"]:
        changed.append(
            "the daemon makes TensorRT's engine at its first start: set watchdog.model_load_s to 1800 for it"
        )
    return [f"mean age of information: {tuned.best_ms:g} ms, as configured: {before}", *changed]


def _figures(tuned: Any, config: Config, frames: str, bundle_id: str) -> dict[str, Any]:
    return {
        "benchmark": "tune",
        "date": datetime.date.today().isoformat(),
        "board": board_name(),
        "bundle": bundle_id,
        "frames": frames,
        "deadline_ms": config.task.deadline_ms,
        "mean_age_ms": tuned.best_ms,
        "configured_mean_age_ms": tuned.start_ms,
        "chosen": tuned.best,
        "configured": tuned.start,
        "tried": [{"values": tried.values} | msgspec.to_builtins(tried.result) for tried in tuned.tried],
    }


# -- the file ---------------------------------------------------------------------------------------------------------


def _edited(file: Path, values: dict[str, Any], comment: str) -> str:
    """The text of the file with other values. Raises ConfigError, also where the daemon would not take the result."""
    with file.open(encoding="utf-8", newline="") as source:  # line ends stay as they are
        text = source.read()
    text = set_keys(text, values, comment, str(file))
    load_config_text(text, str(file))
    return text


def _write(file: Path, tuned: Any, figures: dict[str, Any]) -> None:
    """Replace the file at once, with the mode and owner that it has. Every key is written, so that a later start does
    not depend on the defaults of another version."""
    values = tuned.best | {f"tuned.{key}": figures[key] for key in NOT_TUNED}
    comment = f"{COMMENT} {figures['date']}: {figures['mean_age_ms']:g} ms mean age, frames of {figures['frames']}"
    text = _edited(file, values, comment)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as target:
            target.write(text)
            target.flush()
            shutil.copystat(file, name)
            status = file.stat()
            with contextlib.suppress(PermissionError):  # the owner is another one, and this user may write by its group
                os.chown(name, status.st_uid, status.st_gid)
            os.fsync(target.fileno())
        os.replace(name, file)
        sync_folder(file.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    print(f"written: {file}", file=sys.stderr)


HANDLERS = {"tune": tune}
