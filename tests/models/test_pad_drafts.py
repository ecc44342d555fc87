"""The trained model gives the same answers with drafts as without them, in the profile that is the default."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_agent.config import LanguageConfig, VisionConfig
from models.pad_pilot.lessons import held_out_photographs
from tests.harness import ROOT
from tests.harness.drafts import drafted_against_plain
from tests.harness.engine import EngineRig, engine_of

sys.path.insert(0, str(ROOT / "benchmarks"))

import flight

CHECKPOINT = ROOT / "models" / "pad_pilot" / "checkpoint"
SEED = 70_000_000  # frames that training and the other tests do not use


def held_out(rig: EngineRig, n: int) -> Iterator[np.ndarray]:
    """n frames, each under its own instruction."""
    for frame in flight.frames(n, SEED, held_out_photographs()):
        rig.engine.instruct(frame.exercise.instruction)
        yield np.array(rig.images.resize(frame.picture))


def compare(bundle: Path, n: int, profile: str | None) -> dict:
    language = LanguageConfig(context=1024, gpu_layers=0, stream_action_text=False)
    changes = {"profile": profile, "vision": VisionConfig(max_image_tokens=25), "language": language}
    with engine_of(bundle, "velocity_body", **changes) as rig:
        rig.measure()
        n_answers, leads = drafted_against_plain(rig, held_out(rig, n))
        return {
            "profile": profile or "default",
            "drafts": n_answers,
            "different": len(leads),
            "leads": sorted(leads),
            "margin": rig.engine.actions.draft_margin,
            "steps_alone": rig.engine.actions.n_steps_alone,
        }


@pytest.mark.parametrize("profile", [None, "reproducible"])
def test_drafts_change_no_answer(build, profile):
    figures = compare(build(CHECKPOINT, "Q4_K_M"), 8, profile)
    assert figures["drafts"] == 16 and not figures["different"]


@pytest.mark.soak
@pytest.mark.parametrize("profile", [None, "reproducible"])
def test_ten_thousand_drafts_change_no_answer(build, profile, capsys):
    figures = compare(build(CHECKPOINT, "Q4_K_M"), 5_000, profile)
    with capsys.disabled():
        print("\n" + json.dumps(figures))
    assert figures["drafts"] == 10_000 and not figures["different"]
