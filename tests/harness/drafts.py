"""Answers with drafts, compared with plain decoding: one step after the other, without a draft."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from edge_agent.model.constrained import NO_ANSWER, PastAnswer
from tests.harness.engine import EngineRig


def whole(draft: PastAnswer) -> PastAnswer:
    """The same draft, of which no step is known as a tie: all of it is offered."""
    return PastAnswer(draft.steps, [])


def drafted_against_plain(rig: EngineRig, shown: Iterable[np.ndarray]) -> tuple[int, list[float]]:
    """(number of answers with a draft, the leads of those that differ from plain decoding). Each image is answered
    without a draft, with the previous answer as draft, and with its own; both whole, as if no step had been a tie. A
    lead is the plain one where they part."""
    actions, previous, n_answers, leads = rig.engine.actions, NO_ANSWER, 0, []
    for image in shown:
        actions.last_answer, actions.last_answer_by_type = NO_ANSWER, {}
        steps: list[tuple[int, float]] = []
        with pytest.MonkeyPatch.context() as patch:
            real = rig.engine.grammar.step

            def step(logits: np.ndarray, steps=steps, real=real) -> list[int]:
                lead = rig.engine.grammar.lead(logits)
                tokens = real(logits)
                steps.append((tokens[0], lead))
                return tokens

            patch.setattr(rig.engine.grammar, "step", step)
            plain = rig.answer(image)
        own = actions.last_answer
        for draft in (previous, own):
            actions.last_answer, actions.last_answer_by_type = whole(draft), {}
            given = rig.answer(image)
            n_answers += 1
            if given != plain:
                both = zip(actions.last_answer.steps, own.steps, strict=False)
                parted = next(i for i, (a, b) in enumerate(both) if a != b)
                leads.append(steps[parted][1])
        previous = own
    return n_answers, leads
