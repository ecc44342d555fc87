"""What is right, by hand: the action for every place of a pad, and the words in five languages, form by form."""

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
from models.pad_pilot.scene import COLOURS, SHAPES, Pad, Sight
from models.pad_pilot.task import LANGUAGES, Order, absent_order, action, instruction, question, seen, spell

pytestmark = pytest.mark.filterwarnings("error")

VELOCITY = load_action_space("velocity_body")
PADS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
LAND, GOTO = Order("land", "red", "disc"), Order("goto", "red", "disc")


WIDE, TALL = (1.0, 0.75), (0.75, 1.0)  # where a picture of four by three ends, right and down


def sight(
    right: float,
    down: float,
    radius: float = 0.2,
    colour: str = "red",
    shape: str = "disc",
    edge: tuple[float, float] = (1.0, 1.0),
) -> Sight:
    return Sight(Pad(colour, shape, 0.0, 0.0, 0.5, 0.0), right, down, radius, edge)


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
        (-1.17, 0, 0.2, None),  # its rim still shows: 1 + 0.9 * 0.2 is 1.18
        (-1.19, 0, 0.2, False),
        (0, 1.7, 0.8, None),
        (0, 1.73, 0.8, False),
        (1.01, 0, 0.0, False),
        (5, 5, 0.2, False),
    ],
)
def test_seen(right, down, radius, expected):
    assert seen(sight(right, down, radius)) is expected


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
def test_seen_in_pictures_that_are_not_square(along, across, radius, expected):
    """Along and across the longer side, which ends at 1; the shorter one ends at 0.75."""
    assert seen(sight(along, across, radius, edge=WIDE)) is expected
    assert seen(sight(across, along, radius, edge=TALL)) is expected


def test_what_a_picture_does_not_show_is_searched():
    """0.9 down: at the bottom of a square picture, below a wide one."""
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
def test_the_right_action_place_by_place(order, right, down, radius, expected):
    assert action(order, [sight(right, down, radius)]) == expected


def test_the_action_is_about_the_pad_that_was_named():
    """Its colour and its shape; another one in the middle, ready to be landed on, changes nothing."""
    near, far = sight(0, 0, 0.6), sight(0.5, 0, 0.2, "red", "ring")
    assert action(LAND, [far, near]) == action(LAND, [near, far]) == {"action": "land"}
    assert action(Order("land", "red", "ring"), [near, far]) == moving(0, 0.75, 0)
    for order in (("land", "blue", "disc"), ("goto", "red", "square"), ("land", "", ""), ("goto", "", "")):
        assert action(Order(*order), [near, far]) == action(Order(*order), []) == {"action": "search"}
    assert action(GOTO, [sight(1, 0, 0.2, "red", "ring"), sight(0, 0)]) == {"action": "hold"}


def test_hold_and_nothing_hold_whatever_is_seen():
    for kind in ("hold", "nothing"):
        for sights in ([], [sight(0, 0, 0.6)], [sight(0.96, 0)]):
            assert action(Order(kind), sights) == {"action": "hold"}


def test_speeds_saturate():
    assert task.move(sight(3, -7), 9.0) == moving(1.5, 1.5, 1.5)
    assert task.move(sight(-3, 7), -9.0) == moving(-1.5, -1.5, -1.5)


@given(
    st.sampled_from(["goto", "land"]),
    *(st.floats(-1.3, 1.3, allow_subnormal=False) for _ in range(2)),
    st.floats(0.01, 0.9),
    st.booleans(),
)
def test_any_action_passes_the_runtimes_reader_unchanged(kind, right, down, radius, as_numpy):
    """Not clamped, not refused, on the grid of 0.05, with no digit too many; also from numpy's numbers."""
    number = np.float64 if as_numpy else float
    answer = action(Order(kind, "red", "disc"), [sight(number(right), number(down), number(radius))])
    if answer is None:
        return
    asked = parse_answer(spell(answer), VELOCITY)
    assert isinstance(asked, CheckedAction) and asked.type == answer["action"] and not asked.clamped
    if answer["action"] != "move":
        assert spell(answer) == f'{{"action":"{answer["action"]}"}}'
        return
    digits = r"(0|-?[01](\.\d5|\.\d)?)"
    pattern = rf'\{{"action":"move","vx":{digits},"vy":{digits},"vz":{digits},"yaw":0\}}'
    assert re.fullmatch(pattern, spell(answer)) and "-0," not in spell(answer) and ".0," not in spell(answer)
    wanted = (-1.5 * down, 1.5 * right, 0 if kind == "goto" else max(0, 0.8 - 1.6 * math.hypot(right, down)))
    said = list(asked.values.values())
    assert said[:3] == pytest.approx([min(1.5, max(-1.5, v)) for v in wanted], abs=0.025 + 1e-9)
    assert all(abs(v * 20 - round(v * 20)) < 1e-9 for v in said) and said[3] == 0


def test_spelled_as_the_grammar_has_it():
    assert spell(moving(0.3, -1, 0)) == '{"action":"move","vx":0.3,"vy":-1,"vz":0,"yaw":0}'


# -- names ------------------------------------------------------------------------------------------------------------

# Written out by hand, one noun of each gender or ending.
FORMS = {
    ("en", "yellow", "square"): {"a": "a yellow square", "to": "to the yellow square", "on": "on the yellow square"},
    ("en", "orange", "ring"): {"a": "an orange ring", "the": "the orange ring"},
    ("en", "grey", "hexagon"): {"a": "a grey hexagon"},  # the article goes with the colour
    ("en", "orange", "hexagon"): {"a": "an orange hexagon"},
    ("fr", "red", "disc"): {"a": "un disque rouge", "the": "le disque rouge", "to": "vers le disque rouge"},
    ("fr", "green", "ring"): {"a": "un anneau vert", "the": "l'anneau vert", "on": "sur l'anneau vert"},
    ("fr", "purple", "square"): {"the": "le carré violet"},
    ("fr", "grey", "hexagon"): {"a": "un hexagone gris", "the": "l'hexagone gris", "to": "vers l'hexagone gris"},
    ("fr", "orange", "truck"): {"the": "le camion orange", "on": "sur le camion orange"},
    ("es", "yellow", "triangle"): {"a": "un triángulo amarillo", "to": "al triángulo amarillo"},
    ("es", "purple", "ring"): {"the": "el anillo morado", "on": "en el anillo morado"},
    ("es", "brown", "heart"): {"a": "un corazón marrón", "to": "al corazón marrón"},
    ("de", "red", "disc"): {
        "a": "eine rote Scheibe",
        "a_den": "eine rote Scheibe",
        "the": "die rote Scheibe",
        "den": "die rote Scheibe",
        "dem": "der roten Scheibe",
        "to": "zur roten Scheibe",
        "on": "auf der roten Scheibe",
    },
    ("de", "green", "square"): {
        "a": "ein grünes Quadrat",
        "a_den": "ein grünes Quadrat",
        "the": "das grüne Quadrat",
        "den": "das grüne Quadrat",
        "dem": "dem grünen Quadrat",
        "to": "zum grünen Quadrat",
        "on": "auf dem grünen Quadrat",
    },
    ("de", "purple", "ring"): {
        "a": "ein violetter Ring",
        "a_den": "einen violetten Ring",
        "the": "der violette Ring",
        "den": "den violetten Ring",
        "dem": "dem violetten Ring",
        "to": "zum violetten Ring",
        "on": "auf dem violetten Ring",
    },
    ("de", "yellow", "triangle"): {"a": "ein gelbes Dreieck", "to": "zum gelben Dreieck"},
    ("de", "white", "truck"): {"a_den": "einen weißen Lastwagen", "den": "den weißen Lastwagen"},
    ("de", "orange", "diamond"): {"the": "der orangefarbene Rhombus", "on": "auf dem orangefarbenen Rhombus"},
    ("de", "grey", "hexagon"): {"a": "ein graues Sechseck", "dem": "dem grauen Sechseck"},
    ("de", "black", "boat"): {"den": "das schwarze Boot", "to": "zum schwarzen Boot"},
    ("de", "brown", "heart"): {"a": "ein braunes Herz", "den": "das braune Herz", "on": "auf dem braunen Herzen"},
    ("ko", "red", "square"): {
        "a": "빨간 사각형",
        "the": "빨간 사각형이",
        "to": "빨간 사각형으로",
        "object": "빨간 사각형을",
    },
    ("ko", "blue", "disc"): {"the": "파란 원반이", "to": "파란 원반으로", "on": "파란 원반에", "object": "파란 원반을"},
    ("ko", "green", "ring"): {"the": "초록 고리가", "to": "초록 고리로", "on": "초록 고리에", "object": "초록 고리를"},
    ("ko", "black", "boat"): {"the": "검은 배가", "to": "검은 배로", "on": "검은 배에", "object": "검은 배를"},
    ("ko", "grey", "truck"): {"the": "회색 트럭이", "to": "회색 트럭으로", "object": "회색 트럭을"},
}


@pytest.mark.parametrize(("language", "colour", "shape"), FORMS)
def test_forms_of_a_name(language, colour, shape):
    forms = task.names(language, colour, shape)
    assert {key: forms[key] for key in FORMS[language, colour, shape]} == FORMS[language, colour, shape]


def test_every_pad_has_a_name_of_its_own():
    for language in LANGUAGES:
        assert len({task.names(language, *pad)["a"] for pad in PADS}) == len(PADS) == 20
        strange = [(c, s) for c in (*COLOURS, *task.ABSENT_COLOURS) for s in (*SHAPES, *task.ABSENT_SHAPES)]
        assert len({task.names(language, *pad)["a"] for pad in strange}) == len(strange) == 90


# -- sentences --------------------------------------------------------------------------------------------------------

# How each language calls colours and shapes, by word or stem: to find out from a sentence which pad it is about.
# Those from black and from hexagon on are in no world.
# fmt: off
WORDS = {
    "en": (
        {"red": "red", "green": "green", "blue": "blue", "yellow": "yellow", "purple": "purple",
         "black": "black", "white": "white", "grey": "grey", "brown": "brown", "orange": "orange"},
        {"disc": "disc", "square": "square", "triangle": "triangle", "ring": "ring",
         "hexagon": "hexagon", "heart": "heart", "truck": "truck", "boat": "boat", "diamond": "diamond"},
    ),
    "fr": (
        {"red": "rouge", "green": "vert", "blue": "bleu", "yellow": "jaune", "purple": "violet",
         "black": "noir", "white": "blanc", "grey": "gris", "brown": "brun", "orange": "orange"},
        {"disc": "disque", "square": "carré", "triangle": "triangle", "ring": "anneau",
         "hexagon": "hexagone", "heart": "cœur", "truck": "camion", "boat": "bateau", "diamond": "losange"},
    ),
    "de": (
        {"red": "rote", "green": "grün", "blue": "blau", "yellow": "gelb", "purple": "violett",
         "black": "schwarz", "white": "weiß", "grey": "grau", "brown": "braun", "orange": "orange"},
        {"disc": "Scheibe", "square": "Quadrat", "triangle": "Dreieck", "ring": "Ring",
         "hexagon": "Sechseck", "heart": "Herz", "truck": "Lastwagen", "boat": "Boot", "diamond": "Rhombus"},
    ),
    "es": (
        {"red": "rojo", "green": "verde", "blue": "azul", "yellow": "amarillo", "purple": "morado",
         "black": "negro", "white": "blanco", "grey": "gris", "brown": "marrón", "orange": "naranja"},
        {"disc": "disco", "square": "cuadrado", "triangle": "triángulo", "ring": "anillo",
         "hexagon": "hexágono", "heart": "corazón", "truck": "camión", "boat": "barco", "diamond": "rombo"},
    ),
    "ko": (
        {"red": "빨간", "green": "초록", "blue": "파란", "yellow": "노란", "purple": "보라",
         "black": "검은", "white": "하얀", "grey": "회색", "brown": "갈색", "orange": "주황"},
        {"disc": "원반", "square": "사각형", "triangle": "삼각형", "ring": "고리",
         "hexagon": "육각형", "heart": "하트", "truck": "트럭", "boat": "배", "diamond": "마름모"},
    ),
}
# fmt: on


def about(language: str, sentence: str) -> tuple[str, str]:
    """The one pad that a sentence names."""
    colours, shapes = WORDS[language]
    words = re.findall(r"\w+", sentence)
    (colour,) = [key for key, word in colours.items() if any(w.startswith(word) for w in words)]
    (shape,) = [key for key, word in shapes.items() if any(w.startswith(word) for w in words)]
    return colour, shape


GERMAN = re.compile(  # article, ending of the colour, noun, as they may stand together
    r"(eine \w+e|die \w+e|(der|zur) \w+en) Scheibe"
    r"|(ein \w+es|das \w+e|(dem|zum) \w+en) (Quadrat|Dreieck|Sechseck|Herz|Boot)"
    r"|(ein \w+er|einen \w+en|der \w+e|den \w+en|(dem|zum) \w+en) (Ring|Lastwagen|Rhombus)"
)


def final(syllable: str) -> int:
    """The number of a Hangul syllable's final consonant; 0: none, 8: ㄹ."""
    return (ord(syllable) - 0xAC00) % 28


def particles_fit(sentence: str) -> bool:
    """이, 을 and 으로 after a final consonant, 가, 를 and 로 after none; after ㄹ 로 too."""
    nouns = "|".join(WORDS["ko"][1].values())
    fits = {
        "이": lambda f: f, "을": lambda f: f, "으로": lambda f: f not in (0, 8),
        "가": lambda f: not f, "를": lambda f: not f, "로": lambda f: f in (0, 8),
    }  # fmt: skip
    found = re.findall(rf"({nouns})(으로|이|가|을|를|로)(?= )", sentence)
    return all(fits[particle](final(noun[-1])) for noun, particle in found)


def well_formed(language: str, sentence: str) -> bool:
    """What can be seen without a dictionary: nothing left to fill in, and articles and particles that agree."""
    if re.search(r"[{}]|  |^ | $|\s[.,?]", sentence.replace(" ?", "?") if language == "fr" else sentence):
        return False
    if language == "fr":
        return not re.search(r"\b[dD]e le |\b[lL]e [aeéhiou]|\b[lL]'[^aeéhiou]", sentence)
    if language == "es":
        both = all((mark in sentence) == (end in sentence) for mark, end in ("¡!", "¿?"))
        return both and not re.search(r"\b[aA] el |\b[dD]e el |[^ ¿¡]+[¿¡]", sentence)
    if language == "de":
        return not re.search("|".join(WORDS["de"][1].values()), sentence) or bool(GERMAN.search(sentence))
    if language == "en":
        return not re.search(r"\ba [aeiou]|\ban [^aeiou]", sentence)
    return language != "ko" or particles_fit(sentence)


def test_the_check_of_forms_finds_wrong_ones():
    """Or it would have shown nothing."""
    wrong = {
        "en": ("go to {the}", "go to  the disc", "go to the disc ", "is there a orange ring?", "an red disc"),
        "fr": (
            "va vers le anneau rouge",
            "va au-dessus de le carré vert",
            "trouve l'disque bleu",
            "va vers le hexagone",
        ),
        "de": (
            "flieg zum roten Scheibe",
            "such der rote Quadrat",
            "ein roter Dreieck",
            "siehst du ein roter Scheibe",
            "flieg zum rote Ring",
            "lande auf der grauen Lastwagen",
            "finde den schwarzen Boot",
        ),
        "es": ("ve a el disco rojo", "Ve al disco rojo!", "Hay un disco rojo?", "Ve ¡al disco rojo"),
        "ko": (
            "빨간 고리으로 가세요",
            "빨간 원반로 가세요",
            "빨간 고리이 있나요?",
            "빨간 원반를 찾아",
            "검은 트럭로 가세요",
            "검은 배으로 가세요",
            "주황 하트을 찾아",
        ),
    }
    for language, sentences in wrong.items():
        for sentence in sentences:
            assert not well_formed(language, sentence), sentence


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("kind", ["goto", "land"])
def test_instructions_name_their_pad_in_the_right_form(language, kind):
    rng = np.random.default_rng(1)
    for colour, shape in PADS:
        said = {instruction(rng, language, Order(kind, colour, shape)) for _ in range(60)}
        assert len(said) > 5  # several sentences, with and without capital and full stop
        for sentence in said:
            assert about(language, sentence) == (colour, shape) and well_formed(language, sentence), sentence


def test_every_sentence_of_the_tables_is_said():
    """Each of them, told from the others by its beginning and its end around the pad's name."""
    rng = np.random.default_rng(2)
    for language, kinds in task.ORDERS.items():
        for kind, sentences in kinds.items():
            said = {instruction(rng, language, Order(kind, "red", "square")).strip(" .!¡").lower() for _ in range(400)}
            assert len(said) == len(sentences), (language, kind)


def test_instructions_by_hand():
    """One of each language that only comes out right when everything does."""
    rng = np.random.default_rng(3)
    for language, kind, pad, expected in (
        ("en", "land", ("red", "disc"), "Land on the red disc."),
        ("fr", "goto", ("blue", "square"), "Va au-dessus du carré bleu."),
        ("fr", "goto", ("blue", "ring"), "Va au-dessus de l'anneau bleu !"),
        ("de", "goto", ("yellow", "ring"), "Such den gelben Ring."),
        ("de", "land", ("yellow", "disc"), "Setz auf der gelben Scheibe auf."),
        ("es", "land", ("purple", "ring"), "Por favor, aterriza en el anillo morado."),
        ("es", "goto", ("red", "disc"), "¡Ve al disco rojo!"),
        ("de", "land", ("white", "truck"), "Bitte lande auf dem weißen Lastwagen."),
        ("fr", "goto", ("orange", "hexagon"), "Va au-dessus de l'hexagone orange."),
        ("ko", "goto", ("red", "ring"), "빨간 고리를 찾으세요."),
    ):
        assert expected in {instruction(rng, language, Order(kind, *pad)) for _ in range(300)}


def test_hold_names_no_pad():
    rng = np.random.default_rng(4)
    for language in LANGUAGES:
        for _ in range(60):
            sentence = instruction(rng, language, Order("hold"))
            assert sentence and well_formed(language, sentence)
            with pytest.raises(ValueError, match="not enough values"):
                about(language, sentence)


def test_other_business_is_no_order_of_ours():
    """Nothing this pilot knows: neither a sentence of the tables, nor a pad's name, in any of its languages."""
    rng = np.random.default_rng(5)
    orders = {s.lower() for kinds in task.ORDERS.values() for s in kinds["hold"]}
    names = [form for lang in LANGUAGES for pad in PADS for key, form in task.names(lang, *pad).items() if key == "a"]
    names = [name.split(" ", 1)[1] if " " in name and name.split(" ", 1)[0] in ("a", "un") else name for name in names]
    said = {instruction(rng, "en", Order("nothing")) for _ in range(2000)}
    assert set(task.OTHER_BUSINESS) <= said and len(said) > 500
    for sentence in said:
        assert sentence.strip() and sentence.strip(" .!").lower() not in orders, sentence
        assert not any(name in sentence.lower() for name in names), sentence


def test_absent_pads_are_none_that_a_world_has():
    """An unknown colour, an unknown shape, or both: each happens, and never neither."""
    rng = np.random.default_rng(6)
    orders = [absent_order(rng, "land") for _ in range(300)]
    strange = {(order.colour not in COLOURS, order.shape not in SHAPES) for order in orders}
    assert strange == {(True, False), (False, True), (True, True)}
    assert {order.colour for order in orders} == {*COLOURS, *task.ABSENT_COLOURS}
    assert {order.shape for order in orders} == {*SHAPES, *task.ABSENT_SHAPES}
    assert not {*COLOURS} & {*task.ABSENT_COLOURS} and not {*SHAPES} & {*task.ABSENT_SHAPES}
    assert {order.kind for order in orders} == {"land"} and absent_order(rng, "goto").kind == "goto"
    assert all(type(word) is str for order in orders for word in order)  # not numpy's own
    here = [sight(0.1, 0.1, colour=colour, shape=shape) for colour, shape in PADS]
    assert {action(order, here)["action"] for order in orders} == {"search"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_absent_pads_are_named_in_the_right_form(language):
    rng = np.random.default_rng(7)
    for _ in range(600):
        order = absent_order(rng, "goto" if rng.random() < 0.5 else "land")
        sentence = instruction(rng, language, order)
        assert about(language, sentence) == order[1:] and well_formed(language, sentence), sentence


def test_exclamations_are_marked_as_each_language_does():
    rng = np.random.default_rng(16)
    for language in LANGUAGES:
        said = [instruction(rng, language, Order("hold")) for _ in range(300)]
        loud = [sentence for sentence in said if "!" in sentence]
        assert 10 < len(loud) < 60
        before, after = {"es": ("¡", "!"), "fr": ("", " !")}.get(language, ("", "!"))
        for sentence in loud:
            assert sentence.startswith(before) and sentence.endswith(after), sentence
            assert re.sub(r"[\w ,'-]", "", sentence) == before + after.strip(), sentence
        assert language == "es" or not any("¡" in sentence for sentence in said)


def test_what_is_said_follows_from_the_generator():
    def speech(seed: int) -> list:
        rng = np.random.default_rng(seed)
        here = [sight(-0.5, 0), sight(0.6, 0.6, colour="blue")]
        said = [instruction(rng, lang, Order(k, "red", "disc")) for lang in LANGUAGES for k in ("goto", "nothing")]
        return said + [question(rng, lang, kind, here) for lang in LANGUAGES for kind in ("see", "is", "where")]

    assert speech(1) == speech(1) != speech(2)


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
def test_what_is_seen_from_left_to_right(language, none, one, two, three):
    rng = np.random.default_rng(8)
    for sights, expected in (([], none), (TWO[1:], one), (TWO, two), (THREE, three)):
        asked = question(rng, language, "see", sights)
        assert asked.answer == expected and asked.question in task.QUESTIONS[language]["see"]


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
def test_how_many(language, numbers):
    rng = np.random.default_rng(9)
    outside = sight(3, 0, 0.2, "purple", "ring")
    for n in range(4):
        assert question(rng, language, "count", THREE[:n]).answer == numbers[n]
        assert question(rng, language, "count", [outside, *THREE[:n]]).answer == numbers[n]


def test_more_than_three_pads_are_not_counted():
    """There is no word for them; they are listed all the same."""
    rng = np.random.default_rng(17)
    four = [*THREE, sight(0.3, 0, 0.2, "purple", "triangle")]
    for language in LANGUAGES:
        for sights in (four, [*four, sight(-0.3, 0.5, 0.2, "yellow", "disc")]):
            assert question(rng, language, "count", sights) is None
            assert question(rng, language, "see", sights) is not None
    outside = sight(3, 0, 0.2, "yellow", "disc")
    assert question(rng, "en", "count", [*THREE, outside]).answer == "Three."
    listed = "A red disc, a green square, a purple triangle and a blue ring."
    assert question(rng, "en", "see", four).answer == listed


def test_pads_side_by_side_have_no_order():
    """Less than 0.1 apart, left to right; the number of pads stays clear."""
    rng = np.random.default_rng(10)
    for apart, answer in ((0.09, None), (0.11, "A red disc and a blue ring.")):
        sights = [sight(0.2 + apart, 0.5, 0.2, "blue", "ring"), sight(0.2, -0.5)]
        asked = question(rng, "en", "see", sights)
        assert (asked and asked.answer) == answer
        assert (task.listed("en", sorted(sights, key=lambda s: s.right)) or None) == answer
        assert question(rng, "en", "count", sights).answer == "Two."


def test_a_pad_half_in_the_picture_leaves_every_question_open():
    rng = np.random.default_rng(11)
    for language in LANGUAGES:
        for kind in ("see", "is", "count", "where"):
            assert question(rng, language, kind, [sight(0, 0), sight(1.0, 0, 0.2, "blue")]) is None


YES_NO = {"en": ("Yes.", "No."), "fr": ("Oui.", "Non."), "de": ("Ja.", "Nein."), "es": ("Sí.", "No."),
          "ko": ("네.", "아니요.")}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_is_there(language):
    """The pad in the question, read from its words, is there or is not; both often enough to be worth asking."""
    rng = np.random.default_rng(12)
    answers, asked_about = [], set()
    for _ in range(400):
        sights = [s for s in THREE if rng.random() < 0.6] + [sight(2, 2, 0.2, "purple", "triangle")]
        asked = question(rng, language, "is", sights)
        assert well_formed(language, asked.question), asked
        pad = about(language, asked.question)
        there = any((s.pad.colour, s.pad.shape) == pad for s in sights[:-1])  # the last one is outside
        assert asked == (asked.question, YES_NO[language][not there], pad)
        answers.append(there)
        asked_about.add(pad)
    assert 0.25 < np.mean(answers) < 0.75 and len(asked_about) == 20


def test_german_asks_in_the_accusative():
    rng = np.random.default_rng(13)
    asked = {question(rng, "de", "is", [sight(0, 0, 0.2, colour, shape)]).question for colour, shape in PADS * 20}
    assert {"Siehst du einen roten Ring?", "Siehst du eine rote Scheibe?", "Gibt es hier ein rotes Quadrat?"} <= asked
    assert not any(re.search(r"ein \w+er ", sentence) for sentence in asked)


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
    """The answer about one pad. A question left open does not say what it was about: None after many tries."""
    for _ in range(400):
        asked = question(rng, language, "where", sights)
        if asked and about(language, asked.question) == pad:
            assert well_formed(language, asked.question) and asked.about == pad
            return asked.answer
    return None


@pytest.mark.parametrize("language", LANGUAGES)
def test_where(language):
    rng = np.random.default_rng(14)
    words = PLACE_WORDS[language].split("/")
    for line, down in enumerate((-0.4, 0.26, 0.9)):
        for column, right in enumerate((-0.9, -0.26, 0.4)):
            assert asked_where(language, [sight(right, down)], ("red", "disc"), rng) == words[3 * line + column]
    gone = {"en": "Not in view.", "fr": "Pas en vue.", "de": "Nicht im Bild.", "es": "No se ve.", "ko": "안 보여요."}
    assert asked_where(language, [sight(0, 0)], ("red", "ring"), rng) == gone[language]
    assert asked_where(language, [sight(0, 0), sight(3, 0, colour="blue")], ("blue", "disc"), rng) == gone[language]


def test_where_leaves_the_places_between_open():
    rng = np.random.default_rng(15)
    for right, down in ((0.3, 0), (0, -0.28), (-0.38, 0.38), (0.9, 0.3)):
        assert asked_where("en", [sight(right, down)], ("red", "disc"), rng) is None
    # Each of two has its own place.
    assert asked_where("en", TWO, ("blue", "ring"), rng) == "Bottom right."
    assert asked_where("en", TWO, ("red", "disc"), rng) == "Left."


@pytest.mark.parametrize(
    ("along", "across", "place"),
    [
        (0.0, 0.2, "Middle."),  # 0.2 of 0.75 is 0.267
        (0.0, 0.25, None),  # 0.333
        (0.0, 0.3, "Bottom."),  # 0.4: it would be open in a square picture
        (0.0, -0.3, "Top."),
        (0.3, 0.0, None),  # the longer side is as it is in a square one
        (0.4, 0.3, "Bottom right."),
        (-0.26, -0.2, "Middle."),
        (-0.9, 0.68, "Bottom left."),
        (0.0, 0.72, None),  # at its edge it may be outside
    ],
)
def test_where_in_pictures_that_are_not_square(along, across, place):
    """A third is a third of this picture, whatever its sides."""
    rng = np.random.default_rng(18)
    assert asked_where("en", [sight(along, across, edge=WIDE)], ("red", "disc"), rng) == place
    turned = {"Bottom.": "Right.", "Top.": "Left.", "Bottom left.": "Top right."}.get(place, place)
    assert asked_where("en", [sight(across, along, edge=TALL)], ("red", "disc"), rng) == turned


def test_a_pad_below_a_wide_picture_is_not_in_view():
    rng = np.random.default_rng(19)
    below = sight(0, 0.9, 0.1, edge=WIDE)
    assert [question(rng, "en", kind, [below]).answer for kind in ("count", "see")] == ["None.", "No pads."]
    assert asked_where("en", [below], ("red", "disc"), rng) == "Not in view."


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_question_says_which_pad_it_is_about(language):
    """The one that its words name, in the picture, outside, or nowhere; what is seen, and how many, is about none."""
    rng = np.random.default_rng(20)
    sights = [*TWO, sight(3, 0, 0.2, "green", "square")]
    for kind in ("is", "where"):
        asked = [question(rng, language, kind, sights) for _ in range(300)]
        assert all(one.about == about(language, one.question) for one in asked)
        pads = {one.about for one in asked}
        assert {("blue", "ring"), ("red", "disc"), ("red", "ring"), ("blue", "disc"), ("green", "square")} <= pads
        assert all(type(word) is str for pad in pads for word in pad)  # not numpy's own
    for kind in ("see", "count"):
        for here in ([], sights[2:], TWO[:1], TWO):
            assert question(rng, language, kind, here).about is None
