"""Every fall-back speaks: what was asked for, what runs, why. There is no GPU here: the facts are written down."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import pytest

from edge_agent.config import AdvancedConfig, CameraConfig, Config, LanguageConfig
from edge_agent.model.fallbacks import LanguageFacts, find_fallbacks, language_facts
from edge_agent.profile import resolve
from tests.harness import ROOT

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
CONFIG = Config(bundle="b", camera=CameraConfig(source="none"))
ON_CPU = LanguageFacts(gpu_layers=0, layers=0, is_gpu_build=False, has_openmp=True, mlock_failed=False)
HIDDEN = ON_CPU._replace(is_gpu_build=True)  # a GPU build in a unit that keeps the GPU away
ON_GPU = HIDDEN._replace(gpu_layers=33, layers=33)
# llama.cpp's own lines.
LOG = [
    "load_tensors: loading model tensors, this can take a while... (mmap = false)",
    "load_tensors: offloading output layer to GPU",
    "load_tensors: offloaded 20/33 layers to GPU",
    "warning: failed to mlock 536870912-byte buffer (after previously locking 0 bytes): Cannot allocate memory",
]
INFO = "CPU : SSE3 = 1 | LLAMAFILE = 1 | OPENMP = 1 | REPACK = 1 | "


def lines_of(
    language: LanguageFacts, asked: str = CPU, runs: str = CPU, layers: int = -1, **changes: object
) -> list[str]:
    config = msgspec.structs.replace(CONFIG, language=LanguageConfig(gpu_layers=layers), **changes)
    return find_fallbacks(config, resolve(config, gpu=bool(language.gpu_layers)), language, asked, runs)


@pytest.mark.parametrize(
    ("language", "layers", "words"),
    [
        (
            HIDDEN,
            -1,
            "language.gpu_layers is -1, but the model runs on the CPU: llama.cpp finds no GPU that it may use",
        ),
        (
            HIDDEN,
            10,
            "language.gpu_layers is 10, but the model runs on the CPU: llama.cpp finds no GPU that it may use",
        ),
        (ON_CPU, 10, "language.gpu_layers is 10, but the model runs on the CPU: llama.cpp was built without a GPU"),
        (ON_GPU._replace(gpu_layers=20), -1, "language.gpu_layers is -1, but 20 of 33 layers are on the GPU"),
        (ON_GPU._replace(gpu_layers=5), 10, "language.gpu_layers is 10, but 5 of 33 layers are on the GPU"),
    ],
)
def test_a_language_model_that_is_not_on_the_gpu_as_asked(language, layers, words):
    (line,) = lines_of(language, layers=layers)
    assert line.startswith(words)


@pytest.mark.parametrize(
    ("asked", "runs", "is_told"),
    [
        (CUDA, CPU, True), (TENSORRT, CPU, True), (TENSORRT, CUDA, True),
        (CUDA, CUDA, False), (CPU, CPU, False), ("", "", False),
    ],
)  # fmt: skip
def test_a_vision_encoder_that_runs_by_another_provider(asked, runs, is_told):
    lines = lines_of(ON_CPU, asked, runs)
    assert len(lines) == is_told
    assert not is_told or (runs in lines[0] and asked in lines[0])


@pytest.mark.parametrize(
    ("language", "changes", "words"),
    [
        (ON_CPU._replace(mlock_failed=True), {"advanced": AdvancedConfig(mlock=True)}, "advanced.mlock: "),
        (ON_CPU._replace(has_openmp=False), {}, "llama.cpp was built without OpenMP"),
        (ON_GPU, {"profile": "reproducible"}, "profile: reproducible is not possible on a GPU"),
        (
            ON_CPU,
            {"profile": "reproducible", "advanced": AdvancedConfig(flash_attention=True)},
            "profile: reproducible is not possible with flash attention",
        ),
    ],
)
def test_a_switch_that_cannot_be_had(language, changes, words):
    (line,) = lines_of(language, **changes)
    assert line.startswith(words)


@pytest.mark.parametrize(
    ("language", "layers", "changes"),
    [
        (ON_CPU, -1, {}),  # the default on a machine without a GPU
        (ON_CPU, 0, {"profile": "reproducible"}),
        (HIDDEN, 0, {}),
        (ON_GPU, -1, {}),
        (ON_GPU, 99, {}),
        (ON_CPU._replace(mlock_failed=True), -1, {}),
    ],
)
def test_what_runs_as_asked_needs_no_line(language, layers, changes):
    assert lines_of(language, layers=layers, **changes) == []


def test_the_facts_are_read_from_what_llama_cpp_says():
    facts = language_facts(LOG, INFO, is_gpu_build=True)
    assert facts == LanguageFacts(20, 33, is_gpu_build=True, has_openmp=True, mlock_failed=True)
    assert facts.backend == "llama.cpp GPU, 20 of 33 layers"
    facts = language_facts([], INFO.replace("OPENMP = 1 | ", ""), is_gpu_build=False)
    assert facts == ON_CPU._replace(has_openmp=False) and facts.backend == "llama.cpp CPU"


def test_waiting_threads_sleep_soon():
    """libgomp reads the variable while it is loaded: set later, it has no effect."""
    env = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    env |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "import edge_agent.model.llama"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("llama.cpp was built without GNU's OpenMP")
    assert "GOMP_SPINCOUNT = '20000'" in done.stderr
