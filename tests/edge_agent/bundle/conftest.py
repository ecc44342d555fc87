"""Small bundles, and a folder to install them in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
