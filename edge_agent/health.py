"""Memory and temperature of the board, as Status wants them. Unknown is None, never 0."""

from __future__ import annotations

from pathlib import Path

MIB = 1 << 20


def mem_available_mib(text: str | None = None) -> float | None:
    """From /proc/meminfo, or from `text` in its form."""
    for line in (_read("/proc/meminfo") if text is None else text).splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "MemAvailable:" and words[1].isdigit():
            return int(words[1]) / 1024
    return None


def rss_mib(pid: int, text: str | None = None) -> float | None:
    """Resident memory of a process, from /proc/PID/status, or from `text` in its form."""
    for line in (_read(f"/proc/{pid}/status") if text is None else text).splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "VmRSS:" and words[1].isdigit():
            return int(words[1]) / 1024
    return None


def temperature_c(zones: Path = Path("/sys/class/thermal")) -> float | None:
    """The hottest thermal zone. Readings that no silicon has (a sensor switched off says -256 or 0) do not count."""
    found = []
    for zone in zones.glob("thermal_zone*/temp"):
        text = _read(str(zone)).strip()
        if text.lstrip("-").isdigit() and 0 < int(text) < 150_000:
            found.append(int(text) / 1000)
    return max(found, default=None)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return ""
