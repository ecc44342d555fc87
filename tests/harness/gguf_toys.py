"""Toy models of other families as GGUF files, as other tools write them: random weights, true architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.bundle.gguf_package import gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
CHATML = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL}
GEMMA = dict.fromkeys(("<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"), CONTROL)
LLAMA3 = dict.fromkeys(("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), CONTROL)
MISTRAL = dict.fromkeys(
    ("<s>", "</s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG_BREAK]", "[IMG_END]"), CONTROL
)
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 64, 4, 2, 16, 128
WORDS = ("the", "user", "system", "model", "Action", "action", "hold", "move", '{"', '":', '"}', "▁a", "▁the")


def vocabulary(special: dict[str, int]) -> tuple[list[str], list[int], list[float]]:
    """Texts, types and scores of a SentencePiece vocabulary: special tokens, bytes, ASCII letters, and some words."""
    texts, types = ["<unk>", *special], [UNKNOWN, *special.values()]
    texts += [f"<0x{i:02X}>" for i in range(256)]
    types += [BYTE] * 256
    letters = ["▁", "\n", *(chr(i) for i in range(33, 127)), *WORDS]
    texts += letters
    types += [NORMAL] * len(letters)
    return texts, types, [0.0] * (len(texts) - len(WORDS)) + [-float(i) for i in range(len(WORDS))]


def write_language(
    path: Path,
    architecture: str = "llama",
    special: dict[str, int] | None = None,
    *,
    seed: int = 0,
    keys: dict[str, object] | None = None,
    drop: tuple[str, ...] = (),
    split: dict[str, Any] | None = None,
) -> Path:
    """A language model of the families llama or gemma3. keys: more keys, or other values; a bool, an int, a float, a
    text or a list. drop: keys and tensors that are left out. split: options of GGUFWriter, which then writes parts
    with names of their own."""
    special = CHATML if special is None else special
    texts, types, scores = vocabulary(special)
    hidden, layers = HIDDEN, 2
    a = architecture
    found: dict[str, object] = {
        "general.type": "model",
        "general.name": f"toy {a}",
        "general.license": "apache-2.0",
        f"{a}.context_length": 4096,
        f"{a}.embedding_length": hidden,
        f"{a}.block_count": layers,
        f"{a}.feed_forward_length": FFN,
        f"{a}.attention.head_count": HEADS,
        f"{a}.attention.head_count_kv": KV_HEADS,
        f"{a}.attention.key_length": HEAD_DIM,
        f"{a}.attention.value_length": HEAD_DIM,
        f"{a}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{a}.rope.freq_base": 10000.0,
        f"{a}.rope.dimension_count": HEAD_DIM,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": special is GEMMA,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.chat_template": "{{ raise_exception('templates are never run') }}",
    }
    if a == "gemma3":
        found[f"{a}.attention.sliding_window"] = 32
    tensors = _language_tensors(a, len(texts))
    _write(path, a, {k: v for k, v in (found | (keys or {})).items() if k not in drop},
           {k: v for k, v in tensors.items() if k not in drop}, seed, split)  # fmt: skip
    return path


def _language_tensors(a: str, n_tokens: int) -> dict[str, tuple[int, ...]]:
    hidden, layers = HIDDEN, 2
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (n_tokens, hidden),
        "output_norm.weight": (hidden,),
    }
    for n in range(layers):
        tensors |= {
            f"blk.{n}.attn_norm.weight": (hidden,),
            f"blk.{n}.attn_q.weight": (HEADS * HEAD_DIM, hidden),
            f"blk.{n}.attn_k.weight": (KV_HEADS * HEAD_DIM, hidden),
            f"blk.{n}.attn_v.weight": (KV_HEADS * HEAD_DIM, hidden),
            f"blk.{n}.attn_output.weight": (hidden, HEADS * HEAD_DIM),
            f"blk.{n}.ffn_norm.weight": (hidden,),
            f"blk.{n}.ffn_gate.weight": (FFN, hidden),
            f"blk.{n}.ffn_up.weight": (FFN, hidden),
            f"blk.{n}.ffn_down.weight": (hidden, FFN),
        }
        if a == "gemma3":
            tensors |= {f"blk.{n}.{name}.weight": (hidden,) for name in ("post_attention_norm", "post_ffw_norm")}
            tensors |= {f"blk.{n}.attn_{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
    return tensors


def write_gemma_mmproj(
    path: Path, *, seed: int = 1, keys: dict[str, object] | None = None, drop: tuple[str, ...] = ()
) -> Path:
    """The encoder and projector of Gemma 3: 4x4 patches of 14 pixels, 2x2 of them averaged to a row, 4 rows."""
    width, ffn, patch, hidden, image_size = 32, 64, 14, HIDDEN, 56
    found: dict[str, object] = {
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "gemma3",
        "clip.vision.image_size": image_size,
        "clip.vision.patch_size": patch,
        "clip.vision.embedding_length": width,
        "clip.vision.feed_forward_length": ffn,
        "clip.vision.block_count": 2,
        "clip.vision.attention.head_count": 2,
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.projection_dim": hidden,
        "clip.vision.projector.scale_factor": 2,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
        "clip.use_gelu": True,
    }
    tensors: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (width, 3, patch, patch),
        "v.patch_embd.bias": (width,),
        "v.position_embd.weight": ((image_size // patch) ** 2, width),
        "v.post_ln.weight": (width,),
        "v.post_ln.bias": (width,),
        "mm.input_projection.weight": (width, hidden),
        "mm.soft_emb_norm.weight": (width,),
    }
    for n in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            tensors |= {f"v.blk.{n}.{name}.weight": (width, width), f"v.blk.{n}.{name}.bias": (width,)}
        for name in ("ln1", "ln2"):
            tensors |= {f"v.blk.{n}.{name}.{part}": (width,) for part in ("weight", "bias")}
        tensors |= {f"v.blk.{n}.ffn_up.weight": (ffn, width), f"v.blk.{n}.ffn_up.bias": (ffn,)}
        tensors |= {f"v.blk.{n}.ffn_down.weight": (width, ffn), f"v.blk.{n}.ffn_down.bias": (width,)}
    _write(path, "clip", {k: v for k, v in (found | (keys or {})).items() if k not in drop}, tensors, seed)
    return path


def _write(
    path: Path,
    architecture: str,
    keys: dict[str, object],
    tensors: dict[str, tuple[int, ...]],
    seed: int,
    split: dict[str, Any] | None = None,
) -> None:
    writer = gguf.GGUFWriter(path, architecture, **split or {})
    for key, value in keys.items():
        if key != "general.architecture":
            _add(writer, key, value)
    rng = np.random.default_rng(seed)
    for name, shape in tensors.items():
        scale = 0.3 if len(shape) == 1 else 1 / np.sqrt(shape[-1])
        offset = 1.0 if "norm" in name or ("ln" in name and name.endswith("weight")) else 0.0
        writer.add_tensor(name, (offset + scale * rng.standard_normal(shape)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, np.uint64):
        writer.add_uint64(key, int(value))
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
