"""edge-quantize in this process, for every test of the toolchain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.quantize_cli import run
from tests.harness.validation import validated_here

__all__ = ["run", "tokenizer_reads"]


@pytest.fixture
def validation_process() -> None:
    """Builds of this test validate in a process of its own, as they do for a user."""


@pytest.fixture(autouse=True)
def validation(request: pytest.FixtureRequest) -> Iterator[None]:
    if "validation_process" in request.fixturenames:
        yield
        return
    with validated_here():
        yield


@pytest.fixture
def tokenizer_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tokenizer files that are read from now on. Each takes more than a second for 131072 tokens."""
    from quantize.source import tokenizer

    names: list[str] = []
    read_table = tokenizer.read_table

    def counted(path: Path) -> dict[str, Any]:
        names.append(path.name)
        return read_table(path)

    monkeypatch.setattr(tokenizer, "read_table", counted)
    return names
