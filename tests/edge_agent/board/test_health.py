"""Memory: the kernel's values, and None for every unknown value, never 0."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_agent.board import health

# From an Orin Nano with JetPack 6, and from a PC.
ORIN = """MemTotal:        7801988 kB
MemFree:          391284 kB
MemAvailable:    5312840 kB
Buffers:          210404 kB
SwapTotal:       3900992 kB
HugePages_Total:       0
Hugepagesize:       2048 kB
"""
STATUS = "Name:\tpython3\nVmPeak:\t 9000000 kB\nVmHWM:\t  300000 kB\nVmRSS:\t  262144 kB\nThreads:\t4\n"


def mem_available_mib(text: str) -> float | None:
    """With this /proc/meminfo, and no control groups."""
    return health.mem_available_mib(lambda path: text if path == "/proc/meminfo" else "")


def test_available_memory_is_the_kernels_value():
    assert mem_available_mib(ORIN) == 5312840 / 1024


def test_resident_memory_is_the_kernels_value():
    assert health.rss_mib(1, STATUS) == 256.0
    assert health.peak_rss_mib(1, STATUS) == 300_000 / 1024


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "MemTotal: 7801988 kB\nMemFree: 391284 kB\n",
        "MemAvailable:\n",
        "MemAvailable: kB\n",
        "MemAvailable: -5 kB\n",
        "MemAvailable: 0x10 kB\n",
        "MemAvailable: 53128.5 kB\n",
        "MemAvailable 5312840 kB\n",
        "MemAvailable:5312840\n",
        ORIN.replace("MemAvailable", "MemAvailabl\x00"),
    ],
)
def test_garbled_memory_is_unknown(text):
    assert mem_available_mib(text) is None
    assert health.rss_mib(1, text.replace("MemAvailable", "VmRSS")) is None


@given(text=st.text() | st.text().map(lambda value: f"MemAvailable: {value} kB\nVmRSS: {value} kB"))
@example(text="MemAvailable: ² kB\nVmRSS: ² kB")
def test_any_text_is_a_number_or_unknown(text):
    for value in (mem_available_mib(text), health.rss_mib(1, text)):
        assert value is None or value >= 0


def test_this_machine():
    """sysconf and statm give the same values, in pages."""
    page = os.sysconf("SC_PAGE_SIZE") / 2**20
    assert 0 < health.mem_available_mib() <= os.sysconf("SC_PHYS_PAGES") * page
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.read(1)  # it is loaded now, and waits
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        assert health.rss_mib(process.pid) == pytest.approx(pages * page, abs=1)
    assert health.rss_mib(process.pid) is None  # the process has ended
