"""A simple simulated world: pads on a ground, wind, and a multirotor that follows velocity set-points.

The vehicle is a point mass with roll and pitch. Its velocity follows the set-point with a lag. Acceleration and wind
tilt it, and the camera, which is fixed to it. The wind has a mean and gusts. Not here: rotors, batteries, terrain. The
axes and units are those of scene.py. Everything follows from the seed.
"""

from __future__ import annotations

import math

import numpy as np

from models.pad_pilot.lessons import PAD_RADIUS_M, Grounds
from models.pad_pilot.scene import COLOURS, SHAPES, SIDE_PX, Ground, Light, Pad, Pose, clutter, render

REACH_M = 4.5  # pads are at most this far from the origin, north and east
START_M = 2.5  # flights begin at most this far from it
START_HEIGHT_M = 4.5
LAG_S = 0.35  # time constant of the velocity
LEAN_LAG_S = 0.15
MOST_M_S2 = 3.0  # the autopilot's limit of acceleration
DRAG_PER_S = 0.15  # acceleration per difference between the wind's speed and the vehicle's
GUST_S = 1.5  # time constant of gusts
TICK_S = 0.02
G_M_S2 = 9.81


class World:
    """pads: their places; pose: the vehicle's. The autopilot keeps the vehicle above the ground until it lands."""

    def __init__(self, seed: int, grounds: Grounds, n_pads: int = 5, wind_m_s: float = 4.0) -> None:
        """wind_m_s: limit of the random mean wind; gusts are half of the mean."""
        self.rng = rng = np.random.default_rng([seed, 4242])
        self._grain = np.random.default_rng([seed, 4243])
        self.ground: Ground = grounds.pick(rng)
        self.light = Light.random(rng)
        self.pads = scattered(rng, n_pads)
        start = rng.uniform(-START_M, START_M, 2)
        self.things = [
            thing for thing in clutter(rng, REACH_M + 2, Pose())
            if all(np.hypot(*(thing[0] - (pad.north_m, pad.east_m)).T).min() > pad.radius_m * 1.15 for pad in self.pads)
        ]  # fmt: skip
        self.place = np.array([*start, START_HEIGHT_M])  # north, east, height
        self.velocity = np.zeros(3)  # north, east, up
        self.yaw_rad = rng.uniform(0, 2 * math.pi)
        self.lean = np.zeros(2)  # roll, pitch
        angle, speed = rng.uniform(0, 2 * math.pi), rng.uniform(0, wind_m_s)
        self.wind = np.array([speed * math.cos(angle), speed * math.sin(angle)])
        self.gust_m_s = speed / 2
        self._gust = np.zeros(2)
        self.down = False  # on the ground
        self._owed_s, self._n_ticks = 0.0, 0

    @property
    def pose(self) -> Pose:
        return Pose(*self.place, self.yaw_rad, *self.lean)

    @property
    def time_s(self) -> float:
        return self._n_ticks * TICK_S

    def picture(self, size_px: tuple[int, int] = (SIDE_PX, SIDE_PX)) -> np.ndarray:
        """The camera's picture now, (H, W, 3) uint8 RGB. Its noise has its own generator, apart from the flight's."""
        return render(self.pads, self.ground, self.pose, self._grain, size_px, 2, self.things, self.light)

    def fly(self, forward_m_s: float, right_m_s: float, down_m_s: float, yaw_rate_rad_s: float, seconds: float) -> None:
        """Follow a body-frame set-point for this many seconds."""
        self._owed_s += seconds  # a rest shorter than a tick is flown in the next call
        while self._owed_s >= TICK_S - 1e-9:
            self._owed_s -= TICK_S
            self._n_ticks += 1
            if not self.down:
                self._tick(forward_m_s, right_m_s, down_m_s, yaw_rate_rad_s)

    def _tick(self, forward_m_s: float, right_m_s: float, down_m_s: float, yaw_rate_rad_s: float) -> None:
        self.yaw_rad += yaw_rate_rad_s * TICK_S
        cos, sin = math.cos(self.yaw_rad), math.sin(self.yaw_rad)
        asked = np.array([forward_m_s * cos - right_m_s * sin, forward_m_s * sin + right_m_s * cos, -down_m_s])
        push = np.clip((asked - self.velocity) / LAG_S, -MOST_M_S2, MOST_M_S2)
        keep = math.exp(-TICK_S / GUST_S)
        self._gust = self._gust * keep + self.rng.normal(0, self.gust_m_s * math.sqrt(1 - keep**2), 2)
        drag = DRAG_PER_S * (self.wind + self._gust - self.velocity[:2])
        self.velocity += push * TICK_S
        self.velocity[:2] += drag * TICK_S
        self.place += self.velocity * TICK_S
        # The rotors give `push` and balance gravity: nose down to go forward, right side down to go right.
        ahead, aside = push[0] * cos + push[1] * sin, -push[0] * sin + push[1] * cos
        wanted = np.array([math.atan2(aside, G_M_S2), -math.atan2(ahead, G_M_S2)])
        self.lean += (wanted - self.lean) * TICK_S / LEAN_LAG_S
        if self.place[2] <= 0.05:
            self.place[2], self.down = 0.05, True
            self.velocity[:] = 0

    def offset_m(self, pad: Pad) -> float:
        """Horizontal distance from the vehicle to a pad's centre."""
        return math.hypot(pad.north_m - self.place[0], pad.east_m - self.place[1])

    def nearest(self) -> Pad:
        return min(self.pads, key=self.offset_m)


def scattered(rng: np.random.Generator, n: int) -> list[Pad]:
    """n pads of different kinds that do not touch each other."""
    kinds = [(c, s) for c in COLOURS for s in SHAPES]
    pads: list[Pad] = []
    order = rng.permutation(len(kinds))
    while len(pads) < n:
        place = rng.uniform(-REACH_M, REACH_M, 2)
        radius = rng.uniform(*PAD_RADIUS_M)
        if all(math.hypot(*(place - (p.north_m, p.east_m))) > 0.3 + radius + p.radius_m for p in pads):
            colour, shape = kinds[order[len(pads)]]
            pads.append(Pad(colour, shape, *place, radius, rng.uniform(0, 2 * math.pi)))
    return pads
