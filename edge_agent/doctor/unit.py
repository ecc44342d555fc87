"""The systemd unit of edge-agent, as systemd reads it: the file, then its drop-ins in the order of their names."""

from __future__ import annotations

import re
import shlex
from typing import NamedTuple

from edge_agent.doctor.machine import Machine

NAME = "edge-agent.service"
FOLDERS = ("/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system",
           "/lib/systemd/system")  # fmt: skip
SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Unit(NamedTuple):
    """is_masked: systemd does not start it, whatever it says.

    settings: of [Service] and [Install], a list for each key; an empty value has emptied the list before it.
    """

    path: str
    drop_ins: tuple[str, ...]
    settings: dict[str, list[str]]
    is_masked: bool = False

    def last(self, key: str, default: str = "") -> str:
        return self.settings.get(key, [default])[-1] if self.settings.get(key) else default

    def is_on(self, key: str) -> bool:
        return self.last(key).lower() in ("yes", "y", "true", "t", "on", "1")

    def words(self, key: str) -> list[str]:
        return [word for value in self.settings.get(key, []) for word in value.split()]

    @property
    def command(self) -> list[str]:
        """The words of ExecStart."""
        try:
            return shlex.split(self.last("ExecStart"))
        except ValueError:  # an open quotation mark
            return []

    @property
    def config_path(self) -> str:
        """What the unit's command gives as --config; "" if it gives none."""
        words = self.command
        for i, word in enumerate(words):
            if word == "--config" and i + 1 < len(words):
                return words[i + 1]
            if word.startswith("--config="):
                return word.removeprefix("--config=")
        return ""


def installed_unit(machine: Machine) -> Unit | None:
    path = next((f"{folder}/{NAME}" for folder in FOLDERS if machine.exists(f"{folder}/{NAME}")), None)
    if path is None:
        return None
    by_name: dict[str, str] = {}  # a drop-in of the same name in an earlier folder replaces the later one
    for folder in FOLDERS:
        for name in machine.names(f"{folder}/{NAME}.d"):
            if name.endswith(".conf"):
                by_name.setdefault(name, f"{folder}/{NAME}.d/{name}")
    drop_ins = tuple(by_name[name] for name in sorted(by_name))
    settings: dict[str, list[str]] = {}
    for file in (path, *drop_ins):
        for key, value in parse(machine.read(file)):
            settings[key] = [*settings.get(key, []), value] if value else []
    return Unit(path, drop_ins, settings, machine.files.target(path) == "/dev/null")


def parse(text: str) -> list[tuple[str, str]]:
    """(key, value) of the sections Service and Install; a line that ends with a backslash goes on in the next one."""
    found, section = [], ""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        line = line.strip()
        if line.startswith("["):
            section = line.strip("[]")
        elif section in ("Service", "Install") and "=" in line and not line.startswith(("#", ";")):
            key, _, value = line.partition("=")
            found.append((key.strip(), value.strip()))
    return found


def size_mib(text: str) -> float | None:
    """1.5G, 900M or a number of bytes; of 1G:2G the first, which is in force; None: infinity, or a share."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([KMGT]?)B?", text.partition(":")[0].strip())
    return float(found.group(1)) * SIZES[found.group(2)] / (1 << 20) if found else None


def seconds(text: str) -> float | None:
    """15, 15s, 1min 30s or 500ms."""
    units = {
        **dict.fromkeys(("", "s", "sec", "second", "seconds"), 1.0),
        **dict.fromkeys(("ms", "msec"), 0.001),
        **dict.fromkeys(("m", "min", "minute", "minutes"), 60.0),
        **dict.fromkeys(("h", "hr", "hour", "hours"), 3600.0),
    }
    parts = re.findall(r"([0-9]{1,9}(?:\.[0-9]+)?)\s*([a-z]*)", text.strip())
    if not parts or any(unit not in units for _, unit in parts):
        return None
    return sum(float(number) * units[unit] for number, unit in parts)
