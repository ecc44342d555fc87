"""The rule, against actions and answers written by hand: for every position of a pad, and for every question."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.actions.envelope import CheckedAction, parse_answer
from edge_agent.actions.space import load_action_space
from models.pad_pilot import task
from models.pad_pilot.scene import Sight
from models.pad_pilot.task import LANGUAGES, Order, action, is_in_picture, random_exchange, to_json
from tests.harness.pad_sentences import PADS, about, sight, well_formed

pytestmark = pytest.mark.filterwarnings("error")

VELOCITY = load_action_space("velocity_body")
LAND, GOTO = Order("land", "red", "disc"), Order("goto", "red", "disc")


WIDE, TALL = (1.0, 0.75), (0.75, 1.0)  # the edge (right, down) of a picture of four by three, and of three by four


def moving(vx: float, vy: float, vz: float) -> dict:
    return {"action": "move", "vx": vx, "vy": vy, "vz": vz, "yaw": 0}


# -- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "down", "radius", "expected"),
    [
        (0, 0, 0.2, True),
        (0.93, -0.93, 0.2, True),
        (0.945, 0, 0.2, None),
        (0, -0.95, 0.0, None),
        (-1.17, 0, 0.2, None),  # its rim is still in the picture: 1 + 0.9 * 0.2 is 1.18
        (-1.19, 0, 0.2, False),
        (0, 1.7, 0.8, None),
        (0, 1.73, 0.8, False),
        (1.01, 0, 0.0, False),
        (5, 5, 0.2, False),
    ],
)
def test_whether_a_pad_is_in_the_picture(right, down, radius, expected):
    assert is_in_picture(sight(right, down, radius)) is expected


@pytest.mark.parametrize(
    ("along", "across", "radius", "expected"),
    [
        (0, 0.68, 0.2, True),
        (0.93, 0.68, 0.2, True),
        (0, -0.7, 0.2, None),
        (0, 0.92, 0.2, None),  # 0.75 + 0.9 * 0.2 is 0.93
        (0, 0.94, 0.2, False),  # in a square picture it would be well inside
        (0, -0.76, 0.0, False),
        (0.95, 0, 0.2, None),
        (1.17, 0.5, 0.2, None),
        (-1.19, 0, 0.2, False),
        (0.5, 1.25, 0.6, None),  # 1.29
        (0.5, 1.3, 0.6, False),
    ],
)
def test_whether_a_pad_is_in_a_picture_that_is_not_square(along, across, radius, expected):
    """The longer side ends at 1, the shorter side at 0.75. along: the longer side. across: the shorter side."""
    assert is_in_picture(sight(along, across, radius, edge=WIDE)) is expected
    assert is_in_picture(sight(across, along, radius, edge=TALL)) is expected


def test_a_pad_outside_the_picture_is_searched():
    """A pad 0.9 down is at the bottom of a square picture, and below a wide picture."""
    for order in (GOTO, LAND):
        assert action(order, [sight(0, 0.9, 0.1)]) == moving(-1.35, 0, 0)
        assert action(order, [sight(0, 0.9, 0.1, edge=WIDE)]) == {"action": "search"}
        assert action(order, [sight(0, 0.7, 0.1, edge=WIDE)]) is None
        assert action(order, [sight(0, 0.6, 0.1, edge=WIDE)]) == moving(-0.9, 0, 0)  # speed follows the angle


@pytest.mark.parametrize(
    ("order", "right", "down", "radius", "expected"),
    [
        # Going there: 1.5 m/s at the edge, in proportion to the distance, and none in the middle.
        (GOTO, 0, 0, 0.2, {"action": "hold"}),
        (GOTO, 0.08, -0.08, 0.2, {"action": "hold"}),  # 0.113 away
        (GOTO, 0.09, 0.09, 0.2, None),  # 0.127
        (GOTO, 0, 0.12, 0.2, None),
        (GOTO, 0, 0.17, 0.7, None),
        (GOTO, 0, -0.19, 0.2, moving(0.3, 0, 0)),  # 0.285 is nearer to 0.30 than to 0.25
        (GOTO, 0, 0.19, 0.2, moving(-0.3, 0, 0)),
        (GOTO, -0.5, 0, 0.2, moving(0, -0.75, 0)),
        (GOTO, 0.3, -0.4, 0.8, moving(0.6, 0.45, 0)),
        (GOTO, 0.93, 0.93, 0.2, moving(-1.4, 1.4, 0)),
        (GOTO, 0.6667, 0.01, 0.2, moving(0, 1, 0)),  # 1 is spelled 1, and -0.015 is 0
        (GOTO, 0.95, 0, 0.2, None),
        (GOTO, 0.95, 0, 0.0, None),
        (GOTO, 1.19, 0, 0.2, {"action": "search"}),
        # Landing: 0.8 m/s down in the middle, none from half way out; then, near and large enough, land.
        (LAND, 0, 0, 0.2, moving(0, 0, 0.8)),
        (LAND, 0.25, 0, 0.2, moving(0, 0.4, 0.4)),  # 0.375 is a tie in the step of 0.05: rounded to even
        (LAND, 0, -0.4, 0.2, moving(0.6, 0, 0.15)),  # 0.16
        (LAND, 0, 0.5, 0.2, moving(-0.75, 0, 0)),
        (LAND, 0.9, 0.9, 0.2, moving(-1.35, 1.35, 0)),
        (LAND, 0, 0, 0.44, moving(0, 0, 0.8)),
        (LAND, 0, 0, 0.45, None),
        (LAND, 0, 0, 0.52, None),
        (LAND, 0, 0, 0.53, {"action": "land"}),
        (LAND, 0.15, -0.15, 0.53, {"action": "land"}),  # 0.212 away
        (LAND, 0.16, 0.16, 0.53, None),  # 0.226
        (LAND, 0.35, 0, 0.53, None),
        (LAND, 0.35, 0, 0.45, None),
        (LAND, 0.36, 0, 0.53, moving(0, 0.55, 0.2)),  # 0.54 and 0.224
        (LAND, 0.36, 0, 0.45, moving(0, 0.55, 0.2)),
        (LAND, 0.35, 0, 0.44, moving(0, 0.5, 0.25)),  # 0.525 is just below the tie; 0.24
        # Very low, 0.4 and 0.55 of the radius are more than 0.22 and 0.36: from radii of 0.55 and 0.655 on.
        (LAND, 0.219, 0, 0.54, {"action": "land"}),  # 0.216 would be less
        (LAND, 0.23, 0, 0.54, None),
        (LAND, 0.27, 0, 0.7, {"action": "land"}),  # 0.28
        (LAND, 0, -0.29, 0.7, None),
        (LAND, -0.38, 0, 0.7, None),  # 0.385
        (LAND, 0, 0.39, 0.7, moving(-0.6, 0, 0.2)),  # 0.585 and 0.176
        (LAND, 0.31, 0, 0.8, {"action": "land"}),  # 0.32
        (LAND, 0.33, 0, 0.8, None),
        (LAND, 0.3, 0.3, 0.8, None),  # 0.424 away, 0.44
        (LAND, 0.45, 0, 0.8, moving(0, 0.7, 0.1)),  # 0.675 is a tie, 0.08
        (LAND, 0.37, 0, 0.6, moving(0, 0.55, 0.2)),  # 0.33 is less than 0.36
        (LAND, 0.95, 0, 0.8, None),
        (LAND, 2, 0, 0.8, {"action": "search"}),
    ],
)
def test_the_right_action_for_each_position(order, right, down, radius, expected):
    assert action(order, [sight(right, down, radius)]) == expected


def test_the_action_is_about_the_pad_in_the_order():
    """Colour and shape both count. Another pad in the middle of the picture changes nothing."""
    near, far = sight(0, 0, 0.6), sight(0.5, 0, 0.2, "red", "ring")
    assert action(LAND, [far, near]) == action(LAND, [near, far]) == {"action": "land"}
    assert action(Order("land", "red", "ring"), [near, far]) == moving(0, 0.75, 0)
    for order in (("land", "blue", "disc"), ("goto", "red", "square"), ("land", "", ""), ("goto", "", "")):
        assert action(Order(*order), [near, far]) == action(Order(*order), []) == {"action": "search"}
    assert action(GOTO, [sight(1, 0, 0.2, "red", "ring"), sight(0, 0)]) == {"action": "hold"}


def test_for_hold_and_nothing_the_right_action_is_hold_with_any_pads():
    for kind in ("hold", "nothing"):
        for sights in ([], [sight(0, 0, 0.6)], [sight(0.96, 0)]):
            assert action(Order(kind), sights) == {"action": "hold"}


def test_the_speed_is_limited_along_each_axis():
    assert task.move(sight(3, -7), 9.0) == moving(1.5, 1.5, 1.5)
    assert task.move(sight(-3, 7), -9.0) == moving(-1.5, -1.5, -1.5)


@given(
    st.sampled_from(["goto", "land"]),
    *(st.floats(-1.3, 1.3, allow_subnormal=False) for _ in range(2)),
    st.floats(0.01, 0.9),
    st.booleans(),
)
def test_the_runtime_accepts_every_action_unchanged(kind, right, down, radius, as_numpy):
    """No action is clamped or refused. Its numbers are multiples of 0.05 without extra digits, also of numpy floats."""
    number = np.float64 if as_numpy else float
    answer = action(Order(kind, "red", "disc"), [sight(number(right), number(down), number(radius))])
    if answer is None:
        return
    checked = parse_answer(to_json(answer), VELOCITY)
    assert isinstance(checked, CheckedAction) and checked.type == answer["action"] and not checked.clamped
    if answer["action"] != "move":
        assert to_json(answer) == f'{{"action":"{answer["action"]}"}}'
        return
    digits = r"(0|-?[01](\.\d5|\.\d)?)"
    pattern = rf'\{{"action":"move","vx":{digits},"vy":{digits},"vz":{digits},"yaw":0\}}'
    assert re.fullmatch(pattern, to_json(answer)) and "-0," not in to_json(answer) and ".0," not in to_json(answer)
    expected = (-1.5 * down, 1.5 * right, 0 if kind == "goto" else max(0, 0.8 - 1.6 * math.hypot(right, down)))
    values = list(checked.values.values())
    assert values[:3] == pytest.approx([min(1.5, max(-1.5, v)) for v in expected], abs=0.025 + 1e-9)
    assert all(abs(v * 20 - round(v * 20)) < 1e-9 for v in values) and values[3] == 0


def test_an_action_is_written_as_the_grammar_requires():
    assert to_json(moving(0.3, -1, 0)) == '{"action":"move","vx":0.3,"vy":-1,"vz":0,"yaw":0}'


# -- questions --------------------------------------------------------------------------------------------------------

TWO = [sight(0.6, 0.6, 0.2, "blue", "ring"), sight(-0.6, 0, 0.2, "red", "disc")]  # not in the order of the picture
THREE = [*TWO, sight(0, -0.5, 0.2, "green", "square")]


@pytest.mark.parametrize(
    ("language", "none", "one", "two", "three"),
    [
        ("en", "No pads.", "A red disc.", "A red disc and a blue ring.", "A red disc, a green square and a blue ring."),
        (
            "fr",
            "Aucune.",
            "Un disque rouge.",
            "Un disque rouge et un anneau bleu.",
            "Un disque rouge, un carré vert et un anneau bleu.",
        ),
        (
            "de",
            "Keine.",
            "Eine rote Scheibe.",
            "Eine rote Scheibe und ein blauer Ring.",
            "Eine rote Scheibe, ein grünes Quadrat und ein blauer Ring.",
        ),
        (
            "es",
            "Ninguna.",
            "Un disco rojo.",
            "Un disco rojo y un anillo azul.",
            "Un disco rojo, un cuadrado verde y un anillo azul.",
        ),
        ("ko", "없어요.", "빨간 원반.", "빨간 원반, 파란 고리.", "빨간 원반, 초록 사각형, 파란 고리."),
    ],
)
def test_the_pads_are_listed_from_left_to_right(language, none, one, two, three):
    rng = np.random.default_rng(8)
    for sights, expected in (([], none), (TWO[1:], one), (TWO, two), (THREE, three)):
        exchange = random_exchange(rng, language, "see", sights)
        assert exchange.answer == expected and exchange.question in task.QUESTIONS[language]["see"]


@pytest.mark.parametrize(
    ("language", "numbers"),
    [
        ("en", ("None.", "One.", "Two.", "Three.")),
        ("fr", ("Aucune.", "Une.", "Deux.", "Trois.")),  # une plateforme
        ("de", ("Keine.", "Eine.", "Zwei.", "Drei.")),
        ("es", ("Ninguna.", "Una.", "Dos.", "Tres.")),
        ("ko", ("없어요.", "한 개.", "두 개.", "세 개.")),
    ],
)
def test_questions_for_the_number_of_pads(language, numbers):
    rng = np.random.default_rng(9)
    outside = sight(3, 0, 0.2, "purple", "ring")
    for n in range(4):
        assert random_exchange(rng, language, "count", THREE[:n]).answer == numbers[n]
        assert random_exchange(rng, language, "count", [outside, *THREE[:n]]).answer == numbers[n]


def test_more_than_three_pads_are_not_counted():
    """The tables have no word for more than three. The pads can still be listed."""
    rng = np.random.default_rng(17)
    four = [*THREE, sight(0.3, 0, 0.2, "purple", "triangle")]
    for language in LANGUAGES:
        for sights in (four, [*four, sight(-0.3, 0.5, 0.2, "yellow", "disc")]):
            assert random_exchange(rng, language, "count", sights) is None
            assert random_exchange(rng, language, "see", sights) is not None
    outside = sight(3, 0, 0.2, "yellow", "disc")
    assert random_exchange(rng, "en", "count", [*THREE, outside]).answer == "Three."
    all_four = "A red disc, a green square, a purple triangle and a blue ring."
    assert random_exchange(rng, "en", "see", four).answer == all_four


def test_pads_side_by_side_have_no_order():
    """Two pads less than 0.1 apart have no order from left to right. They can still be counted."""
    rng = np.random.default_rng(10)
    for apart, answer in ((0.09, None), (0.11, "A red disc and a blue ring.")):
        sights = [sight(0.2 + apart, 0.5, 0.2, "blue", "ring"), sight(0.2, -0.5)]
        exchange = random_exchange(rng, "en", "see", sights)
        assert (exchange and exchange.answer) == answer
        assert (task.list_pads("en", sorted(sights, key=lambda s: s.right)) or None) == answer
        assert random_exchange(rng, "en", "count", sights).answer == "Two."


def test_with_a_pad_partly_in_the_picture_no_question_has_an_answer():
    rng = np.random.default_rng(11)
    for language in LANGUAGES:
        for kind in ("see", "is", "count", "where"):
            assert random_exchange(rng, language, kind, [sight(0, 0), sight(1.0, 0, 0.2, "blue")]) is None


YES_NO = {"en": ("Yes.", "No."), "fr": ("Oui.", "Non."), "de": ("Ja.", "Nein."), "es": ("Sí.", "No."),
          "ko": ("네.", "아니요.")}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_questions_whether_a_pad_is_in_the_picture(language):
    """The answer fits the pad that the question names. Both answers are frequent."""
    rng = np.random.default_rng(12)
    answers, asked_about = [], set()
    for _ in range(400):
        sights = [s for s in THREE if rng.random() < 0.6] + [sight(2, 2, 0.2, "purple", "triangle")]
        exchange = random_exchange(rng, language, "is", sights)
        assert well_formed(language, exchange.question), exchange
        pad = about(language, exchange.question)
        there = any((s.pad.colour, s.pad.shape) == pad for s in sights[:-1])  # the last one is outside
        assert exchange == (exchange.question, YES_NO[language][not there], pad)
        answers.append(there)
        asked_about.add(pad)
    assert 0.25 < np.mean(answers) < 0.75 and len(asked_about) == 20


def test_german_questions_use_the_accusative():
    rng = np.random.default_rng(13)
    sights = [sight(0, 0, 0.2, colour, shape) for colour, shape in PADS * 20]
    questions = {random_exchange(rng, "de", "is", [one_sight]).question for one_sight in sights}
    expected = {"Siehst du einen roten Ring?", "Siehst du eine rote Scheibe?", "Gibt es hier ein rotes Quadrat?"}
    assert expected <= questions
    assert not any(re.search(r"ein \w+er ", question) for question in questions)


PLACE_WORDS = {
    "en": "Top left./Top./Top right./Left./Middle./Right./Bottom left./Bottom./Bottom right.",
    "fr": "En haut à gauche./En haut./En haut à droite./À gauche./Au milieu./À droite."
    "/En bas à gauche./En bas./En bas à droite.",
    "de": "Oben links./Oben./Oben rechts./Links./In der Mitte./Rechts./Unten links./Unten./Unten rechts.",
    "es": "Arriba a la izquierda./Arriba./Arriba a la derecha./A la izquierda./En el centro./A la derecha."
    "/Abajo a la izquierda./Abajo./Abajo a la derecha.",
    "ko": "왼쪽 위./위./오른쪽 위./왼쪽./가운데./오른쪽./왼쪽 아래./아래./오른쪽 아래.",
}


def asked_where(language: str, sights: list[Sight], pad: tuple[str, str], rng: np.random.Generator) -> str | None:
    """The answer to a question where a pad is; None: in many tries, no question about this pad had an answer."""
    for _ in range(400):
        exchange = random_exchange(rng, language, "where", sights)
        if exchange and about(language, exchange.question) == pad:
            assert well_formed(language, exchange.question) and exchange.about == pad
            return exchange.answer
    return None


@pytest.mark.parametrize("language", LANGUAGES)
def test_questions_where_a_pad_is(language):
    rng = np.random.default_rng(14)
    words = PLACE_WORDS[language].split("/")
    for line, down in enumerate((-0.4, 0.26, 0.9)):
        for column, right in enumerate((-0.9, -0.26, 0.4)):
            assert asked_where(language, [sight(right, down)], ("red", "disc"), rng) == words[3 * line + column]
    absent = {"en": "Not in view.", "fr": "Pas en vue.", "de": "Nicht im Bild.", "es": "No se ve.", "ko": "안 보여요."}
    assert asked_where(language, [sight(0, 0)], ("red", "ring"), rng) == absent[language]
    assert asked_where(language, [sight(0, 0), sight(3, 0, colour="blue")], ("blue", "disc"), rng) == absent[language]


def test_a_position_between_two_thirds_has_no_answer():
    rng = np.random.default_rng(15)
    for right, down in ((0.3, 0), (0, -0.28), (-0.38, 0.38), (0.9, 0.3)):
        assert asked_where("en", [sight(right, down)], ("red", "disc"), rng) is None
    # With two pads, each has its own position.
    assert asked_where("en", TWO, ("blue", "ring"), rng) == "Bottom right."
    assert asked_where("en", TWO, ("red", "disc"), rng) == "Left."


@pytest.mark.parametrize(
    ("along", "across", "place"),
    [
        (0.0, 0.2, "Middle."),  # 0.2 of 0.75 is 0.267
        (0.0, 0.25, None),  # 0.333
        (0.0, 0.3, "Bottom."),  # 0.4; in a square picture there is no answer
        (0.0, -0.3, "Top."),
        (0.3, 0.0, None),  # along the longer side, as in a square picture
        (0.4, 0.3, "Bottom right."),
        (-0.26, -0.2, "Middle."),
        (-0.9, 0.68, "Bottom left."),
        (0.0, 0.72, None),  # at its edge it may be outside
    ],
)
def test_questions_where_a_pad_is_in_a_picture_that_is_not_square(along, across, place):
    """A third is a third of each side of this picture."""
    rng = np.random.default_rng(18)
    assert asked_where("en", [sight(along, across, edge=WIDE)], ("red", "disc"), rng) == place
    turned = {"Bottom.": "Right.", "Top.": "Left.", "Bottom left.": "Top right."}.get(place, place)
    assert asked_where("en", [sight(across, along, edge=TALL)], ("red", "disc"), rng) == turned


def test_a_pad_below_a_wide_picture_is_not_in_view():
    rng = np.random.default_rng(19)
    below = sight(0, 0.9, 0.1, edge=WIDE)
    assert [random_exchange(rng, "en", kind, [below]).answer for kind in ("count", "see")] == ["None.", "No pads."]
    assert asked_where("en", [below], ("red", "disc"), rng) == "Not in view."


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_question_says_which_pad_it_is_about(language):
    """It is the pad that the question names, in the picture or not. Lists and numbers are not about one pad."""
    rng = np.random.default_rng(20)
    sights = [*TWO, sight(3, 0, 0.2, "green", "square")]
    for kind in ("is", "where"):
        exchange = [random_exchange(rng, language, kind, sights) for _ in range(300)]
        assert all(exchange.about == about(language, exchange.question) for exchange in exchange)
        pads = {exchange.about for exchange in exchange}
        assert {("blue", "ring"), ("red", "disc"), ("red", "ring"), ("blue", "disc"), ("green", "square")} <= pads
        assert all(type(word) is str for pad in pads for word in pad)  # not numpy's own
    for kind in ("see", "count"):
        for here in ([], sights[2:], TWO[:1], TWO):
            assert random_exchange(rng, language, kind, here).about is None
