"""The trained pilot through the real daemon: held-out frames, questions, flights, and its behaviour without answers.

The limits here are for few frames, and low: only a broken chain misses them. benchmarks/flight.py measures the figures.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_agent.wire.messages import Action, Refusal
from tests.harness import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import flight as benchmark

from models.pad_pilot import fly
from models.pad_pilot.lessons import Grounds
from models.pad_pilot.scene import Pad
from models.pad_pilot.task import Exchange, Order
from models.pad_pilot.world import START_HEIGHT_M, World

CHECKPOINT = ROOT / "models" / "pad_pilot" / "checkpoint"
LAND = [("Land on the red disc.", Order("land", "red", "disc"))]


@pytest.fixture(scope="module")
def bundle(build) -> Path:
    return build(CHECKPOINT, "Q4_K_M")


@pytest.fixture(scope="module")
def link(bundle: Path) -> Iterator[fly.DaemonLink]:
    with benchmark.pilot(bundle, "onnxruntime") as link:
        yield link


def calm(*pads: Pad, seed: int = 1, wind_m_s: float = 0.0) -> World:
    """A world with only these pads, by default without wind."""
    world = World(seed, Grounds([], seed, n=2), wind_m_s=wind_m_s)
    world.pads, world.objects = list(pads), []
    world.position_m[:2] = 0
    return world


class PatientLink:
    """For a busy machine: pushes a picture again until there is an answer. With no_time() the world waits, too."""

    def __init__(self, link: fly.DaemonLink) -> None:
        self.link, self.client = link, link.client
        self.is_patient = True

    def answer(self, picture: np.ndarray, timeout_s: float = 0.0) -> Action | Refusal | None:
        for _ in range(benchmark.PUSHES if self.is_patient else 1):
            answer = self.link.answer(picture, benchmark.PUSH_TIMEOUT_S if self.is_patient else 0.05)
            if answer is not None or not self.is_patient:
                return answer
        raise AssertionError("no answer")


def no_time() -> float:
    """A clock for fly(): every answer takes no time."""
    return 0.0


# -- with the trained model --------------------------------------------------------------------------------------------


def test_the_bundle_is_small(bundle: Path):
    assert sum(file.stat().st_size for file in bundle.iterdir()) <= 12e6


@pytest.mark.parametrize(("backend", "n"), [("onnxruntime", 16), ("mtmd", 10)])
def test_it_answers_held_out_frames(bundle: Path, request: pytest.FixtureRequest, backend: str, n: int):
    shown = benchmark.frames(n, benchmark.SEED + 1000, benchmark.held_out_photographs())
    assert len(shown) == n
    running = contextlib.nullcontext(request.getfixturevalue("link")) if backend == "onnxruntime" else None
    with running or benchmark.pilot(bundle, backend) as link:
        questions = [f.exercise.exchanges[0].question if f.exercise.exchanges else "" for f in shown]
        answers = [
            benchmark.answer(link, f.picture, f.exercise.instruction, question)
            for f, question in zip(shown, questions, strict=True)
        ]
    scores = benchmark.against_the_rule(shown, answers)
    assert scores["type_right"][0] >= 1 - 1.01 / n  # one may be wrong
    assert scores["velocity_mae_m_s"] <= 0.04
    assert scores["words_right"][0] >= 0.88
    assert scores["wrong_land"] == 0


def test_it_flies_to_one_pad_and_lands_on_another(link: fly.DaemonLink, tmp_path: Path):
    world = World(5, Grounds([], 5, n=4))
    mission = fly.random_mission(np.random.default_rng(5), world.pads, 2)
    steps: list[fly.Step] = []
    results = fly.fly(PatientLink(link), world, mission, steps.append, clock_s=no_time)
    assert [result.outcome for result in results] == ["right", "right"], results
    assert world.is_landed and world.offset_m(world.nearest()) <= world.nearest().radius_m
    assert {step.instruction for step in steps} == {instruction for instruction, _ in mission}
    answered = [step for step in steps if step.answer is not None]
    assert all(step.answer.instruction == step.instruction for step in answered)  # each under its own order
    record = json.loads(json.dumps(fly.to_json(steps, results, world)))
    assert len(record["steps"]) == len(steps) == sum(result["steps"] for result in record["results"])
    page = fly.draw_flight(world, steps, results)
    assert page.shape[2] == 3 and page.dtype == np.uint8
    fly.write_video(tmp_path / "flight.mp4", world, steps)
    video = cv2.VideoCapture(str(tmp_path / "flight.mp4"))
    assert int(video.get(cv2.CAP_PROP_FRAME_COUNT)) == len(steps)


@pytest.mark.parametrize("instruction", ["Lande auf der roten Scheibe.", "빨간 원반에 착륙하세요."])
def test_it_lands_with_orders_in_other_languages(link: fly.DaemonLink, instruction: str):
    pads = Pad("red", "disc", 1.0, -1.0, 0.5, 0.3), Pad("red", "square", -1.5, 1.5, 0.5, 1.0)
    world = calm(*pads, wind_m_s=1.5)  # without wind the picture, and so the answer "hold", may repeat for long
    (result,) = fly.fly(PatientLink(link), world, [(instruction, LAND[0][1])], clock_s=no_time)
    assert result.outcome == "right", result


def test_it_does_not_land_without_the_right_pad(link: fly.DaemonLink):
    counts = benchmark.bad_input(link, 2, benchmark.held_out_photographs())
    too_small = ("frame of 64x64", "frame of 300x96")  # the model card says so: sides below 112 pixels
    assert [name for name, row in counts.items() if row["wrong_land"] and name not in too_small] == []
    assert sum(counts[name]["wrong_land"] for name in too_small) <= 1  # over the right pad, but too early
    for name in ("black frame", "white frame", "noise frame"):
        assert counts[name]["answers"].keys() <= {"search", "hold"}, counts


def test_without_a_model_process_the_vehicle_holds_its_position(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    """The model process is stopped during the flight. The vehicle stops, and does not land."""
    world = calm(Pad("red", "disc", 2.5, 2.0, 0.5, 0.3))
    heights, speeds = [], []
    with benchmark.pilot(bundle, "onnxruntime") as link:
        status, patient = link.client.status(60.0), PatientLink(link)

        def on_step(step: fly.Step) -> None:
            heights.append(step.pose.height_m)
            speeds.append(float(np.hypot(*world.velocity_m_s[:2])))
            if len(heights) == 3:
                patient.is_patient = False
                os.kill(status.model_worker.pid, signal.SIGSTOP)

        monkeypatch.setattr(fly, "MAX_STEPS", 20)
        try:
            (result,) = fly.fly(patient, world, LAND, on_step, clock_s=no_time)
        finally:
            with contextlib.suppress(ProcessLookupError):  # the supervisor may have killed it
                os.kill(status.model_worker.pid, signal.SIGKILL)
    assert result.outcome == "lost" and not world.is_landed
    assert max(speeds[:3]) > 0.3  # it was on its way
    assert speeds[-1] < 0.02 and abs(heights[-1] - heights[-2]) < 0.02


# -- without the model: how the vehicle follows answers ----------------------------------------------------------------


class FakeLink:
    """Gives the answers of a test: one per frame, and the last one for all later frames."""

    def __init__(self, *answers: Action | Refusal | None) -> None:
        self.answers, self.instructed, self.client = list(answers), [], self

    def instruct(self, text: str) -> None:
        self.instructed.append(text)

    def answer(self, picture: np.ndarray, timeout_s: float = 0.0) -> Action | Refusal | None:
        assert picture.shape == (140, 140, 3) and picture.dtype == np.uint8
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def answer_of(action: str, **values: float) -> Action:
    space = {"forward_m_s": 0.0, "right_m_s": 0.0, "down_m_s": 0.0, "yaw_rate_rad_s": 0.0} if action == "move" else {}
    stages = {"queue": 0.0, "encode": 0.0, "prefill": 0.0, "decode": 0.0, "post": 0.0}
    header = {"v": 1, "session": 1, "seq": 1, "t_pub_ns": 1, "bundle_id": "", "camera": "c", "frame_id": 1}
    times = {"t_capture_ns": 1, "capture_clock": "sender", "age_ms": 1.0, "valid_for_ms": 500, "valid_until_ns": 2}
    more = {"action_space": "velocity_body", "clamped": {}, "instruction": "", "dropped_frames": 0}
    return Action(**header, **times, **more, stages_ms=stages, type=action, values=space | values)


@pytest.mark.parametrize("answer", [None, answer_of("hold")], ids=["silence", "hold"])
def test_without_an_answer_and_on_hold_the_vehicle_keeps_its_position(answer: Action | None):
    world = calm(Pad("red", "disc", 2.5, 2.0, 0.5, 0.3))
    before = world.position_m.copy()
    (result,) = fly.fly(FakeLink(answer), world, LAND, clock_s=no_time)
    assert np.abs(world.position_m - before).max() < 0.01
    assert result == fly.Result(LAND[0][0], "lost", 60, pytest.approx(3.2, abs=0.01))


def test_the_velocity_of_a_move_is_in_body_axes(monkeypatch: pytest.MonkeyPatch):
    world = calm(Pad("red", "disc", 2.5, 2.0, 0.5, 0.3))
    world.yaw_rad = np.pi / 2  # facing east
    monkeypatch.setattr(fly, "MAX_STEPS", 4)
    fly.fly(FakeLink(answer_of("move", forward_m_s=1.0)), world, LAND, clock_s=no_time)
    north, east, height = world.position_m
    # In still air the speed is 1 / (1 + 0.15 * 0.35) = 0.95 m/s. It lasts 2 s, less a lag of 0.33 s.
    assert (north, east, height) == (pytest.approx(0, abs=0.01), pytest.approx(1.59, abs=0.03), START_HEIGHT_M)


def test_the_vehicle_follows_an_answer_only_while_it_is_valid(monkeypatch: pytest.MonkeyPatch):
    """The first answer takes no time, the next ones take 0.8 s. The first one moves the vehicle for half a second."""
    now_s = 100.0

    class LateLink(FakeLink):
        def answer(self, picture: np.ndarray, timeout_s: float = 0.0) -> Action | Refusal | None:
            nonlocal now_s
            if len(self.answers) == 1:
                now_s += 0.8
            return super().answer(picture, timeout_s)

    world, followed_s = calm(Pad("red", "disc", 2.5, 2.0, 0.5, 0.3)), []
    flown = world.fly
    monkeypatch.setattr(world, "fly", lambda *v: (followed_s.append(v[4] if v[0] == 1.0 else 0.0), flown(*v)))
    monkeypatch.setattr(fly, "MAX_STEPS", 3)
    fly.fly(LateLink(answer_of("move", forward_m_s=1.0), None), world, LAND, clock_s=lambda: now_s)
    assert sum(followed_s) == pytest.approx(fly.STEP_S)
    assert world.time_s == pytest.approx(fly.STEP_S + 2 * 0.8)


def test_the_autopilot_finishes_a_landing_and_ignores_later_answers():
    world = calm(Pad("red", "disc", 0.0, 0.0, 0.5, 0.3))
    (result,) = fly.fly(FakeLink(answer_of("land"), answer_of("move", forward_m_s=2.0)), world, LAND, clock_s=no_time)
    assert result.outcome == "right" and world.is_landed and result.off_m < 0.05


def test_hold_is_a_pause_in_an_order_to_land():
    world = calm(Pad("red", "disc", 0.0, 0.0, 0.5, 0.3))
    (result,) = fly.fly(FakeLink(*[answer_of("hold")] * 5, answer_of("land")), world, LAND, clock_s=no_time)
    assert result.outcome == "right" and world.is_landed and result.steps > 5


@pytest.mark.parametrize(
    ("pads", "outcome"),
    [
        ([Pad("red", "disc", 3.0, 0.0, 0.5, 0.3), Pad("blue", "ring", 0.0, 0.0, 0.5, 0.0)], "wrong pad"),
        ([Pad("red", "disc", 3.0, 0.0, 0.5, 0.3)], "beside"),
    ],
)
def test_a_landing_that_is_not_on_the_right_pad_has_its_outcome(pads: list[Pad], outcome: str):
    (result,) = fly.fly(FakeLink(answer_of("land")), calm(*pads), LAND, clock_s=no_time)
    assert (result.outcome, result.off_m) == (outcome, pytest.approx(3.0, abs=0.05))


def test_an_order_to_go_to_a_pad_ends_with_hold_over_it_and_a_landing_is_wrong():
    goto = [("Go to the red disc.", Order("goto", "red", "disc"))]
    pad = Pad("red", "disc", 0.4, 0.0, 0.5, 0.3)
    assert fly.fly(FakeLink(answer_of("hold")), calm(pad), goto, clock_s=no_time)[0].outcome == "right"
    assert fly.fly(FakeLink(answer_of("land")), calm(pad), goto, clock_s=no_time)[0].outcome == "beside"
    assert (
        fly.fly(FakeLink(answer_of("hold")), calm(Pad("red", "disc", 3.0, 0.0, 0.5, 0.3)), goto, clock_s=no_time)[
            0
        ].outcome
        == "beside"
    )


def test_a_search_covers_the_area_of_the_pads():
    world = calm(Pad("red", "disc", 2.5, 2.0, 0.5, 0.3))
    world.position_m[2] = 2.0  # below the start height: the vehicle climbs first
    positions = []
    fly.fly(
        FakeLink(answer_of("search")), world, LAND, lambda step: positions.append((*step.pose[:3],)), clock_s=no_time
    )
    positions_m = np.array(positions)
    assert positions_m[-1, 2] == pytest.approx(START_HEIGHT_M, abs=0.1)
    reach_m = positions_m[:, 2] * 0.7 / np.sqrt(2)  # half of the camera's view, at any yaw
    grid = np.stack(np.meshgrid(*[np.linspace(-4.5, 4.5, 10)] * 2), -1).reshape(-1, 1, 2)
    covered = (np.abs(grid - positions_m[None, :, :2]).max(-1) < reach_m).any(1)
    assert covered.all()


def test_a_search_continues_in_the_direction_of_the_last_move(monkeypatch: pytest.MonkeyPatch):
    """When the vehicle starts to move, it tilts, and a pad at the edge may leave the picture."""
    monkeypatch.setattr(fly, "MAX_STEPS", 4)
    for yaw_rad, expected in ((0.0, (0, 1)), (np.pi / 2, (-1, 0))):
        world = calm(Pad("red", "disc", 2.5, 2.0, 0.5, 0.3))
        world.yaw_rad = yaw_rad
        fly.fly(FakeLink(answer_of("move", right_m_s=1.2), answer_of("search")), world, LAND, clock_s=no_time)
        away = world.position_m[:2] / np.hypot(*world.position_m[:2])
        assert away == pytest.approx(expected, abs=0.05) and np.hypot(*world.position_m[:2]) > 1.5


# -- the benchmark's arithmetic ----------------------------------------------------------------------------------------


def test_interval_is_wilsons():
    # Newcombe 1998, table I: 81 of 263, and 0 of 20
    assert benchmark.interval(81, 263) == [0.308, 0.2553, 0.3662]
    assert benchmark.interval(0, 20) == [0.0, 0.0, 0.1611]
    assert benchmark.interval(0, 0) == [None, 0.0, 1.0]


def test_scores_by_hand():
    picture = np.zeros((140, 140, 3), np.uint8)
    move = {"action": "move", "vx": 0.5, "vy": 0.0, "vz": 0.2, "yaw": 0}
    order = Order("land", "red", "disc")

    def frame(action: dict, exchanges: list[Exchange]) -> benchmark.Frame:
        return benchmark.Frame(picture, benchmark.Exercise(order, "x", action, exchanges), False)

    shown = [frame(move, [Exchange("How many pads?", "One.")]), frame(move, []), frame({"action": "search"}, [])]
    off = {"vx": 0.6, "vy": 0.0, "vz": 0.2, "yaw": 0.0}
    answers = [
        benchmark.Answer("move", off, "Two."),
        benchmark.Answer("hold", {}, ""),
        benchmark.Answer("land", {}, ""),
    ]
    scores = benchmark.against_the_rule(shown, answers)
    assert scores["type_right"][0] == pytest.approx(1 / 3, abs=1e-4)
    assert scores["velocity_mae_m_s"] == pytest.approx(0.1 / 3, abs=1e-4)
    assert (scores["words_right"][0], scores["wrong_land"]) == (0.0, 1)
    same = benchmark.agreement(answers, [answers[0]._replace(values=off | {"vx": 0.65, "vz": 0.3}), *answers[1:]])
    assert same["same_type"][0] == 1.0 and same["same_answer"][0] == pytest.approx(2 / 3, abs=1e-4)
    assert same["fields_within_0.05"][0] == 0.75
