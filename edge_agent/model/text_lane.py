"""The text lane: descriptions, answers to questions, reasoning. One text at a time, one token per step.

A text is about the frame that the action lane held when it started: the lane works on a copy of that frame's cells.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np

from edge_agent.config import LanguageConfig
from edge_agent.ipc.events import TextDelta
from edge_agent.model.constrained import NonFiniteError, select_greedy
from edge_agent.model.events import Events
from edge_agent.model.llama import TEXT_SEQ, LlamaContext
from edge_agent.model.prompt import CacheState, Prompt
from edge_agent.wire.messages import Lane, TextStopReason


class TextGeneration(msgspec.Struct):
    """A text that is being decoded."""

    lane: Lane
    request: str
    frame_id: int
    events: Events
    utf8_decoder: codecs.IncrementalDecoder
    position: int  # of the next token
    reasoning: bool
    token: int = 0  # selected, not yet evaluated
    n_tokens: int = 0
    n_reasoning_tokens: int = 0


class LaneContext(NamedTuple):
    """What both lanes work with."""

    llama: LlamaContext
    prompt: Prompt
    cache: CacheState
    clock: Callable[[], int]  # CLOCK_MONOTONIC, nanoseconds


class TextLane:
    """At most one text. `idle` says whether there is none."""

    def __init__(self, shared: LaneContext, limits: LanguageConfig) -> None:
        self._llama, self._prompt, self._cache, self._clock = shared
        self._limits = limits
        self.generation: TextGeneration | None = None

    @property
    def idle(self) -> bool:
        return self.generation is None

    @property
    def describing(self) -> bool:
        return self.generation is not None and self.generation.lane == "describe"

    @property
    def request(self) -> str | None:
        """Of the question that is being answered; None: no text; "": a description."""
        return self.generation.request if self.generation is not None else None

    def start(self, lane: Lane, request: str, question: str, events: Events) -> None:
        """Start a text about the frame in the cache; its deltas go to `events`. A question that is too long is refused
        at once: the only delta has an error, and nothing is decoded."""
        reasoning = self._limits.max_reasoning_tokens > 0
        generation = self.generation = TextGeneration(
            lane=lane,
            request=request,
            frame_id=self._cache.frame_id,
            events=events,
            utf8_decoder=codecs.getincrementaldecoder("utf-8")("replace"),
            position=self._cache.frame_end_position,
            reasoning=reasoning,
        )
        tokens = self._prompt.question_tokens(question)
        if reasoning:
            tokens.append(self._prompt.special["think"])
        if error := self._prompt.check_question(tokens, self._cache.prefix_tokens):
            generation.reasoning = False
            self._emit(generation, "", final=True, stop_reason="length", error=error)
            self.generation = None
            return
        self._llama.fork_sequence(generation.position)
        logits = self._llama.logits_after_last(tokens, generation.position, TEXT_SEQ)
        generation.position += len(tokens)
        self.accept(logits)

    def step(self) -> None:
        """Decode one more token, in a batch of its own."""
        generation = self._running()
        start_ns = self._clock()
        token, position = self.take_next_row()
        self.accept(self._llama.logits_after_last([token], position, TEXT_SEQ))
        generation.events.span("text", "language", start_ns, self._clock())

    def take_next_row(self) -> tuple[int, int]:
        """(token, its position), to be evaluated on TEXT_SEQ by the caller, who then calls accept()."""
        generation = self._running()
        generation.position += 1
        return generation.token, generation.position - 1

    def accept(self, logits: np.ndarray) -> None:
        """Select the next token. logits: (n_vocab,) float32, after the text's last token."""
        generation, special = self._running(), self._prompt.special
        try:
            token = select_greedy(logits)
        except NonFiniteError:
            self.stop("not-finite")
            return
        if generation.reasoning and generation.n_reasoning_tokens >= self._limits.max_reasoning_tokens:
            token = special["think_end"]  # the limit is reached: continue with the text
        if self._llama.is_end_of_generation(token):
            self.stop("")
            return
        generation.token = token
        if token == special.get("think"):
            generation.reasoning = True
        elif token == special.get("think_end"):
            self._finish_reasoning(generation)
        elif text := generation.utf8_decoder.decode(self._llama.token_bytes(token)):
            self._emit(generation, text)
        if generation.reasoning:
            generation.n_reasoning_tokens += 1
        else:
            generation.n_tokens += 1
        if generation.n_tokens >= self._limits.max_text_tokens or generation.position >= self._llama.n_ctx:
            self.stop("length")

    def stop(self, stop_reason: TextStopReason) -> None:
        """End the text and free its cells. stop_reason: why it ends early; empty: it is complete."""
        generation = self._running()
        if generation.reasoning:
            self._finish_reasoning(generation)
        self._emit(generation, generation.utf8_decoder.decode(b"", final=True), final=True, stop_reason=stop_reason)
        self.generation = None
        self._llama.truncate(TEXT_SEQ, 0)

    def _running(self) -> TextGeneration:
        assert self.generation is not None, "no text was started"
        return self.generation

    def _finish_reasoning(self, generation: TextGeneration) -> None:
        self._emit(generation, generation.utf8_decoder.decode(b"", final=True), final=True)
        generation.utf8_decoder.reset()
        generation.reasoning = False

    def _emit(
        self,
        generation: TextGeneration,
        text: str,
        *,
        final: bool = False,
        stop_reason: TextStopReason = "",
        error: str = "",
    ) -> None:
        generation.events.text(
            TextDelta(
                lane="reasoning" if generation.reasoning else generation.lane,
                frame_id=generation.frame_id,
                text=text,
                request=generation.request,
                final=final,
                stop_reason=stop_reason,
                error=error,
            )
        )
