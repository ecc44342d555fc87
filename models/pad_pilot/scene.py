"""Images of a downward camera: landing pads on the ground, drawn in perspective from a pose.

A pad is a white plate with a coloured shape on it. World axes: north, east (m); height is above ground. Body axes:
forward, right, down. The top of the picture is forward. Places in a picture are (right, down) in units of half its
longest side, so the edge of a square picture is at ±1. A pad's apparent radius has the same unit.

Pure functions: a picture depends only on the arguments and the given generator. Not here: the right action (task.py),
and the vehicle's motion (world.py).

    rng = np.random.default_rng(1)
    pad = Pad("red", "disc", north_m=1.0, east_m=0.0, radius_m=0.5, turn_rad=0.0)
    picture = render([pad], painted(rng), Pose(height_m=5.0), rng)          # (140, 140, 3) uint8 RGB
    sights([pad], Pose(height_m=5.0))                                        # [Sight(pad, 0.0, -0.29, 0.14)]
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

SIDE_PX = 140  # five lines of five tokens
HALF_VIEW = math.tan(math.radians(70) / 2)  # half the field of view along the longest side, at a distance of 1
COLOURS = {  # RGB, before fading and light
    "red": (208, 32, 38),
    "green": (28, 150, 62),
    "blue": (32, 72, 205),
    "yellow": (242, 204, 28),
    "purple": (142, 48, 168),
}
SHAPES = ("disc", "square", "triangle", "ring")
CIRCLE = np.stack([np.cos(t := np.linspace(0, 2 * np.pi, 40, endpoint=False)), np.sin(t)], 1)
SUBPIXEL_BITS = 4  # of OpenCV's fixed-point drawing


class Pad(NamedTuple):
    colour: str
    shape: str
    north_m: float
    east_m: float
    radius_m: float  # of the white plate
    turn_rad: float


class Pose(NamedTuple):
    north_m: float = 0.0
    east_m: float = 0.0
    height_m: float = 5.0
    yaw_rad: float = 0.0  # clockwise from north, seen from above
    roll_rad: float = 0.0  # right side down
    pitch_rad: float = 0.0  # nose up


class Sight(NamedTuple):
    """A pad in the picture."""

    pad: Pad
    right: float
    down: float
    radius: float
    edge: tuple[float, float] = (1.0, 1.0)  # where the picture ends (right, down): 1 along its longest side


class Ground(NamedTuple):
    image: np.ndarray  # (H, W, 3) uint8 RGB; mirrored at its edges, so the ground is endless
    metres_per_px: float


def rotation(pose: Pose) -> np.ndarray:
    """(3, 3): body axes in the world (north, east, down)."""
    (cr, sr), (cp, sp), (cy, sy) = ((math.cos(a), math.sin(a)) for a in (pose.roll_rad, pose.pitch_rad, pose.yaw_rad))
    roll = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    pitch = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    yaw = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return yaw @ pitch @ roll


def homography(pose: Pose, height_px: int, width_px: int) -> np.ndarray:
    """(3, 3): a point of the ground (north, east, 1) -> pixel (x, y, 1), pixel centres at whole numbers."""
    to_body = rotation(pose).T @ np.array(
        [[1, 0, -pose.north_m], [0, 1, -pose.east_m], [0, 0, pose.height_m]], np.float64
    )
    f = max(height_px, width_px) / 2 / HALF_VIEW
    camera = np.array([[0, f, (width_px - 1) / 2], [-f, 0, (height_px - 1) / 2], [0, 0, 1]])
    return camera @ to_body


def sights(pads: list[Pad], pose: Pose, size_px: tuple[int, int] = (SIDE_PX, SIDE_PX)) -> list[Sight]:
    """Where each pad's centre appears, also outside the picture. Pads behind the camera's horizon are left out."""
    found = []
    to_body = rotation(pose).T
    edge = (size_px[1] / max(size_px), size_px[0] / max(size_px))
    for pad in pads:
        forward, right, down = to_body @ (pad.north_m - pose.north_m, pad.east_m - pose.east_m, pose.height_m)
        if down > 0.1:
            scale = 1 / (down * HALF_VIEW)
            found.append(Sight(pad, right * scale, -forward * scale, pad.radius_m * scale, edge))
    return found


def painted(rng: np.random.Generator, side_px: int = 512) -> Ground:
    """A synthetic ground: noise of several sizes between two or three colours, sometimes with tiles and cracks."""
    noise = np.zeros((side_px, side_px), np.float32)
    roughness = rng.uniform(0.4, 0.95)
    for octave in range(1, 8):
        cells = rng.random((2**octave + 1, 2**octave + 1), np.float32)
        noise += roughness**octave * cv2.resize(cells, (side_px, side_px), interpolation=cv2.INTER_CUBIC)
    noise = cv2.normalize(noise, None, 0, 1, cv2.NORM_MINMAX)
    low, high = _earth(rng), _earth(rng)
    image = low + (high - low) * noise[..., None]
    if rng.random() < 0.35:  # a second kind of ground in patches
        patches = cv2.resize(rng.random((6, 6), np.float32), (side_px, side_px), interpolation=cv2.INTER_CUBIC)
        image = np.where(
            (patches > rng.uniform(0.4, 0.7))[..., None], _earth(rng) * (0.6 + 0.4 * noise[..., None]), image
        )
    if rng.random() < 0.35:  # tiles or planks
        step = int(rng.integers(16, 128))
        line, column = np.arange(side_px) // step, np.arange(side_px) // (step * int(rng.integers(1, 4)))
        shade = rng.uniform(0.7, 1.2, (side_px, side_px))[np.ix_(line, column)]
        image = image * shade[..., None]
    image = np.clip(image, 0, 255).astype(np.uint8)
    for _ in range(rng.integers(0, 5)):  # paths, markings, cracks
        ends = rng.integers(-50, side_px + 50, 4).tolist()
        colour = tuple(int(c) for c in (_earth(rng) if rng.random() < 0.6 else rng.integers(180, 255, 3)))
        cv2.line(image, ends[:2], ends[2:], colour, int(rng.integers(1, 24)), cv2.LINE_AA)
    return Ground(image, rng.uniform(6, 40) / side_px)


def photographed(rng: np.random.Generator, photograph: np.ndarray, side_px: int = 512) -> Ground:
    """A ground from a photograph, (H, W, 3) uint8 RGB: a random part, sometimes mirrored or with another tint."""
    short = min(photograph.shape[:2])
    part = round(short * rng.uniform(0.35, 1.0))
    top, left = rng.integers(0, np.array(photograph.shape[:2]) - part + 1)
    image = photograph[top : top + part, left : left + part]
    if rng.random() < 0.5:
        image = image[:, ::-1]
    image = cv2.resize(np.ascontiguousarray(image), (side_px, side_px), interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        tint = rng.uniform(0.6, 1.25, 3) if rng.random() < 0.5 else rng.uniform(0.6, 1.25)
        image = np.clip(image * tint, 0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        image = image[..., rng.permutation(3)]
    return Ground(np.ascontiguousarray(image), rng.uniform(3, 40) / side_px)


def _earth(rng: np.random.Generator) -> np.ndarray:
    """A typical colour of a ground, and in one case of five any colour: (3,) float RGB."""
    if rng.random() < 0.2:
        return rng.uniform(20, 235, 3)
    hue, saturation, value = rng.uniform(5, 60), rng.uniform(0, 130), rng.uniform(30, 225)
    hsv = np.array([[[hue, saturation, value]]], np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float64)


def clutter(rng: np.random.Generator, reach_m: float, pose: Pose) -> list[tuple[np.ndarray, tuple[int, int, int]]]:
    """Objects that are not pads: [(outline (n, 2) north, east; RGB)]. Many have the pads' colours, some are white."""
    things = []
    for _ in range(rng.integers(0, 6)):
        centre = np.array([pose.north_m, pose.east_m]) + rng.uniform(-reach_m, reach_m, 2)
        size = rng.uniform(0.1, 0.9) * rng.uniform(0.4, 1.0, 2)
        spots = CIRCLE[:: rng.integers(2, 12)] * size * rng.uniform(0.6, 1.0, (1 if rng.random() < 0.5 else 2))
        turn = rng.uniform(0, 2 * math.pi)
        turned = spots @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        kind = rng.random()
        if kind < 0.5:
            colour = np.array(list(COLOURS.values())[rng.integers(len(COLOURS))]) * rng.uniform(0.6, 1.1)
        elif kind < 0.7:
            colour = np.full(3, rng.uniform(190, 250))
        else:
            colour = _earth(rng)
        things.append((centre + turned, tuple(int(c) for c in np.clip(colour, 0, 255))))
    return things


def outlines(pad: Pad, white: np.ndarray, paint: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """A pad as polygons on the ground, in drawing order: [(outline (n, 2) north, east; colour (3,))]."""
    cos, sin = math.cos(pad.turn_rad), math.sin(pad.turn_rad)
    place = lambda points, size: (  # noqa: E731
        np.array([pad.north_m, pad.east_m]) + pad.radius_m * size * points @ np.array([[cos, sin], [-sin, cos]])
    )
    parts = [(place(CIRCLE, 1.0), white)]
    if pad.shape == "disc":
        parts.append((place(CIRCLE, 0.76), paint))
    elif pad.shape == "square":
        parts.append((place(np.array([(1, 1), (1, -1), (-1, -1), (-1, 1)]), 0.64), paint))
    elif pad.shape == "triangle":
        parts.append((place(CIRCLE[[0, 13, 27]], 0.94), paint))
    else:
        parts += [(place(CIRCLE, 0.84), paint), (place(CIRCLE, 0.46), white)]
    return parts


def render(
    pads: list[Pad],
    ground: Ground,
    pose: Pose,
    rng: np.random.Generator,
    size_px: tuple[int, int] = (SIDE_PX, SIDE_PX),
    finer: int = 2,
    things: list | None = None,
    light: Light | None = None,
) -> np.ndarray:
    """The picture, (H, W, 3) uint8 RGB.

    finer: the picture is drawn this many times larger and then averaged, as a lens does. things: from clutter(). light:
    the light and the camera's faults; None for neither. rng: for the noise.

    Eight parameters: training draws each of them by itself, and the tests change one at a time.
    """
    height, width = (side * finer for side in size_px)
    to_picture = homography(pose, height, width)
    texture_h, texture_w = ground.image.shape[:2]
    s = ground.metres_per_px  # the texture's centre is the world's origin, its top points north
    to_ground = np.array([[0, -s, s * texture_h / 2], [s, 0, -s * texture_w / 2], [0, 0, 1]])
    image = cv2.warpPerspective(
        ground.image, to_picture @ to_ground, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )
    for outline, colour in things or []:
        _fill(image, to_picture, outline, colour)
    light = light or Light()
    for sight in sights(pads, pose):
        if max(abs(sight.right), abs(sight.down)) > 1.2 + sight.radius:
            continue
        paint = np.array(COLOURS[sight.pad.colour], np.float64)
        paint = paint * light.fading + (1 - light.fading) * 128
        for outline, colour in outlines(sight.pad, np.array(light.white), paint):
            _fill(image, to_picture, outline, tuple(int(c) for c in np.clip(colour, 0, 255)))
    if finer > 1:
        image = cv2.resize(image, size_px[::-1], interpolation=cv2.INTER_AREA)
    return light.fall_on(image, rng)


def _fill(image: np.ndarray, to_picture: np.ndarray, outline: np.ndarray, colour: tuple[int, int, int]) -> None:
    points = np.column_stack([outline, np.ones(len(outline))]) @ to_picture.T
    if (points[:, 2] <= 0.05).any():
        return
    xy = np.clip(points[:, :2] / points[:, 2:], -4000, 4000)
    cv2.fillPoly(image, [np.round(xy * 2**SUBPIXEL_BITS).astype(np.int32)], colour, cv2.LINE_AA, SUBPIXEL_BITS)


class Light(NamedTuple):
    """The light on the scene, and the camera's faults."""

    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)  # brightness and white balance
    gamma: float = 1.0
    white: tuple[float, float, float] = (236.0, 236.0, 232.0)  # of the plates
    fading: float = 1.0  # of the paint: 1 is fresh
    shadow: tuple[float, float, float] | None = None  # angle, offset in half sides, strength; one side is darker
    blur_px: float = 0.0
    smear_px: int = 0  # motion, along a random direction
    noise: float = 0.0  # standard deviation, of 255
    jpeg_quality: int = 0

    @classmethod
    def random(cls, rng: np.random.Generator) -> Light:
        bright = math.exp(rng.uniform(math.log(0.45), math.log(1.35)))
        return cls(
            gain=tuple(bright * rng.uniform(0.88, 1.12, 3)),
            gamma=rng.uniform(0.75, 1.35),
            white=tuple(rng.uniform(205, 255) + rng.uniform(-10, 10, 3)),
            fading=rng.uniform(0.75, 1.0),
            shadow=(rng.uniform(0, 6.3), rng.uniform(-0.6, 0.6), rng.uniform(0.4, 0.85))
            if rng.random() < 0.3
            else None,
            blur_px=rng.uniform(0.3, 1.1) if rng.random() < 0.4 else 0.0,
            smear_px=int(rng.integers(2, 6)) if rng.random() < 0.15 else 0,
            noise=rng.uniform(0, 12) if rng.random() < 0.7 else 0.0,
            jpeg_quality=int(rng.integers(40, 95)) if rng.random() < 0.25 else 0,
        )

    def fall_on(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        levels = np.arange(256, dtype=np.float64)[:, None] / 255
        table = np.clip(255 * levels**self.gamma * self.gain, 0, 255)
        image = cv2.LUT(image, np.round(table).astype(np.uint8)[None])
        if self.shadow is not None:
            angle, offset, strength = self.shadow
            y, x = np.mgrid[-1 : 1 : image.shape[0] * 1j, -1 : 1 : image.shape[1] * 1j].astype(np.float32)
            edge = np.clip((x * math.cos(angle) + y * math.sin(angle) - offset) * 12 + 0.5, 0, 1)
            image = (image * (1 - (1 - strength) * edge)[..., None]).astype(np.uint8)
        if self.smear_px:
            kernel = np.zeros((self.smear_px, self.smear_px), np.float32)
            ends = [(0, 0, -1, -1), (0, -1, -1, 0), (0, self.smear_px // 2, -1, self.smear_px // 2)][rng.integers(3)]
            last = self.smear_px - 1
            cv2.line(kernel, *([last if n == -1 else n for n in pair] for pair in (ends[:2], ends[2:])), 1.0)
            image = cv2.filter2D(image, -1, kernel / kernel.sum())
        if self.blur_px:
            image = cv2.GaussianBlur(image, (0, 0), self.blur_px)
        if self.noise:
            grain = rng.standard_normal(image.shape, np.float32) * np.float32(self.noise)
            image = np.clip(image + grain, 0, 255).astype(np.uint8)
        if self.jpeg_quality:
            packed = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, self.jpeg_quality])[1]
            image = cv2.imdecode(packed, cv2.IMREAD_COLOR)[..., ::-1]
        return np.ascontiguousarray(image)
