"""The tree is the architecture: a table says which room may import which, and each room's files have an order.

A room is a folder of `edge_agent/` or `quantize/`, or a single file beside those folders. Network modules belong to
`apps` alone, and nothing may run or fetch what it reads.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT

# Room -> (the other rooms of edge_agent that it may import, packages of others that it may import).
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "time_units": (set(), set()),
    "suspend": ({"time_units"}, set()),
    "systemd": (set(), set()),
    "small_file": (set(), set()),
    "strict_yaml": ({"errors", "small_file"}, {"msgspec", "yaml"}),
    "yaml_edit": ({"errors", "strict_yaml"}, {"yaml"}),
    "config": ({"errors", "strict_yaml"}, {"msgspec"}),
    "profile": ({"config"}, {"msgspec"}),
    "wire": ({"time_units"}, {"msgspec"}),
    "zmtp": ({"wire"}, set()),
    "client": ({"suspend", "time_units", "wire"}, {"msgspec", "zmq"}),
    "board": (set(), set()),
    "actions": ({"errors", "strict_yaml", "time_units", "wire"}, {"msgspec"}),
    "bundle": ({"errors", "config", "profile", "small_file", "strict_yaml"}, {"msgspec", "gguf", "cryptography"}),
    "ipc": ({"time_units", "wire"}, {"cv2", "msgspec", "numpy"}),
    "camera": (
        {"ipc", "config", "errors", "suspend", "time_units", "wire", "zmtp"},
        {"cv2", "msgspec", "numpy", "simplejpeg"},
    ),
    "model": (
        {"ipc", "config", "errors", "actions", "bundle", "board", "suspend", "wire", "profile", "time_units"},
        {"cv2", "gguf", "llama_cpp", "llguidance", "msgspec", "numpy", "onnxruntime"},
    ),
    "supervisor": (
        {
            "ipc", "config", "errors", "actions", "bundle", "board", "suspend", "systemd", "time_units", "wire", "zmtp",
        },
        {"msgspec"},
    ),
    # The daemon's own endpoints, so that a controller under test finds what it will find in the field.
    "rehearsal": ({"errors", "supervisor", "time_units", "wire", "zmtp"}, {"msgspec"}),
    "doctor": ({"board", "bundle", "config", "errors", "wire"}, {"msgspec"}),
    "apps": ({"client", "time_units", "wire"}, {"msgspec", "rich"}),
    "mavlink": (
        {"client", "errors", "strict_yaml", "suspend", "systemd", "time_units", "wire"}, {"msgspec", "pymavlink"}
    ),
    "ros2": (
        {"client", "errors", "time_units", "wire"},
        {
            "builtin_interfaces", "diagnostic_msgs", "geometry_msgs", "msgspec", "numpy", "rclpy", "sensor_msgs",
            "std_msgs", "std_srvs",
        },
    ),
    "tools": (
        {
            "model", "camera", "ipc", "bundle", "actions", "config", "client", "board", "errors", "profile",
            "strict_yaml", "time_units", "wire",
        },
        {"cv2", "msgspec", "numpy"},
    ),
    "cli": (
        {
            "actions", "apps", "board", "bundle", "client", "config", "doctor", "errors", "mavlink", "profile",
            "rehearsal", "ros2", "strict_yaml", "supervisor", "time_units", "tools", "wire", "yaml_edit",
        },
        {"msgspec"},
    ),
}  # fmt: skip
# Room -> its files; each imports only files before it. Files not named here stand beside each other and import none.
ORDER: dict[str, list[str]] = {
    "wire": ["codec", "messages", "control", "streams", "endpoints", "pushed_frame", "information_age"],
    "zmtp": ["frames", "listener", "endpoint"],
    "client": ["control_connection", "received", "values", "client", "chunk_player", "pusher", "__init__"],
    "actions": ["decimals", "space", "prompt", "grammar", "action_tokens", "vehicle_state", "envelope"],
    "bundle": [
        "gguf_package", "files", "file_check", "onnx_check", "recognise", "signing", "layout", "manifest",
        "model_facts", "manifest_check", "verify", "store", "verified_files", "lora_check", "model_start",
        "memory_plan", "gpu_memory", "gguf_source", "wrap",
    ],
    "board": ["control_groups", "health", "sensors", "cuda_code", "nvml"],
    "ipc": ["backoff", "token_sizes", "image_grid", "frame_slot", "events", "worker"],
    "camera": [
        "__init__", "clock", "source", "picture", "recording", "v4l2", "gstreamer", "files", "pushed", "process",
        "__main__",
    ],
    "model": [
        "__init__", "ceilings", "onnx_runtime", "preprocess", "token_budget", "vision_encoder", "fallbacks", "families",
        "frame_buffer", "gpu", "batch", "llama", "batch_shape", "constrained", "events", "prompt", "text_lane",
        "action_lane", "engine", "image_encoder", "frame_encoder", "load", "gpu_sensor", "supervisor_channel", "loop",
        "native_probe", "__main__",
    ],
    "supervisor": [
        "shutdown", "log", "child_log", "pause_file", "trace", "runtime_folder", "publisher",
        "managed_worker", "camera_worker", "model_worker", "gate", "governor", "board_monitor", "status",
        "waiting_changes", "control", "verification", "process",
    ],
    "rehearsal": ["records", "judge", "control", "player", "scripts", "scenarios", "controller", "__init__"],
    "doctor": [
        "finding", "machine", "unit", "hardware", "accelerator", "memory", "storage", "service", "camera", "examine",
        "collect",
    ],
    "apps": ["wire_log", "screen", "terminal"],
    "mavlink": [
        "__init__", "config", "dialect", "modes", "setpoint", "boot_clock", "autopilot", "envelope", "search",
        "follower", "transport", "link", "telemetry", "state_push", "words", "bridge", "dry_run",
    ],
    "ros2": ["interfaces", "image", "stamps", "motion", "follower", "diagnostics", "requests", "node", "process"],
    "tools": ["stills", "power_meter", "bench", "measure_daemon", "encoder_choices", "tune"],
    "cli": [
        "commands", "bundles", "installed", "control", "daemon", "check", "tune", "doctor", "rehearse", "ros2",
        "mavlink", "main",
    ],
}  # fmt: skip
# Packages that do harm when they are imported as they are -> the only file that imports them. Its docstring says why.
SOLE_IMPORTERS = {
    "gguf": "edge_agent/bundle/gguf_package.py",
    "onnxruntime": "edge_agent/model/onnx_runtime.py",
    "pymavlink": "edge_agent/mavlink/dialect.py",
}
# The same for the toolchain, whose order is the order of a build.
TOOLCHAIN = [
    "progress", "build_folder", "source", "formats", "standard_recipes", "validate", "build", "boards", "measure",
    "cli",
]  # fmt: skip
TOOLCHAIN_ORDER: dict[str, list[str]] = {
    "source": ["known_keys", "tensor_names", "hf_config", "safetensors", "checkpoint", "tokenizer", "lora"],
    "formats": ["ggml_kernels", "gguf_writer", "imatrix", "build_plan", "tensor_blocks", "gguf_files", "vision_onnx"],
    "measure": ["perplexity", "collect_imatrix", "bit_allocation", "evaluate", "html_report"],
    "cli": ["interrupt", "progress_display", "printed", "commands", "parser", "entry", "__init__", "__main__"],
}
TOOLCHAIN_MAY = {"board", "errors", "config", "bundle", "actions", "model", "tools", "wire", "strict_yaml"}

NETWORK_MODULES = {"urllib", "urllib3", "requests", "http", "ftplib", "httpx", "aiohttp", "xmlrpc", "socketserver"}
NETWORK_MODULES |= {"smtplib", "telnetlib"}
BANNED_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "jinja2"}
BANNED_NAMES = {"eval", "exec", "compile", "__import__", "urlopen", "load_image"}
BANNED_ATTRIBUTES = {"recv_pyobj", "send_pyobj", "urlopen", "urlretrieve", "unsafe_load", "full_load", "import_module"}
BANNED_CALLS = {("yaml", "load"), ("yaml", "load_all"), ("os", "system"), ("os", "popen")}


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def name_of(path: Path) -> str:
    """edge_agent/wire/codec.py -> edge_agent/wire/codec, for the names of tests."""
    return path.relative_to(ROOT).with_suffix("").as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[1]


@functools.cache
def imported(tree: ast.AST) -> set[str]:
    """Dotted names of everything imported, at any depth: `from a import b` may mean the module a.b."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(tree: ast.AST, package: str) -> set[tuple[str, ...]]:
    """Rooms and files of `package` that are imported: ("wire", "codec"), or ("errors",) for a file beside the rooms."""
    found: set[tuple[str, ...]] = set()
    for name in imported(tree):
        parts = name.split(".")
        if parts[0] != package:
            continue
        folder = ROOT / package
        if len(parts) > 1 and (folder / f"{parts[1]}.py").is_file():
            found.add((parts[1],))
        elif len(parts) > 1 and (folder / parts[1]).is_dir():
            is_file = len(parts) > 2 and (folder / parts[1] / f"{parts[2]}.py").is_file()
            found.add((parts[1], parts[2]) if is_file else (parts[1],))
    return found


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def roots_of(path: Path) -> set[str]:
    """The packages that a file imports, at any depth."""
    return {name.split(".")[0] for name in imported(parsed(path))}


def findings(tree: ast.AST, network: bool = False) -> list[str]:
    """What could run something that came from outside, or reach a network."""
    banned = BANNED_MODULES if network else BANNED_MODULES | NETWORK_MODULES
    found = [name for name in imported(tree) if name.split(".")[0] in banned]
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


def test_every_room_of_the_daemon_is_in_the_table():
    assert {room_of(path) for path in sources("edge_agent")} - {"__init__"} == set(ROOMS)


def test_the_table_has_no_circle():
    """Each room stands above all that it may import."""
    floors: dict[str, int] = {}
    while len(floors) < len(ROOMS):
        ready = [room for room in ROOMS if room not in floors and ROOMS[room][0] <= floors.keys()]
        assert ready, f"a circle among {sorted(ROOMS.keys() - floors.keys())}"
        floors |= dict.fromkeys(ready, max(floors.values(), default=0) + 1)


def test_a_file_imports_only_the_rooms_that_its_own_room_may():
    too_many = {}
    for path in sources("edge_agent"):
        room = room_of(path)
        may, may_foreign = ROOMS.get(room, (set(), set()))
        others = {name[0] for name in own_imports(parsed(path), "edge_agent")} - {room}
        foreign = roots_of(path) - set(sys.stdlib_module_names) - {"edge_agent", "quantize"}
        too_many[name_of(path)] = (others - may) | (foreign - may_foreign)
    assert {name: found for name, found in too_many.items() if found} == {}


ORDERED = [("edge_agent", room, order) for room, order in ORDER.items()]
ORDERED += [("quantize", room, order) for room, order in TOOLCHAIN_ORDER.items()]


@pytest.mark.parametrize(("package", "room", "order"), ORDERED, ids=[f"{row[0]}/{row[1]}" for row in ORDERED])
def test_files_of_a_room_import_only_files_before_them(package, room, order):
    folder = ROOT / package / room
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(order) - {"__init__"}
    for i, name in enumerate(order):
        inside = {
            found[1] for found in own_imports(parsed(folder / f"{name}.py"), package) if found[0] == room and found[1:]
        }
        assert inside <= set(order[:i]), f"{room}/{name} imports {sorted(inside - set(order[:i]))}"


def test_the_daemon_never_imports_the_toolchain_or_the_tests():
    never = {"quantize", "tests", "models", "torch", "transformers"}
    assert [name_of(path) for path in sources("edge_agent") if roots_of(path) & never] == []


def test_the_toolchain_imports_in_the_order_of_a_build():
    too_many = {}
    for path in sources("quantize"):
        room = room_of(path)
        before = set(TOOLCHAIN[: TOOLCHAIN.index(room)]) if room != "__init__" else set()
        others = {name[0] for name in own_imports(parsed(path), "quantize")} - {room}
        theirs = {name[0] for name in own_imports(parsed(path), "edge_agent")}
        never = roots_of(path) & {"tests", "models", "torch", "transformers"}
        too_many[name_of(path)] = (others - before) | (theirs - TOOLCHAIN_MAY) | never
    assert {name: found for name, found in too_many.items() if found} == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import edge_agent.ipc.events", {("ipc", "events")}),
        ("from edge_agent.ipc import events, worker as w", {("ipc",), ("ipc", "events"), ("ipc", "worker")}),
        ("from edge_agent.ipc.events import Proposal", {("ipc", "events")}),
        ("def f():\n    if 1:\n        from edge_agent.apps.terminal import show", {("apps", "terminal")}),
        ("from edge_agent import errors", {("errors",)}),
        ("from edge_agent.client import Client", {("client",)}),
        ("import edge_agent\nfrom edge_agent import __version__", set()),
    ],
)
def test_every_way_to_import_is_found(source, expected):
    assert own_imports(ast.parse(source), "edge_agent") == expected


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("supervisor.process", {"llama_cpp", "onnxruntime", "cv2", "llguidance", "numpy", "onnx"}),
        ("cli.main", {"llama_cpp", "onnxruntime", "cv2", "llguidance", "gguf", "onnx", "numpy"}),
        ("camera.process", {"llama_cpp", "onnxruntime", "llguidance", "gguf"}),
        ("model.load", {"mistral_common", "requests", "urllib3", "http.client", "huggingface_hub", "onnxruntime"}),
    ],
)
def test_what_a_process_really_loads(module, absent):
    """The supervisor must not die of native code; the camera must not hold the model's memory."""
    code = f"import sys, edge_agent.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not absent & set(done.stdout.split())


@pytest.mark.parametrize("package", SOLE_IMPORTERS)
def test_every_program_gets_the_package_from_the_one_file_that_makes_it_harmless(package):
    folders = ["edge_agent", "quantize", "benchmarks", "examples", "models", "docs"]
    if package == "onnxruntime":  # the tests import mistral_common anyway
        folders.append("tests")
    files = [path for folder in folders for path in sources(folder) if package in path.read_text(encoding="utf-8")]
    importers = {path.relative_to(ROOT).as_posix() for path in files if package in roots_of(path)}
    assert importers == {SOLE_IMPORTERS[package]}
    assert f"import {package}" not in (ROOT / "Makefile").read_text()


def test_a_controller_loads_only_msgspec_and_pyzmq():
    code = "import sys; before = set(sys.modules); import edge_agent.client; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split() if "cython" not in name}  # part of pyzmq
    assert {"zmq", "msgspec"} <= loaded
    # msgspec takes typing_extensions where it is installed, and needs nothing of it.
    assert loaded - set(sys.stdlib_module_names) <= {"zmq", "msgspec", "typing_extensions", "edge_agent"}
    own = {name for name in done.stdout.split() if name.startswith("edge_agent.")}
    assert {name.split(".")[1] for name in own} == {"client", "suspend", "time_units", "wire"}


# -- nothing runs what it reads ---------------------------------------------------------------------------------------


def test_nothing_from_outside_can_be_run_or_fetched():
    found = {
        name_of(path): findings(parsed(path), network=room_of(path) == "apps")
        for package in ("edge_agent", "quantize")
        for path in sources(package)
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


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
