"""What a device can do at most: measured by ggml, on the device that runs the model. For `edge-agent bench`.

Two graphs of one operation each: a copy of a large tensor, and a float16 matrix product. A share of the ceilings of
another device says nothing: a GPU copies 20 times as fast as its host.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp

from edge_agent.errors import UserError

CPU, GPU, INTEGRATED_GPU = 0, 1, 2  # ggml_backend_dev_type of ggml-backend.h
F32, F16 = 0, 1  # ggml_type
COPY_BYTES = 128 << 20  # larger than any cache
MATRIX_SIDE = {CPU: 512, GPU: 4096, INTEGRATED_GPU: 4096}  # large enough that starting the operation takes no time
N_TRIES, N_IN_A_TRY = 4, 8
CONTEXT_BYTES = 1 << 20  # of the descriptions; the data is on the device

_folder = Path(llama_cpp.__file__).parent / "lib"
_base, _registry = (ctypes.CDLL(str(_folder / name)) for name in ("libggml-base.so", "libggml.so"))
_pointer, _int64 = ctypes.c_void_p, ctypes.c_int64


class _InitParameters(ctypes.Structure):
    """ggml_init_params of ggml.h."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", _pointer), ("no_alloc", ctypes.c_bool)]


def _function(library: ctypes.CDLL, name: str, result: type | None, *arguments: type) -> Callable[..., Any]:
    function = library[name]
    function.restype, function.argtypes = result, list(arguments)
    return function


_by_type = _function(_registry, "ggml_backend_dev_by_type", _pointer, ctypes.c_int)
_description = _function(_base, "ggml_backend_dev_description", ctypes.c_char_p, _pointer)
_open = _function(_base, "ggml_backend_dev_init", _pointer, _pointer, ctypes.c_char_p)
_close = _function(_base, "ggml_backend_free", None, _pointer)
_compute = _function(_base, "ggml_backend_graph_compute", ctypes.c_int, _pointer, _pointer)
_new_context = _function(_base, "ggml_init", _pointer, _InitParameters)
_free_context = _function(_base, "ggml_free", None, _pointer)
_tensor = _function(_base, "ggml_new_tensor_2d", _pointer, _pointer, ctypes.c_int, _int64, _int64)
_copy = _function(_base, "ggml_cpy", _pointer, _pointer, _pointer, _pointer)
_product = _function(_base, "ggml_mul_mat", _pointer, _pointer, _pointer, _pointer)
_new_graph = _function(_base, "ggml_new_graph", _pointer, _pointer)
_expand = _function(_base, "ggml_build_forward_expand", None, _pointer, _pointer)
_allocate = _function(_base, "ggml_backend_alloc_ctx_tensors", _pointer, _pointer, _pointer)
_free_buffer = _function(_base, "ggml_backend_buffer_free", None, _pointer)


class CeilingsError(UserError):
    """They cannot be measured. One line."""


class DeviceCeilings(NamedTuple):
    """What a device can do at most."""

    copy_gb_s: float  # bytes read plus bytes written
    gflops: float  # of a matrix product, float16 by float32
    device: str  # its name


def measure_device(*kinds: int) -> DeviceCeilings:
    """Of the first kind of device that is there: CPU, GPU or INTEGRATED_GPU. Raises CeilingsError."""
    kind, device = next(((kind, found) for kind in kinds if (found := _by_type(kind))), (CPU, None))
    name = (_description(device) or b"").decode(errors="replace") if device else "none"
    backend = _open(device, None) if device else None
    if not backend:
        raise CeilingsError(f"the ceilings cannot be measured: llama.cpp cannot open the device ({name})")
    try:
        side, rows = MATRIX_SIDE[kind], COPY_BYTES // 4 // 1024
        copy_s = _best_s(backend, lambda c: _copy(c, _tensor(c, F32, 1024, rows), _tensor(c, F32, 1024, rows)))
        product_s = _best_s(backend, lambda c: _product(c, _tensor(c, F16, side, side), _tensor(c, F32, side, side)))
    finally:
        _close(backend)
    return DeviceCeilings(round(2 * COPY_BYTES / copy_s / 1e9, 2), round(2 * side**3 / product_s / 1e9, 1), name)


def _best_s(backend: int, operation: Callable[[int], int]) -> float:
    """The shortest time of one operation. operation: makes its tensors in a context. Raises CeilingsError."""
    context = _new_context(_InitParameters(CONTEXT_BYTES, None, True))
    buffer = None
    try:
        graph = _new_graph(context)
        _expand(graph, operation(context))
        buffer = _allocate(context, backend)
        if not buffer:
            raise CeilingsError("the ceilings cannot be measured: no memory on the device for two tensors")
        best_s = math.inf
        for _ in range(N_TRIES):
            start_s = time.perf_counter()
            for _ in range(N_IN_A_TRY):
                if _compute(backend, graph):  # waits until it is done
                    raise CeilingsError("the ceilings cannot be measured: the device computes nothing")
            best_s = min(best_s, (time.perf_counter() - start_s) / N_IN_A_TRY)
        return best_s
    finally:
        if buffer:
            _free_buffer(buffer)
        _free_context(context)
