"""Whether the native libraries work on this machine: python -m edge_agent.model.native_probe llama|onnxruntime|nvml

Each prints one line of JSON. `edge-agent doctor` runs them in processes of their own: a library that was built for
another processor ends its process with SIGILL, and the import of another version of llama.cpp fails.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_agent.board.cuda_code import cuda_code
from edge_agent.board.nvml import Nvml

ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
PROVIDERS = ("CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider")  # that the daemon uses
UNUSED = ("number", "uuid", "power_limit_w")  # of a card
MAX_ERROR_CHARS = 300
FLOAT32, OPSET, IR_VERSION = 1, 17, 8


def llama() -> dict[str, Any]:
    import llama_cpp.llama_cpp as ll

    from edge_agent.model import llama as ours  # checks the version

    folder = Path(ll.__file__).parent / "lib"
    cuda = next((code for path in sorted(folder.glob("libggml-cuda.so*")) if (code := cuda_code(path))), None)
    return {
        "version": ours.LLAMA_CPP_PYTHON,
        "gpu_build": bool(ll.llama_supports_gpu_offload()),
        "system_info": ll.llama_print_system_info().decode("utf-8", "replace"),
        "cuda": None if cuda is None else cuda._asdict(),
    }


def nvml() -> dict[str, Any]:
    library = Nvml()
    try:
        cards = [card._asdict() for card in library.cards()]
        for card in cards:
            for name in UNUSED:
                del card[name]
        return {"error": library.error, "cards": cards, "cuda_version": library.cuda_version()}
    finally:
        library.close()


def onnxruntime() -> dict[str, Any]:
    import numpy as np

    from edge_agent.model.onnx_runtime import onnxruntime as ort

    packages = []
    for name in ONNXRUNTIMES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            packages.append(name)
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    cuda = cuda_code(library) if library.exists() else None
    providers = {name: _run_on(name, ort, np) for name in PROVIDERS if name in ort.get_available_providers()}
    return {
        "version": ort.__version__,
        "packages": packages,
        "providers": providers,
        "cuda": None if cuda is None else cuda._asdict(),
    }


def _run_on(provider: str, ort: Any, np: Any) -> str:
    """Why a provider does not run a graph of one node; "": it does."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(one_node_graph(), options, providers=[provider])
        if session.get_providers()[0] != provider:  # it falls back without an error
            return "its libraries or the GPU are missing; onnxruntime fell back to the CPU"
        (doubled,) = session.run(None, {"x": np.array([1.5, -2.0], np.float32)})
    except Exception as error:  # onnxruntime's own classes have no public base class
        return str(error).strip().splitlines()[0][:MAX_ERROR_CHARS] if str(error).strip() else type(error).__name__
    return "" if doubled.tolist() == [3.0, -4.0] else f"1.5 + 1.5 and -2 - 2 gave {doubled.tolist()}"


def one_node_graph() -> bytes:
    """y = x + x for two float32 numbers, as an ONNX file: a few protobuf fields, so that no package onnx is needed."""
    shape = _field(1, _field(1, 2))  # TensorShapeProto: one dimension, of 2
    tensor = _field(1, FLOAT32) + _field(2, shape)

    def end(name: bytes) -> bytes:
        return _field(1, name) + _field(2, _field(1, tensor))  # ValueInfoProto, TypeProto

    node = _field(1, b"x") + _field(1, b"x") + _field(2, b"y") + _field(4, b"Add")
    graph = _field(1, node) + _field(2, b"doubled") + _field(11, end(b"x")) + _field(12, end(b"y"))
    return _field(1, IR_VERSION) + _field(7, graph) + _field(8, _field(2, OPSET))


def _field(number: int, value: int | bytes) -> bytes:
    """One protobuf field; every number and length here is below 128."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    return bytes([number << 3 | 2, len(value)]) + value


PROBES: dict[str, Callable[[], dict[str, Any]]] = {"llama": llama, "onnxruntime": onnxruntime, "nvml": nvml}


def main() -> int:
    try:
        found = PROBES[sys.argv[1]]()
    except Exception as error:  # whatever the library raises is the answer
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:MAX_ERROR_CHARS]}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
