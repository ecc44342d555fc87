"""Checkpoints of the released sizes whose weights are a hole in the file: everything but the numbers is true."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from tests.harness import toy


class Release(NamedTuple):
    """A released size, from its model card."""

    layers: int
    hidden: int
    ffn: int
    tied: bool
    text_parameters: float  # of the language model, billions
    q4_k_m_bytes: int  # the published file, tokenizer included
    kv_bytes_per_token: int


RELEASES = {
    "3B": Release(26, 3072, 9216, True, 3.43, 2_147_023_008, 106_496),
    "8B": Release(34, 4096, 14336, False, 8.49, 5_198_911_904, 139_264),
    "14B": Release(40, 5120, 16384, False, 13.51, 8_239_593_024, 163_840),
}


def shapes(release: Release) -> dict[str, tuple[int, ...]]:
    """Every tensor of a released checkpoint, written down by hand."""
    hidden, ffn, heads, vision = release.hidden, release.ffn, 32 * 128, 1024
    out = {"language_model.model.embed_tokens.weight": (131072, hidden), "language_model.model.norm.weight": (hidden,)}
    if not release.tied:
        out["language_model.lm_head.weight"] = (131072, hidden)
    for n in range(release.layers):
        at = f"language_model.model.layers.{n}."
        out |= {
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
            at + "self_attn.q_proj.weight": (heads, hidden),
            at + "self_attn.k_proj.weight": (1024, hidden),
            at + "self_attn.v_proj.weight": (1024, hidden),
            at + "self_attn.o_proj.weight": (hidden, heads),
            at + "mlp.gate_proj.weight": (ffn, hidden),
            at + "mlp.up_proj.weight": (ffn, hidden),
            at + "mlp.down_proj.weight": (hidden, ffn),
        }
    out |= {"vision_tower.patch_conv.weight": (vision, 3, 14, 14), "vision_tower.ln_pre.weight": (vision,)}
    for n in range(24):
        at = f"vision_tower.transformer.layers.{n}."
        out |= {at + f"{name}_norm.weight": (vision,) for name in ("attention", "ffn")}
        out |= {at + f"attention.{name}_proj.weight": (vision, vision) for name in "qkvo"}
        out |= {at + f"feed_forward.{name}_proj.weight": (4096, vision) for name in ("gate", "up")}
        out[at + "feed_forward.down_proj.weight"] = (vision, 4096)
    return out | {
        "multi_modal_projector.norm.weight": (vision,),
        "multi_modal_projector.patch_merger.merging_layer.weight": (vision, 4 * vision),
        "multi_modal_projector.linear_1.weight": (hidden, vision),
        "multi_modal_projector.linear_2.weight": (hidden, hidden),
    }


def write_release(folder: Path, name: str) -> Path:
    """name: a key of RELEASES."""
    release = RELEASES[name]
    folder = toy.write_checkpoint(folder, vocab=2048, tied=release.tied)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "num_hidden_layers": release.layers, "hidden_size": release.hidden, "intermediate_size": release.ffn,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 131072,
    }  # fmt: skip
    config["vision_config"] |= {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
        "head_dim": 64,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for tensor, shape in shapes(release).items():
        header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + 2 * math.prod(shape)]}
        at += 2 * math.prod(shape)
    head = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + at)
    return folder
