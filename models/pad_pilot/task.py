"""Instructions and questions in five languages, and the right action or answer for each.

Instructions are in the pinned prefix, before the picture. Questions come after the picture. `action` is the rule that
the model learns: a proportional approach, then a descent. Every benchmark compares the model with this rule. The
functions are pure.

    random_instruction(rng, "en", Order("land", "red", "disc"))            # "Land on the red disc."
    action(Order("land", "red", "disc"), sights(pads, pose))               # {"action": "move", "vx": 0.3, …}

At each limit of the rule (landing or moving, inside or outside the picture) there is a band in which both answers are
right. In a band, `action` and `random_exchange` return None. Training and held-out frames do not use such cases.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import NamedTuple

import numpy as np

from models.pad_pilot.scene import COLOURS, SHAPES, Sight

LANGUAGES = ("en", "fr", "de", "es", "ko")

# -- the rule ----------------------------------------------------------------------------------------------------------

# Distances and radii in a picture are in units of half its longest side, as in scene.py.

MAX_SPEED_M_S = 1.5  # when the pad is at the picture's edge; also the maximum along each axis
DESCENT_M_S = 0.8  # when the pad is in the middle; it falls linearly to zero at DESCENT_DISTANCE from the middle
DESCENT_DISTANCE = 0.5
STEP_M_S = 0.05  # step of the velocities in training; the action space allows finer steps
# Bands: before the first number the answer is yes, beyond the second number it is no. Between them both are right.
ARRIVED_DISTANCE = (0.12, 0.18)  # distance from the middle at which "go to" has arrived
LANDING_DISTANCE = (0.22, 0.36)  # distance from the middle at which landing may begin, if the height is small enough
# The landing distance is at least this share of the apparent radius: at a small height, angles are large.
LANDING_DISTANCE_OF_RADIUS = (0.4, 0.55)
LANDING_RADIUS = (0.52, 0.44)  # apparent radius from which the height is small enough for landing
INSIDE_MARGIN = 0.06  # a pad whose centre is this far inside the edge counts as in the picture
OUTSIDE_OF_RADIUS = 0.9  # a pad whose centre is this share of its radius beyond the edge counts as outside


class Order(NamedTuple):
    """The meaning of an instruction. kind: goto, land, hold, or nothing (the text is not an order for this pilot)."""

    kind: str
    colour: str = ""
    shape: str = ""


def is_in_picture(sight: Sight) -> bool | None:
    """Whether a pad counts as in the picture; None: it is partly in the picture."""
    beyond_edge = max(abs(sight.right) - sight.edge[0], abs(sight.down) - sight.edge[1])
    if beyond_edge < -INSIDE_MARGIN:
        return True
    return False if beyond_edge > OUTSIDE_OF_RADIUS * sight.radius else None


def action(order: Order, sights: list[Sight], decide_in_bands: bool = False) -> dict | None:
    """The right action; None: two actions are right.

    decide_in_bands: for a pad in the picture, one action is right also inside a band: the middle of the band decides.
    A model that is trained only outside the bands may give a third answer inside them.
    """
    if order.kind in ("hold", "nothing"):
        return {"action": "hold"}
    target = next((s for s in sights if (s.pad.colour, s.pad.shape) == order[1:]), None)
    if target is None or is_in_picture(target) is False:
        return {"action": "search"}
    if is_in_picture(target) is None:
        return None
    distance = math.hypot(target.right, target.down)
    arrived, min_radius = ARRIVED_DISTANCE, LANDING_RADIUS
    of_radius = [share * target.radius for share in LANDING_DISTANCE_OF_RADIUS]
    landing = (max(LANDING_DISTANCE[0], of_radius[0]), max(LANDING_DISTANCE[1], of_radius[1]))
    if decide_in_bands:
        arrived, min_radius, landing = _middle(arrived), _middle(min_radius), _middle(landing)
    if order.kind == "goto":
        if distance < arrived[0]:
            return {"action": "hold"}
        return None if distance < arrived[1] else move(target, 0.0)
    if target.radius > min_radius[0] and distance < landing[0]:
        return {"action": "land"}
    if target.radius > min_radius[1] and distance < landing[1]:
        return None
    return move(target, DESCENT_M_S * max(0.0, 1 - distance / DESCENT_DISTANCE))


def _middle(band: tuple[float, float]) -> tuple[float, float]:
    """The middle of a band, as a band without width."""
    return (sum(band) / 2,) * 2


def move(target: Sight, down_m_s: float) -> dict:
    """A velocity that brings the pad to the middle of the picture. It is proportional to the distance."""
    velocity = {"vx": -MAX_SPEED_M_S * target.down, "vy": MAX_SPEED_M_S * target.right, "vz": down_m_s, "yaw": 0.0}
    limited = {k: min(max(v, -MAX_SPEED_M_S), MAX_SPEED_M_S) for k, v in velocity.items()}
    rounded = {k: round(round(v / STEP_M_S) * STEP_M_S, 2) for k, v in limited.items()}
    return {"action": "move"} | {k: int(v) if v == int(v) else v for k, v in rounded.items()}


def to_json(action: dict) -> str:
    """The action as JSON in the form that the runtime's grammar allows: compact, without trailing zeros."""
    return json.dumps(action, separators=(",", ":"))


# -- words for pads ----------------------------------------------------------------------------------------------------

# No world contains a pad with one of these colours or shapes: an order for such a pad leads to a search without end.
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


def name_forms(language: str, colour: str, shape: str) -> dict[str, str]:
    """The forms of a pad's name that the sentences need: a (indefinite), the (definite), to, on, and others."""
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

# Sentences that are not orders for this pilot: other topics, and other languages.
OTHER_TOPICS = (
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


def random_instruction(rng: np.random.Generator, language: str, order: Order) -> str:
    """A random sentence for an order."""
    if order.kind == "nothing":
        if rng.random() < 0.6:
            return str(rng.choice(OTHER_TOPICS))
        words = ["".join(rng.choice(SYLLABLES, rng.integers(1, 4))) for _ in range(rng.integers(1, 7))]
        return _punctuated(rng, " ".join(words), "en")
    sentence = str(rng.choice(ORDERS[language][order.kind]))
    if order.kind != "hold":
        sentence = sentence.format(**name_forms(language, order.colour, order.shape)).replace("de le ", "du ")
    return _punctuated(rng, sentence, language)


def random_absent_order(rng: np.random.Generator, kind: str) -> Order:
    """A random order for a pad that no world contains: its colour, its shape, or both are unknown."""
    which = rng.integers(3)
    colour = rng.choice(list(COLOURS) if which == 1 else ABSENT_COLOURS)
    shape = rng.choice(SHAPES if which == 0 else ABSENT_SHAPES)
    return Order(kind, str(colour), str(shape))


def _punctuated(rng: np.random.Generator, sentence: str, language: str) -> str:
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
ANSWERS = {
    "en": {"none": "No pads.", "and": " and ", "yes": "Yes.", "no": "No.", "absent": "Not in view.", "end": "."},
    "fr": {"none": "Aucune.", "and": " et ", "yes": "Oui.", "no": "Non.", "absent": "Pas en vue.", "end": "."},
    "de": {"none": "Keine.", "and": " und ", "yes": "Ja.", "no": "Nein.", "absent": "Nicht im Bild.", "end": "."},
    "es": {"none": "Ninguna.", "and": " y ", "yes": "Sí.", "no": "No.", "absent": "No se ve.", "end": "."},
    "ko": {"none": "없어요.", "and": ", ", "yes": "네.", "no": "아니요.", "absent": "안 보여요.", "end": "."},
}
NUMBER_ANSWERS = {
    "en": ("None.", "One.", "Two.", "Three."),
    "fr": ("Aucune.", "Une.", "Deux.", "Trois."),
    "de": ("Keine.", "Eine.", "Zwei.", "Drei."),
    "es": ("Ninguna.", "Una.", "Dos.", "Tres."),
    "ko": ("없어요.", "한 개.", "두 개.", "세 개."),
}
PLACE_ANSWERS = {  # line (above, level, below) by column (left, middle, right)
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
THIRD_BAND = (0.27, 0.39)  # between these distances from the middle it is not clear to which third a pad belongs
MIN_SPACING = 0.1  # two pads with a smaller horizontal distance have no order from left to right


class Exchange(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str
    about: tuple[str, str] | None = None  # colour and shape of the pad in the question; None: it is not about one pad


def random_exchange(rng: np.random.Generator, language: str, kind: str, sights: list[Sight]) -> Exchange | None:
    """A random question and its answer; None: the picture does not decide the answer. kind: see, is, count or where."""
    if any(is_in_picture(s) is None for s in sights):
        return None
    visible = sorted((s for s in sights if is_in_picture(s)), key=lambda s: s.right)
    sentence = str(rng.choice(QUESTIONS[language][kind]))
    if kind == "count" and len(visible) >= len(NUMBER_ANSWERS[language]):
        return None
    if kind == "count":
        return Exchange(sentence, NUMBER_ANSWERS[language][len(visible)])
    if kind == "see":
        return Exchange(sentence, list_pads(language, visible)) if list_pads(language, visible) else None
    if visible and rng.random() < 0.55:
        target = visible[rng.integers(len(visible))]
        colour, shape = target.pad.colour, target.pad.shape
    else:  # a random pad, often with the colour or the shape of a pad in the picture
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        if visible and rng.random() < 0.6:
            other = visible[rng.integers(len(visible))].pad
            colour, shape = (other.colour, shape) if rng.random() < 0.5 else (colour, other.shape)
        target = next((s for s in visible if (s.pad.colour, s.pad.shape) == (colour, shape)), None)
    sentence = sentence.format(**name_forms(language, colour, shape))
    answers = ANSWERS[language]
    if kind == "is":
        return Exchange(sentence, answers["no"] if target is None else answers["yes"], (colour, shape))
    if target is None:
        return Exchange(sentence, answers["absent"], (colour, shape))
    thirds = [_third(target.down / target.edge[1]), _third(target.right / target.edge[0])]
    if None in thirds:
        return None
    return Exchange(sentence, PLACE_ANSWERS[language][thirds[0]][thirds[1]], (colour, shape))


def list_pads(language: str, visible: list[Sight]) -> str:
    """The pads from left to right, as a sentence; "": two pads are too near each other to have an order.

    visible: sorted from left to right.
    """
    answers = ANSWERS[language]
    if not visible:
        return answers["none"]
    if any(b.right - a.right < MIN_SPACING for a, b in itertools.pairwise(visible)):
        return ""
    names = [name_forms(language, s.pad.colour, s.pad.shape)["a"] for s in visible]
    text = ", ".join(names[:-1]) + (answers["and"] if len(names) > 1 else "") + names[-1]
    return text[0].upper() + text[1:] + answers["end"]


def _third(coordinate: float) -> int | None:
    """0, 1 or 2: the first, middle or last third; None: it is not clear which one."""
    if abs(coordinate) < THIRD_BAND[0]:
        return 1
    return None if abs(coordinate) < THIRD_BAND[1] else 0 if coordinate < 0 else 2
