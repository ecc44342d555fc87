"""The demo model's sentences: every instruction names its pad in the right form, in five languages."""

from __future__ import annotations

import re

import numpy as np
import pytest

from models.pad_pilot import task
from models.pad_pilot.scene import COLOURS, SHAPES
from models.pad_pilot.task import LANGUAGES, Order, action, random_absent_order, random_exchange, random_instruction
from tests.harness.pad_sentences import FORMS, PADS, about, sight, well_formed

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize(("language", "colour", "shape"), FORMS)
def test_forms_of_a_name(language, colour, shape):
    forms = task.name_forms(language, colour, shape)
    assert {key: forms[key] for key in FORMS[language, colour, shape]} == FORMS[language, colour, shape]


def test_every_pad_has_its_own_name():
    for language in LANGUAGES:
        assert len({task.name_forms(language, *pad)["a"] for pad in PADS}) == len(PADS) == 20
        strange = [(c, s) for c in (*COLOURS, *task.ABSENT_COLOURS) for s in (*SHAPES, *task.ABSENT_SHAPES)]
        assert len({task.name_forms(language, *pad)["a"] for pad in strange}) == len(strange) == 90


def test_the_check_of_forms_finds_wrong_forms():
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
        sentences = {random_instruction(rng, language, Order(kind, colour, shape)) for _ in range(60)}
        assert len(sentences) > 5  # several sentences, with and without capital and full stop
        for sentence in sentences:
            assert about(language, sentence) == (colour, shape) and well_formed(language, sentence), sentence


def test_every_sentence_of_the_tables_is_used():
    """Two sentences differ in the text before or after the name of the pad, so the set counts each of them."""
    rng = np.random.default_rng(2)
    for language, kinds in task.ORDERS.items():
        for kind, sentences in kinds.items():
            order = Order(kind, "red", "square")
            found = {random_instruction(rng, language, order).strip(" .!¡").lower() for _ in range(400)}
            assert len(found) == len(sentences), (language, kind)


def test_instructions_by_hand():
    """Sentences in which articles, endings, contractions and punctuation must all be right."""
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
        assert expected in {random_instruction(rng, language, Order(kind, *pad)) for _ in range(300)}


def test_hold_names_no_pad():
    rng = np.random.default_rng(4)
    for language in LANGUAGES:
        for _ in range(60):
            sentence = random_instruction(rng, language, Order("hold"))
            assert sentence and well_formed(language, sentence)
            with pytest.raises(ValueError, match="not enough values"):
                about(language, sentence)


def test_a_sentence_that_is_not_an_order_contains_no_order_and_no_pad():
    """It is not a sentence of the tables, and it does not contain the name of a pad, in any language of the pilot."""
    rng = np.random.default_rng(5)
    orders = {s.lower() for kinds in task.ORDERS.values() for s in kinds["hold"]}
    pad_names = [
        form for lang in LANGUAGES for pad in PADS for key, form in task.name_forms(lang, *pad).items() if key == "a"
    ]
    pad_names = [
        name.split(" ", 1)[1] if " " in name and name.split(" ", 1)[0] in ("a", "un") else name for name in pad_names
    ]
    sentences = {random_instruction(rng, "en", Order("nothing")) for _ in range(2000)}
    assert set(task.OTHER_TOPICS) <= sentences and len(sentences) > 500
    for sentence in sentences:
        assert sentence.strip() and sentence.strip(" .!").lower() not in orders, sentence
        assert not any(name in sentence.lower() for name in pad_names), sentence


def test_an_absent_pad_has_an_unknown_colour_or_an_unknown_shape():
    """An unknown colour, an unknown shape, or both: each case happens."""
    rng = np.random.default_rng(6)
    orders = [random_absent_order(rng, "land") for _ in range(300)]
    strange = {(order.colour not in COLOURS, order.shape not in SHAPES) for order in orders}
    assert strange == {(True, False), (False, True), (True, True)}
    assert {order.colour for order in orders} == {*COLOURS, *task.ABSENT_COLOURS}
    assert {order.shape for order in orders} == {*SHAPES, *task.ABSENT_SHAPES}
    assert not {*COLOURS} & {*task.ABSENT_COLOURS} and not {*SHAPES} & {*task.ABSENT_SHAPES}
    assert {order.kind for order in orders} == {"land"} and random_absent_order(rng, "goto").kind == "goto"
    assert all(type(word) is str for order in orders for word in order)  # not numpy's own
    here = [sight(0.1, 0.1, colour=colour, shape=shape) for colour, shape in PADS]
    assert {action(order, here)["action"] for order in orders} == {"search"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_absent_pads_are_named_in_the_right_form(language):
    rng = np.random.default_rng(7)
    for _ in range(600):
        order = random_absent_order(rng, "goto" if rng.random() < 0.5 else "land")
        sentence = random_instruction(rng, language, order)
        assert about(language, sentence) == order[1:] and well_formed(language, sentence), sentence


def test_exclamations_have_the_marks_of_their_language():
    rng = np.random.default_rng(16)
    for language in LANGUAGES:
        sentences = [random_instruction(rng, language, Order("hold")) for _ in range(300)]
        exclamations = [sentence for sentence in sentences if "!" in sentence]
        assert 10 < len(exclamations) < 60
        before, after = {"es": ("¡", "!"), "fr": ("", " !")}.get(language, ("", "!"))
        for sentence in exclamations:
            assert sentence.startswith(before) and sentence.endswith(after), sentence
            assert re.sub(r"[\w ,'-]", "", sentence) == before + after.strip(), sentence
        assert language == "es" or not any("¡" in sentence for sentence in sentences)


def test_the_same_seed_gives_the_same_sentences():
    def random_texts(seed: int) -> list:
        rng = np.random.default_rng(seed)
        here = [sight(-0.5, 0), sight(0.6, 0.6, colour="blue")]
        sentences = [
            random_instruction(rng, lang, Order(k, "red", "disc")) for lang in LANGUAGES for k in ("goto", "nothing")
        ]
        return sentences + [
            random_exchange(rng, lang, kind, here) for lang in LANGUAGES for kind in ("see", "is", "where")
        ]

    assert random_texts(1) == random_texts(1) != random_texts(2)
