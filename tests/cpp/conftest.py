"""examples/cpp, built once for all workers, and again when a source, the compiler or an option has changed. The
controller as a user builds it, with warnings as errors; the header's pure parts in probe.cpp, with the sanitizers of
addresses and of undefined behaviour."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.harness import ROOT
from tests.harness.shared import SharedFolders

EXAMPLE = ROOT / "examples" / "cpp"
FETCHED = ROOT / ".venv" / "libzmq"  # by fetch_libzmq.sh, where the machine has none
WARNINGS = "-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror"
SANITIZERS = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
BUILT = ROOT / ".venv" / "cpp"  # half a minute of compiling, kept for the next test run
RECORD = struct.Struct("=cqqI")  # letter, now_ns, suspended_ns, size: see probe.cpp

Record = tuple[str, int, int, bytes]


def libzmq_environment() -> dict[str, str]:
    """For a compiler, and for what it built."""
    libraries = [str(path.parent) for path in (FETCHED / "usr" / "lib").glob("*/libzmq.so")]
    include = str(FETCHED / "usr" / "include")
    return os.environ | {"CPATH": include, "LIBRARY_PATH": ":".join(libraries), "LD_LIBRARY_PATH": ":".join(libraries)}


def build(command: str, **options: object) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, env=libzmq_environment(), **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="session")
def built(has_libzmq: None) -> Callable[[str, Callable[[Path], object]], Path]:
    """built(name, fill) -> the folder that fill(folder) made of these sources with this compiler."""
    compiler = subprocess.run(["c++", "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(repr((compiler, WARNINGS, SANITIZERS, libzmq_environment()["CPATH"])).encode())
    for path in sorted([*EXAMPLE.iterdir(), ROOT / "tests" / "cpp" / "probe.cpp", Path(__file__)]):
        digest.update(path.read_bytes())

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        BUILT.mkdir(parents=True, exist_ok=True)
        wanted = f"{name}-{digest.hexdigest()[:16]}"
        for old in BUILT.glob(f"{name}-*"):
            if not old.name.startswith(wanted):
                shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)

        def fill_anew(folder: Path) -> None:  # a run that was killed may have left a part
            shutil.rmtree(folder, ignore_errors=True)
            fill(folder)

        return SharedFolders(BUILT).folder(wanted, fill_anew)

    return make


@pytest.fixture(scope="session")
def has_libzmq() -> None:
    """Skips the test where the example cannot be built."""
    if shutil.which("c++") is None or shutil.which("cmake") is None:
        pytest.skip("no C++ compiler or no cmake: examples/cpp is not tested here")
    found = subprocess.run(
        ["c++", "-E", "-include", "zmq.h", "-x", "c++", "-"], input=b"", capture_output=True, env=libzmq_environment()
    )
    if found.returncode != 0:
        pytest.skip("no zmq.h: examples/cpp is not tested here; apt install libzmq3-dev, or make test with a network")


@pytest.fixture(scope="session")
def controller(built: Callable[..., Path]) -> Path:
    """The program of examples/cpp, built by its CMakeLists.txt."""

    def fill(folder: Path) -> None:
        options = f"-DCMAKE_BUILD_TYPE=Debug -DCMAKE_PREFIX_PATH={FETCHED}/usr"
        command = f"cmake -S {EXAMPLE} -B {folder} {options}"
        done = subprocess.run([*command.split(), f"-DCMAKE_CXX_FLAGS={WARNINGS}"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        build(f"cmake --build {folder}")

    return built("controller", fill) / "controller"


@pytest.fixture(scope="session")
def probe_program(built: Callable[..., Path]) -> Path:
    """probe.cpp, with sanitizers."""

    def fill(folder: Path) -> None:
        folder.mkdir()
        source = ROOT / "tests" / "cpp" / "probe.cpp"
        build(f"c++ -std=c++17 {WARNINGS} {SANITIZERS} -I{EXAMPLE} {source} -lzmq -o {folder}/probe")

    return built("probe", fill) / "probe"


@pytest.fixture(scope="session")
def probe(probe_program: Path) -> Callable[[Iterable[Record]], list[str]]:
    """probe(records) -> the lines that probe.cpp prints for them."""

    def run(records: Iterable[Record]) -> list[str]:
        packed = [
            RECORD.pack(letter.encode(), now_ns, suspended_ns, len(payload)) + payload
            for letter, now_ns, suspended_ns, payload in records
        ]
        done = subprocess.run(probe_program, input=b"".join(packed), capture_output=True, env=libzmq_environment())
        assert done.returncode == 0, done.stderr.decode()
        lines = done.stdout.decode(errors="surrogateescape").split("\n")[:-1]
        assert len(lines) == len(packed)
        return lines

    return run
