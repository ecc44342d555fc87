"""Image -> pixels (pure) -> rows for the language model, by onnxruntime or by llama.cpp's mtmd.

Both encoders take the same image, already on the 28-pixel grid, and give the same rows: one per 28x28 pixels, line by
line, with an [IMG_BREAK] row between lines and none after the last. Neither keeps anything from one frame to the next
but its buffers.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
from pathlib import Path

import cv2
import llama_cpp.llama_cpp as ll
import llama_cpp.mtmd_cpp as mtmd
import numpy as np

from edge_agent import bundle
from edge_agent.config import VisionConfig, state_dir

MIN_TOKENS = 8  # mtmd enlarges anything smaller by itself; so do we, so that both encoders see the same image
TENSORRT = "TensorrtExecutionProvider"
# Best first. onnxruntime falls back to the CPU without a word when a provider cannot start: `provider` says what runs.
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


class VisionError(Exception):
    """The encoder refused; the worker cannot go on."""


@functools.lru_cache(64)
def grid(height: int, width: int, max_tokens: int, vision: bundle.Vision) -> tuple[int, int]:
    """Lines and columns of merged patches for a frame: as many as it fills, at most max_tokens, longest edge capped.

    Sides are rounded up, as the reference processor does, until the budget binds; then it is the grid within the budget
    that is nearest to the frame's shape.
    """
    unit = vision.patch * vision.merge
    if vision.fixed is not None:
        return vision.fixed[0] // unit, vision.fixed[1] // unit
    longest = vision.image_size // unit
    scale = min(1.0, vision.image_size / max(height, width))
    lines, columns = height * scale / unit, width * scale / unit
    up = min(longest, math.ceil(lines)), min(longest, math.ceil(columns))
    if MIN_TOKENS <= up[0] * up[1] <= max_tokens:
        return up
    if up[0] * up[1] > max_tokens:
        fit = min(1.0, math.sqrt(max_tokens / (lines * columns)))
    else:
        fit = max(1.0, math.sqrt(MIN_TOKENS / (lines * columns)))
    lines, columns = lines * fit, columns * fit

    def distance(sides: tuple[int, int]) -> tuple[bool, float]:
        apart = [(n, side) for n, side in zip(sides, (lines, columns), strict=True)]
        return any(abs(n - side) >= 1 for n, side in apart), sum(abs(math.log(n / side)) for n, side in apart)

    sides = itertools.product(range(1, longest + 1), repeat=2)
    return min((n for n in sides if MIN_TOKENS <= n[0] * n[1] <= max_tokens), key=distance)


def n_rows(lines: int, columns: int) -> int:
    """Rows of the encoder's output: the tokens and the breaks between lines."""
    return lines * columns + lines - 1


class Budget:
    """How many image tokens a frame may have so that its answer comes in time: as many as configured, or the next
    lower step if the frames before say that it would be late. Pure."""

    STEPS = (1.0, 0.75, 0.5, 0.375, 0.25)  # of the tokens configured; a size of its own for each, so not finer
    LEAST = 64  # below that little is seen: then an answer is late, and refused
    NEWEST = 0.3  # weight of the newest frame in the running estimates
    MARGIN = 0.9  # of the time that is left, to be used
    AGAIN = 0.75  # of it, when a larger step is tried again

    def __init__(self, max_tokens: int) -> None:
        floor = min(self.LEAST, max_tokens)
        self.sizes = sorted({max(floor, int(max_tokens * step)) for step in self.STEPS}, reverse=True)
        self.tokens = max_tokens
        self._per_token_ms = self._rest_ms = 0.0

    def note(self, n_tokens: int, frame_ms: float, rest_ms: float) -> None:
        """What a frame took: encode and prefill, which grow with its tokens, and the rest, which does not."""
        newest = self.NEWEST if self._per_token_ms else 1.0  # nothing was known before the first
        self._per_token_ms += newest * (frame_ms / n_tokens - self._per_token_ms)
        self._rest_ms += newest * (rest_ms - self._rest_ms)

    def choose(self, left_ms: float) -> int:
        """For a frame whose answer has to be there in left_ms."""
        for size in self.sizes:
            share = self.AGAIN if size > self.tokens else self.MARGIN
            if size * self._per_token_ms + self._rest_ms <= share * left_ms:
                self.tokens = size
                return size
        self.tokens = self.sizes[-1]
        return self.tokens


class Preprocessor:
    """Frames -> the encoder's input, into buffers that are reused while the size stays."""

    def __init__(self, vision: bundle.Vision, max_tokens: int) -> None:
        self.vision, self.max_tokens, self.unit = vision, max_tokens, vision.patch * vision.merge  # unit: pixels
        mean, std = np.asarray(vision.mean, np.float32), np.asarray(vision.std, np.float32)
        self._scale = (1 / (255 * std)).reshape(3, 1, 1)
        self._shift = (-mean / std).reshape(3, 1, 1)
        self._image = np.empty((0, 0, 3), np.uint8)
        self._pixels = np.empty((1, 3, 0, 0), np.float32)

    def image(self, frame: np.ndarray) -> np.ndarray:
        """frame: (H, W, 3) uint8 RGB -> (28 * lines, 28 * columns, 3) uint8 RGB, a buffer good until the next call."""
        lines, columns = grid(*frame.shape[:2], self.max_tokens, self.vision)
        size = (lines * self.unit, columns * self.unit)
        if self._image.shape[:2] != size:
            self._image = np.empty((*size, 3), np.uint8)
        shrinking = frame.shape[0] > size[0] or frame.shape[1] > size[1]
        cv2.resize(frame, size[::-1], dst=self._image, interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)
        return self._image

    def pixels(self, image: np.ndarray) -> np.ndarray:
        """image on the grid -> (1, 3, H, W) float32, (RGB / 255 - mean) / std, a buffer good until the next call."""
        shape = (1, 3, *image.shape[:2])
        if self._pixels.shape != shape:
            self._pixels = np.empty(shape, np.float32)
        np.multiply(image.transpose(2, 0, 1), self._scale, out=self._pixels[0])
        self._pixels[0] += self._shift
        return self._pixels


class OnnxEncoder:
    """vision.onnx through onnxruntime."""

    def __init__(self, path: Path, preprocessor: Preprocessor, threads: int, tensorrt: bool = False) -> None:
        """tensorrt: ask for TensorRT's provider first. Raises VisionError when it is not there, or nothing loads."""
        import onnxruntime  # 20 MB that mtmd does without

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Spinning workers would take the cores from the language model between two frames.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        there = onnxruntime.get_available_providers()
        usable: list = [name for name in PROVIDERS if name in there]
        if tensorrt and TENSORRT not in there:
            raise VisionError(
                f"vision.tensorrt: onnxruntime here has only {', '.join(there)}; install one with it, or set false"
            )
        if tensorrt:
            usable.insert(0, (TENSORRT, _tensorrt_options()))
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=usable)
        except Exception as error:  # onnxruntime raises classes of its own, which share no public base
            raise VisionError(f"{path}: onnxruntime cannot load it: {str(error)[:300]}") from None
        self._preprocessor = preprocessor
        self._binding = self._session.io_binding()
        self.n_embd = self._session.get_outputs()[0].shape[1]
        self.provider = f"onnxruntime {self._session.get_providers()[0]}"

    def encode(self, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """image: (H, W, 3) uint8 RGB on the grid -> (n_rows, hidden) float32: the beginning of `out`, or new."""
        unit = self._preprocessor.unit
        rows = _rows(out, n_rows(image.shape[0] // unit, image.shape[1] // unit), self.n_embd)
        self._binding.bind_cpu_input("pixel_values", self._preprocessor.pixels(image))
        self._binding.bind_output("rows", "cpu", 0, np.float32, rows.shape, rows.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        return rows

    def close(self) -> None:
        self._session = self._binding = None


def _tensorrt_options() -> dict[str, object]:
    """An engine is made for a size of frames when the first one comes, which is the warm-up's, and kept."""
    cache = state_dir() / "tensorrt"
    cache.mkdir(parents=True, exist_ok=True)
    return {
        "trt_fp16_enable": True,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(cache),
    }


class MtmdEncoder:
    """mmproj.gguf through llama.cpp's own encoder.

    The [IMG_BREAK] rows are put in here: llama.cpp makes them by multiplying memory nobody wrote with zero, which gives
    NaN whenever that memory happens to hold one.
    """

    def __init__(self, path: Path, model: int, break_row: np.ndarray, unit: int, threads: int, gpu: bool) -> None:
        """model: llama.cpp's handle of the language model, whose width the projector must match.
        break_row: (hidden,) float32. unit: pixels per row of output, a side."""
        self._break_row, self._unit = break_row, unit
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = gpu
        params.n_threads = threads or len(os.sched_getaffinity(0))
        params.print_timings = False
        params.warmup = False  # the worker warms up with a frame of the size it will see
        self._context = mtmd.mtmd_init_from_file(os.fsencode(path), model, params)
        if not self._context:
            raise VisionError(f"{path}: llama.cpp's mtmd cannot load it for this language model")
        self._n_embd = ll.llama_model_n_embd(model)
        self.provider = "mtmd " + ("GPU" if gpu and ll.llama_supports_gpu_offload() else "CPU")

    def encode(self, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """image: (H, W, 3) uint8 RGB on the grid -> (n_rows, hidden) float32: the beginning of `out`, or new."""
        height, width = image.shape[:2]
        data = np.ascontiguousarray(image).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(width, height, data)
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            part = mtmd.mtmd_input_part(text=None, bitmap=bitmap)
            parts = (ctypes.POINTER(mtmd.mtmd_input_part) * 1)(ctypes.pointer(part))
            if mtmd.mtmd_tokenize_from_parts(self._context, chunks, parts, 1, False):
                raise VisionError(f"mtmd refused a frame of {width}x{height}")
            for i in range(mtmd.mtmd_input_chunks_size(chunks)):
                chunk = mtmd.mtmd_input_chunks_get(chunks, i)
                if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                    if status := mtmd.mtmd_encode_chunk(self._context, chunk):
                        raise VisionError(f"mtmd_encode_chunk returned {status} for a frame of {width}x{height}")
                    n = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
                    rows, columns = _rows(out, n, self._n_embd), width // self._unit
                    rows[:] = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self._context), rows.shape)
                    rows[columns :: columns + 1] = self._break_row
                    return rows
            raise VisionError(f"mtmd found no image in a frame of {width}x{height}")
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def close(self) -> None:
        if self._context:
            mtmd.mtmd_free(self._context)
            self._context = None


def _rows(out: np.ndarray | None, n: int, n_embd: int) -> np.ndarray:
    return np.empty((n, n_embd), np.float32) if out is None else out[:n]


# The encoder logs through its own hooks; llama.cpp's quiet one serves both, and must not be freed either.
@ll.llama_log_callback
def _quiet(level: int, text: bytes, _user: object) -> None:
    if level == 4:
        os.write(2, text)


mtmd.mtmd_log_set(_quiet, ctypes.c_void_p(0))
mtmd.mtmd_helper_log_set(_quiet, ctypes.c_void_p(0))


def open_encoder(
    model_bundle: bundle.Bundle,
    config: VisionConfig,
    preprocessor: Preprocessor,
    model: int,
    break_row: np.ndarray,
    gpu: bool,
) -> OnnxEncoder | MtmdEncoder:
    """The encoder the configuration asks for. Raises VisionError."""
    if config.backend == "mtmd":
        path = model_bundle.path(bundle.MMPROJ)
        return MtmdEncoder(path, model, break_row, preprocessor.unit, config.threads, gpu)
    path = model_bundle.path(bundle.VISION)
    encoder = OnnxEncoder(path, preprocessor, config.threads, config.tensorrt)
    if encoder.n_embd != len(break_row):  # mtmd asks for itself
        raise VisionError(
            f"{path}: rows of {encoder.n_embd} numbers, but the language model takes {len(break_row)}; the two belong "
            "to different models: build the bundle again"
        )
    return encoder
