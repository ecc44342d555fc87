"""llama.cpp used in the plainest way: a whole prompt in one batch, then one greedy token after another.

Nothing of edge_agent.model is used. Flash attention is off, as it is in the profile `reproducible`: it sums in another
order.
"""

from __future__ import annotations

import ctypes
import json
import warnings
from pathlib import Path

import llama_cpp.llama_cpp as ll
import llama_cpp.mtmd_cpp as mtmd
import llguidance
import llguidance.llamacpp
import llguidance.numpy
import numpy as np

COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
ROWS = 16  # on a CPU, many rows are computed by other kernels than one


class PlainLlama:
    """Use it in a `with` statement."""

    def __init__(self, path: Path, n_ctx: int = 1024) -> None:
        params = ll.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = ll.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, path
        self.vocab = ll.llama_model_get_vocab(self.model)
        options = ll.llama_context_default_params()
        options.n_ctx = options.n_batch = n_ctx
        options.n_threads = options.n_threads_batch = 1
        options.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = ll.llama_init_from_model(self.model, options)
        self.n_vocab = ll.llama_vocab_n_tokens(self.vocab)
        self.known: list[int] = []  # what the cache holds

    def __enter__(self) -> PlainLlama:
        return self

    def __exit__(self, *_error: object) -> None:
        ll.llama_free(self.context)
        ll.llama_model_free(self.model)

    def tokens(self, text: str) -> list[int]:
        """llama.cpp's own tokens of a rendered prompt, which names every special token, its BOS too."""
        raw = text.encode()
        out = (ll.llama_token * (len(raw) + 8))()
        return list(out[: ll.llama_tokenize(self.vocab, raw, len(raw), out, len(out), False, True)])

    def text(self, tokens: list[int]) -> str:
        pieces = b""
        for token in tokens:
            out = ctypes.create_string_buffer(256)
            n = ll.llama_token_to_piece(self.vocab, token, out, len(out), 0, False)
            pieces += out.raw[: max(0, n)]
        return pieces.decode(errors="replace")

    def evaluate(self, tokens: list[int], start: int) -> np.ndarray:
        """Logits after the last token, (n_vocab,) float32."""
        memory = ll.llama_get_memory(self.context)
        ll.llama_memory_seq_rm(memory, 0, start, -1)
        batch = (ll.llama_token * len(tokens))(*tokens)
        assert ll.llama_decode(self.context, ll.llama_batch_get_one(batch, len(tokens))) == 0
        return np.ctypeslib.as_array(ll.llama_get_logits_ith(self.context, -1), (self.n_vocab,)).copy()

    def evaluate_prompt(self, tokens: list[int]) -> np.ndarray:
        """Logits after a prompt. What it has in common with the prompt before is not evaluated again."""
        n = next(
            (i for i, pair in enumerate(zip(tokens, self.known, strict=False)) if pair[0] != pair[1]), len(self.known)
        )
        start = max(0, min(n, len(tokens) - ROWS)) // ROWS * ROWS
        self.known = tokens
        return self.evaluate(tokens[start:], start)

    def greedy(self, prompt: str, n: int) -> str:
        """At most n tokens behind a prompt."""
        tokens = self.tokens(prompt)
        logits, found, position = self.evaluate_prompt(tokens), [], len(tokens)
        while len(found) < n and not ll.llama_vocab_is_eog(self.vocab, token := int(logits.argmax())):
            found.append(token)
            logits, position = self.evaluate([token], position), position + 1
        return self.text(found)

    def constrained(self, prompt: str, schema: dict) -> str:
        """The most likely JSON text of a schema behind a prompt: no draft, every batch a multiple of ROWS rows."""
        with warnings.catch_warnings():  # llguidance calls a deprecated function of llama-cpp-python
            warnings.simplefilter("ignore", DeprecationWarning)
            tokenizer = llguidance.llamacpp.lltokenizer_from_vocab(self.vocab)
        source = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema | {"x-guidance": COMPACT}))
        matcher, mask = (
            llguidance.LLMatcher(tokenizer, source),
            llguidance.numpy.allocate_token_bitmask(1, self.n_vocab),
        )
        tokens = self.tokens(prompt)
        n_prompt = len(tokens)
        self.evaluate_prompt(tokens[: n_prompt // ROWS * ROWS])
        while True:
            forced = matcher.compute_ff_tokens()
            matcher.consume_tokens(forced)
            tokens += forced
            if matcher.is_accepting():
                return self.text(tokens[n_prompt:])
            n_new = len(tokens) - len(self.known)
            n_rows = max(ROWS, -(-n_new // ROWS) * ROWS)
            logits = self.evaluate(tokens[-n_rows:], len(tokens) - n_rows)
            self.known = list(tokens)
            llguidance.numpy.fill_next_token_bitmask(matcher, mask, 0)
            llguidance.numpy.apply_token_bitmask_inplace(logits[None], mask)
            tokens.append(int(logits.argmax()))
            matcher.consume_token(tokens[-1])
            if matcher.is_accepting():
                return self.text(tokens[n_prompt:])

    def frame_logits(self, mmproj: Path, image: np.ndarray, before: str, after: str) -> np.ndarray:
        """Logits behind a prompt with an image, wholly by llama.cpp's mtmd. image: (H, W, 3) uint8 RGB."""
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.n_threads, params.print_timings, params.warmup = False, 1, False, False
        context = mtmd.mtmd_init_from_file(str(mmproj).encode(), self.model, params)
        assert context
        height, width = image.shape[:2]
        data = np.ascontiguousarray(image).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap, chunks = mtmd.mtmd_bitmap_init(width, height, data), mtmd.mtmd_input_chunks_init()
        text = before.encode() + mtmd.mtmd_get_marker(context) + after.encode()
        input_text = mtmd.mtmd_input_text(text=text, text_len=len(text), add_special=False, parse_special=True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(input_text), bitmaps, 1) == 0
        position = ll.llama_pos(0)
        ll.llama_memory_clear(ll.llama_get_memory(self.context), True)
        self.known = []
        status = mtmd.mtmd_helper_eval_chunks(context, self.context, chunks, 0, 0, 512, True, ctypes.byref(position))
        assert status == 0
        logits = np.ctypeslib.as_array(ll.llama_get_logits_ith(self.context, -1), (self.n_vocab,)).copy()
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        mtmd.mtmd_free(context)
        return logits
