"""A simple simulated world: pads on a ground, wind, and a multirotor that follows velocity set-points.

The vehicle is a point mass with roll and pitch. Its velocity follows the set-point with a lag. Acceleration and wind
tilt the vehicle and the camera, which is fixed to it. The wind has a mean and gusts. This module does not simulate
rotors, batteries or terrain. The axes and units are those of scene.py. The same seed gives the same flight.
"""

from __future__ import annotations

import math

import numpy as np

from models.pad_pilot.lessons import PAD_RADIUS_M, Grounds
from models.pad_pilot.scene import COLOURS, SHAPES, SIDE_PX, Ground, Light, Pad, Pose, clutter, render

MAX_PAD_OFFSET_M = 4.5  # pads are at most this far from the origin, north and east
MAX_START_OFFSET_M = 2.5  # flights begin at most this far from it
START_HEIGHT_M = 4.5
LAG_S = 0.35  # time constant of the velocity
TILT_LAG_S = 0.15  # time constant of roll and pitch
MAX_ACCELERATION_M_S2 = 3.0  # the autopilot's limit of acceleration
DRAG_PER_S = 0.15  # acceleration per difference between wind velocity and vehicle velocity
GUST_TIME_S = 1.5  # time constant of gusts
TICK_S = 0.02
G_M_S2 = 9.81


class World:
    """pads: the pads on the ground. pose: the pose of the vehicle. A vehicle that has landed does not move any more."""

    def __init__(self, seed: int, grounds: Grounds, n_pads: int = 5, wind_m_s: float = 4.0) -> None:
        """wind_m_s: upper limit of the random mean wind. The standard deviation of gusts is half of the mean."""
        self.rng = rng = np.random.default_rng([seed, 4242])
        self._noise_rng = np.random.default_rng([seed, 4243])
        self.ground: Ground = grounds.pick(rng)
        self.light = Light.random(rng)
        self.pads = random_pads(rng, n_pads)
        start_m = rng.uniform(-MAX_START_OFFSET_M, MAX_START_OFFSET_M, 2)
        self.objects = [
            item for item in clutter(rng, MAX_PAD_OFFSET_M + 2, Pose())
            if all(np.hypot(*(item[0] - (pad.north_m, pad.east_m)).T).min() > pad.radius_m * 1.15 for pad in self.pads)
        ]  # fmt: skip
        self.position_m = np.array([*start_m, START_HEIGHT_M])  # north, east, height
        self.velocity_m_s = np.zeros(3)  # north, east, up
        self.yaw_rad = rng.uniform(0, 2 * math.pi)
        self.tilt_rad = np.zeros(2)  # roll, pitch
        direction_rad, speed_m_s = rng.uniform(0, 2 * math.pi), rng.uniform(0, wind_m_s)
        self.wind_mean_m_s = np.array([speed_m_s * math.cos(direction_rad), speed_m_s * math.sin(direction_rad)])
        self.gust_std_m_s = speed_m_s / 2
        self._gust_m_s = np.zeros(2)
        self.is_landed = False  # on the ground
        self._remaining_s, self._n_ticks = 0.0, 0

    @property
    def pose(self) -> Pose:
        return Pose(*self.position_m, self.yaw_rad, *self.tilt_rad)

    @property
    def time_s(self) -> float:
        return self._n_ticks * TICK_S

    def picture(self, size_px: tuple[int, int] = (SIDE_PX, SIDE_PX)) -> np.ndarray:
        """The camera's picture now, (H, W, 3) uint8 RGB. Its noise has its own generator, so it changes no flight."""
        return render(self.pads, self.ground, self.pose, self._noise_rng, size_px, 2, self.objects, self.light)

    def fly(self, forward_m_s: float, right_m_s: float, down_m_s: float, yaw_rate_rad_s: float, seconds: float) -> None:
        """Follow a body-frame set-point for this many seconds."""
        self._remaining_s += seconds  # time shorter than a tick is flown in the next call
        while self._remaining_s >= TICK_S - 1e-9:
            self._remaining_s -= TICK_S
            self._n_ticks += 1
            if not self.is_landed:
                self._tick(forward_m_s, right_m_s, down_m_s, yaw_rate_rad_s)

    def _tick(self, forward_m_s: float, right_m_s: float, down_m_s: float, yaw_rate_rad_s: float) -> None:
        self.yaw_rad += yaw_rate_rad_s * TICK_S
        cos, sin = math.cos(self.yaw_rad), math.sin(self.yaw_rad)
        set_point_m_s = np.array([forward_m_s * cos - right_m_s * sin, forward_m_s * sin + right_m_s * cos, -down_m_s])
        acceleration_m_s2 = (set_point_m_s - self.velocity_m_s) / LAG_S
        acceleration_m_s2 = np.clip(acceleration_m_s2, -MAX_ACCELERATION_M_S2, MAX_ACCELERATION_M_S2)
        decay = math.exp(-TICK_S / GUST_TIME_S)
        self._gust_m_s = self._gust_m_s * decay + self.rng.normal(0, self.gust_std_m_s * math.sqrt(1 - decay**2), 2)
        drag_m_s2 = DRAG_PER_S * (self.wind_mean_m_s + self._gust_m_s - self.velocity_m_s[:2])
        self.velocity_m_s += acceleration_m_s2 * TICK_S
        self.velocity_m_s[:2] += drag_m_s2 * TICK_S
        self.position_m += self.velocity_m_s * TICK_S
        # The rotors give the acceleration and balance gravity: nose down to go forward, right side down to go right.
        north_m_s2, east_m_s2, _ = acceleration_m_s2
        forward_m_s2, right_m_s2 = north_m_s2 * cos + east_m_s2 * sin, -north_m_s2 * sin + east_m_s2 * cos
        target_tilt_rad = np.array([math.atan2(right_m_s2, G_M_S2), -math.atan2(forward_m_s2, G_M_S2)])
        self.tilt_rad += (target_tilt_rad - self.tilt_rad) * TICK_S / TILT_LAG_S
        if self.position_m[2] <= 0.05:
            self.position_m[2], self.is_landed = 0.05, True
            self.velocity_m_s[:] = 0

    def offset_m(self, pad: Pad) -> float:
        """Horizontal distance from the vehicle to a pad's centre."""
        return math.hypot(pad.north_m - self.position_m[0], pad.east_m - self.position_m[1])

    def nearest(self) -> Pad:
        return min(self.pads, key=self.offset_m)


def random_pads(rng: np.random.Generator, n: int) -> list[Pad]:
    """n pads of different kinds that do not touch each other."""
    kinds = [(c, s) for c in COLOURS for s in SHAPES]
    pads: list[Pad] = []
    order = rng.permutation(len(kinds))
    while len(pads) < n:
        position_m = rng.uniform(-MAX_PAD_OFFSET_M, MAX_PAD_OFFSET_M, 2)
        radius = rng.uniform(*PAD_RADIUS_M)
        if all(math.hypot(*(position_m - (p.north_m, p.east_m))) > 0.3 + radius + p.radius_m for p in pads):
            colour, shape = kinds[order[len(pads)]]
            pads.append(Pad(colour, shape, *position_m, radius, rng.uniform(0, 2 * math.pi)))
    return pads
