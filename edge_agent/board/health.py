"""Memory and temperature of the board, as Status wants them. Unknown is None, never 0."""

from __future__ import annotations

from pathlib import Path


def mem_available_mib(text: str | None = None) -> float | None:
    """From /proc/meminfo, or from `text` in its form."""
    return _mib("MemAvailable:", _read("/proc/meminfo") if text is None else text)


def rss_mib(pid: int, text: str | None = None) -> float | None:
    """Resident memory of a process, from /proc/PID/status, or from `text` in its form."""
    return _mib("VmRSS:", _read(f"/proc/{pid}/status") if text is None else text)


def peak_rss_mib(pid: int, text: str | None = None) -> float | None:
    """The most it has been since the process began (of this program: exec begins a new account)."""
    return _mib("VmHWM:", _read(f"/proc/{pid}/status") if text is None else text)


def _mib(key: str, text: str) -> float | None:
    """The number behind `key`, which the kernel gives in KiB."""
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == key and _is_count(words[1]):
            return int(words[1]) / 1024
    return None


def temperature_c(zones: Path = Path("/sys/class/thermal")) -> float | None:
    """The hottest thermal zone. Readings that no silicon has (a sensor switched off says -256 or 0) do not count."""
    found = []
    for zone in zones.glob("thermal_zone*/temp"):
        text = _read(str(zone)).strip()
        if _is_count(text) and 0 < int(text) < 150_000:
            found.append(int(text) / 1000)
    return max(found, default=None)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return ""
