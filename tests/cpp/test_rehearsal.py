"""The controller of examples/cpp, played every scenario of the rehearsal."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edge_agent.rehearsal import SCENARIOS, rehearse
from tests.cpp.conftest import libzmq_environment

AT_ONCE = 6  # scenarios that are played at the same time: most of their time is waiting
# With an instruction, it follows nothing before the reply, which never comes in the scenario silent-control.
INSTRUCTED = ("old-actions", "paused", "stopped-daemon", "killed-daemon", "half-message")


def faults(controller: Path, scenarios: list[str], *arguments: str) -> dict[str, list[str]]:
    command = [str(controller), "{dir}", *arguments]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return {result.scenario: result.faults for result in pool.map(lambda name: rehearse(name, command), scenarios)}


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", libzmq_environment()["LD_LIBRARY_PATH"])


def test_it_passes_every_scenario(controller):
    assert faults(controller, list(SCENARIOS)) == {name: [] for name in SCENARIOS}


def test_with_an_instruction_it_passes_those_about_sessions_and_replies(controller):
    assert faults(controller, list(INSTRUCTED), "Land.") == {name: [] for name in INSTRUCTED}
