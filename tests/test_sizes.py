"""Files, functions and parameter lists stay small enough to read; a longer one has its reason here."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from tests.harness import ROOT

pytestmark = pytest.mark.no_cover  # no code of the product runs here

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 500, 60, 7
# Path, or path:function -> why it may be longer.
REASONS: dict[str, str] = {
    "edge_agent/supervisor/process.py:__init__": "four parameters replace the clock and the processes in tests",
    "models/pad_pilot/scene.py:render": "one picture; each parameter is a part of the scene",
    "tests/harness/toy.py:write_checkpoint": "every parameter is one way in which checkpoints differ",
    "tests/harness/toy_config.py:config": "the content of a file, key for key",
    "tests/harness/toy_tokenizer.py:write_tokenizer": "the content of a file, key for key",
}


def sources() -> list[Path]:
    folders = ("edge_agent", "quantize", "models", "benchmarks", "examples", "docs", "tests")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def too_large(path: Path) -> dict[str, str]:
    """What is over a limit: path or path:function -> by how much."""
    text, name = path.read_text(encoding="utf-8"), name_of(path)
    found = {}
    if (n_lines := text.count("\n")) > MAX_FILE_LINES:
        found[name] = f"{n_lines} lines, the limit is {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        n_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        n_parameters = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
        if n_lines > MAX_FUNCTION_LINES:
            found[f"{name}:{node.name}"] = f"{n_lines} lines, the limit is {MAX_FUNCTION_LINES}"
        if n_parameters > MAX_PARAMETERS:
            found[f"{name}:{node.name}"] = f"{n_parameters} parameters, the limit is {MAX_PARAMETERS}"
    return found


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_nothing_is_too_large_without_a_reason(path):
    assert {place: size for place, size in too_large(path).items() if place not in REASONS} == {}


def test_every_reason_is_still_needed():
    assert REASONS.keys() == {place for path in sources() for place in too_large(path)} & REASONS.keys()


def test_what_is_too_large_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_sizes.ROOT", tmp_path)
    path = tmp_path / "long.py"
    path.write_text("def f(a, b, c, d, e, f, g, h):\n" + "    a = 1\n" * 60 + "\n" * 440)
    assert too_large(path).keys() == {"long.py", "long.py:f"}
