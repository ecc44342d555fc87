"""What serving a bundle will need, added up before anything is loaded, and what to give up where the board has less.

Estimates from the manifest: they err on the large side. Given up in this order, each only if it is needed: the file's
pages beside repacked weights (asked for by mmap: true); a cache in 16 bit (with 8, answers may depend on drafts);
onnxruntime, which keeps the encoder in float32, for mtmd, which does not (the same rows, more slowly on a CPU); image
tokens, by steps of a quarter down to LEAST_TOKENS (sees less fine); context that the prompt may not need. Then the
start is refused with the sum.
"""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import msgspec

from edge_agent.bundle.manifest import LANGUAGE, MMPROJ, VISION, Manifest
from edge_agent.config import Config
from edge_agent.errors import UserError

MIB = 1 << 20
PROCESS_MIB = 150  # Python, libraries, buffers of frames
MIN_IMAGE_TOKENS, MIN_CONTEXT = 64, 640
ROWS_PER_STEP = 512  # llama.cpp's physical batch
REPACKED = {"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "Q2_K"}  # by one architecture's kernels or another's
FLOAT32_BYTES = 4
KV_CELL_ALIGNMENT = 256  # llama.cpp makes caches of a multiple of this
Q8_0_SHARE = 34 / 64  # of 16 bit


class NotEnoughMemoryError(UserError):
    """One line, with the sum. It may pass: something else may be using the memory now."""


class MemoryPlan(msgspec.Struct, frozen=True):
    config: Config  # as it can be served
    parts_mib: dict[str, float]
    given_up: dict[str, object]  # key of the configuration -> what it became

    @property
    def mib(self) -> float:
        return sum(self.parts_mib.values())


def needed_mib(config: Config, manifest: Manifest, adapters_mib: float = 0.0) -> dict[str, float]:
    """Part -> MiB."""
    model, size = manifest.model, {name: file.bytes / MIB for name, file in manifest.files.items()}
    language = config.language
    repacked = sum(n for name, n in manifest.bytes_by_type.items() if name in REPACKED) / MIB
    on_cpu = 0.0 if language.gpu_layers > 0 else 1.0
    cells = math.ceil(language.context / KV_CELL_ALIGNMENT) * KV_CELL_ALIGNMENT
    heads_mib = (
        model.hidden / 64 * language.context * ROWS_PER_STEP * FLOAT32_BYTES / MIB
    )  # scores of one layer; 64: a narrow head
    return {
        "language model": size[LANGUAGE],
        "its file's pages": repacked * on_cpu if language.repack and language.mmap else 0.0,
        "cache": 2 * cells * model.kv_bytes_per_token / MIB * (1.0 if language.kv_cache_type == "f16" else Q8_0_SHARE),
        "scores and logits": heads_mib + 16 * model.vocab * FLOAT32_BYTES / MIB,
        "vision encoder": _vision_mib(config, manifest),
        "adapters": adapters_mib,
        "the process": PROCESS_MIB,
    }


def adapters_mib(config: Config) -> float:
    """Of the configured adapters' files, those that are there."""
    return sum(Path(path).stat().st_size for path in config.language.adapters.values() if Path(path).is_file()) / MIB


def _vision_mib(config: Config, manifest: Manifest) -> float:
    if manifest.vision is None:
        return 0.0
    rows = 4 * config.vision.max_image_tokens  # patches
    scores = 16 * rows * rows * FLOAT32_BYTES / MIB  # of one layer's heads
    if config.vision.backend == "mtmd":
        return manifest.files[MMPROJ].bytes / MIB + scores
    stored = manifest.files[VISION].bytes / MIB
    in_float32 = (manifest.model.parameters - _elements(manifest.bytes_by_type)) * FLOAT32_BYTES / MIB
    # onnxruntime computes in float32 and keeps what it read beside; from float32 it has nothing to make.
    return max(stored, in_float32) + (stored if stored < 0.9 * in_float32 else 0.0) + scores


def _elements(bytes_by_type: dict[str, int]) -> int:
    """Weights of the language model."""
    sizes = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in bytes_by_type}
    return sum(n // sizes[name][1] * sizes[name][0] for name, n in bytes_by_type.items())


def plan_memory(config: Config, manifest: Manifest, free_mib: float | None, adapters_mib: float = 0.0) -> MemoryPlan:
    """The configuration as it fits into free_mib (None: unknown, everything fits). Raises TooLittle."""
    given_up: dict[str, object] = {}
    while True:
        parts = needed_mib(config, manifest, adapters_mib)
        if free_mib is None or sum(parts.values()) <= free_mib:
            return MemoryPlan(config, parts, given_up)
        smaller = _reduce_once(config)
        if smaller is None:
            summed = " + ".join(f"{name} {n:.0f}" for name, n in parts.items() if n >= 1)
            raise NotEnoughMemoryError(
                f"memory: {sum(parts.values()):.0f} MiB needed ({summed}), {free_mib:.0f} MiB free; use a smaller "
                "bundle, or vision.backend mtmd"
            )
        config, key, value = smaller
        given_up[key] = value


def _reduce_once(config: Config) -> tuple[Config, str, object] | None:
    """With the next thing given up, its key and what it became; None: nothing is left."""
    language, vision = config.language, config.vision
    if language.repack and language.mmap:
        table, key, value = "language", "mmap", False
    elif language.kv_cache_type == "f16" and language.flash_attention is not False:
        table, key, value = "language", "kv_cache_type", "q8_0"
    elif vision.backend == "onnxruntime":
        table, key, value = "vision", "backend", "mtmd"
    elif vision.max_image_tokens > MIN_IMAGE_TOKENS:
        table, key, value = (
            "vision",
            "max_image_tokens",
            max(MIN_IMAGE_TOKENS, math.floor(vision.max_image_tokens * 0.75)),
        )
    elif language.context > MIN_CONTEXT:
        table, key, value = "language", "context", max(MIN_CONTEXT, math.floor(language.context * 0.75))
    else:
        return None
    smaller = msgspec.structs.replace(getattr(config, table), **{key: value})
    return msgspec.structs.replace(config, **{table: smaller}), f"{table}.{key}", value
