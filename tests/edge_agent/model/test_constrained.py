"""The grammar with llama.cpp's real vocabulary: whatever the logits say, an answer is whole and inside its space."""

from __future__ import annotations

import contextlib
import json
from decimal import Decimal

import numpy as np
import pytest

from edge_agent.actions.envelope import CheckedAction, Rejection, parse_answer
from edge_agent.actions.grammar import json_schema
from edge_agent.actions.space import ActionSpace, ActionType, ChoiceField, NumberField, load_action_space
from edge_agent.bundle.manifest import LANGUAGE, read_manifest
from edge_agent.config import LanguageConfig
from edge_agent.errors import ConfigError
from edge_agent.model import constrained
from edge_agent.model.constrained import Grammar, NonFiniteError, grammar_from_schema, greedy
from edge_agent.model.llama import LlamaContext

pytestmark = pytest.mark.filterwarnings("ignore:llama_token_get_attr")  # llguidance, once per token
MAX_TOKENS = 60  # the longest answers of the ready spaces have 48
READY = ("velocity_body", "waypoint")
NO_FIELDS = ActionSpace(name="s", valid_for_ms=100, actions={"hold": ActionType()})


@pytest.fixture(scope="module")
def language(toy_bundle):
    opened = read_manifest(toy_bundle)
    with LlamaContext(opened.path(LANGUAGE), LanguageConfig(context=256), opened.manifest.model.embedding) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def grammar(language):
    return Grammar(language.vocab)


@pytest.fixture(scope="module")
def pieces(language):
    """The bytes of every token."""
    return [language.piece(token) for token in range(language.n_vocab)]


def answer(grammar: Grammar, logits, limit: int = MAX_TOKENS) -> list[int]:
    """One whole answer. logits() -> (n_vocab,) float32, called once for every token that is not forced."""
    grammar.start()
    tokens = grammar.forced()
    while not grammar.complete:
        assert len(tokens) < limit, "the answer does not end"
        tokens.append(grammar.choose(logits()))
        if not grammar.complete:
            tokens += grammar.forced()
    return tokens


def random_logits(language, pieces, seed: int):
    """Logits of many kinds: flat noise, noise that loves digits and signs, noise that loves short tokens."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((300, language.n_vocab), dtype=np.float32)
    number = np.array([bool(p) and set(p) <= set(b"0123456789.-+eE") for p in pieces])
    short = np.array([1 / (len(p) or 9) for p in pieces])
    move = np.array([p[:1] in (b"m", b"w") for p in pieces])  # or three of four answers are a bare hold, land, search
    while True:
        weights = generator.choice([0, 3, 30]), generator.choice([0, 10, 100]), generator.choice([0, 50])
        love = (weights[0] * number + weights[1] * short + weights[2] * move).astype(np.float32)
        yield lambda love=love: noise[generator.integers(300)] + love


@pytest.mark.parametrize("name", READY)
def test_every_answer_is_whole_inside_its_space_and_short(language, grammar, pieces, name):
    space = load_action_space(name)
    grammar.allow(grammar_from_schema(json_schema(space)))
    wordings, longest = set(), 0
    for logits, _ in zip(random_logits(language, pieces, seed=5), range(1000), strict=False):
        tokens = answer(grammar, logits)
        text = b"".join(pieces[token] for token in tokens).decode()
        longest = max(longest, len(tokens))
        asked = parse_answer(text, space)
        assert isinstance(asked, CheckedAction) and not asked.clamped, (text, asked)
        fields = space.actions[asked.type].fields
        written = json.loads(text, parse_float=Decimal, parse_int=Decimal)
        assert list(written) == ["action", *fields]
        for key, field in fields.items():
            if isinstance(field, NumberField):
                assert written[key] % Decimal(str(field.step)) == 0, text
        assert text == text.strip() and " " not in text
        wordings.add(text)
    assert {parse_answer(text, space).type for text in wordings} == set(space.actions)
    assert len(wordings) > 500 and 40 <= longest <= MAX_TOKENS


def test_what_is_remembered_is_what_llguidance_says(language, grammar, pieces, monkeypatch):
    """The same answers from a grammar that remembers, one that forgets all the time, and one that never did."""
    schema = grammar_from_schema(json_schema(load_action_space("velocity_body")))
    grammar.allow(schema)
    fresh = Grammar(language.vocab)
    fresh.allow(schema)
    for n, (logits, _) in enumerate(zip(random_logits(language, pieces, seed=9), range(150), strict=False)):
        drawn = [logits() for _ in range(MAX_TOKENS)]
        monkeypatch.setattr("edge_agent.model.constrained.MAX_CACHED_STATES", 20 if n % 2 else 5_000)
        remembered = answer(grammar, iter(drawn).__next__)
        fresh._forget()
        assert remembered == answer(fresh, iter(drawn).__next__)
    grammar.start()
    assert grammar._n_places <= 21 + MAX_TOKENS or constrained.MAX_CACHED_STATES == 5_000


@pytest.mark.parametrize("name", READY)
def test_an_answer_cut_at_any_token_is_rejected_whole(language, grammar, pieces, name):
    space = load_action_space(name)
    grammar.allow(grammar_from_schema(json_schema(space)))
    for logits, _ in zip(random_logits(language, pieces, seed=6), range(60), strict=False):
        grammar.start()
        tokens, text = grammar.forced(), b""
        while True:
            text += b"".join(pieces[token] for token in tokens)
            if grammar.complete:
                break
            assert parse_answer(text.decode(), space).reason == "invalid", text
            tokens = [grammar.choose(logits())]
            if not grammar.complete:
                tokens += grammar.forced()
        for end in range(len(text)):  # a token may be several letters: every letter, too
            assert isinstance(parse_answer(text[:end].decode(), space), Rejection)


def test_the_likeliest_allowed_token_is_chosen(language, grammar, pieces):
    """With one token far above all others, wherever it is allowed: a space whose answers can all be listed."""
    words = {"alpha", "beta", "gamma"}
    space = ActionSpace(
        name="s",
        valid_for_ms=1,
        actions={"go": ActionType(fields={"to": ChoiceField(one_of=sorted(words))}), "hold": ActionType()},
    )
    grammar.allow(grammar_from_schema(json_schema(space)))
    seen = set()
    for token, piece in enumerate(pieces):
        if piece.decode("ascii", "replace")[:1] not in set("abgh") or not piece.isalpha():
            continue
        logits = np.zeros(language.n_vocab, np.float32)
        logits[token] = 1
        seen.add(b"".join(pieces[t] for t in answer(grammar, lambda logits=logits: logits)).decode())
    assert seen <= {f'{{"action":"go","to":"{word}"}}' for word in words} | {'{"action":"hold"}'}
    assert len(seen) >= 3


def test_forced_tokens_never_ask_the_model(language, grammar, pieces):
    def ask() -> np.ndarray:
        raise AssertionError("asked")

    grammar.allow(grammar_from_schema(json_schema(NO_FIELDS)))
    tokens = answer(grammar, ask)
    assert b"".join(pieces[token] for token in tokens) == b'{"action":"hold"}'
    assert grammar.complete and grammar.forced() == []

    for name in READY:  # what every answer begins with
        grammar.allow(grammar_from_schema(json_schema(load_action_space(name))))
        grammar.start()
        assert b"".join(pieces[token] for token in grammar.forced()) == b'{"action":"'
        assert grammar.forced() == [] and not grammar.complete


def test_forced_text_is_in_the_tokens_that_the_model_knows(language, grammar, pieces):
    """The model was trained on the tokenizer's own way to cut text; a forced text must be cut the same way."""
    grammar.allow(grammar_from_schema(json_schema(NO_FIELDS)))
    grammar.start()
    assert grammar.forced() == language.tokens('{"action":"hold"}')


def test_an_answer_is_complete_at_its_first_object_and_not_before(language, grammar, pieces):
    grammar.allow(grammar_from_schema(json_schema(load_action_space("velocity_body"))))
    for logits, _ in zip(random_logits(language, pieces, seed=7), range(40), strict=False):
        grammar.start()
        text = b"".join(pieces[token] for token in grammar.forced())
        while not grammar.complete:
            assert b"}" not in text
            text += pieces[grammar.choose(logits())]
            if not grammar.complete:
                text += b"".join(pieces[token] for token in grammar.forced())
        assert text.endswith(b"}") and text.count(b"}") == 1


def test_no_special_token_is_ever_part_of_an_answer(language, grammar, pieces):
    """Ids below 1000 are control tokens without letters; they are made the likeliest by far."""
    grammar.allow(grammar_from_schema(json_schema(load_action_space("velocity_body"))))
    generator = np.random.default_rng(0)
    for _ in range(50):
        logits = generator.standard_normal(language.n_vocab, dtype=np.float32)
        logits[:1000] += 1000
        assert min(answer(grammar, lambda logits=logits: logits)) >= 1000


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_logits_that_are_not_finite_choose_nothing(language, grammar, number):
    grammar.allow(grammar_from_schema(json_schema(load_action_space("velocity_body"))))
    for place in (slice(None), slice(1000, None)):
        grammar.start()
        grammar.forced()
        logits = np.zeros(language.n_vocab, np.float32)
        logits[place] = number
        with pytest.raises(NonFiniteError):
            grammar.choose(logits)
        with pytest.raises(NonFiniteError):
            greedy(logits)
    grammar.start()
    grammar.forced()
    with pytest.raises(NonFiniteError):
        grammar.choose(np.full(language.n_vocab, -np.inf, np.float32))


def test_a_single_nan_among_the_allowed_is_enough(language, grammar, pieces):
    grammar.allow(grammar_from_schema(json_schema(load_action_space("velocity_body"))))
    for first in (b"h", b"l", b"m", b"s"):
        grammar.start()
        grammar.forced()
        logits = np.zeros(language.n_vocab, np.float32)
        logits[pieces.index(first)] = np.nan
        with pytest.raises(NonFiniteError):
            grammar.choose(logits)


def test_after_numbers_that_are_not_finite_the_next_answer_is_whole(language, grammar, pieces):
    grammar.allow(grammar_from_schema(json_schema(load_action_space("waypoint"))))
    logits = next(random_logits(language, pieces, seed=8))
    for _ in range(20):
        grammar.start()
        grammar.forced()
        grammar.choose(logits())
        with pytest.raises(NonFiniteError):
            grammar.choose(np.full(language.n_vocab, np.nan, np.float32))
        text = b"".join(pieces[token] for token in answer(grammar, logits)).decode()
        assert isinstance(parse_answer(text, load_action_space("waypoint")), CheckedAction)


def test_greedy_is_the_largest():
    logits = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    assert greedy(logits) == max(range(4096), key=lambda token: logits[token])
    logits[7] = -np.inf  # one that cannot come does not hinder the others
    assert greedy(logits) == max(range(4096), key=lambda token: logits[token])


def test_a_schema_that_is_no_grammar_is_refused_in_one_line(grammar):
    for schema in ({"type": "number", "minimum": 2, "maximum": 1}, {"type": "letter"}, {"$ref": "http://x/y"}):
        with pytest.raises(ValueError, match=r"^action space is no grammar: .+$"):
            grammar.allow(schema)


def stepping(tmp_path, step: float) -> ActionSpace:
    path = tmp_path / "space.yaml"
    path.write_text(
        f"name: s\nvalid_for_ms: 100\nactions: {{go: {{fields: {{v: {{min: -9, max: 9, step: {step}}}}}}}}}\n"
    )
    return load_action_space(str(path))


@pytest.mark.parametrize("step", [0.001, 0.01, 0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 1, 3])
def test_numbers_keep_to_their_step(language, grammar, pieces, step, tmp_path):
    space = stepping(tmp_path, step)
    grammar.allow(grammar_from_schema(json_schema(space)))
    for logits, _ in zip(random_logits(language, pieces, seed=9), range(30), strict=False):
        text = b"".join(pieces[token] for token in answer(grammar, logits)).decode()
        assert isinstance(parse_answer(text, space), CheckedAction)
        assert json.loads(text, parse_float=Decimal, parse_int=Decimal)["v"] % Decimal(str(step)) == 0


def test_every_step_that_a_space_may_have_makes_a_grammar(grammar, tmp_path):
    """llguidance counts in floating point and takes no 0.07: such a space is refused when it is loaded, not later."""
    allowed = 0
    for step in [n / 100 for n in range(1, 100)] + [n / 1000 for n in range(1, 100, 7)] + [1e-6, 7.5, 2]:
        with contextlib.suppress(ConfigError):
            space = stepping(tmp_path, step)
            grammar.allow(grammar_from_schema(json_schema(space)))
            allowed += 1
    assert allowed > 90
