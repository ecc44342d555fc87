"""The offline benchmark: its figures are of what really ran, and hang together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_agent.board.power import power_w
from edge_agent.config import CameraConfig, Config, LanguageConfig, VisionConfig
from edge_agent.tools import bench
from tests.harness import ROOT, toy


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    for i in range(3):
        cv2.imwrite(str(folder / f"{i}.png"), toy.toy_image(120, 160, seed=i))
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_figures_hang_together(toy_bundle: Path, frames: Path):
    config = Config(
        bundle=str(toy_bundle), camera=CameraConfig(source="none"), vision=VisionConfig(max_image_tokens=16, threads=1),
        language=LanguageConfig(threads=1),
    )  # fmt: skip
    done = []
    figures = bench.run(config, frames, 9, lambda n, total: done.append((n, total)))
    assert done == [(n, 9) for n in range(1, 10)] and figures["frames"] == 9
    whole, stages = figures["frame_to_action_ms"], figures["stages_ms"]
    assert 0 < whole["p50"] <= whole["p95"] <= whole["p99"]
    assert sum(stages[name]["p50"] for name in stages) == pytest.approx(whole["p50"], rel=0.6)
    assert 0 < figures["frame_to_first_word_ms"]["p50"] <= whole["p99"]
    assert figures["decode_calls"]["p50"] >= 1 and figures["rows"]["p50"] > 16  # a frame has as many and more
    assert 0 <= (figures["draft_accepted"] or 0) <= 1
    assert figures["words_tok_per_s"] > 10 and figures["copy_gb_s"] > 0.5 and figures["gflops"] > 1
    assert 0 < figures["decode_share_of_bandwidth"] < 1 and 0 < figures["prefill_share_of_arithmetic"] < 4
    assert figures["peak_rss_mib"] > figures["file_mib"]
    assert figures["example"].startswith('{"action":') and 1 <= figures["different_answers"] <= 3
    json.dumps(figures, allow_nan=False)


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
    """Both see the same: where no choice is close, they say the same."""
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


def test_made_up_frames_differ_and_are_the_same_every_time():
    frames = bench.synthetic_frames(5)
    assert all(frame.shape == (480, 640, 3) and frame.dtype == np.uint8 for frame in frames)
    assert len({frame.tobytes() for frame in frames}) == 5
    assert all((a == b).all() for a, b in zip(frames, bench.synthetic_frames(5), strict=True))
