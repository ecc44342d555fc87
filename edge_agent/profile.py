"""Configuration -> ResolvedSwitches: what a profile means. Pure; only here do switches depend on each other.

| switch          | reproducible | fast         | small       |
|-----------------|--------------|--------------|-------------|
| vision.backend  | onnxruntime on a CPU, mtmd on a GPU | mtmd |
| reproducible    | on a CPU     | false        | false       |
| speculative     | true         | true         | true        |
| overlap         | false        | false        | false       |
| repack          | true         | true         | true        |
| mmap            | on a GPU     | on a GPU     | on a GPU    |
| mlock           | false        | false        | false       |
| kv_cache_type   | f16          | f16          | q8_0        |
| flash_attention | by llama.cpp on a GPU, else false (small: true)   |

`fast` is the default. Its batches have the size of what they hold. A draft is then evaluated in another shape than
plain decoding, which moves the logits a little: a token with a small lead is decided by a step of plain decoding, so
that a draft changes ties at most. `reproducible` pads batches so that no bit changes: for replay and for comparisons.

Overlap raises the rate of actions, and it makes each of them older: a frame is encoded before the answer to the one
before it is complete, and waits. Measured on a GPU with the 3B: 51 instead of 34 actions a second, and a mean age of
information of 55 instead of 51 ms. So it is off until a measurement on the board says otherwise. On a GPU, mtmd encodes
in 9.0 ms and onnxruntime in 12.1 ms, which holds 1.3 GB more.

`small` begins with what the memory plan would reduce first: mtmd, which keeps the encoder's weights as stored and needs
no onnxruntime, and an 8-bit KV cache, which needs flash attention. Weights stay repacked and unmapped: then they are in
memory once.

Every switch of the table `advanced` that is not null replaces the profile's. The others follow it: an 8-bit cache turns
flash attention on, flash attention turns reproducible off, and weights that are not repacked are mapped.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from edge_agent.config import Config


class ResolvedSwitches(msgspec.Struct, frozen=True, kw_only=True):
    """The switches as they are used; each is explained in systemd/edge-agent.yaml."""

    vision_backend: Literal["onnxruntime", "mtmd"]
    reproducible: bool  # bit for bit, whatever the draft was; never on a GPU nor with flash attention
    speculative: bool
    overlap: bool
    repack: bool
    mmap: bool
    mlock: bool
    kv_cache_type: Literal["f16", "q8_0"]
    flash_attention: bool | None  # None: llama.cpp decides


def resolve(config: Config, gpu: bool) -> ResolvedSwitches:
    """gpu: whether layers of the language model run on a GPU."""
    profile, switches = config.profile or "fast", config.advanced
    small = profile == "small"

    kv_cache_type = switches.kv_cache_type
    if kv_cache_type is None:  # an 8-bit cache needs flash attention
        kv_cache_type = "q8_0" if small and switches.flash_attention is not False else "f16"
    flash_attention = switches.flash_attention
    if kv_cache_type == "q8_0":
        flash_attention = True
    elif flash_attention is None and not gpu:
        # On a CPU, flash attention sums in another order for another number of rows.
        flash_attention = False

    wants_reproducible = _or(switches.reproducible, profile == "reproducible")
    repack = _or(switches.repack, True)
    return ResolvedSwitches(
        vision_backend=config.vision.backend or _default_backend(config, small, gpu),
        reproducible=wants_reproducible and not gpu and flash_attention is False,
        speculative=_or(switches.speculative, True),
        overlap=_or(switches.overlap, False),
        repack=repack,
        # Repacked weights that are mapped are in memory twice: in the file's pages and in the new order.
        mmap=_or(switches.mmap, gpu or not repack),
        mlock=_or(switches.mlock, False),
        kv_cache_type=kv_cache_type,
        flash_attention=flash_attention,
    )


def _default_backend(config: Config, small: bool, gpu: bool) -> Literal["onnxruntime", "mtmd"]:
    """Without a measurement: the faster one of each kind of machine. TensorRT is onnxruntime's."""
    return "mtmd" if small or (gpu and not config.vision.tensorrt) else "onnxruntime"


def _or(switch: bool | None, default: bool) -> bool:
    return default if switch is None else switch
