"""What the kernel's control groups leave to this process: processor time and memory.

A limit counts in the group of the process and in every group above it, in version 1 and in version 2 of control groups.
systemd sets them (CPUQuota=, MemoryMax=), and so does every container. /proc/meminfo and the number of processors do
not show them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MIB = 1 << 20
NO_LIMIT_BYTES = 1 << 60  # version 1 writes the largest number of pages for "no limit"


class Group(NamedTuple):
    """One control group with a controller in it."""

    version: int  # 1 or 2
    folder: str


def read_text(path: str) -> str:
    """The text of a file; empty if it cannot be read."""
    try:
        return (Path(path).read_bytes() or b"").decode()  # None: EAGAIN, of a sensor that is switched off
    except (OSError, UnicodeDecodeError):
        return ""


Read = Callable[[str], str]  # read_text, or a test's table of files


def available_cores(read: Read = read_text, affinity: int | None = None) -> int:
    """Threads that can run at the same time without waiting for each other: the cores that this process may use, or
    the whole cores that its quota of processor time pays for, if they are fewer.

    A thread more than that would use up the quota early, and then all threads stand still for the rest of the period,
    which is 100 ms by default. affinity: for tests, in place of allowed_cores().
    """
    n_cores = allowed_cores() if affinity is None else affinity
    quota = cpu_quota(read)
    return n_cores if quota is None else max(1, min(n_cores, int(quota)))


def allowed_cores() -> int:
    """The cores on which the kernel lets this process run: what its affinity and its groups' cpusets have in common."""
    return len(os.sched_getaffinity(0))


def cpu_quota(read: Read = read_text) -> float | None:
    """Processor time per second of time, in processors: the smallest quota of all groups. None: there is none."""
    quotas = []
    for group in groups("cpu", read):
        if group.version == 2:
            words = read(f"{group.folder}/cpu.max").split()
        else:
            words = [read(f"{group.folder}/{name}").strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        if len(words) == 2 and all(map(_is_count, words)) and int(words[1]) > 0:  # no limit: "max", and -1
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def memory_left_mib(read: Read = read_text) -> float | None:
    """MiB until the next memory limit of a group. None: no group has a limit.

    Pages of files count as free: the kernel drops them before it refuses memory or kills a process.
    """
    left = []
    for folder, limits, usage, prefix in (_memory_files(group) for group in groups("memory", read)):
        limit = min((n for name in limits if (n := _count(read(f"{folder}/{name}"))) is not None), default=None)
        used = _count(read(f"{folder}/{usage}"))
        if limit is None or limit >= NO_LIMIT_BYTES or used is None:
            continue
        statistics = dict(line.split() for line in read(f"{folder}/memory.stat").splitlines() if len(line.split()) == 2)
        cached = sum(_count(statistics.get(f"{prefix}{name}", "")) or 0 for name in ("inactive_file", "active_file"))
        left.append(max(0, limit - max(0, used - cached)) / MIB)
    return min(left, default=None)


def _memory_files(group: Group) -> tuple[str, tuple[str, ...], str, str]:
    """(folder, files with limits, file with the usage, prefix in memory.stat)."""
    if group.version == 2:
        return group.folder, ("memory.max", "memory.high"), "memory.current", ""
    return group.folder, ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_"


def groups(controller: str, read: Read = read_text) -> list[Group]:
    """The group of this process that has this controller, and every group above it that is visible here."""
    found, mountinfo = [], read("/proc/self/mountinfo")
    for line in read("/proc/self/cgroup").splitlines():
        _number, controllers, path = [*line.split(":", 2), "", ""][:3]
        version = 1 if controllers else 2
        if version == 2 or controller in controllers.split(","):
            for root, mount_point in _mounts(version, controller, mountinfo):
                found += [Group(version, folder) for folder in _upwards(mount_point, _below(root, path))]
    return found


def _mounts(version: int, controller: str, mountinfo: str) -> list[tuple[str, str]]:
    """(group that is mounted, where) of every file system of control groups with this controller."""
    found = []
    for line in mountinfo.splitlines():
        fields, described = (part.split() for part in line.partition(" - ")[::2])
        if len(fields) < 5 or len(described) < 3:
            continue
        is_v1 = described[0] == "cgroup" and controller in described[2].split(",")
        if (version == 2 and described[0] == "cgroup2") or (version == 1 and is_v1):
            found.append((_unescaped(fields[3]), _unescaped(fields[4])))
    return found


def _below(root: str, path: str) -> list[str]:
    """The names from the mounted group down to the group of the process; empty: it is the mounted group, or it is not
    below it. In a container the path can be one of the host."""
    names, mounted = _names(path), _names(root)
    if ".." in names or names[: len(mounted)] != mounted:
        return []
    return names[len(mounted) :]


def _upwards(mount_point: str, names: list[str]) -> list[str]:
    return ["/".join([mount_point.rstrip("/"), *names[:n]]) for n in range(len(names), -1, -1)]


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name]


def _unescaped(text: str) -> str:
    """mountinfo writes a space as \\040."""
    for octal in ("040", "011", "012", "134"):
        text = text.replace(f"\\{octal}", chr(int(octal, 8)))
    return text


def _count(text: str) -> int | None:
    text = text.strip()
    return int(text) if _is_count(text) else None


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20
