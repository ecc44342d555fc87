"""One llama.cpp model and its context: rows in, logits out. Knows sequences and positions, knows no prompts.

Two sequences, each with cells of its own: ACT answers every frame, WORDS talks about a frame it has copied from ACT
while ACT goes on. (In common cells, where those of WORDS lie would change the order in which ACT's are summed.) A
llama.cpp batch holds tokens or embeddings; text that must travel with image rows is therefore looked up in the
token-embedding table (`embed`) and everything goes as one embedding batch.

On a CPU, llama.cpp takes other kernels for one row than for many, and others for the last few of a batch: an answer
would depend on how its prompt was cut into batches. So ACT's rows come in sixteens, and as many outputs: with rows that
mean nothing behind the others, dropped afterwards. Then the same rows give the same bits, however they are cut.

The ctypes structs follow llama.cpp's head and move with every release of llama-cpp-python: this file checks the exact
version, and with vision.py it is the only one that touches them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import llama_cpp.llama_cpp as ll
import numpy as np

from edge_agent.bundle.manifest import EmbeddingInfo
from edge_agent.config import LanguageConfig
from edge_agent.errors import ConfigError, UserError

# ggml's threads wait for each other by libgomp, which by default keeps a core busy for milliseconds after the last is
# done: on a small board that is the core which should publish the answer. Within a graph nobody waits that long.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

LLAMA_CPP_PYTHON = "0.3.36"
ACTION_SEQ, TEXT_SEQ = 0, 1  # sequences
ROW_ALIGNMENT = 16  # rows: what the widest kernels (AVX-512) take at once; the others take 4 or 8
LOAD_MODES = {  # by mmap and mlock
    (False, False): ll.LLAMA_LOAD_MODE_NONE,
    (False, True): ll.LLAMA_LOAD_MODE_MLOCK,
    (True, False): ll.LLAMA_LOAD_MODE_MMAP,
    (True, True): ll.LLAMA_LOAD_MODE_MMAP_MLOCK,
}
KV_CACHE_TYPES = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
KV_CELL_ALIGNMENT = 256  # llama.cpp makes caches of a multiple of this
ROWS_PER_STEP = 512  # llama.cpp's physical batch; larger ones only cost memory on the boards we run on

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
        os.write(2, text)


# The callbacks must outlive every native thread: module level, never freed.
ll.llama_log_set(_on_log, ctypes.c_void_p(0))
ll.llama_backend_init()

_graph_observer: Callable[[int, bool], bool] | None = None


@ll.ggml_backend_sched_eval_callback
def _on_node(node: int, ask: bool, _user: object) -> bool:
    return _graph_observer(node, ask) if _graph_observer is not None else False


def observe_graph(watcher: Callable[[int, bool], bool] | None) -> None:
    """Show contexts made from now on to watcher(node, ask): with ask, whether it wants this node of the graph; then,
    once the node is computed, the same without ask, and whether to go on. node: address of a ggml_tensor."""
    global _graph_observer
    _graph_observer = watcher


def log_to(receiver: Callable[[str], None] | None) -> None:
    """Send llama.cpp's log lines to `receiver`; None: only warnings and errors, to stderr."""
    global _log
    _log = receiver


class LlamaError(UserError):
    """llama.cpp refused; the worker cannot go on."""


class LlamaContext:
    """Owns a model and a context; close() frees both. Not thread-safe."""

    def __init__(
        self,
        path: Path,
        config: LanguageConfig,
        embedding: EmbeddingInfo,
        progress: Callable[[float], None] = lambda part: None,
    ) -> None:
        """Load. progress(0…1) is called while weights are read. Raises LanguageError, ConfigError (an adapter)."""

        @ll.llama_progress_callback
        def on_progress(part: float, _user: object) -> bool:
            progress(part)
            return True

        log_lines: list[str] = []
        log_to(lambda text: log_lines.append(text.strip()))
        params = ll.llama_model_default_params()
        params.n_gpu_layers = config.gpu_layers
        params.use_extra_bufts = config.repack
        params.load_mode = LOAD_MODES[_use_mmap(config), config.mlock]
        params.progress_callback = on_progress
        self._table = _EmbeddingTable(path, embedding)
        self.model = ll.llama_model_load_from_file(os.fsencode(path), params)
        log_to(None)
        if not self.model:
            raise LlamaError(f"{path}: llama.cpp cannot load it: {_last_error(log_lines)}")
        self._adapters = {name: self._load_adapter(name, path) for name, path in config.adapters.items()}
        self.vocab = ll.llama_model_get_vocab(self.model)
        self.n_embd = ll.llama_model_n_embd(self.model)
        self.n_vocab = ll.llama_vocab_n_tokens(self.vocab)
        self.n_calls = self.n_rows = 0  # of llama_decode, and what it was given

        threads = config.threads or len(os.sched_getaffinity(0))
        params = ll.llama_context_default_params()
        exact = (
            config.reproducible and _flash_attention(config) == ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )  # with it nothing can be
        self._unit = ROW_ALIGNMENT if exact and not _on_gpu(config) else 1
        self.on_gpu = _on_gpu(config)
        self.rides = self._unit == 1  # a row of WORDS may come along in ACT's batch, over common cells
        cells = (
            -(-config.context // KV_CELL_ALIGNMENT) * KV_CELL_ALIGNMENT
        )  # of a sequence; llama.cpp would round up, and use less of them
        self.n_ctx = min(config.context, cells - self._unit + 1)  # rows that only fill up have cells too
        params.n_ctx, params.n_batch = 2 * cells, cells
        params.n_ubatch = min(ROWS_PER_STEP, config.context)
        params.n_seq_max = 2
        params.kv_unified = self.rides
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        params.type_k = params.type_v = KV_CACHE_TYPES[config.kv_cache_type]
        params.flash_attn_type = _flash_attention(config)
        if _graph_observer is not None:
            params.cb_eval = _on_node
        self.context = ll.llama_init_from_model(self.model, params)
        if not self.context:
            ll.llama_model_free(self.model)
            raise LlamaError(
                f"{path}: llama.cpp cannot make a context of {config.context} tokens; lower language.context"
            )
        self.memory = ll.llama_get_memory(self.context)

        # One batch for all calls: positions, sequences and output marks are rewritten in place.
        n = cells
        self._token = np.zeros(n, np.int32)
        self._pos = np.zeros(n, np.int32)
        self._n_seq = np.ones(n, np.int32)
        self._want = np.zeros(n, np.int8)
        self._seq_values = np.arange(2, dtype=np.int32)
        self._seq_pointers = [
            np.full(n, self._seq_values.ctypes.data + 4 * sequence, np.uintp) for sequence in (ACTION_SEQ, TEXT_SEQ)
        ]
        self._with_rider = self._seq_pointers[ACTION_SEQ].copy()

    def close(self) -> None:
        if self.context:
            ll.llama_free(self.context)
            ll.llama_model_free(self.model)
            self._table.close()
            self.context = self.model = None

    def __enter__(self) -> LlamaContext:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    # -- adapters -----------------------------------------------------------------------------------------------------

    def _load_adapter(self, name: str, path: str) -> int:
        """Before the context is made, which reserves its graph for them. They are freed with the model."""
        lines: list[str] = []
        log_to(lambda text: lines.append(text.strip()))
        adapter = ll.llama_adapter_lora_init(self.model, os.fsencode(path))
        log_to(None)
        if not adapter:
            ll.llama_model_free(self.model)
            raise ConfigError(f"language.adapters: {name}: {path}: llama.cpp cannot load it: {_last_error(lines)}")
        return adapter

    def adapt(self, name: str) -> None:
        """Switch an adapter on, and any other off; "": none. What is in the cache was computed under the one before."""
        one = [self._adapters[name]] if name else []
        pointers = (ll.llama_adapter_lora_p_ctypes * 1)(*one)
        if ll.llama_set_adapters_lora(self.context, pointers, len(one), (ctypes.c_float * 1)(1.0)):
            raise LlamaError(f"llama.cpp refuses the adapter {name!r}")

    # -- text ---------------------------------------------------------------------------------------------------------

    def tokens(self, text: str) -> list[int]:
        """Plain text -> ids. `[INST]` or `</s>` inside it stay letters: text has no authority over the layout."""
        raw = text.encode()
        out = (ll.llama_token * (len(raw) + 8))()
        n = ll.llama_tokenize(self.vocab, raw, len(raw), out, len(out), False, False)
        return list(out[:n])

    def piece(self, token: int) -> bytes:
        """A token's bytes; a special token has none."""
        out = ctypes.create_string_buffer(256)
        n = ll.llama_token_to_piece(self.vocab, token, out, len(out), 0, False)
        return out.raw[: max(n, 0)]

    def written(self, token: int) -> str:
        """As the vocabulary spells it, special tokens too; empty if there is none."""
        text = ll.llama_vocab_get_text(self.vocab, token) if 0 <= token < self.n_vocab else None
        return (text or b"").decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        return ll.llama_vocab_is_eog(self.vocab, token)

    def embed(self, tokens: list[int]) -> np.ndarray:
        """Rows of the token-embedding table as the model itself reads them: (n, n_embd) float32."""
        return self._table.rows(tokens)

    # -- cache --------------------------------------------------------------------------------------------------------

    def forget(self, sequence: int, start: int) -> None:
        """Drop a sequence's cells from position `start` on."""
        ll.llama_memory_seq_rm(self.memory, sequence, start, -1)

    def share(self, stop: int) -> None:
        """WORDS becomes a copy of what ACT holds before position `stop`, and nothing else."""
        self.forget(TEXT_SEQ, 0)
        ll.llama_memory_seq_cp(self.memory, ACTION_SEQ, TEXT_SEQ, -1, -1)
        ll.llama_memory_seq_rm(self.memory, TEXT_SEQ, stop, -1)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def decode_rows(
        self,
        rows: np.ndarray,
        start: int,
        sequence: int = ACTION_SEQ,
        want: list[int] | None = None,
        rider: int | None = None,
        spare: bool = False,
    ) -> np.ndarray | list[np.ndarray]:
        """Embedding rows (n, n_embd) float32 at positions start… -> logits, float32, views into llama.cpp's memory that
        are good until the next call: after the last row (n_vocab,), or (n_vocab,) for each row asked for.

        rider: the last row is not one of these but the next of WORDS, at this position; only where `rides`.
        spare: `rows` is the beginning of a larger array, whose next 15 rows are free. Where rows come in sixteens they
        are written to; without, everything is copied.
        """
        n, batch = len(rows), self._batch(len(rows), start, sequence, want, rider)
        if batch.n_tokens > n and spare:
            rows.base[n : batch.n_tokens] = rows[-1]
        elif batch.n_tokens > n:
            rows = np.concatenate([rows, np.repeat(rows[-1:], batch.n_tokens - n, 0)])
        batch.embd = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        return self._run(batch, n, start, sequence, want)

    def decode_tokens(
        self,
        tokens: list[int],
        start: int,
        sequence: int = ACTION_SEQ,
        want: list[int] | None = None,
        rider: int | None = None,
    ) -> np.ndarray | list[np.ndarray]:
        """The same for token ids."""
        batch = self._batch(len(tokens), start, sequence, want, rider)
        self._token[: len(tokens)] = tokens
        self._token[len(tokens) : batch.n_tokens] = tokens[-1]
        batch.token = self._token.ctypes.data_as(ctypes.POINTER(ll.llama_token))
        return self._run(batch, len(tokens), start, sequence, want)

    def _batch(self, n: int, start: int, sequence: int, want: list[int] | None, rider: int | None) -> ll.llama_batch:
        stop = max(start + n - (rider is not None), 1 + (rider or 0))
        if not 0 < n <= self.n_ctx or stop > self.n_ctx:
            raise LlamaError(f"positions {start} to {stop} do not fit a context of {self.n_ctx} tokens")
        unit = self._unit if sequence == ACTION_SEQ else 1
        more = -n % unit
        self._pos[: n + more] = np.arange(start, start + n + more)
        pointers = self._seq_pointers[sequence]
        if rider is not None:
            self._pos[n - 1] = rider
            pointers = self._with_rider
            pointers[: n - 1], pointers[n - 1] = self._seq_pointers[sequence][0], self._seq_pointers[TEXT_SEQ][0]
        self._want[: n + more] = 0
        self._want[[n - 1] if want is None else want] = 1
        others = -int(self._want[: n + more].sum()) % unit
        if others:
            self._want[np.flatnonzero(self._want[: n + more] == 0)[-others:]] = 1
        return ll.llama_batch(
            n_tokens=n + more,
            pos=self._pos.ctypes.data_as(ctypes.POINTER(ll.llama_pos)),
            n_seq_id=self._n_seq.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(ll.llama_seq_id))),
            logits=self._want.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def _run(
        self, batch: ll.llama_batch, n: int, start: int, sequence: int, want: list[int] | None
    ) -> np.ndarray | list[np.ndarray]:
        status = ll.llama_decode(self.context, batch)
        if status:
            raise LlamaError(f"llama_decode returned {status} for {batch.n_tokens} rows (1: the cache is full)")
        self.n_calls, self.n_rows = self.n_calls + 1, self.n_rows + n
        if batch.n_tokens > n:
            self.forget(sequence, start + n)
        place = np.cumsum(self._want[: batch.n_tokens]) - 1  # of a row's logits
        logits = np.ctypeslib.as_array(ll.llama_get_logits(self.context), (int(place[-1]) + 1, self.n_vocab))
        return logits[place[n - 1]] if want is None else [logits[place[i]] for i in want]


class _EmbeddingTable:
    """token_embd.weight, mapped; rows are dequantised on demand and remembered, since prompts repeat."""

    def __init__(self, path: Path, embedding: EmbeddingInfo) -> None:
        try:
            self._file = path.open("rb")
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise LlamaError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if embedding.ggml_type not in gguf.GGMLQuantizationType.__members__ or embedding.offset >= len(self._map):
            raise LlamaError(
                f"{path}: no {embedding.ggml_type} embedding at {embedding.offset}; build the bundle again"
            )
        self._type = gguf.GGMLQuantizationType[embedding.ggml_type]
        self._offset, self._row_bytes = embedding.offset, embedding.row_bytes
        self._known: dict[int, np.ndarray] = {}

    def rows(self, tokens: list[int]) -> np.ndarray:
        for token in tokens:
            if token not in self._known:
                at = self._offset + token * self._row_bytes
                raw = np.frombuffer(self._map[at : at + self._row_bytes], np.uint8)
                self._known[token] = gguf.quants.dequantize(raw, self._type).reshape(-1)
        return np.stack([self._known[token] for token in tokens])

    def close(self) -> None:
        self._map.close()
        self._file.close()


def _flash_attention(config: LanguageConfig) -> int:
    """On a CPU, flash attention sums in another order for another number of rows: the same prompt, cut into other
    batches, gives other logits, and an answer would depend on its draft."""
    if config.kv_cache_type != "f16":
        return ll.LLAMA_FLASH_ATTN_TYPE_ENABLED  # llama.cpp has no other way with such a cache
    if config.flash_attention is not None:
        return ll.LLAMA_FLASH_ATTN_TYPE_ENABLED if config.flash_attention else ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return ll.LLAMA_FLASH_ATTN_TYPE_AUTO if _on_gpu(config) else ll.LLAMA_FLASH_ATTN_TYPE_DISABLED


def _use_mmap(config: LanguageConfig) -> bool:
    """Mapped weights that are repacked would be in memory twice, in their file's pages and in the new order."""
    return config.mmap if config.mmap is not None else _on_gpu(config) or not config.repack


def _on_gpu(config: LanguageConfig) -> bool:
    return ll.llama_supports_gpu_offload() and config.gpu_layers != 0


def _last_error(lines: list[str]) -> str:
    errors = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    return (errors or lines or ["no reason given"])[0][:300]
