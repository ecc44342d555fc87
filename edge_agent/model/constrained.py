"""Constrained greedy decoding: allowed tokens, forced tokens, and drafts (speculative decoding). Pure given logits.

The grammar is compiled by llguidance for llama.cpp's own vocabulary. Where it allows one continuation only, the tokens
are taken without asking the model (forced tokens). An answer ends at its first complete object.

An answer is kept as steps: one selected token and the forced tokens after it. The previous answer is the draft of the
next one: it is evaluated together with the frame, and its steps are accepted as long as the model selects the same
tokens. This is speculative decoding with a greedy check (Leviathan et al. 2023, "Fast Inference from Transformers via
Speculative Decoding"); the draft needs no model of its own.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import NamedTuple

import llguidance
import llguidance.llamacpp
import llguidance.numpy
import numpy as np

from edge_agent.errors import ConfigError, UserError

DraftSteps = list[list[int]]  # each: a selected token and the forced tokens after it
MAX_CACHED_STATES = 5_000  # of the grammar, up to 2 KB each; with more, the cache is emptied
DRAFT_LOOKAHEAD = 6  # steps of a draft that are tried as its new beginning
COMPACT_JSON = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}


class PastAnswer(NamedTuple):
    """An answer so far, or one that is the draft of the next."""

    steps: DraftSteps
    leads: list[float]  # of each step's token when it was selected, in logits; the first of those that are known

    def after(self, n: int) -> PastAnswer:
        """Without its first n steps."""
        return PastAnswer(self.steps[n:], self.leads[n:])

    def is_tie(self, i: int, margin: float) -> bool:
        """Whether the lead of step i was below the margin, or NaN."""
        return i < len(self.leads) and not self.leads[i] >= margin

    def clear_steps(self, margin: float, n_exact: int = 0) -> DraftSteps:
        """The steps that are worth rows in a batch as a draft: what follows the last one decides the step behind it, so
        that is not a tie either. A tie is left to plain decoding, which a batch with a draft would only precede.

        n_exact: so many first steps are decided by exact logits, where a tie does not matter.
        """
        n = next((i for i in range(n_exact, len(self.steps)) if self.is_tie(i, margin)), len(self.steps))
        return self.steps[: max(0, n - 1)]


NO_ANSWER = PastAnswer([], [])


def flatten(steps: DraftSteps) -> list[int]:
    return [token for step in steps for token in step]


class NonFiniteError(UserError):
    """Logits or embeddings contain NaN or infinity: no token can be selected from them. Ends one answer."""


class GrammarError(UserError):
    """llguidance stopped with an error inside a grammar: it would allow only the end, for ever. Ends one answer."""


def grammar_from_schema(schema: dict) -> str:
    """JSON schema -> the grammar of its compact JSON texts, for Grammar.compile."""
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema | {"x-guidance": COMPACT_JSON}))


def grammar_from_lark(text: str) -> str:
    return llguidance.LLMatcher.grammar_from_lark(text)


class _State:
    """One state of an answer, and what llguidance answered there, so that it is asked once. The tokens of the answer
    lead to it."""

    __slots__ = ("allowed", "complete", "forced", "next")

    def __init__(self) -> None:
        self.allowed: np.ndarray | None = None  # (n,) int64, token ids
        self.forced: tuple[int, ...] | None = None
        self.complete: bool | None = None
        self.next: dict[int, _State] = {}


class Grammar:
    """The answers that a grammar allows, in the tokens of one vocabulary. Compiling takes a second or two."""

    def __init__(self, vocab: int) -> None:
        """vocab: llama.cpp's vocabulary handle, which must outlive this object."""
        with warnings.catch_warnings():
            # llguidance 1.x calls a deprecated function of llama-cpp-python once per token: 131072 warnings.
            warnings.filterwarnings("ignore", "llama_token_get_attr is deprecated", DeprecationWarning)
            # Slices speed up free text, which no answer contains, and need 30 MB for a full vocabulary.
            self.tokenizer = llguidance.llamacpp.lltokenizer_from_vocab(vocab, slices=[])
        self._mask = llguidance.numpy.allocate_token_bitmask(1, self.tokenizer.vocab_size)
        self._matcher: llguidance.LLMatcher  # after compile()
        self._forget_states()

    def compile(self, source: str) -> None:
        """From now on answers follow this grammar: of `grammar_from_schema` or `grammar_from_lark`. Raises ConfigError
        when llguidance cannot compile it."""
        matcher = llguidance.LLMatcher(self.tokenizer, source)
        if matcher.is_error():
            raise ConfigError(f"cannot compile a grammar for this action space: {matcher.get_error()}")
        self._matcher = matcher
        self._forget_states()

    def _forget_states(self) -> None:
        self._start, self._n_states = _State(), 1
        self._current = self._start

    def start(self) -> None:
        """Begin a new answer."""
        self._matcher.reset()
        if self._n_states > MAX_CACHED_STATES:
            self._forget_states()
        self._current = self._start

    def _advance(self, tokens: list[int]) -> None:
        for token in tokens:
            state = self._current.next.get(token)
            if state is None:
                state = self._current.next[token] = _State()
                self._n_states += 1
            self._current = state

    def forced_tokens(self) -> list[int]:
        """The tokens that are the only continuation; often none. The grammar consumes them."""
        if self._current.forced is None:
            self._current.forced = tuple(self._matcher.compute_ff_tokens())
        tokens = list(self._current.forced)
        if tokens:
            self._matcher.consume_tokens(tokens)
            self._advance(tokens)
        return tokens

    def select_token(self, logits: np.ndarray) -> int:
        """The most likely allowed token. The grammar consumes it. logits: (n_vocab,) float32. Raises NonFiniteError,
        GrammarError."""
        allowed = self._allowed(len(logits))
        token = int(allowed[logits[allowed].argmax()])
        if not np.isfinite(logits[token]):
            raise NonFiniteError("the language model gave NaN or infinity")
        self._matcher.consume_token(token)
        self._advance([token])
        return token

    def lead(self, logits: np.ndarray) -> float:
        """Of the most likely allowed token over the next allowed one, in logits; infinite if only one is allowed, NaN
        if a logit is."""
        values = logits[self._allowed(len(logits))]
        best = values.argmax()
        highest, values[best] = values[best], -np.inf
        return float(highest - values.max())

    def _allowed(self, n_vocab: int) -> np.ndarray:
        """Ids of the tokens that may come next, (n,) int64. Raises GrammarError."""
        if self._current.allowed is None:
            llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask, 0)
            if self._matcher.is_error():
                raise GrammarError(f"llguidance: {self._matcher.get_error()}")
            bits = np.unpackbits(self._mask.view(np.uint8).ravel(), bitorder="little")
            self._current.allowed = np.flatnonzero(bits[:n_vocab])
        return self._current.allowed

    def step(self, logits: np.ndarray) -> list[int]:
        """The most likely allowed token and the forced tokens after it. The grammar consumes them."""
        token = self.select_token(logits)
        return [token] if self.complete else [token, *self.forced_tokens()]

    def verify_draft(
        self,
        logits: list[np.ndarray],
        draft: DraftSteps,
        answer: PastAnswer,
        margin: float,
        evaluate_alone: Callable[[int], tuple[np.ndarray, bool]],
        n_exact: int = 0,
    ) -> None:
        """Append steps to the answer as long as each is the draft's; the first that differs, or that completes the
        answer, is the last. logits[i]: (n_vocab,) float32 before step i, one more than are evaluated of the draft.

        margin: a lead below it, in logits, is not trusted; 0: every lead is. Then evaluate_alone(i) -> (logits before
        step i from a batch of plain decoding, whether the steps behind it are still evaluated) decides. n_exact: the
        logits before so many first steps are those of plain decoding already.
        """
        for i in range(len(logits)):
            step_logits, is_rest_valid = logits[i], True
            lead = self.lead(step_logits)
            if i >= n_exact and margin and not lead >= margin:  # NaN is not trusted
                logits[i:] = [kept.copy() for kept in logits[i:]]  # they are views that another batch overwrites
                step_logits, is_rest_valid = evaluate_alone(i)
                lead = self.lead(step_logits)
            answer.steps.append(self.step(step_logits))
            answer.leads.append(lead)
            if self.complete or i >= len(draft) or answer.steps[-1] != draft[i] or not is_rest_valid:
                break

    def usable_draft(self, draft: PastAnswer) -> PastAnswer:
        """The part of a draft that the grammar still accepts after its first step was rejected: the steps after that
        one, else those from another of the first few, else none."""
        for start in (1, 0, *range(2, min(DRAFT_LOOKAHEAD, len(draft.steps)))):
            tokens = flatten(draft.steps[start:])
            if tokens and self._matcher.validate_tokens(tokens) == len(tokens):
                return draft.after(start)
        return NO_ANSWER

    @property
    def complete(self) -> bool:
        """Whether the answer is complete."""
        if self._current.complete is None:
            self._current.complete = bool(self._matcher.is_accepting())
        return self._current.complete


def select_greedy(logits: np.ndarray) -> int:
    """The most likely token. logits: (n_vocab,) float32. Raises NonFiniteError."""
    token = int(logits.argmax())
    if not np.isfinite(logits[token]):
        raise NonFiniteError("the language model gave NaN or infinity")
    return token
