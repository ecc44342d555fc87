"""Lessons as rows of tokens: they have the layout of the runtime's prompt and the tokens of llama.cpp."""

from __future__ import annotations

import base64
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tiktoken")  # only training needs it

from edge_agent.actions.prompt import describe_action_space
from edge_agent.actions.space import load_action_space
from edge_agent.bundle.manifest import LANGUAGE, EmbeddingInfo
from edge_agent.model.llama import LlamaContext, LlamaOptions
from edge_agent.model.prompt import ACTION_QUESTION, SYSTEM_PROMPT
from models.pad_pilot import task
from models.pad_pilot.lessons import Exercise, Grounds, Lesson, lesson
from models.pad_pilot.rows import NO_CELL, ROW_TOKENS, Rows, Tokenizer, cell_of, cells
from models.pad_pilot.scene import COLOURS, SHAPES, Pad, Sight
from models.pad_pilot.task import LANGUAGES, Exchange, Order

pytestmark = pytest.mark.filterwarnings("error")

GRIDS = {(140, 140): (5, 5), (126, 168): (4, 6), (168, 126): (6, 4)}
HOLD = {"action": "hold"}


@pytest.fixture(scope="module")
def tokenizer(toy_bf16: Path) -> Tokenizer:
    """The first 4096 tokens of Tekken, as the pilot has them."""
    return Tokenizer(toy_bf16)


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer) -> Rows:
    return Rows(tokenizer)


@pytest.fixture(scope="module")
def llama(toy_bf16: Path, convert: Callable[..., Path]) -> Iterator[LlamaContext]:
    """The same checkpoint in llama.cpp, as the runtime opens it."""
    path = convert(toy_bf16) / LANGUAGE
    table = EmbeddingInfo(offset=0, ggml_type="BF16", row_bytes=512)  # no row is looked up here
    with LlamaContext(path, LlamaOptions(context=64, threads=1, gpu_layers=0), table) as llm:
        yield llm


@pytest.fixture(scope="module")
def many() -> list[Lesson]:
    grounds = Grounds([], 7, 4)
    return [lesson(np.random.default_rng([7, i]), grounds) for i in range(120)]


def make_lesson(*exercises: Exercise, sights: tuple[Sight, ...] = (), size_px: tuple[int, int] = (140, 140)) -> Lesson:
    return Lesson(np.zeros((*size_px, 3), np.uint8), list(sights), list(exercises))


def sight(right: float, down: float, radius: float = 0.2, colour: str = "red", shape: str = "disc") -> Sight:
    return Sight(Pad(colour, shape, 0.0, 0.0, 0.5, 0.0), right, down, radius)


# -- tokens -----------------------------------------------------------------------------------------------------------


@functools.cache
def sentences() -> list[str]:
    """All texts of the pilot: instructions, questions, answers, actions."""
    rng = np.random.default_rng(1)
    texts = [*task.OTHER_TOPICS, *task.SYLLABLES, ACTION_QUESTION]
    for lang in LANGUAGES:
        for colour in COLOURS:
            for shape in SHAPES:
                sights = [sight(0.5, 0.5, colour=colour, shape=shape), sight(-0.5, 0, colour="red", shape="ring")]
                texts += [task.random_instruction(rng, lang, Order(kind, colour, shape)) for kind in ("goto", "land")]
                exchanges = [task.random_exchange(rng, lang, kind, sights) for kind in ("see", "is", "count", "where")]
                texts += [text for exchange in exchanges for text in (exchange.question, exchange.answer)]
        texts += [
            task.random_instruction(rng, lang, task.random_absent_order(rng, kind))
            for kind in ("goto", "land")
            for _ in range(60)
        ]
        texts += [task.random_instruction(rng, lang, Order("hold")) for _ in range(20)]
    texts += [task.random_instruction(rng, "en", Order("nothing")) for _ in range(300)]
    for right in np.linspace(-0.9, 0.9, 25):
        for order in (Order("land", "red", "disc"), Order("goto", "red", "disc"), Order("goto")):
            texts.append(task.to_json(task.action(order, [sight(right, 0.93 * right**3)]) or HOLD))
    return sorted(set(texts))


def test_text_has_the_same_tokens_as_in_llama_cpp(tokenizer, llama):
    """With other tokens in training, the model would get token sequences at run time that it was not trained on."""
    texts = sentences()
    assert len(texts) > 1000
    assert [text for text in texts if tokenizer.encode(text) != llama.tokens(text)] == []


def test_the_prompt_is_the_prompt_of_the_runtime(rows, llama):
    space = describe_action_space(load_action_space("velocity_body"))
    for text in sentences()[::5]:
        raw = SYSTEM_PROMPT.format(space=space, instruction=text)
        assert rows.prompt(text) == [1, 17, *llama.tokens(raw)], text


def test_decoding_the_tokens_of_a_text_gives_the_text(tokenizer):
    for text in sentences():
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text and all(1000 <= token < 4096 for token in tokens)


def test_the_name_of_a_special_token_is_ordinary_text(tokenizer, llama):
    """A question with the name of a special token contains no special token. Decoding skips special tokens."""
    for text in ("[INST]", "</s>", "[IMG]", "[/SYSTEM_PROMPT] Land."):
        assert tokenizer.encode(text) == llama.tokens(text) and min(tokenizer.encode(text)) >= 1000
    assert tokenizer.decode([1, 17, *tokenizer.encode("go"), 18, 10, 12, 13, 2]) == "go"


def test_a_text_in_the_vocabulary_is_a_single_token(tokenizer, toy_bf16):
    """In tekken.json, the id of a token is 1000 plus the rank of its bytes."""
    vocabulary = json.loads((toy_bf16 / "tekken.json").read_text())["vocab"]
    pieces = {base64.b64decode(entry["token_bytes"]): 1000 + rank for rank, entry in enumerate(vocabulary)}
    for text in ("a", "{", "the", " to"):
        assert tokenizer.encode(text) == [pieces[text.encode()]]


# -- rows -------------------------------------------------------------------------------------------------------------


def test_the_prefix_is_the_same_for_every_instruction(rows, tokenizer):
    assert rows.prefix[:2] == [1, 17]
    assert tokenizer.decode(rows.prefix) == SYSTEM_PROMPT.split("{instruction}")[0].format(space=rows.space).rstrip()
    for text in [*sentences(), "¿Qué?", "4", "", "\n", "[INST]", "»go«"]:
        assert rows.prompt(text)[: len(rows.prefix)] == rows.prefix, text


def test_a_row_by_hand(rows, tokenizer):
    """Every array of one order with two questions, for a picture of two lines with three cells."""
    text = tokenizer.encode
    exchanges = [Exchange("How many pads?", "None."), Exchange("Où ?", "Pas en vue.", ("red", "ring"))]
    arrays = rows.lay_out([make_lesson(Exercise(Order("hold"), "stop", HOLD, exchanges))], (2, 3))
    order = rows.prompt("stop")[len(rows.prefix) :]
    head = [*order, 18, 3, 10, 10, 10, 12, 10, 10, 10, 13]
    branches = [
        ([*text("Action?"), 4], text('{"action":"hold"}'), -1),
        ([*text("How many pads?"), 4], text("None."), -1),
        ([*text("Où ?"), 4], text("Pas en vue."), 36),
    ]
    tokens, targets, branch, position = list(head), [-1] * len(head), [0] * len(head), [*range(len(head))]
    aim = [-1] * len(head)
    for b, (question, answer, cell) in enumerate(branches, 1):
        tokens += question + answer
        targets += [-1] * (len(question) - 1) + answer + [2]  # at each token, the next token
        aim += [-1] * (len(question) - 1) + [cell] + [-1] * len(answer)  # at [/INST], the last token of the question
        branch += [b] * (len(question) + len(answer))
        position += range(len(head), len(head) + len(question) + len(answer))
    n_left = ROW_TOKENS - len(tokens)
    assert set(arrays) == {"tokens", "targets", "branch", "position", "aim", "picture", "image_at"}
    for key, values, filler in (
        ("tokens", tokens, 0),
        ("targets", targets, -1),
        ("branch", branch, -1),
        ("position", position, 0),
        ("aim", aim, -1),
    ):
        assert arrays[key].tolist() == [values + [filler] * n_left] and arrays[key].dtype == np.int64, key
    assert arrays["picture"].tolist() == [0] and arrays["image_at"].tolist() == [len(order) + 2]


@pytest.mark.parametrize("size_px", GRIDS)
def test_decoding_the_rows_gives_the_lessons(rows, tokenizer, many, size_px):
    grid = GRIDS[size_px]
    lessons = [example._replace(picture=np.zeros((*size_px, 3), np.uint8)) for example in many]
    arrays = rows.lay_out(lessons, grid)
    exercises = [(i, exercise) for i, example in enumerate(lessons) for exercise in example.exercises]
    assert len(arrays["tokens"]) == len(exercises)  # no exercise was too long
    assert {key: value.shape for key, value in arrays.items()} == dict.fromkeys(
        ("tokens", "targets", "branch", "position", "aim"), (len(exercises), ROW_TOKENS)
    ) | dict.fromkeys(("picture", "image_at"), (len(exercises),))
    lines, columns = grid
    n_image = lines * (columns + 1) - 1
    n_questions = 0
    for row, (i, exercise) in enumerate(exercises):
        tokens, targets, branch, position = (arrays[key][row] for key in ("tokens", "targets", "branch", "position"))
        shared, start = tokens[branch == 0], int(arrays["image_at"][row])
        assert arrays["picture"][row] == i
        assert tokenizer.decode([*rows.prefix, *shared[: start - 2]]) == SYSTEM_PROMPT.format(
            space=rows.space, instruction=exercise.instruction
        )
        assert shared[start - 2 : start].tolist() == [18, 3]
        image = shared[start : start + n_image]
        assert (
            np.append(image, 12).reshape(lines, columns + 1) == [10] * columns + [12]
        ).all()  # no break after the last
        assert shared[start + n_image :].tolist() == [13]
        assert position[branch == 0].tolist() == [*range(len(shared))] and (targets[branch == 0] == -1).all()

        exchanges = [Exchange("Action?", task.to_json(exercise.action)), *exercise.exchanges]
        assert set(branch[branch > 0]) >= {1} and (np.diff(branch[branch >= 0]) >= 0).all()
        for b in sorted(set(branch[branch > 0])):
            in_branch = branch == b
            question, answer, _ = exchanges[b - 1]
            assert position[in_branch].tolist() == [*range(len(shared), len(shared) + in_branch.sum())]
            (end,) = np.nonzero(tokens[in_branch] == 4)[0]
            assert tokenizer.decode(tokens[in_branch][:end].tolist()) == question
            assert tokenizer.decode(tokens[in_branch][end + 1 :].tolist()) == answer
            assert (targets[in_branch][:end] == -1).all() and targets[in_branch][-1] == 2
            assert (targets[in_branch][end:-1] == tokens[in_branch][end + 1 :]).all()  # shifted by one
            n_questions += b > 1
        padding = branch == -1
        n_tokens = len(padding) - padding.sum()
        assert (targets[padding] == -1).all() and not padding[:n_tokens].any()  # all padding is at the end
    assert n_questions > 2 * len(exercises)


def test_a_question_that_does_not_fit_is_left_out_and_a_later_question_is_used(rows):
    too_long = Exchange("Do you see it? " * 20, "No.", ("red", "ring"))
    exchanges = [Exchange("How many?", "One."), too_long, Exchange("Where?", "Top.", RED)]
    exercise = Exercise(Order("hold"), "stop", HOLD, exchanges)
    arrays = rows.lay_out([make_lesson(exercise, sights=(sight(0, -0.5),))], (5, 5))
    assert set(arrays["branch"][0].tolist()) == {-1, 0, 1, 2, 4}
    assert aims(arrays) == [-1, -1, 7]  # its aim is left out too


def test_an_order_that_is_too_long_has_no_row(rows):
    """The other orders of its picture have rows."""
    long, short = (Exercise(Order("nothing"), text, HOLD, []) for text in ("la " * 200, "stop"))
    arrays = rows.lay_out([make_lesson(short), make_lesson(long, short)], (5, 5))
    assert arrays["picture"].tolist() == [0, 1] and len(arrays["tokens"]) == 2


def test_an_order_whose_action_does_not_fit_has_no_row(rows, tokenizer):
    """It has no row even if a question fits: every row must contain an action."""
    move = task.move(sight(-0.93, 0.93), 0.35)
    move_exchanges, hold_exchanges = [Exchange("Why?", "No.")], [Exchange("Why?", "None.")]
    n_action = len([*tokenizer.encode("Action?"), *tokenizer.encode(task.to_json(move))]) + 1
    n_shared = len(rows.prompt("")) - len(rows.prefix) + 2 + 29 + 1  # with [/SYSTEM_PROMPT][INST] and the picture
    n_left = ROW_TOKENS - n_shared
    texts = {len(rows.prompt(text)) - len(rows.prompt("")): text for n in range(200) for text in ["la" * n]}
    fits, too_long = texts[n_left - n_action], texts[n_left - n_action + 1]
    for text, n_rows in ((fits, 1), (too_long, 0)):
        exercise = Exercise(Order("nothing"), text, move, move_exchanges)
        assert len(rows.lay_out([make_lesson(exercise)], (5, 5))["tokens"]) == n_rows
    arrays = rows.lay_out([make_lesson(Exercise(Order("nothing"), too_long, HOLD, hold_exchanges))], (5, 5))
    assert set(arrays["branch"][0].tolist()) >= {0, 1}  # a shorter action fits


def test_every_order_fits_with_its_action(rows, many):
    """An action fits behind the longest instructions and the largest picture of the training data."""
    rng = np.random.default_rng(2)
    longest = sorted(
        (task.random_instruction(rng, "en", Order("nothing")) for _ in range(2000)), key=lambda t: -len(rows.prompt(t))
    )
    move = task.move(sight(-0.93, 0.93), 0.35)
    arrays = rows.lay_out([make_lesson(*(Exercise(Order("nothing"), text, move, []) for text in longest[:20]))], (5, 5))
    assert len(arrays["tokens"]) == 20 and (arrays["branch"] == 1).any(1).all()


# -- aim --------------------------------------------------------------------------------------------------------------

RED, BLUE = ("red", "disc"), ("blue", "ring")


def aims(arrays: dict[str, np.ndarray], row: int = 0) -> list[int]:
    """The aims of a row, one for each branch. They are at the last token of each question, [/INST]."""
    is_last = arrays["tokens"][row] == 4
    assert (arrays["aim"][row][~is_last] == -1).all() and arrays["aim"].dtype == np.int64
    return arrays["aim"][row][is_last].tolist()


@pytest.mark.parametrize(
    ("size_px", "red", "blue"),
    [
        ((140, 140), 8, 20),  # line 1.25, column 3.25 of five; line 4.25, column 0.5
        ((126, 168), 3, 18),  # line 0.67, column 3.9 of six; line 3.87, column 0.6
        ((168, 126), 6, 36),  # line 1.5, column 2.8 of four; left of the picture
    ],
)
def test_aims_by_hand(rows, size_px, red, blue):
    """For every order and every question: the cell of the pad that it is about."""
    pads = (sight(-0.8, 0.7, 0.2, *BLUE), sight(0.3, -0.5, 0.2, *RED))
    exchanges = [
        Exchange("Red?", "Yes.", RED),
        Exchange("All?", "Two."),
        Exchange("Blue?", "Yes.", BLUE),
        Exchange("Ring?", "No.", ("red", "ring")),
    ]
    orders = {  # order -> aim of its action
        Order("goto", *RED): red,
        Order("land", *RED): red,
        Order("land", *BLUE): blue,
        Order("land", "red", "ring"): 36,  # a near miss: one pad is red, another pad is a ring
        Order("goto", "blue", "disc"): 36,
        Order("goto", "black", "truck"): 36,  # no world contains it
        Order("hold"): -1,
        Order("nothing"): -1,
    }
    exercises = [Exercise(order, "stop", HOLD, exchanges) for order in orders]
    arrays = rows.lay_out([make_lesson(*exercises, sights=pads, size_px=size_px)], GRIDS[size_px])
    for row, order_aim in enumerate(orders.values()):
        assert aims(arrays, row) == [order_aim, red, -1, blue, 36]


def test_each_picture_has_its_own_aims(rows):
    exercise = Exercise(Order("goto", *RED), "stop", HOLD, [Exchange("Red?", "Yes.", RED)])
    places = ((-0.9, -0.9), (0.9, -0.9), (-0.9, 0.9), (0.9, 0.9))
    lessons = [make_lesson(exercise, sights=(sight(*position),)) for position in places]
    arrays = rows.lay_out([*lessons, make_lesson(exercise)], (5, 5))
    assert [aims(arrays, row) for row in range(5)] == [[0, 0], [4, 4], [20, 20], [24, 24], [36, 36]]


@pytest.mark.parametrize("size_px", GRIDS)
def test_aims_are_the_cells_with_the_pixels_of_the_pad(rows, size_px):
    """In rendered lessons. An aim is NO_CELL exactly when the right answer is "search", "no" or "not in view"."""
    grounds = Grounds([], 7, 4)
    lessons = [lesson(np.random.default_rng([9, i]), grounds, size_px=size_px) for i in range(60)]
    arrays, grid = rows.lay_out(lessons, GRIDS[size_px]), GRIDS[size_px]
    negative = {'{"action":"search"}', *(answers[key] for answers in task.ANSWERS.values() for key in ("no", "absent"))}
    n = dict.fromkeys(("no pad", "in the picture", "not in the picture"), 0)
    pairs = [(example, exercise) for example in lessons for exercise in example.exercises]
    for row, (example, exercise) in enumerate(pairs):
        about = (exercise.order.colour, exercise.order.shape) if exercise.order.kind in ("goto", "land") else None
        exchanges = [Exchange("Action?", task.to_json(exercise.action), about), *exercise.exchanges]
        branches = sorted({*arrays["branch"][row].tolist()} - {-1, 0})
        for b, aim in zip(branches, aims(arrays, row), strict=True):
            _, answer, about = exchanges[b - 1]
            if about is None:
                assert aim == -1
                n["no pad"] += 1
            elif aim == NO_CELL:
                assert answer in negative
                n["not in the picture"] += 1
            else:
                assert answer not in negative
                (pad,) = (s for s in example.sights if (s.pad.colour, s.pad.shape) == about)
                half = max(size_px) / 2
                line, column = divmod(aim, grid[1])
                x, y = size_px[1] / 2 + half * pad.right, size_px[0] / 2 + half * pad.down
                assert column * size_px[1] <= x * grid[1] < (column + 1) * size_px[1]
                assert line * size_px[0] <= y * grid[0] < (line + 1) * size_px[0]
                n["in the picture"] += 1
    assert min(n.values()) > 100, n


# -- cells ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size_px", "grid", "right", "down", "expected"),
    [
        ((140, 140), (5, 5), -1, -1, 0),
        ((140, 140), (5, 5), 0, 0, 12),
        ((140, 140), (5, 5), 0.3, -0.5, 8),  # 3.25 to the right, 1.25 down
        ((140, 140), (5, 5), -0.5, 0.3, 16),  # 1.25 to the right, 3.25 down
        ((140, 140), (5, 5), 0.999, -1, 4),
        ((140, 140), (5, 5), -1, 0.999, 20),
        ((140, 140), (5, 5), 0.999, 0.999, 24),
        ((140, 140), (5, 5), 1, 0, 36),
        ((140, 140), (5, 5), 0, 1, 36),
        ((140, 140), (5, 5), -1.001, 0, 36),  # just outside: not rounded towards the first column
        ((140, 140), (5, 5), 0, -1.001, 36),
        ((140, 140), (5, 5), 3, -7, 36),
        # Four lines of six: the first cells of the lines are 0, 6, 12 and 18; the picture ends at 0.75, up and down.
        ((126, 168), (4, 6), -0.99, -0.74, 0),
        ((126, 168), (4, 6), 0.99, -0.74, 5),
        ((126, 168), (4, 6), -0.99, 0.74, 18),
        ((126, 168), (4, 6), 0.99, 0.74, 23),
        ((126, 168), (4, 6), 0, 0, 15),  # column 3 of line 2 begins in the middle
        ((126, 168), (4, 6), 0.3, -0.5, 3),  # 3.9 to the right, 0.67 down
        ((126, 168), (4, 6), 0.5, 0.5, 22),  # 4.5, 3.33
        ((126, 168), (4, 6), -0.3, 0.3, 14),  # 2.1, 2.8
        ((126, 168), (4, 6), 0, -0.76, 36),
        ((126, 168), (4, 6), 0, 0.76, 36),
        ((126, 168), (4, 6), 1.01, 0, 36),
        # Three columns of two lines in a picture of that many cells: its edges are 1 and 0.667.
        ((56, 84), (2, 3), -0.4, 0.1, 3),  # 0.9, 1.15
        ((56, 84), (2, 3), 0.4, 0.65, 5),
        ((56, 84), (2, 3), 0.4, 0.68, 36),
        # Six lines of four: the picture ends at 0.75, left and right.
        ((168, 126), (6, 4), -0.74, 0.99, 20),
        ((168, 126), (6, 4), 0.74, 0.99, 23),
        ((168, 126), (6, 4), 0.3, -0.5, 6),  # 2.8, 1.5
        ((168, 126), (6, 4), -0.76, 0, 36),
    ],
)
def test_cell_of_a_pad(size_px, grid, right, down, expected):
    assert cell_of(sight(right, down), np.zeros((*size_px, 3), np.uint8), grid) == expected
    assert expected == NO_CELL or expected < grid[0] * grid[1] < NO_CELL


@pytest.mark.parametrize(
    ("size_px", "right", "down", "cell", "position"),
    [
        # Five by five: a half side is two and a half cells; radius 0.2 is half a cell.
        ((140, 140), 0, 0, (2, 2), (0, 0, 0.5)),
        ((140, 140), 0.3, -0.5, (1, 3), (-0.25, -0.25, 0.5)),
        ((140, 140), -1, -1, (0, 0), (-0.5, -0.5, 0.5)),
        ((140, 140), 0.999, 0.999, (4, 4), (0.4975, 0.4975, 0.5)),
        ((140, 140), 1.0, 0, None, None),
        ((140, 140), 0, -1.01, None, None),
        # Four lines of six in a picture of 126 by 168: half a width is three columns, and 0.75 of it two lines.
        ((126, 168), 0.5, 0.5, (3, 4), (0, -0.16667, 0.6)),
        ((126, 168), 0, 0, (2, 3), (-0.5, -0.5, 0.6)),
        ((126, 168), -0.9, 0.7, (3, 0), (-0.2, 0.36667, 0.6)),
        ((126, 168), 0, 0.76, None, None),  # below the picture's edge
        ((168, 126), 0.5, 0.5, (4, 3), (-0.16667, 0, 0.53333)),
        ((168, 126), -0.76, 0, None, None),
    ],
)
def test_cells_by_hand(size_px, right, down, cell, position):
    grid = GRIDS[size_px]
    held = cells([make_lesson(sights=(sight(right, down),), size_px=size_px)], grid)
    colour, shape, where = (held[key] for key in ("cell_colour", "cell_shape", "cell_where"))
    assert set(held) == {"cell_colour", "cell_shape", "cell_where"}
    assert colour.shape == shape.shape == (1, *grid) and where.shape == (1, *grid, 3)
    assert colour.dtype == shape.dtype == np.int64 and where.dtype == np.float32
    if cell is None:
        assert not colour.any() and not where.any()
        return
    assert colour[(0, *cell)] == 1 and np.count_nonzero(colour) == 1  # red is the first colour; 0: no pad
    assert where[(0, *cell)] == pytest.approx(position, abs=1e-4)


def test_every_kind_of_pad_has_its_own_numbers_of_colour_and_shape():
    pads = [sight(0, 0, colour=colour, shape=shape) for colour in COLOURS for shape in SHAPES]
    held = cells([make_lesson(sights=(pad,)) for pad in pads], (5, 5))
    found = list(zip(held["cell_colour"][:, 2, 2].tolist(), held["cell_shape"][:, 2, 2].tolist(), strict=True))
    assert found == [(1 + i, j) for i in range(5) for j in range(4)]


def test_cells_of_several_pads_and_pictures():
    pads = (sight(-0.8, -0.8), sight(0.8, 0.8, 0.4, "blue", "ring"))
    held = cells([make_lesson(), make_lesson(sights=pads)], (5, 5))
    assert not held["cell_colour"][0].any()
    assert np.argwhere(held["cell_colour"][1]).tolist() == [[0, 0], [4, 4]]
    assert held["cell_where"][1, 4, 4] == pytest.approx((0, 0, 1.0), abs=1e-6)


def test_the_positions_in_cells_are_those_of_the_sights(many):
    """The middle of a cell plus the offset is the centre of a pad of this colour, in pixels of the picture."""
    held = cells(many, (5, 5))
    n = 0
    for i, y, x in np.argwhere(held["cell_colour"]):
        right, down, radius = held["cell_where"][i, y, x]
        at = ((x + 0.5 + right) * 28, (y + 0.5 + down) * 28)
        colour = list(COLOURS)[held["cell_colour"][i, y, x] - 1]
        off = [
            math.hypot(at[0] - 70 - 70 * s.right, at[1] - 70 - 70 * s.down) + abs(radius * 28 - 70 * s.radius)
            for s in many[i].sights
            if s.pad.colour == colour
        ]
        assert min(off) < 1e-3
        n += 1
    assert n > 120
