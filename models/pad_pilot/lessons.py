"""Pictures with orders and questions about them: the training data, and the held-out frames.

A lesson is one picture and a few exercises. An exercise is an order with the right action, and a few questions with
their answers. The same seed gives the same lessons. Some pictures show nothing (black, white, noise).

    photographs = training_photographs()
    example = lesson(np.random.default_rng([7, 1]), Grounds(photographs, seed=7))
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
    photograph_ground,
    render,
    rotation,
    sights,
    synthetic_ground,
)
from models.pad_pilot.task import Order

PAD_RADIUS_M = (0.5, 0.65)
APPARENT_RADIUS = (0.135, 0.85)  # limits for the first pad of a picture
BLANK_SHARE = 0.025  # share of the pictures that show nothing


class Exercise(NamedTuple):
    """An order with the right action, and questions with their answers."""

    order: Order
    instruction: str
    action: dict
    exchanges: list[task.Exchange]


class Lesson(NamedTuple):
    """One picture with its exercises."""

    picture: np.ndarray  # (H, W, 3) uint8 RGB
    sights: list[Sight]  # the pads that are in the picture, or partly in it
    exercises: list[Exercise]


class Grounds:
    """A stock of grounds, half synthetic, half from photographs. Each ground is made once; many pictures use it."""

    def __init__(
        self, photographs: list[np.ndarray], seed: int, n: int = 600, *, only_photographs: bool = False
    ) -> None:
        self.photographs, self.seed, self.n = photographs, seed, n
        self.only_photographs = only_photographs
        self._stock: dict[int, Ground] = {}

    def pick(self, rng: np.random.Generator) -> Ground:
        i = int(rng.integers(self.n))
        if i not in self._stock:
            ground_rng = np.random.default_rng([self.seed, 77, i])
            if self.photographs and (i % 2 or self.only_photographs):
                self._stock[i] = photograph_ground(ground_rng, self.photographs[i // 2 % len(self.photographs)])
            else:
                self._stock[i] = synthetic_ground(ground_rng)
        ground = self._stock[i]
        return ground._replace(metres_per_px=ground.metres_per_px * math.exp(rng.uniform(-0.7, 0.7)))


HELD_OUT = ("coffee", "brick")  # photographs in scikit-image's wheel that training never uses


def training_photographs() -> list[np.ndarray]:
    """The photographs in scikit-image's wheel except the held-out ones: [(H, W, 3) uint8 RGB]."""
    names = ("astronaut", "chelsea", "rocket", "grass", "gravel", "hubble_deep_field", "coins", "moon", "retina",
             "immunohistochemistry", "camera", "cell")  # fmt: skip
    return [_photograph(name) for name in names] + [_photograph("stereo_motorcycle")]


def held_out_photographs() -> list[np.ndarray]:
    return [_photograph(name) for name in HELD_OUT]


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
    edge_cases: bool = False,
) -> Lesson:
    """One random lesson.

    crowded: many more pads than a world has, for the training stage that only learns to distinguish pads. edge_cases:
    cases that are rare otherwise. These are pads in the middle, where the order decides the action, and actions inside
    the band of a rule.
    """
    if rng.random() < BLANK_SHARE:
        picture, visible = blank_picture(rng, size_px), []
    else:
        pads, pose = arrangement(rng, size_px, crowded, edge_cases)
        light = Light.random(rng)
        oversampling = int(rng.choice([1, 2, 2, 3]))
        objects = clutter(rng, pose.height_m * HALF_VIEW * 1.2, pose)
        objects = [item for item in objects if not any(_overlaps(item[0], pad) for pad in pads)]
        picture = render(pads, grounds.pick(rng), pose, rng, size_px, oversampling, objects, light)
        visible = [s for s in sights(pads, pose, size_px) if task.is_in_picture(s) is not False]
    exercises: list[Exercise] = []
    for n in range(200):
        if len(exercises) == n_orders:
            break
        order, text = random_order(rng, visible, about_first=n == 0)
        answer = task.action(order, visible, decide_in_bands=edge_cases)
        if answer is None:
            continue
        exchanges = []
        for _ in range(3 * n_questions):
            if len(exchanges) == n_questions:
                break
            kind = str(rng.choice(["see", "see", "is", "count", "where"]))
            if (exchange := task.random_exchange(rng, str(rng.choice(task.LANGUAGES)), kind, visible)) is not None:
                exchanges.append(exchange)
        exercises.append(Exercise(order, text, answer, exchanges))
    return Lesson(picture, visible, exercises)


def random_order(rng: np.random.Generator, visible: list[Sight], about_first: bool) -> tuple[Order, str]:
    """A random order and its sentence. Most orders are about a pad in the picture.

    about_first: an order about a pad in the picture is about the first one.
    """
    language = str(rng.choice(task.LANGUAGES))
    is_near = bool(visible) and visible[0].radius > task.LANDING_RADIUS[1]
    kind = "land" if rng.random() < (0.75 if is_near else 0.5) else "goto"
    draw = rng.random()
    if draw < 0.07:
        return (order := Order("hold")), task.random_instruction(rng, language, order)
    if draw < 0.14:
        return (order := Order("nothing")), task.random_instruction(rng, language, order)
    if draw < 0.19:
        order = task.random_absent_order(rng, kind)
        return order, task.random_instruction(rng, language, order)
    if visible and (about_first or draw < 0.82):
        pad = visible[0 if about_first else rng.integers(len(visible))].pad
        order = Order(kind, pad.colour, pad.shape)
    else:
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        if visible and rng.random() < 0.5:  # a near miss: only the colour, or only the shape, is in the picture
            pad = visible[rng.integers(len(visible))].pad
            colour, shape = (pad.colour, shape) if rng.random() < 0.5 else (colour, pad.shape)
        order = Order(kind, colour, shape)
    return order, task.random_instruction(rng, language, order)


def arrangement(
    rng: np.random.Generator, size_px: tuple[int, int], crowded: bool = False, edge_cases: bool = False
) -> tuple[list[Pad], Pose]:
    """Zero to three random pads (crowded: up to nine) and a random pose.

    The position and the size of the first pad are drawn in the picture. edge_cases: it is mostly in the middle.
    """
    radius_m = rng.uniform(*PAD_RADIUS_M)
    apparent_radius = math.exp(rng.uniform(*np.log(APPARENT_RADIUS)))
    draw = rng.random()
    is_near = draw < 0.2  # about to land
    if is_near:
        apparent_radius = rng.uniform(0.45, APPARENT_RADIUS[1])
    elif draw < 0.5:
        apparent_radius = rng.uniform(APPARENT_RADIUS[0], 0.24)  # most of a flight is at a large height
    pose = Pose(
        *rng.uniform(-4, 4, 2),
        height_m=radius_m / (apparent_radius * HALF_VIEW),
        yaw_rad=rng.uniform(0, 2 * math.pi),
        roll_rad=float(np.clip(rng.normal(0, 0.06), -0.2, 0.2)),
        pitch_rad=float(np.clip(rng.normal(0, 0.06), -0.2, 0.2)),
    )
    edge = np.array(size_px) / max(size_px)  # down, right
    kinds = [(c, s) for c in COLOURS for s in SHAPES]
    pads: list[Pad] = []
    n_pads = 9 if crowded else rng.choice(4, p=(0.06, 0.34, 0.36, 0.24))
    for _ in range(60):
        if len(pads) == n_pads:
            break
        limit = 0.94 if rng.random() < 0.85 else 1.6
        down, right = rng.uniform(-limit, limit, 2) * edge
        if not pads and (is_near or rng.random() < 0.4):
            down, right = np.clip(rng.normal(0, 0.16 if is_near else 0.25, 2), -0.9, 0.9) * edge
        if not pads and edge_cases and rng.random() < 0.6:
            down, right = rng.normal(0, 0.12, 2) * edge
        radius = radius_m if not pads else rng.uniform(*PAD_RADIUS_M)
        turn_rad = rng.uniform(0, 2 * math.pi)
        colour, shape = kinds[rng.integers(len(kinds))]
        if pads and rng.random() < 0.4:  # the same colour or shape as the first
            colour, shape = (pads[0].colour, shape) if rng.random() < 0.5 else (colour, pads[0].shape)
        pad = Pad(colour, shape, *ground_point(pose, right, down), radius, turn_rad)
        is_apart = all(
            math.hypot(pad.north_m - p.north_m, pad.east_m - p.east_m) > (pad.radius_m + p.radius_m) * 1.05
            for p in pads
        )
        if is_apart and (colour, shape) not in [(p.colour, p.shape) for p in pads]:
            pads.append(pad)
    return pads, pose


def blank_picture(rng: np.random.Generator, size_px: tuple[int, int]) -> np.ndarray:
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


def ground_point(pose: Pose, right: float, down: float) -> tuple[float, float]:
    """(north, east) of the point on the ground that appears at this position in the picture."""
    ray = rotation(pose) @ (-down * HALF_VIEW, right * HALF_VIEW, 1.0)
    north, east = ray[:2] / ray[2] * pose.height_m
    return pose.north_m + north, pose.east_m + east


def _overlaps(outline: np.ndarray, pad: Pad) -> bool:
    """Whether an object reaches under the plate of a pad. Such an object could look like a part of the pad."""
    return bool((np.hypot(*(outline - (pad.north_m, pad.east_m)).T) < pad.radius_m * 1.1).any())
