"""What the headers of a language model's GGUF file and of an mmproj say, as the manifest's types, and which families of
models edge-agent cannot serve right, and why.

A fact that is missing, or that two places of the files state differently, is an error that names the key.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, NamedTuple

from edge_agent.bundle.file_check import GgufHeader, TensorHeader, UnsafeFileError, shown
from edge_agent.bundle.manifest import EmbeddingInfo, ModelInfo, VisionInfo

EMBEDDING = "token_embd.weight"
KV_VALUE_BYTES = 2
MAX_LAYERS = 1024
MAX_SIZE = 1 << 20  # of a number in a manifest
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")  # that llama.cpp knows
# Decoders with one position for each row and a cache that can be cut at any position, known to the llama.cpp that
# edge_agent/model/llama.py requires.
ARCHITECTURES = frozenset((
    "afmoe", "apertus", "arcee", "arctic", "baichuan", "bailingmoe", "bailingmoe2", "bitnet", "bloom", "chatglm",
    "codeshell", "cohere2", "cohere2moe", "command-r", "dbrx", "deci", "deepseek", "deepseek2", "dots1", "ernie4_5",
    "ernie4_5-moe", "exaone", "exaone-moe", "exaone4", "falcon", "gemma", "gemma2", "gemma3", "gemma3n", "gemma4",
    "glm4", "glm4moe", "gpt-oss", "gpt2", "gptj", "gptneox", "granite", "granitemoe", "granite_swa", "grok",
    "grovemoe", "hunyuan-dense", "hunyuan-moe", "hy_v3", "internlm2", "jais", "jais2", "laguna", "llama", "llama4",
    "maincoder", "maple", "mellum", "mimo2", "minicpm", "minicpm3", "minimax-m2", "mistral3", "mistral4", "mpt",
    "nanbeige", "nemotron", "olmo", "olmo2", "olmoe", "openelm", "orion", "pangu-embedded", "phi2", "phi3",
    "phimoe", "plamo", "plamo3", "plm", "qwen", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "refact", "seed_oss",
    "smallthinker", "smollm3", "spark2_5", "stablelm", "starcoder", "starcoder2", "step35", "talkie", "xverse",
))  # fmt: skip
# Families that llama.cpp knows and edge-agent does not serve -> why.
_M_ROPE = "its positions have three dimensions (M-RoPE), which edge-agent does not write"
_RECURRENT = "its state cannot be cut back to the frame before (recurrent layers)"
_ENCODER = "an embedding model or encoder, which writes no text"
_DIFFUSION = "a diffusion model, which does not write from left to right"
REFUSED = {
    **dict.fromkeys(("qwen2vl", "qwen3vl", "qwen3vlmoe", "paddleocr", "hunyuan_vl"), _M_ROPE),
    **dict.fromkeys(
        ("arwkv7", "bailingmoe3", "deepseek4", "falcon-h1", "glm5-next", "granitehybrid", "jamba", "kimi-k3",
         "kimi-linear", "lfm2", "lfm2moe", "mamba", "mamba2", "minimax-01", "nemotron_h", "nemotron_h_moe", "plamo2",
         "qwen35", "qwen35moe", "qwen3next", "qwen4exp", "rwkv6", "rwkv6qwen2", "rwkv7"), _RECURRENT,
    ),
    **dict.fromkeys(
        ("bert", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llama-embed", "modern-bert",
         "neo-bert", "nomic-bert", "nomic-bert-moe", "t5", "t5encoder", "wavtokenizer-dec"), _ENCODER,
    ),
    **dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"), _DIFFUSION),
    "clip": "an mmproj; give it second, behind the language model",
}  # fmt: skip
# general.file_type -> its name in llama.cpp
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE",
}  # fmt: skip


class Projector(NamedTuple):
    """How the rows of an image reach the language model."""

    architectures: tuple[str, ...]  # of the language models that its rows are made for
    merge_key: str  # patches per side of one row
    merge_default: int
    breaks: bool  # as in VisionInfo
    causal: bool
    fixed: bool  # the encoder takes squares of image_size pixels only


PROJECTORS = {
    "pixtral": Projector(("mistral3", "llama"), "clip.vision.spatial_merge_size", 1, True, True, False),
    "gemma3": Projector(("gemma3",), "clip.vision.projector.scale_factor", 4, False, False, True),
}
M_ROPE_PROJECTORS = ("qwen2vl_merger", "qwen2.5vl_merger", "qwen2.5o", "qwen3vl_merger", "glm4v", "paddleocr")


def check_family(header: GgufHeader) -> None:
    """Raises UnsafeFileError for a file that is not a language model, or is one that cannot be served right."""
    values = header.values
    architecture = str(values["general.architecture"])
    if (kind := values.get("general.type", "model")) != "model":
        hint = {"adapter": "give it in language.adapters, and wrap its model", "mmproj": "give it second"}.get(
            str(kind)
        )
        raise UnsafeFileError(f"general.type: expected 'model', found {shown(kind)}" + (f": {hint}" if hint else ""))
    if "adapter.type" in values:
        raise UnsafeFileError("adapter.type: a LoRA adapter; give it in language.adapters, and wrap its model")
    for key, is_encoder in (("pooling_type", bool), ("attention.causal", lambda value: value is False)):
        if is_encoder(values.get(f"{architecture}.{key}")):
            raise UnsafeFileError(f"{architecture}.{key}: {_ENCODER}; expected a model that writes text")
    if any(_numbers(values.get(f"{architecture}.rope.dimension_sections"))):
        raise UnsafeFileError(f"{architecture}.rope.dimension_sections: {_M_ROPE}")
    _check_for_aborts(values, architecture)
    for key in ("ssm.conv_kernel", "ssm.state_size", "wkv.head_size", "shortconv.l_cache"):
        if values.get(f"{architecture}.{key}"):
            raise UnsafeFileError(f"{architecture}.{key}: {_RECURRENT}")


def _check_for_aborts(values: dict[str, object], architecture: str) -> None:
    """Values that llama.cpp ends the process for. Raises UnsafeFileError."""
    scaling = values.get(f"{architecture}.rope.scaling.type", "none")
    if scaling not in ROPE_SCALINGS:
        expected = ", ".join(ROPE_SCALINGS)
        raise UnsafeFileError(f"{architecture}.rope.scaling.type: expected one of {expected}, found {shown(scaling)}")
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        epsilon = values.get(f"{architecture}.{key}", 0.0)
        if not isinstance(epsilon, float) or not 0 <= epsilon <= 1:
            raise UnsafeFileError(f"{architecture}.{key}: expected a number from 0 to 1, found {shown(epsilon)}")
    n_experts, n_used = (values.get(f"{architecture}.{key}", 0) for key in ("expert_count", "expert_used_count"))
    if not isinstance(n_experts, int) or not isinstance(n_used, int) or not 0 <= n_used <= n_experts:
        expected = f"at most expert_count ({shown(n_experts)})"
        raise UnsafeFileError(f"{architecture}.expert_used_count: expected {expected}, found {shown(n_used)}")


def refused_architecture(architecture: object) -> str:
    """Why a file of this architecture is not a language model that can be served; "": it can."""
    if isinstance(architecture, str) and architecture in ARCHITECTURES:
        return ""
    why = REFUSED.get(
        str(architecture), "unknown to this version; use a newer edge-agent, or a model of another family"
    )
    return f"general.architecture: {str(architecture)[:40]!r}: {why}"


def embedding_table(header: GgufHeader) -> TensorHeader:
    """Raises UnsafeFileError."""
    table = header.tensors.get(EMBEDDING)
    if table is None or len(table.shape) != 2:
        raise UnsafeFileError(f"{EMBEDDING}: expected the matrix of token embeddings, found none")
    return table


def model_info(header: GgufHeader, special: dict[str, int], n_vision_weights: int) -> ModelInfo:
    """The facts of the language model. Raises UnsafeFileError."""
    values, architecture = header.values, str(header.values["general.architecture"])
    table = embedding_table(header)
    layers = _size(values, f"{architecture}.block_count")
    _per_layer(values, f"{architecture}.attention.head_count", layers)
    hidden, vocab = table.shape
    _same(f"{architecture}.embedding_length", _size(values, f"{architecture}.embedding_length"), EMBEDDING, hidden)
    if (stated := values.get(f"{architecture}.vocab_size")) is not None:
        _same(f"{architecture}.vocab_size", stated, EMBEDDING, vocab)
    found = {int(match[1]) for name in header.tensors if (match := re.match(r"blk\.(\d{1,6})\.", name))}
    if found != set(range(layers)):
        n = max(found, default=-1) + 1
        raise UnsafeFileError(f"{architecture}.block_count: {layers}, but the file has tensors of {n} layers")
    return ModelInfo(
        family=str(values.get("general.basename") or values.get("general.name") or architecture)[:200],
        size=str(values.get("general.size_label") or _size_label(header))[:200],
        variant=str(values.get("general.finetune") or "unknown")[:200],
        parameters=sum(tensor.n_elements for tensor in header.tensors.values()) + n_vision_weights,
        layers=layers,
        hidden=hidden,
        vocab=vocab,
        context=usable_context(_size(values, f"{architecture}.context_length", most=1 << 31)),
        kv_bytes_per_token=kv_bytes_per_token(header, layers),
        special=special,
        embedding=EmbeddingInfo(
            offset=table.offset, ggml_type=table.type_name, row_bytes=table.n_bytes // table.shape[1]
        ),
    )


def kv_bytes_per_token(header: GgufHeader, layers: int) -> int:
    """Bytes of the KV cache for one token, 16 bit each. A model whose layers share or window their cache needs less.
    Raises UnsafeFileError."""
    values, architecture = header.values, str(header.values["general.architecture"])
    prefix = f"{architecture}.attention."
    key = f"{prefix}head_count_kv"
    if values.get(key) is None:  # as many as there are heads
        key = f"{prefix}head_count"
    kv_heads = _per_layer(values, key, layers)
    n_values = 0
    for name in ("key_length", "value_length"):
        if values.get(f"{prefix}{name}") is not None:
            n_values += _size(values, f"{prefix}{name}")
        else:
            n_heads = max(1, *_per_layer(values, f"{prefix}head_count", layers))
            n_values += _size(values, f"{architecture}.embedding_length") // n_heads
    return max(1, KV_VALUE_BYTES * n_values * sum(kv_heads))


def usable_context(stated: Any) -> Any:
    """Of a model's context, as much as edge-agent counts with."""
    return min(stated, MAX_SIZE) if isinstance(stated, int) else stated


def vision_info(language: GgufHeader, mmproj: GgufHeader) -> VisionInfo:
    """The facts of an mmproj, which must belong to this language model. Raises UnsafeFileError."""
    values = mmproj.values
    name = values.get("clip.projector_type", values.get("clip.vision.projector_type"))
    if not values.get("clip.has_vision_encoder", False):
        raise UnsafeFileError("clip.has_vision_encoder: expected true; the file has no encoder of images")
    if name in M_ROPE_PROJECTORS:
        raise UnsafeFileError(f"clip.projector_type: {name}: {_M_ROPE}")
    if not isinstance(name, str) or name not in PROJECTORS:
        raise UnsafeFileError(f"clip.projector_type: expected one of {', '.join(PROJECTORS)}, found {shown(name)}")
    projector, architecture = PROJECTORS[name], language.values["general.architecture"]
    if architecture not in projector.architectures:
        expected = " or ".join(projector.architectures)
        raise UnsafeFileError(
            f"clip.projector_type: {name} is made for {expected}; the language model is {architecture}"
        )
    hidden, width = embedding_table(language).shape[0], _size(values, "clip.vision.projection_dim")
    if width != hidden:
        raise UnsafeFileError(
            f"clip.vision.projection_dim: {width} numbers for each row, but the language model takes {hidden}; the two "
            "files do not belong together"
        )
    image_size, patch = _size(values, "clip.vision.image_size"), _size(values, "clip.vision.patch_size")
    merge = projector.merge_default
    if values.get(projector.merge_key) is not None:
        merge = _size(values, projector.merge_key)
    if image_size < patch * merge or (projector.fixed and image_size % (patch * merge)):
        raise UnsafeFileError(
            f"clip.vision.image_size: expected a multiple of {patch * merge} ({patch} pixels of a patch, {merge} "
            f"patches of a row), found {image_size}"
        )
    mean, std = (_three(values, f"clip.vision.image_{kind}") for kind in ("mean", "std"))
    return VisionInfo(
        patch=patch,
        merge=merge,
        image_size=image_size,
        mean=mean,
        std=std,
        fixed=(image_size, image_size) if projector.fixed else None,
        projector=name,
        breaks=projector.breaks,
        causal=projector.causal,
    )


def bytes_by_type(header: GgufHeader) -> dict[str, int]:
    """ggml type -> bytes of the tensors of that type."""
    by_type: Counter[str] = Counter()
    for tensor in header.tensors.values():
        by_type[tensor.type_name] += tensor.n_bytes
    return dict(by_type)


def quantisation(header: GgufHeader) -> str:
    """The name of general.file_type, or the type that most bytes have."""
    file_type = header.values.get("general.file_type")
    if isinstance(file_type, int) and file_type in FILE_TYPES:
        return FILE_TYPES[file_type]
    by_type = bytes_by_type(header)
    return max(by_type, key=by_type.__getitem__)


def adds_bos(values: dict[str, object]) -> bool:
    """Whether llama.cpp begins a prompt of this vocabulary with its BOS token."""
    stated = values.get("tokenizer.ggml.add_bos_token")
    return stated if isinstance(stated, bool) else values.get("tokenizer.ggml.model") == "llama"


def _numbers(value: object) -> list[int]:
    return [each for each in value if isinstance(each, int)] if isinstance(value, list) else []


def _size(values: dict[str, object], key: str, most: int = MAX_SIZE) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise UnsafeFileError(f"{key}: expected a number from 1 to {most}, found {shown(value)}")
    return value


def _per_layer(values: dict[str, object], key: str, layers: int) -> list[int]:
    """A number for each layer; the file has one for all, or a list."""
    value = values.get(key)
    numbers = _numbers(value) if isinstance(value, list) else [_size(values, key)] * min(layers, MAX_LAYERS)
    if len(numbers) != layers or not all(0 <= number <= 1 << 16 for number in numbers):
        raise UnsafeFileError(f"{key}: expected a number for each of {layers} layers, found {str(value)[:60]}")
    return numbers


def _same(key: str, found: object, other: str, expected: int) -> None:
    if found != expected:
        raise UnsafeFileError(f"{key}: {shown(found)}, but {other} has {expected}; the file contradicts itself")


def _three(values: dict[str, object], key: str) -> tuple[float, float, float]:
    value = values.get(key)
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(each, float) for each in value):
        raise UnsafeFileError(f"{key}: expected three numbers, found {str(value)[:60]}")
    return (value[0], value[1], value[2])


def _size_label(header: GgufHeader) -> str:
    n = sum(tensor.n_elements for tensor in header.tensors.values())
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.0f}M"
