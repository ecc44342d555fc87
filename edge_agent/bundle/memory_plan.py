"""The memory that serving a bundle needs, added up before anything is loaded, and what is reduced if it does not fit.

The daemon, `edge-agent check`, `edge-quantize inspect` and `edge-quantize build --fit` use this one sum. The numbers
are estimates from the manifest, rather too large than too small.

A graphics card has memory of its own: then there are two sums, and each must fit. An integrated GPU, as on a Jetson,
shares the machine's memory: then there is one. If memory is short, options are reduced in this order until all fits:

1. advanced.mmap, on a CPU: repacked weights are no longer mapped as well
2. advanced.kv_cache_type: 8 bit instead of 16, which no reproducible answer can have. Not where the configuration asks
   for `profile: reproducible` or `advanced.reproducible: true`, or forbids flash attention
3. vision.backend: mtmd instead of onnxruntime, which holds the encoder in float32; the same embeddings, slower on a CPU
4. vision.max_image_tokens: in steps of a quarter, down to MIN_IMAGE_TOKENS; small objects are recognised less well. Not
   where the encoder takes images of one size, or the model is text-only
5. language.context: in steps of a quarter, down to MIN_CONTEXT

If that is not enough, NotEnoughMemoryError names the sum and the memory that is short.
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
# What CUDA takes for itself on each card: with it, the sum of a 3B on an H200 is 4.1 GiB, and 4.0 were measured.
GPU_CONTEXT_MIB = 900
ON_CARD = ("language model", "cache", "scores and logits", "vision encoder", "adapters", "the GPU's context")
KV_CELL_ALIGNMENT = 256  # llama.cpp makes caches of a multiple of this
Q8_0_SHARE = 34 / 64  # of 16 bit


class NotEnoughMemoryError(UserError):
    """One line, with the sum. A later start can succeed, when another program has released its memory."""

    fault: FaultName | None = "memory"


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """The GPU that serves the language model."""

    free_mib: float | None  # of all its devices; None: unknown
    own_memory: bool  # a graphics card; False: it shares the machine's memory
    n_devices: int = 1


class MemoryPlan(msgspec.Struct, frozen=True):
    """The configuration after the reductions, and the memory that it needs."""

    config: Config
    parts_mib: dict[str, float]  # in the machine's memory
    reductions: dict[str, object]  # key of the configuration -> its reduced value
    card_parts_mib: dict[str, float] = {}  # in a graphics card's own memory

    @property
    def mib(self) -> float:
        return sum(self.parts_mib.values())

    @property
    def card_mib(self) -> float:
        return sum(self.card_parts_mib.values())


def needed_mib(
    config: Config, manifest: Manifest, adapters_mib: float = 0.0, gpu: Gpu | None = None
) -> dict[str, float]:
    """Part -> MiB, for this configuration as it is, in whichever memory. adapters_mib: of the files of all LoRA
    adapters. gpu: None: the model runs on the CPU."""
    model, size = manifest.model, {name: file.bytes / MIB for name, file in manifest.files.items()}
    language = config.language
    switches = resolve(config, gpu=gpu is not None)
    repacked = sum(n for name, n in manifest.bytes_by_type.items() if name in REPACKED) / MIB
    on_cpu = 1.0 - _share_on_gpu(config, manifest, gpu)
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
        "the GPU's context": 0.0 if gpu is None else gpu.n_devices * GPU_CONTEXT_MIB,
        "frames": _frames_mib(config.camera),
        "the process": PROCESS_MIB,
    }


def _share_on_gpu(config: Config, manifest: Manifest, gpu: Gpu | None) -> float:
    """Of the language model's layers. llama.cpp counts the head as one more layer, and -1 means all."""
    layers, n_layers = config.language.gpu_layers, manifest.model.layers + 1
    if gpu is None:
        return 0.0
    return 1.0 if layers < 0 else min(1.0, layers / n_layers)


def _divided(
    config: Config, manifest: Manifest, adapters_mib: float, gpu: Gpu | None
) -> tuple[dict[str, float], dict[str, float]]:
    """(parts in the machine's memory, parts in a card's own)."""
    parts = needed_mib(config, manifest, adapters_mib, gpu)
    if gpu is None or not gpu.own_memory:
        return parts, {}
    share = _share_on_gpu(config, manifest, gpu)
    of_layers = {"language model", "cache", "adapters"}
    card = {name: parts[name] * (share if name in of_layers else 1.0) for name in ON_CARD}
    machine = {name: mib - card.get(name, 0.0) for name, mib in parts.items()}
    if resolve(config, gpu=True).vision_backend == "onnxruntime":
        machine["vision encoder"] = parts["vision encoder"]  # where onnxruntime cannot use the card, it is here
    return machine, card


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


def plan_memory(
    config: Config, manifest: Manifest, free_mib: float | None, adapters_mib: float = 0.0, gpu: Gpu | None = None
) -> MemoryPlan:
    """The configuration, reduced until it fits into free_mib and the memory of the GPU. Raises NotEnoughMemoryError.

    free_mib: of the machine. None, also for the GPU: unknown; then nothing is reduced for it.
    """
    reductions: dict[str, object] = {}
    card_free_mib = gpu.free_mib if gpu is not None else None
    if gpu is not None and not gpu.own_memory:  # one memory: the smaller of the two figures
        free_mib = min((mib for mib in (free_mib, gpu.free_mib) if mib is not None), default=None)
    while True:
        machine, card = _divided(config, manifest, adapters_mib, gpu)
        missing = _missing("memory", machine, free_mib) or _missing("GPU memory", card, card_free_mib)
        if not missing:
            return MemoryPlan(config, machine, reductions, card)
        reduced = _reduce_once(config, gpu, manifest.has_image_sizes)
        if reduced is None:
            raise NotEnoughMemoryError(
                f"{missing}; use a smaller bundle, vision.backend mtmd, or a smaller camera.max_megapixels"
            )
        config, key, value = reduced
        reductions[key] = value


def _missing(memory: str, parts: dict[str, float], free_mib: float | None) -> str:
    """Why these parts do not fit; "": they do."""
    needed_mib = sum(parts.values())
    if free_mib is None or needed_mib <= free_mib:
        return ""
    summed = " + ".join(f"{name} {mib:.0f}" for name, mib in parts.items() if mib >= 1)
    return f"{memory}: {needed_mib:.0f} MiB needed ({summed}), {free_mib:.0f} MiB free"


def _reduce_once(config: Config, gpu: Gpu | None, has_image_sizes: bool) -> tuple[Config, str, object] | None:
    """(configuration with one more reduction, its key, its new value); None: nothing can be reduced."""
    language, vision, advanced = config.language, config.vision, config.advanced
    switches = resolve(config, gpu=gpu is not None)
    keep_f16 = advanced.flash_attention is False or advanced.reproducible or config.profile == "reproducible"
    table: str
    key: str
    value: object
    if gpu is None and switches.repack and switches.mmap:
        table, key, value = "advanced", "mmap", False
    elif switches.kv_cache_type == "f16" and not keep_f16:
        table, key, value = "advanced", "kv_cache_type", "q8_0"
    elif switches.vision_backend == "onnxruntime":
        table, key, value = "vision", "backend", "mtmd"
    elif has_image_sizes and vision.max_image_tokens > MIN_IMAGE_TOKENS:
        table, key = "vision", "max_image_tokens"
        value = max(MIN_IMAGE_TOKENS, math.floor(vision.max_image_tokens * 0.75))
    elif language.context > MIN_CONTEXT:
        table, key = "language", "context"
        value = max(MIN_CONTEXT, math.floor(language.context * 0.75))
    else:
        return None
    smaller = msgspec.structs.replace(getattr(config, table), **{key: value})
    return msgspec.structs.replace(config, **{table: smaller}), f"{table}.{key}", value
