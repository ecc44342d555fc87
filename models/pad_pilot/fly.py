"""The simulated world as a process: it pushes the camera's frames, and the vehicle follows the daemon's actions.

    edge-agent run --config pilot.yaml &                                     # camera: {source: "zmq:ipc:///…/frames"}
    python -m models.pad_pilot.fly --runtime DIR --frames ipc:///…/frames --seed 3 --out flight/

It pushes frames with FramePusher and reads actions with Client, as any controller does. Without an answer, the vehicle
holds its position. One step is one frame, one answer, and half a second of the world's time. While the model works, the
vehicle follows the previous answer, but follows no answer for longer than half a second. A mission is a few orders. The
next order is sent with `instruct` when the order before it is done. The files of a flight are flight.json (every step),
flight.png (path and frames) and flight.mp4.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from edge_agent.client import Client, FramePusher
from edge_agent.wire.messages import Action, Refusal
from models.pad_pilot import task
from models.pad_pilot.lessons import Grounds, training_photographs
from models.pad_pilot.scene import Pad, Pose, homography, render
from models.pad_pilot.task import Order
from models.pad_pilot.world import START_HEIGHT_M, World

STEP_S = 0.5  # the same time as valid_for_ms in the action space
MAX_STEPS = 60  # per order; after more steps the order has failed with "lost"
MAX_ANSWER_S = 2.0  # the longest wait for an answer; then the vehicle holds its position
SEARCH_M_S = 2.0
SEARCH_LEG_M = 3.0  # length of the square spiral's first two legs; it grows by this after every two legs
AREA_M = 3.5  # half side of the square around home in which the vehicle searches; the camera shows more than the square
LANDING_M_S = 0.7  # straight down, by the autopilot itself; later answers change nothing
HOLD_M_S = 1.0  # maximum speed back to the position to hold
HOLDS_TO_ARRIVE = 2  # consecutive "hold" answers
ARRIVED_M = 1.0  # maximum distance from the centre of the pad


class Step(NamedTuple):
    """One frame and its answer."""

    time_s: float
    pose: Pose
    instruction: str
    answer: Action | Refusal | None
    picture: np.ndarray


class Result(NamedTuple):
    """How an order ended. outcome: right, wrong pad, beside (not on a pad), lost (too many steps)."""

    instruction: str
    outcome: str
    steps: int
    off_m: float  # distance from the centre of the right pad


class DaemonLink:
    """The vehicle's end of the sockets: pushes one frame, and waits for the answer to exactly this frame."""

    def __init__(self, runtime: str, frames: str) -> None:
        """runtime: the daemon's runtime folder. frames: the endpoint of its zmq: camera."""
        self.client = Client(runtime)
        self._pusher = FramePusher(frames)
        self.frame_id = int(time.monotonic() * 1000)  # larger than the ids of an earlier process

    def close(self) -> None:
        self.client.close()
        self._pusher.close()

    def __enter__(self) -> DaemonLink:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def push(self, picture: np.ndarray) -> int:
        """picture: (H, W, 3) uint8 RGB. Returns the frame's id. A frame that no daemon takes is dropped."""
        self.frame_id += 1
        self._pusher.push(picture, frame_id=self.frame_id, t_capture_ns=time.monotonic_ns())
        return self.frame_id

    def answer(self, picture: np.ndarray, timeout_s: float = MAX_ANSWER_S) -> Action | Refusal | None:
        """The daemon's answer to this picture. None: no answer within timeout_s."""
        frame_id, until_s = self.push(picture), time.monotonic() + timeout_s
        while (left_s := until_s - time.monotonic()) > 0:
            answer = self.client.next_answer(left_s)
            if answer is not None and answer.frame_id == frame_id:
                return answer
        return None

    def wait(self, picture: np.ndarray, timeout_s: float = 60.0) -> None:
        """Push a picture again and again until the daemon answers. Raises TimeoutError."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            self.push(picture)
            if self.client.next_answer(0.3) is not None:  # to any of these frames: the first answers can be slow
                return
        raise TimeoutError(f"{self.client.folder}: no answer to a frame in {timeout_s:g} s; is edge-agent running?")


class Search:
    """The search pattern of the vehicle, inside its area and at the start height, where the camera shows a large area.

    If there was a move, the vehicle first flies on in its direction. Then it flies a square spiral.
    """

    def __init__(self) -> None:
        self.corners: list[np.ndarray] = []
        # Velocity (north, east) of the last move. While the vehicle is tilted, the pad may be outside the picture.
        self.last_move_m_s: np.ndarray | None = None

    def begin(self, world: World) -> None:
        corner, heading = world.position_m[:2].copy(), np.array([1.0, 0.0])
        self.corners = []
        if self.last_move_m_s is not None and (speed_m_s := np.hypot(*self.last_move_m_s)) > 0.05:
            corner = np.clip(corner + self.last_move_m_s / speed_m_s * SEARCH_LEG_M, -AREA_M, AREA_M)
            self.corners.append(corner)
        for leg in range(12):
            corner = corner + heading * SEARCH_LEG_M * (leg // 2 + 1)
            heading = np.array([-heading[1], heading[0]])
            self.corners.append(np.clip(corner, -AREA_M, AREA_M))

    def velocity_m_s(self, world: World) -> tuple[float, float, float]:
        """Body-frame forward, right, down."""
        if not self.corners:
            self.begin(world)
        away = self.corners[0] - world.position_m[:2]
        if np.hypot(*away) < 0.8 and len(self.corners) > 1:
            self.corners.pop(0)
        down_m_s = float(np.clip(world.position_m[2] - START_HEIGHT_M, -1.0, 1.0))
        return *velocity_toward(world, self.corners[0], SEARCH_M_S), down_m_s


def velocity_toward(world: World, position_m: np.ndarray, max_speed_m_s: float) -> tuple[float, float]:
    """Body-frame velocity (forward, right) towards a position (north, east). It is slower within the last metre."""
    away = position_m - world.position_m[:2]
    north, east = away / max(1.0, np.hypot(*away)) * max_speed_m_s
    cos, sin = math.cos(world.yaw_rad), math.sin(world.yaw_rad)
    return north * cos + east * sin, -north * sin + east * cos


def to_north_east(world: World, forward: float, right: float) -> np.ndarray:
    """Body-frame forward and right -> north and east."""
    cos, sin = math.cos(world.yaw_rad), math.sin(world.yaw_rad)
    return np.array([forward * cos - right * sin, forward * sin + right * cos])


def fly(
    link: DaemonLink,
    world: World,
    mission: list[tuple[str, Order]],
    on_step: Callable[[Step], None] = lambda step: None,
    pace_s: float = 0.0,
    clock_s: Callable[[], float] = time.monotonic,
) -> list[Result]:
    """Fly a mission. It ends with the first order that fails.

    pace_s: minimum duration of a step, for people who watch. clock_s: measures how long an answer takes; the same time
    passes in the world.
    """
    results = []
    for instruction, order in mission:
        link.client.instruct(instruction)
        results.append(_fly_order(link, world, (instruction, order), on_step, pace_s, clock_s))
        if results[-1].outcome != "right":
            break
    return results


def _fly_order(
    link: DaemonLink,
    world: World,
    instruction_and_order: tuple[str, Order],
    on_step: Callable[[Step], None],
    pace_s: float,
    clock_s: Callable[[], float],
) -> Result:
    instruction, order = instruction_and_order
    search, n_holds, is_landing, valid_s = Search(), 0, False, 0.0
    set_point, hold_position_m = (0.0, 0.0, 0.0, 0.0), None
    target = pad_of(world, order)
    for n in range(1, MAX_STEPS + 1):
        began_s = clock_s()
        picture, time_s, pose = world.picture(), world.time_s, world.pose
        answer, latency_s = None, 0.0
        if not is_landing:
            answer = link.answer(picture)
            latency_s = clock_s() - began_s
            world.fly(*set_point, min(latency_s, valid_s))  # the world did not wait for the model
            world.fly(0.0, 0.0, 0.0, 0.0, max(0.0, latency_s - valid_s))  # the previous answer has expired
        on_step(Step(time_s, pose, instruction, answer, picture))
        action_type = answer.type if isinstance(answer, Action) else ""
        n_holds = n_holds + 1 if action_type == "hold" else 0
        is_landing = is_landing or action_type == "land"
        if is_landing or action_type not in ("move", "search"):  # land, hold, a refusal, or silence
            hold_position_m = world.position_m[:2].copy() if hold_position_m is None else hold_position_m
            set_point = (*velocity_toward(world, hold_position_m, HOLD_M_S), LANDING_M_S if is_landing else 0.0, 0.0)
        elif action_type == "move":
            v, hold_position_m = answer.values, None
            set_point = (v["forward_m_s"], v["right_m_s"], v["down_m_s"], v["yaw_rate_rad_s"])
            search.corners = []  # a later search starts here
            search.last_move_m_s = to_north_east(world, *set_point[:2])
        else:
            set_point, hold_position_m = (*search.velocity_m_s(world), 0.0), None
        flown_s = max(0.0, STEP_S - latency_s)
        world.fly(*set_point, flown_s)
        valid_s = STEP_S - flown_s  # how long this answer stays valid while the next one is computed
        if world.is_landed or (n_holds >= HOLDS_TO_ARRIVE and order.kind != "land"):  # in a landing, "hold" is a pause
            return Result(instruction, outcome_of(world, order), n, world.offset_m(target))
        time.sleep(max(0.0, began_s + pace_s - clock_s()))
    return Result(instruction, "lost", MAX_STEPS, world.offset_m(target))


def pad_of(world: World, order: Order) -> Pad:
    return next(pad for pad in world.pads if (pad.colour, pad.shape) == order[1:])


def outcome_of(world: World, order: Order) -> str:
    """The outcome of an order that has ended: on the ground, or by "hold"."""
    nearest, is_landed = world.nearest(), world.is_landed
    if world.offset_m(nearest) > (nearest.radius_m if is_landed else ARRIVED_M):
        return "beside"
    if nearest is not pad_of(world, order):
        return "wrong pad"
    return "right" if is_landed == (order.kind == "land") else "beside"  # it landed, but the order was to go there


def random_mission(rng: np.random.Generator, pads: list[Pad], n_orders: int) -> list[tuple[str, Order]]:
    """An order for each of n_orders different pads, in a random language. The last order is to land."""
    chosen = [pads[i] for i in rng.permutation(len(pads))[:n_orders]]
    mission = []
    for n, pad in enumerate(chosen):
        order = Order("land" if n == len(chosen) - 1 else "goto", pad.colour, pad.shape)
        mission.append((task.random_instruction(rng, str(rng.choice(task.LANGUAGES)), order), order))
    return mission


# -- the record --------------------------------------------------------------------------------------------------------

MAP_PX, MAP_POSE = 560, Pose(height_m=11.0)
PATH_COLOURS = {"move": (60, 255, 60), "search": (255, 170, 0), "hold": (0, 220, 255), "land": (255, 60, 255)}


def caption(step: Step) -> str:
    """The time and the answer in one line."""
    answer = step.answer
    if isinstance(answer, Action):
        values = [f"{name.split('_')[0]} {value:+.2f}" for name, value in answer.values.items() if value]
        description = " ".join([answer.type, *values])
    else:
        description = "landing" if answer is None else f"none: {answer.reason}"
    return f"{step.time_s:5.1f} s  {description}"


def ground_map(world: World) -> np.ndarray:
    """The ground and its pads from above, (MAP_PX, MAP_PX, 3) uint8 RGB."""
    return render(world.pads, world.ground, MAP_POSE, np.random.default_rng(0), (MAP_PX, MAP_PX), 2, world.objects)


def path_map(ground: np.ndarray, steps: list[Step]) -> np.ndarray:
    """The path so far, on a copy of ground_map()."""
    image = ground.copy()
    to_picture = homography(MAP_POSE, MAP_PX, MAP_PX)
    places = np.array([[s.pose.north_m, s.pose.east_m, 1.0] for s in steps]) @ to_picture.T
    xy = np.round(places[:, :2] / places[:, 2:]).astype(int)
    cv2.polylines(image, [xy], False, (0, 0, 0), 4, cv2.LINE_AA)
    for i in range(1, len(xy)):
        action_type = steps[i].answer.type if isinstance(steps[i].answer, Action) else ""
        colour = PATH_COLOURS.get(action_type, (255, 255, 255))
        cv2.line(image, xy[i - 1].tolist(), xy[i].tolist(), colour, 2, cv2.LINE_AA)
    cv2.circle(image, xy[0].tolist(), 5, (255, 255, 255), -1, cv2.LINE_AA)
    cv2.drawMarker(image, xy[-1].tolist(), (255, 255, 255), cv2.MARKER_TILTED_CROSS, 14, 2, cv2.LINE_AA)
    return image


def _draw_text(image: np.ndarray, text: str, at: tuple[int, int], size: float = 0.45) -> None:
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))  # without accents
    text = bare.encode("ascii", "replace").decode()  # OpenCV before version 5 can draw only ASCII
    for corner_px, colour in (((at[0] + 1, at[1] + 1), (0, 0, 0)), (at, (255, 255, 255))):
        cv2.putText(image, text, corner_px, cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)


def draw_flight(world: World, steps: list[Step], results: list[Result]) -> np.ndarray:
    """The whole flight as one image: the path, and twelve frames with their answers."""
    page = np.full((MAP_PX + 30 * len(results), MAP_PX + 4 * 200, 3), 32, np.uint8)
    page[:MAP_PX, :MAP_PX] = path_map(ground_map(world), steps)
    for i, n in enumerate(np.linspace(0, len(steps) - 1, 12).round().astype(int)):
        top, left = i // 4 * 187, MAP_PX + i % 4 * 200 + 8
        page[top : top + 168, left : left + 184] = cv2.resize(steps[n].picture, (184, 168))
        _draw_text(page, caption(steps[n]), (left, top + 181), 0.34)
    for i, (name, colour) in enumerate(PATH_COLOURS.items()):
        cv2.line(page, (MAP_PX + 8 + 100 * i, MAP_PX + 15), (MAP_PX + 30 + 100 * i, MAP_PX + 15), colour, 3)
        _draw_text(page, name, (MAP_PX + 36 + 100 * i, MAP_PX + 20))
    for i, result in enumerate(results):
        _draw_text(page, f"{result.instruction}: {result.outcome}, {result.steps} steps", (10, MAP_PX + 20 + 30 * i))
    return page


def write_video(path: Path, world: World, steps: list[Step], fps: float = 5.0) -> None:
    """Write a video: the camera's picture beside the path so far, one step per frame."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (2 * MAP_PX, MAP_PX))
    if not writer.isOpened():
        raise OSError(f"{path}: OpenCV cannot write a video here")
    ground = ground_map(world)
    for n, step in enumerate(steps, 1):
        view = cv2.resize(step.picture, (MAP_PX, MAP_PX), interpolation=cv2.INTER_CUBIC)
        _draw_text(view, caption(step), (12, MAP_PX - 16), 0.6)
        _draw_text(view, step.instruction, (12, 28), 0.7)
        writer.write(np.hstack([view, path_map(ground, steps[:n])])[..., ::-1])
    writer.release()


def to_json(steps: list[Step], results: list[Result], world: World) -> dict:
    return {
        "wind_m_s": round(float(np.hypot(*world.wind_mean_m_s)), 2),
        "results": [result._asdict() for result in results],
        "steps": [
            {
                "time_s": round(s.time_s, 2),
                "pose": {k: round(float(v), 3) for k, v in s.pose._asdict().items()},
                "instruction": s.instruction,
                "action": s.answer.type if isinstance(s.answer, Action) else None,
                "values": s.answer.values if isinstance(s.answer, Action) else {},
                "refusal": s.answer.reason if isinstance(s.answer, Refusal) else None,
                "age_ms": s.answer.age_ms if s.answer is not None else None,
            }
            for s in steps
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", default="", help="the daemon's runtime folder")
    parser.add_argument("--frames", required=True, help="the endpoint of its zmq: camera, ipc:///absolute/path")
    parser.add_argument("--seed", type=int, default=3, help="of world and mission (default 3)")
    parser.add_argument("--orders", type=int, default=3, help="pads to visit; the last is landed on (default 3)")
    parser.add_argument("--pace", type=float, default=0.0, help="minimum duration of a step in seconds")
    parser.add_argument("--out", type=Path, required=True, help="folder for flight.json, flight.png, flight.mp4")
    options = parser.parse_args()
    world = World(options.seed, Grounds(training_photographs(), options.seed + 10**6))
    mission = random_mission(np.random.default_rng([options.seed, 5]), world.pads, options.orders)
    options.out.mkdir(parents=True, exist_ok=True)
    steps: list[Step] = []
    with DaemonLink(options.runtime, options.frames) as link:
        link.wait(world.picture())
        results = fly(link, world, mission, steps.append, options.pace)
    (options.out / "flight.json").write_text(json.dumps(to_json(steps, results, world), indent=1, ensure_ascii=False))
    cv2.imwrite(str(options.out / "flight.png"), draw_flight(world, steps, results)[..., ::-1])
    write_video(options.out / "flight.mp4", world, steps)
    for result in results:
        print(f"{result.instruction}  {result.outcome}, {result.steps} steps, {result.off_m:.2f} m off", flush=True)
    return 0 if len(results) == len(mission) and all(result.outcome == "right" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
