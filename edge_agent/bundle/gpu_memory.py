"""The memory of the GPU that llama.cpp would use, for a memory plan that is made outside the model process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import msgspec

from edge_agent.bundle.memory_plan import Gpu
from edge_agent.config import Config

TIMEOUT_S = 30.0  # for the driver


def probe_gpu(config: Config) -> Gpu | None:
    """Asked in a child process, because llama.cpp loads a driver. None: no layer is to run on a GPU, there is none, or
    it does not answer."""
    if not config.language.gpu_layers or not has_gpu_library():
        return None
    command = [sys.executable, "-m", "edge_agent.model.gpu"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)
        return msgspec.json.decode(done.stdout, type=Gpu | None)
    except (subprocess.TimeoutExpired, msgspec.DecodeError):
        return None


def has_gpu_library() -> bool:
    """Whether the installed llama.cpp has a library for some kind of GPU, without loading it."""
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        return False
    found = (Path(package.origin).parent / "lib").glob("libggml-*")
    return any(not path.name.startswith(("libggml-base", "libggml-cpu")) for path in found)
