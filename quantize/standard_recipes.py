"""Which tensor gets which type under a standard recipe, what that will weigh, and where it fits.

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
import llama_cpp.llama_cpp as ll

from edge_agent.errors import UserError
from edge_agent.model.llama import log_to
from quantize.formats import ggml_kernels
from quantize.formats.gguf_files import write_outline
from quantize.formats.imatrix import Imatrix
from quantize.source.checkpoint import Checkpoint

RECIPES = {
    "Q4_K_M": ll.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q4_K_S": ll.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "Q4_0": ll.LLAMA_FTYPE_MOSTLY_Q4_0,
    "IQ4_XS": ll.LLAMA_FTYPE_MOSTLY_IQ4_XS,
    "Q5_K_M": ll.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q6_K": ll.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q8_0": ll.LLAMA_FTYPE_MOSTLY_Q8_0,
    "BF16": ll.LLAMA_FTYPE_MOSTLY_BF16,  # nothing lost: what the others are measured against
}

# What we reckon a program can have on a board with a headless JetPack, GiB, and an allowance for buffers beside weights
# and cache. None of these was measured on a board. On a CPU, llama.cpp's repacked copy of the weights comes on top.
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


class RecipeError(UserError):
    """libllama refused; one line."""


def plan_recipe(
    checkpoint: Checkpoint, recipe: str, importance: Imatrix | None = None
) -> dict[str, gguf.GGMLQuantizationType]:
    """GGUF name -> type, for every text tensor. Raises RecipeError.

    libllama says what it would do in its log, a line per tensor. With an importance matrix it chooses otherwise.
    """
    params = ll.llama_model_quantize_default_params()
    params.ftype = RECIPES[recipe]
    params.dry_run = True
    known = _imatrix_stub(importance) if importance is not None else None
    if known is not None:
        params.imatrix = known
    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="edge-quantize-") as folder:
        outline = Path(folder) / "outline.gguf"
        write_outline(checkpoint, outline)
        log_to(said.append)
        try:
            status = ll.llama_model_quantize(os.fsencode(outline), b"none.gguf", ctypes.byref(params))
        finally:
            log_to(None)
    lines = "".join(said).splitlines()
    if status:
        errors = [line for line in lines if "error" in line.lower() or "failed" in line.lower()] or ["no reason given"]
        raise RecipeError(f"{checkpoint.folder}: libllama has no plan for {recipe}: {errors[0].strip()}")
    types = {}
    for line in lines:
        if found := _LINE.match(line):
            name, before, after = found.groups()
            types[name] = gguf.GGMLQuantizationType[(after or before).upper()]
    missing = [row.gguf for row in checkpoint.text_rows if row.gguf not in types]
    if missing:
        raise RecipeError(f"{checkpoint.folder}: libllama's plan for {recipe} leaves out {missing[0]}; report this")
    return types


def _imatrix_stub(importance: Imatrix) -> ctypes.Array:
    """What libllama wants to know of an importance matrix for a plan: that there is one, and sound numbers."""
    one = (ctypes.c_float * 1)(1.0)
    entries = [ll.llama_model_imatrix_data(name.encode(), one, 1) for name in importance.sums]
    return (ll.llama_model_imatrix_data * (len(entries) + 1))(*entries)  # the last one is empty: the end


# "[   1/ 236]  token_embd.weight - [ 3072, 131072, 1, 1], type =   bf16, size = 768.00 MiB -> 315.00 MiB (q6_K)"
_LINE = re.compile(r"\[ *\d+/ *\d+\] +(\S+) .*type = +(\w+), size = .*?(?:\((\w+)\))?$")


def bytes_by_type(checkpoint: Checkpoint, types: dict[str, gguf.GGMLQuantizationType]) -> dict[str, int]:
    """What the text tensors weigh in the types of a plan."""
    counted: Counter[str] = Counter()
    for row in checkpoint.text_rows:
        shape = checkpoint.shape(row)
        counted[types[row.gguf].name] += math.prod(shape[:-1]) * ggml_kernels.row_bytes(types[row.gguf], shape[-1])
    return dict(counted)


def file_type(recipe: str, by_type: dict[str, int]) -> int:
    """What a file calls itself: a standard recipe's number, or that of the type that holds most of its bytes."""
    if recipe in RECIPES:
        return RECIPES[recipe]
    most = max((kind for kind in by_type if kind in _FILE_TYPE_BY_QUANT), key=by_type.get, default="Q4_K")
    return _FILE_TYPE_BY_QUANT[most]


_FILE_TYPE_BY_QUANT = {
    "Q2_K": ll.LLAMA_FTYPE_MOSTLY_Q2_K,
    "Q3_K": ll.LLAMA_FTYPE_MOSTLY_Q3_K_M,
    "IQ4_XS": ll.LLAMA_FTYPE_MOSTLY_IQ4_XS,
    "Q4_K": ll.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q5_K": ll.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q6_K": ll.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q8_0": ll.LLAMA_FTYPE_MOSTLY_Q8_0,
}


def weigh_recipes(checkpoint: Checkpoint, recipe: str) -> dict[str, int]:
    """Bytes by type of the language model under a recipe, without converting anything."""
    return bytes_by_type(checkpoint, plan_recipe(checkpoint, recipe))


def budget_bytes(checkpoint: Checkpoint, board: str) -> int:
    """What the language model may weigh on a board; may be negative."""
    return round(BOARDS[board] * 2**30) - memory_bytes(checkpoint, 0)


def memory_bytes(checkpoint: Checkpoint, language_bytes: int) -> int:
    """What serving the model takes: language, vision, cache at 16 bit, buffers.

    onnxruntime computes in float32 and keeps the 16-bit weights beside: measured, 6 bytes a weight. (mtmd takes 2.)
    """
    vision = 6 * sum(math.prod(checkpoint.shape(row)) for row in checkpoint.vision_rows)
    return language_bytes + vision + CONTEXT * kv_bytes_per_token(checkpoint) + OVERHEAD_BYTES


def kv_bytes_per_token(checkpoint: Checkpoint) -> int:
    t = checkpoint.text
    return 2 * 2 * t.layers * t.kv_heads * t.head_dim
