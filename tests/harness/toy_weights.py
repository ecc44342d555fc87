"""The tensors of a toy checkpoint: names, shapes, seeded random numbers, safetensors files."""

import functools
import json
import math
import zlib

import numpy as np

from tests.harness.toy_config import write_json
from tests.harness.toy_layout import (
    EMBEDDING_STD,
    F8_MAX,
    GELU_RMS,
    MERGE,
    N_SPECIAL,
    PATCH_PX,
    QK_GAIN,
    ROW_SPREAD,
    SPECIAL_NAMES,
    UNUSED_ROW,
)
from tests.harness.toy_numbers import bf16_bits, quantise_e4m3


def normal(seed, name, shape, std):
    """float32 normal numbers that depend on nothing but these arguments."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return generator.standard_normal(shape, dtype=np.float32) * np.float32(std)


def _norm(seed, name, shape):
    """An RMSNorm weight: around one, never exactly one, or a reader that forgets it would pass."""
    return 1 + normal(seed, name, shape, 0.1)


def _linear(gain=1.0):
    return lambda seed, name, shape: normal(seed, name, shape, gain / math.sqrt(math.prod(shape[1:])))


def _embedding(seed, name, shape):
    rows = normal(seed, name, shape, EMBEDDING_STD)
    lengths = np.exp(normal(seed, name + ":length", shape[0], ROW_SPREAD))
    lengths[:N_SPECIAL] = UNUSED_ROW
    lengths[list(SPECIAL_NAMES)] = 1
    return rows * lengths[:, None]


def tensors(s):
    """[(name without prefix, shape, how to make it, whether fp8 checkpoints store it as fp8)], in file order."""
    hidden, ffn = s["hidden"], s["ffn"]
    q_rows, kv_rows = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    vision, vision_ffn = s["vision_hidden"], s["vision_ffn"]

    text = "language_model.model."
    tensors = [(text + "embed_tokens.weight", (s["vocab"], hidden), _embedding, False)]
    for n in range(s["layers"]):
        layer = f"{text}layers.{n}."
        tensors += [
            (layer + "input_layernorm.weight", (hidden,), _norm, False),
            (layer + "self_attn.q_proj.weight", (q_rows, hidden), _linear(QK_GAIN), True),
            (layer + "self_attn.k_proj.weight", (kv_rows, hidden), _linear(QK_GAIN), True),
            (layer + "self_attn.v_proj.weight", (kv_rows, hidden), _linear(), True),
            (layer + "self_attn.o_proj.weight", (hidden, q_rows), _linear(), True),
            (layer + "post_attention_layernorm.weight", (hidden,), _norm, False),
            (layer + "mlp.gate_proj.weight", (ffn, hidden), _linear(), True),
            (layer + "mlp.up_proj.weight", (ffn, hidden), _linear(), True),
            (layer + "mlp.down_proj.weight", (hidden, ffn), _linear(), True),
        ]
    tensors += [(text + "norm.weight", (hidden,), _norm, False)]
    if not s["tied"]:
        tensors += [("language_model.lm_head.weight", (s["vocab"], hidden), _embedding, False)]
    if not s["vision"]:
        return tensors

    tensors += [
        ("vision_tower.patch_conv.weight", (vision, 3, PATCH_PX, PATCH_PX), _linear(), False),
        ("vision_tower.ln_pre.weight", (vision,), _norm, False),
    ]
    for n in range(s["vision_layers"]):
        layer = f"vision_tower.transformer.layers.{n}."
        tensors += [
            (layer + "attention_norm.weight", (vision,), _norm, False),
            (layer + "attention.q_proj.weight", (vision, vision), _linear(QK_GAIN), False),
            (layer + "attention.k_proj.weight", (vision, vision), _linear(QK_GAIN), False),
            (layer + "attention.v_proj.weight", (vision, vision), _linear(), False),
            (layer + "attention.o_proj.weight", (vision, vision), _linear(), False),
            (layer + "ffn_norm.weight", (vision,), _norm, False),
            (layer + "feed_forward.gate_proj.weight", (vision_ffn, vision), _linear(), False),
            (layer + "feed_forward.up_proj.weight", (vision_ffn, vision), _linear(), False),
            (layer + "feed_forward.down_proj.weight", (vision, vision_ffn), _linear(), False),
        ]
    projector = "multi_modal_projector."
    return [
        *tensors,
        (projector + "norm.weight", (vision,), _norm, False),
        (projector + "patch_merger.merging_layer.weight", (vision, vision * MERGE**2), _linear(), False),
        (projector + "linear_1.weight", (hidden, vision), _linear(), False),
        (projector + "linear_2.weight", (hidden, hidden), _linear(EMBEDDING_STD / GELU_RMS), False),
    ]


def _name_on_disk(name, prefix):
    """The newer form is transformers' own module tree: the model under `model.`, the head beside it."""
    if prefix == "":
        return name
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    if prefix == "text":  # a text-only model
        return name.removeprefix("language_model.")
    return prefix + name.replace("language_model.model.", "language_model.", 1)


CONSOLIDATED = {  # parts of names, longest first where one holds another
    "language_model.model.embed_tokens": "tok_embeddings",
    "language_model.model.": "",
    "language_model.lm_head": "output",
    "vision_tower.": "vision_encoder.",
    "multi_modal_projector.norm": "pre_mm_projector_norm",
    "multi_modal_projector.patch_merger": "patch_merger",
    "multi_modal_projector.linear_1": "vision_language_adapter.w_in",
    "multi_modal_projector.linear_2": "vision_language_adapter.w_out",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.": "attention.",
    "mlp.": "feed_forward.",
    **{f"{side}_proj": f"w{side}" for side in "qkvo"},
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}


def _consolidated_name(name):
    for theirs, ours in CONSOLIDATED.items():
        name = name.replace(theirs, ours)
    return name


def _in_pairs(weight, n_heads):
    """Rows of each head from halves (i, i + half) to pairs (2i, 2i + 1): how the consolidated layout turns them."""
    half = weight.shape[0] // n_heads // 2
    rows = [head * 2 * half + i + side * half for head in range(n_heads) for i in range(half) for side in (0, 1)]
    return weight[rows]


def stored(tensors, s):
    """Yield (name, safetensors type, shape, make) in file order, where make() gives the bytes."""
    seed, dtype, consolidated = s["seed"], s["dtype"], s["layout"] == "consolidated"
    scales = ("qscale_weight", "qscale_act") if consolidated else ("weight_scale_inv", "activation_scale")
    for name, shape, make, is_linear in tensors:
        on_disk = _consolidated_name(name) if consolidated else _name_on_disk(name, s["prefix"])
        weight = functools.partial(make, seed, name, shape)
        if consolidated and name.endswith(("q_proj.weight", "k_proj.weight")):
            tower = "vision_heads" if "vision" in name else "heads" if "q_proj" in name else "kv_heads"
            weight = functools.partial(lambda make, n: _in_pairs(make(), n), weight, s[tower])
        if dtype == "bf16" or not is_linear:
            yield on_disk, "BF16", shape, lambda weight=weight: bf16_bits(weight()).tobytes()
            continue
        stem = on_disk.removesuffix("weight")
        # No inputs were measured: as if the largest had been between 2 and 6, common after an RMSNorm.
        input_scale = (4 + 2 * np.tanh(normal(seed, name + ":input", (), 1.0))) / F8_MAX
        yield on_disk, "F8_E4M3", shape, lambda weight=weight: quantise_e4m3(weight())[0].tobytes()
        yield (
            stem + scales[0],
            "BF16",
            (),
            lambda weight=weight: bf16_bits(quantise_e4m3(weight())[1]).tobytes(),
        )
        yield stem + scales[1], "BF16", (), lambda scale=input_scale: bf16_bits(scale).tobytes()


def _n_bytes(kind, shape):
    return math.prod(shape) * {"BF16": 2, "F8_E4M3": 1}[kind]


def write_safetensors(path, stored):
    """8 bytes of header length, a JSON header padded to 8 bytes, then the tensors one after the other."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, kind, shape, _ in stored:
        end = offset + _n_bytes(kind, shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for _, _, _, make in stored:
            file.write(make())


def write_weights(folder, stored, n_shards, stem):
    if n_shards == 1:
        write_safetensors(folder / f"{stem}.safetensors", stored)
        return
    total = sum(_n_bytes(kind, shape) for _, kind, shape, _ in stored)
    parts, done = [[]], 0
    for tensor in stored:
        if done * n_shards >= total * len(parts):  # a tensor larger than a shard still leaves no file empty
            parts.append([])
        parts[-1].append(tensor)
        done += _n_bytes(tensor[1], tensor[2])
    weight_map = {}
    for i, part in enumerate(parts, start=1):
        path = folder / f"{stem}-{i:05d}-of-{n_shards:05d}.safetensors"
        write_safetensors(path, part)
        weight_map |= {name: path.name for name, *_ in part}
    write_json(
        folder / f"{stem}.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
