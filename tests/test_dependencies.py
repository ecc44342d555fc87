"""Every dependency has a range that was tried, and what is installed here lies inside it."""

from __future__ import annotations

import configparser
from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.requirements import Requirement

from tests.harness import ROOT

# Installed in the place of another: the same version, under another name (see the Makefile and docs/jetson.md).
IN_PLACE_OF = {"opencv-python": "opencv-python-headless", "onnxruntime": "onnxruntime-gpu"}


def requirements() -> list[Requirement]:
    """Every requirement of setup.cfg that is not this project itself."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lists = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    lines = [line.strip() for text in lists for line in text.splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return [requirement for requirement in found if requirement.name != "edge-agent"]


def installed(name: str) -> str | None:
    """The version; None: it is not installed."""
    for candidate in (name, IN_PLACE_OF.get(name)):
        if candidate is not None:
            try:
                return version(candidate)
            except PackageNotFoundError:
                continue
    return None


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_a_dependency_has_two_bounds_and_the_installed_release_is_inside(requirement):
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators in ({">=", "<"}, {"=="}), f"{requirement}: expected a lower and an upper bound"
    found = installed(requirement.name)
    assert found is None or requirement.specifier.contains(found), f"{requirement}: found {found}"


def test_what_the_daemon_needs_is_installed_here():
    """Or the ranges above would say nothing."""
    for name in ("msgspec", "pyzmq", "llama-cpp-python", "numpy", "onnxruntime", "onnx"):
        assert installed(name) is not None, name
