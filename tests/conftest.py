"""Toy checkpoints, conversions and one bundle, made once a session and shared. Read them, never write into them.

A test that needs a broken one copies it first: shutil.copytree(toy_bf16, tmp_path / "checkpoint").
Native code is imported inside the fixtures: the tests of the light modules must not load it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

from tests.harness import toy
from tests.harness.case import Case

socket.has_ipv6 = False  # else urllib3, which mistral_common imports, makes an internet socket to see whether it can
TESTS = Path(__file__).resolve().parent
# Hypothesis measures the time of an example and of the generation of data. A busy machine must not fail a test.
hypothesis.settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy machine")

# A shell that starts the tests in the background ignores SIGINT for them and for all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """One thread for llama.cpp, here and in every process that a test starts. The threads of a tiny model wait for each
    other more than they compute; on a busy machine each wait may cost milliseconds. libgomp reads it while loaded."""
    if config.option.markexpr != "promise":
        os.environ.setdefault("OMP_THREAD_LIMIT", "1")


@pytest.fixture(scope="session")
def toy_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 checkpoint folder: tied embeddings, tekken.json, one file of weights, 4096 tokens."""
    return toy.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "toy-bf16")


@pytest.fixture(scope="session")
def toy_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 checkpoint folder: an output head of its own, otherwise as toy_bf16."""
    return toy.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "toy-fp8", dtype="fp8", tied=False)


@pytest.fixture(scope="session")
def toy_full_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 checkpoint folder with all 131072 tokens of the releases. Seconds to make: for tests of the tokenizer."""
    return toy.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "toy-full", layers=1, vocab=131072)


@pytest.fixture(scope="session")
def toy_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As toy_fp8, with half the tokens and a single layer: for tests that build a lot."""
    folder = tmp_path_factory.mktemp("checkpoints") / "toy-small"
    return toy.write_checkpoint(folder, dtype="fp8", tied=False, vocab=2048, layers=1, vision_layers=1)


@pytest.fixture(scope="session")
def toy_bundle(build: Callable[..., Path], toy_bf16: Path) -> Path:
    """A Q4_K_M bundle of toy_bf16, as `edge-quantize build` makes it."""
    return build(toy_bf16, "Q4_K_M")


@pytest.fixture(scope="session")
def full(build: Callable[..., Path], toy_bf16: Path) -> Path:
    """A lossless bundle of toy_bf16: what others are measured against."""
    return build(toy_bf16, "BF16")


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """A PEFT adapter of toy_bf16, and its matrices."""
    folder = tmp_path_factory.mktemp("adapter") / "plain"
    return folder, toy.write_adapter(folder)


@pytest.fixture(scope="session")
def switchable(plain: tuple[Path, dict], toy_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a GGUF adapter."""
    from quantize.progress import SILENT
    from quantize.source.checkpoint import read_checkpoint
    from quantize.source.lora import read_adapter, write_adapter

    found, out = read_checkpoint(toy_bf16), tmp_path_factory.mktemp("switch") / "plain.gguf"
    write_adapter(read_adapter(plain[0], found), found, out, SILENT)
    return out


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """build(checkpoint folder, recipe) -> a bundle; the same arguments, the same bundle."""
    made: dict[tuple[Path, str], Path] = {}

    def make(folder: Path, recipe: str) -> Path:
        from quantize.build import build
        from quantize.progress import SILENT
        from quantize.source.checkpoint import read_checkpoint
        from quantize.standard_recipes import plan_bundle

        if (folder, recipe) not in made:
            out = tmp_path_factory.mktemp("bundles") / f"{folder.name}-{recipe}"
            build(plan_bundle(read_checkpoint(folder), recipe), out, SILENT)
            made[folder, recipe] = out
        return made[folder, recipe]

    return make


@pytest.fixture(scope="session")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """convert(checkpoint folder, type) -> the folder with its three files; the same arguments, the same folder."""
    made: dict[tuple[Path, str], Path] = {}

    def make(folder: Path, kind: str = "bf16") -> Path:
        from quantize.build import convert
        from quantize.formats.build_plan import plan_conversion
        from quantize.progress import SILENT
        from quantize.source.checkpoint import read_checkpoint

        if (folder, kind) not in made:
            out = tmp_path_factory.mktemp("converted") / f"{folder.name}-{kind}"
            convert(plan_conversion(read_checkpoint(folder), kind), out, SILENT)
            made[folder, kind] = out
        return made[folder, kind]

    return make


@pytest.fixture(scope="session")
def case(convert: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """case("bf16_tied") -> Case, made once."""
    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in made:
            with np.load(TESTS / "reference" / f"{name}.npz") as file:
                arrays = dict(file)
            folder = tmp_path_factory.mktemp("reference") / name
            toy.write_checkpoint(folder, **json.loads(str(arrays["arguments"])))
            made[name] = Case(arrays, folder, convert(folder))
        return made[name]

    return make


@pytest.fixture(scope="session")
def edge_quantize() -> Callable[..., subprocess.CompletedProcess]:
    """edge_quantize("inspect", folder): the command line in a process of its own."""

    def edge_quantize(*arguments: object, **options: Any) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "quantize.cli", *map(str, arguments)]
        env = os.environ | {"PYTHONPATH": str(TESTS.parent)}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, **options)

    return edge_quantize
