"""The offline benchmark: its figures, its command, and its comparison with other programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_agent.board.power import power_w
from edge_agent.config import CameraConfig, Config, VisionConfig
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


def test_the_ceilings_are_measured():
    ceilings = bench.measure_ceilings()
    assert ceilings.copy_gb_s > 0 and ceilings.gflops > 0


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
        wrong = run("-m", "edge_agent.cli.main", "bench", *arguments)
        assert (wrong.returncode, len(wrong.stderr.splitlines())) == (status, 1), wrong.stderr
        assert words in wrong.stderr


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


def test_power_comes_from_the_first_rail(tmp_path: Path):
    assert power_w(tmp_path) is None
    rail = tmp_path / "1-0040" / "hwmon" / "hwmon3"
    rail.mkdir(parents=True)
    (rail / "in1_input").write_text("19040\n")
    assert power_w(tmp_path) is None
    (rail / "curr1_input").write_text("500\n")
    assert power_w(tmp_path) == pytest.approx(9.52)


def test_synthetic_frames_differ_and_are_equal_in_every_run():
    frames = bench.synthetic_frames(5)
    assert all(frame.shape == (480, 640, 3) and frame.dtype == np.uint8 for frame in frames)
    assert len({frame.tobytes() for frame in frames}) == 5
    assert all((a == b).all() for a, b in zip(frames, bench.synthetic_frames(5), strict=True))
