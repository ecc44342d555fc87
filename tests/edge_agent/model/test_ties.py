"""Drafts in batches of another shape than plain decoding: what decides a tie, and what never changes.

A tie: two tokens whose logits are so near that the shape of a batch can turn their order round.
"""

from __future__ import annotations

import json

import pytest

from edge_agent.config import AdvancedConfig
from edge_agent.model.constrained import flatten
from tests.harness.drafts import drafted_against_plain
from tests.harness.engine import engine_of
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
    """And the draft, which is no longer in the cache, is evaluated again behind the first step."""
    with engine_of(exact_bundle, numbers_only(tmp_path), profile="fast") as rig:
        rig.measure()
        actions, image = rig.engine.actions, rig.image(1)
        text, calls = rig.answer(image), []
        actions.draft_margin = 0.02
        with pytest.MonkeyPatch.context() as patch:
            real, leads = rig.llama._evaluate, iter([0.0])
            patch.setattr(rig.engine.grammar, "lead", lambda logits: next(leads, 9.0))  # the first choice is a tie
            patch.setattr(rig.llama, "_evaluate", lambda batch, *rest: calls.append(len(batch)) or real(batch, *rest))
            assert rig.answer(image) == text
        drafted, alone, rest = calls
        n_draft = len(flatten(actions.last_answer[:-1]))
        assert alone == drafted - n_draft and rest == n_draft


def test_the_margin_grows_with_what_real_frames_show(toy_bundle, tmp_path):
    with engine_of(toy_bundle, numbers_only(tmp_path), profile="fast") as rig:
        rig.answer(rig.image(1))
        rig.engine.actions.draft_margin = 1e9  # everything is evaluated alone
        shifts = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "edge_agent.model.action_lane.margin_of", lambda shift: shifts.append(shift) or 1e9 + len(shifts)
            )
            rig.answer(rig.image(1))
        assert len(shifts) > 5 and all(0 <= shift < 10 for shift in shifts)
        assert rig.engine.actions.draft_margin == 1e9 + len(shifts)


@pytest.mark.parametrize("n_alone", [1, 3])
def test_a_cancelled_answer_ends_before_its_next_step_alone(toy_bundle, tmp_path, n_alone):
    with engine_of(toy_bundle, numbers_only(tmp_path), profile="fast") as rig:
        rig.answer(rig.image(1))
        actions = rig.engine.actions
        actions.draft_margin = 1e9
        whole = rig.answer(rig.image(1))
        before = actions.n_steps_alone
        replies = iter([False] * (n_alone + 1))  # before the batch, then before each step but the first
        decision = rig.decide(rig.image(1), should_cancel=lambda: next(replies, True))
        assert decision.stop_reason == "cancelled" and whole.startswith(decision.text) and decision.text != whole
        assert actions.n_steps_alone - before <= n_alone + 1


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
