"""A checkpoint's configuration: config.json (HF layout) or params.json (consolidated) -> CheckpointConfig.

Values for which GGUF and ONNX files have no place are refused: another activation, a bias, rotary values that are not
the family's. No tensor is read here. Raises CheckpointError.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.bundle.recognise import describe
from edge_agent.errors import UserError
from quantize.source import known_keys
from quantize.source.tensor_names import FAMILIES, Family, Yarn

MAX_COUNT = 1 << 20  # of anything in a configuration, because layers are written out one by one
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # RGB; the family's training values
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
TEXT_ONLY = ("MistralForCausalLM", "Ministral3ForCausalLM")  # HF's names of models without a vision tower
WITH_VISION = "Mistral3ForConditionalGeneration"


class CheckpointError(UserError):
    """One line: file, key, expected, found, what to do."""


class TextConfig(msgspec.Struct, frozen=True):
    """The language model."""

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
    """The vision encoder."""

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
    """A checked configuration."""

    path: Path  # config.json or params.json
    family: Family
    text: TextConfig
    vision: VisionTowerConfig | None  # None: a text-only model
    fp8: bool  # the configuration announces FP8 tensors


def read_table(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        what = describe(path) or f"not readable as JSON: {error}"
        raise CheckpointError(f"{path}: {what}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: damaged: expected a JSON object, found a {type(value).__name__}")
    return value


# -- HF: config.json ---------------------------------------------------------------------------------------------------


def read_hf(path: Path, has_head: bool) -> CheckpointConfig:
    """has_head: whether the files hold an output head."""
    config = read_table(path)
    architecture = (config.get("architectures") or [config.get("model_type", "none")])[0]
    if architecture == WITH_VISION:
        text, where = config.get("text_config") or {}, f"{path}: text_config"
        if not isinstance(text, dict):
            raise CheckpointError(f"{where}: expected a table, found {text!r}")
    elif architecture in TEXT_ONLY:
        text, where = config, str(path)
    else:
        raise CheckpointError(
            f"{path}: architectures: expected {WITH_VISION} or {' or '.join(TEXT_ONLY)}, found {architecture}; this "
            "tool converts Ministral 3 and Mistral Small checkpoints"
        )
    _refuse_unknown(config, str(path), known_keys.OUTER if text is not config else known_keys.TEXT)
    if text is not config:
        _refuse_unknown(text, where, known_keys.TEXT)
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
    """Whether the output head is the embedding table.

    Releases have the key in the outer table, in text_config, or not at all. An outer `true` can be a default that was
    never set: if the files hold a head and the inner key is false, the inner key is right.
    """
    outer, inner = config.get("tie_word_embeddings"), text.get("tie_word_embeddings")
    if inner is False and has_head:
        return False
    value = outer if outer is not None else inner
    return not has_head if value is None else bool(value)


def _hf_text(t: dict[str, Any], where: str, family: Family, tied: bool) -> TextConfig:
    if t.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: hidden_act: expected 'silu', found {t['hidden_act']!r}")
    if set(t.get("layer_types") or ()) - {"full_attention"}:
        raise CheckpointError(f"{where}: layer_types: expected full_attention everywhere, found {t['layer_types']!r}")
    hidden, heads = require(t, "hidden_size", int, where), require(t, "num_attention_heads", int, where)
    context = require(t, "max_position_embeddings", int, where)
    _check_window(t.get("sliding_window"), context, where)
    rope = _rope(t, where)
    r = f"{where}.rope_parameters"
    yarn = None
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("type", kind) != kind:
        raise CheckpointError(f"{r}: type: expected {kind!r} as rope_type, found {rope['type']!r}")
    if family.yarn is None and kind != "default":
        raise CheckpointError(f"{r}.rope_type: expected none, found {kind!r}; {family.name} has plain rotary positions")
    _refuse_unknown(rope, r, known_keys.ROPE)
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


def _rope(t: dict[str, Any], where: str) -> dict[str, Any]:
    """The rotary values, from the newer of two keys. Raises CheckpointError where the two differ."""
    newer, older = t.get("rope_parameters") or {}, t.get("rope_scaling") or {}
    for key, table in (("rope_parameters", newer), ("rope_scaling", older)):
        if not isinstance(table, dict):
            raise CheckpointError(f"{where}: {key}: expected a table, found {table!r}")
    both = {"rope_theta": t["rope_theta"]} | older if t.get("rope_theta") else older
    for key, value in both.items():
        if newer.get(key, value) != value:
            raise CheckpointError(
                f"{where}: {key}: rope_parameters says {newer[key]!r}, an older key {value!r}; remove the wrong one"
            )
    return newer or older


def _check_window(window: object, context: int, where: str) -> None:
    """A window that is at least as long as the context has no effect."""
    if window and not (type(window) is int and window >= context):
        raise CheckpointError(
            f"{where}: sliding_window: expected null, or a window of the whole context ({context}), found {window!r}"
        )


def _hf_vision(config: dict[str, Any], path: Path) -> VisionTowerConfig:
    where, v = f"{path}: vision_config", config.get("vision_config")
    if not isinstance(v, dict):
        raise CheckpointError(f"{where}: missing; expected the pixtral encoder's values")
    _refuse_unknown(v, where, known_keys.VISION)
    for key, table, expected in (
        ("hidden_act", v, "silu"),
        ("projector_hidden_act", config, "gelu"),
        ("vision_feature_layer", config, -1),
        ("multimodal_projector_bias", config, False),
    ):
        _require_value(table, key, expected, str(path))
    rope = _rope(v, where)
    _refuse_unknown(rope, f"{where}.rope_parameters", known_keys.ROPE)
    if (kind := rope.get("rope_type") or rope.get("type") or "default") != "default":
        raise CheckpointError(f"{where}.rope_parameters.rope_type: expected 'default', found {kind!r}")
    processor = _processor(path.parent)
    return VisionTowerConfig(
        **_tower(v, where),
        merge=require(config, "spatial_merge_size", int, str(path), 2),
        rope_theta=require(rope, "rope_theta", float, where, v.get("rope_theta", 10000.0)),
        mean=_pixel(processor, "image_mean", PIXEL_MEAN, path.parent),
        std=_pixel(processor, "image_std", PIXEL_STD, path.parent),
    )


def refuse_quantised(path: Path) -> None:
    """Before the tensors are read: those of a quantised checkpoint have types and names that say less."""
    if path.name == "config.json":
        config = read_table(path)
        if config.get("quantization"):
            raise CheckpointError(f"{path}: quantization: quantised already, by MLX; start from the BF16 checkpoint")
        _hf_fp8(config, path)


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
            f"{block!r}: quantised already; start from the BF16 checkpoint"
        )
    return True


def _processor(folder: Path) -> dict[str, Any]:
    """Pixel mean and deviation: from the newer of two file names, or {} for the family's values."""
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
    red, green, blue = map(float, value)
    return red, green, blue


# -- consolidated: params.json -----------------------------------------------------------------------------------------


def read_consolidated(path: Path, has_head: bool) -> CheckpointConfig:
    """The layout does not name the family; whether it has YaRN values tells which one it is.

    has_head: whether the files hold an output head.
    """
    p, where = read_table(path), str(path)
    _refuse_unknown(p, where, known_keys.PARAMS)
    if p.get("moe") is not None:
        raise CheckpointError(f"{where}: moe: expected none, found {p['moe']!r}; not of the family")
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
    context = require({"max_position_embeddings": context}, "max_position_embeddings", int, where, 32768)
    _check_window(p.get("sliding_window"), context, where)
    hidden, heads = require(p, "dim", int, where), require(p, "n_heads", int, where)
    text = TextConfig(
        hidden=hidden,
        layers=require(p, "n_layers", int, where),
        ffn=require(p, "hidden_dim", int, where),
        heads=heads,
        kv_heads=require(p, "n_kv_heads", int, where, heads),
        head_dim=require(p, "head_dim", int, where, hidden // heads),
        vocab=require(p, "vocab_size", int, where),
        context=context,
        rms_eps=require(p, "norm_eps", float, where),
        tied=bool(p.get("tied_embeddings", not has_head)),
        rope_theta=require(p, "rope_theta", float, where),
        yarn=yarn,
    )
    vision = _params_vision(p["vision_encoder"], f"{where}: vision_encoder") if p.get("vision_encoder") else None
    return CheckpointConfig(path=path, family=family, text=text, vision=vision, fp8=_params_fp8(p, where))


def _params_yarn(y: object, scaling: object, where: str) -> Yarn:
    if not isinstance(y, dict):
        raise CheckpointError(f"{where}: yarn: expected a table, found {y!r}")
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{where}: llama_4_scaling: expected a table, found {scaling!r}")
    at = f"{where}: yarn"
    _refuse_unknown(y, at, known_keys.PARAMS_YARN)
    _refuse_unknown(scaling, f"{where}: llama_4_scaling", known_keys.PARAMS_SCALING)
    _require_value(
        scaling,
        "original_max_position_embeddings",
        y.get("original_max_position_embeddings"),
        f"{where}: llama_4_scaling",
    )
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
    _refuse_unknown(v, where, known_keys.PARAMS_VISION)
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


def require(table: dict[str, Any], key: str, kind: type[Any], where: str, default: Any = None) -> Any:
    """The value of a key: a finite number above 0, or a value of another kind. Raises CheckpointError."""
    value: Any = table.get(key)
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
    """The values of the vision tower that have the same keys in both layouts."""
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
    """The values are the family's, but for the contexts. The model's context may be shorter than YaRN's: no number
    depends on it."""
    longest = round(found.original_context * found.factor)
    for field in Yarn._fields:
        key, value, expected = spelled.get(field, field), getattr(found, field), getattr(family.yarn, field)
        if field == "original_context":
            if context > longest:
                raise CheckpointError(
                    f"{where}: {key}: {found.original_context} x factor {found.factor:g} make {longest}, but the "
                    f"context is {context}; the configuration was changed, take the released one"
                )
        elif value != expected:
            raise CheckpointError(
                f"{where}: {key}: expected {expected:g} as every {family.name} release has it, found {value:g}; the "
                "configuration was changed, take the released one"
            )


def _refuse_unknown(table: dict[str, Any], where: str, known: frozenset[str]) -> None:
    if key := known_keys.unknown_key(table, known, known_keys.WRITTEN_BY_TRANSFORMERS):
        raise CheckpointError(
            f"{where}: {key}: unknown, and set to {str(table[key])[:60]!r}: it may change the model; if it does not, "
            "remove the key"
        )
