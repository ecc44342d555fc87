"""The tree is the architecture: each file imports only files before it, and none can run or fetch what it reads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT

# From the bottom up; a file imports only what stands before it.
ORDER = [
    "messages",
    "config",
    "precheck",
    "trust",
    "bundle",
    "adapters",
    "actions",
    "bins",
    "frames",
    "worker",
    "camera",
    "pictures",
    "vision",
    "language",
    "decoding",
    "health",
    "memory",
    "engine",
    "eyes",
    "model",
    "bench",
    "notify",
    "link",
    "trace",
    "supervisor",
    "client",
    "view",
    "cli",
]
# For a controller's machine: nothing of the daemon comes along.
LIGHT = {"client": {"messages", "config"}, "view": {"messages", "config", "client"}}

BANNED_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "urllib", "urllib3", "requests", "http", "ftplib"}
BANNED_MODULES |= {"httpx", "aiohttp", "xmlrpc", "socketserver", "smtplib", "telnetlib", "jinja2"}
BANNED_NAMES = {"eval", "exec", "compile", "__import__", "urlopen", "load_image"}
BANNED_ATTRIBUTES = {"recv_pyobj", "send_pyobj", "urlopen", "urlretrieve", "unsafe_load", "full_load", "import_module"}
BANNED_CALLS = {("yaml", "load"), ("yaml", "load_all"), ("os", "system"), ("os", "popen")}


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def imported(tree: ast.AST, package: str) -> set[str]:
    """Dotted names of everything imported, at any depth: `from a import b` may mean the module a.b."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [package if node.level else "", node.module]))
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def own_imports(tree: ast.AST) -> set[str]:
    """The files of edge_agent that are imported."""
    names = {name for name in imported(tree, "edge_agent") if name.startswith("edge_agent.")}
    return {name.split(".")[1] for name in names} & set(ORDER)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def findings(tree: ast.AST) -> list[str]:
    """What could run or fetch something that came from outside."""
    found = [name for name in imported(tree, "") if name.split(".")[0] in BANNED_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in BANNED_NAMES:
            found.append(f"line {node.lineno}: {node.id}")
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in BANNED_ATTRIBUTES or (owner, node.attr) in BANNED_CALLS:
                found.append(f"line {node.lineno}: {owner}.{node.attr}")
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found += [
                f"line {node.lineno}: {module}.{alias.name}"
                for alias in node.names
                if alias.name in BANNED_ATTRIBUTES or (module, alias.name) in BANNED_CALLS
            ]
        elif isinstance(node, ast.keyword) and node.arg == "shell":
            found.append(f"line {node.value.lineno}: shell=")
    return found


# -- direction --------------------------------------------------------------------------------------------------------


def test_every_file_has_its_place():
    files = {path.relative_to(ROOT / "edge_agent").with_suffix("").as_posix() for path in sources("edge_agent")}
    assert files == {"__init__", *ORDER}


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_what_stands_before_it(name):
    path = ROOT / "edge_agent" / f"{name}.py"
    wrong = own_imports(parsed(path)) - set(ORDER[: ORDER.index(name)])
    assert not wrong, f"{name} imports {sorted(wrong)}"


@pytest.mark.parametrize("name", LIGHT)
def test_what_a_controller_imports_stays_light(name):
    assert own_imports(parsed(ROOT / "edge_agent" / f"{name}.py")) <= LIGHT[name]


def test_the_package_itself_imports_nothing():
    assert imported(parsed(ROOT / "edge_agent" / "__init__.py"), "edge_agent") <= {
        "__future__",
        "__future__.annotations",
    }


@pytest.mark.parametrize("path", sources("edge_agent"), ids=lambda path: path.stem)
def test_the_runtime_never_imports_the_toolchain_or_the_tests(path):
    roots = {name.split(".")[0] for name in imported(parsed(path), "edge_agent")}
    assert not roots & {"quantize", "tests", "toy", "torch", "transformers"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import edge_agent.link", {"link"}),
        ("from edge_agent import link, model as m", {"link", "model"}),
        ("from edge_agent.link import Link", {"link"}),
        ("def f():\n    if 1:\n        from edge_agent.view import watch", {"view"}),
        ("from . import camera", {"camera"}),
        ("from .camera import open", {"camera"}),
        ("import edge_agent\nfrom edge_agent import __version__", set()),
    ],
)
def test_every_way_to_import_is_seen(source, expected):
    assert own_imports(ast.parse(source)) == expected


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("supervisor", {"llama_cpp", "onnxruntime", "cv2", "llguidance", "gguf", "onnx"}),
        ("cli", {"llama_cpp", "onnxruntime", "cv2", "llguidance", "gguf", "onnx", "numpy"}),
        ("client", {"llama_cpp", "onnxruntime", "cv2", "llguidance", "gguf", "onnx", "numpy", "rich"}),
        ("camera", {"llama_cpp", "onnxruntime", "llguidance", "gguf"}),
    ],
)
def test_what_a_process_really_loads(module, absent):
    """The supervisor must not die of native code; the camera must not hold the model's memory."""
    code = f"import sys, edge_agent.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not absent & set(done.stdout.split())


# -- nothing runs what it reads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sources("edge_agent") + sources("quantize"), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_nothing_from_outside_can_be_run_or_fetched(path):
    assert findings(parsed(path)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import urllib.request",
        "from urllib import request",
        "import http.client",
        "import requests",
        "eval(text)",
        "exec(text)",
        "f = eval",
        "__import__(name)",
        "compile(text, '', 'exec')",
        "yaml.load(text, Loader=yaml.Loader)",
        "from yaml import load",
        "yaml.unsafe_load(text)",
        "socket.recv_pyobj()",
        "socket.send_pyobj(x)",
        "urlopen(x)",
        "request.urlopen(x)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=flag)",
        "os.system(text)",
        "from os import system",
        "os.popen(text)",
        "importlib.import_module(name)",
        "def f():\n    import pickle",
    ],
)
def test_the_check_finds_what_it_is_for(source):
    assert findings(ast.parse(source))


def test_the_check_lets_through_what_is_meant():
    harmless = (
        "import re, os, yaml\nre.compile('x')\nyaml.safe_load('')\nos.open('x', 0)\nsubprocess.run(['ls'])\nload(1)"
    )
    assert findings(ast.parse(harmless)) == []
