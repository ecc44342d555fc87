"""Perplexity of a model on a text, and KL divergence from a reference model. Text is divided, scores are stored and
counted as llama-perplexity does it, so that both programs print the same figures.

The text is divided into chunks of 512 tokens. Each is evaluated with an empty KV cache and starts with <s>; the second
half of its positions is scored. The reference's log-probabilities are written to a file (255 positions x vocabulary for
each chunk, 16 bits a number), so that only one model is in memory at a time. The file format is that of
`llama-perplexity --kl-divergence-base`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from edge_agent.errors import UserError
from edge_agent.model.llama import ACTION_SEQ, LlamaContext
from quantize.build_folder import check_file_size
from quantize.progress import Progress

CHUNK, FIRST = 512, 256  # tokens of a chunk; the first position that is scored
N_SCORED = CHUNK - 1 - FIRST  # positions of a chunk; the last one has no next token
MAGIC = b"_logits_"
MIN_LOG_P = -16.0  # smaller log-probabilities are stored as this and do not count
ROWS_AT_ONCE = 16  # (ROWS_AT_ONCE, n_vocab) float32 is in memory beside the logits


class MeasureError(UserError):
    """One line."""


class Divergence(msgspec.Struct, frozen=True):
    """Figures over all scored positions. *_sd: standard deviation of the mean."""

    n: int  # positions
    perplexity: float
    perplexity_sd: float
    reference_perplexity: float
    kl_mean: float
    kl_sd: float
    kl_median: float
    kl_p99: float
    kl_max: float
    same_top: float  # share of positions at which both models have the same most likely token
    delta_p_rms: float  # of the probability of the text's next token


class ChunkScores(NamedTuple):
    """One chunk against the reference, (N_SCORED,) float64 each."""

    nll: np.ndarray
    nll_reference: np.ndarray
    kl: np.ndarray
    same_top: np.ndarray


def divide(llm: LlamaContext, text: str, max_chunks: int = 0) -> np.ndarray:
    """The text's tokens in chunks, (n, CHUNK) int32. `logits` replaces the first token of each by <s>, if
    the vocabulary has one.

    max_chunks: 0: all. Raises MeasureError when the text is shorter than a chunk.
    """
    tokens = [*_first(llm), *llm.tokens(text)]
    n = min(len(tokens) // CHUNK, max_chunks or len(tokens))
    if n < 1:
        raise MeasureError(f"the text has {len(tokens)} tokens; expected {CHUNK} or more")
    return np.array(tokens[: n * CHUNK], np.int32).reshape(n, CHUNK)


def logits(llm: LlamaContext, chunk: np.ndarray) -> np.ndarray:
    """(N_SCORED + 1, n_vocab) float32: the logits from position FIRST on."""
    llm.truncate(ACTION_SEQ, 0)
    tokens = [*_first(llm), *map(int, chunk[len(_first(llm)) :])]
    return np.stack(llm.logits_at(tokens, 0, list(range(FIRST, len(chunk)))))


def _first(llm: LlamaContext) -> list[int]:
    return [] if llm.bos is None else [llm.bos]


def write_reference(llm: LlamaContext, chunks: np.ndarray, path: Path, progress: Progress) -> None:
    """Write the reference's log-probabilities of every chunk. chunks: of `divide`."""
    row_bytes = _row_values(llm.n_vocab) * np.dtype(np.uint16).itemsize
    check_file_size(path.parent, len(chunks) * N_SCORED * row_bytes, path.name)
    with path.open("wb") as file:
        file.write(MAGIC + np.array([CHUNK, llm.n_vocab, len(chunks)], np.int32).tobytes() + chunks.tobytes())
        for i, chunk in enumerate(chunks):
            progress.step("reference text", f"chunk {i + 1} of {len(chunks)}", i, len(chunks))
            rows = logits(llm, chunk)
            for start in range(0, N_SCORED, ROWS_AT_ONCE):
                file.write(_stored(rows[start : min(start + ROWS_AT_ONCE, N_SCORED)]).tobytes())
    progress.step("reference text", "", len(chunks), len(chunks))


def _row_values(n_vocab: int) -> int:
    return 2 * ((n_vocab + 1) // 2) + 4


def _stored(rows: np.ndarray) -> np.ndarray:
    """(n, n_vocab) float32 logits -> (n, n_vocab + 4 or 5) uint16.

    A row holds a scale and the least log-probability as two float32, then each log-probability in steps of the scale
    above the least one.
    """
    n, n_vocab = rows.shape
    top = rows.max(1, keepdims=True)
    least = np.maximum(rows.min(1, keepdims=True), top + np.float32(MIN_LOG_P))
    log_sum = np.log(np.exp(rows - top).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)
    scale = (top - least) / np.float32(65535)
    out = np.zeros((n, _row_values(n_vocab)), np.uint16)
    out[:, :4] = np.concatenate([scale, least - top - log_sum], 1).astype(np.float32).view(np.uint16)
    steps = np.rint(np.maximum(rows - least, 0) / np.where(scale > 0, scale, 1))
    out[:, 4 : 4 + n_vocab] = steps.astype(np.uint16)
    return out


class Reference:
    """A file of log-probabilities, of `write_reference` or of llama-perplexity."""

    def __init__(self, path: Path) -> None:
        """Open the file and check its size. Raises MeasureError."""
        with path.open("rb") as file:
            head = file.read(len(MAGIC) + 12)
        if head[: len(MAGIC)] != MAGIC or len(head) < len(MAGIC) + 12:
            raise MeasureError(f"{path}: not a file of log-probabilities")
        context, self.n_vocab, n = map(int, np.frombuffer(head[len(MAGIC) :], np.int32))
        self._width = 2 * ((self.n_vocab + 1) // 2) + 4
        self._start = len(head) + 4 * context * n
        expected = self._start + 2 * self._width * N_SCORED * n
        if context != CHUNK or path.stat().st_size != expected:
            raise MeasureError(
                f"{path}: expected {expected} bytes with chunks of {CHUNK}, found {path.stat().st_size} with {context}"
            )
        self.path = path
        self.chunks = np.fromfile(path, np.int32, context * n, offset=len(head)).reshape(n, context)

    def rows(self, i: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first position, log-probabilities) of chunk i; the array is (up to ROWS_AT_ONCE, n_vocab) float32."""
        with self.path.open("rb") as file:
            file.seek(self._start + 2 * self._width * N_SCORED * i)
            for start in range(0, N_SCORED, ROWS_AT_ONCE):
                n = min(ROWS_AT_ONCE, N_SCORED - start)
                raw = np.frombuffer(file.read(2 * self._width * n), np.uint16).reshape(n, self._width)
                scale, least = np.ascontiguousarray(raw[:, :4]).view(np.float32).T[..., None]
                yield start, scale * raw[:, 4 : 4 + self.n_vocab].astype(np.float32) + least


def score_chunk(
    chunk_logits: np.ndarray, chunk: np.ndarray, reference: Iterator[tuple[int, np.ndarray]]
) -> ChunkScores:
    """Scores of one chunk, with the KL divergence D(reference || model) at each position (Kullback and Leibler 1951).

    chunk_logits: (N_SCORED + 1, n_vocab) float32 of `logits`. chunk: (CHUNK,) tokens. reference: of Reference.rows.
    """
    parts = []
    for start, base in reference:
        rows = chunk_logits[start : start + len(base)]
        top = rows.max(1, keepdims=True)
        log_sum = np.log(np.exp(rows - top).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)
        log_p = rows - (top + log_sum)
        p_reference = np.where(base > MIN_LOG_P, np.exp(base), 0)
        kl = (p_reference * (base - log_p)).sum(1, dtype=np.float64)
        next_tokens = chunk[FIRST + 1 + start : FIRST + 1 + start + len(base)]
        at = np.arange(len(base))
        parts.append((-log_p[at, next_tokens], -base[at, next_tokens], kl, rows.argmax(1) == base.argmax(1)))
    return ChunkScores(*(np.concatenate(column).astype(np.float64) for column in zip(*parts, strict=True)))


def compare(llm: LlamaContext, reference: Reference, progress: Progress, stage: str = "text") -> Divergence:
    """A model against the reference, on the chunks in the reference's file. Raises MeasureError."""
    if llm.n_vocab != reference.n_vocab:
        raise MeasureError(f"{reference.path}: of a vocabulary of {reference.n_vocab}, but the model has {llm.n_vocab}")
    n, scores = len(reference.chunks), []
    for i, chunk in enumerate(reference.chunks):
        progress.step(stage, f"chunk {i + 1} of {n}", i, n)
        scores.append(score_chunk(logits(llm, chunk), chunk, reference.rows(i)))
    progress.step(stage, "", n, n)
    return summary(scores)


def summary(scores: list[ChunkScores]) -> Divergence:
    nll, base, kl, same = (np.concatenate(column) for column in zip(*scores, strict=True))
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
