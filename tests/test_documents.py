"""The documents stay true: generated pages are current, links lead somewhere, and lists of the code are complete."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import get_args

import msgspec
import pytest

from edge_agent.config import Config
from edge_agent.ipc.events import CameraFaultReason
from edge_agent.wire.messages import DaemonState, RefusalReason, TextStopReason
from tests.harness import ROOT
from tests.test_imports import ROOMS

TOP_FOLDERS = ("benchmarks", "docs", "edge_agent", "examples", "models", "quantize", "systemd", "tests")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(page for folder in TOP_FOLDERS for page in (ROOT / folder).rglob("*.md"))])


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generator()


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    """Markdown without fenced blocks, indented blocks and code spans."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^ {4,}.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def links(path: Path) -> list[str]:
    """Targets of the links and pictures of a document that do not leave the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8")))
    return [target for target in targets if "://" not in target]


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {generate.anchor(heading.strip()) for heading in headings}


def section(page: str, heading: str) -> str:
    parts = re.split(r"^## (.+)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[heading]


def first_column(page: str, heading: str) -> list[str]:
    """The code spans in the first cells of the table under a heading."""
    return re.findall(r"^\| `([^`]*)` \|", section(page, heading), flags=re.MULTILINE)


@pytest.mark.parametrize("page", generate.PAGES)
def test_generated_page_is_current(page):
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == generate.PAGES[page](), "run: make docs"


def test_example_describes_every_key():
    comments = generate.example_comments(generate.EXAMPLE.read_text(encoding="utf-8"))
    for path, table in generate.config_tables(Config):
        for field in msgspec.structs.fields(table):
            if not generate.is_table(field):
                assert comments.get((*path, field.encode_name)), f"{(*path, field.encode_name)} has no comment"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headings(path):
    for target in links(path):
        name, _, fragment = target.partition("#")
        file = path if not name else (path.parent / name).resolve()
        assert file.exists(), f"{target}: no such file"
        assert not fragment or fragment in anchors(file), f"{target}: no such heading"


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=name_of)
def test_named_files_and_modules_exist(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(rf"(?<![\w/.-])(?:{'|'.join(TOP_FOLDERS)})/[\w./-]*", text):
        assert (ROOT / name.rstrip(".")).exists(), f"{name}: no such file"
    for name in re.findall(r"(?<![\w/.-])(?:edge_agent|quantize)\.[a-z_]\w*", text):
        module = ROOT / name.replace(".", "/")
        assert module.is_dir() or module.with_suffix(".py").exists() or "__" in name, f"{name}: no such module"


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("The daemon's state", set(get_args(DaemonState))),
        ("Camera faults", set(get_args(CameraFaultReason))),
        ("Refusals", set(get_args(RefusalReason))),
        ("Text that ends early", set(get_args(TextStopReason)) - {""}),
    ],
)
def test_troubleshooting_lists_every_value(heading, expected):
    assert sorted(first_column("docs/troubleshooting.md", heading)) == sorted(expected)


def definitions(path: Path) -> set[str]:
    """Names of the functions, classes and methods of a module: f, C, C.m."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def code_flow(heading: str) -> list[tuple[str, list[str]]]:
    """(file, names in it) of each row of a table of docs/architecture.md that has a cell with one file."""
    rows = re.findall(r"\| `([\w/]+\.py)` \| ([^|]+) \|", section("docs/architecture.md", heading))
    return [(file, re.findall(r"`([\w.]+)`", cell)) for file, cell in rows]


FLOWS = ["One frame", "One action through the MAVLink bridge", "One question", "One tensor in `edge-quantize build`"]


@pytest.mark.parametrize("heading", FLOWS)
def test_architecture_names_functions_that_exist(heading):
    rows = code_flow(heading)
    assert len(rows) > 5
    for file, names in rows:
        assert names, f"{file}: no function"
        missing = set(names) - definitions(ROOT / file)
        assert not missing, f"{file}: no {', '.join(sorted(missing))}"


def test_contributing_repeats_the_table_of_rooms():
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]*) ?\|$", section("CONTRIBUTING.md", "Rooms"), flags=re.MULTILINE)
    assert {room: set(re.findall(r"`(\w+)`", cell)) for room, cell in rows} == {
        room: allowed for room, (allowed, _) in ROOMS.items()
    }


def test_results_are_lines_of_json_with_their_origin():
    files = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
    assert files
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            assert {"date", "commit", "machine"} <= json.loads(line).keys(), file.name
    linked = {(ROOT / "benchmarks" / target).resolve() for target in links(ROOT / "benchmarks" / "RESULTS.md")}
    assert set(files) <= linked


def test_the_checks_find_what_they_are_for(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One heading\n\n[a](other.md) ![b](b.png) [c](https://x.org) `[d](d.md)`\n\n    [e](e.md)\n")
    assert links(page) == ["other.md", "b.png"]
    assert anchors(page) == {"one-heading"}
    module = tmp_path / "module.py"
    module.write_text("def f(): pass\nclass C:\n    def m(self): pass\nX = 1\n")
    assert definitions(module) == {"f", "C", "C.m"}
