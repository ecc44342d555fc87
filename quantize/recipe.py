"""Which tensor gets which type: the standard recipes, carried out by libllama, and what they will weigh.

The rules of a recipe are libllama's own; to know them beforehand they are asked, not copied: libllama plans a file that
has every header and no weights.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import gguf
import llama_cpp
import llama_cpp.llama_cpp as ll
import msgspec

from edge_agent import language
from quantize.checkpoint import Checkpoint
from quantize.language import Report, write_outline

RECIPES = {
    "Q4_K_M": ll.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q4_K_S": ll.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "Q4_0": ll.LLAMA_FTYPE_MOSTLY_Q4_0,
    "IQ4_XS": ll.LLAMA_FTYPE_MOSTLY_IQ4_XS,
    "Q5_K_M": ll.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q6_K": ll.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q8_0": ll.LLAMA_FTYPE_MOSTLY_Q8_0,
}
MAX_BUFFER_BYTES = 256 << 20  # of tensor rows libllama holds at once; its default is 8 GiB

# Memory a program can have on a board with a headless JetPack, GiB, and what llama.cpp and onnxruntime take beside
# weights and cache: measured with a 3B at 2048 tokens of context and 256 image tokens.
BOARDS = {
    "Orin Nano 4GB": 2.7,
    "Orin Nano 8GB": 6.4,
    "Orin NX 16GB": 14.3,
    "AGX Orin 32GB": 29.0,
    "AGX Orin 64GB": 60.0,
    "Thor 128GB": 120.0,
}
OVERHEAD_BYTES = 450 << 20
CONTEXT = 2048


class RecipeError(Exception):
    """libllama refused; one line."""


class TensorInfo(msgspec.Struct, frozen=True):
    name: str
    ggml_type: str
    offset: int  # from the start of the file
    n_bytes: int


def quantise(source: Path, out: Path, recipe: str, report: Report) -> None:
    """GGUF -> GGUF of the recipe's types. Raises RecipeError."""
    _run(source, out, recipe, report, dry_run=False)


def weigh(checkpoint: Checkpoint, recipe: str) -> dict[str, int]:
    """Bytes by type of the language model under a recipe, without converting anything."""
    counted: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="edge-quantize-") as folder:
        outline = Path(folder) / "outline.gguf"
        write_outline(checkpoint, outline)
        types = _run(outline, Path(folder) / "none", recipe, lambda *_: None, dry_run=True)
    for row in checkpoint.text_rows:
        kind = gguf.GGMLQuantizationType[types[row.gguf]]
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        counted[kind.name] += math.prod(checkpoint.shape(row)) // block * n_bytes
    return dict(counted)


def _run(source: Path, out: Path, recipe: str, report: Report, dry_run: bool) -> dict[str, str]:
    """libllama says what it does in its log, a line per tensor: that is the progress, and the plan."""
    params = ll.llama_model_quantize_default_params()
    params.ftype = RECIPES[recipe]
    params.nthread = len(os.sched_getaffinity(0))
    params.max_buf_size = MAX_BUFFER_BYTES
    params.dry_run = dry_run
    types: dict[str, str] = {}
    said, text = [], ""

    def on_log(piece: str) -> None:
        nonlocal text
        text += piece
        *lines, text = text.split("\n")
        for line in lines:
            said.append(line)
            if found := _LINE.match(line):
                done, total, name, before, converted, planned = found.groups()
                types[name] = (converted or planned or before).upper()
                report(name, int(done), int(total))

    language.log_to(on_log)
    try:
        status = ll.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params))
    finally:
        language.log_to(None)
    if status:
        errors = (
            [line for line in said if "error" in line.lower() or "failed" in line.lower()] or said[-1:] or ["no reason"]
        )
        raise RecipeError(f"{source}: libllama cannot quantise it to {recipe}: {errors[0].strip()}")
    return types


_LINE = re.compile(
    r"\[ *(\d+)/ *(\d+)\] +(\S+) .*type = +(\w+), (?:converting to (\w+) \.\. )?size = .*?(?:\((\w+)\))?$"
)


def tensor_table(path: Path) -> list[TensorInfo]:
    """Every tensor of a GGUF file, by ggml's own reader (the `gguf` package takes seconds for a full vocabulary)."""
    lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))

    class Init(ctypes.Structure):
        _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]

    def function(name: str, result: type, *arguments: type):
        call = lib[name]
        call.restype, call.argtypes = result, list(arguments)
        return call

    handle, index = ctypes.c_void_p, ctypes.c_int64
    context = function("gguf_init_from_file", handle, ctypes.c_char_p, Init)(os.fsencode(path), Init(True, None))
    if not context:
        raise RecipeError(f"{path}: not a GGUF file, or damaged")
    try:
        start = function("gguf_get_data_offset", ctypes.c_size_t, handle)(context)
        name = function("gguf_get_tensor_name", ctypes.c_char_p, handle, index)
        kind = function("gguf_get_tensor_type", ctypes.c_int, handle, index)
        offset = function("gguf_get_tensor_offset", ctypes.c_size_t, handle, index)
        size = function("gguf_get_tensor_size", ctypes.c_size_t, handle, index)
        return [
            TensorInfo(
                name(context, i).decode(),
                gguf.GGMLQuantizationType(kind(context, i)).name,
                start + offset(context, i),
                size(context, i),
            )
            for i in range(function("gguf_get_n_tensors", index, handle)(context))
        ]
    finally:
        function("gguf_free", None, handle)(context)


def memory_bytes(checkpoint: Checkpoint, language_bytes: int) -> int:
    """What serving the model takes: language, vision at 16 bit, cache at 16 bit, buffers."""
    vision = 2 * sum(math.prod(checkpoint.shape(row)) for row in checkpoint.vision_rows)
    return language_bytes + vision + CONTEXT * kv_bytes_per_token(checkpoint) + OVERHEAD_BYTES


def kv_bytes_per_token(checkpoint: Checkpoint) -> int:
    t = checkpoint.text
    return 2 * 2 * t.layers * t.kv_heads * t.head_dim
