"""`edge-agent tune`: its choice against every configuration there is, on boards that are tables of ages."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.config import CameraConfig, Config
from edge_agent.errors import ConfigError
from edge_agent.tools.measure_daemon import Measured
from edge_agent.tools.tune import Board, Values, search, values_in_force

CONFIG = Config(bundle="/b", camera=CameraConfig(source="x"), profile="fast", cpu_threads=4)
BOARD = Board(("onnxruntime", "mtmd"), (4, 3, 2, 1), ("f16", "q8_0"), overlap=True)
KEYS = ("vision.backend", "cpu_threads", "advanced.overlap", "advanced.speculative", "advanced.kv_cache_type")
GRID = [
    dict(zip(KEYS, row, strict=True))
    for row in itertools.product(BOARD.backends, BOARD.threads, (True, False), (True, False), BOARD.kv_cache_types)
]


class FakeBoard:
    """Ages by a sum of costs. deadline_ms: an older action is refused as late."""

    def __init__(self, cost: dict[Any, float], deadline_ms: float = 1e9, gpu: bool = False) -> None:
        self.cost, self.deadline_ms, self.gpu = cost, deadline_ms, gpu
        self.measured: list[Values] = []

    def age_ms(self, values: Values) -> float:
        values = values or values_in_force(CONFIG, self.gpu)
        threads = values["cpu_threads"] / (2 if values["advanced.overlap"] else 1)  # the encoder runs on the others
        encode = self.cost[values["vision.backend"]] * values["vision.max_image_tokens"] / 256
        decode = self.cost["decode"] * (1 if values["advanced.speculative"] else self.cost["no draft"])
        decode *= self.cost[values["advanced.kv_cache_type"]]
        work = (encode + decode) / min(threads, self.cost["cores"])
        return work * (self.cost["overlap"] if values["advanced.overlap"] else 1) + 5 * threads

    def run(self, values: Values) -> Measured:
        self.measured.append(values)
        age = self.age_ms(values)
        backend = "llama.cpp GPU, 9 of 9 layers" if self.gpu else "llama.cpp CPU"
        if age > self.deadline_ms:
            return Measured(refused={"late": 9}, problem="no valid actions: 9 late", language_backend=backend)
        return Measured(age, age, 10.0, 40, language_backend=backend)


COST = {"onnxruntime": 80.0, "mtmd": 100.0, "decode": 60.0, "no draft": 2.0, "f16": 1.0, "q8_0": 1.1}
COST |= {"cores": 4.0, "overlap": 1.3}


def run(board: FakeBoard, choices: Board = BOARD) -> Any:
    return search(CONFIG, lambda gpu: choices, board.run, lambda *progress: None)


@given(
    st.fixed_dictionaries(
        {
            "onnxruntime": st.floats(10, 200),
            "mtmd": st.floats(10, 200),
            "decode": st.floats(10, 200),
            "no draft": st.floats(0.5, 3),
            "f16": st.just(1.0),
            "q8_0": st.floats(0.8, 1.5),
            "cores": st.sampled_from([1.0, 2.0, 4.0]),
            "overlap": st.floats(0.4, 2.5),
        }
    )
)
def test_the_choice_is_as_good_as_the_best_of_all(cost: dict[Any, float]) -> None:
    board = FakeBoard(cost)
    tuned = run(board)
    best = min(board.age_ms({"vision.max_image_tokens": 256} | values) for values in GRID)
    assert board.age_ms(tuned.best) <= 1.05 * best
    assert len(board.measured) < len(GRID) / 2
    assert tuned.best["vision.max_image_tokens"] == 256  # the deadline is met without fewer


def test_image_tokens_are_lowered_only_as_far_as_the_deadline_needs() -> None:
    board = FakeBoard(COST, deadline_ms=40)
    tuned = run(board)
    assert tuned.start_ms is None  # as configured, every answer is late
    assert tuned.best["vision.max_image_tokens"] < 256
    tokens = [values["vision.max_image_tokens"] for values in board.measured if values]
    assert tuned.best["vision.max_image_tokens"] == min(tokens)
    more = next(step for step in (256, 192, 128, 96) if step > tuned.best["vision.max_image_tokens"])
    with_more = [values for values in board.measured if values and values["vision.max_image_tokens"] >= more]
    assert with_more and all(board.run(values).mean_age_ms is None for values in with_more)


def test_no_configuration_in_time_is_an_error_that_says_why() -> None:
    with pytest.raises(ConfigError, match=r"no configuration gives valid actions here.*9 late"):
        run(FakeBoard(COST, deadline_ms=1))


def test_a_gain_within_the_noise_changes_nothing() -> None:
    board = FakeBoard(COST | {"q8_0": 0.99, "overlap": 3.0, "cores": 4.0, "no draft": 1.5})
    tuned = run(board)
    assert tuned.best == tuned.start and tuned.best_ms == tuned.start_ms


@pytest.mark.parametrize(("cost", "chosen"), [(0.995, "f16"), (0.8, "q8_0")])
def test_what_changes_answers_must_be_faster_by_more_than_chance(cost: float, chosen: str) -> None:
    tuned = run(FakeBoard(COST | {"q8_0": cost, "mtmd": 40.0}))
    assert (tuned.best["vision.backend"], tuned.best["advanced.kv_cache_type"]) == ("mtmd", chosen)


def test_a_best_that_is_late_when_it_is_measured_again_is_not_chosen() -> None:
    board = FakeBoard(COST | {"onnxruntime": 300.0})
    first = board.run

    def unsteady(values: Values) -> Measured:
        again = values in board.measured and values.get("vision.backend") == "mtmd"
        return Measured(5.0, 5.0, 10.0, 20, {"late": 9}) if again else first(values)

    board.run = unsteady  # type: ignore[method-assign]
    tuned = run(board)
    assert tuned.best == tuned.start


def test_a_candidate_that_does_not_start_is_shown_and_passed_over() -> None:
    board = FakeBoard(COST)
    first = board.run

    def without_mtmd(values: Values) -> Measured:
        return Measured(problem="no TensorRT") if values.get("vision.backend") == "mtmd" else first(values)

    board.run = without_mtmd  # type: ignore[method-assign]
    tuned = run(board)
    assert tuned.best["vision.backend"] == "onnxruntime"
    assert "no TensorRT" in [tried.result.problem for tried in tuned.tried]


def test_progress_names_every_candidate_before_and_after() -> None:
    shown: list[tuple[str, bool]] = []

    def report(name: str, result: Measured | None, number: int, about: int) -> None:
        assert number <= about
        shown.append((name, result is None))

    search(CONFIG, lambda gpu: BOARD, FakeBoard(COST).run, report)
    assert shown[:2] == [("as configured", True), ("as configured", False)]
    assert [name for name, begins in shown if begins] == [name for name, begins in shown if not begins]
    assert sum(name.startswith("again: ") for name, begins in shown if begins) in (0, 4)


def test_the_choices_depend_on_whether_the_first_run_used_a_gpu() -> None:
    seen: list[bool] = []
    for gpu in (True, False):
        board = FakeBoard(COST, gpu=gpu)
        search(CONFIG, lambda gpu: seen.append(gpu) or BOARD, board.run, lambda *progress: None)
    assert seen == [True, False]
