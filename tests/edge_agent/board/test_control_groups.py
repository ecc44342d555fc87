"""Limits of control groups, from the files of systems as they are: processor time, memory; of the group and above."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.board import health
from edge_agent.board.control_groups import Group, available_cores, cpu_quota, groups, memory_left_mib, read_text
from tests.harness import ROOT

MIB = 1 << 20
NO_LIMIT_V1 = "9223372036854771712\n"
# JetPack 6 and desktops: version 2 alone.
V2_MOUNTS = "29 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V2_UNIT = {"/proc/self/mountinfo": V2_MOUNTS, "/proc/self/cgroup": "0::/system.slice/edge-agent.service\n"}
SLICE = "/sys/fs/cgroup/system.slice"
UNIT = f"{SLICE}/edge-agent.service"
# JetPack 5: version 1, and version 2 without controllers for systemd's own use.
V1_MOUNTS = (
    "23 28 0:21 / /proc rw,nosuid - proc proc rw\n"
    "30 24 0:26 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    "33 24 0:29 / /sys/fs/cgroup/memory rw,nosuid shared:12 master:2 - cgroup cgroup rw,memory\n"
    "34 24 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:13 - cgroup cgroup rw,cpu,cpuacct\n"
    "35 24 0:31 / /sys/fs/cgroup/cpuset rw,nosuid shared:14 - cgroup cgroup rw,cpuset\n"
)
V1_LINES = "12:cpuset:/\n9:memory:{0}\n4:cpu,cpuacct:{0}\n1:name=systemd:{0}\n0::{0}\n"
V1_UNIT = {"/proc/self/mountinfo": V1_MOUNTS, "/proc/self/cgroup": V1_LINES.format("/system.slice/edge-agent.service")}
V1_MEMORY = "/sys/fs/cgroup/memory/system.slice/edge-agent.service"
V1_CPU = "/sys/fs/cgroup/cpu,cpuacct/system.slice/edge-agent.service"
# A container of version 1 that shows its own group where the host has the root.
V1_CONTAINER = {
    "/proc/self/mountinfo": "812 811 0:29 /docker/f00 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    "813 811 0:30 /docker/f00 /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n",
    "/proc/self/cgroup": "9:memory:/docker/f00\n4:cpu:/docker/f00\n",
}
# A container of version 2 with a name space of its own, and one whose process was moved out of it.
V2_CONTAINER = {"/proc/self/mountinfo": V2_MOUNTS, "/proc/self/cgroup": "0::/\n"}
V2_OUTSIDE = {"/proc/self/mountinfo": V2_MOUNTS, "/proc/self/cgroup": "0::/../other.scope\n"}


def files(*tables: dict[str, str]) -> Callable[[str], str]:
    """A reader of these files; every other file cannot be read."""
    found = {path: text for table in tables for path, text in table.items()}
    return lambda path: found.get(path, "")


def v1_cpu(folder: str, quota_us: int, period_us: int = 100_000) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota_us}\n", f"{folder}/cpu.cfs_period_us": f"{period_us}\n"}


def v1_memory(folder: str, limit: str, usage_mib: int, cached_mib: int = 0) -> dict[str, str]:
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": f"{usage_mib * MIB}\n",
        f"{folder}/memory.stat": f"cache 7\nactive_file 5\ntotal_inactive_file {cached_mib * MIB}\n",
    }


def v2_memory(
    folder: str, limit: str, usage_mib: int, inactive_mib: int = 0, active_mib: int = 0, high: str = "max"
) -> dict[str, str]:
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.high": f"{high}\n",
        f"{folder}/memory.current": f"{usage_mib * MIB}\n",
        f"{folder}/memory.stat": f"anon 4096\nfile 8192\ninactive_file {inactive_mib * MIB}\n"
        f"active_file {active_mib * MIB}\n",
    }


@pytest.mark.parametrize(
    ("system", "controller", "expected"),
    [
        (V2_UNIT, "cpu", [Group(2, UNIT), Group(2, "/sys/fs/cgroup/system.slice"), Group(2, "/sys/fs/cgroup")]),
        (V1_CONTAINER, "memory", [Group(1, "/sys/fs/cgroup/memory")]),
        (V2_CONTAINER, "cpu", [Group(2, "/sys/fs/cgroup")]),
        (V2_OUTSIDE, "memory", [Group(2, "/sys/fs/cgroup")]),
        (
            {
                "/proc/self/mountinfo": V2_MOUNTS.replace(" /sys/fs/cgroup ", " /run/my\\040groups "),
                "/proc/self/cgroup": "0::/a b\n",
            },
            "cpu",
            [Group(2, "/run/my groups/a b"), Group(2, "/run/my groups")],
        ),
        ({"/proc/self/cgroup": "0::/system.slice\n"}, "cpu", []),
        ({"/proc/self/mountinfo": V2_MOUNTS}, "cpu", []),
        ({}, "memory", []),
    ],
)
def test_the_groups_are_those_of_the_process_and_all_above(system, controller, expected):
    assert groups(controller, files(system)) == expected


def test_version_1_has_a_tree_for_each_controller():
    read = files(V1_UNIT)
    assert [group.folder for group in groups("cpu", read) if group.version == 1] == [
        V1_CPU, "/sys/fs/cgroup/cpu,cpuacct/system.slice", "/sys/fs/cgroup/cpu,cpuacct",
    ]  # fmt: skip
    assert groups("memory", read)[0] == Group(1, V1_MEMORY)


@pytest.mark.parametrize(
    ("tables", "quota", "cores"),
    [
        ([V2_UNIT, {f"{UNIT}/cpu.max": "max 100000\n"}], None, 4),
        ([V2_UNIT, {f"{UNIT}/cpu.max": "100000 100000\n"}], 1.0, 1),
        ([V2_UNIT, {f"{UNIT}/cpu.max": "150000 100000\n"}], 1.5, 1),  # a second thread would run for half of the time
        ([V2_UNIT, {f"{UNIT}/cpu.max": "20000 100000\n"}], 0.2, 1),
        ([V2_UNIT, {f"{UNIT}/cpu.max": "800000 100000\n"}], 8.0, 4),
        (
            [V2_UNIT, {f"{UNIT}/cpu.max": "max 100000\n", f"{SLICE}/cpu.max": "30000 10000\n"}],
            3.0,
            3,
        ),
        (
            [V2_UNIT, {f"{UNIT}/cpu.max": "400000 100000\n", f"{SLICE}/cpu.max": "20000 10000\n"}],
            2.0,
            2,
        ),
        ([V2_CONTAINER, {"/sys/fs/cgroup/cpu.max": "200000 100000\n"}], 2.0, 2),
        ([V1_UNIT, v1_cpu(V1_CPU, -1)], None, 4),
        ([V1_UNIT, v1_cpu(V1_CPU, 200_000)], 2.0, 2),
        ([V1_UNIT, v1_cpu(V1_CPU, -1), v1_cpu("/sys/fs/cgroup/cpu,cpuacct/system.slice", 50_000, 50_000)], 1.0, 1),
        ([V1_CONTAINER, v1_cpu("/sys/fs/cgroup/cpu", 300_000)], 3.0, 3),
        ([V2_UNIT, {f"{UNIT}/cpu.max": "100000 0\n"}], None, 4),
        ([V2_UNIT, {f"{UNIT}/cpu.max": "100000\n"}], None, 4),
        ([V2_UNIT], None, 4),
        ([], None, 4),
    ],
)
def test_threads_are_the_cores_that_the_smallest_quota_pays_for(tables, quota, cores):
    read = files(*tables)
    assert (cpu_quota(read), available_cores(read, affinity=4)) == (quota, cores)


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ([V2_UNIT, v2_memory(UNIT, "max", 100)], None),
        ([V2_UNIT, v2_memory(UNIT, str(300 * MIB), 100)], 200.0),
        ([V2_UNIT, v2_memory(UNIT, str(300 * MIB), 290, inactive_mib=60, active_mib=20)], 90.0),
        ([V2_UNIT, v2_memory(UNIT, str(300 * MIB), 100, high=str(250 * MIB))], 150.0),
        ([V2_UNIT, v2_memory(UNIT, str(300 * MIB), 310)], 0.0),
        ([V2_UNIT, v2_memory(UNIT, "0", 10)], 0.0),
        (
            [V2_UNIT, v2_memory(UNIT, "max", 100), v2_memory("/sys/fs/cgroup/system.slice", str(1000 * MIB), 400)],
            600.0,
        ),
        ([V1_UNIT, v1_memory(V1_MEMORY, NO_LIMIT_V1, 100)], None),
        ([V1_UNIT, v1_memory(V1_MEMORY, f"{420 * MIB}\n", 100, cached_mib=30)], 350.0),
        (
            [
                V1_UNIT,
                v1_memory(V1_MEMORY, f"{420 * MIB}\n", 100),
                v1_memory("/sys/fs/cgroup/memory/system.slice", f"{500 * MIB}\n", 400),
            ],
            100.0,
        ),
        ([V1_CONTAINER, v1_memory("/sys/fs/cgroup/memory", f"{64 * MIB}\n", 4)], 60.0),
        ([V2_UNIT, {f"{UNIT}/memory.max": f"{300 * MIB}\n"}], None),  # the usage is unknown
        ([V2_UNIT, v2_memory(UNIT, "-1", 100)], None),
    ],
)
def test_memory_is_what_the_tightest_group_leaves(tables, expected):
    assert memory_left_mib(files(*tables)) == expected


def test_available_memory_is_the_least_of_the_machine_and_its_groups():
    machine = {"/proc/meminfo": f"MemAvailable: {500 * 1024} kB\n"}
    for limit_mib, expected in ((300, 200.0), (700, 500.0)):
        group = v2_memory(UNIT, str(limit_mib * MIB), 100)
        assert health.mem_available_mib(files(V2_UNIT, group, machine)) == expected
        assert health.mem_available_mib(files(V2_UNIT, group)) == limit_mib - 100
    assert health.mem_available_mib(files(V2_UNIT, machine)) == 500.0
    assert health.mem_available_mib(files()) is None


@given(text=st.text(max_size=60) | st.integers().map(str))
def test_any_text_is_a_limit_or_none(text):
    """A kernel that writes something else must not end the daemon."""
    everywhere = [
        lambda path: text,
        lambda path: files(V2_UNIT)(path) or text,
        lambda path: files(V1_UNIT)(path) or text,
    ]
    for read in everywhere:
        left, quota = memory_left_mib(read), cpu_quota(read)
        assert left is None or left >= 0
        assert quota is None or quota >= 0
        assert 1 <= available_cores(read, affinity=4) <= 4


def test_nothing_else_counts_processors():
    """Every number of threads comes from here."""
    for package in ("edge_agent", "quantize"):
        for path in (ROOT / package).rglob("*.py"):
            counted = {"sched_getaffinity", "cpu_count", "process_cpu_count", "getNumberOfCPUs"} & set(
                re.findall(r"\w+", path.read_text(encoding="utf-8"))
            )
            assert not counted or path.name == "control_groups.py", path


def test_this_machine():
    assert available_cores() >= 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: None)  # what Python makes of EAGAIN
        assert read_text("/sys/class/thermal/thermal_zone2/temp") == ""
    assert read_text("/proc/self/none") == "" and read_text("/proc/self/mountinfo") != ""
    left = memory_left_mib()
    assert left is None or left > 0
