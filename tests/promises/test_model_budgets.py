"""Budgets of the model process on the toy model. Run by `make promises` on a quiet machine.

Each test prints one JSON line with its figures, also when it passes.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from edge_agent.config import VisionConfig
from edge_agent.model.llama import ACTION_SEQ
from edge_agent.model.load import NO_DEADLINE_NS
from tests.harness import toy
from tests.harness.engine import EngineRig, engine_of

N_FRAMES = 15

pytestmark = pytest.mark.promise


@pytest.fixture
def rig(toy_bundle):
    with engine_of(toy_bundle, "velocity_body", vision=VisionConfig(max_image_tokens=256)) as rig:
        yield rig


def median_prefill_ms(rig: EngineRig, picture: np.ndarray, max_tokens: int) -> float:
    times_ms = []
    for frame_id in range(N_FRAMES):
        embeddings = rig.images.embed(picture, max_tokens)
        times_ms.append(rig.engine.actions.decide(embeddings, frame_id, NO_DEADLINE_NS).prefill_ms)
    return float(np.median(times_ms))


def test_fewer_image_tokens_make_a_frame_faster(rig, report):
    """What the token budget relies on: a quarter of the tokens takes less than 0.6 of the time."""
    picture = toy.toy_image(480, 640, seed=1)
    whole_ms, reduced_ms = (median_prefill_ms(rig, picture, n) for n in (256, 64))
    report({"promise": "prefill", "ms_256_tokens": round(whole_ms, 2), "ms_64_tokens": round(reduced_ms, 2)})
    assert reduced_ms < 0.6 * whole_ms


def test_the_engine_adds_little_to_encoding_and_one_decode(rig, report):
    """A frame whose answer is the previous one, against encoding and one llama_decode of the same rows: 1.15 times."""
    picture, answer_ms, floor_ms = toy.toy_image(480, 640, seed=1), [], []
    start = len(rig.engine.cache.prefix_tokens)
    for frame_id in range(N_FRAMES + 1):
        image = np.array(rig.images.resize(picture))
        n_rows = -rig.llama.n_rows
        began_s = time.monotonic()
        rig.engine.actions.decide(rig.images.encode(image), frame_id, NO_DEADLINE_NS)
        answer_ms.append((time.monotonic() - began_s) * 1000)
        n_rows += rig.llama.n_rows
        began_s = time.monotonic()
        embeddings = rig.images.encode(image)
        embeddings.embeddings(n_rows)
        rig.llama.truncate(ACTION_SEQ, start)
        rig.llama.logits_after_last(embeddings, start)
        floor_ms.append((time.monotonic() - began_s) * 1000)
    share = float(np.median(answer_ms[1:]) / np.median(floor_ms[1:]))  # the first answer has no draft
    report(
        {"promise": "engine", "answer_ms": round(float(np.median(answer_ms[1:])), 2), "times_floor": round(share, 3)}
    )
    assert share < 1.15
