"""Asks this machine what no file tells. Reads only, needs no network, and waits for nothing without a limit.

Native libraries and the camera run in child processes, which may crash or hang.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edge_agent.board import health
from edge_agent.board.control_groups import allowed_cores
from edge_agent.bundle.gpu_memory import probe_gpu
from edge_agent.bundle.manifest import VISION, read_manifest
from edge_agent.bundle.memory_plan import NotEnoughMemoryError, adapters_mib, plan_memory
from edge_agent.bundle.model_start import fit_to_bundle
from edge_agent.config import CameraConfig, Config, load_config, state_dir
from edge_agent.doctor.machine import (
    Answers,
    CameraAnswer,
    CardAnswer,
    DiskAnswer,
    Files,
    LlamaAnswer,
    LocalFiles,
    Machine,
    OnnxruntimeAnswer,
)
from edge_agent.doctor.unit import installed_unit
from edge_agent.errors import BundleError, ConfigError, UserError
from edge_agent.wire.endpoints import is_listening, runtime_dir

NATIVE_TIMEOUT_S = 60.0  # the first use of CUDA can take many seconds
TEGRASTATS_S = 3.0
KILL_S = 1.0
MIB = 1 << 20
STA_UNSYNC = 0x40  # of adjtimex: nobody has set the clock
TIMEX_BYTES, STATUS_OFFSET = 208, 40  # struct timex on 64-bit systems; its field `status`
Answer = TypeVar("Answer", bound=msgspec.Struct)


def this_machine(
    config: Config | None,
    probe_camera: Callable[[CameraConfig], CameraAnswer],
    config_path: str = "",
    config_error: str = "",
) -> Machine:
    """config: with None, that of the installed unit is taken, if there is one. probe_camera: reads one frame."""
    files = LocalFiles()
    if config is None and not config_error:
        config, config_path, config_error = _config_of_the_unit(files)
    answers = msgspec.structs.replace(_system(config), **_bundle(config), **_cards())
    answers = msgspec.structs.replace(
        answers,
        llama=_native("llama", LlamaAnswer),
        onnxruntime=ask_onnxruntime(),
        camera=probe_camera(config.camera) if config is not None and not _is_busy(answers) else None,
        tegrastats=_tegrastats(),
    )
    return Machine(files, answers, config, config_path, config_error)


def _config_of_the_unit(files: Files) -> tuple[Config | None, str, str]:
    """(configuration, its path, why it cannot be read)."""
    unit = installed_unit(Machine(files, Answers()))
    path = unit.config_path if unit is not None else ""
    if not path:
        return None, "", ""
    try:
        return load_config(path), path, ""
    except UserError as error:
        return None, path, str(error)


def _is_busy(answers: Answers) -> bool:
    """A running daemon holds the camera: it is not probed."""
    return bool(answers.listening)


def _system(config: Config | None) -> Answers:
    configured_folder = config.runtime_dir if config is not None else ""
    return Answers(
        architecture=platform.machine(),
        python=sys.version_info[:2],
        pointer_bits=64 if sys.maxsize > 2**32 else 32,
        n_cores=allowed_cores(),
        user=_user(),
        may_open_cameras=any(os.access(device, os.R_OK | os.W_OK) for device in Path("/dev").glob("video*")),
        largest_block_mib=largest_block_mib(),
        clock_synchronised=_clock_is_synchronised(),
        year=time.gmtime().tm_year,
        disks=_disks(config),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        own_pids=(os.getpid(), os.getppid()),
        listening=is_listening(runtime_dir(configured_folder) / "control"),
    )


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may have no name for its user
        return ""


def largest_block_mib(most_mib: int = 64 * 1024) -> float:
    """The largest piece of memory that this process can reserve, found by halving. No page of it is touched."""
    fits, too_large = 0, most_mib + 1
    while too_large - fits > max(1, fits // 16):
        middle = (fits + too_large) // 2
        try:
            mmap.mmap(-1, middle * MIB).close()
            fits = middle
        except (OSError, ValueError, OverflowError):
            too_large = middle
    return float(fits)


def _clock_is_synchronised() -> bool | None:
    """As the kernel knows it from whoever sets the clock: timesyncd, chrony or ntpd."""
    timex = ctypes.create_string_buffer(TIMEX_BYTES)  # all fields 0: read only
    try:
        state = ctypes.CDLL(None).adjtimex(timex)
    except AttributeError:
        return None
    if state < 0 or ctypes.sizeof(ctypes.c_long) != 8:
        return None
    return not int.from_bytes(timex.raw[STATUS_OFFSET : STATUS_OFFSET + 4], sys.byteorder) & STA_UNSYNC


def _disks(config: Config | None) -> dict[str, DiskAnswer]:
    paths = ["/"]
    with contextlib.suppress(RuntimeError):  # this user has no home folder
        paths.append(str(state_dir()))
    if config is not None:
        paths.append(config.bundle)
    found: dict[str, DiskAnswer] = {}
    devices: set[int] = set()
    for path in paths:
        # os.path.exists() is False, and not an error, in a folder that this user may not enter
        existing = next((p for p in (Path(path), *Path(path).absolute().parents) if os.path.exists(p)), Path("/"))
        with contextlib.suppress(OSError):
            status, device = os.statvfs(existing), existing.stat().st_dev
            if device in devices:
                continue
            devices.add(device)
            found[path] = DiskAnswer(
                total_mib=status.f_blocks * status.f_frsize / MIB,
                free_mib=status.f_bavail * status.f_frsize / MIB,
                free_files=status.f_favail if status.f_files else None,
                read_only=bool(status.f_flag & os.ST_RDONLY),
            )
    return found


def _bundle(config: Config | None) -> dict[str, Any]:
    """What the bundle needs, by the memory plan. The hashes of its files are for `edge-agent check`."""
    if config is None:
        return {}
    try:
        bundle = read_manifest(config.bundle)
        missing = [name for name in bundle.manifest.files if not bundle.path(name).is_file()]
        if missing:
            return {"bundle_error": f"{bundle.path(missing[0])}: missing; copy the bundle again"}
        config = fit_to_bundle(config, bundle.manifest)
        plan = plan_memory(config, bundle.manifest, health.mem_available_mib(), adapters_mib(config), probe_gpu(config))
    except NotEnoughMemoryError as error:
        return {"memory_error": str(error).removeprefix("memory: ")}
    except (BundleError, ConfigError) as error:
        return {"bundle_error": str(error)}
    except OSError as error:
        return {"bundle_error": f"{error.filename or config.bundle}: {error.strerror}"}
    return {
        "has_vision_onnx": VISION in bundle.manifest.files,
        "needed_mib": plan.mib,
        "reductions": tuple(f"{key} {value}" for key, value in plan.reductions.items()),
    }


# -- child processes --------------------------------------------------------------------------------------------------


class _NvmlAnswer(msgspec.Struct, frozen=True):
    """NVIDIA's management library. A broken card can make it hang in the driver."""

    error: str = ""
    cards: tuple[CardAnswer, ...] = ()
    cuda_version: int | None = None


def _cards() -> dict[str, Any]:
    found = _native("nvml", _NvmlAnswer)
    return {"cards": found.cards, "card_error": found.error, "cuda_version": found.cuda_version}


def ask_onnxruntime() -> OnnxruntimeAnswer:
    return _native("onnxruntime", OnnxruntimeAnswer)


def _native(name: str, answer_type: type[Answer]) -> Answer:
    """What edge_agent.model.native_probe prints about one library."""
    command = [sys.executable, "-m", "edge_agent.model.native_probe", name]
    status, out = _run(command, NATIVE_TIMEOUT_S)
    if status is None:
        return answer_type(error=f"does not answer in {NATIVE_TIMEOUT_S:g} s")
    if status < 0:
        with contextlib.suppress(ValueError):
            why = f"its process is ended by {signal.Signals(-status).name}"
            wrong_processor = ": it was built for another processor" if -status == signal.SIGILL else ""
            return answer_type(error=why + wrong_processor)
    try:
        return msgspec.json.decode(out.splitlines()[-1] if out else b"", type=answer_type)
    except msgspec.DecodeError:
        return answer_type(error=f"its process ended with status {status} and no answer")


def _tegrastats() -> str:
    """One line of NVIDIA's tegrastats, where it is installed. It runs until it is ended."""
    try:
        child = subprocess.Popen(
            ["tegrastats", "--interval", "500"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError:
        return ""
    try:
        out, _ = child.communicate(timeout=TEGRASTATS_S)
    except subprocess.TimeoutExpired:
        child.kill()
        out, _ = child.communicate()
    lines = out.decode(errors="replace").splitlines()
    return lines[0] if lines else ""


def _run(command: Sequence[str], timeout_s: float) -> tuple[int | None, bytes]:
    """(status, stdout); status None: it was killed after timeout_s."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        out, _ = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _kill(child)
        return None, b""
    return child.returncode, out


def _kill(child: subprocess.Popen[Any]) -> None:
    """Kill a child and wait for a moment only: inside a driver call it can stay in the kernel for ever."""
    child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(KILL_S)
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()
