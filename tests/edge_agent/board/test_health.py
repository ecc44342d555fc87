"""Memory and temperature: the kernel's values, and None for every unknown value, never 0."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
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


@settings(deadline=None, max_examples=500)
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


def zones(folder: Path, *texts: str | None) -> Path:
    for n, text in enumerate(texts):
        (folder / f"thermal_zone{n}").mkdir()
        if text is not None:
            (folder / f"thermal_zone{n}" / "temp").write_text(text)
    (folder / "cooling_device0").mkdir()
    (folder / "cooling_device0" / "temp").write_text("99000\n")
    return folder


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("45500\n", "51250\n", "48000\n"), 51.25),
        (("45500\n", "-256000\n"), 45.5),  # on a Tegra: the sensor is off
        (("-256000\n",), None),
        (("0\n",), None),
        (("0\n", "31000\n"), 31.0),
        (("200000\n", "31000\n"), 31.0),
        (("150000\n",), None),
        (("149999\n",), 149.999),
        (("", "hot\n", "45.5\n", "0x20\n", "4 5\n"), None),
        (("--5\n", "31000\n"), 31.0),
        (("²\n", "31000\n"), 31.0),
        ((None, "31000\n"), 31.0),
        ((), None),
    ],
)
def test_temperature_is_that_of_the_hottest_sensor_that_works(tmp_path, texts, expected):
    assert health.temperature_c(zones(tmp_path, *texts)) == expected


def test_temperature_without_sensors_or_with_broken_ones_is_unknown(tmp_path):
    assert health.temperature_c(tmp_path / "nowhere") is None
    zones(tmp_path, None, None)
    (tmp_path / "thermal_zone0" / "temp").mkdir()
    (tmp_path / "thermal_zone1" / "temp").write_bytes(b"\xff\xfe31000")
    assert health.temperature_c(tmp_path) is None


def test_an_unreadable_sensor_is_unknown(tmp_path):
    """Like the sensor of a chip that is powered down: reading it gives an error."""
    zones(tmp_path, None)
    os.symlink("/proc/self/mem", tmp_path / "thermal_zone0" / "temp")
    assert health.temperature_c(tmp_path) is None
