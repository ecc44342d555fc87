"""ggml's own quantisation kernels and GGUF reader, called in the libraries that llama-cpp-python installs.

libllama's llama_model_quantize needs a whole file at source precision and maps it, so that the file's size counts as
resident memory. The same kernels, called on blocks of rows, give the same bytes straight from the checkpoint.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp
import msgspec
import numpy as np

from edge_agent.board.control_groups import available_cores
from edge_agent.bundle.gguf_package import GGMLQuantizationType as Type
from edge_agent.bundle.gguf_package import gguf
from edge_agent.errors import UserError

_base = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))


def _function(name: str, result: type | None, *arguments: type) -> Callable[..., Any]:
    """A function of libggml-base with its C types."""
    function = _base[name]
    function.restype, function.argtypes = result, list(arguments)
    return function


class _Init(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


class GgmlTensor(ctypes.Structure):
    """ggml_tensor of ggml.h, of the llama.cpp version that edge_agent.model.llama requires."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),  # elements, innermost first
        ("nb", ctypes.c_size_t * 4),  # strides, bytes
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]


COPY_NAME = re.compile(r"[^#]+#(.+)#\d+")  # backend#tensor#number: ggml's scheduler copies what another backend needs


def original_name(name: str) -> str:
    """A tensor's name in a graph without the backend that ggml's scheduler copied it to; the same name: no copy."""
    copied = COPY_NAME.fullmatch(name)
    return copied[1] if copied else name


_handle, _index, _size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
_quantize_chunk = _function(
    "ggml_quantize_chunk",
    _size,
    ctypes.c_int,  # type
    ctypes.c_void_p,  # float32 in
    ctypes.c_void_p,  # out
    _index,  # first element, in both
    _index,  # rows
    _index,  # elements of a row
    ctypes.c_void_p,  # float32 importance of each column, or null
)
N_THREADS = available_cores()
_threads = ThreadPoolExecutor(N_THREADS)  # the kernels run without the interpreter's lock


class TensorInfo(msgspec.Struct, frozen=True):
    name: str
    ggml_type: str
    offset: int  # from the start of the file
    n_bytes: int


class NotGguf(UserError):
    """ggml cannot read the file. One line."""


def row_bytes(kind: Type, width: int) -> int:
    """Bytes of a row of `width` elements."""
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    return width // block * n_bytes


def tensor_bytes(shape: tuple[int, ...], kind: Type) -> int:
    """Bytes of a tensor, without padding. shape: outermost dimension first."""
    return math.prod(shape[:-1]) * row_bytes(kind, shape[-1])


def quantise_rows(rows: np.ndarray, kind: Type, importance: np.ndarray | None = None) -> np.ndarray:
    """rows: (n, width) float32 -> (n, bytes of a row) uint8, on all cores.

    importance: (width,) float32, the weight of each column's squared error.
    """
    n, width = rows.shape
    rows = np.ascontiguousarray(rows, np.float32)
    out = np.empty((n, row_bytes(kind, width)), np.uint8)
    step = -(-n // N_THREADS)
    columns = None if importance is None else np.ascontiguousarray(importance, np.float32)
    if columns is not None and columns.shape != (width,):
        raise ValueError(f"importance: expected {width} numbers, found {columns.shape}")
    columns_pointer = None if columns is None else columns.ctypes.data

    def quantise_part(start: int) -> None:
        count = min(step, n - start)
        written = _quantize_chunk(kind, rows.ctypes.data, out.ctypes.data, start * width, count, width, columns_pointer)
        if written != count * out.shape[1]:
            raise RuntimeError(
                f"ggml_quantize_chunk: expected {count * out.shape[1]} bytes of {kind.name}, wrote {written}"
            )

    list(_threads.map(quantise_part, range(0, n, step)))
    return out


def tensor_table(path: Path) -> list[TensorInfo]:
    """Every tensor of a GGUF file. (The `gguf` package's reader takes seconds for a full vocabulary.)"""
    context = _gguf_init(os.fsencode(path), _Init(True, None))
    if not context:
        raise NotGguf(f"{path}: not a GGUF file, or damaged")
    try:
        start = _gguf_data_offset(context)
        return [
            TensorInfo(
                _gguf_name(context, i).decode(),
                Type(_gguf_type(context, i)).name,
                start + _gguf_offset(context, i),
                _gguf_size(context, i),
            )
            for i in range(_gguf_count(context))
        ]
    finally:
        _gguf_free(context)


def dequantise_rows(raw: np.ndarray, kind: Type, width: int) -> np.ndarray:
    """The inverse of quantise_rows: (n, bytes of a row) uint8 -> (n, width) float32, on all cores."""
    n = len(raw)
    out, raw = np.empty((n, width), np.float32), np.ascontiguousarray(raw)
    step = -(-n // N_THREADS)

    def dequantise_part(start: int) -> None:
        count = min(step, n - start)
        _dequantise(kind)(raw[start:].ctypes.data, out[start:].ctypes.data, count * width)

    list(_threads.map(dequantise_part, range(0, n, step)))
    return out


def _dequantise(kind: Type) -> Callable[..., Any]:
    name = kind.name.lower().replace("_k", "_K")  # dequantize_row_q4_K, dequantize_row_iq4_xs
    return _function(f"dequantize_row_{name}", None, ctypes.c_void_p, ctypes.c_void_p, _index)


def write_tensor_data(address: int, data: np.ndarray) -> None:
    """Overwrite the data of the ggml_tensor at an address. The tensor must be writable and have the size of `data`."""
    if _n_bytes(address) != data.nbytes:
        raise ValueError(f"expected {_n_bytes(address)} bytes, found {data.nbytes}")
    _set(address, np.ascontiguousarray(data).ctypes.data, 0, data.nbytes)


_set = _function("ggml_backend_tensor_set", None, ctypes.c_void_p, ctypes.c_void_p, _size, _size)


def read_float32(tensor: GgmlTensor) -> np.ndarray:
    """A copy of a float32 tensor's data, also from a GPU's memory: (rows, ne[0]) float32."""
    out = np.empty(_n_bytes(ctypes.byref(tensor)), np.uint8)
    _get(ctypes.byref(tensor), out.ctypes.data, 0, out.nbytes)
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    return np.ndarray(shape, np.float32, out, strides=strides).reshape(-1, tensor.ne[0])


_n_bytes = _function("ggml_nbytes", _size, ctypes.c_void_p)
_get = _function("ggml_backend_tensor_get", None, ctypes.c_void_p, ctypes.c_void_p, _size, _size)
_op_name = _function("ggml_op_name", ctypes.c_char_p, ctypes.c_int)
MUL_MAT, GET_ROWS = (
    next(i for i in range(256) if _op_name(i) == name) for name in (b"MUL_MAT", b"GET_ROWS")
)  # values of ggml_tensor.op
_gguf_init = _function("gguf_init_from_file", _handle, ctypes.c_char_p, _Init)
_gguf_free = _function("gguf_free", None, _handle)
_gguf_count = _function("gguf_get_n_tensors", _index, _handle)
_gguf_data_offset = _function("gguf_get_data_offset", _size, _handle)
_gguf_name = _function("gguf_get_tensor_name", ctypes.c_char_p, _handle, _index)
_gguf_type = _function("gguf_get_tensor_type", ctypes.c_int, _handle, _index)
_gguf_offset = _function("gguf_get_tensor_offset", _size, _handle, _index)
_gguf_size = _function("gguf_get_tensor_size", _size, _handle, _index)
