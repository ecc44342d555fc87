"""Checks of memory: what is free, what control groups leave, the largest piece, and swap."""

from __future__ import annotations

import re

from edge_agent.board import health
from edge_agent.board.control_groups import groups, memory_left_mib
from edge_agent.doctor.finding import Finding, failed, passed, warned
from edge_agent.doctor.hardware import is_container, jetson
from edge_agent.doctor.machine import Machine, to_numbers

ENOUGH_MIB, LITTLE_MIB = 1024.0, 400.0  # if the bundle is not known
MANY_SWAPPED = 0.1  # of the machine's memory
LARGE_ORDER, PAGE_KIB = 6, 4  # blocks of 2**6 pages: 256 KiB
MIN_LARGE_BLOCKS = 4
SLOW_DISKS = ("mmcblk", "sd card")


def free_memory(machine: Machine) -> Finding | None:
    """Against what the bundle needs."""
    free_mib, left_mib = health.mem_available_mib(machine.read), memory_left_mib(machine.read)
    if free_mib is None:
        return None
    limit = ", the limit of a control group" if free_mib == left_mib else ""
    found = f"{free_mib:.0f} MiB available{limit}"
    answers = machine.answers
    remedy = "end other programs (a desktop: sudo systemctl set-default multi-user.target)"
    if limit:
        remedy = "raise MemoryMax= of the unit, or the container's --memory"
    if answers.memory_error:
        return failed("memory", answers.memory_error, f"{remedy}; or use a smaller bundle")
    if answers.needed_mib is not None:
        found = f"{found}, the bundle needs about {answers.needed_mib:.0f}"
        if answers.reductions:
            return warned("memory", f"{found} after reductions: {', '.join(answers.reductions)}", remedy)
        return passed("memory", found)
    if free_mib < LITTLE_MIB:
        return failed("memory", f"{found}: too little for any model", remedy)
    if free_mib < ENOUGH_MIB:
        return warned("memory", f"{found}: enough for the smallest models alone", remedy)
    return passed("memory", found)


def killed_for_memory(machine: Machine) -> Finding | None:
    """Processes that the kernel ended since the boot because memory was short."""
    found = re.search(r"^oom_kill ([0-9]{1,9})$", machine.read("/proc/vmstat"), re.MULTILINE)
    events = [
        int(match.group(1))
        for group in groups("memory", machine.read)
        for name in ("memory.events", "memory.oom_control")  # of version 2 and of version 1
        if (match := re.search(r"^oom_kill ([0-9]{1,9})$", machine.read(f"{group.folder}/{name}"), re.MULTILINE))
    ]
    # In a container /proc/vmstat is that of the machine: what is killed there says nothing about the container.
    counts = [*events, *([int(found.group(1))] if found and not is_container(machine) else [])]
    if not counts:
        return None
    if max(counts):
        remedy = "journalctl -k | grep -i 'killed process' names them; then free memory, or use a smaller bundle"
        return warned("memory kills", f"processes that the kernel ended since the boot: {max(counts)}", remedy)
    return passed("memory kills", "none since the boot")


def largest_block(machine: Machine) -> Finding | None:
    """The largest piece that can be allocated: limits of the process, overcommit, on a Jetson pages in one piece."""
    block_mib, needed_mib = machine.answers.largest_block_mib, machine.answers.needed_mib or ENOUGH_MIB
    if _strict_overcommit(machine):
        left_mib = _commit_left_mib(machine)
        if left_mib is not None:
            block_mib = left_mib if block_mib is None else min(block_mib, left_mib)
    limit_mib = _address_space_mib(machine)
    if limit_mib is not None:
        block_mib = limit_mib if block_mib is None else min(block_mib, limit_mib)
    if block_mib is not None and block_mib < needed_mib:
        why = (
            "the address space is limited (LimitAS=, ulimit -v)"
            if block_mib == limit_mib
            else "the kernel gives no more"
        )
        remedy = "remove LimitAS= and ulimit -v; set vm.overcommit_memory to 0 or 1"
        return failed("largest block", f"{block_mib:.0f} MiB in one piece, {needed_mib:.0f} are needed: {why}", remedy)
    n_large = _large_blocks(machine)
    if jetson(machine) is not None and n_large is not None and n_large < MIN_LARGE_BLOCKS:
        found = f"free memory is in small pieces: {n_large} of 256 KiB or more; the GPU needs pages in one piece"
        return warned(
            "largest block",
            found,
            "sudo sh -c 'echo 3 > /proc/sys/vm/drop_caches; echo 1 > /proc/sys/vm/compact_memory'",
        )
    if block_mib is None and n_large is None:
        return None
    return passed("largest block", "" if block_mib is None else f"{block_mib:.0f} MiB in one piece")


def _strict_overcommit(machine: Machine) -> bool:
    return machine.line("/proc/sys/vm/overcommit_memory") == "2"


def _meminfo_mib(machine: Machine, name: str) -> float | None:
    found = re.search(rf"^{name}:\s+([0-9]{{1,15}}) kB$", machine.read("/proc/meminfo"), re.MULTILINE)
    return int(found.group(1)) / 1024 if found else None


def _commit_left_mib(machine: Machine) -> float | None:
    limit, used = _meminfo_mib(machine, "CommitLimit"), _meminfo_mib(machine, "Committed_AS")
    return None if limit is None or used is None else max(0.0, limit - used)


def _address_space_mib(machine: Machine) -> float | None:
    found = re.search(r"^Max address space\s+([0-9]{1,20})\s", machine.read("/proc/self/limits"), re.MULTILINE)
    return int(found.group(1)) / 2**20 if found else None


def _large_blocks(machine: Machine) -> int | None:
    """Free blocks of 256 KiB or more, in all zones."""
    lines = machine.read("/proc/buddyinfo").splitlines()
    counts = [to_numbers(line.partition("zone")[2].strip().partition(" ")[2]) for line in lines]
    return sum(sum(row[LARGE_ORDER:]) for row in counts) if counts else None


def swap(machine: Machine) -> Finding | None:
    """Swap that is in use, and swap on a card that wears out."""
    total, free, memory = (_meminfo_mib(machine, name) for name in ("SwapTotal", "SwapFree", "MemTotal"))
    if total is None or free is None or memory is None:
        return None
    if not total:
        return passed("swap", "none")
    used_mib = total - free
    if used_mib > MANY_SWAPPED * memory:
        remedy = (
            "end other programs, or set advanced.mlock (LimitMEMLOCK=infinity): a frame that waits for swap is late"
        )
        return warned("swap", f"{used_mib:.0f} of {total:.0f} MiB in use", remedy)
    places = [line.split()[0] for line in machine.read("/proc/swaps").splitlines()[1:] if line.split()]
    worn = [place for place in places if _is_on_card(place, machine)]
    if worn:
        remedy = f"sudo swapoff {worn[0]}, and remove it from /etc/fstab; use zram (compressed memory) instead"
        return warned("swap", f"{worn[0]} is on an SD card or eMMC: it is slow and wears out", remedy)
    return passed("swap", f"{used_mib:.0f} of {total:.0f} MiB in use")


def _is_on_card(place: str, machine: Machine) -> bool:
    if place.startswith("/dev/"):
        return "mmcblk" in place
    mounts = [line.split()[:2] for line in machine.read("/proc/mounts").splitlines() if len(line.split()) > 2]
    inside = [(len(where), device) for device, where in mounts if place.startswith(where.rstrip("/") + "/")]
    return bool(inside) and "mmcblk" in max(inside)[1]


CHECKS = (free_memory, killed_for_memory, largest_block, swap)
