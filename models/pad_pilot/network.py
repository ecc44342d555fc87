"""Ministral 3 in torch, for training: pictures to image embeddings, embeddings to hidden states.

The weights are one dictionary with the tensor names of a released checkpoint, so the dictionary can be saved unchanged.
All rows of a batch share a prefix, which is evaluated once and never copied. transformers loads checkpoints trained
with this file and gives the right answers (tests/reference/make_pad_pilot.py). This file has no generation, no cache
and no loss.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

SIZES = {
    "hidden": 256,
    "layers": 5,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "ffn": 512,
    "vocab": 4096,
    "vision_hidden": 192,
    "vision_layers": 4,
    "vision_heads": 4,
    "vision_ffn": 512,
}
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])  # RGB
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def text_angles(positions: torch.Tensor, config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """YaRN (Peng et al. 2023) as in Ministral 3. positions (n, tokens) -> cos, sin (n, 1, tokens, head_dim)."""
    rope, dim = config["rope_parameters"], config["head_dim"]
    frequency = rope["rope_theta"] ** -(torch.arange(0, dim, 2, device=positions.device) / dim)
    context, base = rope["original_max_position_embeddings"], rope["rope_theta"]

    def channel(turns: float) -> float:
        """The channel that makes this number of turns within the original context."""
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = math.floor(channel(rope["beta_fast"])), math.ceil(channel(rope["beta_slow"]))
    ramp = ((torch.arange(dim // 2, device=positions.device) - low) / max(high - low, 0.001)).clamp(0, 1)
    frequency = frequency * (1 - ramp) + frequency / rope["factor"] * ramp
    angle = positions[..., None] * torch.cat([frequency, frequency])
    return angle.cos()[:, None], angle.sin()[:, None]


def encode_pictures(w: dict, pictures: torch.Tensor, s: dict) -> torch.Tensor:
    """Pixtral and projector: pictures (n, H, W, 3) uint8 -> image embeddings (n, lines, columns, hidden)."""
    n, (lines, columns) = len(pictures), (side // 14 for side in pictures.shape[1:3])
    pixels = (pictures.float() / 255 - MEAN.to(pictures.device)) / STD.to(pictures.device)
    patches = pixels.view(n, lines, 14, columns, 14, 3).permute(0, 1, 3, 5, 2, 4).reshape(n, lines * columns, -1)
    x = norm(F.linear(patches, w["vision_tower.patch_conv.weight"].flatten(1)), w["vision_tower.ln_pre.weight"])
    dim = s["vision_hidden"] // s["vision_heads"]
    frequency = 10000.0 ** -(torch.arange(0, dim, 2, device=x.device) / dim)
    down, right = (
        torch.arange(k, device=x.device)[:, None] * f for k, f in ((lines, frequency[::2]), (columns, frequency[1::2]))
    )
    angle = torch.cat([down[:, None].expand(-1, columns, -1), right[None].expand(lines, -1, -1)], -1).flatten(0, 1)
    cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))
    heads = lambda y: y.unflatten(-1, (s["vision_heads"], dim)).transpose(1, 2)  # noqa: E731
    for i in range(s["vision_layers"]):
        at = f"vision_tower.transformer.layers.{i}."
        h = norm(x, w[at + "attention_norm.weight"])
        q, k, v = (heads(F.linear(h, w[f"{at}attention.{p}_proj.weight"])) for p in "qkv")
        h = F.scaled_dot_product_attention(rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v)
        x = x + F.linear(h.transpose(1, 2).flatten(2), w[at + "attention.o_proj.weight"])
        h = norm(x, w[at + "ffn_norm.weight"])
        h = F.silu(F.linear(h, w[at + "feed_forward.gate_proj.weight"])) * F.linear(
            h, w[at + "feed_forward.up_proj.weight"]
        )
        x = x + F.linear(h, w[at + "feed_forward.down_proj.weight"])
    at = "multi_modal_projector."
    x = norm(x, w[at + "norm.weight"]).view(n, lines // 2, 2, columns // 2, 2, -1)
    x = x.permute(0, 1, 3, 5, 2, 4).flatten(3)  # channel first, then its 2 x 2 patches: the order of torch's unfold
    x = F.linear(x, w[at + "patch_merger.merging_layer.weight"])
    return F.linear(F.gelu(F.linear(x, w[at + "linear_1.weight"])), w[at + "linear_2.weight"])


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k0: torch.Tensor, v0: torch.Tensor, bias: torch.Tensor):
    """Attention to a shared prefix and to the row itself, with one softmax over both and without a copy of the prefix.

    q (n, heads, t, d); k, v (n, kv, t, d); k0, v0 (kv, p, d); bias (n, t, t), added to the row's own scores.
    """
    n, heads, t, d = q.shape
    kv, p, group = k.shape[1], k0.shape[1], heads // k.shape[1]
    q = q.view(n, kv, group, t, d) * d**-0.5
    over_rows = q.permute(1, 0, 2, 3, 4).reshape(kv, n * group * t, d)
    shared = (over_rows @ k0.transpose(1, 2)).view(kv, n, group, t, p)
    own = (q.reshape(n, kv, group * t, d) @ k.transpose(2, 3)).view(n, kv, group, t, t) + bias[:, None, None]
    largest = torch.maximum(shared.amax(-1, keepdim=True).transpose(0, 1), own.amax(-1, keepdim=True)).detach()
    shared, own = (shared - largest.transpose(0, 1)).exp(), (own - largest).exp()
    total = shared.float().sum(-1, keepdim=True).transpose(0, 1) + own.float().sum(-1, keepdim=True)
    out = (shared.view(kv, n * group * t, p) @ v0).view(kv, n, group, t, d).transpose(0, 1)
    out = out + (own.view(n, kv, group * t, t) @ v).view(n, kv, group, t, d)
    return (out / total).to(q.dtype).reshape(n, heads, t, d)


def hidden_states(
    w: dict, prefix: torch.Tensor, x: torch.Tensor, positions: torch.Tensor, bias: torch.Tensor, config: dict, s: dict
):
    """The language model over rows that share one prefix.

    prefix (1, p, hidden); x (rows, t, hidden); positions (rows, t); bias (rows, t, t). Returns x after each layer, the
    last one before its norm: each (rows, t, hidden).
    """
    p, hidden_by_layer = prefix.shape[1], []
    turn = text_angles(positions, config)
    turn_prefix = text_angles(torch.arange(p, device=x.device)[None], config)
    heads = lambda y: y.unflatten(-1, (-1, s["head_dim"])).transpose(1, 2)  # noqa: E731

    def qkv(y: torch.Tensor, at: str, angles: tuple) -> tuple:
        h = norm(y, w[at + "input_layernorm.weight"])
        q, k, v = (heads(F.linear(h, w[f"{at}self_attn.{part}_proj.weight"])) for part in "qkv")
        return rotate(q, *angles).to(v.dtype), rotate(k, *angles).to(v.dtype), v

    def rest(y: torch.Tensor, h: torch.Tensor, at: str) -> torch.Tensor:
        y = y + F.linear(h.transpose(1, 2).flatten(2), w[at + "self_attn.o_proj.weight"])
        h = norm(y, w[at + "post_attention_layernorm.weight"])
        h = F.silu(F.linear(h, w[at + "mlp.gate_proj.weight"])) * F.linear(h, w[at + "mlp.up_proj.weight"])
        return y + F.linear(h, w[at + "mlp.down_proj.weight"])

    for i in range(s["layers"]):
        at = f"language_model.model.layers.{i}."
        q0, k0, v0 = qkv(prefix, at, turn_prefix)
        q, k, v = qkv(x, at, turn)
        if i < s["layers"] - 1:
            h = F.scaled_dot_product_attention(q0, k0, v0, is_causal=True, enable_gqa=True)
            prefix = rest(prefix, h, at)
        x = rest(x, attend(q, k, v, k0[0], v0[0], bias), at)
        hidden_by_layer.append(x)
    return hidden_by_layer
