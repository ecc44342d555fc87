"""The grammar with llama.cpp's real vocabulary: with any logits, an answer is complete and inside its action space."""

from __future__ import annotations

import json
from decimal import Decimal

import numpy as np
import pytest

from edge_agent.actions.envelope import CheckedAction, Rejection, parse_answer
from edge_agent.actions.grammar import json_schema
from edge_agent.actions.space import ActionSpace, ActionType, ChoiceField, NumberField, load_action_space
from edge_agent.bundle.manifest import LANGUAGE, read_manifest
from edge_agent.errors import ConfigError
from edge_agent.model import constrained
from edge_agent.model.constrained import (
    Grammar,
    NonFiniteError,
    PastAnswer,
    grammar_from_lark,
    grammar_from_schema,
    select_greedy,
)
from edge_agent.model.llama import LlamaContext, LlamaOptions

MAX_TOKENS = 60  # the longest answers of the ready spaces have 48
READY = ("velocity_body", "waypoint")
NO_FIELDS = ActionSpace(name="s", valid_for_ms=100, actions={"hold": ActionType()})


@pytest.fixture(scope="module")
def language(toy_bundle):
    opened = read_manifest(toy_bundle)
    with LlamaContext(opened.path(LANGUAGE), LlamaOptions(context=256), opened.manifest.model.embedding) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def grammar(language):
    return Grammar(language.vocab)


@pytest.fixture(scope="module")
def pieces(language):
    """The bytes of every token."""
    return [language.token_bytes(token) for token in range(language.n_vocab)]


def answer(grammar: Grammar, logits, limit: int = MAX_TOKENS) -> list[int]:
    """One complete answer. logits() -> (n_vocab,) float32, called once for every token that is not forced."""
    grammar.start()
    tokens = grammar.forced_tokens()
    while not grammar.complete:
        assert len(tokens) < limit, "the answer does not end"
        tokens.append(grammar.select_token(logits()))
        if not grammar.complete:
            tokens += grammar.forced_tokens()
    return tokens


def random_logits(language, pieces, seed: int):
    """Logits of many kinds: flat noise, noise that favours digits and signs, noise that favours short tokens."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((300, language.n_vocab), dtype=np.float32)
    number = np.array([bool(p) and set(p) <= set(b"0123456789.-+eE") for p in pieces])
    short = np.array([1 / (len(p) or 9) for p in pieces])
    move = np.array([p[:1] in (b"m", b"w") for p in pieces])  # or three of four answers are a bare hold, land, search
    while True:
        weights = generator.choice([0, 3, 30]), generator.choice([0, 10, 100]), generator.choice([0, 50])
        bias = (weights[0] * number + weights[1] * short + weights[2] * move).astype(np.float32)
        yield lambda bias=bias: noise[generator.integers(300)] + bias


def wordings_of(language, grammar, pieces, name: str, n: int) -> set[str]:
    """The texts of n answers to random logits, each checked: complete, inside its space, in the shortest form."""
    space = load_action_space(name)
    grammar.compile(grammar_from_schema(json_schema(space)))
    wordings, longest = set(), 0
    for logits, _ in zip(random_logits(language, pieces, seed=5), range(n), strict=False):
        tokens = answer(grammar, logits)
        text = b"".join(pieces[token] for token in tokens).decode()
        longest = max(longest, len(tokens))
        checked = parse_answer(text, space)
        assert isinstance(checked, CheckedAction) and not checked.clamped, (text, checked)
        fields = space.actions[checked.type].fields
        written = json.loads(text, parse_float=Decimal, parse_int=Decimal)
        assert list(written) == ["action", *fields]
        for key, field in fields.items():
            if isinstance(field, NumberField):
                assert written[key] % Decimal(str(field.step)) == 0, text
        assert text == text.strip() and " " not in text
        wordings.add(text)
    assert {parse_answer(text, space).type for text in wordings} == set(space.actions)
    assert 40 <= longest <= MAX_TOKENS
    return wordings


@pytest.mark.parametrize("name", READY)
def test_every_answer_is_complete_inside_its_space_and_short(language, grammar, pieces, name):
    assert len(wordings_of(language, grammar, pieces, name, 200)) > 100


@pytest.mark.soak
@pytest.mark.parametrize("name", READY)
def test_thousands_of_answers_are_complete_inside_their_space_and_short(language, grammar, pieces, name):
    assert len(wordings_of(language, grammar, pieces, name, 3_000)) > 1_500


def test_cached_states_give_the_answers_of_llguidance(language, grammar, pieces, monkeypatch):
    """The same answers from a grammar with a cache, one whose cache is emptied all the time, and one without."""
    schema = grammar_from_schema(json_schema(load_action_space("velocity_body")))
    grammar.compile(schema)
    fresh = Grammar(language.vocab)
    fresh.compile(schema)
    for n, (logits, _) in enumerate(zip(random_logits(language, pieces, seed=9), range(60), strict=False)):
        drawn = [logits() for _ in range(MAX_TOKENS)]
        monkeypatch.setattr("edge_agent.model.constrained.MAX_CACHED_STATES", 20 if n % 2 else 5_000)
        remembered = answer(grammar, iter(drawn).__next__)
        fresh._forget_states()
        assert remembered == answer(fresh, iter(drawn).__next__)
    grammar.start()
    assert grammar._n_states <= 21 + MAX_TOKENS or constrained.MAX_CACHED_STATES == 5_000


@pytest.mark.parametrize("name", READY)
def test_an_answer_truncated_at_any_letter_is_rejected(language, grammar, pieces, name):
    space = load_action_space(name)
    grammar.compile(grammar_from_schema(json_schema(space)))
    for logits, _ in zip(random_logits(language, pieces, seed=6), range(60), strict=False):
        grammar.start()
        tokens, text = grammar.forced_tokens(), b""
        while True:
            text += b"".join(pieces[token] for token in tokens)
            if grammar.complete:
                break
            assert parse_answer(text.decode(), space).reason == "invalid", text
            tokens = [grammar.select_token(logits())]
            if not grammar.complete:
                tokens += grammar.forced_tokens()
        for end in range(len(text)):  # a token may have several letters
            assert isinstance(parse_answer(text[:end].decode(), space), Rejection)


def test_the_most_likely_allowed_token_is_selected(language, grammar, pieces):
    """With one token far above all others, wherever it is allowed: a space whose answers can all be listed."""
    words = {"alpha", "beta", "gamma"}
    space = ActionSpace(
        name="s",
        valid_for_ms=1,
        actions={"go": ActionType(fields={"to": ChoiceField(one_of=sorted(words))}), "hold": ActionType()},
    )
    grammar.compile(grammar_from_schema(json_schema(space)))
    answers = set()
    for token, piece in enumerate(pieces):
        if piece.decode("ascii", "replace")[:1] not in set("abgh") or not piece.isalpha():
            continue
        logits = np.zeros(language.n_vocab, np.float32)
        logits[token] = 1
        answers.add(b"".join(pieces[t] for t in answer(grammar, lambda logits=logits: logits)).decode())
    assert answers <= {f'{{"action":"go","to":"{word}"}}' for word in words} | {'{"action":"hold"}'}
    assert len(answers) >= 3


# -- drafts and ties --------------------------------------------------------------------------------------------------


@pytest.fixture
def choosing(grammar, pieces):
    """A grammar of three letters, each one of a, b, c -> (it at its start, the tokens of the letters)."""
    grammar.compile(grammar_from_lark("start: L L L\nL: /[abc]/"))
    grammar.start()
    return grammar, {letter: pieces.index(letter.encode()) for letter in "abc"}


def logits_of(language, letters: dict[str, int], **values: float) -> np.ndarray:
    logits = np.full(language.n_vocab, -50.0, np.float32)  # also of tokens with several of the letters
    logits[0] = 50.0  # a token that is never allowed does not matter
    for letter, token in letters.items():
        logits[token] = values.get(letter, 0.0)
    return logits


def test_a_lead_is_over_the_next_allowed_token(language, choosing):
    grammar, letters = choosing
    assert grammar.lead(logits_of(language, letters, a=2.0, b=1.25)) == 0.75
    assert grammar.lead(logits_of(language, letters, a=1.0, c=1.0)) == 0.0
    assert np.isnan(grammar.lead(logits_of(language, letters, b=np.nan)))
    grammar.compile(grammar_from_lark('start: "a" D\nD: /[0-9]/'))
    grammar.start()
    assert grammar.lead(logits_of(language, letters)) == np.inf, "one token is allowed"


def never_alone(i: int) -> tuple[np.ndarray, bool]:
    raise AssertionError(f"step {i} was evaluated alone")


def test_a_lead_above_the_margin_is_taken_from_the_draft_and_a_smaller_one_only_without_a_margin(language, choosing):
    grammar, letters = choosing
    a, b = ([letters[letter]] for letter in "ab")
    steps = [logits_of(language, letters, **{best: 0.5}) for best in "aba"]
    for margin in (0.0, 0.4, 0.5):
        grammar.start()
        answer = PastAnswer([], [])
        grammar.verify_draft(list(steps), [a, b], answer, margin, never_alone)
        assert answer == ([a, b, a], [0.5, 0.5, 0.5]) and grammar.complete


@pytest.mark.parametrize(
    ("alone", "rest_valid", "expected", "asked"),
    [
        ("bba", True, "bba", [0, 1, 2]),  # the plain step agrees with the draft, which goes on
        ("aba", True, "a", [0]),  # it does not: what was drafted behind it is not used
        ("bab", True, "ba", [0, 1]),
        ("bba", False, "b", [0]),  # it agrees, but the draft is no longer in the cache
    ],
)
def test_a_tie_is_decided_by_the_plain_step(language, choosing, alone, rest_valid, expected, asked):
    """Every lead is 0.01 here: the drafted logits prefer b, b, a."""
    grammar, letters = choosing
    drafted, places = [logits_of(language, letters, **{best: 0.01}) for best in "bba"], []

    def evaluate_alone(i: int) -> tuple[np.ndarray, bool]:
        places.append(i)
        for view in views:
            view[:] = np.nan  # another batch overwrites llama.cpp's memory
        return logits_of(language, letters, **{alone[i]: 0.01}), rest_valid

    views = [logits.copy() for logits in drafted]
    answer = PastAnswer([], [])
    draft = [[letters["b"]], [letters["b"]]]
    grammar.verify_draft(list(views), draft, answer, 0.02, evaluate_alone)
    assert answer.steps == [[letters[letter]] for letter in expected] and places == asked
    assert answer.leads == pytest.approx([0.01] * len(expected))


def test_logits_that_are_not_finite_are_never_a_drafts(language, choosing):
    grammar, letters = choosing
    bad = logits_of(language, letters, a=np.nan)
    with pytest.raises(NonFiniteError):
        grammar.verify_draft([bad], [], PastAnswer([], []), 0.02, lambda i: (bad, True))
    grammar.start()
    answer = PastAnswer([], [])
    grammar.verify_draft([bad], [], answer, 0.02, lambda i: (logits_of(language, letters, c=1.0), True))
    assert answer == ([[letters["c"]]], [1.0])


@pytest.mark.parametrize(
    ("leads", "expected"),
    [
        ([], 4),  # nothing is known: all but the last, which nothing follows
        ([9, 9, 9, 9, 9], 4),
        ([9, 9, 9, 9, 0.5], 3),  # the step before a tie comes alone
        ([9, 9, 0.5, 9, 9], 1),
        ([9, 0.5, 9, 9, 9], 0),
        ([0.5, 9, 9, 9, 9], 0),
        ([9, 9, float("nan"), 9, 9], 1),
        ([9, 9, 1.0, float("inf"), 9], 4),  # the margin itself is enough
    ],
)
def test_the_steps_that_are_worth_rows_as_a_draft_end_before_a_tie(leads, expected):
    draft = PastAnswer([[1], [2, 3], [4], [5], [6]], leads)
    assert draft.clear_steps(1.0) == draft.steps[:expected]
    in_front = PastAnswer([[0], *draft.steps], [9, *leads])
    assert in_front.after(1) == draft


def test_forced_tokens_need_no_logits(language, grammar, pieces):
    def ask() -> np.ndarray:
        raise AssertionError("logits were requested")

    grammar.compile(grammar_from_schema(json_schema(NO_FIELDS)))
    tokens = answer(grammar, ask)
    assert b"".join(pieces[token] for token in tokens) == b'{"action":"hold"}'
    assert grammar.complete and grammar.forced_tokens() == []

    for name in READY:  # the forced prefix of every answer
        grammar.compile(grammar_from_schema(json_schema(load_action_space(name))))
        grammar.start()
        assert b"".join(pieces[token] for token in grammar.forced_tokens()) == b'{"action":"'
        assert grammar.forced_tokens() == [] and not grammar.complete


def test_forced_text_is_divided_as_the_tokenizer_divides_it(language, grammar, pieces):
    """The model was trained on the tokenizer's division of text into tokens."""
    grammar.compile(grammar_from_schema(json_schema(NO_FIELDS)))
    grammar.start()
    assert grammar.forced_tokens() == language.tokens('{"action":"hold"}')


def test_an_answer_is_complete_at_its_first_object_and_not_before(language, grammar, pieces):
    grammar.compile(grammar_from_schema(json_schema(load_action_space("velocity_body"))))
    for logits, _ in zip(random_logits(language, pieces, seed=7), range(40), strict=False):
        grammar.start()
        text = b"".join(pieces[token] for token in grammar.forced_tokens())
        while not grammar.complete:
            assert b"}" not in text
            text += pieces[grammar.select_token(logits())]
            if not grammar.complete:
                text += b"".join(pieces[token] for token in grammar.forced_tokens())
        assert text.endswith(b"}") and text.count(b"}") == 1


def test_no_special_token_is_ever_part_of_an_answer(language, grammar, pieces):
    """Ids below 1000 are control tokens without letters; here they are the most likely by far."""
    grammar.compile(grammar_from_schema(json_schema(load_action_space("velocity_body"))))
    generator = np.random.default_rng(0)
    for _ in range(50):
        logits = generator.standard_normal(language.n_vocab, dtype=np.float32)
        logits[:1000] += 1000
        assert min(answer(grammar, lambda logits=logits: logits)) >= 1000


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_from_logits_that_are_not_finite_nothing_is_selected(language, grammar, number):
    grammar.compile(grammar_from_schema(json_schema(load_action_space("velocity_body"))))
    for place in (slice(None), slice(1000, None)):
        grammar.start()
        grammar.forced_tokens()
        logits = np.zeros(language.n_vocab, np.float32)
        logits[place] = number
        with pytest.raises(NonFiniteError):
            grammar.select_token(logits)
        with pytest.raises(NonFiniteError):
            select_greedy(logits)
    grammar.start()
    grammar.forced_tokens()
    with pytest.raises(NonFiniteError):
        grammar.select_token(np.full(language.n_vocab, -np.inf, np.float32))


def test_a_single_nan_among_the_allowed_is_enough(language, grammar, pieces):
    grammar.compile(grammar_from_schema(json_schema(load_action_space("velocity_body"))))
    for first in (b"h", b"l", b"m", b"s"):
        grammar.start()
        grammar.forced_tokens()
        logits = np.zeros(language.n_vocab, np.float32)
        logits[pieces.index(first)] = np.nan
        with pytest.raises(NonFiniteError):
            grammar.select_token(logits)


def test_after_logits_that_are_not_finite_the_next_answer_is_complete(language, grammar, pieces):
    grammar.compile(grammar_from_schema(json_schema(load_action_space("waypoint"))))
    logits = next(random_logits(language, pieces, seed=8))
    for _ in range(20):
        grammar.start()
        grammar.forced_tokens()
        grammar.select_token(logits())
        with pytest.raises(NonFiniteError):
            grammar.select_token(np.full(language.n_vocab, np.nan, np.float32))
        text = b"".join(pieces[token] for token in answer(grammar, logits)).decode()
        assert isinstance(parse_answer(text, load_action_space("waypoint")), CheckedAction)


def test_greedy_is_the_largest():
    logits = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    assert select_greedy(logits) == max(range(4096), key=lambda token: logits[token])
    logits[7] = -np.inf  # an impossible token does not matter
    assert select_greedy(logits) == max(range(4096), key=lambda token: logits[token])


def test_a_schema_without_a_grammar_is_refused_in_one_line(grammar):
    for schema in ({"type": "number", "minimum": 2, "maximum": 1}, {"type": "letter"}, {"$ref": "http://x/y"}):
        with pytest.raises(ConfigError, match=r"^cannot compile a grammar for this action space: .+$"):
            grammar.compile(schema)


def stepping(tmp_path, step: float, limit: float = 9) -> ActionSpace:
    path = tmp_path / "space.yaml"
    field = f"{{min: -{limit}, max: {limit}, step: {Decimal(repr(step)):f}}}"
    path.write_text(f"name: s\nvalid_for_ms: 100\nactions: {{go: {{fields: {{v: {field}}}}}}}\n")
    return load_action_space(str(path))


@pytest.mark.parametrize(
    "step", [0.001, 0.01, 0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 1, 3, 0.07, 0.035, 0.53, 0.57, 1.06, 4.01]
)
def test_numbers_are_multiples_of_their_step(language, grammar, pieces, step, tmp_path):
    space = stepping(tmp_path, step)
    grammar.compile(grammar_from_schema(json_schema(space)))
    for logits, _ in zip(random_logits(language, pieces, seed=9), range(30), strict=False):
        text = b"".join(pieces[token] for token in answer(grammar, logits)).decode()
        assert isinstance(parse_answer(text, space), CheckedAction)
        assert json.loads(text, parse_float=Decimal, parse_int=Decimal)["v"] % Decimal(str(step)) == 0


def test_every_step_that_an_action_space_accepts_has_a_grammar(grammar, tmp_path):
    steps = [n / 100 for n in range(1, 100)] + [7.5, 2] + [n / 1000 for n in range(1, 100, 7)]
    for step in steps:
        grammar.compile(grammar_from_schema(json_schema(stepping(tmp_path, step, limit=1 if step < 0.1 else 9))))
    for limit, step in ((1e9, 0.1), (1e9, 1), (1, 1e-6), (1e9, 0.000001)):  # as large and as fine as is accepted
        grammar.compile(grammar_from_schema(json_schema(stepping(tmp_path, step, limit=limit))))


@pytest.fixture(scope="module")
def hundredths(grammar) -> list[tuple[int, list[int]]]:
    """(n, the tokens of an answer with n / 100) for every hundredth, with as few digits as it needs, or with both."""
    texts = [(n, text) for n in range(-250, 251) for text in {f"{n / 100:g}", f"{n / 100:.1f}", f"{n / 100:.2f}"}]
    return [
        (n, grammar.tokenizer.tokenize_str(f'{{"action":"go","v":{text}}}'))
        for n, text in texts
        if round(100 * float(text)) == n
    ]


@pytest.mark.parametrize("limit", [2.1, 2.0, 1.25])
@pytest.mark.parametrize("step", [0.07, 0.53, 0.25, 0.15, 0.01, 0.1, 0.5, 1])
def test_the_grammar_accepts_exactly_the_multiples_in_the_range(grammar, hundredths, tmp_path, step, limit):
    grammar.compile(grammar_from_schema(json_schema(stepping(tmp_path, step, limit))))
    accepted = set()
    for n, tokens in hundredths:
        matcher = grammar._matcher.deep_copy()
        if matcher.try_consume_tokens(tokens) == len(tokens):
            accepted |= {n} if matcher.is_accepting() else set()
    last, whole = round(100 * limit), round(100 * step)
    assert accepted == {n for n in range(-last, last + 1) if n % whole == 0}
