"""edge-quantize in this process, and damage to a checkpoint folder."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize.cli import main

PROGRESS = re.compile(r"[\w ]+: (done|\d+ %)")


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, list[str]]]:
    """run("inspect", folder) -> (exit status, stdout, lines of stderr that are not progress), in this process.

    In the lines tmp_path is written ~: it holds the name of the test, whose words are looked for.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def run(*arguments: object) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["edge-quantize", *map(str, arguments)])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # main may set its own, and handlers
        handlers, status = [signal.getsignal(number) for number in numbers], 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        finally:
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)
        out, err = capfd.readouterr()
        return status, out, stderr_lines(err, tmp_path)

    return run


def stderr_lines(err: str, tmp_path: Path) -> list[str]:
    return [line.replace(str(tmp_path), "~") for line in err.splitlines() if not PROGRESS.fullmatch(line)]


def refused(result: tuple[int, str, list[str]], words: tuple[str, ...], status: int = 1) -> None:
    """One line on stderr, in our name, that says all of `words`."""
    found, out, lines = result
    assert (found, out, len(lines)) == (status, "", 1), lines
    assert lines[0].startswith("edge-quantize: ")
    for word in words:
        assert word in lines[0]


# -- damage to a checkpoint --------------------------------------------------------------------------------------------

UP = "language_model.model.layers.1.mlp.up_proj.weight"  # a tensor of toy_bf16


def configure(*path: str, **values: Any) -> Callable[[Path], None]:
    """Change config.json, or a table inside it. None removes a key."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        table = config
        for key in path:
            table = table[key]
        table.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del table[key]
        (folder / "config.json").write_text(json.dumps(config))

    return change


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names]


def rewrite(change: Callable[[dict[str, list]], None]) -> Callable[[Path], None]:
    """Change model.safetensors: name -> [dtype, shape, bytes], written back as a sound file."""

    def apply(folder: Path) -> None:
        raw = (folder / "model.safetensors").read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        tensors = {
            name: [entry["dtype"], entry["shape"], raw[slice(*(start + at for at in entry["data_offsets"]))]]
            for name, entry in json.loads(raw[8:start]).items()
            if name != "__metadata__"
        }
        change(tensors)
        header, at = {}, 0
        for name, (dtype, shape, data) in tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        head = json.dumps(header).encode()
        data = b"".join(data for _, _, data in tensors.values())
        (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)

    return apply
