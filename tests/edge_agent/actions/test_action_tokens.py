"""The codec action_tokens: encode, decode, and a grammar that allows complete answers only."""

from __future__ import annotations

import json

import llguidance
import llguidance.numpy
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.actions import action_tokens
from edge_agent.actions.envelope import CheckedAction, Rejection, parse_answer
from edge_agent.actions.space import ActionSpace, ActionType, ChoiceField, NumberField, load_action_space
from edge_agent.errors import ConfigError

READY = load_action_space("velocity_body_action_tokens")
FIELDS = {
    "x": NumberField(name="forward_m", min=-3.0, max=5.0, step=0.5, q01=-1.0, q99=3.0),
    "pace": ChoiceField(one_of=["slow", "normal", "fast"]),
}
CHUNK = ActionSpace(
    name="chunk", valid_for_ms=800, codec="action_tokens", horizon=4, chunk_step_ms=200,
    actions={"go": ActionType(fields=FIELDS), "stop": ActionType()},
)  # fmt: skip


def test_the_ready_space_is_velocity_body_with_another_codec():
    velocity = load_action_space("velocity_body")
    assert msgspec.structs.replace(READY, name="velocity_body", codec="json") == velocity


def test_a_move_is_five_tokens_and_a_hold_is_one():
    move = action_tokens.encode(READY, "move", [{"vx": 1.0, "vy": 0.0, "vz": -1.0, "yaw": 0.8}])
    assert (
        len(move) == 5
        and move[0] == action_tokens.FIRST_TOKEN
        and move[3] == action_tokens.FIRST_TOKEN
        and move[4] == action_tokens.FIRST_TOKEN + 255
    )
    assert action_tokens.encode(READY, "hold", []) == [action_tokens.FIRST_TOKEN + 2]
    assert action_tokens.decode(READY, [action_tokens.FIRST_TOKEN + 2]) == '{"action":"hold"}'


def test_numbers_are_binned_as_in_openvla():
    """OpenVLA's ActionTokenizer in numpy: 256 edges from -1 to 1, digitize, and the centres of the 255 bins."""
    edges = np.linspace(-1.0, 1.0, 256)
    centers = (edges[:-1] + edges[1:]) / 2
    field = FIELDS["x"]
    for value in np.linspace(-1.0, 3.0, 1001):
        scaled = 2 * (value - field.q01) / (field.q99 - field.q01) - 1
        if np.abs(edges - scaled).min() < 1e-9:
            continue  # a number on an edge: the result depends on rounding
        theirs = np.digitize(np.clip(scaled, -1, 1), edges) - 1
        back = 0.5 * (centers[min(theirs, 254)] + 1) * (field.q99 - field.q01) + field.q01
        ours = action_tokens.encode(CHUNK, "go", [{"x": value, "pace": "slow"}] * 4)[1] - action_tokens.FIRST_TOKEN
        text = action_tokens.decode(
            CHUNK, [action_tokens.FIRST_TOKEN, *[action_tokens.FIRST_TOKEN + ours, action_tokens.FIRST_TOKEN] * 4]
        )
        assert ours == theirs and json.loads(text)["x"] == pytest.approx(back, abs=1e-6)


@given(
    st.lists(
        st.tuples(st.floats(-10, 10, allow_nan=False), st.sampled_from(FIELDS["pace"].one_of)), min_size=4, max_size=4
    )
)
def test_decoding_an_encoded_number_is_at_most_half_a_bin_off_and_is_clamped_to_the_range(steps):
    ids = action_tokens.encode(CHUNK, "go", [{"x": x, "pace": pace} for x, pace in steps])
    checked = parse_answer(action_tokens.decode(CHUNK, ids), CHUNK)
    assert isinstance(checked, CheckedAction) and len(checked.chunk) == 3 and checked.clamped == {}
    half = (3.0 - -1.0) / 255 / 2
    for (x, pace), values in zip(steps, [checked.values, *checked.chunk], strict=True):
        assert abs(values["forward_m"] - min(max(x, -1.0), 3.0)) <= half + 1e-6 and values["pace"] == pace


@pytest.mark.parametrize(
    "ids",
    [[], [1], [744 + 2], [744], [744, 745], [744 + 1, 744], [744] + [744 + 5, 744] * 3, [744] + [744 + 5, 744 + 3] * 4],
)
def test_tokens_that_are_not_an_answer_are_refused(ids):
    with pytest.raises(ValueError, match="expected"):
        action_tokens.decode(CHUNK, ids)


def test_the_grammar_allows_the_answers_and_nothing_else():
    """Checked with llguidance and a vocabulary of Tekken's special tokens and single bytes."""
    matcher = matcher_of(CHUNK)
    assert allowed(matcher) == [744, 745]
    matcher.consume_token(744)
    for _ in range(4):
        assert allowed(matcher) == list(range(744, 1000))
        matcher.consume_token(900)
        assert allowed(matcher) == [744, 745, 746] and not matcher.is_accepting()
        matcher.consume_token(746)
    assert matcher.is_accepting()
    matcher = matcher_of(CHUNK)
    matcher.consume_token(745)
    assert matcher.is_accepting()


def matcher_of(space: ActionSpace) -> llguidance.LLMatcher:
    names = [f"<SPECIAL_{i}>" for i in range(1000)]

    class Vocabulary:
        eos_token_id, bos_token_id = 2, 1
        tokens = [b"\xff" + name.encode() for name in names] + [bytes([i]) for i in range(256)]
        special_token_ids = list(range(1000))  # noqa: RUF012

        def __call__(self, text: bytes | str) -> list[int]:
            return [1000 + byte for byte in (text.encode() if isinstance(text, str) else text)]

    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary()))
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(action_tokens.lark_grammar(space)))
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def allowed(matcher: llguidance.LLMatcher) -> list[int]:
    mask = llguidance.numpy.allocate_token_bitmask(1, 1256)
    llguidance.numpy.fill_next_token_bitmask(matcher, mask, 0)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8).ravel(), bitorder="little")).tolist()


def test_a_vocabulary_that_uses_these_tokens_is_refused():
    action_tokens.check_vocabulary(lambda token: f"<SPECIAL_{token}>")
    with pytest.raises(ConfigError, match=r"expected <SPECIAL_750> as token 750 of the vocabulary, found '\[NEW\]'"):
        action_tokens.check_vocabulary(lambda token: "[NEW]" if token == 750 else f"<SPECIAL_{token}>")
    with pytest.raises(ConfigError, match="found ''"):
        action_tokens.check_vocabulary(lambda token: "")


# -- with the envelope -------------------------------------------------------------------------------------------------


def test_a_number_outside_its_range_is_clamped_in_every_step():
    """q01 and q99 come from training data, min and max from the vehicle. min and max always hold."""
    wide = ActionSpace(
        name="wide", valid_for_ms=500, codec="action_tokens", horizon=2, chunk_step_ms=100,
        actions={"go": ActionType(fields={"x": NumberField(name="x_m", min=-1, max=1, step=0.1, q01=-4.0, q99=4.0)})},
    )  # fmt: skip
    checked = parse_answer(
        action_tokens.decode(wide, action_tokens.encode(wide, "go", [{"x": 4.0}, {"x": -4.0}])), wide
    )
    assert checked.values == {"x_m": 1.0} and checked.chunk == [{"x_m": -1.0}]
    assert checked.clamped == pytest.approx({"x_m": 4.0, "chunk.0.x_m": -4.0}, abs=0.02)


@pytest.mark.parametrize(
    "text",
    [
        '{"action":"go","x":1,"pace":"slow"}',
        '{"action":"go","x":1,"pace":"slow","chunk":[]}',
        '{"action":"go","x":1,"pace":"slow","chunk":{}}',
        '{"action":"go","x":1,"pace":"slow","chunk":[1,2,3]}',
        '{"action":"go","x":1,"pace":"slow","chunk":[{"x":1,"pace":"slow"},{"x":1,"pace":"slow"},{"x":1}]}',
        '{"action":"stop","chunk":[{},{},{}]}',
    ],
)
def test_an_answer_with_other_steps_than_the_space_is_rejected_whole(text):
    assert isinstance(parse_answer(text, CHUNK), Rejection)
    assert isinstance(parse_answer('{"action":"stop"}', CHUNK), CheckedAction)
