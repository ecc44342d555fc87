"""Small bundles, a folder to install them in, and GGUF files to wrap."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.harness import gguf_toys as toys
from tests.harness import small_bundle


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch):
    """What is synced, and when, is seen by the recorder of tests.harness.power_cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def make(tmp_path):
    """make("a", counter=1): a small bundle; its maker is "a"."""
    return lambda name, counter=None, key=None: small_bundle.make(tmp_path / "made" / name, counter, key)


@pytest.fixture
def bundles(tmp_path) -> Path:
    return tmp_path / "bundles"


@pytest.fixture(scope="session")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.write_language(tmp_path_factory.mktemp("chatml") / "toy-chatml.gguf")


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("gemma")
    language = toys.write_language(folder / "toy-gemma.gguf", "gemma3", toys.GEMMA)
    return language, toys.write_gemma_mmproj(folder / "mmproj-toy-gemma.gguf")
