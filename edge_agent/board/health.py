"""Memory of the machine and of a process. An unknown value is None, never 0."""

from __future__ import annotations

from edge_agent.board.control_groups import Read, memory_left_mib, read_text


def mem_available_mib(read: Read = read_text) -> float | None:
    """MiB that this process can still use: what /proc/meminfo says, or the limits of its control groups if those leave
    less."""
    known = (_mib("MemAvailable:", read("/proc/meminfo")), memory_left_mib(read))
    return min((mib for mib in known if mib is not None), default=None)


def rss_mib(pid: int, text: str | None = None) -> float | None:
    """Resident memory of a process in MiB, from /proc/PID/status, or from `text` in that format."""
    return _mib("VmRSS:", read_text(f"/proc/{pid}/status") if text is None else text)


def peak_rss_mib(pid: int, text: str | None = None) -> float | None:
    """The highest resident memory of a process in MiB, from /proc/PID/status. exec() resets it."""
    return _mib("VmHWM:", read_text(f"/proc/{pid}/status") if text is None else text)


def boot_id(text: str | None = None) -> str:
    """The kernel's random name of this boot, from /proc/sys/kernel/random/boot_id; "" if it is unknown."""
    return (read_text("/proc/sys/kernel/random/boot_id") if text is None else text).strip()[:64]


def _mib(name: str, text: str) -> float | None:
    """The value of the line that starts with `name`. The kernel writes it in KiB."""
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name and _is_count(words[1]):
            return int(words[1]) / 1024
    return None


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20
