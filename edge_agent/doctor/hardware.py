"""Checks of the board itself: which one it is, its system, its processors, its power mode, clocks and temperature."""

from __future__ import annotations

import re
from typing import NamedTuple

from edge_agent.board import sensors
from edge_agent.board.control_groups import available_cores, cpu_quota, groups
from edge_agent.doctor.finding import Finding, failed, passed, warned
from edge_agent.doctor.machine import Machine, to_number, to_numbers

MIN_PYTHON = (3, 10)
CHIPS = {  # name in the device tree -> (name of the family, compute capability)
    "tegra264": ("Thor", 110),
    "tegra234": ("Orin", 87),
    "tegra194": ("Xavier", 72),
    "tegra186": ("TX2", 62),
    "tegra210": ("Nano", 53),
}
JETPACK = {36: 6, 38: 7, 39: 7}  # major number of the L4T release -> JetPack
OLDEST_RELEASE = 36
LAST_JETPACK = {"Xavier": 5, "TX2": 4, "Nano": 4}  # of boards that get no newer one
CUDA_OF_JETPACK = {6: 12, 7: 13}
SIMD = {"x86_64": ("flags", "avx2"), "aarch64": ("Features", "asimddp")}
NEAR_LIMIT_C = 5.0
THROTTLED_PERIODS = 0.1  # of all periods of the quota
WEAK_MODE = 0.5  # of the strongest mode's watts
HELD_DOWN_GPU = 0.35  # of its highest clock: an AGX Orin in its default mode has 0.48


class Jetson(NamedTuple):
    """What a board of NVIDIA says about itself."""

    family: str
    capability: int
    release: int | None  # major number of L4T; None: unknown

    @property
    def jetpack(self) -> int | None:
        return JETPACK.get(self.release) if self.release is not None else None


def jetson(machine: Machine) -> Jetson | None:
    compatible = machine.read("/proc/device-tree/compatible") or machine.read(
        "/sys/firmware/devicetree/base/compatible"
    )
    for chip, (family, capability) in CHIPS.items():
        if chip in compatible:
            found = re.search(r"\bR([0-9]{1,3}) \(release\)", machine.read("/etc/nv_tegra_release"))
            return Jetson(family, capability, int(found.group(1)) if found else None)
    return None


def is_container(machine: Machine) -> bool:
    if any(machine.exists(path) for path in ("/.dockerenv", "/run/.containerenv", "/run/systemd/container")):
        return True
    groups_of_init = machine.read("/proc/1/cgroup")
    return any(word in groups_of_init for word in ("/docker/", "/kubepods", "/lxc/", "/libpod-"))


def model_name(machine: Machine) -> str:
    device_tree = machine.line("/proc/device-tree/model") or machine.line("/sys/firmware/devicetree/base/model")
    vendor, product = (machine.line(f"/sys/class/dmi/id/{name}") for name in ("sys_vendor", "product_name"))
    return device_tree or " ".join(filter(None, (vendor, product))) or machine.answers.architecture or "unknown"


def board(machine: Machine) -> Finding:
    name = model_name(machine) + (", in a container" if is_container(machine) else "")
    found = jetson(machine)
    if found is None:
        return passed("board", name)
    if found.release is None:
        if machine.exists("/etc/nv_tegra_release"):
            return warned("board", f"{name}, /etc/nv_tegra_release names no release", "install nvidia-l4t-core again")
        wanted = "JetPack 7" if found.family == "Thor" else "JetPack 6 or 7"
        remedy = f"install {wanted}; in a container, mount /etc/nv_tegra_release"
        return warned("board", f"{name}, no /etc/nv_tegra_release: JetPack is unknown", remedy)
    revision = re.search(r"REVISION: ([0-9.]+)", machine.read("/etc/nv_tegra_release"))
    release = f"L4T {found.release}" + (f".{revision.group(1)}" if revision else "")
    if found.release < OLDEST_RELEASE:
        remedy = "install JetPack 6 or 7 on the board"
        if last := LAST_JETPACK.get(found.family):
            remedy = f"use an Orin or a Thor: {found.family} has no JetPack after {last}"
        return failed("board", f"{name}, {release}: older than JetPack 6", remedy)
    if found.jetpack is None:
        return warned("board", f"{name}, {release}: a release that we do not know", "use JetPack 6 or 7, or report it")
    if found.family == "Thor" and found.jetpack < 7:
        return failed("board", f"{name}, {release}: JetPack {found.jetpack} has no Thor", "install JetPack 7")
    kernel = machine.line("/proc/sys/kernel/osrelease")
    if kernel and "tegra" not in kernel and not is_container(machine):
        remedy = "boot NVIDIA's kernel (nvidia-l4t-kernel): another one has no GPU and no CSI camera"
        return warned("board", f"{name}, {release}, kernel {kernel}: not NVIDIA's", remedy)
    return passed("board", f"{name}, JetPack {found.jetpack} ({release})")


def architecture(machine: Machine) -> str:
    """As uname -m says it; of a saved machine, as its /proc/cpuinfo shows."""
    text = machine.read("/proc/cpuinfo")
    found = [name for name, (key, _) in SIMD.items() if re.search(rf"^{key}\s*:", text, re.MULTILINE)]
    return machine.answers.architecture or (found[0] if len(found) == 1 else "")


def system(machine: Machine) -> Finding | None:
    """The architecture and Python."""
    python, bits = machine.answers.python, machine.answers.pointer_bits
    if python is not None and python < MIN_PYTHON:
        version = ".".join(map(str, python))
        return failed("system", f"Python {version}", "install Python 3.10 or newer, and make the environment with it")
    if bits is not None and bits < 64:
        return failed("system", f"{bits}-bit Python", "install a 64-bit system: llama.cpp and its weights need it")
    if machine.answers.architecture not in ("", *SIMD):
        found = f"architecture {machine.answers.architecture}"
        return failed("system", found, "use a computer with x86-64 or ARM64")
    if python is None:
        return None
    return passed("system", f"{machine.answers.architecture}, Python {'.'.join(map(str, python))}")


def processor(machine: Machine) -> Finding | None:
    """Instructions that the fast kernels need."""
    text, (key, wanted) = machine.read("/proc/cpuinfo"), SIMD.get(architecture(machine), ("", ""))
    lines = [line.partition(":")[2].split() for line in text.splitlines() if line.partition(":")[0].strip() == key]
    if not wanted or not lines:
        return None
    if wanted not in lines[0]:
        remedy = "use a newer processor; on a virtual machine, pass the host's processor through"
        return warned("processor", f"without {wanted}: llama.cpp is several times slower", remedy)
    return passed("processor", f"{len(lines)} cores, with {wanted}")


def threads(machine: Machine) -> Finding | None:
    """The processor time that control groups leave, against the threads that are configured."""
    n_cores = machine.answers.n_cores
    if n_cores is None:
        return None
    quota, n_available = cpu_quota(machine.read), available_cores(machine.read, n_cores)
    limit = "no quota" if quota is None else f"a quota of {quota:g} processors"
    configured = machine.config.cpu_threads if machine.config is not None else 0
    found = f"{n_cores} cores allowed, {limit}"
    if quota is not None and quota < 1:
        return warned("threads", found, "raise CPUQuota= (or the container's --cpus) to 1 processor or more")
    if configured > n_available:
        remedy = f"set cpu_threads to {n_available} or 0, or allow more processor time (CPUQuota=, AllowedCPUs=)"
        return warned("threads", f"{found}, but cpu_threads is {configured}", remedy)
    share = _throttled_share(machine)
    if share > THROTTLED_PERIODS:
        remedy = "raise the quota, or lower cpu_threads: the threads stand still for the rest of each period"
        return warned("threads", f"{found}; used up in {share:.0%} of the periods", remedy)
    return passed("threads", f"{found}: {configured or n_available} threads")


def _throttled_share(machine: Machine) -> float:
    """Of the periods in which a group's quota was used up, in the group where it is largest."""
    shares = [0.0]
    for group in groups("cpu", machine.read):
        lines = [line.split() for line in machine.read(f"{group.folder}/cpu.stat").splitlines()]
        counts = {line[0]: to_number(line[1]) or 0 for line in lines if len(line) == 2}
        if counts.get("nr_periods", 0) > 100:
            shares.append(counts.get("nr_throttled", 0) / counts["nr_periods"])
    return max(shares)


# -- power mode and clocks --------------------------------------------------------------------------------------------


def power_mode(machine: Machine) -> Finding | None:
    """nvpmodel's mode on a Jetson."""
    if jetson(machine) is None:
        return None
    status = re.search(r"pmode:([0-9]{1,4})", machine.read("/var/lib/nvpmodel/status"))
    text = machine.read("/etc/nvpmodel.conf")
    modes = {int(i): name for i, name in re.findall(r"<\s*POWER_MODEL\s+ID=([0-9]{1,3})\s+NAME=(\S+?)\s*>", text)}
    if status is None or int(status.group(1)) not in modes:
        if is_container(machine) or status is None:
            return None
        return warned("power mode", f"mode {int(status.group(1))} is not in /etc/nvpmodel.conf", "sudo nvpmodel -m 0")
    mode = int(status.group(1))
    watts = {number: _watts(name) for number, name in modes.items()}
    strongest = max((value for value in watts.values() if value is not None), default=None)
    own = watts[mode]
    if own is not None and strongest is not None and own < WEAK_MODE * strongest:
        best = next((number for number, name in modes.items() if name.startswith("MAXN")), None)
        if best is None:
            best = next(number for number, value in watts.items() if value == strongest)
        remedy = f"sudo nvpmodel -m {best} ({modes[best]}), if supply and cooling allow it"
        return warned("power mode", f"{modes[mode]}: the strongest mode has {strongest:g} W", remedy)
    return passed("power mode", modes[mode])


def _watts(name: str) -> float | None:
    """15W, MODE_30W, 7W_AI; MAXN has none."""
    found = re.search(r"([0-9]{1,3})W", name)
    return float(found.group(1)) if found else None


def clocks(machine: Machine) -> Finding | None:
    """Frequency governors, and clocks that are held down."""
    cpu = "/sys/devices/system/cpu/cpufreq"
    slow: list[tuple[str, str]] = []  # what is slow, and the remedy
    for name in machine.names(cpu):
        governor, driver = (machine.line(f"{cpu}/{name}/scaling_{what}") for what in ("governor", "driver"))
        preference = machine.line(f"{cpu}/{name}/energy_performance_preference")
        # Two drivers choose the clock by themselves; there, powersave is the name of the normal governor.
        chooses_itself = driver in ("intel_pstate", "amd-pstate-epp")
        if governor == "powersave" and not chooses_itself:
            slow.append((f"{name}: {governor}", f"echo schedutil | sudo tee {cpu}/*/scaling_governor"))
        if chooses_itself and preference == "power":
            file = f"{cpu}/*/energy_performance_preference"
            slow.append((f"{name}: {preference}", f"echo balance_performance | sudo tee {file}"))
        limits = [machine.number(f"{cpu}/{name}/{what}") for what in ("scaling_max_freq", "cpuinfo_max_freq")]
        if jetson(machine) is None and None not in limits and (limits[0] or 0) < WEAK_MODE * (limits[1] or 0):
            found = f"{name}: at most {(limits[0] or 0) / 1000:.0f} of {(limits[1] or 0) / 1000:.0f} MHz"
            slow.append((found, f"echo {limits[1]} | sudo tee {cpu}/{name}/scaling_max_freq"))
    gpu = sensors.gpu_folder(machine.names)
    steps = to_numbers(machine.read(f"{gpu}/available_frequencies")) if gpu else []
    limit_hz = machine.number(f"{gpu}/max_freq") if gpu else None
    if steps and limit_hz and limit_hz < HELD_DOWN_GPU * max(steps):
        slow.append((f"GPU: at most {limit_hz / 1e6:.0f} of {max(steps) / 1e6:.0f} MHz", ""))
    if slow:
        remedy = "sudo jetson_clocks; choose a stronger power mode first" if jetson(machine) else slow[0][1]
        return warned("clocks", "; ".join(found for found, _ in slow[:3]), remedy)
    mhz = sensors.cpu_mhz(machine.read, machine.names)
    if mhz is None and gpu is None:
        return None
    gpu_mhz = sensors.gpu_mhz(machine.read, machine.names)
    return passed("clocks", ", ".join(f"{name} {n:.0f} MHz now" for name, n in (("CPU", mhz), ("GPU", gpu_mhz)) if n))


# -- heat -------------------------------------------------------------------------------------------------------------


def temperature(machine: Machine) -> Finding | None:
    """Sensors, and how near they are to the point where the board throttles."""
    now = sensors.read_board(machine.read, machine.names)
    if now.temperature_c is None and machine.answers.tegrastats:
        now = sensors.parse_tegrastats(machine.answers.tegrastats)
    silent = [zone.name for zone in now.zones if zone.temperature_c is None]
    if now.temperature_c is None:
        if jetson(machine) is None or is_container(machine):
            return None
        return warned(
            "temperature", "no sensor gives a value", "look at `sudo dmesg | grep -i thermal`; restart the board"
        )
    rest = f", {len(silent)} of {len(now.zones)} sensors give no value ({', '.join(silent[:4])})" if silent else ""
    hottest = f"{now.temperature_c:.0f} °C"
    if now.headroom_c is None:
        return passed("temperature", f"{hottest}; no sensor tells where the board throttles{rest}")
    found = f"{hottest}, {abs(now.headroom_c):.0f} °C {'under' if now.headroom_c > 0 else 'over'} a limit{rest}"
    if now.headroom_c <= 0:
        return failed("temperature", found, "cool the board: fan, heat sink, air; or choose a weaker power mode")
    if now.headroom_c < NEAR_LIMIT_C:
        return warned("temperature", found, "cool the board: it throttles soon")
    return passed("temperature", found)


def throttling(machine: Machine) -> Finding | None:
    """Whether clocks are lowered now, and by what."""
    reasons = list(sensors.throttle_reasons(machine.read, machine.names) or ())
    for card in machine.answers.cards or ():
        reasons += [f"{card.name}: {reason}" for reason in card.throttle_reasons or ()]
    known = sensors.throttle_reasons(machine.read, machine.names) is not None
    if reasons:
        remedy = "cool the board, or use a stronger supply; the governor lowers the load before (governor.enabled)"
        if set(reasons) == {sensors.UNDER_VOLTAGE}:
            remedy = "use a stronger supply, with a short and thick cable"
        return warned("throttling", "; ".join(reasons[:4]), remedy)
    events = sensors.overcurrent_events(machine.read, machine.names)
    if events:
        found = f"too much current, since the boot: {events}"
        return warned("throttling", found, "use a stronger supply, or a weaker power mode (nvpmodel)")
    known |= events is not None or any(card.throttle_reasons is not None for card in machine.answers.cards or ())
    return passed("throttling", "not now") if known else None


CHECKS = (board, system, processor, threads, power_mode, clocks, temperature, throttling)
