"""The demo flight with an autopilot between: daemon -> edge-agent mavlink -> simulated autopilot -> world.

Nothing here follows an action. Frames go to the daemon as in fly.py; the bridge, a process of its own, reads the
actions and commands the autopilot over MAVLink; the autopilot flies the world. The pilot arms, changes the mode, and
gives the instructions.

One step is half a second of the world's time, as in fly.py. While the model works, time passes in the world as it
passes here; when the bridge has reacted, the rest of the step is flown at once. So the autopilot moves faster than
real time seen from the bridge, by the share of a step that is skipped; `pace_s` 0.5 flies in real time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from edge_agent.wire.messages import Action, Refusal
from models.autopilot.autopilot import STILL
from models.autopilot.bodies import Vector
from models.autopilot.driver import Driver
from models.pad_pilot.fly import (
    HOLDS_TO_ARRIVE,
    MAX_STEPS,
    STEP_S,
    DaemonLink,
    Result,
    Step,
    outcome_of,
    pad_of,
)
from models.pad_pilot.task import Order
from models.pad_pilot.world import TICK_S, World

REACTION_S = 0.25  # the bridge reacts within milliseconds; a setpoint that is not there by then does not come
READY_S = 30.0  # until the bridge knows the autopilot, its home and its mode


class WorldBody:
    """A world as an autopilot's vehicle: axes north, east, down."""

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def position_m(self) -> Vector:
        north, east, height = self.world.position_m
        return (float(north), float(east), -float(height))

    @property
    def velocity_m_s(self) -> Vector:
        north, east, up = self.world.velocity_m_s
        return (float(north), float(east), -float(up))

    @property
    def attitude_rad(self) -> Vector:
        roll, pitch = self.world.tilt_rad
        return (float(roll), float(pitch), self.world.yaw_rad)

    @property
    def is_landed(self) -> bool:
        return self.world.is_landed

    def fly(self, velocity_m_s: Vector, yaw_rate_rad_s: float, seconds: float) -> None:
        north, east, down = velocity_m_s
        while seconds > 1e-9:  # the world turns the body's axes with the vehicle, the autopilot's velocity stays
            tick_s = min(seconds, TICK_S)
            forward, right = to_body(self.world, north, east)
            self.world.fly(forward, right, down, yaw_rate_rad_s, tick_s)
            seconds -= tick_s


class Counts(NamedTuple):
    """How the bridge reacted, over a flight."""

    followed: int = 0  # a setpoint that is not zero
    held: int = 0  # zero velocity, or nothing
    landings: int = 0


class MavlinkVehicle:
    """A simulated autopilot with the pilot's switches, and the world that it flies."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.autopilot = driver, driver.autopilot
        self.counts = Counts()

    @property
    def is_on_its_own(self) -> bool:
        """The autopilot lands, or has left the mode in which it follows setpoints."""
        return self.autopilot.mode != self.autopilot.flavour.external_mode

    def take_off(self, world: World, link: DaemonLink) -> None:
        """Put the vehicle into a world, in the air, and enter the mode that follows setpoints. Raises TimeoutError.

        PX4 enters it only while setpoints come, so frames are pushed until it does."""
        autopilot, until_s = self.autopilot, time.monotonic() + READY_S
        with self.driver.lock:
            autopilot.real_time = False
            autopilot.disarm()
            autopilot.set_mode(autopilot.flavour.first_mode)
            autopilot.body, autopilot.home_m = WorldBody(world), STILL
            autopilot.arm()
        while not autopilot.accepts_external_mode():
            if time.monotonic() > until_s:
                raise TimeoutError("the bridge sends no setpoints; is edge-agent mavlink running?")
            link.answer(world.picture())
        with self.driver.lock:
            autopilot.set_mode(autopilot.flavour.external_mode)
            began_ns = time.monotonic_ns()
        # The bridge learns the mode from a HEARTBEAT, and then sends hold or a setpoint for each action.
        while not any(item.t_ns > began_ns and item.outcome == "followed" for item in self.driver.setpoints[-5:]):
            if time.monotonic() > until_s:
                raise TimeoutError("the bridge sends no setpoints; is edge-agent mavlink running?")
            link.answer(world.picture())

    def react(self, answer: Action | Refusal | None) -> None:
        """Wait until the bridge has done what it does with this answer, and count it."""
        if not isinstance(answer, Action):
            return
        moves = answer.type in ("move", "search", "waypoint")

        def has_reacted() -> bool:
            newer = [item for item in self.driver.setpoints[-20:] if item.t_ns >= answer.t_pub_ns]
            if moves:
                return any((item.message.vx, item.message.vy, item.message.vz) != STILL for item in newer)
            return self.is_on_its_own if answer.type == "land" else bool(newer)

        has_followed = self.driver.happens(has_reacted, REACTION_S)
        is_landing = answer.type == "land" and has_followed
        self.counts = Counts(
            self.counts.followed + (moves and has_followed),
            self.counts.held + (not has_followed),
            self.counts.landings + is_landing,
        )

    def fly(self, seconds: float) -> None:
        with self.driver.lock:
            self.autopilot.fly(seconds)

    def let_time_pass(self, is_real: bool) -> None:
        with self.driver.lock:
            self.autopilot.step()
            self.autopilot.real_time = is_real


def to_body(world: World, north: float, east: float) -> tuple[float, float]:
    """North and east -> forward and right."""
    cos, sin = math.cos(world.yaw_rad), math.sin(world.yaw_rad)
    return north * cos + east * sin, -north * sin + east * cos


def fly_mavlink(
    link: DaemonLink,
    vehicle: MavlinkVehicle,
    world: World,
    mission: list[tuple[str, Order]],
    on_step: Callable[[Step], None] = lambda step: None,
    pace_s: float = 0.0,
) -> list[Result]:
    """Fly a mission. It ends with the first order that fails. As fly() of fly.py, with the same outcomes."""
    results = []
    for n, (instruction, order) in enumerate(mission):
        link.client.instruct(instruction)
        if n == 0:
            vehicle.take_off(world, link)
        results.append(_fly_order(link, vehicle, world, (instruction, order), on_step, pace_s))
        if results[-1].outcome != "right":
            break
    return results


def _fly_order(
    link: DaemonLink,
    vehicle: MavlinkVehicle,
    world: World,
    instruction_and_order: tuple[str, Order],
    on_step: Callable[[Step], None],
    pace_s: float,
) -> Result:
    (instruction, order), n_holds = instruction_and_order, 0
    target = pad_of(world, order)
    for n in range(1, MAX_STEPS + 1):
        began_s = time.monotonic()
        picture, time_s, pose = world.picture(), world.time_s, world.pose
        answer = None
        if not vehicle.is_on_its_own:
            vehicle.let_time_pass(True)
            answer = link.answer(picture)
            vehicle.react(answer)
            vehicle.let_time_pass(False)
        on_step(Step(time_s, pose, instruction, answer, picture))
        n_holds = n_holds + 1 if isinstance(answer, Action) and answer.type == "hold" else 0
        vehicle.fly(max(0.0, STEP_S - (world.time_s - time_s)))
        if world.is_landed or (n_holds >= HOLDS_TO_ARRIVE and order.kind != "land"):
            return Result(instruction, outcome_of(world, order), n, world.offset_m(target))
        if not vehicle.is_on_its_own:  # its own landing needs no telemetry to be followed
            time.sleep(max(0.0, began_s + pace_s - time.monotonic()))
    return Result(instruction, "lost", MAX_STEPS, world.offset_m(target))
