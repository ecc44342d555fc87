"""The base install, in a real empty environment: msgspec and pyzmq, nothing else, and nothing is compiled."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.harness import ROOT, wheels

TIMEOUT_S = 120.0  # bounds a hang, not a duration


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, beside wheels of its dependencies."""
    folder = tmp_path_factory.mktemp("wheels")
    for name in ("msgspec", "pyzmq"):
        wheels.repack(name, folder)
    return wheels.build_wheel(folder)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the base install of this tree."""
    folder = tmp_path_factory.mktemp("empty")
    wheels.install(wheel.parent, folder, "edge-agent")
    return folder


def run(environment: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """A program of the environment, away from this tree and without this process's variables."""
    program, *arguments = map(str, command)
    return subprocess.run(
        [environment / "bin" / program, *arguments],
        cwd=environment,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def test_the_wheel_holds_every_file_of_both_packages(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    patterns = ("edge_agent/**/*.py", "quantize/**/*.py", "edge_agent/actions/spaces/*.yaml")
    expected = {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)}
    expected |= {"edge_agent/py.typed", "quantize/measure/calibration.txt"}
    assert len(expected) > 60 and expected <= packed
    assert not [name for name in packed if name.startswith(("tests/", "models/", "benchmarks/", "examples/"))]


def test_the_base_install_is_three_packages(environment):
    code = "from importlib.metadata import distributions; print(*(d.name for d in distributions()))"
    done = run(environment, "python", "-c", code)
    assert (set(done.stdout.split()), done.stderr) == ({"edge-agent", "msgspec", "pyzmq"}, "")


def test_the_client_loads_the_standard_library_and_its_two_dependencies(environment):
    """An allow-list. Names that msgspec and pyzmq load of themselves are theirs."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "import edge_agent.client\n"
        "print(*(name for name in set(sys.modules) - before if name.split('.')[0] not in sys.stdlib_module_names))"
    )
    done = run(environment, "python", "-I", "-c", code)
    loaded = {name for name in done.stdout.split() if "cython" not in name}  # Cython's own names inside pyzmq
    assert done.stderr == ""
    assert {name.split(".")[0] for name in loaded} == {"zmq", "msgspec", "edge_agent"}
    assert {name.split(".")[1] for name in loaded if name.startswith("edge_agent.")} == {"client", "wire"}


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["listen"], ["ask", "What?"]])
def test_commands_of_a_controller_work_with_the_base_install(environment, tmp_path, command):
    done = run(environment, "edge-agent", *command, "--runtime-dir", tmp_path)
    assert (done.returncode, done.stdout) == (75, "")
    assert len(done.stderr.splitlines()) == 1 and str(tmp_path) in done.stderr


def test_help_works_with_the_base_install(environment):
    assert "instruct" in run(environment, "edge-agent", "--help").stdout
    assert "--camera" in run(environment, "edge-agent", "run", "--help").stdout


@pytest.mark.parametrize("command", [["run", "--config", "a.yaml"], ["check"], ["bench"], ["keygen", "k"]])
def test_commands_of_the_daemon_name_the_extra_to_install(environment, command):
    done = run(environment, "edge-agent", *command)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith(f"edge-agent {command[0]} needs the daemon: pip install 'edge-agent[agent]'")
    assert len(done.stderr.splitlines()) == 1
    for words in ("'edge-agent[cpu]'", "'edge-agent[gpu]'", "not installed here: cryptography, cv2, gguf, llama_cpp"):
        assert words in done.stderr
