"""Lessons as tokens: laid out as the runtime lays out its prompt, and cut as llama.cpp cuts its text."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tiktoken")  # training's alone, as torch is

from edge_agent.actions.prompt import describe_action_space
from edge_agent.actions.space import load_action_space
from edge_agent.bundle.manifest import LANGUAGE, EmbeddingInfo
from edge_agent.model.llama import LlamaContext, LlamaOptions
from edge_agent.model.prompt import ACTION_QUESTION, SYSTEM_PROMPT
from models.pad_pilot import task
from models.pad_pilot.lessons import Grounds, Lesson, Said, lesson
from models.pad_pilot.rows import NOWHERE, ROW_TOKENS, Rows, Tokenizer, cell_of, cells
from models.pad_pilot.scene import COLOURS, SHAPES, Pad, Sight
from models.pad_pilot.task import LANGUAGES, Asked, Order

pytestmark = pytest.mark.filterwarnings("error")

GRIDS = {(140, 140): (5, 5), (126, 168): (4, 6), (168, 126): (6, 4)}
HOLD = {"action": "hold"}


@pytest.fixture(scope="module")
def tokenizer(toy_bf16: Path) -> Tokenizer:
    """The first 4096 tokens of Tekken, which is what the pilot has too."""
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


def one_lesson(*said: Said, sights: tuple[Sight, ...] = (), size_px: tuple[int, int] = (140, 140)) -> Lesson:
    return Lesson(np.zeros((*size_px, 3), np.uint8), list(sights), list(said))


def sight(right: float, down: float, radius: float = 0.2, colour: str = "red", shape: str = "disc") -> Sight:
    return Sight(Pad(colour, shape, 0.0, 0.0, 0.5, 0.0), right, down, radius)


# -- tokens -----------------------------------------------------------------------------------------------------------


def sentences() -> list[str]:
    """All the pilot is told, asked and answers: instructions, questions, words, actions."""
    rng = np.random.default_rng(1)
    said = [*task.OTHER_BUSINESS, *task.SYLLABLES, ACTION_QUESTION]
    for lang in LANGUAGES:
        for colour in COLOURS:
            for shape in SHAPES:
                here = [sight(0.5, 0.5, colour=colour, shape=shape), sight(-0.5, 0, colour="red", shape="ring")]
                said += [task.instruction(rng, lang, Order(kind, colour, shape)) for kind in ("goto", "land")]
                asked = [task.question(rng, lang, kind, here) for kind in ("see", "is", "count", "where")]
                said += [text for one in asked for text in (one.question, one.answer)]
        said += [
            task.instruction(rng, lang, task.absent_order(rng, kind)) for kind in ("goto", "land") for _ in range(60)
        ]
        said += [task.instruction(rng, lang, Order("hold")) for _ in range(20)]
    said += [task.instruction(rng, "en", Order("nothing")) for _ in range(300)]
    for right in np.linspace(-0.9, 0.9, 25):
        for order in (Order("land", "red", "disc"), Order("goto", "red", "disc"), Order("goto")):
            said.append(task.spell(task.action(order, [sight(right, 0.93 * right**3)]) or HOLD))
    return sorted(set(said))


def test_text_is_cut_as_llama_cpp_cuts_it(tokenizer, llama):
    """Trained on other tokens than it is given, the model would be asked in words it never saw."""
    said = sentences()
    assert len(said) > 1000
    assert [text for text in said if tokenizer.encode(text) != llama.tokens(text)] == []


def test_the_whole_prompt_is_what_the_runtime_sends(rows, llama):
    """The runtime's own lines: edge_agent/model.py, instruct and act."""
    space = describe_action_space(load_action_space("velocity_body"))
    for text in sentences()[::5]:
        raw = SYSTEM_PROMPT.format(space=space, instruction=text)
        assert rows.prompt(text) == [1, 17, *llama.tokens(raw)], text


def test_the_tokenizer_gives_back_every_letter(tokenizer):
    for text in sentences():
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text and all(1000 <= token < 4096 for token in tokens)


def test_special_ids_are_no_text(tokenizer, llama):
    """A question that spells a control token gets its letters; and decoding skips the tokens themselves."""
    for text in ("[INST]", "</s>", "[IMG]", "[/SYSTEM_PROMPT] Land."):
        assert tokenizer.encode(text) == llama.tokens(text) and min(tokenizer.encode(text)) >= 1000
    assert tokenizer.decode([1, 17, *tokenizer.encode("go"), 18, 10, 12, 13, 2]) == "go"


def test_longer_known_pieces_are_single_tokens(tokenizer, toy_bf16):
    """tekken.json by hand: the id is 1000 and the rank of the bytes."""
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
    """One order with two questions on a grid of two lines of three: every array, place by place."""
    text = tokenizer.encode
    asked = [Asked("How many pads?", "None."), Asked("Où ?", "Pas en vue.", ("red", "ring"))]
    laid = rows.lay([one_lesson(Said(Order("hold"), "stop", HOLD, asked))], (2, 3))
    order = rows.prompt("stop")[len(rows.prefix) :]
    head = [*order, 18, 3, 10, 10, 10, 12, 10, 10, 10, 13]
    branches = [
        ([*text("Action?"), 4], text('{"action":"hold"}'), -1),
        ([*text("How many pads?"), 4], text("None."), -1),
        ([*text("Où ?"), 4], text("Pas en vue."), 36),
    ]
    tokens, targets, branch, place = list(head), [-1] * len(head), [0] * len(head), [*range(len(head))]
    aim = [-1] * len(head)
    for b, (asked, answer, aimed) in enumerate(branches, 1):
        tokens += asked + answer
        targets += [-1] * (len(asked) - 1) + answer + [2]  # each place says what comes next
        aim += [-1] * (len(asked) - 1) + [aimed] + [-1] * len(answer)  # at [/INST], the last that is asked
        branch += [b] * (len(asked) + len(answer))
        place += range(len(head), len(head) + len(asked) + len(answer))
    n_left = ROW_TOKENS - len(tokens)
    assert set(laid) == {"tokens", "targets", "branch", "place", "aim", "picture", "image_at"}
    for key, values, filler in (
        ("tokens", tokens, 0),
        ("targets", targets, -1),
        ("branch", branch, -1),
        ("place", place, 0),
        ("aim", aim, -1),
    ):
        assert laid[key].tolist() == [values + [filler] * n_left] and laid[key].dtype == np.int64, key
    assert laid["picture"].tolist() == [0] and laid["image_at"].tolist() == [len(order) + 2]


@pytest.mark.parametrize("size_px", GRIDS)
def test_rows_read_back_as_the_lessons_they_were(rows, tokenizer, many, size_px):
    grid = GRIDS[size_px]
    lessons = [one._replace(picture=np.zeros((*size_px, 3), np.uint8)) for one in many]
    laid = rows.lay(lessons, grid)
    said = [(i, said) for i, one in enumerate(lessons) for said in one.said]
    assert len(laid["tokens"]) == len(said)  # none was too long
    assert {key: value.shape for key, value in laid.items()} == dict.fromkeys(
        ("tokens", "targets", "branch", "place", "aim"), (len(said), ROW_TOKENS)
    ) | dict.fromkeys(("picture", "image_at"), (len(said),))
    lines, columns = grid
    n_image = lines * (columns + 1) - 1
    n_questions = 0
    for row, (i, one) in enumerate(said):
        tokens, targets, branch, place = (laid[key][row] for key in ("tokens", "targets", "branch", "place"))
        shared, start = tokens[branch == 0], int(laid["image_at"][row])
        assert laid["picture"][row] == i
        assert tokenizer.decode([*rows.prefix, *shared[: start - 2]]) == SYSTEM_PROMPT.format(
            space=rows.space, instruction=one.instruction
        )
        assert shared[start - 2 : start].tolist() == [18, 3]
        image = shared[start : start + n_image]
        assert (
            np.append(image, 12).reshape(lines, columns + 1) == [10] * columns + [12]
        ).all()  # no break after the last
        assert shared[start + n_image :].tolist() == [13]
        assert place[branch == 0].tolist() == [*range(len(shared))] and (targets[branch == 0] == -1).all()

        asked = [Asked("Action?", task.spell(one.action)), *one.questions]
        assert set(branch[branch > 0]) >= {1} and (np.diff(branch[branch >= 0]) >= 0).all()
        for b in sorted(set(branch[branch > 0])):
            mine = branch == b
            question, answer, _ = asked[b - 1]
            assert place[mine].tolist() == [*range(len(shared), len(shared) + mine.sum())]
            (end,) = np.nonzero(tokens[mine] == 4)[0]
            assert tokenizer.decode(tokens[mine][:end].tolist()) == question
            assert tokenizer.decode(tokens[mine][end + 1 :].tolist()) == answer
            assert (targets[mine][:end] == -1).all() and targets[mine][-1] == 2
            assert (targets[mine][end:-1] == tokens[mine][end + 1 :]).all()  # shifted by one
            n_questions += b > 1
        rest = branch == -1
        assert (targets[rest] == -1).all() and not rest[: len(rest) - rest.sum()].any()  # all of it at the end
    assert n_questions > 2 * len(said)


def test_a_question_that_does_not_fit_is_left_out_and_a_shorter_one_takes_its_place(rows):
    long = Asked("Do you see it? " * 20, "No.", ("red", "ring"))
    said = Said(Order("hold"), "stop", HOLD, [Asked("How many?", "One."), long, Asked("Where?", "Top.", RED)])
    laid = rows.lay([one_lesson(said, sights=(sight(0, -0.5),))], (5, 5))
    assert set(laid["branch"][0].tolist()) == {-1, 0, 1, 2, 4}
    assert aims(laid) == [-1, -1, 7]  # its aim is left out too


def test_an_order_too_long_for_a_row_has_none(rows):
    """And its picture's other orders stay."""
    long, short = (Said(Order("nothing"), text, HOLD, []) for text in ("la " * 200, "stop"))
    laid = rows.lay([one_lesson(short), one_lesson(long, short)], (5, 5))
    assert laid["picture"].tolist() == [0, 1] and len(laid["tokens"]) == 2


def test_an_order_whose_action_does_not_fit_has_no_row(rows, tokenizer):
    """Even where a question would: a row without its action teaches half of what it is for."""
    move = task.move(sight(-0.93, 0.93), 0.35)
    asked, hold = [Asked("Why?", "No.")], [Asked("Why?", "None.")]
    n_action = len([*tokenizer.encode("Action?"), *tokenizer.encode(task.spell(move))]) + 1
    room = (
        ROW_TOKENS - len(rows.prompt("")) + len(rows.prefix) - 2 - 29 - 1
    )  # behind [/SYSTEM_PROMPT][INST] and picture
    texts = {len(rows.prompt(text)) - len(rows.prompt("")): text for n in range(200) for text in ["la" * n]}
    fits, too_long = texts[room - n_action], texts[room - n_action + 1]
    for text, n_rows in ((fits, 1), (too_long, 0)):
        assert len(rows.lay([one_lesson(Said(Order("nothing"), text, move, asked))], (5, 5))["tokens"]) == n_rows
    laid = rows.lay([one_lesson(Said(Order("nothing"), too_long, HOLD, hold))], (5, 5))
    assert set(laid["branch"][0].tolist()) >= {0, 1}  # a shorter action has room


def test_every_order_fits_with_its_action(rows, many):
    """The longest instructions and the largest grid that training lays out leave room for the action."""
    rng = np.random.default_rng(2)
    longest = sorted(
        (task.instruction(rng, "en", Order("nothing")) for _ in range(2000)), key=lambda t: -len(rows.prompt(t))
    )
    move = task.move(sight(-0.93, 0.93), 0.35)
    laid = rows.lay([one_lesson(*(Said(Order("nothing"), text, move, []) for text in longest[:20]))], (5, 5))
    assert len(laid["tokens"]) == 20 and (laid["branch"] == 1).any(1).all()


# -- aim --------------------------------------------------------------------------------------------------------------

RED, BLUE = ("red", "disc"), ("blue", "ring")


def aims(laid: dict[str, np.ndarray], row: int = 0) -> list[int]:
    """What stands at a row's closing tokens, branch by branch; everywhere else is none."""
    closing = laid["tokens"][row] == 4
    assert (laid["aim"][row][~closing] == -1).all() and laid["aim"].dtype == np.int64
    return laid["aim"][row][closing].tolist()


@pytest.mark.parametrize(
    ("size_px", "red", "blue"),
    [
        ((140, 140), 8, 20),  # line 1.25, column 3.25 of five; line 4.25, column 0.5
        ((126, 168), 3, 18),  # line 0.67, column 3.9 of six; line 3.87, column 0.6
        ((168, 126), 6, 36),  # line 1.5, column 2.8 of four; left of the picture
    ],
)
def test_aims_by_hand(rows, size_px, red, blue):
    """Under every order, and for every question, the cell of the one pad it is about."""
    pads = (sight(-0.8, 0.7, 0.2, *BLUE), sight(0.3, -0.5, 0.2, *RED))
    questions = [
        Asked("Red?", "Yes.", RED),
        Asked("All?", "Two."),
        Asked("Blue?", "Yes.", BLUE),
        Asked("Ring?", "No.", ("red", "ring")),
    ]
    orders = {  # and where the action is found
        Order("goto", *RED): red,
        Order("land", *RED): red,
        Order("land", *BLUE): blue,
        Order("land", "red", "ring"): 36,  # a near miss: each word is true of a pad
        Order("goto", "blue", "disc"): 36,
        Order("goto", "black", "truck"): 36,  # in no world
        Order("hold"): -1,
        Order("nothing"): -1,
    }
    said = [Said(order, "stop", HOLD, questions) for order in orders]
    laid = rows.lay([one_lesson(*said, sights=pads, size_px=size_px)], GRIDS[size_px])
    for row, found in enumerate(orders.values()):
        assert aims(laid, row) == [found, red, -1, blue, 36]


def test_each_picture_has_aims_of_its_own(rows):
    said = Said(Order("goto", *RED), "stop", HOLD, [Asked("Red?", "Yes.", RED)])
    places = ((-0.9, -0.9), (0.9, -0.9), (-0.9, 0.9), (0.9, 0.9))
    lessons = [one_lesson(said, sights=(sight(*place),)) for place in places]
    laid = rows.lay([*lessons, one_lesson(said)], (5, 5))
    assert [aims(laid, row) for row in range(5)] == [[0, 0], [4, 4], [20, 20], [24, 24], [36, 36]]


@pytest.mark.parametrize("size_px", GRIDS)
def test_aims_are_where_the_pixels_of_the_pad_are(rows, size_px):
    """In drawn lessons, in pixels of the picture; and nowhere just where the right answer is to search, or no."""
    grounds = Grounds([], 7, 4)
    lessons = [lesson(np.random.default_rng([9, i]), grounds, size_px=size_px) for i in range(60)]
    laid, grid = rows.lay(lessons, GRIDS[size_px]), GRIDS[size_px]
    negative = {'{"action":"search"}', *(words[key] for words in task.WORDS.values() for key in ("no", "gone"))}
    n = dict.fromkeys(("none", "somewhere", "nowhere"), 0)
    pairs = [(one, said) for one in lessons for said in one.said]
    for row, (one, said) in enumerate(pairs):
        about = (said.order.colour, said.order.shape) if said.order.kind in ("goto", "land") else None
        asked = [Asked("Action?", task.spell(said.action), about), *said.questions]
        laid_out = sorted({*laid["branch"][row].tolist()} - {-1, 0})
        for b, aim in zip(laid_out, aims(laid, row), strict=True):
            _, answer, about = asked[b - 1]
            if about is None:
                assert aim == -1
                n["none"] += 1
            elif aim == NOWHERE:
                assert answer in negative
                n["nowhere"] += 1
            else:
                assert answer not in negative
                (pad,) = (s for s in one.sights if (s.pad.colour, s.pad.shape) == about)
                half = max(size_px) / 2
                line, column = divmod(aim, grid[1])
                x, y = size_px[1] / 2 + half * pad.right, size_px[0] / 2 + half * pad.down
                assert column * size_px[1] <= x * grid[1] < (column + 1) * size_px[1]
                assert line * size_px[0] <= y * grid[0] < (line + 1) * size_px[0]
                n["somewhere"] += 1
    assert min(n.values()) > 100, n


# -- cells ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size_px", "grid", "right", "down", "expected"),
    [
        ((140, 140), (5, 5), -1, -1, 0),
        ((140, 140), (5, 5), 0, 0, 12),
        ((140, 140), (5, 5), 0.3, -0.5, 8),  # 3.25 to the right, 1.25 down
        ((140, 140), (5, 5), -0.5, 0.3, 16),  # the other way round
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
    assert expected == NOWHERE or expected < grid[0] * grid[1] < NOWHERE


@pytest.mark.parametrize(
    ("size_px", "right", "down", "cell", "place"),
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
def test_cells_by_hand(size_px, right, down, cell, place):
    grid = GRIDS[size_px]
    held = cells([one_lesson(sights=(sight(right, down),), size_px=size_px)], grid)
    colour, shape, where = (held[key] for key in ("cell_colour", "cell_shape", "cell_where"))
    assert set(held) == {"cell_colour", "cell_shape", "cell_where"}
    assert colour.shape == shape.shape == (1, *grid) and where.shape == (1, *grid, 3)
    assert colour.dtype == shape.dtype == np.int64 and where.dtype == np.float32
    if cell is None:
        assert not colour.any() and not where.any()
        return
    assert colour[(0, *cell)] == 1 and np.count_nonzero(colour) == 1  # red is the first colour; 0 is none
    assert where[(0, *cell)] == pytest.approx(place, abs=1e-4)


def test_every_kind_of_pad_has_a_colour_and_a_shape_of_its_own():
    pads = [sight(0, 0, colour=colour, shape=shape) for colour in COLOURS for shape in SHAPES]
    held = cells([one_lesson(sights=(pad,)) for pad in pads], (5, 5))
    found = list(zip(held["cell_colour"][:, 2, 2].tolist(), held["cell_shape"][:, 2, 2].tolist(), strict=True))
    assert found == [(1 + i, j) for i in range(5) for j in range(4)]


def test_cells_of_several_pads_and_pictures():
    pads = (sight(-0.8, -0.8), sight(0.8, 0.8, 0.4, "blue", "ring"))
    held = cells([one_lesson(), one_lesson(sights=pads)], (5, 5))
    assert not held["cell_colour"][0].any()
    assert np.argwhere(held["cell_colour"][1]).tolist() == [[0, 0], [4, 4]]
    assert held["cell_where"][1, 4, 4] == pytest.approx((0, 0, 1.0), abs=1e-6)


def test_cells_lead_back_to_the_sights(many):
    """A cell's middle and the offset from it, in pixels of the picture: a pad of this colour is there."""
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
