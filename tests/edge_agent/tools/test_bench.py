"""The offline benchmark: its figures, its command, and its comparison with other programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_agent.cli import main
from edge_agent.config import CameraConfig, Config, VisionConfig
from edge_agent.errors import UserError
from edge_agent.model.ceilings import CPU, GPU, INTEGRATED_GPU, DeviceCeilings, measure_device
from edge_agent.model.fallbacks import LanguageFacts
from edge_agent.tools import bench
from tests.harness import ROOT, toy


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    for i in range(3):
        cv2.imwrite(str(folder / f"{i}.png"), toy.toy_image(120, 160, seed=i))
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=ROOT)


class FakeTime:
    """Every reading of the clock is a millisecond after the previous one."""

    def __init__(self) -> None:
        self.now_ns = 0

    def monotonic_ns(self) -> int:
        self.now_ns += 1_000_000
        return self.now_ns

    def monotonic(self) -> float:
        return self.monotonic_ns() / 1e9


def test_the_figures_are_those_of_the_measured_times(toy_bundle: Path, frames: Path, monkeypatch):
    """The clock is a counter, so that every figure can be computed from the number of its readings."""
    config = Config(
        bundle=str(toy_bundle), camera=CameraConfig(source="none"), vision=VisionConfig(max_image_tokens=16),
        cpu_threads=1,
    )  # fmt: skip
    monkeypatch.setattr(bench, "time", FakeTime())
    monkeypatch.setattr(bench, "measure_ceilings", lambda: bench.Ceilings(copy_gb_s=2.0, gflops=50.0))
    done: list = []
    figures = bench.run(config, frames, 9, lambda n, total: done.append((n, total)))
    assert done == [(n, 9) for n in range(1, 10)] and figures["frames"] == 9
    # Readings of a frame: start, encoded, the first text after the forced prefix, stop.
    assert figures["frame_to_action_ms"] == {"p50": 3.0, "p95": 3.0, "p99": 3.0}
    assert figures["frame_to_first_text_ms"]["p50"] == 2.0 and figures["stages_ms"]["encode"]["p50"] == 1.0
    assert figures["actions_per_s"] == round(1000 / 3, 3)
    assert figures["information_age_ms"] == 3.0 + 1.5  # each answer is 3 ms old, and 3 ms later comes the next
    assert figures["ceilings_of"] == "the processor"
    # Two texts of MAX_TEXT_TOKENS steps, one millisecond each.
    assert figures["text_tok_per_s"] == 1000 * bench.MAX_TEXT_TOKENS
    language_bytes = (toy_bundle / "language.gguf").stat().st_size
    step_s = 0.001 / bench.MAX_TEXT_TOKENS
    assert figures["decode_share_of_bandwidth"] == round(language_bytes / step_s / 1e9 / 2.0, 3)
    assert figures["prefill_share_of_arithmetic"] > 0
    assert (figures["repeat_ms"], figures["repeat_floor_ms"]) == (3.0, 1.0)
    assert figures["decode_calls"]["p50"] >= 1 and figures["rows"]["p50"] > 16  # image tokens and the text behind them
    assert figures["draft_accepted"] is None or 0 < figures["draft_accepted"] <= 1
    assert figures["peak_rss_mib"] > figures["file_mib"] > 0
    assert figures["example"].startswith('{"action":') and 1 <= figures["different_answers"] <= 3
    json.dumps(figures, allow_nan=False)
    assert [name for name, _ in bench.table(figures)][:2] == ["bundle", "frame to action"]


def facts_of(gpu_layers: int) -> LanguageFacts:
    return LanguageFacts(gpu_layers, 33, is_gpu_build=gpu_layers > 0, has_openmp=True, mlock_failed=False)


def test_the_ceilings_are_measured():
    ceilings = bench.ceilings_of(facts_of(0))
    assert ceilings.copy_gb_s > 0 and ceilings.gflops > 0 and ceilings.device == "the processor"


def test_the_ceilings_are_those_of_the_device_that_runs_the_model(monkeypatch):
    """A GPU with all layers is measured itself; of a model that it shares with the processor no share can be told."""
    monkeypatch.setattr(bench, "measure_ceilings", lambda: pytest.fail("the processor's"))
    monkeypatch.setattr(bench, "measure_device", lambda *kinds: DeviceCeilings(4000.0, 900_000.0, "a card"))
    assert bench.ceilings_of(facts_of(33)) == bench.Ceilings(4000.0, 900_000.0, "a card")
    monkeypatch.setattr(bench, "measure_device", lambda *kinds: pytest.fail("the GPU's"))
    shared = bench.ceilings_of(facts_of(20))
    assert shared == bench.Ceilings(None, None, "llama.cpp GPU, 20 of 33 layers")


def test_ceilings_that_cannot_be_measured_are_unknown():
    """llama.cpp here has no GPU."""
    unknown = bench.ceilings_of(facts_of(33))
    assert (unknown.copy_gb_s, unknown.gflops) == (None, None)
    assert unknown.device == "the ceilings cannot be measured: llama.cpp cannot open the device (none)"


def test_a_device_is_measured_by_ggml():
    """The same code as on a GPU, on the processor."""
    found = measure_device(GPU, INTEGRATED_GPU, CPU)
    assert found.copy_gb_s > 0 and found.gflops > 0 and found.device


def test_the_command(toy_bundle: Path, tmp_path: Path):
    common = ("--bundle", toy_bundle, "--max-image-tokens", 16, "-n", 3)
    made = run("-m", "edge_agent.cli.main", "bench", *common, "--action-space", "waypoint")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["frames"] == 3 and "frame to action" in made.stderr
    for arguments, status, words in (
        (("--bundle", tmp_path), 78, "bundle.json: missing"),
        ((*common, "--action-space", "dance"), 78, "dance"),
        ((*common, "--frames", tmp_path / "none"), 1, "expected a folder of images or a video"),
        (("--bundle", toy_bundle, "--max-image-tokens", 3), 78, "vision.max_image_tokens"),
        (("--bundle", toy_bundle, "-n", 0), 2, "expected 1 or more"),
    ):
        with pytest.raises(UserError, match=words) as wrong:
            main.run_command(main.make_parser().parse_args(["bench", *map(str, arguments)]))
        assert wrong.value.exit_status == status and "\n" not in str(wrong.value)


def test_beside_the_high_level_chat(toy_bundle: Path, frames: Path):
    """Both get the same frames and prompt."""
    made = run(
        "benchmarks/bench.py",
        "--bundle",
        toy_bundle,
        "--frames",
        frames,
        "--max-image-tokens",
        16,
        "-n",
        3,
        "--compare",
    )
    assert made.returncode == 0, made.stderr
    figures = json.loads(made.stdout.splitlines()[-1])
    assert figures["ours"]["times_ours"] == 1.0 and figures["chat"]["times_ours"] > 0
    assert json.loads(figures["chat"]["example"])["action"]
    assert figures["chat"]["peak_rss_mib"] > 50 and figures["ours"]["calls"] >= 1


def figures_of(**changes: object) -> dict:
    spread = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    figures = {
        "bundle": "b", "model": "m", "vision": "mtmd GPU", "language": "llama.cpp GPU, 27 of 27 layers",
        "frame_to_action_ms": spread, "frame_to_first_text_ms": spread, "stages_ms": {"encode": spread},
        "repeat_ms": 1.0, "repeat_floor_ms": 1.0, "actions_per_s": 9.0, "information_age_ms": 2.5,
        "text_tok_per_s": 5.0, "copy_gb_s": 2.0, "ceilings_of": "the processor",
        "gflops": 50.0, "decode_share_of_bandwidth": 0.5, "prefill_share_of_arithmetic": None, "decode_calls": spread,
        "rows": spread, "draft_accepted": None, "peak_rss_mib": 9.0, "file_mib": 1.0, "gpu_memory_mib": None,
        "draft_margin": 0.0, "row_alignment": 8, "steps_alone": 0,
        "energy_j_per_frame": None, "energy_of": None, "different_answers": 1, "example": "{}",
    }  # fmt: skip
    return figures | changes


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({}, "none: batches of a multiple of 8 rows give the same bits"),
        (
            {"draft_margin": 0.4104, "row_alignment": 1, "steps_alone": 7},
            "7 steps evaluated alone; a drafted token needs a lead of 0.41 logits",
        ),
        ({"draft_margin": None, "row_alignment": 1}, "no drafts: the shapes of batches were not compared"),
    ],
)
def test_the_way_of_ties_is_shown(figures, words):
    assert dict(bench.table(figures_of(**figures)))["ties"] == words


def test_the_ceilings_of_a_processor_are_not_shown_for_a_gpu():
    assert dict(bench.table(figures_of()))["  of the bandwidth"] == "50% of a copy's 2 GB/s, the processor"
    unknown = figures_of(copy_gb_s=None, gflops=None, decode_share_of_bandwidth=None, ceilings_of="GPU, not measured")
    rows = dict(bench.table(unknown))
    assert rows["  of the ceilings"] == "unknown: GPU, not measured"
    assert "  of the bandwidth" not in rows


@pytest.mark.parametrize(
    ("energy", "words"),
    [
        ({}, "unknown"),
        ({"energy_j_per_frame": 1.5, "energy_of": "card"}, "1.5 J per frame, of the card"),
        ({"energy_j_per_frame": 0.25, "energy_of": "board"}, "0.25 J per frame, of the whole board"),
    ],
)
def test_energy_says_whose_it_is(energy, words):
    assert dict(bench.table(figures_of(**energy)))["energy"] == words


def test_memory_of_the_gpu_is_shown_where_it_is_known():
    assert dict(bench.table(figures_of(gpu_memory_mib=4068.0)))["memory of the GPU"] == "4068 MiB"
    assert dict(bench.table(figures_of()))["memory of the GPU"] == "unknown"


def test_a_model_on_a_gpu_has_no_ceilings_of_the_processor(toy_bundle: Path, monkeypatch):
    """The figures of a run whose language model says that its layers are on a GPU, on a card that tells its power."""
    config = Config(
        bundle=str(toy_bundle), camera=CameraConfig(source="none"), vision=VisionConfig(max_image_tokens=16),
        cpu_threads=1,
    )  # fmt: skip
    used_mib = iter((100.0, 600.0))

    class CardMeter:
        source = "card"

        def power_w(self) -> float:
            return 100.0

        def gpu_memory_used_mib(self) -> float:
            return next(used_mib)

        def close(self) -> None:
            pass

    loaded = bench.load_model

    def load(*arguments: object) -> object:
        model = loaded(*arguments)
        model.engine.llama.facts = model.engine.llama.facts._replace(gpu_layers=2, layers=2)
        return model

    monkeypatch.setattr(bench, "PowerMeter", CardMeter)
    monkeypatch.setattr(bench, "load_model", load)
    monkeypatch.setattr(bench, "time", FakeTime())
    figures = bench.run(config, None, 2)
    assert (figures["copy_gb_s"], figures["gflops"]) == (None, None)
    assert (figures["decode_share_of_bandwidth"], figures["prefill_share_of_arithmetic"]) == (None, None)
    assert (figures["gpu_memory_mib"], figures["energy_of"], figures["energy_j_per_frame"]) == (500.0, "card", 0.3)
    assert figures["language"] == "llama.cpp GPU, 2 of 2 layers"
    json.dumps(figures, allow_nan=False)


def test_synthetic_frames_differ_and_are_equal_in_every_run():
    frames = bench.synthetic_frames(5)
    assert all(frame.shape == (480, 640, 3) and frame.dtype == np.uint8 for frame in frames)
    assert len({frame.tobytes() for frame in frames}) == 5
    assert all((a == b).all() for a, b in zip(frames, bench.synthetic_frames(5), strict=True))
