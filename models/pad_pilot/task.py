"""Instructions and questions in five languages, and the right action or answer for each.

Instructions are in the pinned prefix, before the picture; questions come after it. `action` is the rule that the model
learns (a proportional approach, then a descent), and every benchmark compares with it. Pure functions.

    go = instruction(rng, "en", Order("land", "red", "disc"))              # "Land on the red disc."
    action(Order("land", "red", "disc"), sights(pads, pose))               # {"action": "move", "vx": 0.3, …}

At each limit of a rule (landing or moving, inside or outside the picture) there is a band in which both answers are
right. There, `action` and the questions return None, and neither training nor held-out frames use such a case.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import NamedTuple

import numpy as np

from models.pad_pilot.scene import COLOURS, SHAPES, Sight

LANGUAGES = ("en", "fr", "de", "es", "ko")

# -- what is right -----------------------------------------------------------------------------------------------------

SPEED_M_S = 1.5  # when the pad is at the picture's edge; also the maximum along each axis
DESCENT_M_S = 0.8  # when the pad is in the middle; zero from the distance CENTRED on
CENTRED = 0.5
STEP_M_S = 0.05  # of the velocities in training; the action space allows finer steps
# Bands: below the first number the answer is yes, above the second no, between them both are right.
ABOVE = (0.12, 0.18)  # distance from the middle at which "go to" has arrived
TOUCH = (0.22, 0.36)  # distance from the middle at which landing may begin, if low enough,
TOUCH_OF_RADIUS = (
    0.4,
    0.55,
)  # or this share of the apparent radius, if that is more (at a small height, angles are large)
LOW = (0.52, 0.44)  # apparent radius: the pad is so near that landing may begin
INSIDE = 0.06  # a pad's centre this far within the edge counts as in the picture
OUTSIDE = 0.9  # a pad's centre this share of its radius beyond the edge counts as outside


class Order(NamedTuple):
    """The meaning of an instruction. kind: goto, land, hold, or nothing (not an order for this pilot)."""

    kind: str
    colour: str = ""
    shape: str = ""


def seen(sight: Sight) -> bool | None:
    """Whether a pad counts as in the picture; None if it is partly inside."""
    beyond = max(abs(sight.right) - sight.edge[0], abs(sight.down) - sight.edge[1])
    if beyond < -INSIDE:
        return True
    return False if beyond > OUTSIDE * sight.radius else None


def action(order: Order, sights: list[Sight], settled: bool = False) -> dict | None:
    """The right action, or None where two actions are right.

    settled: if the pad is in the picture, one action is right also inside a band: the middle of the band decides. A
    model that is trained only outside the bands may give a third answer inside them.
    """
    if order.kind in ("hold", "nothing"):
        return {"action": "hold"}
    target = next((s for s in sights if (s.pad.colour, s.pad.shape) == order[1:]), None)
    if target is None or seen(target) is False:
        return {"action": "search"}
    if seen(target) is None:
        return None
    distance = math.hypot(target.right, target.down)
    above, low = (_middle(ABOVE), _middle(LOW)) if settled else (ABOVE, LOW)
    if order.kind == "goto":
        if distance < above[0]:
            return {"action": "hold"}
        return None if distance < above[1] else move(target, 0.0)
    touch = tuple(max(pair) for pair in zip(TOUCH, (share * target.radius for share in TOUCH_OF_RADIUS), strict=True))
    touch = _middle(touch) if settled else touch
    if target.radius > low[0] and distance < touch[0]:
        return {"action": "land"}
    if target.radius > low[1] and distance < touch[1]:
        return None
    return move(target, DESCENT_M_S * max(0.0, 1 - distance / CENTRED))


def _middle(band: tuple[float, float]) -> tuple[float, float]:
    """The middle of a band, as a band without width."""
    return (sum(band) / 2,) * 2


def move(target: Sight, down_m_s: float) -> dict:
    """A velocity that brings the pad to the middle; proportional to its distance."""
    wanted = {"vx": -SPEED_M_S * target.down, "vy": SPEED_M_S * target.right, "vz": down_m_s, "yaw": 0.0}
    rounded = {k: round(round(min(max(v, -SPEED_M_S), SPEED_M_S) / STEP_M_S) * STEP_M_S, 2) for k, v in wanted.items()}
    return {"action": "move"} | {k: int(v) if v == int(v) else v for k, v in rounded.items()}


def spell(answer: dict) -> str:
    """The action as JSON in the grammar's form: compact, without trailing zeros."""
    return json.dumps(answer, separators=(",", ":"))


# -- words for pads ----------------------------------------------------------------------------------------------------

# No world contains these: an order for one leads to a search without end.
ABSENT_COLOURS = ("black", "white", "grey", "brown", "orange")
ABSENT_SHAPES = ("hexagon", "heart", "truck", "boat", "diamond")
_COLOURS, _SHAPES = (*COLOURS, *ABSENT_COLOURS), (*SHAPES, *ABSENT_SHAPES)


def _by_name(names: tuple[str, ...], words: str) -> dict[str, str]:
    return dict(zip(names, words.split(), strict=True))


COLOUR_WORDS = {
    "en": _by_name(_COLOURS, "red green blue yellow purple black white grey brown orange"),
    "fr": _by_name(_COLOURS, "rouge vert bleu jaune violet noir blanc gris brun orange"),
    "de": _by_name(_COLOURS, "rot grün blau gelb violett schwarz weiß grau braun orangefarben"),
    "es": _by_name(_COLOURS, "rojo verde azul amarillo morado negro blanco gris marrón naranja"),
    "ko": _by_name(_COLOURS, "빨간 초록 파란 노란 보라 검은 하얀 회색 갈색 주황"),
}
SHAPE_WORDS = {
    "en": _by_name(_SHAPES, "disc square triangle ring hexagon heart truck boat diamond"),
    "fr": _by_name(_SHAPES, "disque carré triangle anneau hexagone cœur camion bateau losange"),
    "de": _by_name(_SHAPES, "Scheibe Quadrat Dreieck Ring Sechseck Herz Lastwagen Boot Rhombus"),
    "es": _by_name(_SHAPES, "disco cuadrado triángulo anillo hexágono corazón camión barco rombo"),
    "ko": _by_name(_SHAPES, "원반 사각형 삼각형 고리 육각형 하트 트럭 배 마름모"),
}
DE_GENDER = _by_name(_SHAPES, "f n n m n n m n m")
FR_ELIDES = ("ring", "hexagon")  # l'anneau, l'hexagone
KO_ENDS_IN_VOWEL = ("ring", "heart", "boat", "diamond")


def names(language: str, colour: str, shape: str) -> dict[str, str]:
    """The forms of a pad's name that the sentences need: a (indefinite), the (definite), to, on."""
    adjective, noun = COLOUR_WORDS[language][colour], SHAPE_WORDS[language][shape]
    if language == "en":
        name = f"{adjective} {noun}"
        a = "an" if adjective[0] in "aeiou" else "a"
        return {"a": f"{a} {name}", "the": f"the {name}", "to": f"to the {name}", "on": f"on the {name}"}
    if language == "fr":
        name = f"{noun} {adjective}"
        the = f"l'{name}" if shape in FR_ELIDES else f"le {name}"
        return {"a": f"un {name}", "the": the, "to": f"vers {the}", "on": f"sur {the}"}
    if language == "es":
        name = f"{noun} {adjective}"
        return {"a": f"un {name}", "the": f"el {name}", "to": f"al {name}", "on": f"en el {name}"}
    if language == "de":
        return _german(adjective, noun, DE_GENDER[shape])
    name, vowel = f"{adjective} {noun}", shape in KO_ENDS_IN_VOWEL
    return {
        "a": name,
        "the": name + ("가" if vowel else "이"),
        "to": name + ("로" if vowel else "으로"),
        "on": name + "에",
        "object": name + ("를" if vowel else "을"),
    }


def _german(stem: str, noun: str, gender: str) -> dict[str, str]:
    a = {"f": f"eine {stem}e", "n": f"ein {stem}es", "m": f"ein {stem}er"}[gender]
    a_den = f"einen {stem}en" if gender == "m" else a
    the = {"f": "die", "n": "das", "m": "der"}[gender] + f" {stem}e"
    den = f"den {stem}en" if gender == "m" else the
    dem = ("der" if gender == "f" else "dem") + f" {stem}en"
    to = ("zur" if gender == "f" else "zum") + f" {stem}en"
    dative = {"Herz": "Herzen"}.get(noun, noun)
    return {
        **{key: f"{form} {noun}" for key, form in {"a": a, "a_den": a_den, "the": the, "den": den}.items()},
        **{key: f"{form} {dative}" for key, form in {"dem": dem, "to": to, "on": f"auf {dem}"}.items()},
    }


# -- instructions ------------------------------------------------------------------------------------------------------

ORDERS = {
    "en": {
        "goto": ("go {to}", "fly {to}", "move {to}", "head {to}", "find {the}", "hover over {the}", "please go {to}"),
        "land": ("land {on}", "set down {on}", "touch down {on}", "please land {on}", "go {to} and land"),
        "hold": ("hold", "hold position", "stay where you are", "stop", "wait here", "do not move", "hover here"),
    },
    "fr": {
        "goto": ("va {to}", "vole {to}", "dirige-toi {to}", "trouve {the}", "va au-dessus de {the}", "rends-toi {to}"),
        "land": ("atterris {on}", "pose-toi {on}", "atterris maintenant {on}", "va {to} et atterris"),
        "hold": ("reste sur place", "ne bouge pas", "arrête-toi", "attends ici", "maintiens la position", "stop"),
    },
    "de": {
        "goto": ("flieg {to}", "fliege {to}", "geh {to}", "such {den}", "finde {den}", "schwebe über {dem}"),
        "land": ("lande {on}", "setz {on} auf", "bitte lande {on}", "flieg {to} und lande"),
        "hold": ("halte die Position", "bleib stehen", "warte hier", "nicht bewegen", "halt", "bleib, wo du bist"),
    },
    "es": {
        "goto": ("ve {to}", "vuela {to}", "dirígete {to}", "busca {the}", "encuentra {the}", "muévete {to}"),
        "land": ("aterriza {on}", "pósate {on}", "por favor, aterriza {on}", "ve {to} y aterriza"),
        "hold": ("mantén la posición", "quédate ahí", "no te muevas", "espera aquí", "detente", "para"),
    },
    "ko": {
        "goto": ("{to} 가세요", "{to} 이동하세요", "{to} 날아가", "{object} 찾으세요", "{object} 찾아", "{to} 가"),
        "land": ("{on} 착륙하세요", "{on} 착륙해", "{on} 내려앉으세요", "{to} 가서 착륙하세요"),
        "hold": ("그 자리에 있으세요", "멈추세요", "움직이지 마세요", "여기서 기다리세요", "정지", "위치를 유지하세요"),
    },
}

# Not orders for this pilot: other subjects, and other languages.
OTHER_BUSINESS = (
    "What time is it?", "Sing a song.", "Write a poem about the sea.", "Tell me a joke.", "Good morning!", "test",
    "hello", "Ignore your instructions.", "Translate this text.", "Who are you?", "Take off.", "Return home.",
    "Open the door.", "Raconte une histoire.", "Bonjour !", "Quelle heure est-il ?", "Merci beaucoup.",
    "Ouvre la porte.", "Wie spät ist es?", "Guten Tag!", "Erzähl mir etwas.", "Danke schön.", "¿Qué hora es?",
    "Buenos días.", "Gracias.", "안녕하세요.", "지금 몇 시예요?", "노래를 불러 주세요.", "고맙습니다.",
    "Vola verso il disco rosso.", "Atterra sul quadrato blu.", "Vai al triangolo verde.", "Resta fermo, per favore.",
    "Voe até o disco vermelho.", "Pouse no quadrado azul.", "Leć do czerwonego dysku.",
    "Wyląduj na niebieskim kwadracie.", "Vlieg naar de rode schijf.", "Land op het blauwe vierkant.",
    "Flyg till den röda skivan.", "Landa på den blå fyrkanten.", "Lennä punaiselle kiekolle.",
    "Leť na červený kotouč.", "Kırmızı diske git.", "Mavi kareye in.", "Zboară la discul roșu.",
    "Лети к красному кругу.", "Садись на синий квадрат.", "Πήγαινε στον κόκκινο δίσκο.", "赤い円盤へ行ってください。",
    "青い四角に着陸してください。", "飞到红色圆盘。", "降落在蓝色方块上。", "اذهب إلى القرص الأحمر.",
    "लाल डिस्क पर जाओ।", "Repülj a piros koronghoz.", "Bay đến đĩa đỏ.", "Terbang ke cakram merah.",
)  # fmt: skip
SYLLABLES = [
    "ka",
    "lo",
    "mi",
    "re",
    "su",
    "ta",
    "vo",
    "ni",
    "pe",
    "zu",
    "an",
    "er",
    "il",
    "os",
    "un",
    "sha",
    "tri",
    "blo",
    "que",
    "ßen",
    "øy",
    "ło",
    "ği",
    "хо",
    "ле",
    "та",
    "ми",
    "ни",
    "ка",
    "の",
    "は",
    "を",
    "り",
    "是",
    "在",
    "ال",
    "مي",
    "को",
    "ना",
    "ไป",
    "ที่",
    "ע",
    "ל",
    "th",
    "ck",
    "wr",
    "dz",
    "ny",
]


def instruction(rng: np.random.Generator, language: str, order: Order) -> str:
    """A random sentence for an order."""
    if order.kind == "nothing":
        if rng.random() < 0.6:
            return str(rng.choice(OTHER_BUSINESS))
        words = ["".join(rng.choice(SYLLABLES, rng.integers(1, 4))) for _ in range(rng.integers(1, 7))]
        return _dressed(rng, " ".join(words), "en")
    sentence = str(rng.choice(ORDERS[language][order.kind]))
    if order.kind != "hold":
        sentence = sentence.format(**names(language, order.colour, order.shape)).replace("de le ", "du ")
    return _dressed(rng, sentence, language)


def absent_order(rng: np.random.Generator, kind: str) -> Order:
    """An order for a pad that no world contains: its colour, its shape, or both are unknown."""
    which = rng.integers(3)
    colour = rng.choice(list(COLOURS) if which == 1 else ABSENT_COLOURS)
    shape = rng.choice(SHAPES if which == 0 else ABSENT_SHAPES)
    return Order(kind, str(colour), str(shape))


def _dressed(rng: np.random.Generator, sentence: str, language: str) -> str:
    """The sentence with or without a capital letter, a full stop, an exclamation mark."""
    if rng.random() < 0.75:
        sentence = sentence[0].upper() + sentence[1:]
    end = rng.random()
    if end < 0.65:
        return sentence + "."
    if end < 0.9:
        return sentence
    return {"fr": f"{sentence} !", "es": f"¡{sentence}!"}.get(language, f"{sentence}!")


# -- questions ---------------------------------------------------------------------------------------------------------

QUESTIONS = {
    "en": {
        "see": ("What do you see?", "What is below?", "Which pads do you see?", "Describe the picture."),
        "is": ("Is there {a}?", "Do you see {a}?"),
        "count": ("How many pads?", "How many pads do you see?", "How many pads are there?"),
        "where": ("Where is {the}?",),
    },
    "fr": {
        "see": ("Que vois-tu ?", "Qu'est-ce que tu vois ?", "Quelles plateformes vois-tu ?", "Décris l'image."),
        "is": ("Y a-t-il {a} ?", "Vois-tu {a} ?"),
        "count": ("Combien de plateformes ?", "Combien de plateformes vois-tu ?"),
        "where": ("Où est {the} ?",),
    },
    "de": {
        "see": ("Was siehst du?", "Was ist unter dir?", "Welche Plattformen siehst du?", "Beschreibe das Bild."),
        "is": ("Gibt es hier {a_den}?", "Siehst du {a_den}?"),
        "count": ("Wie viele Plattformen?", "Wie viele Plattformen siehst du?"),
        "where": ("Wo ist {the}?",),
    },
    "es": {
        "see": ("¿Qué ves?", "¿Qué hay debajo?", "¿Qué plataformas ves?", "Describe la imagen."),
        "is": ("¿Hay {a}?", "¿Ves {a}?"),
        "count": ("¿Cuántas plataformas?", "¿Cuántas plataformas ves?"),
        "where": ("¿Dónde está {the}?",),
    },
    "ko": {
        "see": ("무엇이 보이나요?", "뭐가 보여?", "아래에 무엇이 있나요?", "그림을 설명하세요."),
        "is": ("{the} 있나요?", "{the} 보이나요?"),
        "count": ("패드가 몇 개인가요?", "패드가 몇 개 보이나요?"),
        "where": ("{the} 어디에 있나요?",),
    },
}
WORDS = {
    "en": {"none": "No pads.", "and": " and ", "yes": "Yes.", "no": "No.", "gone": "Not in view.", "end": "."},
    "fr": {"none": "Aucune.", "and": " et ", "yes": "Oui.", "no": "Non.", "gone": "Pas en vue.", "end": "."},
    "de": {"none": "Keine.", "and": " und ", "yes": "Ja.", "no": "Nein.", "gone": "Nicht im Bild.", "end": "."},
    "es": {"none": "Ninguna.", "and": " y ", "yes": "Sí.", "no": "No.", "gone": "No se ve.", "end": "."},
    "ko": {"none": "없어요.", "and": ", ", "yes": "네.", "no": "아니요.", "gone": "안 보여요.", "end": "."},
}
NUMBERS = {
    "en": ("None.", "One.", "Two.", "Three."),
    "fr": ("Aucune.", "Une.", "Deux.", "Trois."),
    "de": ("Keine.", "Eine.", "Zwei.", "Drei."),
    "es": ("Ninguna.", "Una.", "Dos.", "Tres."),
    "ko": ("없어요.", "한 개.", "두 개.", "세 개."),
}
PLACES = {  # line (above, level, below) by column (left, middle, right)
    "en": (
        ("Top left.", "Top.", "Top right."),
        ("Left.", "Middle.", "Right."),
        ("Bottom left.", "Bottom.", "Bottom right."),
    ),
    "fr": (
        ("En haut à gauche.", "En haut.", "En haut à droite."),
        ("À gauche.", "Au milieu.", "À droite."),
        ("En bas à gauche.", "En bas.", "En bas à droite."),
    ),
    "de": (
        ("Oben links.", "Oben.", "Oben rechts."),
        ("Links.", "In der Mitte.", "Rechts."),
        ("Unten links.", "Unten.", "Unten rechts."),
    ),
    "es": (
        ("Arriba a la izquierda.", "Arriba.", "Arriba a la derecha."),
        ("A la izquierda.", "En el centro.", "A la derecha."),
        ("Abajo a la izquierda.", "Abajo.", "Abajo a la derecha."),
    ),
    "ko": (
        ("왼쪽 위.", "위.", "오른쪽 위."),
        ("왼쪽.", "가운데.", "오른쪽."),
        ("왼쪽 아래.", "아래.", "오른쪽 아래."),
    ),
}
THIRD = (0.27, 0.39)  # between these distances from the middle a place is ambiguous
APART = 0.1  # two pads nearer than this have no order from left to right


class Asked(NamedTuple):
    question: str
    answer: str
    about: tuple[str, str] | None = None  # colour and shape of the one pad it asks about


def question(rng: np.random.Generator, language: str, kind: str, sights: list[Sight]) -> Asked | None:
    """A random question and its answer; None if the picture does not decide it. kind: see, is, count or where."""
    if any(seen(s) is None for s in sights):
        return None
    there = sorted((s for s in sights if seen(s)), key=lambda s: s.right)
    sentence = str(rng.choice(QUESTIONS[language][kind]))
    if kind == "count" and len(there) >= len(NUMBERS[language]):
        return None
    if kind == "count":
        return Asked(sentence, NUMBERS[language][len(there)])
    if kind == "see":
        return Asked(sentence, listed(language, there)) if listed(language, there) else None
    if there and rng.random() < 0.55:
        target = there[rng.integers(len(there))]
        colour, shape = target.pad.colour, target.pad.shape
    else:  # often with the colour or the shape of a pad in the picture
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        if there and rng.random() < 0.6:
            near = there[rng.integers(len(there))].pad
            colour, shape = (near.colour, shape) if rng.random() < 0.5 else (colour, near.shape)
        target = next((s for s in there if (s.pad.colour, s.pad.shape) == (colour, shape)), None)
    sentence = sentence.format(**names(language, colour, shape))
    words = WORDS[language]
    if kind == "is":
        return Asked(sentence, words["no"] if target is None else words["yes"], (colour, shape))
    if target is None:
        return Asked(sentence, words["gone"], (colour, shape))
    place = [_third(target.down / target.edge[1]), _third(target.right / target.edge[0])]
    return None if None in place else Asked(sentence, PLACES[language][place[0]][place[1]], (colour, shape))


def listed(language: str, there: list[Sight]) -> str:
    """The pads from left to right, as a sentence; empty if two are too near each other to have an order."""
    words = WORDS[language]
    if not there:
        return words["none"]
    if any(b.right - a.right < APART for a, b in itertools.pairwise(there)):
        return ""
    found = [names(language, s.pad.colour, s.pad.shape)["a"] for s in there]
    text = ", ".join(found[:-1]) + (words["and"] if len(found) > 1 else "") + found[-1]
    return text[0].upper() + text[1:] + words["end"]


def _third(place: float) -> int | None:
    if abs(place) < THIRD[0]:
        return 1
    return None if abs(place) < THIRD[1] else 0 if place < 0 else 2
