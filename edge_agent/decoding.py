"""What may come next and what must: grammar-bound greedy decoding. Pure given logits.

The grammar is llguidance's, bound to llama.cpp's own vocabulary. Where it allows one continuation only, the tokens are
taken without asking the model. An answer ends at its first complete object and is never asked for another token.
"""

from __future__ import annotations

import json

import llguidance
import llguidance.llamacpp
import llguidance.numpy
import numpy as np

COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}


class NotFinite(Exception):
    """The logits hold NaN or infinity: nothing can be chosen from them."""


class Stuck(Exception):
    """The grammar gave up inside llguidance: it would allow nothing but the end, for ever."""


class Grammar:
    """The answers a JSON schema allows, in the tokens of one vocabulary. Compiling takes a second or two."""

    def __init__(self, vocab: int) -> None:
        """vocab: llama.cpp's vocabulary handle, which must outlive this."""
        self.tokenizer = llguidance.llamacpp.lltokenizer_from_vocab(vocab)
        self._mask = llguidance.numpy.allocate_token_bitmask(1, self.tokenizer.vocab_size)
        self._matcher: llguidance.LLMatcher | None = None

    def allow(self, schema: dict) -> None:
        """From now on answers follow this schema. Raises ValueError when llguidance cannot take it."""
        source = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema | {"x-guidance": COMPACT}))
        matcher = llguidance.LLMatcher(self.tokenizer, source)
        if matcher.is_error():
            raise ValueError(f"action space is no grammar: {matcher.get_error()}")
        self._matcher = matcher

    def start(self) -> None:
        """Begin a new answer."""
        self._matcher.reset()

    def forced(self) -> list[int]:
        """The tokens that can only follow, already taken as said; often empty."""
        tokens = self._matcher.compute_ff_tokens()
        if tokens:
            self._matcher.consume_tokens(tokens)
        return tokens

    def choose(self, logits: np.ndarray) -> int:
        """The likeliest allowed token, taken as said. logits: (n_vocab,) float32."""
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask, 0)
        if self._matcher.is_error():
            raise Stuck
        allowed = np.flatnonzero(np.unpackbits(self._mask.view(np.uint8).ravel(), bitorder="little")[: len(logits)])
        token = int(allowed[np.argmax(logits[allowed])])
        if not np.isfinite(logits[token]):
            raise NotFinite
        self._matcher.consume_token(token)
        return token

    @property
    def complete(self) -> bool:
        return self._matcher.is_accepting()


def greedy(logits: np.ndarray) -> int:
    """The likeliest token. Raises NotFinite."""
    token = int(np.argmax(logits))
    if not np.isfinite(logits[token]):
        raise NotFinite
    return token
