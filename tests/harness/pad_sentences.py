"""The words of the five languages of the demo model, form by form, and a check of sentences made of them."""

from __future__ import annotations

import re

from models.pad_pilot.scene import COLOURS, SHAPES, Pad, Sight

PADS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


def sight(
    right: float,
    down: float,
    radius: float = 0.2,
    colour: str = "red",
    shape: str = "disc",
    edge: tuple[float, float] = (1.0, 1.0),
) -> Sight:
    return Sight(Pad(colour, shape, 0.0, 0.0, 0.5, 0.0), right, down, radius, edge)


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


# The word or stem of each colour and shape in each language, to find the pad that a sentence names.
# No world contains the colours from black on and the shapes from hexagon on.
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


GERMAN = re.compile(  # the valid combinations of article, ending of the colour, and noun
    r"(eine \w+e|die \w+e|(der|zur) \w+en) Scheibe"
    r"|(ein \w+es|das \w+e|(dem|zum) \w+en) (Quadrat|Dreieck|Sechseck|Herz|Boot)"
    r"|(ein \w+er|einen \w+en|der \w+e|den \w+en|(dem|zum) \w+en) (Ring|Lastwagen|Rhombus)"
)


def final(syllable: str) -> int:
    """The number of the final consonant of a Hangul syllable; 0: no final consonant, 8: ㄹ."""
    return (ord(syllable) - 0xAC00) % 28


def particles_fit(sentence: str) -> bool:
    """이, 을 and 으로 follow a final consonant. 가, 를 and 로 follow a vowel. 로 also follows ㄹ."""
    nouns = "|".join(WORDS["ko"][1].values())
    fits = {
        "이": lambda f: f, "을": lambda f: f, "으로": lambda f: f not in (0, 8),
        "가": lambda f: not f, "를": lambda f: not f, "로": lambda f: f in (0, 8),
    }  # fmt: skip
    found = re.findall(rf"({nouns})(으로|이|가|을|를|로)(?= )", sentence)
    return all(fits[particle](final(noun[-1])) for noun, particle in found)


def well_formed(language: str, sentence: str) -> bool:
    """A check without a dictionary: no placeholder is left, and articles and particles agree with their nouns."""
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


TWO = [sight(0.6, 0.6, 0.2, "blue", "ring"), sight(-0.6, 0, 0.2, "red", "disc")]  # not in the order of the picture
