"""One llama.cpp model and its context: embedding rows or tokens in, logits out. Knows sequences, knows no prompts.

Two sequences with KV cells of their own: ACTION_SEQ answers every frame, TEXT_SEQ writes text about a frame that it
copied from ACTION_SEQ. The cells are separate because with shared cells the position of the text would change the order
in which the attention of the actions is summed. A llama.cpp batch holds tokens or embeddings; text in the same batch as
image rows is therefore looked up in the token-embedding table (`embed`).

llama.cpp uses other kernels for one row than for many, and on a CPU others for the last few rows of a batch. The logits
depend on how a prompt is divided into batches. With `reproducible`, batches of ACTION_SEQ are padded to a multiple of
`row_alignment` rows and outputs, and the padding is dropped afterwards: then the same rows give the same bits.
batch_shape.py finds the multiple. Without `reproducible`, CHECK_SEQ evaluates a step alone (`logits_alone`).

The ctypes structs follow llama.cpp's head and change with every release of llama-cpp-python. This file checks the exact
version. Only this file, batch.py and vision_encoder.py use them.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import llama_cpp
import llama_cpp.llama_cpp as ll
import msgspec
import numpy as np

from edge_agent.board.control_groups import available_cores
from edge_agent.bundle.files import file_stamp
from edge_agent.bundle.gguf_package import gguf
from edge_agent.bundle.manifest import EmbeddingInfo
from edge_agent.errors import ConfigError, FaultName, UserError
from edge_agent.model.batch import ACTION_SEQ, CHECK_SEQ, N_SEQUENCES, TEXT_SEQ, BatchArrays, padded_copy
from edge_agent.model.fallbacks import language_facts
from edge_agent.model.families import not_served
from edge_agent.model.frame_buffer import FrameBuffer
from edge_agent.model.gpu import uses_gpu

LLAMA_CPP_PYTHON = "0.3.36"
ROW_ALIGNMENT = 16  # rows that the widest kernels (AVX-512) take at once; the others take 4 or 8
LOAD_MODES = {  # by mmap and mlock
    (False, False): ll.LLAMA_LOAD_MODE_NONE,
    (False, True): ll.LLAMA_LOAD_MODE_MLOCK,
    (True, False): ll.LLAMA_LOAD_MODE_MMAP,
    (True, True): ll.LLAMA_LOAD_MODE_MMAP_MLOCK,
}
FLASH_ATTENTION = {
    None: ll.LLAMA_FLASH_ATTN_TYPE_AUTO,
    False: ll.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    True: ll.LLAMA_FLASH_ATTN_TYPE_ENABLED,
}
KV_CACHE_TYPES = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
KV_CELL_ALIGNMENT = 256  # llama.cpp makes caches of a multiple of this
ROWS_PER_STEP = 512  # llama.cpp's physical batch; a larger one only costs memory on the boards we run on
MAX_TOKEN_BYTES = 256

if llama_cpp.__version__ != LLAMA_CPP_PYTHON:
    raise ImportError(
        f"llama-cpp-python: expected {LLAMA_CPP_PYTHON}, found {llama_cpp.__version__}: its structs move with every "
        "release; install the expected one"
    )

_log: Callable[[str], None] | None = None


@ll.llama_log_callback
def _on_log(level: int, text: bytes, _user: object) -> None:
    if _log is not None:
        _log(text.decode("utf-8", "replace"))
    elif level == 4:  # GGML_LOG_LEVEL_ERROR
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, text)


# The callbacks must outlive every native thread: module level, never freed.
ll.llama_log_set(_on_log, ctypes.c_void_p(0))
ll.llama_backend_init()

_graph_observer: Callable[[int, bool], bool] | None = None


@ll.ggml_backend_sched_eval_callback
def _on_node(node: int, ask: bool, _user: object) -> bool:
    return _graph_observer(node, ask) if _graph_observer is not None else False


def observe_graph(observer: Callable[[int, bool], bool] | None) -> None:
    """Contexts made from now on call observer(node, ask) for each node of their graph.

    node: address of a ggml_tensor. With ask true, the result says whether the observer needs this node; then it is
    called again without ask when the node is computed, and its result says whether to continue.
    """
    global _graph_observer
    _graph_observer = observer


def log_to(receiver: Callable[[str], None] | None) -> None:
    """Send llama.cpp's log lines to `receiver`. None: only errors, to stderr."""
    global _log
    _log = receiver


def cells_of(context: int) -> int:
    """Cells of one sequence, for a configured context of this many tokens."""
    return -(-context // KV_CELL_ALIGNMENT) * KV_CELL_ALIGNMENT


def usable_context(context: int, alignment: int) -> int:
    """Tokens of a configured context that a prompt can use. alignment: batches are padded to it, in cells too."""
    return min(context, cells_of(context) - alignment + 1)


def context_for(n_tokens: int, alignment: int) -> int:
    """The smallest context to configure in which n_tokens can be used."""
    return n_tokens if usable_context(n_tokens, alignment) >= n_tokens else cells_of(n_tokens) + 1


class LlamaError(UserError):
    """llama.cpp refused; the process cannot continue. One line."""

    fault: FaultName | None = "native"


class LlamaOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to load and run a model. Every value is decided here; edge_agent/profile.py decides for a configuration."""

    context: int  # tokens of each sequence
    threads: int = 0  # 0: available_cores()
    gpu_layers: int = -1  # -1: all that fit
    adapters: dict[str, str] = {}  # name -> path of a GGUF adapter
    repack: bool = True
    mmap: bool = False
    mlock: bool = False
    kv_cache_type: Literal["f16", "q8_0"] = "f16"
    flash_attention: bool | None = False  # None: llama.cpp decides
    reproducible: bool = True  # on a CPU only
    vocabulary_only: bool = False  # no weights: a prompt can be laid out, and nothing can be evaluated

    def __post_init__(self) -> None:
        if self.reproducible and (self.flash_attention or self.kv_cache_type != "f16"):
            raise ValueError("reproducible: not possible with flash attention or an 8-bit cache")


class LlamaContext:
    """Owns a model and a context; close() frees both. For one thread at a time."""

    def __init__(
        self,
        path: Path,
        options: LlamaOptions,
        embedding: EmbeddingInfo,
        progress: Callable[[float], None] = lambda part: None,
    ) -> None:
        """Load. progress(0…1) is called while weights are read. Raises LlamaError, ConfigError (an adapter)."""
        self.context = self.model = 0  # llama.cpp's handles; 0: none
        self._table = _EmbeddingTable(path, embedding)
        try:
            self.model, log = _load_model(path, options, progress)
            info = ll.llama_print_system_info().decode("utf-8", "replace")
            self.facts = language_facts(log, info, is_gpu_build=_is_gpu_build())
            self.vocab = ll.llama_model_get_vocab(self.model)
            self.n_embd: int = ll.llama_model_n_embd(self.model)
            self.n_vocab: int = ll.llama_vocab_n_tokens(self.vocab)
            self.n_calls = self.n_rows = 0  # of llama_decode, and the rows it was given
            self.on_gpu = uses_gpu(options.gpu_layers)
            self.reproducible = options.reproducible and not self.on_gpu
            self.row_alignment = ROW_ALIGNMENT if self.reproducible else 1  # of ACTION_SEQ; at most ROW_ALIGNMENT
            self.can_batch_text = not self.reproducible  # one row of TEXT_SEQ in a batch of ACTION_SEQ: shared cells
            self.configured_context = options.context
            # llama.cpp would round a context up by itself, and use less of it for each sequence.
            n_cells = cells_of(options.context)
            self.n_ctx = usable_context(options.context, self.row_alignment)
            if options.vocabulary_only:
                return
            # Before the context, which reserves its graph for adapters. They are freed with the model.
            self._adapters = {name: _load_adapter(self.model, name, file) for name, file in options.adapters.items()}
            self._n_ubatch = min(ROWS_PER_STEP, options.context)
            self.context = _make_context(self.model, path, options, n_cells, unified=self.can_batch_text)
        except BaseException:
            self.close()
            raise
        self.memory = ll.llama_get_memory(self.context)
        self._batch = BatchArrays(n_cells)
        self._logits_key, self._logits_view = (0, 0), np.empty((0, 0), np.float32)
        self._piece = ctypes.create_string_buffer(MAX_TOKEN_BYTES)

    def close(self) -> None:
        if self.context:
            ll.llama_free(self.context)
        if self.model:
            ll.llama_model_free(self.model)
        self._table.close()
        self.context = self.model = 0

    def __enter__(self) -> LlamaContext:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def set_adapter(self, name: str) -> None:
        """Activate one adapter and deactivate any other; "": none. What is in the cache was computed under the previous
        adapter and is not recomputed. Raises LlamaError."""
        active = [self._adapters[name]] if name else []
        pointers = (ll.llama_adapter_lora_p_ctypes * 1)(*active)
        if ll.llama_set_adapters_lora(self.context, pointers, len(active), (ctypes.c_float * 1)(1.0)):
            raise LlamaError(f"llama.cpp refuses the adapter {name!r}")

    def context_for(self, n_tokens: int) -> int:
        """The smallest `language.context` in which n_tokens fit."""
        return context_for(n_tokens, ROW_ALIGNMENT if self.reproducible else 1)

    # -- text ---------------------------------------------------------------------------------------------------------

    def tokens(self, text: str) -> list[int]:
        """Plain text -> token ids. `[INST]` or `</s>` inside it stay letters: text cannot change the prompt layout."""
        raw = text.encode()
        out = (ll.llama_token * (len(raw) + 8))()
        n = ll.llama_tokenize(self.vocab, raw, len(raw), out, len(out), False, False)
        return list(out[:n])

    @property
    def bos(self) -> int | None:
        """What begins every text of this vocabulary; None: nothing does."""
        return int(ll.llama_vocab_bos(self.vocab)) if ll.llama_vocab_get_add_bos(self.vocab) else None

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of a token, possibly a part of a letter; a special token has none."""
        n = ll.llama_token_to_piece(self.vocab, token, self._piece, MAX_TOKEN_BYTES, 0, False)
        return ctypes.string_at(self._piece, max(n, 0))

    def token_text(self, token: int) -> str:
        """The token's name in the vocabulary, also of special tokens; empty for an unknown id."""
        text = ll.llama_vocab_get_text(self.vocab, token) if 0 <= token < self.n_vocab else None
        return (text or b"").decode("utf-8", "replace")

    def is_end_of_generation(self, token: int) -> bool:
        return bool(ll.llama_vocab_is_eog(self.vocab, token))

    def embed(self, tokens: list[int]) -> np.ndarray:
        """Rows of the token-embedding table, as the model itself reads them: (n, n_embd) float32."""
        return self._table.rows(tokens)

    # -- cache --------------------------------------------------------------------------------------------------------

    def truncate(self, sequence: int, start: int) -> None:
        """Drop a sequence's cells from position `start` on."""
        ll.llama_memory_seq_rm(self.memory, sequence, start, -1)

    def fork_sequence(self, stop: int) -> None:
        """Make TEXT_SEQ a copy of what ACTION_SEQ holds before position `stop`; its earlier cells are dropped."""
        self.truncate(TEXT_SEQ, 0)
        ll.llama_memory_seq_cp(self.memory, ACTION_SEQ, TEXT_SEQ, -1, -1)
        ll.llama_memory_seq_rm(self.memory, TEXT_SEQ, stop, -1)

    def logits_alone(self, tokens: list[int], start: int) -> np.ndarray:
        """Logits after tokens at start…, in a batch of their own behind what ACTION_SEQ holds before `start`: a view.
        ACTION_SEQ keeps its cells, also those from `start` on. Only where can_batch_text is true."""
        ll.llama_memory_seq_cp(self.memory, ACTION_SEQ, CHECK_SEQ, 0, start)
        logits = self.logits_after_last(tokens, start, CHECK_SEQ)
        self.truncate(CHECK_SEQ, 0)
        return logits

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def logits_after_last(
        self, batch: list[int] | np.ndarray | FrameBuffer, start: int, sequence: int = ACTION_SEQ
    ) -> np.ndarray:
        """Evaluate a batch at positions start… -> logits after its last row, (n_vocab,) float32.

        batch: token ids, or embedding rows (n, n_embd) float32. The result is a view into llama.cpp's memory that is
        valid until the next call. Padding is written into a FrameBuffer; an array of rows is copied for it.
        Raises LlamaError when the positions do not fit.
        """
        return self._evaluate(batch, start, sequence, [len(batch) - 1], None)[0]

    def logits_at(
        self,
        batch: list[int] | np.ndarray | FrameBuffer,
        start: int,
        output_rows: list[int],
        sequence: int = ACTION_SEQ,
        text_position: int | None = None,
        alignment: int = 0,
    ) -> list[np.ndarray]:
        """The same -> logits after each of the output rows (indices into the batch, rising), (n_vocab,) float32 each.

        alignment: pad the batch to a multiple of so many rows; 0: as always.

        text_position: the last row is not of `sequence` but the next of TEXT_SEQ, at this position. Only where
        can_batch_text is true.
        """
        return self._evaluate(batch, start, sequence, output_rows, text_position, alignment)

    def evaluate_image(self, rows: np.ndarray, start: int) -> None:
        """Evaluate the rows of one image, (n, n_embd) float32, on ACTION_SEQ; each attends to all others.

        Raises LlamaError."""
        if len(rows) > self._n_ubatch:  # llama.cpp would abort
            raise LlamaError(f"an image of {len(rows)} rows; this family needs language.context of {len(rows)} or more")
        ll.llama_set_causal_attn(self.context, False)
        try:
            self._evaluate(rows, start, ACTION_SEQ, [len(rows) - 1], None, alignment=1)  # padding would be attended to
        finally:
            ll.llama_set_causal_attn(self.context, True)

    def _evaluate(
        self,
        batch: list[int] | np.ndarray | FrameBuffer,
        start: int,
        sequence: int,
        output_rows: list[int],
        text_position: int | None,
        alignment: int = 0,  # 0: the sequence's own
    ) -> list[np.ndarray]:
        n = len(batch)
        stop = max(start + n - (text_position is not None), 1 + (text_position or 0))
        if not 0 < n <= self.n_ctx or stop > self.n_ctx:
            raise LlamaError(f"positions {start} to {stop} do not fit a context of {self.n_ctx} tokens")
        alignment = alignment or (self.row_alignment if sequence == ACTION_SEQ else 1)
        n_padded = n + -n % alignment
        arrays = self._batch
        arrays.place(n_padded, start, sequence)
        if text_position is not None:
            arrays.place_last_in_text(n, text_position)
        places, n_outputs = arrays.mark_outputs(n_padded, output_rows, alignment)
        if isinstance(batch, list):
            arrays.set_tokens(batch, n_padded)
        else:
            rows = batch.padded(n_padded) if isinstance(batch, FrameBuffer) else padded_copy(batch, n_padded)
            arrays.set_rows(rows)
        status = ll.llama_decode(self.context, arrays.native)
        if status:
            raise LlamaError(f"llama_decode returned {status} for {n_padded} rows (1: the cache is full)")
        self._table.check_unchanged()
        self.n_calls, self.n_rows = self.n_calls + 1, self.n_rows + n
        if n_padded > n:
            self.truncate(sequence, start + n)
        logits = self._logits(n_outputs)
        return [logits[place] for place in places]

    def _logits(self, n: int) -> np.ndarray:
        """llama.cpp's own memory: (n, n_vocab) float32. The view is made once for each address and n."""
        address = ctypes.addressof(ll.llama_get_logits(self.context).contents)
        if self._logits_key != (address, n):
            memory = (ctypes.c_float * (n * self.n_vocab)).from_address(address)
            self._logits_view = np.ctypeslib.as_array(memory).reshape(n, self.n_vocab)
            self._logits_key = (address, n)
        return self._logits_view


class _EmbeddingTable:
    """token_embd.weight, mapped; rows are dequantised on demand and kept, because prompts repeat."""

    def __init__(self, path: Path, embedding: EmbeddingInfo) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise LlamaError(f"{path}: cannot be read: {error.strerror}") from None
        self._stamp = file_stamp(self._descriptor)
        try:
            self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            os.close(self._descriptor)
            raise LlamaError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if embedding.ggml_type not in gguf.GGMLQuantizationType.__members__ or embedding.offset >= len(self._map):
            self.close()
            raise LlamaError(
                f"{path}: no {embedding.ggml_type} embedding at {embedding.offset}; build the bundle again"
            )
        self._type = gguf.GGMLQuantizationType[embedding.ggml_type]
        self._offset, self._row_bytes = embedding.offset, embedding.row_bytes
        self._cached: dict[int, np.ndarray] = {}

    def rows(self, tokens: list[int]) -> np.ndarray:
        for token in tokens:
            if token not in self._cached:
                start = self._offset + token * self._row_bytes
                raw = np.frombuffer(self._map[start : start + self._row_bytes], np.uint8)
                self._cached[token] = gguf.quants.dequantize(raw, self._type).reshape(-1)
        return np.stack([self._cached[token] for token in tokens])

    def check_unchanged(self) -> None:
        """Mapped weights and rows change with the file. Raises LlamaError: another process has written to it."""
        if file_stamp(self._descriptor) != self._stamp:
            raise LlamaError("language.gguf: changed while it is in use; stop the daemon before you replace a bundle")

    def close(self) -> None:
        self._map.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def _is_gpu_build() -> bool:
    """Whether llama.cpp can use a GPU, or could if it found one: then it has a library for CUDA."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    return bool(ll.llama_supports_gpu_offload()) or any(folder.glob("libggml-cuda*"))


def _load_model(path: Path, options: LlamaOptions, progress: Callable[[float], None]) -> tuple[int, list[str]]:
    """(llama.cpp's handle of the model, what llama.cpp logged)."""

    @ll.llama_progress_callback
    def on_progress(part: float, _user: object) -> bool:
        progress(part)
        return True

    params = ll.llama_model_default_params()
    params.n_gpu_layers = options.gpu_layers
    params.vocab_only = options.vocabulary_only
    if options.gpu_layers == 0:
        # With any device in the list, llama.cpp still computes large batches on a GPU, with copies of the weights.
        no_devices = ctypes.c_void_p(None)
        params.devices = ctypes.addressof(no_devices)
    params.use_extra_bufts = options.repack
    params.load_mode = LOAD_MODES[options.mmap, options.mlock]
    params.progress_callback = on_progress
    lines: list[str] = []
    log_to(lambda text: lines.append(text.strip()))
    model = ll.llama_model_load_from_file(os.fsencode(path), params)
    log_to(None)
    if not model:
        raise LlamaError(f"{path}: llama.cpp cannot load it: {_first_error(lines)}")
    if why := not_served(model):
        ll.llama_model_free(model)
        raise LlamaError(f"{path}: {why}")
    return model, lines


def _load_adapter(model: int, name: str, path: str) -> int:
    """llama.cpp's handle of the adapter."""
    lines: list[str] = []
    log_to(lambda text: lines.append(text.strip()))
    adapter = ll.llama_adapter_lora_init(model, os.fsencode(path))
    log_to(None)
    if not adapter:
        raise ConfigError(f"language.adapters: {name}: {path}: llama.cpp cannot load it: {_first_error(lines)}")
    return adapter


def _make_context(model: int, path: Path, options: LlamaOptions, n_cells: int, *, unified: bool) -> int:
    """llama.cpp's handle of the context. unified: the sequences share their cells."""
    params = ll.llama_context_default_params()
    params.n_ctx, params.n_batch = 2 * n_cells, n_cells
    params.n_ubatch = min(ROWS_PER_STEP, options.context)
    params.n_seq_max = N_SEQUENCES if unified else 2
    params.kv_unified = unified
    params.n_threads = params.n_threads_batch = options.threads or available_cores()
    params.no_perf = True
    params.type_k = params.type_v = KV_CACHE_TYPES[options.kv_cache_type]
    params.flash_attn_type = FLASH_ATTENTION[options.flash_attention]
    if _graph_observer is not None:
        params.cb_eval = _on_node
    context = ll.llama_init_from_model(model, params)
    if not context:
        raise LlamaError(f"{path}: llama.cpp cannot make a context of {options.context} tokens; lower language.context")
    return context


def _first_error(lines: list[str]) -> str:
    errors = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    return (errors or lines or ["no reason given"])[0][:300]
