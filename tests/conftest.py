"""Toy checkpoints, conversions and one bundle, made once for all workers of a test run. Read them, never write them.

A test that needs a broken one copies it first: shutil.copytree(toy_bf16, tmp_path / "checkpoint").
Native code is imported inside the fixtures: the tests of the light modules must not load it.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coverage
import hypothesis
import numpy as np
import pytest

from tests.harness import toy
from tests.harness.case import Case
from tests.harness.shared import SharedFolders, of_this_run
from tests.harness.validation import validated_here

socket.has_ipv6 = False  # else urllib3, which mistral_common imports, makes an internet socket to see whether it can
TESTS = Path(__file__).resolve().parent
COVERED_ROOMS = ("wire", "zmtp", "client", "actions", "bundle")  # as in the Makefile, and the supervisor's gate
# Their time is waiting, in real time: flights, rehearsals, daemons that come back.
WAITING = {"test_controller.py", "test_examples.py", "test_hostile.py", "test_hostile_links.py", "test_mavsdk.py"}
WAITING |= {"test_node.py", "test_real_daemon.py", "test_rehearsal.py", "test_running_daemon.py", "test_scenarios.py"}
WAITING |= {"test_storm.py"}
COVERED_TESTS = {TESTS / "edge_agent" / room for room in COVERED_ROOMS}
GATE_TESTS = TESTS / "edge_agent" / "supervisor" / "test_gate.py"
COVERAGE = pytest.StashKey[coverage.Coverage]()
# Hypothesis measures the time of an example and of the generation of data. A busy machine must not fail a test.
hypothesis.settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy machine")

# A shell that starts the tests in the background ignores SIGINT for them and for all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """One thread for llama.cpp and for numpy, here and in every process that a test starts. The threads of a tiny model
    wait for each other more than they compute; on a busy machine each wait may cost milliseconds. Those of numpy's
    OpenBLAS double the processor time of its import. Both libraries read this while they are loaded."""
    if config.option.markexpr != "promise":
        os.environ.setdefault("OMP_THREAD_LIMIT", "1")
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits comes first, in random order as the rest. The first of the workers has it, and the others have the
    processors meanwhile; at the end no worker waits for it."""
    items.sort(key=lambda item: item.path.name not in WAITING)


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Under coverage Python needs twice the time. So it is measured where it counts: while the covered rooms are
    imported, and in their tests."""
    if session.config.pluginmanager.hasplugin("_cov") and (measured := coverage.Coverage.current()) is not None:
        for room in COVERED_ROOMS:
            for path in sorted((TESTS.parent / "edge_agent" / room).glob("*.py")):
                importlib.import_module(f"edge_agent.{room}.{path.stem}")
        importlib.import_module("edge_agent.supervisor.gate")
        while running := coverage.Coverage.current():  # a worker has two: the end of one resumes the other
            running.stop()
        session.config.stash[COVERAGE] = measured


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """From the first fixture of a test to the last one."""
    if (measured := item.config.stash.get(COVERAGE, None)) is None:
        return
    measured.stop()
    if is_covered(item):
        measured.start()


def is_covered(item: pytest.Item) -> bool:
    """The covered rooms need no other room's tests for it. Random examples do not count: what only they reach would be
    covered in one run and not in the next."""
    is_random = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
    is_of_a_room = item.path.parent in COVERED_TESTS or item.path == GATE_TESTS
    return is_of_a_room and not is_random and item.get_closest_marker("no_cover") is None


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> SharedFolders:
    return of_this_run(tmp_path_factory)


@pytest.fixture(scope="session")
def toy_bf16(shared: SharedFolders) -> Path:
    """A BF16 checkpoint folder: tied embeddings, tekken.json, one file of weights, 4096 tokens."""
    return shared.folder("toy-bf16", toy.write_checkpoint)


@pytest.fixture(scope="session")
def toy_fp8(shared: SharedFolders) -> Path:
    """An FP8 checkpoint folder: an output head of its own, otherwise as toy_bf16."""
    return shared.folder("toy-fp8", lambda folder: toy.write_checkpoint(folder, dtype="fp8", tied=False))


@pytest.fixture(scope="session")
def toy_full_vocabulary(shared: SharedFolders) -> Path:
    """A BF16 checkpoint folder with all 131072 tokens of the releases. Seconds to make: for tests of the tokenizer."""
    return shared.folder("toy-full", lambda folder: toy.write_checkpoint(folder, layers=1, vocab=131072))


@pytest.fixture(scope="session")
def toy_small(shared: SharedFolders) -> Path:
    """As toy_fp8, with half the tokens and a single layer: for tests that build a lot."""
    model = {"dtype": "fp8", "tied": False, "vocab": 2048, "layers": 1, "vision_layers": 1}
    return shared.folder("toy-small", lambda folder: toy.write_checkpoint(folder, **model))


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
def build(shared: SharedFolders) -> Callable[..., Path]:
    """build(checkpoint folder, recipe) -> a bundle; the same arguments, the same bundle."""

    def make(folder: Path, recipe: str) -> Path:
        from quantize.build import build
        from quantize.progress import SILENT
        from quantize.source.checkpoint import read_checkpoint
        from quantize.standard_recipes import plan_bundle

        def fill(out: Path) -> None:
            with validated_here():
                build(plan_bundle(read_checkpoint(folder), recipe), out, SILENT)

        return shared.folder(name_of(folder, recipe), fill)

    return make


@pytest.fixture(scope="session")
def convert(shared: SharedFolders) -> Callable[..., Path]:
    """convert(checkpoint folder, type) -> the folder with its three files; the same arguments, the same folder."""

    def make(folder: Path, kind: str = "bf16") -> Path:
        from quantize.build import convert
        from quantize.formats.build_plan import plan_conversion
        from quantize.progress import SILENT
        from quantize.source.checkpoint import read_checkpoint

        def fill(out: Path) -> None:
            convert(plan_conversion(read_checkpoint(folder), kind), out, SILENT)

        return shared.folder(name_of(folder, kind), fill)

    return make


def name_of(checkpoint: Path, kind: str) -> str:
    """A name for what is made of a checkpoint. Checkpoints in different folders can have the same name."""
    return f"{checkpoint.name}-{kind}-{zlib.crc32(bytes(checkpoint)):08x}"


@pytest.fixture(scope="session")
def case(convert: Callable[..., Path], shared: SharedFolders) -> Callable[[str], Case]:
    """case("bf16_tied") -> Case, made once."""

    @functools.cache
    def make(name: str) -> Case:
        with np.load(TESTS / "reference" / f"{name}.npz") as file:
            arrays = dict(file)
        model = json.loads(str(arrays["arguments"]))
        folder = shared.folder(f"reference-{name}", lambda folder: toy.write_checkpoint(folder, **model))
        return Case(arrays, folder, convert(folder))

    return make


@pytest.fixture(scope="session")
def edge_quantize() -> Callable[..., subprocess.CompletedProcess]:
    """edge_quantize("inspect", folder): the command line in a process of its own."""

    def edge_quantize(*arguments: object, **options: Any) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "quantize.cli", *map(str, arguments)]
        env = os.environ | {"PYTHONPATH": str(TESTS.parent)}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, **options)

    return edge_quantize
