"""How the shape of a batch changes the logits on this machine, measured with the loaded model at warm-up.

llama.cpp chooses kernels by the number of rows, and kernels round in different ways. A draft is evaluated in another
shape than plain decoding, one step after the other. Two measures make its answers those of plain decoding:

- On a CPU, batches are padded to a multiple of some rows with which all shapes give the same bits (`row_alignment`).
- Elsewhere, a drafted token is taken only with a lead that no shape can turn round (`largest_shift`, `margin_of`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from edge_agent.model.frame_buffer import FrameBuffer
from edge_agent.model.llama import ACTION_SEQ, ROW_ALIGNMENT, LlamaContext

# Of ggml's kernels: most take 4 rows at once; those of weights that are not repacked need 8; AVX-512 takes 16.
ALIGNMENTS = (4, 8, ROW_ALIGNMENT)
EXACT_STEPS = (1, 3, 2, 5, 1)  # tokens of each step; together they are one batch of 12
SHIFT_STEPS = (1, 2, 1, 3, 1, 1, 2, 4, 1, 1, 2, 1, 3, 1, 5, 3)
N_TOKENS = sum(SHIFT_STEPS)
N_BEST = 20  # tokens whose distances are compared
# Warm-up measures some hundred distances; among thousands there are larger ones (demo model: 0.02 and 0.12 logits).
SAFETY_FACTOR = 4.0
MIN_MARGIN = 0.02  # logits; float32 alone moves them by less


def row_alignment(llama: LlamaContext, tokens: list[int], start: int) -> int:
    """The smallest multiple of rows with which one batch gives the same bits as its steps; 0: none of ALIGNMENTS.

    tokens: N_TOKENS or more of a real text, evaluated behind what ACTION_SEQ holds before `start`.
    """
    before, tokens = llama.row_alignment, tokens[: sum(EXACT_STEPS)]
    try:
        llama.row_alignment = ROW_ALIGNMENT
        expected = _together(llama, tokens, start, EXACT_STEPS)
        for alignment in ALIGNMENTS:
            llama.row_alignment = alignment
            alone = _one_by_one(llama, tokens, start, EXACT_STEPS)
            if all(np.array_equal(a, b) for a, b in zip(alone, expected, strict=True)):
                return alignment
        return 0
    finally:
        llama.row_alignment = before
        llama.truncate(ACTION_SEQ, start)


def _one_by_one(llama: LlamaContext, tokens: list[int], start: int, steps: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Logits after each step, evaluated as plain decoding does; lazily, so that the first difference ends the work."""
    llama.truncate(ACTION_SEQ, start)
    stops = itertools.accumulate(steps)
    for n, stop in zip(steps, stops, strict=True):
        yield llama.logits_after_last(tokens[stop - n : stop], start + stop - n)


def _together(llama: LlamaContext, tokens: list[int], start: int, steps: tuple[int, ...]) -> list[np.ndarray]:
    """Logits after each step, evaluated in one batch."""
    llama.truncate(ACTION_SEQ, start)
    output_rows = [stop - 1 for stop in itertools.accumulate(steps)]
    return [logits.copy() for logits in llama.logits_at(tokens, start, output_rows)]


def margin_of(shift: float) -> float:
    """The lead, in logits, that no shape of a batch turns round."""
    return max(MIN_MARGIN, SAFETY_FACTOR * shift)


def largest_shift(llama: LlamaContext, tokens: list[int], start: int, frame: FrameBuffer | None = None) -> float:
    """How far the lead of the best token over one of the N_BEST moves, at most, when steps are evaluated as a draft.

    tokens: N_TOKENS or more of a real text, evaluated at `start`, or behind a frame that is evaluated there, in its
    batch. Afterwards ACTION_SEQ holds the frame, or what it held before `start`.
    """
    tokens = tokens[:N_TOKENS]
    if frame is None:
        together = _together(llama, tokens, start, SHIFT_STEPS)
        alone = _one_by_one(llama, tokens, start, SHIFT_STEPS)
        shifts = [shift_of_leads(a, b) for a, b in zip(alone, together, strict=True)]
        llama.truncate(ACTION_SEQ, start)
        return max(shifts)
    n = len(frame)
    output_rows = [n - 1, *(n - 1 + stop for stop in itertools.accumulate(SHIFT_STEPS))]
    frame.append(llama.embed(tokens))
    llama.truncate(ACTION_SEQ, start)
    drafted = [logits.copy() for logits in llama.logits_at(frame, start, output_rows)]
    frame.shorten(n)
    llama.truncate(ACTION_SEQ, start)
    shifts = [shift_of_leads(llama.logits_after_last(frame, start), drafted[0])]
    for plain, other in zip(_one_by_one(llama, tokens, start + n, SHIFT_STEPS), drafted[1:], strict=True):
        shifts.append(shift_of_leads(plain, other))
    llama.truncate(ACTION_SEQ, start + n)
    return max(shifts)


def shift_of_leads(plain: np.ndarray, other: np.ndarray) -> float:
    """The largest change of the best token's lead over the others of the N_BEST. Both: (n_vocab,) float32, of the same
    position."""
    best = np.argpartition(plain, -N_BEST)[-N_BEST:]
    change = other[best] - plain[best]
    return float(np.abs(change - change[np.argmax(plain[best])]).max())
