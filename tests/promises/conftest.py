"""Where the sockets of a daemon are, and the JSON line of a promise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[[dict[str, Any]], None]:
    """report(figures): one JSON line on the terminal."""

    def show(figures: dict[str, Any]) -> None:
        with capsys.disabled():
            print("\n" + json.dumps(figures))

    return show
