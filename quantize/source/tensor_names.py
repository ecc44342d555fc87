"""The tables of Ministral 3 and its relatives: the families, and for each tensor its shape and its name in HF
checkpoints, in consolidated checkpoints and in GGUF.

One TensorSpec per tensor; `{n}` is the layer. Shapes use the words of Checkpoint.dims, so that an entry reads like the
model card. Nothing here opens a file.

Rotary order: HF stores each head's halves one after the other, llama.cpp expects pairs side by side. Tensors with
`rope` are permuted from the HF layout. Consolidated checkpoints have llama.cpp's order already.
"""

from __future__ import annotations

from typing import NamedTuple


class Yarn(NamedTuple):
    """YaRN (Peng et al. 2023): rotary positions beyond the context of the first training, and the scaling of queries
    by position."""

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    mscale_all_dim: float
    scaling_beta: float  # llama_4_scaling


class Family(NamedTuple):
    """Models of one architecture."""

    name: str  # text_config.model_type, and `family` in the manifest
    gguf: str  # architecture
    yarn: Yarn | None
    sizes: dict[tuple[int, int], str]  # (hidden, layers) -> the released size


FAMILIES = (
    Family(
        "ministral3",
        "mistral3",
        Yarn(16.0, 16384, 32.0, 1.0, 1.0, 0.1),
        {(3072, 26): "3B", (4096, 34): "8B", (5120, 40): "14B"},
    ),
    Family("mistral", "llama", None, {(5120, 40): "24B"}),  # Mistral Small 3, Magistral Small
)


class TensorSpec(NamedTuple):
    """One tensor that a checkpoint must hold."""

    hf: str  # name in an HF checkpoint, after `canonical`
    consolidated: str  # name in a consolidated checkpoint
    gguf: str
    shape: tuple[str, ...]  # words of Checkpoint.dims, outermost first
    rope: str = ""  # word of Checkpoint.dims for the number of heads, of tensors in rotary order


TEXT = (
    TensorSpec("text.embed_tokens.weight", "tok_embeddings.weight", "token_embd.weight", ("vocab", "hidden")),
    TensorSpec("text.norm.weight", "norm.weight", "output_norm.weight", ("hidden",)),
)
HEAD = TensorSpec(
    "lm_head.weight", "output.weight", "output.weight", ("vocab", "hidden")
)  # absent when embeddings are tied
_L, _C, _G = "text.layers.{n}.", "layers.{n}.", "blk.{n}."
TEXT_LAYER = (
    TensorSpec(_L + "input_layernorm.weight", _C + "attention_norm.weight", _G + "attn_norm.weight", ("hidden",)),
    TensorSpec(
        _L + "self_attn.q_proj.weight", _C + "attention.wq.weight", _G + "attn_q.weight", ("q", "hidden"), "heads"
    ),
    TensorSpec(
        _L + "self_attn.k_proj.weight", _C + "attention.wk.weight", _G + "attn_k.weight", ("kv", "hidden"), "kv_heads"
    ),
    TensorSpec(_L + "self_attn.v_proj.weight", _C + "attention.wv.weight", _G + "attn_v.weight", ("kv", "hidden")),
    TensorSpec(_L + "self_attn.o_proj.weight", _C + "attention.wo.weight", _G + "attn_output.weight", ("hidden", "q")),
    TensorSpec(_L + "post_attention_layernorm.weight", _C + "ffn_norm.weight", _G + "ffn_norm.weight", ("hidden",)),
    TensorSpec(_L + "mlp.gate_proj.weight", _C + "feed_forward.w1.weight", _G + "ffn_gate.weight", ("ffn", "hidden")),
    TensorSpec(_L + "mlp.up_proj.weight", _C + "feed_forward.w3.weight", _G + "ffn_up.weight", ("ffn", "hidden")),
    TensorSpec(_L + "mlp.down_proj.weight", _C + "feed_forward.w2.weight", _G + "ffn_down.weight", ("hidden", "ffn")),
)

VISION = (
    TensorSpec(
        "vision.patch_conv.weight",
        "vision_encoder.patch_conv.weight",
        "v.patch_embd.weight",
        ("v_hidden", "channels", "patch", "patch"),
    ),
    TensorSpec("vision.ln_pre.weight", "vision_encoder.ln_pre.weight", "v.pre_ln.weight", ("v_hidden",)),
    TensorSpec("projector.norm.weight", "pre_mm_projector_norm.weight", "mm.input_norm.weight", ("v_hidden",)),
    TensorSpec(
        "projector.patch_merger.merging_layer.weight",
        "patch_merger.merging_layer.weight",
        "mm.patch_merger.weight",
        ("v_hidden", "merged"),
    ),
    TensorSpec(
        "projector.linear_1.weight", "vision_language_adapter.w_in.weight", "mm.1.weight", ("hidden", "v_hidden")
    ),
    TensorSpec(
        "projector.linear_2.weight", "vision_language_adapter.w_out.weight", "mm.2.weight", ("hidden", "hidden")
    ),
)
_L, _C, _G = "vision.transformer.layers.{n}.", "vision_encoder.transformer.layers.{n}.", "v.blk.{n}."
VISION_LAYER = (
    TensorSpec(_L + "attention_norm.weight", _C + "attention_norm.weight", _G + "ln1.weight", ("v_hidden",)),
    TensorSpec(
        _L + "attention.q_proj.weight",
        _C + "attention.wq.weight",
        _G + "attn_q.weight",
        ("v_hidden", "v_hidden"),
        "v_heads",
    ),
    TensorSpec(
        _L + "attention.k_proj.weight",
        _C + "attention.wk.weight",
        _G + "attn_k.weight",
        ("v_hidden", "v_hidden"),
        "v_heads",
    ),
    TensorSpec(
        _L + "attention.v_proj.weight", _C + "attention.wv.weight", _G + "attn_v.weight", ("v_hidden", "v_hidden")
    ),
    TensorSpec(
        _L + "attention.o_proj.weight", _C + "attention.wo.weight", _G + "attn_out.weight", ("v_hidden", "v_hidden")
    ),
    TensorSpec(_L + "ffn_norm.weight", _C + "ffn_norm.weight", _G + "ln2.weight", ("v_hidden",)),
    TensorSpec(
        _L + "feed_forward.gate_proj.weight",
        _C + "feed_forward.w1.weight",
        _G + "ffn_gate.weight",
        ("v_ffn", "v_hidden"),
    ),
    TensorSpec(
        _L + "feed_forward.up_proj.weight", _C + "feed_forward.w3.weight", _G + "ffn_up.weight", ("v_ffn", "v_hidden")
    ),
    TensorSpec(
        _L + "feed_forward.down_proj.weight",
        _C + "feed_forward.w2.weight",
        _G + "ffn_down.weight",
        ("v_hidden", "v_ffn"),
    ),
)

# HF checkpoints have three names for the same module, by the transformers release that saved them; longest first.
_PREFIXES = (
    ("model.language_model.", "text."),
    ("language_model.model.", "text."),
    ("language_model.lm_head.", "lm_head."),
    ("model.lm_head.", "lm_head."),
    ("model.vision_tower.", "vision."),
    ("vision_tower.", "vision."),
    ("model.multi_modal_projector.", "projector."),
    ("multi_modal_projector.", "projector."),
    ("model.", "text."),  # a text-only model
)

# Tensors of a checkpoint that GGUF and ONNX files do not need, and why.
IGNORED = (
    (".activation_scale", "static FP8 activation scale: 4-bit kernels quantise activations themselves"),
    (".qscale_act", "static FP8 activation scale: 4-bit kernels quantise activations themselves"),
    (".rotary_emb.inv_freq", "rotary frequencies: computed from the configuration"),
)
SCALE = "_scale_inv"  # X.weight + X.weight_scale_inv: per-tensor FP8
CONSOLIDATED_SCALE = "qscale_weight"  # the same in a consolidated checkpoint: X.weight + X.qscale_weight


def canonical(name: str) -> str:
    """A name of any transformers release -> the name in the tables above."""
    for prefix, ours in _PREFIXES:
        if name.startswith(prefix):
            return ours + name[len(prefix) :]
    return name


def consolidated(names: list[TensorSpec]) -> dict[str, str]:
    """Name in a consolidated checkpoint -> the HF name in the tables above, scales of FP8 tensors included."""
    table = {spec.consolidated: spec.hf for spec in names}
    scales = {name.removesuffix("weight") + CONSOLIDATED_SCALE: ours + SCALE for name, ours in table.items()}
    return table | scales


def tensor_specs(layers: int, vision_layers: int | None, tied: bool) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Every tensor of a model in file order: (text model, vision encoder). `{n}` is replaced by the layer.

    vision_layers: None for a text-only model.
    """

    def in_layer(spec: TensorSpec, n: int) -> TensorSpec:
        names = {key: getattr(spec, key).format(n=n) for key in ("hf", "consolidated", "gguf")}
        return spec._replace(**names)

    text = [*TEXT, *([] if tied else [HEAD]), *(in_layer(spec, n) for n in range(layers) for spec in TEXT_LAYER)]
    if vision_layers is None:
        return text, []
    return text, [*VISION, *(in_layer(spec, n) for n in range(vision_layers) for spec in VISION_LAYER)]
