"""The trained checkpoint is what it claims to be: transformers, on its own, gives the answers that the daemon gives.

tests/reference/make_pad_pilot.py froze transformers' greedy answers in float32. Here the same pictures go through
edge-quantize, the daemon and the sockets, with nothing quantised (BF16) and at 4 bits.
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

CHECKPOINT = ROOT / "models" / "pad_pilot" / "checkpoint"
CLEAR = 1.0  # a lead of so many logits is not lost to other kernels, nor to 16-bit caches


@pytest.fixture(scope="module")
def frozen() -> dict[str, np.ndarray]:
    with np.load(ROOT / "tests" / "reference" / "pad_pilot.npz") as file:
        return dict(file)


def asked(text: str) -> benchmark.Answer:
    """An action's text as the wire has it, by the model's keys."""
    found = parse_answer(text, load_action_space("velocity_body"))
    assert isinstance(found, CheckedAction) and not found.clamped, text
    by_name = {name: key for key, name in benchmark.NAMES.items()}
    return benchmark.Answer(found.type, {by_name[name]: value for name, value in found.values.items()}, "")


def test_nothing_lost_gives_the_reference_answers(build, frozen):
    with benchmark.pilot(build(CHECKPOINT, "BF16"), "onnxruntime") as link:
        n_clear = 0
        for i, picture in enumerate(frozen["pictures"]):
            said = benchmark.answer(link, picture, str(frozen["instructions"][i]), str(frozen["questions"][i]))
            expected, (lead, words_lead) = asked(str(frozen["actions"][i])), frozen["margins"][i]
            if lead > CLEAR:
                assert said[:2] == expected[:2], frozen["instructions"][i]
            if words_lead > CLEAR:
                assert said.words.strip() == str(frozen["words"][i]).strip(), frozen["questions"][i]
            n_clear += (lead > CLEAR) + (words_lead > CLEAR)
    assert n_clear >= len(frozen["pictures"])  # or the test would be about nothing


def test_four_bits_seldom_choose_another_action(build, frozen):
    with benchmark.pilot(build(CHECKPOINT, "Q4_K_M"), "onnxruntime") as link:
        said = [
            benchmark.answer(link, picture, str(instruction))
            for picture, instruction in zip(frozen["pictures"], frozen["instructions"], strict=True)
        ]
    same = [a.action == asked(str(text)).action for a, text in zip(said, frozen["actions"], strict=True)]
    assert sum(same) >= len(same) - 1


def test_the_folder_holds_what_a_release_holds():
    files = {file.name for file in CHECKPOINT.iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"}
    wanted |= {"processor_config.json", "tekken.json", "tokenizer.json", "tokenizer_config.json"}
    assert files == wanted
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 30e6
    with (CHECKPOINT / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert {tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"} == {"BF16"}
