"""Drafts in batches of another shape than plain decoding: what decides a tie, and what never changes.

A tie: two tokens whose logits are so near that the shape of a batch can turn their order round.
"""

from __future__ import annotations

import json

import pytest

from edge_agent.config import AdvancedConfig
from edge_agent.model.batch_shape import ALIGNMENTS
from edge_agent.model.constrained import PastAnswer, flatten
from tests.harness.drafts import drafted_against_plain, whole
from tests.harness.engine import EngineRig, engine_of
from tests.harness.rig import numbers_only

SHAPES = {  # profiles whose batches have other shapes with a draft than without
    "fast": {"profile": "fast"},
    "small": {"profile": "small"},
    "fast with an 8-bit cache": {"profile": "fast", "advanced": AdvancedConfig(kv_cache_type="q8_0")},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_a_draft_in_another_shape_changes_ties_alone(toy_bundle, tmp_path, changes):
    with engine_of(toy_bundle, numbers_only(tmp_path), **changes) as rig:
        rig.measure()
        shown = (rig.image(seed, 60 + seed % 90, 150 + seed % 70) for seed in range(5))
        n_answers, leads = drafted_against_plain(rig, shown)
        assert n_answers == 10 and rig.engine.actions.n_accepted_tokens > 25
        assert all(lead < rig.engine.actions.draft_margin for lead in leads)


@pytest.mark.parametrize("margin", [0.02, 1e9])
def test_at_full_precision_a_draft_changes_nothing_with_any_margin(exact_bundle, tmp_path, margin):
    """With the large one, each drafted token is decided by a step alone."""
    with engine_of(exact_bundle, numbers_only(tmp_path), profile="fast") as rig:
        rig.engine.actions.draft_margin = margin
        n_answers, leads = drafted_against_plain(rig, (rig.image(seed) for seed in range(4)))
        assert n_answers == 8 and leads == []
        assert (rig.engine.actions.n_steps_alone > 15) is (margin > 1)


def test_without_a_measured_margin_there_is_no_draft(toy_bundle, tmp_path):
    with engine_of(toy_bundle, numbers_only(tmp_path), profile="fast") as rig:
        actions = rig.engine.actions
        text = rig.answer(rig.image(1))
        assert actions.draft_margin is None and rig.answer(rig.image(1)) == text
        assert actions.n_draft_tokens == 0
        rig.measure()
        rig.answer(rig.image(1))
        assert rig.answer(rig.image(1)) == text and actions.n_accepted_tokens > 5


def test_a_tie_behind_the_frame_is_decided_by_the_frame_without_a_draft(exact_bundle, tmp_path):
    """Where padding cannot make the frame's batch exact, as on a GPU. And the draft, which is no longer in the cache,
    is evaluated again behind the first step."""
    with engine_of(exact_bundle, numbers_only(tmp_path), profile="fast") as rig:
        rig.measure()
        actions, image = rig.engine.actions, rig.image(1)
        actions.frame_alignment = 0
        text, calls = rig.answer(image), []
        actions.draft_margin = 0.02
        with pytest.MonkeyPatch.context() as patch:
            real, leads = rig.llama._evaluate, iter([0.0])
            patch.setattr(rig.engine.grammar, "lead", lambda logits: next(leads, 9.0))  # the first choice is a tie
            patch.setattr(rig.llama, "_evaluate", lambda batch, *rest: calls.append(len(batch)) or real(batch, *rest))
            assert rig.answer(image) == text
        drafted, alone, rest = calls
        n_draft = len(flatten(actions.last_answer.steps[:-1]))
        assert alone == drafted - n_draft and rest == n_draft


def lead_of_each_call(patch: pytest.MonkeyPatch, rig: EngineRig, leads: list[float]) -> list[int]:
    """The grammar gives these leads, then 9. Returns the list of the numbers of rows that will be evaluated."""
    rows: list[int] = []
    real, given = rig.llama._evaluate, iter(leads)
    patch.setattr(rig.engine.grammar, "lead", lambda logits: next(given, 9.0))
    patch.setattr(rig.llama, "_evaluate", lambda batch, *rest: rows.append(len(batch)) or real(batch, *rest))
    return rows


def test_a_first_step_is_exact_where_padding_makes_the_batch_of_a_frame_exact(toy_bundle, tmp_path):
    with engine_of(toy_bundle, numbers_only(tmp_path), profile="fast") as rig:
        rig.measure()
        actions, image = rig.engine.actions, rig.image(1)
        assert actions.frame_alignment in ALIGNMENTS, "this CPU has no shape that is exact"
        text = rig.answer(image)
        plain = actions.last_answer
        actions.last_answer, actions.last_answer_by_type = whole(plain), {}
        with pytest.MonkeyPatch.context() as patch:
            rows = lead_of_each_call(patch, rig, [0.0])
            assert rig.answer(image) == text
        assert len(rows) == 1 and actions.n_steps_alone == 0
        assert actions._alignment_of(rig.llama.n_ctx) == 0, "no room for padding"


def test_on_a_gpu_no_batch_of_a_frame_counts_as_exact(toy_bundle, tmp_path, monkeypatch):
    with engine_of(toy_bundle, numbers_only(tmp_path), profile="fast") as rig:
        monkeypatch.setattr(rig.llama, "on_gpu", True)
        rig.measure()
        assert rig.engine.actions.frame_alignment == 0 and rig.engine.actions.draft_margin > 0


def test_a_near_tie_is_decided_by_the_steps_of_plain_decoding(exact_bundle, tmp_path):
    """A step alone stands behind cells that a draft has left. Their rounding decides only the nearest ties."""
    with engine_of(exact_bundle, numbers_only(tmp_path), profile="fast") as rig:
        rig.measure()
        actions, image = rig.engine.actions, rig.image(1)
        text = rig.answer(image)
        steps = actions.last_answer.steps
        for lead, replayed in ((0.01, []), (0.001, [len(steps[0]), len(steps[1])])):
            actions.draft_margin = 0.02
            actions.last_answer, actions.last_answer_by_type = whole(actions.last_answer), {}
            with pytest.MonkeyPatch.context() as patch:
                rows = lead_of_each_call(patch, rig, [9.0, 9.0, lead, lead])
                assert rig.answer(image) == text
            assert rows[1 : 2 + len(replayed)] == [len(steps[1]), *replayed]
            assert len(rows) == (5 if replayed else 2), "the rest is evaluated again behind the replayed steps"


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_frames_whose_ties_were_once_decided_by_rounding(toy_bundle, tmp_path, changes):
    with engine_of(toy_bundle, numbers_only(tmp_path), **changes) as rig:
        rig.measure()
        shown = (rig.image(seed, 60 + seed % 90, 150 + seed % 70) for seed in (98, 99, 132, 133, 266, 267))
        n_answers, leads = drafted_against_plain(rig, shown)
        assert n_answers == 12 and leads == []


def test_the_margin_grows_with_what_real_frames_show(toy_bundle, tmp_path):
    with engine_of(toy_bundle, numbers_only(tmp_path), profile="fast") as rig:
        rig.answer(rig.image(1))
        actions = rig.engine.actions
        actions.draft_margin = 1e9  # everything is evaluated alone
        actions.last_answer, actions.last_answer_by_type = whole(actions.last_answer), {}
        shifts = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "edge_agent.model.action_lane.margin_of", lambda shift: shifts.append(shift) or 1e9 + len(shifts)
            )
            rig.answer(rig.image(1))
        assert len(shifts) > 5 and all(0 <= shift < 10 for shift in shifts)
        assert actions.draft_margin == 1e9 + len(shifts)


def test_steps_that_were_ties_the_last_time_are_decoded_plainly(exact_bundle, tmp_path):
    """With the margin just above the lead of step k: nothing is evaluated twice, and the others are still drafted. The
    first step is exact, so that a tie there costs nothing."""
    with engine_of(exact_bundle, numbers_only(tmp_path), profile="fast") as rig:
        rig.measure()
        actions, image = rig.engine.actions, rig.image(1)
        expected = rig.answer(image)
        steps, leads = actions.last_answer
        assert len(steps) == len(leads) > 6
        for k in (0, 1, 2, len(steps) - 1):
            known = PastAnswer(steps, [9.0 if i != k else 0.01 for i in range(len(steps))])
            actions.draft_margin, calls = 0.02, []
            actions.last_answer, actions.last_answer_by_type = known, {}
            with pytest.MonkeyPatch.context() as patch:
                real, lead = rig.llama._evaluate, iter(known.leads)
                patch.setattr(rig.engine.grammar, "lead", lambda logits, lead=lead: next(lead))
                patch.setattr(
                    rig.llama,
                    "_evaluate",
                    lambda batch, *rest, calls=calls, real=real: calls.append(len(batch)) or real(batch, *rest),
                )
                n_alone = actions.n_steps_alone
                assert rig.answer(image) == expected
            frame_rows = calls[0] - len(flatten(steps[: k - 1 if k else -1]))
            assert actions.n_steps_alone == n_alone and len(calls) == {0: 1, len(steps) - 1: 2}.get(k, 3)
            assert frame_rows == len(rig.rows(image)) + len(rig.engine.prompt.closing_embeddings())
            assert actions.last_answer.leads == known.leads


@pytest.mark.parametrize("n_alone", [1, 3])
def test_a_cancelled_answer_ends_before_its_next_step_alone(toy_bundle, tmp_path, n_alone):
    with engine_of(toy_bundle, numbers_only(tmp_path), profile="fast") as rig:
        rig.answer(rig.image(1))
        actions = rig.engine.actions
        actions.draft_margin = 1e9
        complete = rig.answer(rig.image(1))
        actions.last_answer, actions.last_answer_by_type = whole(actions.last_answer), {}
        before = actions.n_steps_alone
        replies = iter([False] * (n_alone + 1))  # before the batch, then before each step but the first
        decision = rig.decide(rig.image(1), should_cancel=lambda: next(replies, True))
        assert decision.stop_reason == "cancelled" and complete.startswith(decision.text)
        assert decision.text != complete
        assert 0 < actions.n_steps_alone - before <= n_alone + 1


def test_a_text_in_the_batch_keeps_its_tokens_where_a_tie_is_decided_alone(exact_bundle):
    """The step alone overwrites the logits of the batch, also those of the text."""
    with engine_of(exact_bundle, "velocity_body", profile="fast") as rig:
        rig.answer(rig.image(1))
        rig.events.clear()
        rig.ask("What do you see?")
        alone = rig.text()
        rig.answer(rig.image(1))
        rig.events.clear()
        rig.start_text("What do you see?")
        rig.engine.actions.draft_margin = 1e9
        rig.answer(rig.image(2))
        rig.answer(rig.image(2))
        assert rig.engine.actions.n_steps_alone > 1
        rig.finish_text()
        assert rig.text() == alone


def test_a_text_is_not_in_the_batch_of_a_frame_whose_first_step_was_a_tie(exact_bundle, tmp_path):
    """It would be another shape, and the frame would be evaluated again for one token of a text."""
    with engine_of(exact_bundle, numbers_only(tmp_path), profile="fast") as rig:
        rig.measure()
        actions, image = rig.engine.actions, rig.image(1)
        expected = rig.answer(image)
        rig.start_text("What do you see?")
        generation = rig.engine.text.generation
        n_tokens, actions.draft_margin = generation.n_tokens, 1e9
        with pytest.MonkeyPatch.context() as patch:
            real, calls = rig.llama._evaluate, []
            patch.setattr(rig.llama, "_evaluate", lambda batch, *rest: calls.append(len(batch)) or real(batch, *rest))
            assert rig.answer(image) == expected
        frame_rows = len(rig.rows(image)) + len(rig.engine.prompt.closing_embeddings())
        assert calls[0] == frame_rows and all(n < frame_rows for n in calls[1:])
        assert rig.engine.text.generation is generation and generation.n_tokens > n_tokens + 5


@pytest.mark.soak
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_ten_thousand_drafts_of_random_weights_change_ties_alone(toy_bundle, tmp_path, capsys, changes):
    with engine_of(toy_bundle, numbers_only(tmp_path), **changes) as rig:
        rig.measure()
        shown = (rig.image(seed, 60 + seed % 90, 150 + seed % 70) for seed in range(5_000))
        n_answers, leads = drafted_against_plain(rig, shown)
        with capsys.disabled():
            print("\n" + json.dumps({"drafts": n_answers, "different": len(leads), "leads": sorted(leads)[-5:]}))
        assert n_answers == 10_000 and len(leads) <= 10
        assert all(lead < rig.engine.actions.draft_margin for lead in leads)
