"""Resolves every dependency of setup.cfg for ARM64 and the two Pythons of JetPack. Needs PyPI and uv: `make aarch64`.

    python tests/aarch64/resolve.py                          # prints what changed in the lists here, and writes them
    python tests/aarch64/resolve.py --board-requirements     # prints the requirements of the daemon, for smoke.sh

JetPack 6 has Python 3.10 and glibc 2.35, JetPack 7 has Python 3.12 and glibc 2.39. Only wheels are taken: nothing but
llama.cpp may have to be compiled on a board. llama-cpp-python is source only, so its own requirements take its place.

onnxruntime-gpu is not resolved: PyPI has no build of it with code for a Jetson (docs/jetson.md).
"""

from __future__ import annotations

import configparser
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
PYTHONS = {"3.10": "aarch64-manylinux_2_35", "3.12": "aarch64-manylinux_2_39"}
SOURCE_ONLY = "llama-cpp-python"
NOT_FOR_BOARDS = ("gpu", "train", "aarch64")  # extras


def requirements(extras: tuple[str, ...] = ()) -> list[str]:
    """Lines of setup.cfg, and what the source-only package needs. extras: (): all that a board may install."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    table = parser["options.extras_require"]
    names = extras or [name for name in table if name not in NOT_FOR_BOARDS]
    lists = [parser["options"]["install_requires"], *(table[name] for name in names)]
    lines = {line.strip() for text in lists for line in text.splitlines() if line.strip() and "#" not in line}
    lines = {line for line in lines if not line.startswith(("edge-agent", SOURCE_ONLY))}
    return sorted(lines | {line for line in requires(SOURCE_ONLY) or () if "extra ==" not in line})


def resolve(python: str) -> list[str]:
    """name==version of every package. Exits with uv's own lines if there is no solution in wheels."""
    uv = [sys.executable, "-m", "uv", "pip", "compile", "-", "--quiet", "--no-header", "--no-annotate"]
    platform = ["--python-version", python, "--python-platform", PYTHONS[python], "--only-binary", ":all:"]
    text = "\n".join(requirements())
    done = subprocess.run([*uv, *platform], input=text, capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"Python {python} on ARM64: no solution\n{done.stderr}")
    return done.stdout.split()


def list_file(python: str) -> Path:
    return FOLDER / f"python{python}.txt"


def main() -> None:
    if sys.argv[1:] == ["--board-requirements"]:
        print("\n".join(requirements(("agent", "terminal"))))
        return
    for python in PYTHONS:
        path, found = list_file(python), resolve(python)
        before = path.read_text(encoding="utf-8").split() if path.is_file() else []
        path.write_text("\n".join(found) + "\n", encoding="utf-8")
        print(f"Python {python} on ARM64: {len(found)} packages, all as wheels, and {SOURCE_ONLY} from source")
        for line in sorted(set(found) ^ set(before)):
            print(f"  {'+' if line in found else '-'} {line}")


if __name__ == "__main__":
    main()
