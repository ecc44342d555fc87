"""A tensor of a checkpoint in blocks of rows: converted, in a given rotary order, and checked for NaN and infinity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np

from quantize.formats.build_plan import BuildPlan
from quantize.source.checkpoint import Checkpoint, deinterleave, interleave, row_ranges
from quantize.source.hf_config import CheckpointError
from quantize.source.tensor_names import TEXT, TensorSpec

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def tensor_blocks(
    checkpoint: Checkpoint, spec: TensorSpec, dtype: np.dtype, interleaved: bool = True
) -> Iterator[np.ndarray]:
    """The tensor's elements in `dtype`, flat, in blocks of whole rows. Raises CheckpointError.

    interleaved: rotary row pairs side by side, as in GGUF; False: each head's halves one after the other, as in HF.
    """
    source, shape = checkpoint.sources[spec.hf], checkpoint.shape(spec)
    rows_per_head = shape[0] // checkpoint.dims[spec.rope] if spec.rope else 1
    blocks: Iterable[np.ndarray]
    if checkpoint.needs_no_conversion(spec):  # straight from the file, without float32 in between
        blocks = (checkpoint.read_rows(spec, start, stop) for start, stop in row_ranges(shape, rows_per_head))
    else:
        blocks = checkpoint.dequantised_blocks(spec, rows_per_head)
    for block in blocks:
        if spec.rope and interleaved != checkpoint.interleaved:
            block = interleave(block, rows_per_head) if interleaved else deinterleave(block, rows_per_head)
        block = np.ascontiguousarray(block.astype(dtype, copy=False))
        if not _all_finite(block):
            why = "a value does not fit float16; use --type bf16" if dtype == np.float16 else "holds NaN or infinity"
            raise CheckpointError(f"{source.file}: {source.name}: {why}")
        yield block.reshape(-1)


def _all_finite(block: np.ndarray) -> bool:
    """By the exponent bits for bfloat16, because numpy does not know that type."""
    if block.dtype == BFLOAT16:
        return not ((block.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(block).all())


def img_break_row(plan: BuildPlan) -> np.ndarray:
    """The embedding of [IMG_BREAK], (hidden,) float32. It stands between the lines of image tokens."""
    checkpoint, token = plan.checkpoint, plan.tokenizer.special["img_break"]
    row = checkpoint.read_rows(TEXT[0], token, token + 1)[0].astype(np.float32)
    if (delta := checkpoint.lora.get(TEXT[0].hf)) is not None:
        b, a = delta.factors()
        row += np.float32(delta.scale) * (b[token] @ a)
    return row
