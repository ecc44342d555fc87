"""Files, functions and parameter lists stay small enough to read; a longer one has its reason here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.harness import ROOT

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


def functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """At any depth. Expressions, which hold none, are most of a file."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from functions(child)


def too_large(path: Path) -> dict[str, str]:
    """What is over a limit: path or path:function -> by how much."""
    text, name = path.read_text(encoding="utf-8"), name_of(path)
    found = {}
    if (n_lines := text.count("\n")) > MAX_FILE_LINES:
        found[name] = f"{n_lines} lines, the limit is {MAX_FILE_LINES}"
    for node in functions(ast.parse(text)):
        n_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        n_parameters = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
        if n_lines > MAX_FUNCTION_LINES:
            found[f"{name}:{node.name}"] = f"{n_lines} lines, the limit is {MAX_FUNCTION_LINES}"
        if n_parameters > MAX_PARAMETERS:
            found[f"{name}:{node.name}"] = f"{n_parameters} parameters, the limit is {MAX_PARAMETERS}"
    return found


def test_nothing_is_too_large_without_a_reason_and_every_reason_is_still_needed():
    found: dict[str, str] = {}
    for path in sources():
        found |= too_large(path)
    assert {place: size for place, size in found.items() if place not in REASONS} == {}
    assert REASONS.keys() <= found.keys()


def test_what_is_too_large_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_sizes.ROOT", tmp_path)
    path = tmp_path / "long.py"
    path.write_text("if 1:\n  def f(a, b, c, d, e, f, g, h):\n" + "    a = 1\n" * 60 + "\n" * 440)
    assert too_large(path).keys() == {"long.py", "long.py:f"}
