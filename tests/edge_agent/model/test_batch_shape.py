"""What a shape of batches changes, measured on real models, and the rules that follow from it."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.model import batch_shape
from edge_agent.model.batch_shape import ALIGNMENTS, MIN_MARGIN, N_TOKENS, SAFETY_FACTOR, margin_of, shift_of_leads
from edge_agent.model.engine import CALIBRATION_TEXT
from edge_agent.model.llama import ACTION_SEQ, ROW_ALIGNMENT
from tests.harness.engine import engine_of


def test_the_alignment_that_is_found_gives_the_same_bits_in_any_batches(rig):
    """Of a 4-bit model, in batches of all sizes behind a frame."""
    llama = rig.llama
    rig.answer(rig.image(1))
    start = rig.engine.cache.frame_end_position
    tokens = llama.tokens(CALIBRATION_TEXT)
    found = batch_shape.row_alignment(llama, tokens, start)
    assert found in ALIGNMENTS and llama.row_alignment == ROW_ALIGNMENT, "measuring changes nothing"
    tokens = tokens[:30]
    expected = [logits.copy() for logits in llama.logits_at(tokens, start, list(range(30)))]
    try:
        llama.row_alignment = found
        for cut in ([30], [1] * 30, [17, 13], [3, 23, 4], [29, 1]):
            at = 0
            for n in cut:
                llama.truncate(ACTION_SEQ, start + at)
                logits = llama.logits_after_last(tokens[at : at + n], start + at)
                at += n
                assert (logits == expected[at - 1]).all(), (cut, at)
    finally:
        llama.row_alignment = ROW_ALIGNMENT


class FakeLlama:
    """Logits of 64 tokens that depend on the rows of a batch: `alignments` are those that hide it."""

    def __init__(self, *alignments: int) -> None:
        self.alignments, self.row_alignment = alignments, ROW_ALIGNMENT

    def truncate(self, sequence: int, start: int) -> None:
        pass

    def logits_at(self, tokens: list[int], start: int, output_rows: list[int]) -> list[np.ndarray]:
        noise = 0.0 if self.row_alignment in self.alignments else 1e-6 * len(tokens)
        return [np.arange(64, dtype=np.float32) + tokens[row] + noise for row in output_rows]

    def logits_after_last(self, tokens: list[int], start: int) -> np.ndarray:
        return self.logits_at(tokens, start, [len(tokens) - 1])[0]


@pytest.mark.parametrize(("exact", "found"), [((4, 8, 16), 4), ((8, 16), 8), ((16,), 16), ((), 0)])
def test_the_smallest_alignment_without_a_difference_is_taken(exact, found):
    llama = FakeLlama(*exact)
    assert batch_shape.row_alignment(llama, [0] * N_TOKENS, 0) == found
    assert llama.row_alignment == ROW_ALIGNMENT


def test_a_model_that_no_alignment_makes_exact_is_not_reproducible(rig, monkeypatch):
    """Then drafts follow the rule for ties, and the frame stays in the cache."""
    rig.answer(rig.image(1))
    frame = rig.images.encode(rig.image(1))
    before = rig.llama.reproducible, rig.llama.row_alignment, rig.engine.actions.draft_margin
    monkeypatch.setattr(batch_shape, "row_alignment", lambda *_: 0)
    monkeypatch.setattr(batch_shape, "largest_shift", lambda *_: 0.5)
    try:
        rig.engine.measure_batch_shapes(frame)
        assert (rig.llama.reproducible, rig.llama.row_alignment) == (False, 1)
        assert rig.engine.actions.draft_margin == SAFETY_FACTOR * 0.5
        monkeypatch.setattr(batch_shape, "largest_shift", lambda *_: float("nan"))
        rig.engine.measure_batch_shapes(frame)
        assert rig.engine.actions.draft_margin is None, "no drafts where nothing could be measured"
    finally:
        rig.llama.reproducible, rig.llama.row_alignment, rig.engine.actions.draft_margin = before


def test_shapes_that_give_the_same_bits_shift_nothing_and_4_bit_weights_shift_something(toy_bundle, exact_bundle, rig):
    def shift(rig) -> float:
        frame = rig.images.encode(rig.image(1))
        start = len(rig.engine.cache.prefix_tokens)
        tokens = rig.llama.tokens(CALIBRATION_TEXT)
        assert len(tokens) >= N_TOKENS
        rig.llama.truncate(ACTION_SEQ, start)
        behind_prefix = batch_shape.largest_shift(rig.llama, tokens, start)
        found = batch_shape.largest_shift(rig.llama, tokens, start, frame)
        assert len(frame) == frame.n_image_rows, "the frame has no text afterwards"
        assert (behind_prefix > 0) is (found > 0)
        return found

    assert shift(rig) == 0.0  # padded
    with engine_of(toy_bundle, "velocity_body", profile="fast") as native:
        assert 0.0 < shift(native) < 10.0
    with engine_of(exact_bundle, "velocity_body", profile="fast") as native:
        assert 0.0 <= shift(native) < 0.01


@pytest.mark.parametrize(
    ("change", "shift"),
    [
        ({}, 0.0),
        ({63: 0.5}, 0.5),  # the best one rises: its lead over every other grows
        ({62: 0.25, 61: -0.5}, 0.5),
        ({63: 0.25, 62: -0.5}, 0.75),
        ({5: 9.0}, 0.0),  # not among the best
        (dict.fromkeys(range(64), 1.0), 0.0),  # all rise: no lead changes
    ],
)
def test_a_shift_is_the_change_of_a_lead(change, shift):
    plain = np.arange(64, dtype=np.float32)
    other = plain.copy()
    for token, by in change.items():
        other[token] += by
    assert shift_of_leads(plain, other) == pytest.approx(shift)


def test_the_margin_is_a_multiple_of_the_shift_and_never_nothing():
    assert [margin_of(shift) for shift in (0.0, MIN_MARGIN / 10, 0.25)] == [MIN_MARGIN, MIN_MARGIN, 1.0]
