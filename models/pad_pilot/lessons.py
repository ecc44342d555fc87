"""Pictures with orders and questions about them: the training data, and the held-out frames.

One lesson is one picture and a few orders. Each order comes with the right action and a few questions. Everything
follows from the seed. Some pictures show nothing (black, white, noise).

    photographs = training_photographs()
    one = lesson(np.random.default_rng([7, 1]), Grounds(photographs, seed=7))
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from models.pad_pilot import task
from models.pad_pilot.scene import (
    COLOURS,
    HALF_VIEW,
    SHAPES,
    SIDE_PX,
    Ground,
    Light,
    Pad,
    Pose,
    Sight,
    clutter,
    painted,
    photographed,
    render,
    rotation,
    sights,
)
from models.pad_pilot.task import Order

PAD_RADIUS_M = (0.5, 0.65)
APPARENT_RADIUS = (0.135, 0.85)  # of the pad a lesson is about
BLANK_SHARE = 0.025  # of pictures that show nothing


class Said(NamedTuple):
    """An order, the right action, and questions with their answers."""

    order: Order
    instruction: str
    action: dict
    questions: list[task.Asked]


class Lesson(NamedTuple):
    picture: np.ndarray  # (H, W, 3) uint8 RGB
    sights: list[Sight]
    said: list[Said]


class Grounds:
    """A stock of grounds, half synthetic, half from photographs. Each is made once and used by many pictures."""

    def __init__(
        self, photographs: list[np.ndarray], seed: int, n: int = 600, *, only_photographs: bool = False
    ) -> None:
        self.photographs, self.seed, self.n = photographs, seed, n
        self.only_photographs = only_photographs
        self._stock: dict[int, Ground] = {}

    def pick(self, rng: np.random.Generator) -> Ground:
        i = int(rng.integers(self.n))
        if i not in self._stock:
            own = np.random.default_rng([self.seed, 77, i])
            if self.photographs and (i % 2 or self.only_photographs):
                self._stock[i] = photographed(own, self.photographs[i // 2 % len(self.photographs)])
            else:
                self._stock[i] = painted(own)
        ground = self._stock[i]
        return ground._replace(metres_per_px=ground.metres_per_px * math.exp(rng.uniform(-0.7, 0.7)))


HELD_BACK = ("coffee", "brick")  # photographs of scikit-image's wheel that are never used in training


def training_photographs() -> list[np.ndarray]:
    """The photographs in scikit-image's wheel except those held back: [(H, W, 3) uint8 RGB]."""
    names = ("astronaut", "chelsea", "rocket", "grass", "gravel", "hubble_deep_field", "coins", "moon", "retina",
             "immunohistochemistry", "camera", "cell")  # fmt: skip
    return [_photograph(name) for name in names] + [_photograph("stereo_motorcycle")]


def held_back_photographs() -> list[np.ndarray]:
    return [_photograph(name) for name in HELD_BACK]


def _photograph(name: str) -> np.ndarray:
    from skimage import data

    image = getattr(data, name)()
    image = image[0] if isinstance(image, tuple) else image
    return np.ascontiguousarray(np.stack([image] * 3, -1) if image.ndim == 2 else image[..., :3])


def lesson(
    rng: np.random.Generator,
    grounds: Grounds,
    n_orders: int = 3,
    n_questions: int = 4,
    size_px: tuple[int, int] = (SIDE_PX, SIDE_PX),
    crowded: bool = False,
    edges: bool = False,
) -> Lesson:
    """One random lesson.

    crowded: many more pads than a world has, for the stage that only learns to distinguish them. edges: cases that are
    rare otherwise: a pad in the middle, where the order decides the action, and answers inside a rule's band.
    """
    if rng.random() < BLANK_SHARE:
        picture, seen = blank(rng, size_px), []
    else:
        pads, pose = arrangement(rng, size_px, crowded, edges)
        light = Light.random(rng)
        finer = int(rng.choice([1, 2, 2, 3]))
        things = clutter(rng, pose.height_m * HALF_VIEW * 1.2, pose)
        things = [thing for thing in things if not any(_covers(thing[0], pad) for pad in pads)]
        picture = render(pads, grounds.pick(rng), pose, rng, size_px, finer, things, light)
        seen = [s for s in sights(pads, pose, size_px) if task.seen(s) is not False]
    said: list[Said] = []
    for n in range(200):
        if len(said) == n_orders:
            break
        order, text = an_order(rng, seen, about_first=n == 0)
        answer = task.action(order, seen, settled=edges)
        if answer is None:
            continue
        questions = []
        for _ in range(3 * n_questions):
            if len(questions) == n_questions:
                break
            kind = str(rng.choice(["see", "see", "is", "count", "where"]))
            if (asked := task.question(rng, str(rng.choice(task.LANGUAGES)), kind, seen)) is not None:
                questions.append(asked)
        said.append(Said(order, text, answer, questions))
    return Lesson(picture, seen, said)


def an_order(rng: np.random.Generator, seen: list[Sight], about_first: bool) -> tuple[Order, str]:
    """An order and its sentence: mostly about a pad in the picture; about_first: about the first of them, if any."""
    language = str(rng.choice(task.LANGUAGES))
    near = bool(seen) and seen[0].radius > task.LOW[1]
    kind = "land" if rng.random() < (0.75 if near else 0.5) else "goto"
    dice = rng.random()
    if dice < 0.07:
        return (order := Order("hold")), task.instruction(rng, language, order)
    if dice < 0.14:
        return (order := Order("nothing")), task.instruction(rng, language, order)
    if dice < 0.19:
        order = task.absent_order(rng, kind)
        return order, task.instruction(rng, language, order)
    if seen and (about_first or dice < 0.82):
        pad = seen[0 if about_first else rng.integers(len(seen))].pad
        order = Order(kind, pad.colour, pad.shape)
    else:
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        if seen and rng.random() < 0.5:  # a near miss: only the colour, or only the shape, is there
            pad = seen[rng.integers(len(seen))].pad
            colour, shape = (pad.colour, shape) if rng.random() < 0.5 else (colour, pad.shape)
        order = Order(kind, colour, shape)
    return order, task.instruction(rng, language, order)


def arrangement(
    rng: np.random.Generator, size_px: tuple[int, int], crowded: bool = False, edges: bool = False
) -> tuple[list[Pad], Pose]:
    """Zero to three pads (crowded: up to nine) and a pose. The first pad's place and size in the picture are drawn at
    random (edges: mostly in the middle)."""
    radius_m = rng.uniform(*PAD_RADIUS_M)
    apparent = math.exp(rng.uniform(*np.log(APPARENT_RADIUS)))
    dice = rng.random()
    near = dice < 0.2  # about to land
    if near:
        apparent = rng.uniform(0.45, APPARENT_RADIUS[1])
    elif dice < 0.5:
        apparent = rng.uniform(APPARENT_RADIUS[0], 0.24)  # most of a flight is at a large height
    pose = Pose(
        *rng.uniform(-4, 4, 2),
        height_m=radius_m / (apparent * HALF_VIEW),
        yaw_rad=rng.uniform(0, 2 * math.pi),
        roll_rad=float(np.clip(rng.normal(0, 0.06), -0.2, 0.2)),
        pitch_rad=float(np.clip(rng.normal(0, 0.06), -0.2, 0.2)),
    )
    edge = np.array(size_px) / max(size_px)  # down, right
    kinds = [(c, s) for c in COLOURS for s in SHAPES]
    pads: list[Pad] = []
    wanted = 9 if crowded else rng.choice(4, p=(0.06, 0.34, 0.36, 0.24))
    for _ in range(60):
        if len(pads) == wanted:
            break
        reach = 0.94 if rng.random() < 0.85 else 1.6
        down, right = rng.uniform(-reach, reach, 2) * edge
        if not pads and (near or rng.random() < 0.4):
            down, right = np.clip(rng.normal(0, 0.16 if near else 0.25, 2), -0.9, 0.9) * edge
        if not pads and edges and rng.random() < 0.6:
            down, right = rng.normal(0, 0.12, 2) * edge
        radius = radius_m if not pads else rng.uniform(*PAD_RADIUS_M)
        turn = rng.uniform(0, 2 * math.pi)
        colour, shape = kinds[rng.integers(len(kinds))]
        if pads and rng.random() < 0.4:  # the same colour or shape as the first
            colour, shape = (pads[0].colour, shape) if rng.random() < 0.5 else (colour, pads[0].shape)
        pad = Pad(colour, shape, *_on_the_ground(pose, right, down), radius, turn)
        apart = all(
            math.hypot(pad.north_m - p.north_m, pad.east_m - p.east_m) > (pad.radius_m + p.radius_m) * 1.05
            for p in pads
        )
        if apart and (colour, shape) not in [(p.colour, p.shape) for p in pads]:
            pads.append(pad)
    return pads, pose


def blank(rng: np.random.Generator, size_px: tuple[int, int]) -> np.ndarray:
    """A picture of a covered, blinded or broken camera: (H, W, 3) uint8 RGB."""
    shape = (*size_px, 3)
    kind = rng.integers(4)
    if kind == 0:
        return np.full(shape, rng.integers(0, 12), np.uint8)
    if kind == 1:
        return np.full(shape, rng.integers(243, 256), np.uint8)
    if kind == 2:
        return np.broadcast_to(rng.integers(0, 256, 3).astype(np.uint8), shape).copy()
    noise = rng.integers(0, 256, shape, np.uint8)
    return np.repeat(noise[..., :1], 3, -1) if rng.random() < 0.5 else noise


def _on_the_ground(pose: Pose, right: float, down: float) -> tuple[float, float]:
    """(north, east) of the point on the ground that appears at a place in the picture."""
    ray = rotation(pose) @ (-down * HALF_VIEW, right * HALF_VIEW, 1.0)
    north, east = ray[:2] / ray[2] * pose.height_m
    return pose.north_m + north, pose.east_m + east


def _covers(outline: np.ndarray, pad: Pad) -> bool:
    """Whether an object reaches under a pad's plate, so that it could look like a part of the pad."""
    return bool((np.hypot(*(outline - (pad.north_m, pad.east_m)).T) < pad.radius_m * 1.1).any())
