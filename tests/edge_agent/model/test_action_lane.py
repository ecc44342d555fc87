"""Answers to frames, against a plain evaluation of the whole prompt; drafts; what ends an answer early."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import llguidance
import llguidance.numpy
import numpy as np
import pytest
import yaml

from edge_agent.actions import action_tokens
from edge_agent.actions.envelope import CheckedAction, parse_answer
from edge_agent.actions.grammar import json_schema
from edge_agent.actions.prompt import describe_action_space
from edge_agent.actions.space import READY_SPACES
from edge_agent.actions.vehicle_state import render_vehicle_state
from edge_agent.bundle.manifest import LANGUAGE, read_manifest
from edge_agent.config import AdvancedConfig, LanguageConfig
from edge_agent.ipc.events import TextDelta
from edge_agent.model.constrained import NO_ANSWER, NonFiniteError, PastAnswer, flatten
from edge_agent.model.events import Events
from edge_agent.model.llama import ACTION_SEQ, LlamaContext, LlamaOptions
from edge_agent.model.prompt import SYSTEM_PROMPT
from tests.harness import toy
from tests.harness.engine import EngineRig, engine_of
from tests.harness.rig import TASK, numbers_only

CLEAR = 0.01  # a smaller margin between two tokens says nothing about the method
NO_DRAFTS = {"advanced": AdvancedConfig(speculative=False)}


def space_file(folder: Path, name: str, **changes: object) -> str:
    """A ready action space with changes, as a file."""
    space = yaml.safe_load((READY_SPACES / f"{name}.yaml").read_text()) | changes
    (folder / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
    return str(folder / "space.yaml")


def only(name: str, action_type: str) -> dict:
    """A change of a ready space: this action type alone; "" changes nothing."""
    space = yaml.safe_load((READY_SPACES / f"{name}.yaml").read_text())
    return {"actions": {action_type: space["actions"][action_type]}} if action_type else {}


# -- an answer --------------------------------------------------------------------------------------------------------


def plain_answer(llama: LlamaContext, rig: EngineRig, image: np.ndarray) -> tuple[str, float]:
    """The answer by the plainest method: for every token, the whole prompt in one batch from an empty cache, and the
    most likely token that the grammar allows. Also the smallest margin of a choice, as a share of the largest logit.
    After a margin that is not clear the answer ends."""
    special, space = rig.engine.prompt.special, rig.engine.prompt.action_space
    system = SYSTEM_PROMPT.format(space=describe_action_space(space), instruction=TASK)
    prompt = [
        llama.embed([special["bos"], special["system"], *llama.tokens(system), special["system_end"]]),
        llama.embed([special["inst"]]),
        rig.rows(image),
        llama.embed([special["img_end"], *llama.tokens("Action?"), special["inst_end"]]),
    ]
    compact = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
    schema = json.dumps(json_schema(space) | {"x-guidance": compact})
    tokenizer = rig.engine.grammar.tokenizer
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_json_schema(schema))
    mask = llguidance.numpy.allocate_token_bitmask(1, tokenizer.vocab_size)
    tokens: list[int] = []
    closest = 1.0
    while not matcher.is_accepting() and closest > CLEAR:
        llguidance.numpy.fill_next_token_bitmask(matcher, mask, 0)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8).ravel(), bitorder="little")[: llama.n_vocab])
        token = int(allowed[0])
        if len(allowed) > 1:
            llama.truncate(ACTION_SEQ, 0)
            answer_rows = [llama.embed(tokens)] if tokens else []
            logits = llama.logits_after_last(np.concatenate([*prompt, *answer_rows]), 0)
            second, first = allowed[np.argsort(logits[allowed])[-2:]]
            token = int(first)
            closest = min(closest, (logits[first] - logits[second]) / np.abs(logits).max())
        matcher.consume_token(token)
        tokens.append(token)
    return b"".join(llama.token_bytes(token) for token in tokens).decode(), closest


@pytest.mark.parametrize(
    ("name", "action_type", "n_images"),
    [("velocity_body", "", 3), ("waypoint", "", 3), ("velocity_body", "move", 2), ("waypoint", "waypoint", 3)],
)
def test_an_answer_is_that_of_a_plain_evaluation(exact_bundle, tmp_path, name, action_type, n_images):
    """Also with the one action type that has numbers, since the toy prefers to land.

    An answer that depends on a smaller margin than CLEAR does not count.
    """
    path, embedding = exact_bundle / LANGUAGE, read_manifest(exact_bundle).manifest.model.embedding
    n_compared, answers = 0, set()
    with (
        engine_of(exact_bundle, space_file(tmp_path, name, **only(name, action_type))) as rig,
        LlamaContext(path, LlamaOptions(context=1024, threads=1, gpu_layers=0), embedding) as llama,
    ):
        for seed in range(6 * n_images):
            image = rig.image(seed, 60 + 7 * seed, 150 + 3 * seed)
            answer = rig.answer(image)
            expected, closest = plain_answer(llama, rig, image)
            if closest > CLEAR:
                assert answer == expected
                answers.add(answer)
                n_compared += 1
            if n_compared == n_images:
                break
    assert n_compared == n_images
    assert not action_type or len(answers) > 1


def test_an_answer_depends_on_the_image_and_the_instruction_and_on_nothing_before(toy_bundle):
    with engine_of(toy_bundle, "waypoint") as rig:
        logits: dict = {}
        for seed, instruction in itertools.product((1, 2, 3, 1, 3, 2), (TASK, "Land now.")):
            rig.engine.instruct(instruction)
            rig.answer(rig.image(seed))
            start = len(rig.engine.cache.prefix_tokens)
            rig.llama.truncate(ACTION_SEQ, start)
            after_image = rig.llama.logits_after_last(rig.rows(rig.image(seed)), start).copy()
            assert (logits.setdefault((seed, instruction), after_image) == after_image).all()
    assert len({values.tobytes() for values in logits.values()}) == 6


def test_answers_are_actions_and_have_times(rig):
    for seed in range(10):
        decision = rig.decide(rig.image(seed, 100 + 20 * seed), seed)
        assert decision.stop_reason == ""
        assert isinstance(parse_answer(decision.text, rig.engine.prompt.action_space), CheckedAction)
        assert decision.prefill_ms > 0 and decision.decode_ms > 0


def test_the_deltas_together_are_the_answer(rig):
    for seed in range(5):
        rig.events.clear()
        text = rig.answer(rig.image(seed), frame_id=seed)
        assert all(isinstance(delta, TextDelta) and delta.lane == "action" for delta in rig.events)
        assert {delta.frame_id for delta in rig.events} == {seed}
        assert "".join(delta.text for delta in rig.events) == text
        assert [delta.final for delta in rig.events] == [False] * (len(rig.events) - 1) + [True]
        assert len(rig.events) > 2 and all(delta.text for delta in rig.events[:-1])


def test_the_text_of_actions_is_streamed_only_where_it_is_configured(toy_bundle):
    language = LanguageConfig(context=1024, gpu_layers=0, stream_action_text=False)
    with engine_of(toy_bundle, "velocity_body", language=language) as rig:
        assert rig.answer(rig.image(1)).startswith('{"action":"')
        assert rig.events == []


def test_a_buffer_can_be_answered_twice(rig):
    """The text of the first answer is not part of the second prompt."""
    embeddings = rig.images.encode(rig.image(1))
    first = rig.engine.actions.decide(embeddings, 1, 2**62)
    assert rig.engine.actions.decide(embeddings, 1, 2**62).text == first.text


# -- what ends an answer early ----------------------------------------------------------------------------------------


class FakeClock:
    """Nanoseconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


@pytest.mark.parametrize("n_deltas", [1, 2])
def test_an_answer_that_is_not_complete_at_its_deadline_is_late(toy_bundle, tmp_path, n_deltas):
    """The deadline passes while the answer is decoded: the clock jumps when this many deltas were received."""
    with engine_of(toy_bundle, numbers_only(tmp_path), **NO_DRAFTS) as rig:
        image, clock, deltas = rig.image(1), FakeClock(), []
        whole = rig.answer(image)

        def receive(delta: TextDelta) -> None:
            deltas.append(delta)
            if len(deltas) == n_deltas:
                clock.now_ns = 401

        rig.engine.actions._clock = clock
        decision = rig.decide(image, deadline_ns=400, events=Events(receive))
        assert decision.stop_reason == "late" and deltas[-1].final and deltas[-1].stop_reason == "late"
        assert whole.startswith(decision.text) and decision.text != whole and len(deltas) == n_deltas + 1
        assert parse_answer(decision.text, rig.engine.prompt.action_space).reason == "invalid"
        assert rig.answer(image) == whole, "nothing of it stays"


def test_a_cancelled_answer_ends_before_its_next_step(toy_bundle, tmp_path):
    with engine_of(toy_bundle, numbers_only(tmp_path), **NO_DRAFTS) as rig:
        whole, n_calls = rig.answer(rig.image(1)), rig.llama.n_calls
        replies = iter([False, True])
        decision = rig.decide(rig.image(1), should_cancel=lambda: next(replies))
        assert decision.stop_reason == "cancelled" and whole.startswith(decision.text) and decision.text != whole
        assert rig.llama.n_calls == n_calls + 2 and rig.events[-1].stop_reason == "cancelled"


class BrokenEncoder:
    """A vision encoder with wrong numbers in some of its rows, as a graphics driver's may be."""

    def __init__(self, encoder: object, value: float, rows: slice) -> None:
        self.encoder, self.value, self.rows = encoder, value, rows

    def encode(self, image: np.ndarray, out: np.ndarray) -> np.ndarray:
        rows = self.encoder.encode(image, out)
        rows[self.rows] = self.value
        return rows


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [slice(None), slice(3, 4)])
def test_embeddings_that_are_not_finite_never_become_an_action(rig, monkeypatch, value, rows):
    """llama.cpp's 4-bit kernels on a CPU take NaN for zero: the logits look valid."""
    image = rig.image(1)
    before = rig.answer(image)
    monkeypatch.setattr(rig.images, "encoder", BrokenEncoder(rig.images.encoder, value, rows))
    with pytest.raises(NonFiniteError, match="vision encoder"):
        rig.images.encode(image)
    monkeypatch.undo()
    assert rig.answer(image) == before


def test_logits_that_are_not_finite_never_become_an_action_or_a_text(rig, monkeypatch):
    image = rig.image(1)
    before, real = rig.answer(image), rig.llama._evaluate
    monkeypatch.setattr(
        rig.llama, "_evaluate", lambda *arguments: [np.full_like(logits, np.nan) for logits in real(*arguments)]
    )
    decision = rig.decide(image)
    assert (decision.stop_reason, decision.text) == ("not-finite", '{"action":"')
    rig.start_text()
    assert rig.engine.text.idle
    assert rig.events[-1].request == "r1" and (rig.events[-1].final, rig.events[-1].stop_reason) == (True, "not-finite")
    monkeypatch.undo()
    assert rig.answer(image) == before


def test_an_answer_that_is_too_long_ends(rig, monkeypatch):
    monkeypatch.setattr(rig.engine.prompt, "max_answer_tokens", len(rig.engine.prompt.forced_prefix) - 1)
    decision = rig.decide(rig.image(1))
    assert (decision.stop_reason, decision.text) == ("length", '{"action":"')
    assert (rig.events[-1].final, rig.events[-1].stop_reason) == (True, "length")


def test_frames_of_any_size_in_any_order_are_answered(rig):
    sizes = [(1, 1), (4320, 7680), (1, 3000), (480, 640), (3000, 1), (27, 29), (480, 640)]
    answers = []
    for n, (height, width) in enumerate(sizes):
        image = np.resize(toy.toy_image(48, 64, seed=3), (height, width, 3))
        decision = rig.decide(np.array(rig.images.resize(image)), n)
        assert decision.stop_reason == ""
        assert isinstance(parse_answer(decision.text, rig.engine.prompt.action_space), CheckedAction)
        answers.append(decision.text)
    assert answers[3] == answers[6], "an answer does not depend on the frames before"


# -- drafts -----------------------------------------------------------------------------------------------------------


def wrong_drafts(rng: np.random.Generator, answer: list[list[int]], others: list[list[list[int]]]) -> dict:
    """Drafts of every kind in place of the previous answer."""
    at = int(rng.integers(len(answer)))
    swapped = [list(step) for step in answer]
    swapped[at][0] = int(rng.integers(1000, 4096))
    return {
        "right": answer,
        "empty": [],
        "another frame's": others[int(rng.integers(len(others)))],
        "shorter": answer[:at],
        "longer": [*answer, *answer],
        "a step left out": answer[:at] + answer[at + 1 :],
        "a step twice": answer[: at + 1] + answer[at:],
        "one token wrong": swapped,
        "noise": [[int(token)] for token in rng.integers(1000, 4096, rng.integers(1, 40))],
    }


def answer_under_drafts(bundle_folder: Path, space: str, n_frames: int) -> int:
    """Answer frames under every kind of draft, and beside a text; each answer must be the one without a draft. Returns
    the number of answers."""
    rng, n_answers, others = np.random.default_rng(5), 0, [[[1000]]]
    language = LanguageConfig(context=1024, gpu_layers=0, max_text_tokens=24)
    with engine_of(bundle_folder, space, language=language) as rig:
        actions, text = rig.engine.actions, rig.engine.text
        for seed in range(n_frames):
            image = rig.image(seed, 60 + seed % 90, 150 + seed % 70)
            actions.last_answer, actions.last_answer_by_type = NO_ANSWER, {}
            n_plain_calls = -rig.llama.n_calls
            expected = rig.answer(image)
            n_plain_calls += rig.llama.n_calls
            answer = actions.last_answer.steps
            if seed % 3 == 0:
                rig.start_text()
            for kind, draft in wrong_drafts(rng, answer, others).items():
                actions.last_answer = PastAnswer(draft, [])
                n_calls = -rig.llama.n_calls
                assert rig.answer(image) == expected, (seed, kind)
                n_calls += rig.llama.n_calls
                assert actions.last_answer.steps == answer
                assert kind != "right" or n_calls == 1
                assert n_calls <= n_plain_calls
                if not text.idle:
                    text.step()
                n_answers += 1
            if not text.idle:
                text.stop("new-question")
            others = [*others[-20:], answer]
    return n_answers


def test_after_another_action_type_the_last_answer_of_that_type_is_the_draft(toy_bundle, tmp_path):
    """The type costs one more llama_decode; its values come as a draft."""
    move = only("velocity_body", "move")["actions"]["move"]
    with engine_of(toy_bundle, space_file(tmp_path, "velocity_body", actions={"fly": move, "walk": move})) as rig:
        actions = rig.engine.actions
        text = rig.answer(rig.image(1))
        answer, n_calls = actions.last_answer.steps, rig.llama.n_calls
        other = rig.llama.tokens("walk" if "fly" in text else "fly")
        assert len(answer) > 3 and other[0] != answer[0][0]
        actions.last_answer = PastAnswer([other], [])
        assert rig.answer(rig.image(1)) == text and rig.llama.n_calls == n_calls + 2
        assert actions.last_answer.steps == answer


@pytest.mark.parametrize(
    ("name", "action_type"), [("velocity_body", "move"), ("waypoint", "waypoint"), ("velocity_body", "")]
)
def test_a_draft_changes_nothing_but_the_time(toy_bundle, tmp_path, name, action_type):
    assert answer_under_drafts(toy_bundle, space_file(tmp_path, name, **only(name, action_type)), 5) == 45


def test_a_draft_that_is_wrong_is_not_evaluated_again_and_again(exact_bundle, tmp_path):
    """Each continuation evaluates at most 3 tokens of it, or 4 times what was right in the batch before."""
    with engine_of(exact_bundle, numbers_only(tmp_path), profile="fast") as rig:
        rig.engine.actions.draft_margin = 0.0
        actions, offered = rig.engine.actions, []
        rig.answer(rig.image(1))
        draft = actions.last_answer
        plain = rig.answer(rig.image(2))
        actions.last_answer, actions.last_answer_by_type = draft, {}
        before = actions.n_accepted_tokens
        with pytest.MonkeyPatch.context() as patch:
            real = actions._continue
            patch.setattr(
                actions, "_continue", lambda new, draft, at: offered.append(len(flatten(draft))) or real(new, draft, at)
            )
            assert rig.answer(rig.image(2)) == plain
        n_right = actions.n_accepted_tokens - before
        assert len(offered) > 5 and sum(offered) <= 3 * len(offered) + 4 * (n_right + len(offered))
        assert sum(n > 3 for n in offered) <= len(offered) // 2


@pytest.mark.soak
def test_thousands_of_drafts_change_nothing(toy_bundle, exact_bundle):
    n_answers = answer_under_drafts(toy_bundle, "velocity_body", 400)
    assert n_answers + answer_under_drafts(exact_bundle, "waypoint", 400) == 7200


# -- action tokens and vehicle state ----------------------------------------------------------------------------------


def with_horizon(folder: Path, horizon: int) -> str:
    name = "velocity_body_action_tokens"
    return space_file(folder, name, **only(name, "move"), horizon=horizon, chunk_step_ms=100 * (horizon > 1))


@pytest.mark.parametrize("horizon", [1, 4])
def test_action_tokens_are_answered_by_the_same_method(toy_bundle, tmp_path, horizon):
    """Each token is the most likely allowed one, by a plain evaluation; the text is their meaning."""
    first, n_tokens = action_tokens.FIRST_TOKEN, action_tokens.N_TOKENS
    with engine_of(toy_bundle, with_horizon(tmp_path, horizon)) as rig:
        prompt, texts = rig.engine.prompt, set()
        for seed in range(6):
            image = rig.image(seed)
            rig.events.clear()
            text = rig.answer(image)
            action = parse_answer(text, prompt.action_space)
            assert isinstance(action, CheckedAction) and len(action.chunk) == horizon - 1
            assert "".join(delta.text for delta in rig.events) == text and rig.events[-1].final

            rows, ids, start = rig.rows(image), list(prompt.forced_prefix), len(rig.engine.cache.prefix_tokens)
            rig.llama.truncate(ACTION_SEQ, start)
            batch = np.concatenate([rows, prompt.closing_embeddings()])
            logits = rig.llama.logits_after_last(batch, start)
            position = start + len(batch)
            while len(ids) < 1 + 4 * horizon:
                ids.append(first + int(np.argmax(logits[first : first + n_tokens])))
                logits = rig.llama.logits_after_last(ids[-1:], position)
                position += 1
            assert text == action_tokens.decode(prompt.action_space, ids)
            texts.add(text)
            n_calls = rig.llama.n_calls
            assert rig.answer(image) == text and rig.llama.n_calls == n_calls + 1  # its own draft
        assert len(texts) > 1


def test_vehicle_state_stands_behind_the_frame_and_changes_the_answer(toy_bundle, tmp_path):
    state = {"text": "Altitude {altitude_m}. ", "values": {"altitude_m": {"unit": "m"}}}
    with engine_of(toy_bundle, space_file(tmp_path, "waypoint", vehicle_state=state)) as rig:
        image, prompt, logits_by_state = rig.image(1), rig.engine.prompt, {}
        for values in ({}, {"altitude_m": (3.0, 1)}, {"altitude_m": (30.0, 1)}, {}):
            text = render_vehicle_state(prompt.action_space, values, 1)
            decision = rig.decide(image, vehicle_state=text)
            assert decision.stop_reason == ""
            assert isinstance(parse_answer(decision.text, prompt.action_space), CheckedAction)

            special, start = prompt.special, len(rig.engine.cache.prefix_tokens)
            tokens = [special["img_end"], *rig.llama.tokens(f"{text}Action?"), special["inst_end"]]
            closing = rig.llama.embed([*tokens, *prompt.forced_prefix])
            rig.llama.truncate(ACTION_SEQ, start)
            logits = rig.llama.logits_after_last(np.concatenate([rig.rows(image), closing]), start).copy()
            grammar = rig.engine.grammar
            grammar.start()
            first_tokens = [*grammar.forced_tokens(), grammar.select_token(logits)]
            assert decision.text.encode().startswith(b"".join(map(rig.llama.token_bytes, first_tokens)))
            assert (logits_by_state.setdefault(text, logits) == logits).all()
        assert len({logits.tobytes() for logits in logits_by_state.values()}) == 3
