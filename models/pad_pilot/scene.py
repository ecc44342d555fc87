"""Images of a downward camera: landing pads on the ground, drawn in perspective from a pose.

A pad is a white plate with a coloured shape on it. World axes: north, east (m); height is above ground. Body axes:
forward, right, down. The top of the picture is forward. Positions in a picture are (right, down) from its centre. Their
unit is half the longest side, so the edge of a square picture is at ±1. A pad's apparent radius has the same unit.

The functions are pure: a picture depends only on the arguments and the given generator. task.py has the right action
for a picture, and world.py has the motion of the vehicle.

    rng = np.random.default_rng(1)
    pad = Pad("red", "disc", north_m=1.0, east_m=0.0, radius_m=0.5, turn_rad=0.0)
    picture = render([pad], synthetic_ground(rng), Pose(height_m=5.0), rng)  # (140, 140, 3) uint8 RGB
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
    """Where the centre of a pad appears. It can be outside the picture."""

    pad: Pad
    right: float
    down: float
    radius: float
    edge: tuple[float, float] = (1.0, 1.0)  # position of the picture's edge (right, down): 1 along its longest side


class Ground(NamedTuple):
    image: np.ndarray  # (H, W, 3) uint8 RGB; it is mirrored at its edges, so the ground has no end
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
    """One Sight per pad, also for pads outside the picture. Pads behind the camera's horizon are left out."""
    projected = []
    to_body = rotation(pose).T
    edge = (size_px[1] / max(size_px), size_px[0] / max(size_px))
    for pad in pads:
        forward, right, down = to_body @ (pad.north_m - pose.north_m, pad.east_m - pose.east_m, pose.height_m)
        if down > 0.1:
            scale = 1 / (down * HALF_VIEW)
            projected.append(Sight(pad, right * scale, -forward * scale, pad.radius_m * scale, edge))
    return projected


def synthetic_ground(rng: np.random.Generator, side_px: int = 512) -> Ground:
    """A synthetic ground: noise of several sizes between two or three colours, sometimes with tiles and cracks."""
    noise = np.zeros((side_px, side_px), np.float32)
    roughness = rng.uniform(0.4, 0.95)
    for octave in range(1, 8):
        cells = rng.random((2**octave + 1, 2**octave + 1), np.float32)
        noise += roughness**octave * cv2.resize(cells, (side_px, side_px), interpolation=cv2.INTER_CUBIC)
    noise = cv2.normalize(noise, None, 0, 1, cv2.NORM_MINMAX)
    low, high = _ground_colour(rng), _ground_colour(rng)
    image = low + (high - low) * noise[..., None]
    if rng.random() < 0.35:  # a second kind of ground in patches
        patches = cv2.resize(rng.random((6, 6), np.float32), (side_px, side_px), interpolation=cv2.INTER_CUBIC)
        image = np.where(
            (patches > rng.uniform(0.4, 0.7))[..., None], _ground_colour(rng) * (0.6 + 0.4 * noise[..., None]), image
        )
    if rng.random() < 0.35:  # tiles or planks
        step = int(rng.integers(16, 128))
        line, column = np.arange(side_px) // step, np.arange(side_px) // (step * int(rng.integers(1, 4)))
        shade = rng.uniform(0.7, 1.2, (side_px, side_px))[np.ix_(line, column)]
        image = image * shade[..., None]
    image = np.clip(image, 0, 255).astype(np.uint8)
    for _ in range(rng.integers(0, 5)):  # paths, markings, cracks
        ends = rng.integers(-50, side_px + 50, 4).tolist()
        colour = tuple(int(c) for c in (_ground_colour(rng) if rng.random() < 0.6 else rng.integers(180, 255, 3)))
        cv2.line(image, ends[:2], ends[2:], colour, int(rng.integers(1, 24)), cv2.LINE_AA)
    return Ground(image, rng.uniform(6, 40) / side_px)


def photograph_ground(rng: np.random.Generator, photograph: np.ndarray, side_px: int = 512) -> Ground:
    """A ground that shows a random part of a photograph, sometimes mirrored or with another tint.

    photograph: (H, W, 3) uint8 RGB.
    """
    short_side_px = min(photograph.shape[:2])
    side_taken_px = round(short_side_px * rng.uniform(0.35, 1.0))
    top, left = rng.integers(0, np.array(photograph.shape[:2]) - side_taken_px + 1)
    image = photograph[top : top + side_taken_px, left : left + side_taken_px]
    if rng.random() < 0.5:
        image = image[:, ::-1]
    image = cv2.resize(np.ascontiguousarray(image), (side_px, side_px), interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        tint = rng.uniform(0.6, 1.25, 3) if rng.random() < 0.5 else rng.uniform(0.6, 1.25)
        image = np.clip(image * tint, 0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        image = image[..., rng.permutation(3)]
    return Ground(np.ascontiguousarray(image), rng.uniform(3, 40) / side_px)


def _ground_colour(rng: np.random.Generator) -> np.ndarray:
    """A random colour, (3,) float RGB: in four cases of five a typical colour of a ground, else any colour."""
    if rng.random() < 0.2:
        return rng.uniform(20, 235, 3)
    hue, saturation, value = rng.uniform(5, 60), rng.uniform(0, 130), rng.uniform(30, 225)
    hsv = np.array([[[hue, saturation, value]]], np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float64)


def clutter(rng: np.random.Generator, reach_m: float, pose: Pose) -> list[tuple[np.ndarray, tuple[int, int, int]]]:
    """Random objects that are not pads: [(outline (n, 2) north, east; RGB)].

    Many objects have the colour of a pad. Some are white.
    """
    objects = []
    for _ in range(rng.integers(0, 6)):
        centre = np.array([pose.north_m, pose.east_m]) + rng.uniform(-reach_m, reach_m, 2)
        size = rng.uniform(0.1, 0.9) * rng.uniform(0.4, 1.0, 2)
        corners = CIRCLE[:: rng.integers(2, 12)] * size * rng.uniform(0.6, 1.0, (1 if rng.random() < 0.5 else 2))
        turn_rad = rng.uniform(0, 2 * math.pi)
        cos, sin = math.cos(turn_rad), math.sin(turn_rad)
        rotated = corners @ np.array([[cos, sin], [-sin, cos]])
        kind = rng.random()
        if kind < 0.5:
            colour = np.array(list(COLOURS.values())[rng.integers(len(COLOURS))]) * rng.uniform(0.6, 1.1)
        elif kind < 0.7:
            colour = np.full(3, rng.uniform(190, 250))
        else:
            colour = _ground_colour(rng)
        objects.append((centre + rotated, tuple(int(c) for c in np.clip(colour, 0, 255))))
    return objects


def outlines(pad: Pad, white: np.ndarray, paint: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """A pad as polygons on the ground, in drawing order: [(outline (n, 2) north, east; colour (3,))]."""
    cos, sin = math.cos(pad.turn_rad), math.sin(pad.turn_rad)
    placed = lambda points, size: (  # noqa: E731
        np.array([pad.north_m, pad.east_m]) + pad.radius_m * size * points @ np.array([[cos, sin], [-sin, cos]])
    )
    parts = [(placed(CIRCLE, 1.0), white)]
    if pad.shape == "disc":
        parts.append((placed(CIRCLE, 0.76), paint))
    elif pad.shape == "square":
        parts.append((placed(np.array([(1, 1), (1, -1), (-1, -1), (-1, 1)]), 0.64), paint))
    elif pad.shape == "triangle":
        parts.append((placed(CIRCLE[[0, 13, 27]], 0.94), paint))
    else:
        parts += [(placed(CIRCLE, 0.84), paint), (placed(CIRCLE, 0.46), white)]
    return parts


def render(
    pads: list[Pad],
    ground: Ground,
    pose: Pose,
    rng: np.random.Generator,
    size_px: tuple[int, int] = (SIDE_PX, SIDE_PX),
    oversampling: int = 2,
    objects: list | None = None,
    light: Light | None = None,
) -> np.ndarray:
    """The picture, (H, W, 3) uint8 RGB.

    oversampling: the picture is drawn this many times larger and then averaged, as a lens does.
    objects: from clutter().
    light: the light on the scene and the faults of the camera; None: plain light and no fault.
    rng: for the noise.

    Eight parameters: training draws each one independently, and the tests change one at a time.
    """
    height, width = (side * oversampling for side in size_px)
    to_picture = homography(pose, height, width)
    texture_h, texture_w = ground.image.shape[:2]
    s = ground.metres_per_px  # the texture's centre is the world's origin, its top points north
    to_ground = np.array([[0, -s, s * texture_h / 2], [s, 0, -s * texture_w / 2], [0, 0, 1]])
    image = cv2.warpPerspective(
        ground.image, to_picture @ to_ground, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )
    for outline, colour in objects or []:
        _fill(image, to_picture, outline, colour)
    light = light or Light()
    for sight in sights(pads, pose):
        if max(abs(sight.right), abs(sight.down)) > 1.2 + sight.radius:
            continue
        paint = np.array(COLOURS[sight.pad.colour], np.float64)
        paint = paint * light.fading + (1 - light.fading) * 128
        for outline, colour in outlines(sight.pad, np.array(light.white), paint):
            _fill(image, to_picture, outline, tuple(int(c) for c in np.clip(colour, 0, 255)))
    if oversampling > 1:
        image = cv2.resize(image, size_px[::-1], interpolation=cv2.INTER_AREA)
    return light.apply(image, rng)


def _fill(image: np.ndarray, to_picture: np.ndarray, outline: np.ndarray, colour: tuple[int, int, int]) -> None:
    points = np.column_stack([outline, np.ones(len(outline))]) @ to_picture.T
    if (points[:, 2] <= 0.05).any():
        return
    xy = np.clip(points[:, :2] / points[:, 2:], -4000, 4000)
    cv2.fillPoly(image, [np.round(xy * 2**SUBPIXEL_BITS).astype(np.int32)], colour, cv2.LINE_AA, SUBPIXEL_BITS)


class Light(NamedTuple):
    """The light on the scene, and the faults of the camera."""

    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)  # brightness and white balance
    gamma: float = 1.0
    white: tuple[float, float, float] = (236.0, 236.0, 232.0)  # colour of the plates, RGB
    fading: float = 1.0  # saturation of the paint: 1 is fresh paint, 0 is grey
    shadow: tuple[float, float, float] | None = None  # angle, offset in half sides, brightness of the darker side
    blur_px: float = 0.0
    motion_blur_px: int = 0  # length, along a random direction
    noise: float = 0.0  # standard deviation; pixels are 0 to 255
    jpeg_quality: int = 0  # 0: no compression

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
            motion_blur_px=int(rng.integers(2, 6)) if rng.random() < 0.15 else 0,
            noise=rng.uniform(0, 12) if rng.random() < 0.7 else 0.0,
            jpeg_quality=int(rng.integers(40, 95)) if rng.random() < 0.25 else 0,
        )

    def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        levels = np.arange(256, dtype=np.float64)[:, None] / 255
        table = np.clip(255 * levels**self.gamma * self.gain, 0, 255)
        image = cv2.LUT(image, np.round(table).astype(np.uint8)[None])
        if self.shadow is not None:
            angle, offset, strength = self.shadow
            y, x = np.mgrid[-1 : 1 : image.shape[0] * 1j, -1 : 1 : image.shape[1] * 1j].astype(np.float32)
            edge = np.clip((x * math.cos(angle) + y * math.sin(angle) - offset) * 12 + 0.5, 0, 1)
            image = (image * (1 - (1 - strength) * edge)[..., None]).astype(np.uint8)
        if self.motion_blur_px:
            kernel = np.zeros((self.motion_blur_px, self.motion_blur_px), np.float32)
            middle = self.motion_blur_px // 2
            ends = [(0, 0, -1, -1), (0, -1, -1, 0), (0, middle, -1, middle)][rng.integers(3)]
            last = self.motion_blur_px - 1
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
