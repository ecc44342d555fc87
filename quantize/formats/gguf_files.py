"""Checkpoint -> GGUF files, in one pass over the tensors: language.gguf, and mmproj.gguf for llama.cpp's encoder.

Tensors are read in blocks of rows and quantised at once, so memory does not grow with the model and no file at full
precision is written in between. The plan gives the type of each tensor; vectors are float32, as llama.cpp expects.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge_agent.bundle.gguf_package import gguf
from quantize.build_folder import BuildFolder
from quantize.formats import ggml_kernels
from quantize.formats.build_plan import FLOAT_TYPES, BuildPlan, uniform_types
from quantize.formats.ggml_kernels import Type
from quantize.formats.gguf_writer import GgufFile
from quantize.formats.tensor_blocks import BFLOAT16, img_break_row, tensor_blocks
from quantize.progress import Progress
from quantize.source.checkpoint import Checkpoint, chat_template
from quantize.source.tensor_names import TensorSpec
from quantize.source.tokenizer import Tokenizer

FLOAT_DTYPES = {Type.BF16: BFLOAT16, Type.F16: np.dtype(np.float16), Type.F32: np.dtype(np.float32)}
IMG_BREAK = "v.token_embd.img_break"
OUTLINE_ROWS = 2  # of a matrix in an outline; a single row would count as a vector


def write_language(plan: BuildPlan, folder: BuildFolder, name: str, progress: Progress) -> None:
    """language.gguf: the text model and its tokenizer. Goes on behind the tensors that an earlier run has written.

    name: of the file in `folder`.
    """
    checkpoint = plan.checkpoint
    file = GgufFile(folder / name, checkpoint.config.family.gguf)
    _add_language_fields(file.fields, checkpoint, plan.file_type)
    _add_tokenizer_fields(file.fields, plan.tokenizer)
    if template := chat_template(checkpoint.folder):
        file.fields.add_chat_template(template)
    stage, total, done = f"language {plan.name}", checkpoint.n_elements(checkpoint.text_tensors), 0
    try:
        for spec in checkpoint.text_tensors:
            file.declare(spec.gguf, checkpoint.shape(spec), plan.types[spec.gguf])
        kept_bytes = folder.kept_bytes(name)
        file.start(kept_bytes)
        for spec in checkpoint.text_tensors:
            if file.next_end <= kept_bytes:
                file.skip()
            else:
                file.write(_reported(_stored_blocks(plan, spec), progress, stage, spec.gguf, done, total))
                folder.checkpoint_progress(name, file.fileno(), file.position)
            done += checkpoint.n_elements([spec])
        file.close()
    finally:
        file.abandon()


def write_outline(checkpoint: Checkpoint, path: Path) -> None:
    """language.gguf with every header field and OUTLINE_ROWS rows of zeros for each matrix, at bf16.

    That is all that libllama needs to choose the types of a recipe. Kilobytes instead of gigabytes.
    """
    file = GgufFile(path, checkpoint.config.family.gguf)
    _add_language_fields(file.fields, checkpoint, FLOAT_TYPES["bf16"][1])
    types = uniform_types(checkpoint, checkpoint.text_tensors, "bf16")
    try:
        for spec in checkpoint.text_tensors:
            shape = checkpoint.shape(spec)
            file.declare(spec.gguf, shape if len(shape) == 1 else (OUTLINE_ROWS, *shape[1:]), types[spec.gguf])
        file.start()
        for _ in checkpoint.text_tensors:
            file.skip()
        file.close()
    finally:
        file.abandon()


def write_mmproj(plan: BuildPlan, path: Path, progress: Progress) -> None:
    """mmproj.gguf: vision tower, patch merger and projector for llama.cpp's mtmd, and the [IMG_BREAK] embedding."""
    checkpoint, kind = plan.checkpoint, plan.vision.mmproj
    specs, total, done = checkpoint.vision_tensors, checkpoint.n_elements(checkpoint.vision_tensors), 0
    types = uniform_types(checkpoint, specs, kind)
    break_row = img_break_row(plan)
    file = GgufFile(path, "clip")
    _add_vision_fields(file.fields, checkpoint, FLOAT_TYPES[kind][1])
    try:
        for spec in specs:
            file.declare(spec.gguf, checkpoint.shape(spec), types[spec.gguf])
        file.declare(IMG_BREAK, break_row.shape, Type.F32)
        file.start()
        for spec in specs:
            blocks = _converted_blocks(checkpoint, spec, types[spec.gguf], None)
            file.write(_reported(blocks, progress, "mmproj", spec.gguf, done, total))
            done += checkpoint.n_elements([spec])
        file.write([break_row])
        file.close()
    finally:
        file.abandon()


# -- header fields -----------------------------------------------------------------------------------------------------


def _add_language_fields(fields: gguf.GGUFWriter, checkpoint: Checkpoint, file_type: int) -> None:
    t = checkpoint.text
    fields.add_type(gguf.GGUFType.MODEL)
    fields.add_name(f"{checkpoint.family} {checkpoint.size} {checkpoint.variant()}")
    fields.add_size_label(checkpoint.size)
    fields.add_file_type(file_type)
    fields.add_quantization_version(gguf.GGML_QUANT_VERSION)
    fields.add_vocab_size(t.vocab)
    fields.add_context_length(t.context)
    fields.add_embedding_length(t.hidden)
    fields.add_block_count(t.layers)
    fields.add_feed_forward_length(t.ffn)
    fields.add_head_count(t.heads)
    fields.add_head_count_kv(t.kv_heads)
    fields.add_key_length(t.head_dim)
    fields.add_value_length(t.head_dim)
    fields.add_layer_norm_rms_eps(t.rms_eps)
    fields.add_rope_dimension_count(t.head_dim)
    fields.add_rope_freq_base(t.rope_theta)
    if t.yarn is not None:
        fields.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        fields.add_rope_scaling_factor(t.yarn.factor)
        fields.add_rope_scaling_orig_ctx_len(t.yarn.original_context)
        fields.add_rope_scaling_yarn_beta_fast(t.yarn.beta_fast)
        fields.add_rope_scaling_yarn_beta_slow(t.yarn.beta_slow)
        fields.add_rope_scaling_yarn_log_mul(t.yarn.mscale_all_dim)
        fields.add_attn_temperature_scale(t.yarn.scaling_beta)


def _add_tokenizer_fields(fields: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    fields.add_tokenizer_model("gpt2")
    fields.add_tokenizer_pre("tekken")
    fields.add_token_list(tokenizer.tokens)
    fields.add_token_types(tokenizer.types)
    fields.add_token_merges(tokenizer.merges)
    fields.add_bos_token_id(tokenizer.special["bos"])
    fields.add_eos_token_id(tokenizer.special["eos"])
    fields.add_unk_token_id(tokenizer.special["unk"])
    fields.add_pad_token_id(tokenizer.special["pad"])
    fields.add_add_bos_token(True)
    fields.add_add_eos_token(False)


def _add_vision_fields(fields: gguf.GGUFWriter, checkpoint: Checkpoint, file_type: int) -> None:
    v = checkpoint.vision_tower
    fields.add_type(gguf.GGUFType.MMPROJ)
    fields.add_name(f"{checkpoint.family} {checkpoint.size} vision")
    fields.add_file_type(file_type)
    fields.add_clip_has_vision_encoder(True)
    fields.add_clip_projector_type(gguf.VisionProjectorType.PIXTRAL)
    fields.add_vision_projection_dim(checkpoint.text.hidden)
    fields.add_vision_image_size(v.image_size)
    fields.add_vision_patch_size(v.patch)
    fields.add_vision_embedding_length(v.hidden)
    fields.add_vision_feed_forward_length(v.ffn)
    fields.add_vision_block_count(v.layers)
    fields.add_vision_head_count(v.heads)
    fields.add_vision_attention_layernorm_eps(v.eps)
    fields.add_vision_use_silu(True)
    fields.add_vision_spatial_merge_size(v.merge)
    fields.add_vision_image_mean(v.mean)
    fields.add_vision_image_std(v.std)


# -- tensor bytes ------------------------------------------------------------------------------------------------------


def _stored_blocks(plan: BuildPlan, spec: TensorSpec) -> Iterator[tuple[np.ndarray, int]]:
    columns = plan.imatrix.of(spec.gguf) if plan.imatrix is not None else None
    return _converted_blocks(plan.checkpoint, spec, plan.types[spec.gguf], columns)


def _converted_blocks(
    checkpoint: Checkpoint, spec: TensorSpec, kind: Type, columns: np.ndarray | None
) -> Iterator[tuple[np.ndarray, int]]:
    """(a block as the file stores it, number of elements in it). columns: (width,) float32, importance, or None."""
    for block in tensor_blocks(checkpoint, spec, FLOAT_DTYPES.get(kind, BFLOAT16)):
        if kind in FLOAT_DTYPES:
            yield block, block.size
        else:  # through bfloat16, so that a bundle of an FP8 checkpoint equals that of its bf16 conversion
            rows = block.astype(np.float32).reshape(-1, checkpoint.shape(spec)[-1])
            yield ggml_kernels.quantise_rows(rows, kind, columns), block.size


def _reported(
    blocks: Iterator[tuple[np.ndarray, int]], progress: Progress, stage: str, what: str, done: int, total: int
) -> Iterator[np.ndarray]:
    """The blocks, with a progress step after each one is consumed. done: elements that are complete before it."""
    for block, n_elements in blocks:
        yield block
        done += n_elements
        progress.step(stage, what, done, total)
