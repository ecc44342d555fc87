"""Models of other families, wrapped, against llama.cpp used in the plainest way: the same logits, the same words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_agent.actions.grammar import json_schema
from edge_agent.actions.prompt import describe_action_space
from edge_agent.bundle.manifest import LANGUAGE, MMPROJ, read_manifest
from edge_agent.bundle.wrap import wrap
from edge_agent.config import LanguageConfig
from edge_agent.model.constrained import NO_ANSWER
from edge_agent.model.llama import ACTION_SEQ, TEXT_SEQ, LlamaContext, LlamaError, LlamaOptions
from edge_agent.model.prompt import NO_FRAME, ONE_FRAME, SYSTEM_PROMPT
from tests.harness import gguf_toys as toys
from tests.harness.engine import EngineRig, engine_of
from tests.harness.plain_llama import PlainLlama
from tests.harness.rig import TASK, numbers_only
from tests.harness.toy import toy_image

LONG = LanguageConfig(context=3072, gpu_layers=0, max_text_tokens=12)  # a toy's tokens are single letters


def system_prompt(rig: EngineRig) -> str:
    words = SYSTEM_PROMPT if rig.engine.prompt.has_images else SYSTEM_PROMPT.replace(ONE_FRAME, NO_FRAME)
    return words.format(space=describe_action_space(rig.engine.prompt.action_space), instruction=TASK)


def rendered(rig: EngineRig, question: str) -> str:
    """A whole prompt without an image, as a person would write it down."""
    layout = rig.engine.prompt.layout
    return layout.before_system + system_prompt(rig) + layout.before_user + question + layout.before_answer


# -- Gemma 3 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    language = toys.write_language(folder / "language.gguf", "gemma3", toys.GEMMA)
    wrap(language, toys.write_gemma_mmproj(folder / "mmproj.gguf"), folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def gemma_rig(gemma: Path) -> Iterator[EngineRig]:
    with engine_of(gemma, "velocity_body", language=LONG) as rig:
        yield rig


@pytest.fixture(scope="module")
def plain_gemma(gemma: Path) -> Iterator[PlainLlama]:
    with PlainLlama(gemma / LANGUAGE, 3072) as plain:
        yield plain


def text_logits(rig: EngineRig, question: str) -> np.ndarray:
    """Logits behind the frame in the cache and a question."""
    position = rig.engine.cache.frame_end_position
    rig.llama.fork_sequence(position)
    return rig.llama.logits_after_last(rig.engine.prompt.question_tokens(question), position, TEXT_SEQ).copy()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_image_of_gemma_gives_the_logits_of_mtmd_from_end_to_end(
    gemma: Path, gemma_rig: EngineRig, plain_gemma: PlainLlama, seed: int
):
    frame, layout = toy_image(56, 56, seed=seed), gemma_rig.engine.prompt.layout
    before = layout.before_system + system_prompt(gemma_rig) + layout.before_user
    expected = plain_gemma.frame_logits(gemma / MMPROJ, frame, before, "What?" + layout.before_answer)
    gemma_rig.decide(gemma_rig.images.resize(frame))
    assert np.array_equal(text_logits(gemma_rig, "What?"), expected)


def test_without_attention_in_both_directions_the_logits_would_be_others(gemma_rig: EngineRig, monkeypatch):
    frame = toy_image(56, 56, seed=1)
    gemma_rig.decide(gemma_rig.images.resize(frame))
    right = text_logits(gemma_rig, "What?")
    monkeypatch.setattr("edge_agent.model.llama.ll.llama_set_causal_attn", lambda *_: None)
    gemma_rig.decide(gemma_rig.images.resize(frame))
    assert np.abs(text_logits(gemma_rig, "What?") - right).max() > 1e-3


def test_a_frame_of_any_size_becomes_the_square_of_the_encoder(gemma_rig: EngineRig):
    for height, width in ((480, 640), (40, 30)):
        image = gemma_rig.images.resize(toy_image(height, width))
        assert image.shape == (56, 56, 3) and gemma_rig.rows(image).shape == (4, toys.HIDDEN)


def test_a_draft_does_not_change_an_answer_about_an_image_of_gemma(gemma: Path, tmp_path: Path):
    space = numbers_only(tmp_path)
    frames = [toy_image(56, 56, seed=seed) for seed in (1, 1, 2, 3, 2)]
    with engine_of(gemma, space, language=LONG) as drafted:
        answers = [drafted.answer(drafted.images.resize(frame)) for frame in frames]
        assert drafted.engine.actions.n_accepted_tokens > 0
    with engine_of(gemma, space, language=LONG) as rig:
        for frame, answer in zip(frames, answers, strict=True):
            rig.engine.actions.last_answer = NO_ANSWER
            rig.engine.actions.last_answer_by_type.clear()
            assert rig.answer(rig.images.resize(frame)) == answer


def test_a_question_while_paused_sees_the_image(gemma_rig: EngineRig):
    frame = gemma_rig.image(1)
    gemma_rig.decide(frame)
    expected = text_logits(gemma_rig, "What?")
    gemma_rig.decide(gemma_rig.image(2))
    assert gemma_rig.engine.actions.prefill_only(gemma_rig.images.encode(frame), 5)
    assert gemma_rig.engine.cache.frame_id == 5
    assert np.allclose(text_logits(gemma_rig, "What?"), expected, atol=1e-3)


def test_an_image_that_is_larger_than_a_batch_is_refused(gemma_rig: EngineRig):
    with pytest.raises(LlamaError, match="an image of 600 rows; this family needs"):
        gemma_rig.llama.evaluate_image(np.zeros((600, toys.HIDDEN), np.float32), 0)


# -- text only ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["chatml", "llama3", "mistral", "gemma"])
def text_only(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    special = {"chatml": toys.CHATML, "llama3": toys.LLAMA3, "mistral": toys.MISTRAL, "gemma": toys.GEMMA}
    folder = tmp_path_factory.mktemp(request.param)
    language = toys.write_language(folder / "language.gguf", special=special[request.param], seed=4)
    wrap(language, None, folder / "bundle", layout=request.param)
    return folder / "bundle"


def test_words_and_actions_without_images_are_those_of_llama_cpp(text_only: Path, tmp_path: Path):
    space = numbers_only(tmp_path)
    with engine_of(text_only, space, language=LONG) as rig, PlainLlama(text_only / LANGUAGE, 3072) as plain:
        prompt = rig.engine.prompt
        tokens = [*prompt.prefix_tokens(TASK), *prompt.question_tokens("What?")]
        assert tokens == plain.tokens(rendered(rig, "What?"))
        frame = rig.images.resize(toy_image(20, 20))
        for question in ("What?", "Action?"):
            rig.events.clear()
            rig.decide(frame)
            rig.events.clear()
            rig.ask(question)
            assert rig.text() == plain.greedy(rendered(rig, question), LONG.max_text_tokens)
        for state in ("Altitude 3 m. ", "Altitude 3 m. ", "Altitude 90 m. "):
            answer = rig.decide(frame, vehicle_state=state).text
            expected = plain.constrained(rendered(rig, f"{state}Action?"), json_schema(prompt.action_space))
            assert answer == expected
        assert rig.engine.actions.n_accepted_tokens > 0


def test_a_text_only_model_loads_no_encoder_and_warms_up(text_only: Path):
    with engine_of(text_only, "velocity_body", language=LONG) as rig:
        assert rig.images.backend == "none: a text-only model"
        assert not rig.engine.actions.prefill_only(rig.images.encode(np.empty((0, 0, 3), np.uint8)), 3)
        assert rig.engine.cache.frame_end_position == len(rig.engine.prompt.prefix_tokens(TASK))
        rig.engine.keep_warm()
        rig.ask("What?")
        assert rig.images.max_tokens == rig.images.n_tokens(np.empty((0, 0, 3), np.uint8)) == 1


# -- what is refused when it is loaded ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("llama_model_is_recurrent", "recurrent layers"),
        ("llama_model_is_hybrid", "recurrent layers"),
        ("llama_model_is_diffusion", "expected a decoder"),
        ("llama_model_has_encoder", "expected a decoder"),
    ],
)
def test_a_family_that_llama_cpp_knows_better_is_refused(gemma: Path, question: str, words: str, monkeypatch):
    monkeypatch.setattr(f"edge_agent.model.families.ll.{question}", lambda _model: True)
    embedding = read_manifest(gemma).manifest.model.embedding
    with pytest.raises(LlamaError, match=rf"language\.gguf: {words}"):
        LlamaContext(gemma / LANGUAGE, LlamaOptions(context=256, gpu_layers=0), embedding)


def test_positions_of_three_dimensions_are_refused_when_loaded(gemma: Path, monkeypatch):
    import llama_cpp.llama_cpp as ll

    monkeypatch.setattr("edge_agent.model.families.ll.llama_model_rope_type", lambda _model: ll.LLAMA_ROPE_TYPE_MROPE)
    embedding = read_manifest(gemma).manifest.model.embedding
    with pytest.raises(LlamaError, match="M-RoPE"):
        LlamaContext(gemma / LANGUAGE, LlamaOptions(context=256, gpu_layers=0), embedding)
    assert ACTION_SEQ != TEXT_SEQ
