"""Lessons as rows of tokens, in exactly the runtime's prompt layout, and the content of their pictures' cells.

<s>[SYSTEM_PROMPT] role, actions, "Instruction:"          `Rows.prefix`: the same for all rows, evaluated once per step
  "Go to the red disc."[/SYSTEM_PROMPT][INST]             a row: one picture and one order
  embeddings of the picture [IMG_END]
    Action?[/INST]{"action":…}</s>                        branches: no branch attends to another
    What do you see?[/INST]A red disc.</s>
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import tiktoken

from edge_agent.actions.prompt import describe_action_space
from edge_agent.actions.space import load_action_space
from edge_agent.model.prompt import ACTION_QUESTION, SYSTEM_PROMPT
from models.pad_pilot import task
from models.pad_pilot.lessons import Lesson
from models.pad_pilot.scene import COLOURS, SHAPES, Sight

BOS, EOS, INST, INST_END, IMG, IMG_BREAK, IMG_END, SYSTEM, SYSTEM_END = 1, 2, 3, 4, 10, 12, 13, 17, 18
N_SPECIAL = 1000  # the ids of text tokens start here
NOWHERE = 36  # larger than the number of any grid's cells
ROW_TOKENS = 168  # length of a row: order, picture, action and two to four questions


class Tokenizer:
    """Tekken with the checkpoint's tekken.json. Text only: special tokens are constants in this file."""

    def __init__(self, folder: Path) -> None:
        data = json.loads((folder / "tekken.json").read_text())
        ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in data["vocab"]}
        self._bpe = tiktoken.Encoding(
            "tekken", pat_str=data["config"]["pattern"], mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        return [N_SPECIAL + token for token in self._bpe.encode_ordinary(text)]

    def decode(self, tokens: list[int]) -> str:
        return self._bpe.decode([token - N_SPECIAL for token in tokens if token >= N_SPECIAL])


class Rows:
    """Lays lessons out as rows of tokens. `prefix` is the part of the prompt that never changes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.space = describe_action_space(load_action_space("velocity_body"))
        a, b = (self.prompt(text) for text in ("Go to the red disc.", "착륙하세요"))
        same = next(i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1])
        self.prefix = a[:same]

    def prompt(self, instruction: str) -> list[int]:
        return [BOS, SYSTEM, *self.tokenizer.encode(SYSTEM_PROMPT.format(space=self.space, instruction=instruction))]

    def lay(self, lessons: list[Lesson], grid: tuple[int, int]) -> dict[str, np.ndarray]:
        """Arrays by name, one row per order.

        (n, ROW_TOKENS) int64: tokens; targets (-1: no target); branch (0: shared, -1: padding); place, counted from the
        end of the prefix; aim: at a closing token about one pad the number of its cell, line by line (NOWHERE: not in
        the picture), else -1. (n,) int64: picture; image_at, the picture's first token.
        """
        lines, columns = grid
        image = ([IMG] * columns + [IMG_BREAK]) * (lines - 1) + [IMG] * columns
        laid: dict[str, list] = {
            key: [] for key in ("tokens", "targets", "branch", "place", "aim", "picture", "image_at")
        }
        for i, one in enumerate(lessons):
            for said in one.said:
                prompt = self.prompt(said.instruction)
                assert prompt[: len(self.prefix)] == self.prefix, said.instruction
                head = [*prompt[len(self.prefix) :], SYSTEM_END, INST, *image, IMG_END]
                order = said.order
                about = order[1:] if order.kind in ("goto", "land") else None
                asked = [task.Asked(ACTION_QUESTION, task.spell(said.action), about), *said.questions]
                cell = {(s.pad.colour, s.pad.shape): cell_of(s, one.picture, grid) for s in one.sights}
                row = self._row(head, asked, cell)
                if row is not None:
                    for key, values in row.items():
                        laid[key].append(values)
                    laid["picture"].append(i)
                    laid["image_at"].append(head.index(IMG))
        return {key: np.array(values) for key, values in laid.items()}

    def _row(self, head: list[int], asked: list[task.Asked], cell: dict) -> dict[str, list[int]] | None:
        """A row with as many branches as fit; None if not even the first one fits."""
        aim = [-1] * len(head)
        tokens, targets, branch, place = list(head), [-1] * len(head), [0] * len(head), list(range(len(head)))
        for b, (question, answer, about) in enumerate(asked, 1):
            closing = [*self.tokenizer.encode(question), INST_END]
            spoken = [*self.tokenizer.encode(answer), EOS]
            n = len(closing) + len(spoken) - 1
            if len(tokens) + n > ROW_TOKENS:
                if b == 1:
                    return None
            else:
                tokens += closing + spoken[:-1]
                targets += [-1] * (len(closing) - 1) + spoken
                branch += [b] * n
                aim += [-1] * (len(closing) - 1) + [-1 if about is None else cell.get(about, NOWHERE)]
                aim += [-1] * (len(spoken) - 1)
                place += range(len(head), len(head) + n)
        pad = ROW_TOKENS - len(tokens)
        return {
            "tokens": tokens + [0] * pad,
            "targets": targets + [-1] * pad,
            "branch": branch + [-1] * pad,
            "place": place + [0] * pad,
            "aim": aim + [-1] * pad,
        }


def _in_cells(sight: Sight, picture: np.ndarray, grid: tuple[int, int]) -> tuple[float, float]:
    """A pad's centre in columns and lines from the picture's top left corner."""
    height, width = picture.shape[:2]
    half = max(height, width) / 2
    return (sight.right * half / width + 0.5) * grid[1], (sight.down * half / height + 0.5) * grid[0]


def cell_of(sight: Sight, picture: np.ndarray, grid: tuple[int, int]) -> int:
    """The number of the cell with a pad's centre, line by line; NOWHERE if it is outside the picture."""
    x, y = _in_cells(sight, picture, grid)
    return int(y) * grid[1] + int(x) if 0 <= x < grid[1] and 0 <= y < grid[0] else NOWHERE


def cells(lessons: list[Lesson], grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """The content of each 28-pixel cell, (n, lines, columns) int64: colour (0: no pad's centre, else 1 + its number)
    and shape; its place, (n, lines, columns, 3) float32: right and down from the cell's middle, radius, in cells."""
    colour = np.zeros((len(lessons), *grid), np.int64)
    shape = np.zeros((len(lessons), *grid), np.int64)
    where = np.zeros((len(lessons), *grid, 3), np.float32)
    for i, one in enumerate(lessons):
        cell_px = one.picture.shape[1] / grid[1]
        for s in one.sights:
            if cell_of(s, one.picture, grid) != NOWHERE:
                x, y = _in_cells(s, one.picture, grid)
                at = i, int(y), int(x)
                colour[at], shape[at] = 1 + list(COLOURS).index(s.pad.colour), SHAPES.index(s.pad.shape)
                where[at] = x % 1 - 0.5, y % 1 - 0.5, s.radius * max(one.picture.shape[:2]) / 2 / cell_px
    return {"cell_colour": colour, "cell_shape": shape, "cell_where": where}
