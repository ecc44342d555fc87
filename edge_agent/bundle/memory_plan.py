"""The memory that serving a bundle needs, added up before anything is loaded, and what is reduced if it does not fit.

The daemon, `edge-agent check`, `edge-quantize inspect` and `edge-quantize build --fit` use this one sum. The numbers
are estimates from the manifest, rather too large than too small. If memory is short, options are reduced in this order
until the sum fits:

1. advanced.mmap: repacked weights are no longer mapped as well
2. advanced.kv_cache_type: 8 bit instead of 16; with it, an answer can depend on the draft. Not where the configuration
   asks for `profile: reproducible` or `advanced.reproducible: true`, or forbids flash attention
3. vision.backend: mtmd instead of onnxruntime, which holds the encoder in float32; the same embeddings, slower on a CPU
4. vision.max_image_tokens: in steps of a quarter, down to MIN_IMAGE_TOKENS; small objects are recognised less well
5. language.context: in steps of a quarter, down to MIN_CONTEXT

If that is not enough, NotEnoughMemoryError names the sum.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from edge_agent.bundle.gguf_package import gguf
from edge_agent.bundle.manifest import LANGUAGE, MMPROJ, VISION, Manifest
from edge_agent.config import CameraConfig, Config
from edge_agent.errors import FaultName, UserError
from edge_agent.profile import resolve

MIB = 1 << 20
PROCESS_MIB = 150  # Python, libraries
# Frames of the largest size that the configuration allows: the slot's three, and what the camera process holds of one
# more; a frame that is pushed can be in the socket twice beside it.
FRAMES, PUSHED_FRAMES = 4, 6
MIN_IMAGE_TOKENS, MIN_CONTEXT = 64, 640
ROWS_PER_STEP = 512  # llama.cpp's physical batch
REPACKED = {"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "Q2_K"}  # by the kernels of x86-64 or of ARM
FLOAT32_BYTES = 4
KV_CELL_ALIGNMENT = 256  # llama.cpp makes caches of a multiple of this
Q8_0_SHARE = 34 / 64  # of 16 bit


class NotEnoughMemoryError(UserError):
    """One line, with the sum. A later start can succeed, when another program has released its memory."""

    fault: FaultName | None = "memory"


class MemoryPlan(msgspec.Struct, frozen=True):
    """The configuration after the reductions, and the memory that it needs."""

    config: Config
    parts_mib: dict[str, float]
    reductions: dict[str, object]  # key of the configuration -> its reduced value

    @property
    def mib(self) -> float:
        return sum(self.parts_mib.values())


def needed_mib(config: Config, manifest: Manifest, adapters_mib: float = 0.0) -> dict[str, float]:
    """Part -> MiB, for this configuration as it is. adapters_mib: of the files of all LoRA adapters."""
    model, size = manifest.model, {name: file.bytes / MIB for name, file in manifest.files.items()}
    language = config.language
    switches = resolve(config, gpu=False)
    repacked = sum(n for name, n in manifest.bytes_by_type.items() if name in REPACKED) / MIB
    on_cpu = 0.0 if language.gpu_layers > 0 else 1.0
    cells = math.ceil(language.context / KV_CELL_ALIGNMENT) * KV_CELL_ALIGNMENT
    # Attention scores of one layer. 64: the narrowest head, which makes the most heads.
    scores_mib = model.hidden / 64 * language.context * ROWS_PER_STEP * FLOAT32_BYTES / MIB
    return {
        "language model": size[LANGUAGE],
        "its file's pages": repacked * on_cpu if switches.repack and switches.mmap else 0.0,
        "cache": 2 * cells * model.kv_bytes_per_token / MIB * (1.0 if switches.kv_cache_type == "f16" else Q8_0_SHARE),
        "scores and logits": scores_mib + 16 * model.vocab * FLOAT32_BYTES / MIB,
        "vision encoder": _vision_mib(config, manifest, switches.vision_backend),
        "adapters": adapters_mib,
        "frames": _frames_mib(config.camera),
        "the process": PROCESS_MIB,
    }


def _frames_mib(camera: CameraConfig) -> float:
    n_frames = PUSHED_FRAMES if camera.source.startswith("zmq:") else FRAMES
    return n_frames * 3 * camera.max_pixels / MIB


def adapters_mib(config: Config) -> float:
    """Sizes of the configured adapters' files, added up, MiB. A missing file counts as 0."""
    return sum(Path(path).stat().st_size for path in config.language.adapters.values() if Path(path).is_file()) / MIB


def _vision_mib(config: Config, manifest: Manifest, backend: str) -> float:
    if manifest.vision is None:
        return 0.0
    vision = manifest.vision
    patches = vision.merge**2 * config.vision.max_image_tokens
    if vision.fixed is not None:
        patches = math.prod(vision.fixed) // vision.patch**2
    scores_mib = 16 * patches * patches * FLOAT32_BYTES / MIB  # attention scores of one layer with 16 heads
    if backend == "mtmd" or VISION not in manifest.files:
        return manifest.files[MMPROJ].bytes / MIB + scores_mib
    stored_mib = manifest.files[VISION].bytes / MIB
    float32_mib = (manifest.model.parameters - _elements(manifest.bytes_by_type)) * FLOAT32_BYTES / MIB
    # onnxruntime computes in float32 and keeps the stored weights as well, unless they are float32 already.
    return max(stored_mib, float32_mib) + (stored_mib if stored_mib < 0.9 * float32_mib else 0.0) + scores_mib


def _elements(bytes_by_type: dict[str, int]) -> int:
    """Number of weights of the language model."""
    sizes = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in bytes_by_type}
    return sum(n // sizes[name][1] * sizes[name][0] for name, n in bytes_by_type.items())


def plan_memory(config: Config, manifest: Manifest, free_mib: float | None, adapters_mib: float = 0.0) -> MemoryPlan:
    """The configuration, reduced until it fits into free_mib. Raises NotEnoughMemoryError.

    free_mib: None if it is unknown; then nothing is reduced.
    """
    reductions: dict[str, object] = {}
    while True:
        parts = needed_mib(config, manifest, adapters_mib)
        if free_mib is None or sum(parts.values()) <= free_mib:
            return MemoryPlan(config, parts, reductions)
        reduced = _reduce_once(config)
        if reduced is None:
            summed = " + ".join(f"{name} {n:.0f}" for name, n in parts.items() if n >= 1)
            raise NotEnoughMemoryError(
                f"memory: {sum(parts.values()):.0f} MiB needed ({summed}), {free_mib:.0f} MiB free; use a smaller "
                "bundle, vision.backend mtmd, or a smaller camera.max_megapixels"
            )
        config, key, value = reduced
        reductions[key] = value


def _reduce_once(config: Config) -> tuple[Config, str, object] | None:
    """(configuration with one more reduction, its key, its new value); None: nothing can be reduced."""
    language, vision, advanced = config.language, config.vision, config.advanced
    switches = resolve(config, gpu=False)
    keep_f16 = advanced.flash_attention is False or advanced.reproducible or config.profile == "reproducible"
    table: str
    key: str
    value: object
    if switches.repack and switches.mmap:
        table, key, value = "advanced", "mmap", False
    elif switches.kv_cache_type == "f16" and not keep_f16:
        table, key, value = "advanced", "kv_cache_type", "q8_0"
    elif switches.vision_backend == "onnxruntime":
        table, key, value = "vision", "backend", "mtmd"
    elif vision.max_image_tokens > MIN_IMAGE_TOKENS:
        table, key = "vision", "max_image_tokens"
        value = max(MIN_IMAGE_TOKENS, math.floor(vision.max_image_tokens * 0.75))
    elif language.context > MIN_CONTEXT:
        table, key = "language", "context"
        value = max(MIN_CONTEXT, math.floor(language.context * 0.75))
    else:
        return None
    smaller = msgspec.structs.replace(getattr(config, table), **{key: value})
    return msgspec.structs.replace(config, **{table: smaller}), f"{table}.{key}", value
