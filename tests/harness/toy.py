"""Toy checkpoints: the true Ministral 3 architecture, tiny sizes, seeded random weights, in the layout of the releases.

They hold what a released Hugging Face folder holds (config, safetensors, tokenizer, processor files), under the same
names and in the same number formats, so that every tool that reads a release can be tested on one in seconds. Or the
consolidated layout of the same weights; or Mistral Small, with eyes or without.
The weights mean nothing: the model babbles. Its scales are chosen so that the argmax is clear and that an image
changes the answer. Only numpy and the vocabulary inside mistral-common's wheel are needed. Not here: chat templates,
and running the model.

    python tests/toy.py OUT_DIR --dtype fp8 --untied --seed 3
    write_checkpoint(tmp_path / "toy", dtype="fp8", tied=False, seed=3)

One tensor depends only on the seed, its name and its shape: the same seed gives the same weights whether tied or not,
in one file or several, and as bf16 or (quantised from the same numbers) as fp8.
"""

import argparse
import base64
import functools
import json
import math
import zlib
from importlib import resources
from pathlib import Path

import numpy as np

N_SPECIAL = 1000  # special ids come first, then the ranks of the byte pairs
IMG, IMG_BREAK, IMG_END = 10, 12, 13
MERGE = 2  # patches per side in one token
PATCH_PX = 14
GRID_PX = PATCH_PX * MERGE  # an image whose sides are multiples of this is never resized
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # RGB
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

# The Tekken v13 names; every id not listed is <SPECIAL_id>.
SPECIAL_NAMES = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "[INST]",
    4: "[/INST]",
    5: "[AVAILABLE_TOOLS]",
    6: "[/AVAILABLE_TOOLS]",
    7: "[TOOL_RESULTS]",
    8: "[/TOOL_RESULTS]",
    9: "[TOOL_CALLS]",
    IMG: "[IMG]",
    11: "<pad>",
    IMG_BREAK: "[IMG_BREAK]",
    IMG_END: "[IMG_END]",
    14: "[PREFIX]",
    15: "[MIDDLE]",
    16: "[SUFFIX]",
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
    19: "[TOOL_CONTENT]",
    24: "[AUDIO]",
    25: "[BEGIN_AUDIO]",
    32: "[ARGS]",
    33: "[CALL_ID]",
    34: "[THINK]",
    35: "[/THINK]",
}

EMBEDDING_STD = 0.25  # small beside what a layer adds, or a tied model only repeats its last token
ROW_SPREAD = 0.5  # embedding rows differ in length (log-normal), as trained ones do: this clears the argmax
UNUSED_ROW = 0.1  # rows of special ids nobody trained are short, as in the releases: they never win
QK_GAIN = 1.5  # attention that prefers some positions, so that a few image tokens are not averaged away
GELU_RMS = 0.65  # rms of gelu(x) for x ~ N(0, 1): linear_2 undoes it to match the text embeddings

F8_MAX = 448.0


# -- number formats --------------------------------------------------------------------------------------------------


def bf16_bits(x):
    """float32 → the uint16 bits of bfloat16, round to nearest even. Finite values only."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def from_bf16_bits(bits):
    """The uint16 bits of bfloat16 → float32, exactly."""
    return (np.asarray(bits, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


def e4m3_value(code):
    """float8_e4m3fn code (uint8) → float32. 0x7F and 0xFF are NaN; there is no infinity."""
    code = np.asarray(code, dtype=np.uint8).astype(np.int32)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2(exponent - 10.0))
    magnitude = np.where(code & 0x7F == 0x7F, np.nan, magnitude)
    return np.where(code & 0x80, -magnitude, magnitude).astype(np.float32)


def e4m3_code(x):
    """float32 → float8_e4m3fn codes (uint8), round to nearest even, saturating at ±448. Finite values only."""
    values = e4m3_value(np.arange(127)).astype(np.float64)  # the finite non-negative numbers, ascending by code
    middles = (values[:-1] + values[1:]) / 2
    magnitude = np.abs(np.asarray(x, dtype=np.float64))
    code = np.searchsorted(middles, magnitude, side="left")  # a tie stays below ...
    tie = (code < 126) & (magnitude == middles[np.minimum(code, 125)])
    code += tie & (code % 2 == 1)  # ... unless the code below is odd
    return code.astype(np.uint8) | np.where(np.signbit(x), 0x80, 0).astype(np.uint8)


def quantise_e4m3(weight):
    """(codes uint8, scale float32) with weight ≈ value(codes) · scale; one scale per tensor, itself exact in bf16."""
    scale = from_bf16_bits(bf16_bits(np.abs(weight).max() / F8_MAX))
    return e4m3_code(weight / scale), scale


# -- weights ---------------------------------------------------------------------------------------------------------


def _normal(seed, name, shape, std):
    """float32 normal numbers that depend on nothing but these arguments."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return generator.standard_normal(shape, dtype=np.float32) * np.float32(std)


def _norm(seed, name, shape):
    """An RMSNorm weight: around one, never exactly one, or a reader that forgets it would pass."""
    return 1 + _normal(seed, name, shape, 0.1)


def _linear(gain=1.0):
    return lambda seed, name, shape: _normal(seed, name, shape, gain / math.sqrt(math.prod(shape[1:])))


def _embedding(seed, name, shape):
    rows = _normal(seed, name, shape, EMBEDDING_STD)
    lengths = np.exp(_normal(seed, name + ":length", shape[0], ROW_SPREAD))
    lengths[:N_SPECIAL] = UNUSED_ROW
    lengths[list(SPECIAL_NAMES)] = 1
    return rows * lengths[:, None]


def _tensors(s):
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
    if prefix == "text":  # a model without eyes
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


def _stored(tensors, s):
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
        input_scale = (4 + 2 * np.tanh(_normal(seed, name + ":input", (), 1.0))) / F8_MAX
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


def _write_safetensors(path, stored):
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


def _write_weights(folder, stored, n_shards, stem):
    if n_shards == 1:
        _write_safetensors(folder / f"{stem}.safetensors", stored)
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
        _write_safetensors(path, part)
        weight_map |= {name: path.name for name, *_ in part}
    _write_json(
        folder / f"{stem}.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


# -- config ----------------------------------------------------------------------------------------------------------


def _write_json(path, data):
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(s):
    """config.json, key for key as the releases have it."""
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_index": IMG,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": MERGE,
        "text_config": {
            "attention_dropout": 0.0,
            "head_dim": s["head_dim"],
            "hidden_act": "silu",
            "hidden_size": s["hidden"],
            "initializer_range": 0.02,
            "intermediate_size": s["ffn"],
            "max_position_embeddings": 16 * s["original_context"],
            "model_type": "ministral3",
            "num_attention_heads": s["heads"],
            "num_hidden_layers": s["layers"],
            "num_key_value_heads": s["kv_heads"],
            "rms_norm_eps": 1e-05,
            "rope_parameters": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 16.0,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": s["original_context"],
                "rope_theta": s["rope_theta"],
                "rope_type": "yarn",
                "type": "yarn",
            },
            "sliding_window": None,
            "tie_word_embeddings": s["tied"],
            "use_cache": True,
            "vocab_size": s["vocab"],
        },
        "tie_word_embeddings": s["tied"],
        "transformers_version": "5.0.0.dev0",
        "vision_config": {
            "attention_dropout": 0.0,
            "head_dim": s["vision_hidden"] // s["vision_heads"],
            "hidden_act": "silu",
            "hidden_size": s["vision_hidden"],
            "image_size": 1540,
            "initializer_range": 0.02,
            "intermediate_size": s["vision_ffn"],
            "model_type": "pixtral",
            "num_attention_heads": s["vision_heads"],
            "num_channels": 3,
            "num_hidden_layers": s["vision_layers"],
            "patch_size": PATCH_PX,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "vision_feature_layer": -1,
    }
    if s["family"] == "mistral":
        text = config["text_config"] | {"model_type": "mistral", "max_position_embeddings": 131072}
        text["rope_parameters"] = {"rope_theta": s["rope_theta"], "rope_type": "default"}
        config["text_config"] = text
    if not s["vision"]:
        name = {"ministral3": "Ministral3ForCausalLM", "mistral": "MistralForCausalLM"}[s["family"]]
        config = config["text_config"] | {"architectures": [name], "dtype": "bfloat16"}
    if s["dtype"] == "fp8":
        config["quantization_config"] = {
            "activation_scheme": "static",
            "dequantize": False,
            "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
            "quant_method": "fp8",
            "weight_block_size": None,
        }
    return config


def _params(s):
    """params.json, key for key as the releases have it."""
    params = {
        "dim": s["hidden"],
        "n_layers": s["layers"],
        "head_dim": s["head_dim"],
        "hidden_dim": s["ffn"],
        "n_heads": s["heads"],
        "n_kv_heads": s["kv_heads"],
        "norm_eps": 1e-05,
        "rope_theta": s["rope_theta"],
        "tied_embeddings": s["tied"],
        "vocab_size": s["vocab"],
        "max_position_embeddings": 131072,
    }
    if s["family"] == "ministral3":
        yarn = {"alpha": 1.0, "apply_scale": False, "beta": 32.0, "factor": 16.0}
        params |= {
            "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": s["original_context"]},
            "max_position_embeddings": 16 * s["original_context"],
            "yarn": yarn | {"original_max_position_embeddings": s["original_context"]},
        }
    if s["vision"]:
        params["vision_encoder"] = {
            "adapter_bias": False,
            "add_pre_mm_projector_layer_norm": True,
            "hidden_size": s["vision_hidden"],
            "image_break_token_id": IMG_BREAK,
            "image_end_token_id": IMG_END,
            "image_size": 1540,
            "image_token_id": IMG,
            "intermediate_size": s["vision_ffn"],
            "max_image_size": 1540,
            "mm_projector_id": "patch_merge",
            "num_attention_heads": s["vision_heads"],
            "num_channels": 3,
            "num_hidden_layers": s["vision_layers"],
            "patch_size": PATCH_PX,
            "rope_theta": 10000.0,
            "spatial_merge_size": MERGE,
        }
    if s["dtype"] == "fp8":
        params["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    return params


def _write_processor(folder, context):
    image_processor = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(PIXEL_MEAN),
        "image_processor_type": "PixtralImageProcessorFast",
        "image_std": list(PIXEL_STD),
        "patch_size": PATCH_PX,
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 1540},
    }
    _write_json(folder / "preprocessor_config.json", image_processor | {"processor_class": "PixtralProcessor"})
    _write_json(
        folder / "processor_config.json",
        {
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
            "image_processor": image_processor,
            "image_token": "[IMG]",
            "patch_size": PATCH_PX,
            "processor_class": "PixtralProcessor",
            "spatial_merge_size": MERGE,
        },
    )
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "max_length": context,
            "pad_token_id": 11,
            "transformers_version": "5.0.0.dev0",
        },
    )


# -- tokenizer -------------------------------------------------------------------------------------------------------


def special_name(token_id):
    return SPECIAL_NAMES.get(token_id, f"<SPECIAL_{token_id}>")


@functools.cache
def _tekken():
    """The vocabulary in mistral-common's wheel (v3: byte pairs as in v13, but without the names of special ids)."""
    return json.loads((resources.files("mistral_common") / "data" / "tekken_240911.json").read_text(encoding="utf-8"))


def _write_tekken(folder, vocab):
    """tekken.json as v13 writes it. The first ranks of a byte-pair vocabulary are themselves such a vocabulary."""
    _write_json(
        folder / "tekken.json",
        {
            "config": {
                "pattern": _tekken()["config"]["pattern"],
                "num_vocab_tokens": vocab - N_SPECIAL,
                "default_vocab_size": vocab,
                "default_num_special_tokens": N_SPECIAL,
                "version": "v13",
            },
            "vocab": _tekken()["vocab"][: vocab - N_SPECIAL],
            "special_tokens": [{"rank": i, "token_str": special_name(i), "is_control": True} for i in range(N_SPECIAL)],
            "image": {"image_patch_size": PATCH_PX, "max_image_size": 1540, "spatial_merge_size": MERGE},
        },
    )


def _byte_alphabet():
    """byte → the printable character that byte-level BPE writes for it (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _merges(pieces):
    """Every way to join two known pieces into a third, in the order of the third's rank."""
    rank = {piece: n for n, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        splits = [(a, b) for a, b in splits if a in rank and b in rank]
        merges += sorted(splits, key=lambda split: (rank[split[0]], rank[split[1]]))
    return merges


def _write_tokenizer(folder, vocab):
    """tokenizer.json and tokenizer_config.json: the same ids for the same text, in the fast-tokenizer form."""
    alphabet = _byte_alphabet()
    pieces = [base64.b64decode(entry["token_bytes"]) for entry in _tekken()["vocab"][: vocab - N_SPECIAL]]

    def spell(piece):
        return "".join(alphabet[byte] for byte in piece)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    specials = {special_name(i): i for i in range(N_SPECIAL)}
    _write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": i,
                    "content": name,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for name, i in specials.items()
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": _tekken()["config"]["pattern"]},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    byte_level,
                ],
            },
            "post_processor": byte_level | {"trim_offsets": False, "use_regex": True},
            "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,  # a whole word that is a token is that token, as tiktoken has it
                "vocab": specials | {spell(piece): N_SPECIAL + n for n, piece in enumerate(pieces)},
                "merges": [[spell(a), spell(b)] for a, b in _merges(pieces)],
            },
        },
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "backend": "tokenizers",
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": "<pad>",
            "processor_class": "PixtralProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
        },
    )


# -- the front door --------------------------------------------------------------------------------------------------


def toy_image(height, width, seed=0):
    """(height, width, 3) uint8 RGB: slow waves with one brighter disc, and noise on every pixel."""
    generator = np.random.default_rng([seed, height, width])
    phases, cycles = generator.uniform(0, 2 * np.pi, 3), generator.uniform(0.5, 2.5, (3, 2))
    y, x = np.mgrid[0:height, 0:width]
    y, x = y / height, x / width
    centre_y, centre_x = generator.uniform(0.2, 0.8, 2)
    disc = (np.hypot(y - centre_y, x - centre_x) < 0.2)[..., None] * generator.uniform(20, 80, 3)
    waves = np.sin(2 * np.pi * (y[..., None] * cycles[:, 0] + x[..., None] * cycles[:, 1]) + phases)
    noise = generator.normal(0, 12, (height, width, 3))
    return np.clip(np.round(110 + 80 * waves + disc + noise), 0, 255).astype(np.uint8)


def write_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "bf16",
    tied: bool = True,
    tokenizer: str = "tekken",
    shards: int = 1,
    layout: str = "hf",
    family: str = "ministral3",
    vision: bool = True,
    prefix: str = "",
    hidden: int = 256,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 128,
    ffn: int = 512,
    vocab: int = 4096,
    vision_hidden: int = 128,
    vision_layers: int = 2,
    vision_heads: int = 2,
    vision_ffn: int = 256,
    original_context: int = 16384,
    rope_theta: float = 1e6,
) -> Path:
    """Write a toy checkpoint into folder and return folder.

    dtype: "bf16" or "fp8". tokenizer: "tekken", "tokenizer" (the Hugging Face form) or "both".
    layout: "hf" or "consolidated". family: "ministral3" or "mistral". vision: False for a text-only model.
    prefix: "" for the names of the releases, "model." for those of transformers' module tree, "text" for those of a
    text-only model.
    """
    s = dict(locals())
    choices = {
        "dtype": ("bf16", "fp8"),
        "tokenizer": ("tekken", "tokenizer", "both"),
        "layout": ("hf", "consolidated"),
        "family": ("ministral3", "mistral"),
        "prefix": ("", "model.", "text"),
    }
    for key, allowed in choices.items():
        if s[key] not in allowed:
            raise ValueError(f"{key}: expected one of {allowed}, found {s[key]!r}")
    # Narrower rows cannot become K-quants: libllama would silently store another type.
    if hidden % 256 or ffn % 256 or heads * head_dim % 256:
        found = hidden, ffn, heads * head_dim
        raise ValueError(f"hidden, ffn, heads*head_dim: expected multiples of 256, found {found}")
    if vision_hidden % (4 * vision_heads):
        raise ValueError(f"vision_hidden: expected a multiple of {4 * vision_heads}, found {vision_hidden}")
    if vocab < N_SPECIAL + 256:
        raise ValueError(f"vocab: expected at least {N_SPECIAL + 256} (special ids and bytes), found {vocab}")

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem = {"hf": "model", "consolidated": "consolidated"}[layout]
    _write_weights(folder, list(_stored(_tensors(s), s)), shards, stem)
    if layout == "consolidated":
        _write_json(folder / "params.json", _params(s))
    else:
        _write_json(folder / "config.json", _config(s))
        _write_processor(folder, 16 * original_context)
    if tokenizer in ("tekken", "both"):
        _write_tekken(folder, vocab)
    if tokenizer in ("tokenizer", "both"):
        _write_tokenizer(folder, vocab)
    return folder


def write_adapter(folder, modules=None, rank=4, names=("lora_A.weight", "lora_B.weight"), extra=(), seed=0, **config):
    """A LoRA adapter of the default toy, as PEFT saves it. Returns {module: (A, B)}, float32.

    modules: module -> its matrix's shape; by default all linear layers of the text. rank: of all, or {module: rank}.
    extra: names of tensors that do not belong there. config: more for adapter_config.json, or other values.
    """
    q, kv, hidden, ffn = 512, 256, 256, 512
    shapes = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
              "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
              "mlp.down_proj": (hidden, ffn)}  # fmt: skip
    if modules is None:
        at = "model.language_model.layers"
        modules = {f"{at}.{n}.{module}": shape for n in (0, 1) for module, shape in shapes.items()}
    made, stored = {}, []
    for module, (rows, columns) in modules.items():
        r = rank if isinstance(rank, int) else rank.get(module, 4)
        a, b = (_normal(seed, f"{module}.{i}", shape, 0.1) for i, shape in enumerate(((r, columns), (rows, r))))
        bits = [bf16_bits(matrix) for matrix in (a, b)]
        made[module] = tuple(
            from_bf16_bits(raw).reshape(matrix.shape) for raw, matrix in zip(bits, (a, b), strict=True)
        )
        for name, matrix, raw in zip(names, (a, b), bits, strict=True):
            stored.append((f"base_model.model.{module}.{name}", "BF16", matrix.shape, raw.tobytes))
    stored += [(name, "BF16", (2,), lambda: bytes(4)) for name in extra]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_safetensors(folder / "adapter_model.safetensors", stored)
    table = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False, "modules_to_save": None}
    _write_json(folder / "adapter_config.json", table | config)
    return made


def main():
    defaults = write_checkpoint.__kwdefaults__
    parser = argparse.ArgumentParser(description="Write a toy Ministral 3 checkpoint with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--untied", action="store_true", help="a head of its own, as in the 8B and 14B")
    parser.add_argument("--blind", action="store_true", help="no vision tower")
    for name, default in defaults.items():
        if name not in ("tied", "vision"):
            parser.add_argument(
                f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"(default: {default!r})"
            )
    arguments = vars(parser.parse_args())
    folder, untied, blind = (arguments.pop(name) for name in ("folder", "untied", "blind"))
    print(write_checkpoint(folder, tied=not untied, vision=not blind, **arguments))


if __name__ == "__main__":
    main()
