"""Checkpoint -> GGUF files, in one pass over the tensors: language.gguf, and mmproj.gguf for llama.cpp's encoder.

The headers come from the `gguf` package; tensor bytes are streamed in blocks of rows, so memory does not grow with the
model, and quantised on the way, without a file at full precision in between. Which tensor gets which type is said by
the caller (recipe.plan); vectors stay float32, as llama.cpp expects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np

from quantize.build_folder import BuildFolder
from quantize.formats import ggml_kernels
from quantize.formats.imatrix import Imatrix
from quantize.source.checkpoint import Checkpoint, chat_template, deinterleave, interleave, row_ranges
from quantize.source.hf_config import CheckpointError
from quantize.source.tensor_names import TEXT, TensorSpec
from quantize.source.tokenizer import read_tokenizer

Report = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)
Type = gguf.GGMLQuantizationType
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TYPES = {  # --type -> (GGUF tensor type, llama.cpp's file type)
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),  # of mmproj.gguf only
}
FLOATS = {Type.BF16: BFLOAT16, Type.F16: np.dtype(np.float16), Type.F32: np.dtype(np.float32)}
# llama.cpp's convolution takes no bfloat16, and its own files keep these two at float32 unless they are float16.
CONVOLUTIONS = ("v.patch_embd.weight", "mm.patch_merger.weight")
IMG_BREAK = "v.token_embd.img_break"
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
HEAD = ".head"  # of the file that a header is made in


def write_language(
    checkpoint: Checkpoint,
    out: Path,
    types: dict[str, Type],
    file_type: int,
    report: Report,
    importance: Imatrix | None = None,
    work: BuildFolder | None = None,
) -> None:
    """language.gguf: the text model and its tokenizer. types: GGUF name -> type, of every text tensor.

    work: notes how far it is, and how far an earlier run was.
    """
    words = read_tokenizer(checkpoint.folder, checkpoint.text.vocab)
    writer = _language_writer(checkpoint, out.with_name(out.name + HEAD), file_type)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("tekken")
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    writer.add_bos_token_id(words.special["bos"])
    writer.add_eos_token_id(words.special["eos"])
    writer.add_unk_token_id(words.special["unk"])
    writer.add_pad_token_id(words.special["pad"])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    if template := chat_template(checkpoint.folder):
        writer.add_chat_template(template)
    _write(writer, out, checkpoint, checkpoint.text_rows, types, report, importance=importance, work=work)


def write_outline(checkpoint: Checkpoint, out: Path) -> None:
    """language.gguf with every header and no weights (a hole in the file): enough for libllama to plan a recipe."""
    writer = _language_writer(checkpoint, out, TYPES["bf16"][1])
    types = uniform(checkpoint, checkpoint.text_rows, "bf16")
    _declare(writer, checkpoint, checkpoint.text_rows, types)
    sizes = [_n_bytes(checkpoint.shape(row), types[row.gguf]) for row in checkpoint.text_rows]
    n_bytes = sum(gguf.GGUFWriter.ggml_pad(size, ALIGNMENT) for size in sizes)
    file = writer.fout[0]
    file.truncate(file.tell() + n_bytes)
    writer.close()


def _language_writer(checkpoint: Checkpoint, out: Path, file_type: int) -> gguf.GGUFWriter:
    t = checkpoint.text
    writer = gguf.GGUFWriter(out, checkpoint.config.family.gguf)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"{checkpoint.family} {checkpoint.size} {checkpoint.variant()}")
    writer.add_size_label(checkpoint.size)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(t.vocab)
    writer.add_context_length(t.context)
    writer.add_embedding_length(t.hidden)
    writer.add_block_count(t.layers)
    writer.add_feed_forward_length(t.ffn)
    writer.add_head_count(t.heads)
    writer.add_head_count_kv(t.kv_heads)
    writer.add_key_length(t.head_dim)
    writer.add_value_length(t.head_dim)
    writer.add_layer_norm_rms_eps(t.rms_eps)
    writer.add_rope_dimension_count(t.head_dim)
    writer.add_rope_freq_base(t.rope_theta)
    if t.yarn is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(t.yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(t.yarn.original_context)
        writer.add_rope_scaling_yarn_beta_fast(t.yarn.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(t.yarn.beta_slow)
        writer.add_rope_scaling_yarn_log_mul(t.yarn.mscale_all_dim)
        writer.add_attn_temperature_scale(t.yarn.scaling_beta)
    return writer


def write_mmproj(checkpoint: Checkpoint, out: Path, kind: str, report: Report) -> None:
    """mmproj.gguf: vision tower, patch merger and projector for llama.cpp's mtmd, [IMG_BREAK] row included."""
    v, words = checkpoint.vision, read_tokenizer(checkpoint.folder, checkpoint.text.vocab)
    writer = gguf.GGUFWriter(out.with_name(out.name + HEAD), "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(f"{checkpoint.family} {checkpoint.size} vision")
    writer.add_file_type(TYPES[kind][1])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(gguf.VisionProjectorType.PIXTRAL)
    writer.add_vision_projection_dim(checkpoint.text.hidden)
    writer.add_vision_image_size(v.image_size)
    writer.add_vision_patch_size(v.patch)
    writer.add_vision_embedding_length(v.hidden)
    writer.add_vision_feed_forward_length(v.ffn)
    writer.add_vision_block_count(v.layers)
    writer.add_vision_head_count(v.heads)
    writer.add_vision_attention_layernorm_eps(v.eps)
    writer.add_vision_use_silu(True)
    writer.add_vision_spatial_merge_size(v.merge)
    writer.add_vision_image_mean(v.mean)
    writer.add_vision_image_std(v.std)
    rows = checkpoint.vision_rows
    _write(writer, out, checkpoint, rows, uniform(checkpoint, rows, kind), report, words.special["img_break"])


def img_break(checkpoint: Checkpoint, break_id: int) -> np.ndarray:
    """The [IMG_BREAK] embedding, (hidden,) float32: it stands between the rows of an image."""
    row = checkpoint.rows(TEXT[0], break_id, break_id + 1)[0].astype(np.float32)
    if (added := checkpoint.added.get(TEXT[0].hf)) is not None:
        up, down = added.factors()
        row += np.float32(added.scale) * (up[break_id] @ down)
    return row


def uniform(checkpoint: Checkpoint, rows: list[TensorSpec], kind: str) -> dict[str, Type]:
    """Every matrix in one type: bf16, f16, f32 or q8_0. GGUF name -> type."""

    def of(row: TensorSpec) -> Type:
        shape = checkpoint.shape(row)
        if len(shape) == 1:
            return Type.F32
        if kind == "q8_0" and (row.gguf in CONVOLUTIONS or shape[-1] % 32):
            return Type.F16
        return Type.F32 if row.gguf in CONVOLUTIONS and kind == "bf16" else TYPES[kind][0]

    return {row.gguf: of(row) for row in rows}


def _n_bytes(shape: tuple[int, ...], kind: Type) -> int:
    return math.prod(shape[:-1]) * ggml_kernels.row_bytes(kind, shape[-1])


def _declare(
    writer: gguf.GGUFWriter,
    checkpoint: Checkpoint,
    rows: list[TensorSpec],
    types: dict[str, Type],
    break_row: bool = False,
) -> None:
    """Write every header."""
    for row in rows:
        shape, kind = checkpoint.shape(row), types[row.gguf]
        writer.add_tensor_info(row.gguf, shape, np.dtype(np.float32), _n_bytes(shape, kind), kind)
    if break_row:
        writer.add_tensor_info(IMG_BREAK, (checkpoint.text.hidden,), np.dtype(np.float32), checkpoint.text.hidden * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(writer.fout[0], writer.fout[0].tell())


def _write(
    writer: gguf.GGUFWriter,
    out: Path,
    checkpoint: Checkpoint,
    rows: list[TensorSpec],
    types: dict[str, Type],
    report: Report,
    break_id: int = -1,
    importance: Imatrix | None = None,
    work: BuildFolder | None = None,
) -> None:
    """The header, and behind it tensor after tensor: those that an earlier run left whole are not made again."""
    # The package would want each tensor whole in memory; the format is only bytes with padding between them.
    _declare(writer, checkpoint, rows, types, break_row=break_id >= 0)
    writer.close()
    head = writer.path.read_bytes()
    writer.path.unlink()
    total, done = sum(math.prod(checkpoint.shape(row)) for row in rows), 0
    there, at = work.n_bytes(out.name) if work is not None else 0, len(head)
    with out.open("r+b" if there else "wb") as file:
        file.write(head)
        for row in rows:
            end = at + gguf.GGUFWriter.ggml_pad(_n_bytes(checkpoint.shape(row), types[row.gguf]), ALIGNMENT)
            if end <= there:
                done += math.prod(checkpoint.shape(row))
                file.seek(end)
            else:
                for data, n in _stored(checkpoint, row, types[row.gguf], importance):
                    file.write(data.view(np.uint8).data)
                    done += n
                    report(row.gguf, done, total)
                file.write(bytes(end - file.tell()))
                if work is not None:
                    file.flush()
                    work.note(out.name, file.fileno(), end)
            at = end
        if break_id >= 0:
            data = img_break(checkpoint, break_id).tobytes()
            file.write(data + bytes(-len(data) % ALIGNMENT))
        file.truncate()


def _stored(
    checkpoint: Checkpoint, row: TensorSpec, kind: Type, importance: Imatrix | None
) -> Iterator[tuple[np.ndarray, int]]:
    """A tensor's blocks as the file has them, and how many elements each holds."""
    columns = importance.of(row.gguf) if importance is not None else None
    for block in tensor_blocks(checkpoint, row, FLOATS.get(kind, BFLOAT16)):
        if kind in FLOATS:
            yield block, block.size
        else:  # through bfloat16, so that a bundle of an FP8 checkpoint is that of its bf16 conversion
            wide = block.astype(np.float32).reshape(-1, checkpoint.shape(row)[-1])
            yield ggml_kernels.quantise_rows(wide, kind, columns), block.size


def tensor_blocks(
    checkpoint: Checkpoint, row: TensorSpec, dtype: np.dtype, interleaved: bool = True
) -> Iterator[np.ndarray]:
    """The tensor's elements in `dtype`, flat, in blocks of whole rows; rotary rows in pairs as GGUF wants them, or
    (interleaved=False) in halves."""
    source, shape = checkpoint.sources[row.hf], checkpoint.shape(row)
    unit = shape[0] // checkpoint.dims[row.rope] if row.rope else 1  # rows of one head, which may not be split
    if checkpoint.is_plain(row):  # straight from the file: no detour through float32 where the type stays
        blocks = (checkpoint.rows(row, start, stop) for start, stop in row_ranges(shape, unit))
    else:
        blocks = checkpoint.float_blocks(row, unit)
    for block in blocks:
        if row.rope and interleaved != checkpoint.interleaved:
            block = interleave(block, unit) if interleaved else deinterleave(block, unit)
        block = np.ascontiguousarray(block.astype(dtype, copy=False))
        if not _finite(block):
            why = "a value does not fit float16; use --type bf16" if dtype == np.float16 else "holds NaN or infinity"
            raise CheckpointError(f"{source.file}: {source.name}: {why}")
        yield block.reshape(-1)


def _finite(block: np.ndarray) -> bool:
    """Whether every number is one. By the bits for bfloat16, which numpy itself does not know."""
    if block.dtype == BFLOAT16:
        return not ((block.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(block).all())
