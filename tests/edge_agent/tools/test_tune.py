"""`edge-agent tune`: its choice against every configuration there is, on boards that are tables of ages."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.config import CameraConfig, Config
from edge_agent.errors import ConfigError
from edge_agent.tools.encoder_choices import Encoder, encoder_choices
from edge_agent.tools.measure_daemon import Measured
from edge_agent.tools.tune import Board, Values, _with_tensorrt, search, values_in_force, with_values

ONNX = {"vision.backend": "onnxruntime", "vision.tensorrt": False}
TENSORRT = ONNX | {"vision.tensorrt": True}
MTMD = {"vision.backend": "mtmd", "vision.tensorrt": False}
CUDA_NAME, CPU_NAME, TENSORRT_NAME = (f"{name}ExecutionProvider" for name in ("CUDA", "CPU", "Tensorrt"))
CONFIG = Config(bundle="/b", camera=CameraConfig(source="x"), profile="fast", cpu_threads=4)
BOARD = Board((Encoder("onnxruntime CPU", ONNX), Encoder("mtmd", MTMD)), (4, 3, 2, 1), ("f16", "q8_0"), overlap=True)
KEYS = ("vision.backend", "cpu_threads", "advanced.overlap", "advanced.speculative", "advanced.kv_cache_type")
GRID = [
    dict(zip(KEYS, row, strict=True))
    for row in itertools.product(
        ("onnxruntime", "mtmd"), BOARD.threads, (True, False), (True, False), BOARD.kv_cache_types
    )
]


class FakeBoard:
    """Ages by a sum of costs. deadline_ms: an older action is refused as late."""

    def __init__(self, cost: dict[Any, float], deadline_ms: float = 1e9, gpu: bool = False) -> None:
        self.cost, self.deadline_ms, self.gpu = cost, deadline_ms, gpu
        self.measured: list[Values] = []

    def age_ms(self, values: Values) -> float:
        values = values or values_in_force(CONFIG, self.gpu)
        threads = values["cpu_threads"] / (2 if values["advanced.overlap"] else 1)  # the encoder runs on the others
        encoder = "tensorrt" if values.get("vision.tensorrt") else values["vision.backend"]
        encode = self.cost[encoder] * values["vision.max_image_tokens"] / 256
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


def test_fewer_image_tokens_are_not_tried_where_frames_have_one_number_of_them() -> None:
    board = FakeBoard(COST, deadline_ms=40)
    with pytest.raises(ConfigError, match="no configuration gives valid actions here"):
        run(board, BOARD._replace(has_image_sizes=False))
    assert {values["vision.max_image_tokens"] for values in board.measured if values} == {256}


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


def test_one_lucky_measurement_does_not_decide() -> None:
    """The grid's second best seems the best by far when it is measured first."""
    board = FakeBoard(COST | {"mtmd": 88.0, "overlap": 0.6})
    tokens = {"vision.max_image_tokens": 256}
    best = min(GRID, key=lambda values: board.age_ms(tokens | values))
    lucky = best | MTMD
    assert board.age_ms(tokens | lucky) > 1.02 * board.age_ms(tokens | best)
    first = board.run

    def noisy(values: Values) -> Measured:
        is_first = values not in board.measured and lucky.items() <= values.items()
        result = first(values)
        return msgspec.structs.replace(result, mean_age_ms=0.9 * result.mean_age_ms) if is_first else result

    board.run = noisy  # type: ignore[method-assign]
    tuned = run(board)
    assert best.items() <= tuned.best.items()


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
    assert sum(name.startswith("again: ") for name, begins in shown if begins) == 8


def test_the_choices_depend_on_whether_the_first_run_used_a_gpu() -> None:
    seen: list[bool] = []
    for gpu in (True, False):
        board = FakeBoard(COST, gpu=gpu)
        search(CONFIG, lambda gpu: seen.append(gpu) or BOARD, board.run, lambda *progress: None)
    assert seen == [True, False]


# -- vision encoders ---------------------------------------------------------------------------------------------------

BOTH = {"vision.onnx": "bf16", "mmproj.gguf": "q8_0"}
MISSING = "its libraries or the GPU are missing; onnxruntime fell back to the CPU"
# What there is -> (types of the files, providers, tensorrt; the rows that are tried, words of the rows that are not).
ENCODERS: dict[str, tuple[dict[str, str], dict[str, str], bool, dict[str, Values], tuple[str, ...]]] = {
    "a CPU": (BOTH, {CPU_NAME: ""}, False, {"onnxruntime CPU (bf16)": ONNX, "mtmd (q8_0)": MTMD}, ()),
    "CUDA": (
        BOTH, {CPU_NAME: "", CUDA_NAME: ""}, False, {"onnxruntime CUDA (bf16)": ONNX, "mtmd (q8_0)": MTMD},
        ("onnxruntime CPU (bf16): not tried: the daemon uses CUDA",),
    ),
    "CUDA that does not start": (
        BOTH, {CPU_NAME: "", CUDA_NAME: MISSING}, False, {"onnxruntime CPU (bf16)": ONNX, "mtmd (q8_0)": MTMD},
        (f"onnxruntime CUDA (bf16): {MISSING}",),
    ),
    "TensorRT that nobody asked for": (
        BOTH, {CPU_NAME: "", CUDA_NAME: "", TENSORRT_NAME: ""}, False,
        {"onnxruntime CUDA (bf16)": ONNX, "mtmd (q8_0)": MTMD},
        ("onnxruntime CPU", "onnxruntime TensorRT (bf16): not tried: it makes an engine first"),
    ),
    "TensorRT that was asked for": (
        BOTH, {CPU_NAME: "", CUDA_NAME: "", TENSORRT_NAME: ""}, True,
        {"onnxruntime CUDA (bf16)": ONNX, "onnxruntime TensorRT (bf16)": TENSORRT, "mtmd (q8_0)": MTMD},
        ("onnxruntime CPU",),
    ),
    "no TensorRT where it was asked for": (
        BOTH, {CPU_NAME: ""}, True, {"onnxruntime CPU (bf16)": ONNX, "mtmd (q8_0)": MTMD},
        ("onnxruntime TensorRT (bf16): onnxruntime here has no TensorRT",),
    ),
    "no onnxruntime": (
        BOTH, {CPU_NAME: "No module named 'onnxruntime'"}, False, {"mtmd (q8_0)": MTMD},
        ("onnxruntime CPU (bf16): No module named 'onnxruntime'",),
    ),
    "a wrapped bundle": (
        {"mmproj.gguf": "bf16"}, {CPU_NAME: ""}, False, {"mtmd (bf16)": MTMD},
        ("onnxruntime: the bundle has no vision.onnx",),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("types", "providers", "tensorrt", "tried", "skipped"), ENCODERS.values(), ids=ENCODERS)
def test_every_encoder_is_tried_or_has_a_reason(
    types: dict[str, str], providers: dict[str, str], tensorrt: bool, tried: dict, skipped: tuple[str, ...]
) -> None:
    rows = encoder_choices(types, providers, tensorrt=tensorrt)
    assert {row.name: row.values for row in rows if not row.skip} == tried
    lines = [f"{row.name}: {row.skip}" for row in rows if row.skip]
    assert [line.startswith(words) for line, words in zip(lines, skipped, strict=True)] == [True] * len(lines)


def test_encoders_that_are_not_tried_are_rows_of_the_table() -> None:
    encoders = encoder_choices(BOTH, {CPU_NAME: "", CUDA_NAME: MISSING}, tensorrt=False)
    tuned = run(FakeBoard(COST), BOARD._replace(encoders=encoders))
    rows = {tried.name.partition(",")[0]: tried.result.problem for tried in tuned.tried}
    assert rows["onnxruntime CUDA (bf16)"] == MISSING and rows["onnxruntime CPU (bf16)"] == ""


def test_tensorrt_is_chosen_where_it_is_better() -> None:
    providers = {CPU_NAME: "", CUDA_NAME: "", TENSORRT_NAME: ""}
    board = BOARD._replace(encoders=encoder_choices(BOTH, providers, tensorrt=True))
    for ms, chosen in ((20.0, True), (300.0, False)):
        assert run(FakeBoard(COST | {"tensorrt": ms}), board).best["vision.tensorrt"] is chosen


def test_tensorrt_gets_the_time_for_its_engine_and_a_fallback_is_no_measurement_of_it() -> None:
    seen: list[Config] = []

    def on(provider: str) -> Any:
        return lambda config: (seen.append(config), Measured(5.0, vision_backend=f"onnxruntime {provider}"))[1]

    config = with_values(CONFIG, {"vision.tensorrt": True})
    assert _with_tensorrt(config, on(TENSORRT_NAME)).mean_age_ms == 5.0
    assert seen[-1].watchdog.model_load_s > CONFIG.watchdog.model_load_s
    fell_back = _with_tensorrt(config, on(CUDA_NAME))
    assert fell_back.mean_age_ms is None and "onnxruntime CUDAExecutionProvider ran in its place" in fell_back.problem
    assert _with_tensorrt(CONFIG, on(CPU_NAME)).mean_age_ms == 5.0 and seen[-1] is CONFIG


def test_a_row_says_that_its_provider_fell_back() -> None:
    board, first = FakeBoard(COST), FakeBoard(COST).run
    board.run = lambda values: msgspec.structs.replace(first(values), vision_backend=f"onnxruntime {CPU_NAME}")  # type: ignore[method-assign]
    encoders = encoder_choices(BOTH, {CUDA_NAME: ""}, tensorrt=False)
    names = [tried.name for tried in run(board, BOARD._replace(encoders=encoders)).tried]
    assert any(name.startswith("onnxruntime CUDA") and name.endswith(f"{CPU_NAME})") for name in names)


def test_a_key_of_tensorrt_beside_mtmd_means_nothing() -> None:
    config = with_values(CONFIG, {"vision.backend": "mtmd", "vision.tensorrt": True})
    assert values_in_force(config, gpu=False)["vision.tensorrt"] is False
