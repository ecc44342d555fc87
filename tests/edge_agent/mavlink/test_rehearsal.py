"""The bridge in every scenario of a rehearsal, judged by the setpoints that it would send."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from edge_agent.rehearsal import SCENARIOS, rehearse
from tests.harness import ROOT

AT_ONCE = 6  # scenarios that are played at the same time: most of their time is waiting


def test_the_bridge_passes_every_scenario(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    program = [sys.executable, "-m", "edge_agent.cli.main", "mavlink", "--dry-run", "--runtime-dir", "{dir}"]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(lambda scenario: rehearse(scenario, program), SCENARIOS))
    assert {result.scenario: result.faults for result in results} == {scenario: [] for scenario in SCENARIOS}
    assert all(result.n_commands for result in results)
