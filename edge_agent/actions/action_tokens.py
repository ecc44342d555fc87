"""The codec `action_tokens`: the model answers with a few special tokens instead of JSON text.

Only models that were fine-tuned to this codec can use it. An answer is one token for the action type (its index in the
action space), then, for each step of the horizon, one token for each field: the bin of a number, or the index of a
word. The tokens are FIRST_TOKEN to FIRST_TOKEN + 255, the last 256 unused special tokens of the Tekken vocabulary.

Numbers are binned as in OpenVLA (Kim et al. 2024, "OpenVLA: An Open-Source Vision-Language-Action Model", class
ActionTokenizer): the range q01 to q99 is scaled to -1 to 1, 256 equally spaced edges divide it into 255 bins, and a
bin is read back as its centre. q01 and q99 belong to the field. Their default is the field's min and max.

decode() gives the JSON text that a model with codec json would have written, so that envelope.py checks both codecs
with the same code. Nothing here needs a model: this file handles token ids only.

    >>> from edge_agent.actions.space import load_action_space
    >>> space = load_action_space("velocity_body_action_tokens")
    >>> ids = encode(space, "move", [{"vx": 0.5, "vy": 0.0, "vz": -0.2, "yaw": 0.0}])
    >>> len(ids), decode(space, ids)
    (5, '{"action":"move","vx":0.501961,"vy":0.0,"vz":-0.196078,"yaw":0.0}')
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence

from edge_agent.actions.space import ActionField, ActionSpace, ActionType, ChoiceField, NumberField
from edge_agent.errors import ConfigError

N_TOKENS = 256
FIRST_TOKEN = 744  # Tekken has 1000 special ids; released models use those below 40


def check_vocabulary(token_text: Callable[[int], str]) -> None:
    """Raise ConfigError if the vocabulary uses one of the 256 tokens, or has no such token.

    token_text: token id -> the text of the token in the vocabulary.
    """
    for token in range(FIRST_TOKEN, FIRST_TOKEN + N_TOKENS):
        if token_text(token) != f"<SPECIAL_{token}>":
            raise ConfigError(
                f"codec action_tokens: expected <SPECIAL_{token}> as token {token} of the vocabulary, found "
                f"{token_text(token)!r}; use an action space with codec json"
            )


def lark_grammar(space: ActionSpace) -> str:
    """A grammar of every answer, in Lark syntax as llguidance reads it."""
    rules = [f"action_{i}" for i in range(len(space.actions))]
    lines = [f"start: {' | '.join(rules)}"]
    for i, (rule, action) in enumerate(zip(rules, space.actions.values(), strict=True)):
        fields = [f"<[{FIRST_TOKEN}-{FIRST_TOKEN + _n_choices(field) - 1}]>" for field in action.fields.values()]
        lines.append(f"{rule}: <[{FIRST_TOKEN + i}]> {' '.join(fields * space.horizon)}")
    return "\n".join(lines) + "\n"


def decode(space: ActionSpace, ids: Sequence[int]) -> str:
    """Token ids of one answer -> JSON text. Raises ValueError if the tokens are not a complete answer."""
    indices = [token - FIRST_TOKEN for token in ids]
    if not indices or not 0 <= indices[0] < len(space.actions):
        raise ValueError(f"expected the token of an action type first, found {list(ids[:1])}")
    name, action = list(space.actions.items())[indices[0]]
    n = len(action.fields)
    if len(indices) != 1 + n * space.horizon:
        raise ValueError(f"{name}: expected {1 + n * space.horizon} tokens, found {len(indices)}")
    steps = [_decode_step(action, indices[1 + n * i :][:n]) for i in range(space.horizon if n else 1)]
    chunk = {"chunk": steps[1:]} if len(steps) > 1 else {}
    return json.dumps({"action": name, **steps[0], **chunk}, separators=(",", ":"))


def encode(space: ActionSpace, name: str, steps: Sequence[Mapping[str, float | str]]) -> list[int]:
    """An action -> token ids: the labels for training a model.

    steps: for each step of the horizon, a value for each field by its key in the YAML file. A number outside q01 to
    q99 becomes the first or the last token. Raises KeyError or ValueError if the action space has no such action type,
    key or word.
    """
    action = space.actions[name]
    indices = [list(space.actions).index(name)]
    for step in steps if action.fields else []:
        indices += [_index(field, step[key]) for key, field in action.fields.items()]
    return [FIRST_TOKEN + index for index in indices]


def _n_choices(field: ActionField) -> int:
    return len(field.one_of) if isinstance(field, ChoiceField) else N_TOKENS


def _decode_step(action: ActionType, indices: list[int]) -> dict[str, float | str]:
    values: dict[str, float | str] = {}
    for (key, field), index in zip(action.fields.items(), indices, strict=True):
        if not 0 <= index < _n_choices(field):
            raise ValueError(
                f"{key}: expected a token from {FIRST_TOKEN} to {FIRST_TOKEN + _n_choices(field) - 1}, "
                f"found {FIRST_TOKEN + index}"
            )
        values[key] = field.one_of[index] if isinstance(field, ChoiceField) else _bin_center(field, index)
    return values


def _index(field: ActionField, value: float | str) -> int:
    if isinstance(field, ChoiceField):
        return field.one_of.index(str(value))
    low, high = _bin_range(field)
    fraction = min(max((float(value) - low) / (high - low), 0.0), 1.0)
    return math.floor(fraction * (N_TOKENS - 1))


def _bin_center(field: NumberField, index: int) -> float:
    """The centre of a bin, rounded to 6 decimals. Index 255 holds only q99 itself; it is read as bin 254."""
    low, high = _bin_range(field)
    fraction = (min(index, N_TOKENS - 2) + 0.5) / (N_TOKENS - 1)
    return round(low + fraction * (high - low), 6)


def _bin_range(field: NumberField) -> tuple[float, float]:
    return (field.min, field.max) if field.q01 is None or field.q99 is None else (field.q01, field.q99)
