"""Perplexity of a model on a text, and how far its answers are from a reference's: cut, stored and counted as
llama-perplexity does it, so that both programs print the same figures.

The text is cut into chunks of 512 tokens, each read from an empty cache and begun by <s>; the second half is judged.
The reference's log-probabilities go through a file (255 positions by the vocabulary for each chunk): two models need
not be in memory at once. It is what `llama-perplexity --kl-divergence-base` reads and writes, 16 bits a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from edge_agent.errors import UserError
from edge_agent.model.llama import ACTION_SEQ, LlamaContext

CHUNK, FIRST = 512, 256
JUDGED = CHUNK - 1 - FIRST  # of a chunk: the last position has no next token
MAGIC = b"_logits_"
MIN_LOG_P = -16.0  # less is stored as this, and counts as nothing
ROWS_AT_ONCE = 16  # of vocabulary size: what is in memory beside the logits

Report = Callable[[str, int, int], None]  # (what, done, in all)


class MeasureError(UserError):
    """One line."""


class Divergence(msgspec.Struct, frozen=True):
    """What was counted; *_sd is the standard deviation of the mean."""

    n: int
    perplexity: float
    perplexity_sd: float
    reference_perplexity: float
    kl_mean: float
    kl_sd: float
    kl_median: float
    kl_p99: float
    kl_max: float
    same_top: float  # share of positions
    delta_p_rms: float  # of the probability of the text's own next token


class ChunkScores(NamedTuple):
    """One chunk against the reference, (JUDGED,) each."""

    nll: np.ndarray
    nll_reference: np.ndarray
    kl: np.ndarray
    same_top: np.ndarray


def chunks(llm: LlamaContext, bos: int, text: str, at_most: int = 0) -> np.ndarray:
    """(n, 512) int32. The first token of each is in the text's own; <s> is put there when it is read."""
    tokens = [bos, *llm.tokens(text)]
    n = min(len(tokens) // CHUNK, at_most or len(tokens))
    if n < 1:
        raise MeasureError(f"the text has {len(tokens)} tokens; expected {CHUNK} or more")
    return np.array(tokens[: n * CHUNK], np.int32).reshape(n, CHUNK)


def logits(llm: LlamaContext, bos: int, chunk: np.ndarray) -> np.ndarray:
    """(JUDGED + 1, n_vocab) float32, a view into llama.cpp's memory."""
    llm.forget(ACTION_SEQ, 0)
    return np.stack(llm.decode_tokens([bos, *map(int, chunk[1:])], 0, want=list(range(FIRST, len(chunk)))))


def write_reference(llm: LlamaContext, bos: int, cut: np.ndarray, path: Path, report: Report) -> None:
    """The reference's log-probabilities of every chunk."""
    with path.open("wb") as file:
        file.write(MAGIC + np.array([CHUNK, llm.n_vocab, len(cut)], np.int32).tobytes() + cut.tobytes())
        for i, chunk in enumerate(cut):
            report(f"chunk {i + 1} of {len(cut)}", i, len(cut))
            found = logits(llm, bos, chunk)
            for start in range(0, JUDGED, ROWS_AT_ONCE):
                file.write(_stored(found[start : min(start + ROWS_AT_ONCE, JUDGED)]).tobytes())
    report("", len(cut), len(cut))


def _stored(rows: np.ndarray) -> np.ndarray:
    """(n, n_vocab) float32 logits -> (n, n_vocab + 4 or 5) uint16: scale and least log-probability as float32, then
    steps of scale above it."""
    n, n_vocab = rows.shape
    top = rows.max(1, keepdims=True)
    least = np.maximum(rows.min(1, keepdims=True), top + np.float32(MIN_LOG_P))
    log_sum = np.log(np.exp(rows - top).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)
    scale = (top - least) / np.float32(65535)
    out = np.zeros((n, 2 * ((n_vocab + 1) // 2) + 4), np.uint16)
    out[:, :4] = np.concatenate([scale, least - top - log_sum], 1).astype(np.float32).view(np.uint16)
    steps = np.rint(np.maximum(rows - least, 0) / np.where(scale > 0, scale, 1))
    out[:, 4 : 4 + n_vocab] = steps.astype(np.uint16)
    return out


class Reference:
    """A file of log-probabilities, ours or llama-perplexity's."""

    def __init__(self, path: Path) -> None:
        """Raises MeasureError."""
        with path.open("rb") as file:
            head = file.read(len(MAGIC) + 12)
        if head[: len(MAGIC)] != MAGIC or len(head) < len(MAGIC) + 12:
            raise MeasureError(f"{path}: not a file of log-probabilities")
        context, self.n_vocab, n = map(int, np.frombuffer(head[len(MAGIC) :], np.int32))
        self._width = 2 * ((self.n_vocab + 1) // 2) + 4
        self._start = len(head) + 4 * context * n
        expected = self._start + 2 * self._width * JUDGED * n
        if context != CHUNK or path.stat().st_size != expected:
            raise MeasureError(
                f"{path}: expected {expected} bytes with chunks of {CHUNK}, found {path.stat().st_size} with {context}"
            )
        self.path = path
        self.chunks = np.fromfile(path, np.int32, context * n, offset=len(head)).reshape(n, context)

    def rows(self, i: int) -> Iterator[tuple[int, np.ndarray]]:
        """Of chunk i: (first position, (up to ROWS_AT_ONCE, n_vocab) float32 log-probabilities)."""
        with self.path.open("rb") as file:
            file.seek(self._start + 2 * self._width * JUDGED * i)
            for start in range(0, JUDGED, ROWS_AT_ONCE):
                n = min(ROWS_AT_ONCE, JUDGED - start)
                raw = np.frombuffer(file.read(2 * self._width * n), np.uint16).reshape(n, self._width)
                scale, least = np.ascontiguousarray(raw[:, :4]).view(np.float32).T[..., None]
                yield start, scale * raw[:, 4 : 4 + self.n_vocab].astype(np.float32) + least


def score_chunk(found: np.ndarray, chunk: np.ndarray, reference: Iterator[tuple[int, np.ndarray]]) -> ChunkScores:
    """found: logits of a chunk. Kullback and Leibler's divergence of what it says from what the reference says."""
    parts = []
    for start, base in reference:
        rows = found[start : start + len(base)]
        top = rows.max(1, keepdims=True)
        log_sum = np.log(np.exp(rows - top).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)
        says = rows - (top + log_sum)
        p = np.where(base > MIN_LOG_P, np.exp(base), 0)
        kl = (p * (base - says)).sum(1, dtype=np.float64)
        right = chunk[FIRST + 1 + start : FIRST + 1 + start + len(base)]
        at = np.arange(len(base))
        parts.append((-says[at, right], -base[at, right], kl, rows.argmax(1) == base.argmax(1)))
    return ChunkScores(*(np.concatenate(column).astype(np.float64) for column in zip(*parts, strict=True)))


def compare(llm: LlamaContext, bos: int, reference: Reference, report: Report) -> Divergence:
    """A model against the reference, on the reference's own text. Raises MeasureError."""
    if llm.n_vocab != reference.n_vocab:
        raise MeasureError(f"{reference.path}: of a vocabulary of {reference.n_vocab}, but the model has {llm.n_vocab}")
    n, judged = len(reference.chunks), []
    for i, chunk in enumerate(reference.chunks):
        report(f"chunk {i + 1} of {n}", i, n)
        judged.append(score_chunk(logits(llm, bos, chunk), chunk, reference.rows(i)))
    report("", n, n)
    return summary(judged)


def summary(judged: list[ChunkScores]) -> Divergence:
    nll, base, kl, same = (np.concatenate(column) for column in zip(*judged, strict=True))
    perplexity = math.exp(nll.mean())
    return Divergence(
        n=len(kl),
        perplexity=perplexity,
        perplexity_sd=perplexity * _sd(nll),
        reference_perplexity=math.exp(base.mean()),
        kl_mean=float(kl.mean()),
        kl_sd=_sd(kl),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        same_top=float(same.mean()),
        delta_p_rms=float(np.sqrt(np.square(np.exp(-nll) - np.exp(-base)).mean())),
    )


def _sd(values: np.ndarray) -> float:
    return float(values.std() / math.sqrt(max(1, len(values) - 1)))
