"""Texts about a frame: what is decoded, where it ends, reasoning, and sharing batches with the action lane."""

from __future__ import annotations

import re
import shutil

import msgspec
import numpy as np
import pytest

from edge_agent.bundle.manifest import LANGUAGE, read_manifest, write_manifest
from edge_agent.config import AdvancedConfig, LanguageConfig
from edge_agent.errors import ConfigError
from edge_agent.ipc.events import TextDelta
from edge_agent.model.llama import ACTION_SEQ, LlamaContext, LlamaOptions
from tests.harness.engine import EngineRig, engine_of
from tests.harness.rig import TASK

QUESTIONS = ("What do you see?", "Where is the dog", "Is it red? yes or no")
MAX_TEXT_TOKENS = 24  # of config_of


def test_a_text_is_that_of_greedy_decoding(rig, toy_bundle):
    """Against another context that decodes it token by token on one sequence."""
    special, prompt, texts = rig.engine.prompt.special, rig.engine.prompt, set()
    embedding = read_manifest(toy_bundle).manifest.model.embedding
    options = LlamaOptions(context=1024, threads=1, gpu_layers=0)
    with LlamaContext(toy_bundle / LANGUAGE, options, embedding) as llama:
        for seed, question in enumerate(QUESTIONS):
            image = rig.image(seed)
            rig.answer(image, frame_id=seed)
            rig.events.clear()
            assert rig.ask(question) == MAX_TEXT_TOKENS - 1
            assert {(delta.lane, delta.request, delta.frame_id) for delta in rig.events} == {("answer", "r1", seed)}
            assert [delta.final for delta in rig.events] == [False] * (len(rig.events) - 1) + [True]
            assert rig.events[-1].stop_reason == "length"

            prefix = rig.engine.cache.prefix_tokens
            llama.truncate(ACTION_SEQ, 0)
            llama.logits_after_last(prefix, 0)
            rows, position = rig.rows(image), len(prefix)
            llama.logits_after_last(np.concatenate([rows, prompt.closing_embeddings()]), position)
            position += len(rows) + 1  # after [IMG_END]
            llama.truncate(ACTION_SEQ, position)
            tokens, expected = [*llama.tokens(question), special["inst_end"]], b""
            for _ in range(MAX_TEXT_TOKENS):
                logits = llama.logits_after_last(tokens, position)
                position += len(tokens)
                tokens = [int(np.argmax(logits))]
                expected += llama.token_bytes(tokens[0])
            assert rig.text() == expected.decode("utf-8", "replace")
            texts.add(rig.text())
    assert len(texts) >= 2


def test_a_text_stays_with_its_frame_while_others_are_answered(rig):
    rig.answer(rig.image(1), frame_id=1)
    rig.ask("What do you see?")
    alone = rig.text()
    answers = [rig.answer(rig.image(seed)) for seed in range(2, 6)]

    rig.answer(rig.image(1), frame_id=1)
    rig.events.clear()
    beside = []
    rig.start_text("What do you see?")
    for seed in range(2, 6):
        rig.engine.text.step()
        beside.append(rig.answer(rig.image(seed), frame_id=seed))
    rig.finish_text()
    assert rig.text() == alone
    assert {delta.frame_id for delta in rig.events if delta.lane == "answer"} == {1}
    assert beside == answers


def test_the_end_token_ends_a_text(rig, monkeypatch):
    """The toy never gives </s>; its fifth token counts as one here."""
    rig.answer(rig.image(1))
    is_end = iter([False, False, False, False, True])
    monkeypatch.setattr(rig.llama, "is_end_of_generation", lambda token: next(is_end))
    rig.events.clear()
    assert rig.ask("What?") == 4
    assert rig.events[-1].final and rig.events[-1].stop_reason == ""
    assert [delta.final for delta in rig.events].count(True) == 1


def test_a_text_can_be_stopped_with_a_reason(rig):
    rig.answer(rig.image(1))
    rig.start_text("Describe.", lane="describe", request="")
    rig.engine.text.step()
    rig.engine.text.stop("new-question")
    last = rig.events[-1]
    assert last == TextDelta(lane="describe", frame_id=1, text=last.text, final=True, stop_reason="new-question")
    assert rig.engine.text.idle


@pytest.mark.parametrize("max_reasoning_tokens", [0, 5])
def test_a_question_that_is_too_long_is_refused_with_numbers_that_help(toy_bundle, max_reasoning_tokens):
    """Nothing is decoded. The line names the size of the question, its limit, and the context that is enough."""
    with engine_of(toy_bundle, "velocity_body", **reasoning(max_reasoning_tokens)) as rig:
        rig.answer(rig.image(1))
        for question in ("What? " * 1000, "무엇이 보이나요? " * 100, "a\n" * 900, "\U0001f6f8" * 900):
            rig.events.clear()
            n_calls = rig.llama.n_calls
            rig.start_text(question)
            assert rig.engine.text.idle and rig.llama.n_calls == n_calls
            (delta,) = rig.events
            assert (delta.lane, delta.text, delta.final, delta.stop_reason) == ("answer", "", True, "length")
            n, room, configured, enough = map(int, re.findall(r"[0-9]+", delta.error))
            assert "language.context" in delta.error and configured == 1024 and n > room > 0
            assert enough == rig.llama.context_for(rig.llama.n_ctx + n - room)
        rig.events.clear()
        rig.ask("What?" * (room // 4))
        assert rig.text() and not any(delta.error for delta in rig.events)


def test_a_frame_without_an_answer_can_be_asked_about(rig):
    """The text about it begins as after an answer."""
    rig.answer(rig.image(1))
    rig.ask("What?")
    after_answer = rig.text()
    rig.engine.instruct(TASK)
    rig.events.clear()
    rig.engine.actions.prefill_only(rig.images.encode(rig.image(1)), 9)
    assert rig.events == []
    rig.ask("What?")
    assert {delta.frame_id for delta in rig.events} == {9}
    assert rig.text()[:1] == after_answer[:1]


# -- reasoning --------------------------------------------------------------------------------------------------------


def reasoning(max_tokens: int) -> dict:
    return {"language": LanguageConfig(context=1024, gpu_layers=0, max_text_tokens=8, max_reasoning_tokens=max_tokens)}


@pytest.mark.parametrize("max_tokens", [1, 5])
def test_reasoning_is_a_lane_of_its_own_and_bounded(toy_bundle, max_tokens):
    """The toy never ends its reasoning by itself: the limit ends it, and the answer follows."""
    with engine_of(toy_bundle, "velocity_body", **reasoning(max_tokens)) as rig:
        rig.answer(rig.image(1))
        rig.events.clear()
        rig.ask("What?")
        lanes = [delta.lane for delta in rig.events]
        n = lanes.index("answer")
        assert lanes == ["reasoning"] * n + ["answer"] * (len(lanes) - n)
        assert [i for i, delta in enumerate(rig.events) if delta.final] == [n - 1, len(lanes) - 1]
        assert {delta.request for delta in rig.events} == {"r1"}

        # The same, token by token, on a sequence of its own.
        special, llama = rig.engine.prompt.special, rig.llama
        tokens = [*llama.tokens("What?"), special["inst_end"], special["think"]]
        position, answer_tokens, reasoning_tokens = rig.engine.cache.frame_end_position, [], []
        llama.truncate(ACTION_SEQ, position)
        while len(answer_tokens) < 7:
            logits = llama.logits_after_last(tokens, position)
            position += len(tokens)
            tokens = [int(np.argmax(logits))]
            if len(reasoning_tokens) < max_tokens:
                reasoning_tokens += tokens
            elif special["think_end"] not in reasoning_tokens:
                tokens = [special["think_end"]]
                reasoning_tokens += tokens
            else:
                answer_tokens += tokens
        texts = ["".join(delta.text for delta in part) for part in (rig.events[:n], rig.events[n:])]
        assert texts[0].encode() == b"".join(map(llama.token_bytes, reasoning_tokens))
        assert texts[1].encode() == b"".join(map(llama.token_bytes, answer_tokens))


def test_a_model_that_ends_its_reasoning_by_itself_is_not_forced(toy_bundle, monkeypatch):
    with engine_of(toy_bundle, "velocity_body", **reasoning(100)) as rig:
        rig.answer(rig.image(1))
        rig.events.clear()
        a, b, c, d = (rig.llama.tokens(letter)[0] for letter in "abcd")
        special = rig.engine.prompt.special
        tokens = iter([a, b, special["think_end"], c, d, special["eos"]])
        monkeypatch.setattr("edge_agent.model.text_lane.select_greedy", lambda logits: next(tokens))
        assert rig.ask("What?") == 5
        texts = {
            lane: "".join(delta.text for delta in rig.events if delta.lane == lane) for lane in ("reasoning", "answer")
        }
        assert texts == {"reasoning": "ab", "answer": "cd"}
        assert rig.events[-1].lane == "answer" and rig.events[-1].stop_reason == ""


def test_reasoning_that_was_not_requested_ends_at_once_and_cannot_fill_the_context(toy_bundle, monkeypatch):
    with engine_of(toy_bundle, "velocity_body") as rig:
        rig.answer(rig.image(1))
        rig.events.clear()
        think = rig.engine.prompt.special["think"]
        monkeypatch.setattr("edge_agent.model.text_lane.select_greedy", lambda logits: think)
        rig.ask("What?")
        assert rig.events[-1].stop_reason == "length" and rig.events[-1].lane == "answer"
        assert not any(delta.text for delta in rig.events)


def test_stopping_while_the_model_reasons_ends_both_lanes(toy_bundle):
    with engine_of(toy_bundle, "velocity_body", **reasoning(100)) as rig:
        rig.answer(rig.image(1))
        rig.events.clear()
        rig.start_text(lane="describe", request="")
        rig.engine.text.step()
        rig.engine.text.stop("new-question")
        ends = [(delta.lane, delta.stop_reason) for delta in rig.events if delta.final]
        assert ends == [("reasoning", ""), ("describe", "new-question")]


def test_reasoning_needs_a_model_with_the_token(toy_bundle, tmp_path):
    shutil.copytree(toy_bundle, tmp_path / "b")
    manifest = read_manifest(tmp_path / "b").manifest
    special = {name: token for name, token in manifest.model.special.items() if not name.startswith("think")}
    changed = msgspec.structs.replace(manifest.model, special=special)
    write_manifest(tmp_path / "b", msgspec.structs.replace(manifest, model=changed))
    with (
        pytest.raises(ConfigError, match="max_reasoning_tokens"),
        engine_of(tmp_path / "b", "waypoint", **reasoning(5)),
    ):
        pass


# -- text in the batches of actions -----------------------------------------------------------------------------------


BATCHED = {
    "language": LanguageConfig(context=1024, gpu_layers=0, max_text_tokens=24),
    "advanced": AdvancedConfig(reproducible=False, speculative=False),
}


def n_text_tokens(rig: EngineRig) -> int:
    generation = rig.engine.text.generation
    return generation.n_tokens if generation is not None else 0


def test_text_shares_the_batches_of_actions(exact_bundle):
    """At full precision: every llama_decode of an answer carries the text one token further, and neither changes the
    other. Only where answers need not be reproducible."""
    with engine_of(exact_bundle, "velocity_body", **BATCHED) as rig:
        answers = {seed: rig.answer(rig.image(seed)) for seed in range(1, 9)}
        rig.answer(rig.image(1), frame_id=1)
        rig.events.clear()
        n_steps_alone = rig.ask("What do you see?")
        alone = rig.text()

        rig.answer(rig.image(1), frame_id=1)
        rig.events.clear()
        rig.start_text("What do you see?")
        n_shared = 0
        for seed in range(2, 9):
            n_calls, n_tokens = rig.llama.n_calls, n_text_tokens(rig)
            assert rig.answer(rig.image(seed), frame_id=seed) == answers[seed]
            if not rig.engine.text.idle:
                assert n_text_tokens(rig) - n_tokens == rig.llama.n_calls - n_calls
                n_shared += rig.llama.n_calls - n_calls
        rig.finish_text()
        assert rig.text() == alone and 7 <= n_shared <= n_steps_alone
        assert {delta.frame_id for delta in rig.events if delta.lane == "answer"} == {1}


def test_a_cancelled_answer_loses_no_token_of_the_text_in_its_batch(exact_bundle):
    with engine_of(exact_bundle, "velocity_body", **BATCHED) as rig:
        rig.answer(rig.image(1))
        rig.events.clear()
        rig.ask("What do you see?")
        alone = rig.text()

        rig.answer(rig.image(1))
        rig.events.clear()
        rig.start_text("What do you see?")
        assert rig.decide(rig.image(2), should_cancel=lambda: True).stop_reason == "cancelled"
        rig.finish_text()
        assert rig.text() == alone


def test_text_has_batches_of_its_own_where_answers_are_reproducible(rig):
    rig.answer(rig.image(1))
    rig.start_text()
    before = n_text_tokens(rig)
    rig.answer(rig.image(2))
    assert n_text_tokens(rig) == before and not rig.llama.can_batch_text
    rig.engine.text.stop("new-question")


def test_a_text_that_ends_in_a_shared_batch_leaves_the_answer_as_it_is(exact_bundle, monkeypatch):
    with engine_of(exact_bundle, "velocity_body", **BATCHED) as rig:
        expected = rig.answer(rig.image(2))
        rig.answer(rig.image(1))
        rig.start_text()
        rig.events.clear()
        monkeypatch.setattr(rig.llama, "is_end_of_generation", lambda token: True)
        assert rig.answer(rig.image(2)) == expected
        assert rig.engine.text.idle
        assert [delta.stop_reason for delta in rig.events if delta.final and delta.request] == [""]
