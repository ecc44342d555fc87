"""What may come next, what must, and what probably will: grammar-bound greedy decoding. Pure given logits.

The grammar is llguidance's, bound to llama.cpp's own vocabulary. Where it allows one continuation only, the tokens are
taken without asking the model. An answer ends at its first complete object and is never asked for another token.

An answer is kept as steps: a token that was chosen, and those that could only follow. The answer before is the draft of
the next one: evaluated with the frame, and taken as far as the model's own choices agree (speculative decoding with a
greedy check, Leviathan et al. 2023; the draft costs no model of its own).
"""

from __future__ import annotations

import json

import llguidance
import llguidance.llamacpp
import llguidance.numpy
import numpy as np

from edge_agent.errors import UserError

DraftSteps = list[list[int]]
MAX_CACHED_STATES = 5_000  # that are remembered, some 2 KB each at most; then it begins anew
DRAFT_LOOKAHEAD = 6  # so many steps of the draft are looked at for a place to go on from
COMPACT_JSON = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}


def flatten(steps: DraftSteps) -> list[int]:
    return [token for step in steps for token in step]


class NonFiniteError(UserError):
    """The logits hold NaN or infinity: nothing can be chosen from them."""


class GrammarError(UserError):
    """The grammar gave up inside llguidance: it would allow nothing but the end, for ever."""


def grammar_from_schema(schema: dict) -> str:
    """Every compact JSON text of this schema, as a grammar."""
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema | {"x-guidance": COMPACT_JSON}))


def grammar_from_lark(text: str) -> str:
    return llguidance.LLMatcher.grammar_from_lark(text)


class _State:
    """Where an answer may stand: what llguidance said there, so that it is asked once. The same tokens lead to it."""

    __slots__ = ("allowed", "complete", "forced", "then")

    def __init__(self) -> None:
        self.allowed: np.ndarray | None = None  # (n,) int64, tokens
        self.forced: tuple[int, ...] | None = None
        self.complete: bool | None = None
        self.then: dict[int, _State] = {}


class Grammar:
    """The answers a grammar allows, in the tokens of one vocabulary. Compiling takes a second or two."""

    def __init__(self, vocab: int) -> None:
        """vocab: llama.cpp's vocabulary handle, which must outlive this."""
        # Slices speed free text up, of which no answer has any, and take 30 MB of a full vocabulary.
        self.tokenizer = llguidance.llamacpp.lltokenizer_from_vocab(vocab, slices=[])
        self._mask = llguidance.numpy.allocate_token_bitmask(1, self.tokenizer.vocab_size)
        self._matcher: llguidance.LLMatcher | None = None

    def allow(self, source: str) -> None:
        """From now on answers follow this grammar: `from_schema` or `from_lark`. Raises ValueError when llguidance
        cannot take it."""
        matcher = llguidance.LLMatcher(self.tokenizer, source)
        if matcher.is_error():
            raise ValueError(f"action space is no grammar: {matcher.get_error()}")
        self._matcher = matcher
        self._forget()

    def _forget(self) -> None:
        self._start, self._n_places = _State(), 1
        self._at = self._start

    def start(self) -> None:
        """Begin a new answer."""
        self._matcher.reset()
        if self._n_places > MAX_CACHED_STATES:
            self._forget()
        self._at = self._start

    def _go(self, tokens: list[int]) -> None:
        for token in tokens:
            if (place := self._at.then.get(token)) is None:
                place = self._at.then[token] = _State()
                self._n_places += 1
            self._at = place

    def forced(self) -> list[int]:
        """The tokens that can only follow, already taken as said; often empty."""
        if self._at.forced is None:
            self._at.forced = tuple(self._matcher.compute_ff_tokens())
        tokens = list(self._at.forced)
        if tokens:
            self._matcher.consume_tokens(tokens)
            self._go(tokens)
        return tokens

    def choose(self, logits: np.ndarray) -> int:
        """The likeliest allowed token, taken as said. logits: (n_vocab,) float32."""
        if self._at.allowed is None:
            llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask, 0)
            if self._matcher.is_error():
                raise GrammarError
            bits = np.unpackbits(self._mask.view(np.uint8).ravel(), bitorder="little")
            self._at.allowed = np.flatnonzero(bits[: len(logits)])
        allowed = self._at.allowed
        token = int(allowed[np.argmax(logits[allowed])])
        if not np.isfinite(logits[token]):
            raise NonFiniteError
        self._matcher.consume_token(token)
        self._go([token])
        return token

    def step(self, logits: np.ndarray) -> list[int]:
        """The likeliest allowed token and those that can only follow it, taken as said."""
        token = self.choose(logits)
        return [token] if self.complete else [token, *self.forced()]

    def take(self, logits: np.ndarray, draft: DraftSteps, answer: DraftSteps) -> None:
        """Append steps to the answer, logits[i] (n, n_vocab) before step i, as long as each is the draft's: the first
        that is not, or that completes the answer, is the last."""
        for i, before in enumerate(logits):
            answer.append(self.step(before))
            if self.complete or i >= len(draft) or answer[-1] != draft[i]:
                break

    def rest_of(self, draft: DraftSteps) -> DraftSteps:
        """What of a draft may still follow when its first step turned out another: the steps after it if they fit, else
        those from a place near by that do, else nothing."""
        for start in (1, 0, *range(2, min(DRAFT_LOOKAHEAD, len(draft)))):
            tokens = flatten(draft[start:])
            if tokens and self._matcher.validate_tokens(tokens) == len(tokens):
                return draft[start:]
        return []

    @property
    def complete(self) -> bool:
        if self._at.complete is None:
            self._at.complete = self._matcher.is_accepting()
        return self._at.complete


def greedy(logits: np.ndarray) -> int:
    """The likeliest token. Raises NotFinite."""
    token = int(np.argmax(logits))
    if not np.isfinite(logits[token]):
        raise NonFiniteError
    return token
