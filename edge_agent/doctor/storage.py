"""Checks of disks, of keys and of who may write what."""

from __future__ import annotations

import re
import stat
from pathlib import PurePosixPath

from edge_agent.doctor.finding import Finding, failed, passed, warned
from edge_agent.doctor.hardware import is_container
from edge_agent.doctor.machine import Machine

LITTLE_MIB, FULL_MIB = 500.0, 50.0
FEW_FILES = 1000
# JEDEC: an eMMC's life in steps of 10 %, 11: it is over; the spare blocks: 1 normal, 2 four fifths used, 3 urgent.
WORN, ALMOST_WORN = 11, 9
STATE_FOLDER = "/var/lib/edge-agent"


def disk(machine: Machine) -> Finding | None:
    """Space, number of files, and file systems that cannot be written to."""
    if not machine.answers.disks:
        return _root_is_read_only(machine)
    roomy = []
    for path, found in machine.answers.disks.items():
        if found.read_only:
            if _may_be_read_only(path, machine):
                continue
            remedy = f"sudo dmesg | grep -i 'remount' says why; then sudo fsck, or mount -o remount,rw {path}"
            return failed("disk", f"{path}: read-only", remedy)
        if found.free_mib < FULL_MIB:
            remedy = "remove files: sudo journalctl --vacuum-size=100M; sudo apt clean; du -xh / | sort -h | tail"
            return failed("disk", f"{path}: full, {found.free_mib:.0f} of {found.total_mib:.0f} MiB free", remedy)
        if found.free_mib < LITTLE_MIB and found.free_mib < 0.1 * found.total_mib:
            remedy = "remove files: du -xh / | sort -h | tail shows the largest folders"
            return warned("disk", f"{path}: {found.free_mib:.0f} of {found.total_mib:.0f} MiB free", remedy)
        if found.free_files is not None and found.free_files < FEW_FILES and found.total_mib:
            remedy = "remove small files: sudo du -x --inodes / | sort -n | tail shows where they are"
            return failed("disk", f"{path}: {found.free_files} more files can be made", remedy)
        roomy.append(f"{path}: {found.free_mib / 1024:.1f} GiB free")
    return passed("disk", ", ".join(roomy) or "read-only, as configured")


def _root_is_read_only(machine: Machine) -> Finding | None:
    """Of a saved machine, whose space is unknown."""
    lines = [line.split() for line in machine.read("/proc/mounts").splitlines()]
    options = [line[3].split(",") for line in lines if len(line) > 3 and line[1] == "/"]
    if not options or "ro" not in options[-1] or _may_be_read_only("/", machine):
        return None
    return failed("disk", "/: read-only", "sudo dmesg | grep -i remount says why; then sudo fsck")


def _may_be_read_only(path: str, machine: Machine) -> bool:
    """The bundle's folder, a container's own system, and one that is mounted read-only by its own fstab: only the state
    must be writable."""
    if machine.config is not None and path == machine.config.bundle:
        return True
    if path == "/" and is_container(machine):
        return True
    return path == "/" and bool(re.search(r"^\S+\s+/\s+\S+\s+(?:\S+,)?ro\b", machine.read("/etc/fstab"), re.MULTILINE))


def wear(machine: Machine) -> Finding | None:
    """How much of its life an eMMC says is used. SD cards do not tell."""
    lines: list[str] = []
    worst = 0
    for name in machine.names("/sys/block"):
        folder = f"/sys/block/{name}/device"
        life = max(_hexadecimal(machine.line(f"{folder}/life_time")), default=0)
        if not life:
            continue
        spare = max(_hexadecimal(machine.line(f"{folder}/pre_eol_info")), default=0)
        worst = max(worst, life, WORN if spare >= 3 else ALMOST_WORN if spare == 2 else 0)
        lines.append(f"{name}: " + (f"up to {10 * life} % of its life is used" if life < WORN else "past its life"))
    if not lines:
        return None
    if worst >= WORN:
        return failed("wear", ", ".join(lines), "replace the module or the disk: it can become read-only at any moment")
    if worst >= ALMOST_WORN:
        return warned(
            "wear", ", ".join(lines), "plan to replace it; keep logs in memory (Storage=volatile in journald.conf)"
        )
    return passed("wear", ", ".join(lines))


def _hexadecimal(text: str) -> list[int]:
    return [int(word, 16) for word in text.split() if re.fullmatch(r"0x[0-9a-fA-F]{1,4}", word)]


def keys(machine: Machine) -> Finding | None:
    """The public keys that a bundle is checked with."""
    if machine.config is None:
        return None
    if not machine.config.trusted_keys:
        return passed("keys", "none configured: any bundle is accepted, signed or not")
    for path in machine.config.trusted_keys:
        text = machine.read(path)
        if not machine.exists(path):
            remedy = "copy the public key (NAME.pub) there, or correct trusted_keys; as root, if this user may not look"
            return failed("keys", f"{path}: no such file", remedy)
        if not text:
            return failed("keys", f"{path}: cannot be read, or is empty", f"sudo chmod 644 {path}")
        if "PRIVATE KEY" in text:
            remedy = "put the public key (NAME.pub) there, remove the private one, and make a new pair"
            return failed("keys", f"{path}: a private key on the device", remedy)
        if open_to := _open_to_all(path, machine):
            return failed("keys", f"{open_to}: everybody may write to it", f"sudo chmod o-w {open_to}")
    return passed("keys", f"{len(machine.config.trusted_keys)} trusted")


def permissions(machine: Machine) -> Finding | None:
    """Nobody else may change the configuration or the bundle."""
    paths = [machine.config_path] if machine.config_path else []
    if machine.config is not None:
        paths += [machine.config.bundle, *machine.config.language.adapters.values()]
        if machine.config.task.action_space.endswith((".yaml", ".yml")):
            paths.append(machine.config.task.action_space)
    checked = [path for path in paths if path.startswith("/") and machine.exists(path)]
    for path in checked:
        if open_to := _open_to_all(path, machine):
            return failed("permissions", f"{open_to}: everybody may write to it", f"sudo chmod o-w {open_to}")
    for path in checked:
        mode = machine.files.mode(path)
        if mode is not None and stat.S_ISDIR(mode) and not machine.names(path):
            return failed(
                "permissions",
                f"{path}: empty, or this user may not read it",
                f"sudo chmod o+rx {path}, or run as its user",
            )
    return passed("permissions", f"{len(checked)} paths, written by their owners alone") if checked else None


def _open_to_all(path: str, machine: Machine) -> str:
    """The path, or a folder above it, that everybody may write to; "": none. A folder like /tmp keeps others' files."""
    for place in (PurePosixPath(path), *PurePosixPath(path).parents):
        if machine.is_open_to_all(str(place)):
            return str(place)
    return ""


CHECKS = (disk, wear, keys, permissions)
