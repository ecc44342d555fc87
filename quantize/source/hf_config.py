"""What a checkpoint says of itself: config.json (HF layout) or params.json (consolidated) -> Text, Vision, Family.

Nothing is taken on trust that the formats written later have no place for: another activation, a bias, rotary values
that are not the family's. Tensors are not looked at here. Raises CheckpointError.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.errors import UserError
from quantize.source.tensor_names import FAMILIES, Family, Yarn

MAX_COUNT = 1 << 20  # of anything in a configuration: layers are written out one by one
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # RGB; what the family was trained with
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
TEXT_ONLY = ("MistralForCausalLM", "Ministral3ForCausalLM")  # HF's names of models without a vision tower
WITH_VISION = "Mistral3ForConditionalGeneration"


class CheckpointError(UserError):
    """One line: file, key, expected, found, what to do."""


class TextConfig(msgspec.Struct, frozen=True):
    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rms_eps: float
    tied: bool
    rope_theta: float
    yarn: Yarn | None


class VisionTowerConfig(msgspec.Struct, frozen=True):
    hidden: int
    layers: int
    ffn: int
    heads: int
    channels: int
    patch: int
    merge: int
    image_size: int
    rope_theta: float
    eps: float  # of the norms inside the tower: fixed at 1e-5 by the architecture
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class CheckpointConfig(msgspec.Struct, frozen=True):
    path: Path  # config.json or params.json
    family: Family
    text: TextConfig
    vision: VisionTowerConfig | None  # None: a text-only model
    fp8: bool  # said to be


def read_table(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: damaged: expected a JSON object, found a {type(value).__name__}")
    return value


# -- HF: config.json ---------------------------------------------------------------------------------------------------


def read_hf(path: Path, has_head: bool) -> CheckpointConfig:
    """has_head: whether the files hold an output head."""
    config = read_table(path)
    found = config.get("architectures") or [config.get("model_type", "none")]
    if found[0] == WITH_VISION:
        text, where = config.get("text_config") or {}, f"{path}: text_config"
        if not isinstance(text, dict):
            raise CheckpointError(f"{where}: expected a table, found {text!r}")
    elif found[0] in TEXT_ONLY:
        text, where = config, str(path)
    else:
        raise CheckpointError(
            f"{path}: architectures: expected {WITH_VISION} or {' or '.join(TEXT_ONLY)}, found {found[0]}; this tool "
            "converts Ministral 3 and Mistral Small checkpoints"
        )
    family = next((family for family in FAMILIES if family.name == text.get("model_type")), None)
    if family is None:
        known = " or ".join(family.name for family in FAMILIES)
        raise CheckpointError(f"{where}: model_type: expected {known}, found {text.get('model_type')!r}")
    return CheckpointConfig(
        path=path,
        family=family,
        text=_hf_text(text, where, family, _tied(config, text, has_head)),
        vision=_hf_vision(config, path) if text is not config else None,
        fp8=_hf_fp8(config, path),
    )


def _tied(config: dict[str, Any], text: dict[str, Any], has_head: bool) -> bool:
    """Whether the output head is the embedding table. Releases wrote the key outside, inside or nowhere, and an outer
    `true` may be a default nobody set: a head that is there while the inner key says untied is meant."""
    outer, inner = config.get("tie_word_embeddings"), text.get("tie_word_embeddings")
    if inner is False and has_head:
        return False
    said = outer if outer is not None else inner
    return not has_head if said is None else bool(said)


def _hf_text(t: dict[str, Any], where: str, family: Family, tied: bool) -> TextConfig:
    if t.get("sliding_window"):
        raise CheckpointError(f"{where}: sliding_window: expected null, found {t['sliding_window']}; not of the family")
    if t.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: hidden_act: expected 'silu', found {t['hidden_act']!r}")
    hidden, heads = require(t, "hidden_size", int, where), require(t, "num_attention_heads", int, where)
    context = require(t, "max_position_embeddings", int, where)
    rope = t.get("rope_parameters") or t.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where}: rope_parameters: expected a table, found {rope!r}")
    r = f"{where}.rope_parameters"
    yarn = None
    kind = rope.get("rope_type", rope.get("type", "default"))
    if family.yarn is None and kind != "default":
        raise CheckpointError(f"{r}.rope_type: expected none, found {kind!r}; {family.name} has plain rotary positions")
    if family.yarn is not None:
        if not rope:
            raise CheckpointError(f"{where}: rope_parameters: missing; expected the YaRN values of {family.name}")
        if kind != "yarn":
            raise CheckpointError(f"{r}.rope_type: expected 'yarn', found {kind!r}")
        mscale, mscale_all = require(rope, "mscale", float, r, 1.0), require(rope, "mscale_all_dim", float, r, 1.0)
        if mscale != mscale_all:  # then attention is rescaled, which the GGUF architecture has no key for
            raise CheckpointError(f"{r}: mscale: expected the value of mscale_all_dim ({mscale_all}), found {mscale}")
        yarn = Yarn(
            factor=require(rope, "factor", float, r),
            original_context=require(rope, "original_max_position_embeddings", int, r),
            beta_fast=require(rope, "beta_fast", float, r, 32.0),
            beta_slow=require(rope, "beta_slow", float, r, 1.0),
            mscale_all_dim=mscale_all,
            scaling_beta=require(rope, "llama_4_scaling_beta", float, r),
        )
        spelled = {"original_context": "original_max_position_embeddings", "scaling_beta": "llama_4_scaling_beta"}
        _check_yarn(yarn, family, context, spelled, r)
    return TextConfig(
        hidden=hidden,
        layers=require(t, "num_hidden_layers", int, where),
        ffn=require(t, "intermediate_size", int, where),
        heads=heads,
        kv_heads=require(t, "num_key_value_heads", int, where),
        head_dim=require(t, "head_dim", int, where, hidden // heads),
        vocab=require(t, "vocab_size", int, where),
        context=context,
        rms_eps=require(t, "rms_norm_eps", float, where),
        tied=tied,
        rope_theta=require(rope, "rope_theta", float, r, t.get("rope_theta")),
        yarn=yarn,
    )


def _hf_vision(config: dict[str, Any], path: Path) -> VisionTowerConfig:
    where, v = f"{path}: vision_config", config.get("vision_config")
    if not isinstance(v, dict):
        raise CheckpointError(f"{where}: missing; expected the pixtral encoder's values")
    for key, table, expected in (
        ("hidden_act", v, "silu"),
        ("projector_hidden_act", config, "gelu"),
        ("vision_feature_layer", config, -1),
        ("multimodal_projector_bias", config, False),
    ):
        _require_value(table, key, expected, str(path))
    rope = v.get("rope_parameters") or {}
    processor = _processor(path.parent)
    return VisionTowerConfig(
        **_tower(v, where),
        merge=require(config, "spatial_merge_size", int, str(path), 2),
        rope_theta=require(rope, "rope_theta", float, where, v.get("rope_theta", 10000.0)),
        mean=_pixel(processor, "image_mean", PIXEL_MEAN, path.parent),
        std=_pixel(processor, "image_std", PIXEL_STD, path.parent),
    )


def _hf_fp8(config: dict[str, Any], path: Path) -> bool:
    quantisation, where = config.get("quantization_config"), f"{path}: quantization_config"
    if quantisation is None:
        return False
    if not isinstance(quantisation, dict):
        raise CheckpointError(f"{where}: expected a table, found {quantisation!r}")
    method, block = quantisation.get("quant_method"), quantisation.get("weight_block_size")
    if method != "fp8" or block is not None:
        raise CheckpointError(
            f"{where}: expected quant_method 'fp8' with weight_block_size null (as released), found {method!r} with "
            f"{block!r}; start from the BF16 checkpoint"
        )
    return True


def _processor(folder: Path) -> dict[str, Any]:
    """Pixel mean and deviation: the newer file wins; without any, the family's values stand."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            values = read_table(folder / name)
            values = values.get("image_processor", values)
            if isinstance(values, dict) and "image_mean" in values:
                return values
    return {}


def _pixel(processor: dict[str, Any], key: str, default: tuple[float, ...], folder: Path) -> tuple[float, float, float]:
    value = processor.get(key, default)
    if not isinstance(value, list | tuple) or [type(n) in (int, float) for n in value] != [True] * 3:
        raise CheckpointError(f"{folder}: processor_config.json: {key}: expected three numbers, found {value!r}")
    if key == "image_std" and min(value) <= 0:
        raise CheckpointError(f"{folder}: processor_config.json: {key}: expected numbers above 0, found {value!r}")
    return tuple(map(float, value))


# -- consolidated: params.json -----------------------------------------------------------------------------------------


def read_consolidated(path: Path, has_head: bool) -> CheckpointConfig:
    """The family is known by its YaRN values: the layout has no name for it."""
    p, where = read_table(path), str(path)
    if p.get("moe") is not None:
        raise CheckpointError(f"{where}: moe: expected none, found {p['moe']!r}; not of the family")
    _require_value(p, "sliding_window", None, where)
    y, scaling = p.get("yarn"), p.get("llama_4_scaling")
    family = next(family for family in FAMILIES if (family.yarn is not None) == (y is not None))
    yarn = _params_yarn(y, scaling, where) if y is not None else None
    context = p.get("max_position_embeddings") or p.get("max_seq_len")
    if yarn is not None:
        context = require({"max_position_embeddings": context}, "max_position_embeddings", int, where,
                      round(yarn.factor * yarn.original_context))  # fmt: skip
        spelled = {
            "original_context": "original_max_position_embeddings",
            "beta_fast": "beta",
            "beta_slow": "alpha",
            "mscale_all_dim": "apply_scale, which makes mscale_all_dim",
            "scaling_beta": "llama_4_scaling.beta",
        }
        _check_yarn(yarn, family, context, spelled, f"{where}: yarn")
    hidden, heads = require(p, "dim", int, where), require(p, "n_heads", int, where)
    text = TextConfig(
        hidden=hidden,
        layers=require(p, "n_layers", int, where),
        ffn=require(p, "hidden_dim", int, where),
        heads=heads,
        kv_heads=require(p, "n_kv_heads", int, where, heads),
        head_dim=require(p, "head_dim", int, where, hidden // heads),
        vocab=require(p, "vocab_size", int, where),
        context=require({"max_position_embeddings": context}, "max_position_embeddings", int, where, 32768),
        rms_eps=require(p, "norm_eps", float, where),
        tied=bool(p.get("tied_embeddings", not has_head)),
        rope_theta=require(p, "rope_theta", float, where),
        yarn=yarn,
    )
    vision = _params_vision(p["vision_encoder"], f"{where}: vision_encoder") if p.get("vision_encoder") else None
    return CheckpointConfig(path=path, family=family, text=text, vision=vision, fp8=_params_fp8(p, where))


def _params_yarn(y: object, scaling: object, where: str) -> Yarn:
    for key, table in (("yarn", y), ("llama_4_scaling", scaling)):
        if not isinstance(table, dict):
            raise CheckpointError(f"{where}: {key}: expected a table, found {table!r}")
    at = f"{where}: yarn"
    return Yarn(
        factor=require(y, "factor", float, at),
        original_context=require(y, "original_max_position_embeddings", int, at),
        beta_fast=require(y, "beta", float, at),
        beta_slow=require(y, "alpha", float, at),
        mscale_all_dim=0.0 if y.get("apply_scale", False) else 1.0,  # as llama.cpp's own converter reads it
        scaling_beta=require(scaling, "beta", float, f"{where}: llama_4_scaling"),
    )


def _params_vision(v: object, where: str) -> VisionTowerConfig:
    if not isinstance(v, dict):
        raise CheckpointError(f"{where}: expected a table, found {v!r}")
    _require_value(v, "adapter_bias", False, where)
    _require_value(v, "mm_projector_id", "patch_merge", where)
    _require_value(v, "add_pre_mm_projector_layer_norm", True, where)
    return VisionTowerConfig(
        **_tower(v, where),
        merge=require(v, "spatial_merge_size", int, where, 2),
        rope_theta=require(v, "rope_theta", float, where, 10000.0),
        mean=PIXEL_MEAN,
        std=PIXEL_STD,
    )


def _params_fp8(p: dict[str, Any], where: str) -> bool:
    quantisation = p.get("quantization")
    if quantisation is None:
        return False
    if not isinstance(quantisation, dict) or quantisation.get("qformat_weight") != "fp8_e4m3":
        raise CheckpointError(
            f"{where}: quantization: expected qformat_weight 'fp8_e4m3' (as released), found {quantisation!r}; start "
            "from the BF16 checkpoint"
        )
    return True


# -- both --------------------------------------------------------------------------------------------------------------


def require(table: dict[str, Any], key: str, kind: type, where: str, default: Any = None) -> Any:
    """A number above 0 or another value of this kind. Raises CheckpointError."""
    value = table.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"{where}: {key}: missing; expected {kind.__name__}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise CheckpointError(f"{where}: {key}: expected {kind.__name__}, found {value!r}")
    if kind is int and value > MAX_COUNT:
        raise CheckpointError(f"{where}: {key}: expected at most {MAX_COUNT}, found {value}")
    if kind in (int, float) and not (0 < value < math.inf):
        raise CheckpointError(f"{where}: {key}: expected a number above 0, found {value:g}")
    return value


def _require_value(table: dict[str, Any], key: str, expected: object, where: str) -> None:
    if table.get(key, expected) != expected:
        raise CheckpointError(f"{where}: {key}: expected {expected!r}, found {table[key]!r}")


def _tower(v: dict[str, Any], where: str) -> dict[str, Any]:
    """What both layouts say of the vision tower, in the same words."""
    hidden, heads = require(v, "hidden_size", int, where), require(v, "num_attention_heads", int, where)
    if hidden % (4 * heads):
        raise CheckpointError(f"{where}: hidden_size: expected a multiple of 4 x {heads} heads, found {hidden}")
    return {
        "hidden": hidden,
        "layers": require(v, "num_hidden_layers", int, where),
        "ffn": require(v, "intermediate_size", int, where),
        "heads": heads,
        "channels": require(v, "num_channels", int, where, 3),
        "patch": require(v, "patch_size", int, where),
        "image_size": require(v, "image_size", int, where),
        "eps": 1e-5,
    }


def _check_yarn(found: Yarn, family: Family, context: int, spelled: dict[str, str], where: str) -> None:
    """The values are the family's, but for the contexts: these may be shorter, in the family's proportion."""
    for field in Yarn._fields:
        key, value, expected = spelled.get(field, field), getattr(found, field), getattr(family.yarn, field)
        if field == "original_context":
            value, expected = round(value * found.factor), context
            if value != expected:
                raise CheckpointError(
                    f"{where}: {key}: {found.original_context} x factor {found.factor:g} make {value}, but the context "
                    f"is {context}; the configuration was changed, take the released one"
                )
        elif value != expected:
            raise CheckpointError(
                f"{where}: {key}: expected {expected:g} as every {family.name} release has it, found {value:g}; the "
                "configuration was changed, take the released one"
            )
