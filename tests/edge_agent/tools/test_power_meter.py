"""Where the benchmark's power comes from: a card, the board's rails, tegrastats, or nowhere."""

from __future__ import annotations

import sys
import threading

import pytest

from edge_agent.board.nvml import Card
from edge_agent.tools.power_meter import PowerMeter
from tests.harness import boards
from tests.harness.fake_nvml import FakeNvml

NO_PROGRAM = ("edge-agent-has-no-such-program",)
CARDS = [Card(0, "a", power_w=50.0, memory_total_mib=1000.0, memory_free_mib=900.0), Card(1, "b")]


def meter(nvml: FakeNvml, table: boards.Table, tegrastats: tuple[str, ...] = NO_PROGRAM) -> PowerMeter:
    files = boards.TableFiles(table, {})
    return PowerMeter(nvml, files.read, files.names, tegrastats)


@pytest.mark.parametrize(
    ("cards", "table", "source", "power_w"),
    [
        (CARDS, boards.ORIN_NANO.files, "card", 50.0),
        ([Card(0, "tells nothing")], boards.ORIN_NANO.files, "board", 5.056 * 1.016),
        ([], boards.AGX_ORIN.files, "board", pytest.approx(7.7616)),
        ([], {}, "", None),
    ],
)
def test_the_first_source_that_tells(cards, table, source, power_w):
    nvml = FakeNvml(*cards)
    found = meter(nvml, table)
    assert (found.source, found.power_w()) == (source, power_w)
    found.close()
    assert nvml.closed


def test_memory_of_the_cards():
    assert meter(FakeNvml(*CARDS), {}).gpu_memory_used_mib() == 100.0
    assert meter(FakeNvml(), {}).gpu_memory_used_mib() is None


def test_tegrastats_is_read_while_it_runs():
    line = "RAM 1/2MB cpu@47C VDD_IN 4970mW/4900mW"
    code = f"import time; print({line!r}, flush=True); time.sleep(600)"
    found = meter(FakeNvml(), {}, (sys.executable, "-c", code))
    read = threading.Event()
    while found.power_w() is None:
        read.wait(0.01)
    assert (found.source, found.power_w()) == ("tegrastats", 4.97)
    found.close()
    found.close()
