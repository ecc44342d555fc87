"""The action codec `bins`: an answer as a few special tokens instead of JSON. Pure: no model, only token numbers.

For models that were fine-tuned to it. An answer is one token for the verb (its place in the space), then, for each step
of the horizon, one token for each field: a number's bin, or a word's place. The tokens are the last 256 of Tekken's
unused special ones, FIRST + 0 … FIRST + 255. A number is discretised as OpenVLA has it (Kim et al. 2024, "OpenVLA: An
Open-Source Vision-Language-Action Model"; its ActionTokenizer): scaled so that q01…q99 is -1…1, cut by 256 edges in
equal steps, and read back as the middle between two. q01 and q99 are the field's own, by default its min and max.

What leaves here is the JSON text that any other model would have written: everything behind checks it the same way.

    >>> from edge_agent import actions
    >>> space = actions.load("velocity_body_action_tokens")
    >>> ids = tokens(space, "move", [{"vx": 0.5, "vy": 0.0, "vz": -0.2, "yaw": 0.0}])
    >>> len(ids), text(space, ids)
    (5, '{"action":"move","vx":0.501961,"vy":0.0,"vz":-0.196078,"yaw":0.0}')
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable

from edge_agent.actions.space import ActionField, ActionSpace, ActionType
from edge_agent.errors import ConfigError

N_TOKENS = 256
FIRST_TOKEN = 744  # Tekken has 1000 special ids; the releases name those below 40


def check_vocabulary(written: Callable[[int], str]) -> None:
    """written: id -> how the vocabulary spells it. Raises ConfigError where one of ours is in use, or is not there."""
    for token in range(FIRST_TOKEN, FIRST_TOKEN + N_TOKENS):
        if written(token) != f"<SPECIAL_{token}>":
            raise ConfigError(
                f"codec: action_tokens: expected <SPECIAL_{token}> at {token} of the vocabulary, "
                f"found {written(token)!r}; "
                "use a space with codec json"
            )


def lark_grammar(space: ActionSpace) -> str:
    """Every answer of the space, in Lark as llguidance reads it."""
    rules = [f"verb_{i}" for i in range(len(space.actions))]
    lines = [f"start: {' | '.join(rules)}"]
    for i, (rule, verb) in enumerate(zip(rules, space.actions.values(), strict=True)):
        fields = [f"<[{FIRST_TOKEN}-{FIRST_TOKEN + _n_choices(field) - 1}]>" for field in verb.fields.values()]
        lines.append(f"{rule}: <[{FIRST_TOKEN + i}]> {' '.join(fields * space.horizon)}")
    return "\n".join(lines) + "\n"


def decode(space: ActionSpace, ids: list[int]) -> str:
    """An answer's tokens -> JSON text. Raises ValueError on tokens that are no answer of this space."""
    places = [token - FIRST_TOKEN for token in ids]
    if not places or not 0 <= places[0] < len(space.actions):
        raise ValueError(f"expected a verb's token first, found {ids[:1]}")
    name, verb = list(space.actions.items())[places[0]]
    n = len(verb.fields)
    if len(places) != 1 + n * space.horizon:
        raise ValueError(f"{name}: expected {1 + n * space.horizon} tokens, found {len(places)}")
    steps = [_decode_step(verb, places[1 + n * i :][:n]) for i in range(space.horizon if n else 1)]
    chunk = {"chunk": steps[1:]} if len(steps) > 1 else {}
    return json.dumps({"action": name, **steps[0], **chunk}, separators=(",", ":"))


def encode(space: ActionSpace, name: str, steps: list[dict[str, float | str]]) -> list[int]:
    """The other way round, for who trains a model: keys as the space's fields have them, a step of the horizon each.

    A number beyond q01…q99 goes to the bin at the end.
    """
    verb = space.actions[name]
    places = [list(space.actions).index(name)]
    for step in steps if verb.fields else []:
        places += [_bin_index(field, step[key]) for key, field in verb.fields.items()]
    return [FIRST_TOKEN + place for place in places]


def _n_choices(field: ActionField) -> int:
    return N_TOKENS if field.one_of is None else len(field.one_of)


def _decode_step(verb: ActionType, places: list[int]) -> dict[str, float | str]:
    values = {}
    for (key, field), place in zip(verb.fields.items(), places, strict=True):
        if not 0 <= place < _n_choices(field):
            raise ValueError(
                f"{key}: expected a token of {FIRST_TOKEN} to {FIRST_TOKEN + _n_choices(field) - 1}, "
                f"found {FIRST_TOKEN + place}"
            )
        values[key] = _bin_center(field, place) if field.one_of is None else field.one_of[place]
    return values


def _range(field: ActionField) -> tuple[float, float]:
    return (field.min, field.max) if field.q01 is None else (field.q01, field.q99)


def _bin_center(field: ActionField, place: int) -> float:
    """The middle between two edges; the last bin holds q99 alone, and is read as the one before."""
    low, high = _range(field)
    share = (min(place, N_TOKENS - 2) + 0.5) / (N_TOKENS - 1)
    return round(low + share * (high - low), 6)


def _bin_index(field: ActionField, value: float | str) -> int:
    if field.one_of is not None:
        return field.one_of.index(value)
    low, high = _range(field)
    share = min(max((float(value) - low) / (high - low), 0.0), 1.0)
    return math.floor(share * (N_TOKENS - 1))
