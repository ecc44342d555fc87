"""The daemon gives the same answers with the trained checkpoint as transformers, which shares no code with it.

tests/reference/make_pad_pilot.py stored the greedy answers of transformers in float32. Here the same pictures go
through edge-quantize, the daemon and the sockets, without quantisation (BF16) and at 4 bits.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from tests.harness import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import flight as benchmark

from edge_agent.actions.envelope import CheckedAction, parse_answer
from edge_agent.actions.space import load_action_space
from edge_agent.config import LanguageConfig, VisionConfig
from tests.harness.engine import engine_of

CHECKPOINT = ROOT / "models" / "pad_pilot" / "checkpoint"
CLEAR = 1.0  # with this lead, in logits, other kernels and 16-bit caches do not change the chosen token


@pytest.fixture(scope="module")
def frozen() -> dict[str, np.ndarray]:
    with np.load(ROOT / "tests" / "reference" / "pad_pilot.npz") as file:
        return dict(file)


def answer_of(text: str) -> benchmark.Answer:
    """The answer with an action, from its JSON text. Its values have the keys of the model."""
    checked = parse_answer(text, load_action_space("velocity_body"))
    assert isinstance(checked, CheckedAction) and not checked.clamped, text
    by_name = {name: key for key, name in benchmark.NAMES.items()}
    return benchmark.Answer(checked.type, {by_name[name]: value for name, value in checked.values.items()}, "")


def test_without_quantisation_the_answers_are_those_of_the_reference(build, frozen):
    with benchmark.pilot(build(CHECKPOINT, "BF16"), "onnxruntime") as link:
        n_clear = 0
        for i, picture in enumerate(frozen["pictures"]):
            given = benchmark.answer(link, picture, str(frozen["instructions"][i]), str(frozen["questions"][i]))
            expected, (lead, words_lead) = answer_of(str(frozen["actions"][i])), frozen["margins"][i]
            if lead > CLEAR:
                assert given[:2] == expected[:2], frozen["instructions"][i]
            if words_lead > CLEAR:
                assert given.words.strip() == str(frozen["words"][i]).strip(), frozen["questions"][i]
            n_clear += (lead > CLEAR) + (words_lead > CLEAR)
    assert n_clear >= len(frozen["pictures"])  # enough answers were compared


def test_at_four_bits_the_action_type_rarely_changes(build, frozen):
    """Without the daemon: test_pad_flight.py has this bundle in it."""
    language, given = LanguageConfig(context=1024, gpu_layers=0), []
    vision = VisionConfig(max_image_tokens=25)
    with engine_of(build(CHECKPOINT, "Q4_K_M"), "velocity_body", profile=None, vision=vision, language=language) as rig:
        for picture, instruction in zip(frozen["pictures"], frozen["instructions"], strict=True):
            rig.engine.instruct(str(instruction))
            given.append(answer_of(rig.answer(np.array(rig.images.resize(picture)))))
    same = [a.action == answer_of(str(text)).action for a, text in zip(given, frozen["actions"], strict=True)]
    assert sum(same) >= len(same) - 1


def test_the_checkpoint_has_the_files_of_a_release():
    files = {file.name for file in CHECKPOINT.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"}
    expected |= {"processor_config.json", "tekken.json", "tokenizer.json", "tokenizer_config.json"}
    assert files == expected
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 30e6
    with (CHECKPOINT / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert {tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"} == {"BF16"}
