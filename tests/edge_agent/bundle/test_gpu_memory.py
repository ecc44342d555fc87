"""The GPU is asked in a child process, and only where llama.cpp was built for one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from edge_agent.bundle import gpu_memory
from edge_agent.bundle.gpu_memory import has_gpu_library, probe_gpu
from edge_agent.bundle.memory_plan import Gpu
from edge_agent.config import CameraConfig, Config, LanguageConfig

CONFIG = Config(bundle="/b", camera=CameraConfig(source="x"))


@pytest.fixture
def gpu_build(monkeypatch, tmp_path: Path) -> None:
    """llama.cpp with a library for CUDA."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libggml-cuda.so").touch()
    package = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: package)


@pytest.mark.parametrize("package", [None, SimpleNamespace(origin=None)])
def test_without_llama_cpp_there_is_no_library(monkeypatch, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: package)
    assert not has_gpu_library() and probe_gpu(CONFIG) is None


def test_a_build_for_a_cpu_is_not_asked(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: pytest.fail("asked"))
    assert not has_gpu_library() and probe_gpu(CONFIG) is None


def test_without_layers_on_a_gpu_nobody_asks(gpu_build: None, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: pytest.fail("asked"))
    assert has_gpu_library()
    assert (
        probe_gpu(Config(bundle="/b", camera=CameraConfig(source="x"), language=LanguageConfig(gpu_layers=0))) is None
    )


def _answers(stdout: bytes) -> Callable[..., object]:
    return lambda *_args, **_options: SimpleNamespace(stdout=stdout)


def _hangs(*_args: object, **_options: object) -> object:
    raise subprocess.TimeoutExpired("edge_agent.model.gpu", gpu_memory.TIMEOUT_S)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (_answers(b'{"free_mib":500.0,"own_memory":true}'), Gpu(free_mib=500.0, own_memory=True)),
        (_answers(b"null"), None),
        (_answers(b""), None),  # it crashed
        (_answers(b"CUDA error"), None),
        (_hangs, None),
    ],
)
def test_the_answer_of_the_process_or_none(gpu_build: None, monkeypatch, run, expected):
    monkeypatch.setattr(subprocess, "run", run)
    assert probe_gpu(CONFIG) == expected


def test_the_real_process_finds_no_gpu_in_a_build_for_a_cpu(monkeypatch):
    monkeypatch.setattr(gpu_memory, "has_gpu_library", lambda: True)
    assert probe_gpu(CONFIG) is None
