"""The standard recipes of llama.cpp: which tensor gets which type, and how many bytes that is.

The rules of a recipe are libllama's own. They are not copied: libllama quantises a small outline of the model (all
header fields, a few rows of zeros for each matrix), and the types are read from the file that it writes.
tests/reference/recipe_types.json pins the result for a release of llama-cpp-python.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections import Counter
from pathlib import Path

import llama_cpp.llama_cpp as ll

from edge_agent.errors import UserError
from edge_agent.model.llama import log_to
from quantize.formats.build_plan import BuildPlan, VisionFormat, check_fixed_size
from quantize.formats.ggml_kernels import Type, tensor_bytes, tensor_table
from quantize.formats.gguf_files import write_outline
from quantize.formats.imatrix import Imatrix
from quantize.source.checkpoint import Checkpoint
from quantize.source.tokenizer import Tokenizer, read_tokenizer

RECIPES = {
    "Q4_K_M": ll.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q4_K_S": ll.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "Q4_0": ll.LLAMA_FTYPE_MOSTLY_Q4_0,
    "IQ4_XS": ll.LLAMA_FTYPE_MOSTLY_IQ4_XS,
    "Q5_K_M": ll.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q6_K": ll.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q8_0": ll.LLAMA_FTYPE_MOSTLY_Q8_0,
    "BF16": ll.LLAMA_FTYPE_MOSTLY_BF16,  # lossless: the reference for the others
}
_FILE_TYPE_BY_QUANT = {
    "Q2_K": ll.LLAMA_FTYPE_MOSTLY_Q2_K,
    "Q3_K": ll.LLAMA_FTYPE_MOSTLY_Q3_K_M,
    "IQ4_XS": ll.LLAMA_FTYPE_MOSTLY_IQ4_XS,
    "Q4_K": ll.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q5_K": ll.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q6_K": ll.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q8_0": ll.LLAMA_FTYPE_MOSTLY_Q8_0,
}


class RecipeError(UserError):
    """libllama refused. One line."""


def recipe_types(checkpoint: Checkpoint, recipe: str, imatrix: Imatrix | None = None) -> dict[str, Type]:
    """GGUF name -> type, for every text tensor. With an importance matrix libllama chooses other types.

    Raises RecipeError.
    """
    params = ll.llama_model_quantize_default_params()
    params.ftype = RECIPES[recipe]
    stub = _imatrix_stub(checkpoint, imatrix) if imatrix is not None else None
    if stub is not None:
        params.imatrix = stub
    log: list[str] = []
    with tempfile.TemporaryDirectory(prefix="edge-quantize-") as folder:
        outline, quantised = Path(folder) / "outline.gguf", Path(folder) / "quantised.gguf"
        write_outline(checkpoint, outline)
        log_to(log.append)
        try:
            status = ll.llama_model_quantize(os.fsencode(outline), os.fsencode(quantised), ctypes.byref(params))
        finally:
            log_to(None)
        if status:
            lines = "".join(log).splitlines()
            errors = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
            reason = errors[0].strip() if errors else "no reason given"
            raise RecipeError(f"{checkpoint.folder}: libllama has no plan for {recipe}: {reason}")
        types = {tensor.name: Type[tensor.ggml_type] for tensor in tensor_table(quantised)}
    missing = [spec.gguf for spec in checkpoint.text_tensors if spec.gguf not in types]
    if missing:
        raise RecipeError(f"{checkpoint.folder}: libllama's {recipe} leaves out {missing[0]}; please report this")
    return types


def _imatrix_stub(checkpoint: Checkpoint, imatrix: Imatrix) -> ctypes.Array[ll.llama_model_imatrix_data]:
    """What libllama needs of an importance matrix to choose types: the names, and valid numbers of the right count."""
    widths = {spec.gguf: checkpoint.shape(spec)[-1] for spec in checkpoint.text_tensors}
    ones = (ctypes.c_float * max(widths.values()))(*[1.0] * max(widths.values()))
    entries = [
        ll.llama_model_imatrix_data(name.encode(), ones, widths[name]) for name in imatrix.sums if name in widths
    ]
    return (ll.llama_model_imatrix_data * (len(entries) + 1))(*entries)  # an empty entry ends the list


def plan_bundle(
    checkpoint: Checkpoint,
    recipe: str,
    *,
    tokenizer: Tokenizer | None = None,
    imatrix: Imatrix | None = None,
    vision: VisionFormat | None = None,
) -> BuildPlan:
    """The plan of a bundle by a standard recipe. tokenizer: if it is read already.

    Raises CheckpointError, RecipeError.
    """
    vision = vision or VisionFormat()
    if vision.fixed is not None:
        check_fixed_size(checkpoint, vision.fixed)
    return BuildPlan(
        checkpoint=checkpoint,
        tokenizer=tokenizer or read_tokenizer(checkpoint.folder, checkpoint.text.vocab),
        name=recipe,
        types=recipe_types(checkpoint, recipe, imatrix),
        file_type=RECIPES[recipe],
        vision=vision,
        imatrix=imatrix,
    )


def bytes_by_type(checkpoint: Checkpoint, types: dict[str, Type]) -> dict[str, int]:
    """Type -> bytes of the text tensors that have it."""
    n_bytes: Counter[str] = Counter()
    for spec in checkpoint.text_tensors:
        n_bytes[types[spec.gguf].name] += tensor_bytes(checkpoint.shape(spec), types[spec.gguf])
    return dict(n_bytes)


def file_type_of(types_bytes: dict[str, int]) -> int:
    """llama.cpp's file type for a mixture of types: that of the type with the most bytes."""
    known = [kind for kind in types_bytes if kind in _FILE_TYPE_BY_QUANT]
    return _FILE_TYPE_BY_QUANT[max(known, key=lambda kind: types_bytes[kind], default="Q4_K")]
