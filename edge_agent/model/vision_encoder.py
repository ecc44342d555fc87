"""Image -> embeddings for the language model, by onnxruntime or by llama.cpp's mtmd.

Both encoders take the same image, already on the 28-pixel grid, and give the same rows: one per 28x28 pixels, line by
line, with an [IMG_BREAK] row between lines and none after the last. Gemma's encoder has no such rows. An encoder keeps
only its buffers from one frame to the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Literal, NamedTuple

import llama_cpp.llama_cpp as ll
import llama_cpp.mtmd_cpp as mtmd
import numpy as np

from edge_agent.board.control_groups import available_cores
from edge_agent.config import state_dir
from edge_agent.errors import FaultName, UserError
from edge_agent.model.preprocess import Preprocessor, n_embedding_rows

TENSORRT = "TensorrtExecutionProvider"
# Best first. onnxruntime falls back to the CPU silently when a provider cannot start: `runs` differs from `asked` then.
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


class VisionError(UserError):
    """The encoder refused; the process cannot continue. One line."""

    fault: FaultName | None = "native"


class EncoderOptions(NamedTuple):
    """Decided values; edge_agent/profile.py decides for a configuration."""

    backend: Literal["onnxruntime", "mtmd"]
    threads: int  # 0: available_cores()
    tensorrt: bool  # onnxruntime only
    gpu: bool  # mtmd only: use a GPU if llama.cpp can


def check_tensorrt(available: list[str]) -> None:
    """Raises VisionError if onnxruntime has no TensorRT. available: its execution providers."""
    if TENSORRT not in available:
        raise VisionError(
            f"vision.tensorrt: onnxruntime here has only {', '.join(available)}; install one with TensorRT, or set it "
            "to false",
            "configuration",
        )


class OnnxEncoder:
    """vision.onnx through onnxruntime."""

    def __init__(self, path: Path, preprocessor: Preprocessor, threads: int, tensorrt: bool = False) -> None:
        """threads: 0 for available_cores(). tensorrt: try TensorRT's provider first. Raises VisionError when it is not
        installed, or when the file cannot be loaded."""
        from edge_agent.model.onnx_runtime import onnxruntime  # 20 MB that mtmd does not need

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or available_cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Spinning threads would take the cores from the language model between two frames.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        available = onnxruntime.get_available_providers()
        providers: list = [name for name in PROVIDERS if name in available]
        if tensorrt:
            check_tensorrt(available)
        if tensorrt:
            providers.insert(0, (TENSORRT, _tensorrt_options()))
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # onnxruntime's own classes have no public base class
            raise VisionError(f"{path}: onnxruntime cannot load it: {str(error)[:300]}") from None
        self._preprocessor = preprocessor
        self._binding = self._session.io_binding()
        self.n_embd: int = self._session.get_outputs()[0].shape[1]
        self.asked = TENSORRT if tensorrt else providers[0]  # the best execution provider; `runs`: the one in use
        self.runs = self._session.get_providers()[0]
        self.provider = f"onnxruntime {self.runs}"

    def encode(self, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """image: (H, W, 3) uint8 RGB on the grid -> (n_rows, n_embd) float32: `out`, which has this shape, or new."""
        unit = self._preprocessor.unit
        rows = _output_rows(out, n_embedding_rows(image.shape[0] // unit, image.shape[1] // unit), self.n_embd)
        self._binding.bind_cpu_input("pixel_values", self._preprocessor.pixels(image))
        self._binding.bind_output("rows", "cpu", 0, np.float32, rows.shape, rows.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        return rows

    def close(self) -> None:
        self._session = self._binding = None


def _tensorrt_options() -> dict[str, object]:
    """TensorRT makes an engine for a frame size when the first such frame comes, which is the warm-up's. It is kept."""
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

    The [IMG_BREAK] rows are written here: llama.cpp makes them by multiplying uninitialised memory with zero, which
    gives NaN whenever that memory holds a NaN.
    """

    def __init__(
        self, path: Path, model: int, break_row: np.ndarray | None, unit: int, threads: int, gpu: bool
    ) -> None:
        """model: llama.cpp's handle of the language model, whose width the projector must match. break_row: (n_embd,)
        float32, the [IMG_BREAK] embedding; None: the encoder has no such rows. unit: side of an image token, pixels.
        threads: 0 for available_cores(). Raises VisionError."""
        self._break_row, self._unit = break_row, unit
        self.asked = self.runs = ""  # execution providers are onnxruntime's
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = gpu
        params.n_threads = threads or available_cores()
        params.print_timings = False
        params.warmup = False  # the process warms up with a frame of the camera's size
        self._context = mtmd.mtmd_init_from_file(os.fsencode(path), model, params)
        if not self._context:
            raise VisionError(f"{path}: llama.cpp's mtmd cannot load it for this language model")
        self.n_embd: int = ll.llama_model_n_embd(model)
        self.provider = "mtmd " + ("GPU" if gpu and ll.llama_supports_gpu_offload() else "CPU")

    def encode(self, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """image: (H, W, 3) uint8 RGB on the grid -> (n_rows, n_embd) float32: `out`, which has this shape, or new."""
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
                    rows, columns = _output_rows(out, n, self.n_embd), width // self._unit
                    rows[:] = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self._context), rows.shape)
                    if self._break_row is not None:
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


def _output_rows(out: np.ndarray | None, n: int, n_embd: int) -> np.ndarray:
    if out is None:
        return np.empty((n, n_embd), np.float32)
    if len(out) != n:
        raise VisionError(f"the encoder gives {n} rows for an image, expected {len(out)}")
    return out


# The encoder logs with its own hooks; one quiet callback serves both, and must never be freed.
@ll.llama_log_callback
def _on_log(level: int, text: bytes, _user: object) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, text)


mtmd.mtmd_log_set(_on_log, ctypes.c_void_p(0))
mtmd.mtmd_helper_log_set(_on_log, ctypes.c_void_p(0))


def open_encoder(
    path: Path, options: EncoderOptions, preprocessor: Preprocessor, model: int, break_row: np.ndarray | None
) -> OnnxEncoder | MtmdEncoder:
    """The encoder that the options name, from its file. model, break_row: as for MtmdEncoder. Raises VisionError."""
    if options.backend == "mtmd":
        return MtmdEncoder(path, model, break_row, preprocessor.unit, options.threads, options.gpu)
    encoder = OnnxEncoder(path, preprocessor, options.threads, options.tensorrt)
    n_embd = ll.llama_model_n_embd(model)
    if encoder.n_embd != n_embd:  # mtmd checks this by itself
        raise VisionError(
            f"{path}: rows of {encoder.n_embd} numbers, but the language model takes {n_embd}; the two belong to "
            "different models: build the bundle again"
        )
    return encoder
