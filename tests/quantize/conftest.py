"""edge-quantize in this process, for every test of the toolchain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness.quantize_cli import run

__all__ = ["run", "tokenizer_reads"]


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
