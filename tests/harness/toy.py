"""Toy checkpoints: the true Ministral 3 architecture, tiny sizes, seeded random weights, in the layout of the releases.

They hold what a released Hugging Face folder holds (config, safetensors, tokenizer, processor files), under the same
names and in the same number formats, so that every tool that reads a release can be tested on one in seconds. Or the
consolidated layout of the same weights; or Mistral Small, with or without a vision encoder.
The weights mean nothing: the model babbles. Its scales are chosen so that the argmax is clear and that an image
changes the answer. Only numpy and the vocabulary inside mistral-common's wheel are needed. Not here: chat templates,
and running the model.

    python -m tests.harness.toy OUT_DIR --dtype fp8 --untied --seed 3
    write_checkpoint(tmp_path / "toy", dtype="fp8", tied=False, seed=3)

One tensor depends only on the seed, its name and its shape: the same seed gives the same weights whether tied or not,
in one file or several, and as bf16 or (quantised from the same numbers) as fp8.
"""

import argparse
from pathlib import Path

import numpy as np

from tests.harness.toy_config import config, params, write_json, write_processor
from tests.harness.toy_layout import N_SPECIAL
from tests.harness.toy_numbers import bf16_bits, from_bf16_bits
from tests.harness.toy_tokenizer import write_tekken, write_tokenizer
from tests.harness.toy_weights import normal, stored, tensors, write_safetensors, write_weights


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
    write_weights(folder, list(stored(tensors(s), s)), shards, stem)
    if layout == "consolidated":
        write_json(folder / "params.json", params(s))
    else:
        write_json(folder / "config.json", config(s))
        write_processor(folder, 16 * original_context)
    if tokenizer in ("tekken", "both"):
        write_tekken(folder, vocab)
    if tokenizer in ("tokenizer", "both"):
        write_tokenizer(folder, vocab)
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
        a, b = (normal(seed, f"{module}.{i}", shape, 0.1) for i, shape in enumerate(((r, columns), (rows, r))))
        bits = [bf16_bits(matrix) for matrix in (a, b)]
        made[module] = tuple(
            from_bf16_bits(raw).reshape(matrix.shape) for raw, matrix in zip(bits, (a, b), strict=True)
        )
        for name, matrix, raw in zip(names, (a, b), bits, strict=True):
            stored.append((f"base_model.model.{module}.{name}", "BF16", matrix.shape, raw.tobytes))
    stored += [(name, "BF16", (2,), lambda: bytes(4)) for name in extra]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", stored)
    table = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False, "modules_to_save": None}
    write_json(folder / "adapter_config.json", table | config)
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
