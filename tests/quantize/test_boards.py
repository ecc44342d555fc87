"""One memory plan: what `inspect` and `--fit` expect is what the daemon adds up for the bundle that is built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest

from edge_agent.bundle.files import BundleFile
from edge_agent.bundle.manifest import LANGUAGE, Manifest, read_manifest
from edge_agent.bundle.memory_plan import needed_mib, plan_memory
from edge_agent.config import LanguageConfig, VisionConfig
from quantize.boards import BOARDS, DEFAULT_CONFIG, boards_that_fit, language_budget_bytes, serving_mib
from quantize.build import expected_manifest
from quantize.source.checkpoint import read_checkpoint
from quantize.source.tokenizer import Tokenizer
from quantize.standard_recipes import plan_bundle
from tests.harness.quantize_cli import refused
from tests.harness.releases import write_release

LARGE = msgspec.structs.replace(
    DEFAULT_CONFIG, language=LanguageConfig(context=4096), vision=VisionConfig(max_image_tokens=1024)
)


@pytest.fixture(scope="module")
def manifest_3b(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Of a Q4_K_M bundle of the released 3B; its tokenizer is not counted."""
    checkpoint = read_checkpoint(write_release(tmp_path_factory.mktemp("3b") / "3B", "3B"))
    return expected_manifest(
        plan_bundle(checkpoint, "Q4_K_M", tokenizer=Tokenizer(Path("tekken.json"), [], [], [], {}))
    )


def test_the_expected_manifest_is_that_of_the_build(toy_bf16: Path, toy_bundle: Path):
    expected = expected_manifest(plan_bundle(read_checkpoint(toy_bf16), "Q4_K_M"))
    built = read_manifest(toy_bundle).manifest
    embedding = msgspec.structs.replace(built.model.embedding, offset=0)  # known once the header is written
    model = msgspec.structs.replace(built.model, embedding=embedding)
    assert expected == msgspec.structs.replace(built, model=model, files=expected.files, source_sha256={})
    for name, file in expected.files.items():
        assert file.bytes == pytest.approx(built.files[name].bytes, rel=0.05), name


def test_inspect_gives_the_memory_plan_of_the_daemon(toy_bf16: Path, toy_bundle: Path, run):
    _, out, _ = run("inspect", toy_bf16, "--json")
    planned = plan_memory(DEFAULT_CONFIG, read_manifest(toy_bundle).manifest, None)
    assert json.loads(out)["serving_mib_q4_k_m"] == pytest.approx(planned.mib, abs=1.0)


def test_a_larger_configuration_counts(manifest_3b: Manifest, toy_bf16: Path, run, tmp_path: Path):
    """Before, a context of 4096 tokens and 1024 image tokens were never counted: "fits" was wrong by 1.3 GiB."""
    assert serving_mib(manifest_3b) == pytest.approx(5118, rel=0.01)
    assert serving_mib(manifest_3b, LARGE) == pytest.approx(6990, rel=0.01)
    assert "Orin Nano 8GB" in boards_that_fit(manifest_3b)
    assert "Orin Nano 8GB" not in boards_that_fit(manifest_3b, LARGE)
    config, rest = tmp_path / "agent.yaml", "bundle: b\ncamera: {source: none}\n"
    config.write_text(rest + "language: {context: 4096}\nvision: {max_image_tokens: 1024}\n")
    facts = [json.loads(run("inspect", toy_bf16, "--json", *more)[1]) for more in ((), ("--config", config))]
    assert facts[1]["serving_mib_q4_k_m"] > facts[0]["serving_mib_q4_k_m"] + 900
    config.write_text(rest + "language: {contxt: 4096}\n")
    refused(run("inspect", toy_bf16, "--config", config), ("agent.yaml", "contxt", "context"))


@pytest.mark.parametrize("config", [DEFAULT_CONFIG, LARGE], ids=["default", "large"])
@pytest.mark.parametrize("board", BOARDS)
def test_a_language_model_of_the_budget_fits_exactly(manifest_3b: Manifest, board: str, config):
    budget = language_budget_bytes(manifest_3b, board, config)  # below 0 on the smallest board: the sum still holds
    files = manifest_3b.files | {LANGUAGE: BundleFile(bytes=budget, sha256="0" * 64)}
    needed = needed_mib(config, msgspec.structs.replace(manifest_3b, files=files))
    assert sum(needed.values()) == pytest.approx(BOARDS[board] * 1024, abs=0.01)


def test_a_board_that_is_too_small_is_one_line(toy_bf16: Path, run, tmp_path: Path, monkeypatch):
    shutil.copytree(toy_bf16, tmp_path / "toy")
    status, _, lines = run("imatrix", tmp_path / "toy", tmp_path / "i.gguf", "--chunks", 1)
    assert status == 0, lines
    monkeypatch.setitem(BOARDS, "Orin Nano 4GB", 0.1)
    result = run(
        "build", tmp_path / "toy", tmp_path / "out", "--imatrix", tmp_path / "i.gguf", "--fit", "orin-nano-4gb"
    )
    refused(result, ("--fit orin-nano-4gb", "vision encoder", "KV cache"))
