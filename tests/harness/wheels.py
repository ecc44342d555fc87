"""Wheels without a network: one of this tree, and one of each package that is installed beside the tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

from tests.harness import ROOT


def build_wheel(out: Path) -> Path:
    """The wheel of this tree, built from a copy, so that no build folder appears in the tree."""
    copy = out / "source"
    copy.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for package in ("edge_agent", "quantize"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, copy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("edge_agent-*.whl")
    return wheel


def repack(name: str, out: Path) -> Path:
    """A wheel of an installed package: its files, as its RECORD lists them."""
    installed = distribution(name)
    lines = (installed.read_text("WHEEL") or "").splitlines()
    (tag, *_more) = [line.removeprefix("Tag: ") for line in lines if line.startswith("Tag: ")]
    wheel = out / f"{name}-{installed.version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in installed.files or []:
            if ".." not in file.parts and file.suffix != ".pyc":
                archive.write(str(file.locate()), str(file))
    return wheel


def install(wheels: Path, environment: Path, *requirements: str) -> None:
    """Make an empty virtual environment and install into it from a folder of wheels, as pip does."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=300)
    pip = [sys.executable, "-m", "pip", "--isolated", "--python", environment / "bin" / "python", "install", "-q"]
    command = [*pip, "--no-index", "--find-links", wheels, *requirements]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
