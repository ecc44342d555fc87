"""gpu_build.sh: what `make venv` installs for an NVIDIA GPU, or why not. The programs are fakes in PATH."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.harness import ROOT

CUDA = "-DGGML_CUDA=on -DGGML_CUDA_NO_VMM=ON -DCMAKE_CUDA_ARCHITECTURES={} -DCMAKE_CUDA_COMPILER={}"
ONE_CARD = 'case "$1" in -L) echo "GPU 0: a card (UUID: GPU-1)" ;; *) echo 8.9 ;; esac'
TWO_CARDS = 'case "$1" in -L) echo "GPU 0: a"; echo "GPU 1: b" ;; *) echo 8.9; echo 8.6; echo 8.9 ;; esac'
NO_CARD = 'echo "NVIDIA-SMI has failed: no driver"; exit 9'
A_JETSON = 'case "$1" in -L) echo "GPU 0: Orin (nvgpu) (UUID: 1)" ;; *) echo "[N/A]" ;; esac'


class Machine:
    """Programs, a processor and a device tree."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.programs = folder, folder / "bin"
        self.programs.mkdir()
        self.has("uname", "echo x86_64")

    def has(self, name: str, script: str, folder: Path | None = None) -> Path:
        path = (folder or self.programs) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def is_board(self, *names: str) -> None:
        self.has("uname", "echo aarch64")
        tree = self.folder / "proc" / "device-tree"
        tree.mkdir(parents=True)
        (tree / "compatible").write_bytes(b"".join(name.encode() + b"\0" for name in names))

    def chooses(self, **env: str) -> tuple[str, str, str]:
        """(extra, cmake_args, reasons), as the recipe of `make venv` gets them."""
        script = f'eval "$(sh {ROOT}/gpu_build.sh {self.folder})"; echo "$extra|$cmake_args"'
        clean = {name: value for name, value in os.environ.items() if name not in ("CMAKE_ARGS", "CUDACXX")}
        done = subprocess.run(
            ["sh", "-euc", script],
            capture_output=True,
            text=True,
            timeout=60,
            env=clean | {"PATH": f"{self.programs}:/usr/bin:/bin"} | env,
        )
        assert done.returncode == 0, done.stderr
        extra, _, arguments = done.stdout.strip().partition("|")
        return extra, arguments, done.stderr


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("smi", [None, NO_CARD])
def test_without_a_gpu_everything_is_for_the_cpu(machine, smi):
    machine.has("nvcc", "exit 0")
    if smi:
        machine.has("nvidia-smi", smi)
    assert machine.chooses()[:2] == ("cpu", "")


@pytest.mark.parametrize(("smi", "architecture"), [(ONE_CARD, "89"), (TWO_CARDS, "86;89")])
def test_cards_get_cuda_for_their_architectures(machine, smi, architecture):
    machine.has("nvidia-smi", smi)
    nvcc = machine.has("nvcc", "exit 0")
    extra, arguments, reasons = machine.chooses()
    assert (extra, arguments) == ("gpu", CUDA.format(architecture, nvcc)) and f"sm_{architecture}" in reasons


@pytest.mark.parametrize(
    ("names", "smi", "architecture"),
    [
        (("nvidia,p3768-0000+p3767-0003", "nvidia,p3767-0003", "nvidia,tegra234"), None, "87"),
        (("nvidia,p3768-0000+p3767-0003", "nvidia,tegra234"), A_JETSON, "87"),
        (("nvidia,p4071-0000+p3834-0008", "nvidia,tegra264"), None, "110"),
    ],
)
def test_a_jetson_gets_cuda_from_its_folder_and_onnxruntime_for_the_cpu(machine, names, smi, architecture):
    """The folder is not in PATH there. PyPI's onnxruntime-gpu has no code for its GPU, or no wheel."""
    machine.is_board(*names)
    if smi:
        machine.has("nvidia-smi", smi)
    nvcc = machine.has("nvcc", "exit 0", machine.folder / "usr" / "local" / "cuda" / "bin")
    extra, arguments, reasons = machine.chooses()
    assert (extra, arguments) == ("cpu", CUDA.format(architecture, nvcc)) and "docs/jetson.md" in reasons


@pytest.mark.parametrize(
    ("nvcc", "words"),
    [
        (None, "no nvcc in PATH, CUDACXX or /usr/local/cuda"),
        ("echo 'probe.cu(1): fatal error: cublas_v2.h: No such file' >&2; exit 1", "cublas_v2.h: No such file"),
        ("echo 'ld: cannot find -lcublas' >&2; exit 1", "cannot find -lcublas"),
        ("echo \"nvcc fatal: Unsupported gpu architecture 'compute_89'\" >&2; exit 1", "Unsupported gpu architecture"),
    ],
)
def test_a_card_without_a_compiler_that_works_is_told_why(machine, nvcc, words):
    machine.has("nvidia-smi", ONE_CARD)
    if nvcc:
        machine.has("nvcc", nvcc)
    extra, arguments, reasons = machine.chooses()
    assert (extra, arguments) == ("gpu", "") and "llama.cpp without CUDA" in reasons and words in reasons


def test_a_gpu_that_nobody_knows_is_named(machine):
    machine.is_board("nvidia,tegra999")
    machine.has("nvcc", "exit 0")
    assert machine.chooses()[1] == "" and "set CMAKE_ARGS" in machine.chooses()[2]


def test_arguments_of_the_environment_stay(machine):
    machine.has("nvidia-smi", ONE_CARD)
    machine.has("nvcc", "exit 1")
    extra, arguments, reasons = machine.chooses(CMAKE_ARGS="-DGGML_VULKAN=on")
    assert (extra, arguments) == ("gpu", "") and "-DGGML_VULKAN=on" in reasons


def test_a_board_of_somebody_else_is_no_jetson(machine):
    machine.is_board("raspberrypi,5-model-b", "brcm,bcm2712")
    assert machine.chooses()[:2] == ("cpu", "")


def test_the_recipe_gives_the_choice_to_pip():
    text = (ROOT / "Makefile").read_text()
    assert 'choice=$$(sh gpu_build.sh) && eval "$$choice"' in text
    assert '-e ".[$$extra,quantize,terminal,mavlink,dev]"' in text and 'export CMAKE_ARGS="$$cmake_args"' in text
