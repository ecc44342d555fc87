"""Lessons as rows of tokens in exactly the prompt layout of the runtime, and the content of each cell of a picture.

<s>[SYSTEM_PROMPT] role, actions, "Instruction:"          `Rows.prefix`: the same for all rows, evaluated once per step
  "Go to the red disc."[/SYSTEM_PROMPT][INST]             a row: one picture and one order
  embeddings of the picture [IMG_END]
    Action?[/INST]{"action":…}</s>                        branches: a branch does not attend to another branch
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
NO_CELL = 36  # the pad is outside the picture; larger than the number of any cell
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
        n_common = next(i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1])
        self.prefix = a[:n_common]

    def prompt(self, instruction: str) -> list[int]:
        return [BOS, SYSTEM, *self.tokenizer.encode(SYSTEM_PROMPT.format(space=self.space, instruction=instruction))]

    def lay_out(self, lessons: list[Lesson], grid: tuple[int, int]) -> dict[str, np.ndarray]:
        """Arrays by name, one row per exercise. An exercise whose action does not fit has no row.

        (n, ROW_TOKENS) int64:
            tokens
            targets: the next token; -1: no target
            branch: 0: shared by all branches; -1: padding
            position: counted from the end of the prefix
            aim: at the last token of a question about one pad, the number of the pad's cell, or NO_CELL; else -1
        (n,) int64:
            picture: index of the lesson
            image_at: index of the first token of the picture
        """
        lines, columns = grid
        image = ([IMG] * columns + [IMG_BREAK]) * (lines - 1) + [IMG] * columns
        arrays: dict[str, list] = {
            key: [] for key in ("tokens", "targets", "branch", "position", "aim", "picture", "image_at")
        }
        for i, lesson in enumerate(lessons):
            for exercise in lesson.exercises:
                prompt = self.prompt(exercise.instruction)
                assert prompt[: len(self.prefix)] == self.prefix, exercise.instruction
                head = [*prompt[len(self.prefix) :], SYSTEM_END, INST, *image, IMG_END]
                order = exercise.order
                about = order[1:] if order.kind in ("goto", "land") else None
                exchanges = [task.Exchange(ACTION_QUESTION, task.to_json(exercise.action), about), *exercise.exchanges]
                cell = {(s.pad.colour, s.pad.shape): cell_of(s, lesson.picture, grid) for s in lesson.sights}
                row = self._row(head, exchanges, cell)
                if row is not None:
                    for key, values in row.items():
                        arrays[key].append(values)
                    arrays["picture"].append(i)
                    arrays["image_at"].append(head.index(IMG))
        return {key: np.array(values) for key, values in arrays.items()}

    def _row(self, head: list[int], exchanges: list[task.Exchange], cell: dict) -> dict[str, list[int]] | None:
        """A row with the exchanges that fit, one branch each; None if the first exchange does not fit."""
        aim = [-1] * len(head)
        tokens, targets, branch, position = list(head), [-1] * len(head), [0] * len(head), list(range(len(head)))
        for b, (question, answer, about) in enumerate(exchanges, 1):
            question_tokens = [*self.tokenizer.encode(question), INST_END]
            answer_tokens = [*self.tokenizer.encode(answer), EOS]
            n = len(question_tokens) + len(answer_tokens) - 1
            if len(tokens) + n > ROW_TOKENS:
                if b == 1:
                    return None
            else:
                tokens += question_tokens + answer_tokens[:-1]
                targets += [-1] * (len(question_tokens) - 1) + answer_tokens
                branch += [b] * n
                aim += [-1] * (len(question_tokens) - 1) + [-1 if about is None else cell.get(about, NO_CELL)]
                aim += [-1] * (len(answer_tokens) - 1)
                position += range(len(head), len(head) + n)
        pad = ROW_TOKENS - len(tokens)
        return {
            "tokens": tokens + [0] * pad,
            "targets": targets + [-1] * pad,
            "branch": branch + [-1] * pad,
            "position": position + [0] * pad,
            "aim": aim + [-1] * pad,
        }


def _grid_position(sight: Sight, picture: np.ndarray, grid: tuple[int, int]) -> tuple[float, float]:
    """The centre of a pad in columns and lines from the top left corner of the picture."""
    height, width = picture.shape[:2]
    half = max(height, width) / 2
    return (sight.right * half / width + 0.5) * grid[1], (sight.down * half / height + 0.5) * grid[0]


def cell_of(sight: Sight, picture: np.ndarray, grid: tuple[int, int]) -> int:
    """The number of the cell that contains the centre of a pad, counted line by line; NO_CELL outside the picture."""
    x, y = _grid_position(sight, picture, grid)
    return int(y) * grid[1] + int(x) if 0 <= x < grid[1] and 0 <= y < grid[0] else NO_CELL


def cells(lessons: list[Lesson], grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """The content of each 28-pixel cell.

    cell_colour, (n, lines, columns) int64: 0: the cell contains no centre of a pad; else 1 + the number of the colour
    cell_shape, (n, lines, columns) int64: the number of the shape
    cell_where, (n, lines, columns, 3) float32: right and down from the middle of the cell, and radius, in cells
    """
    colour = np.zeros((len(lessons), *grid), np.int64)
    shape = np.zeros((len(lessons), *grid), np.int64)
    where = np.zeros((len(lessons), *grid, 3), np.float32)
    for i, lesson in enumerate(lessons):
        cell_px = lesson.picture.shape[1] / grid[1]
        for s in lesson.sights:
            if cell_of(s, lesson.picture, grid) != NO_CELL:
                x, y = _grid_position(s, lesson.picture, grid)
                at = i, int(y), int(x)
                colour[at], shape[at] = 1 + list(COLOURS).index(s.pad.colour), SHAPES.index(s.pad.shape)
                where[at] = x % 1 - 0.5, y % 1 - 0.5, s.radius * max(lesson.picture.shape[:2]) / 2 / cell_px
    return {"cell_colour": colour, "cell_shape": shape, "cell_where": where}
