"""Temperature, power, clocks and throttling of the board, from sysfs and from tegrastats' text. None: unknown, never 0.

Pure functions of a reader of files, so that a test, or a copy of another board's files, can take the place of /sys.
A sensor that is switched off returns an error, 0, -256 °C or nothing: it does not count.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import NamedTuple

from edge_agent.board.control_groups import Read, read_text

Names = Callable[[str], list[str]]  # names in a folder, sorted; empty if it cannot be read
THERMAL, HWMON, CPU = "/sys/class/thermal", "/sys/class/hwmon", "/sys/devices/system/cpu"
MIN_TRIP_C, MAX_C = 40.0, 150.0  # no working silicon is hotter; a trip point below is that of a fan or of a battery
BELOW_CRITICAL_C = 5.0  # a zone with a shut-down temperature alone
# Zones of a computer that do not measure its processors. A radio or a charger has its own limits.
OTHER_ZONES = ("iwlwifi", "battery", "bat", "pch", "nvme", "wifi", "charger", "tboard", "tdiode", "mt76", "int34")
# Its trip points are notifications that a program sets; coretemp has the limit.
PACKAGE_ZONE = "x86_pkg_temp"
UNDER_VOLTAGE = "under-voltage"
# The firmware of a Raspberry Pi throttles at this temperature; sysfs does not tell.
FIRMWARE_LIMITS_C = {"Raspberry Pi": 80.0}
PROCESSOR_COOLERS = ("processor", "cpufreq", "devfreq", "cpu-throttle", "gpu-throttle", "cpu_throttle", "gpu_throttle")
# mV and mA: the largest value of a register. It is read where a limit was never set, or the bus failed.
FULL_SCALE = 32_000
POWER_CHIPS = ("ina3221", "ina238", "ina226", "ina2xx")
# Rails that carry the whole board, best first. INA3221's channel 1 is the input of a Jetson module.
TOTAL_RAILS = ("VDD_IN", "VIN", "VDD_TOTAL", "POM_5V_IN", "SYS_VIN_HV")
TEGRASTATS_RAIL = re.compile(r"\b([A-Z][A-Z0-9_]{2,}) ([0-9]{1,7})(?:mW)?/[0-9]{1,7}(?:mW)?(?![0-9A-Za-z])")
# AGX Orin has no rail for the whole module: these are its parts.
PART_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")


class Zone(NamedTuple):
    """One temperature sensor."""

    name: str
    temperature_c: float | None  # None: it gives no value
    throttle_at_c: float | None  # where the kernel or the firmware lowers the clocks


class Rail(NamedTuple):
    """One measured supply."""

    name: str
    power_w: float
    limit_w: float | None  # where the board throttles


class Board(NamedTuple):
    """What the sensors say now."""

    zones: tuple[Zone, ...] = ()
    power_w: float | None = None  # of the whole board
    power_limit_w: float | None = None
    throttle_reasons: tuple[str, ...] | None = None  # None: unknown
    cpu_mhz: float | None = None  # of the fastest core
    gpu_mhz: float | None = None

    @property
    def temperature_c(self) -> float | None:
        """Of the hottest zone."""
        return max((zone.temperature_c for zone in self.zones if zone.temperature_c is not None), default=None)

    @property
    def headroom_c(self) -> float | None:
        """How far the zone that is nearest to its limit is from it; below 0: over it. None: no zone has a limit."""
        return min(
            (
                zone.throttle_at_c - zone.temperature_c
                for zone in self.zones
                if zone.temperature_c is not None and zone.throttle_at_c is not None
            ),
            default=None,
        )


def list_names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def read_board(read: Read = read_text, names: Names = list_names) -> Board:
    power_w, power_limit_w = board_power(rails(read, names))
    return Board(
        zones=tuple(zones(read, names)),
        power_w=power_w,
        power_limit_w=power_limit_w,
        throttle_reasons=throttle_reasons(read, names),
        cpu_mhz=cpu_mhz(read, names),
        gpu_mhz=gpu_mhz(read, names),
    )


# -- temperature ------------------------------------------------------------------------------------------------------


def zones(read: Read = read_text, names: Names = list_names) -> list[Zone]:
    """The temperatures of the processors."""
    found: list[Zone] = []
    model = read("/proc/device-tree/model")
    firmware_c = next((limit for name, limit in FIRMWARE_LIMITS_C.items() if model.startswith(name)), None)
    for name in names(THERMAL):
        if not re.fullmatch(r"thermal_zone[0-9]+", name):
            continue
        folder = f"{THERMAL}/{name}"
        kind = read(f"{folder}/type").strip()
        if kind.lower().startswith(OTHER_ZONES):
            continue
        limit_c = _throttle_trip_c(folder, read, names)
        if firmware_c is not None:
            limit_c = min(firmware_c, limit_c or firmware_c)
        if kind == PACKAGE_ZONE:
            limit_c = None
        temperature_c = _celsius(read(f"{folder}/temp"))
        found.append(Zone(kind or name, temperature_c if (temperature_c or 0) > 0 else None, limit_c))
    return found + _chip_sensors(read, names)


def _throttle_trip_c(folder: str, read: Read, names: Names) -> float | None:
    """The lowest passive trip point; without one, the hot one, or a little below the critical one."""
    trips: dict[str, float] = {}
    for name in names(folder):
        match = re.fullmatch(r"trip_point_([0-9]+)_type", name)
        trip_c = _celsius(read(f"{folder}/trip_point_{match.group(1)}_temp")) if match else None
        if trip_c is not None and trip_c >= MIN_TRIP_C:
            kind = read(f"{folder}/{name}").strip()
            trips[kind] = min(trip_c, trips.get(kind, MAX_C))
    critical_c = trips["critical"] - BELOW_CRITICAL_C if "critical" in trips else None
    return trips.get("passive", trips.get("hot", critical_c))


def _chip_sensors(read: Read, names: Names) -> list[Zone]:
    """Of a PC: the sensors in its processor, whose critical value is where it throttles. Its zones do not tell that."""
    found = []
    for name in names(HWMON):
        chip = read(f"{HWMON}/{name}/name").strip()
        if chip not in ("coretemp", "k10temp", "zenpower"):
            continue
        for file in names(f"{HWMON}/{name}"):
            if re.fullmatch(r"temp[0-9]+_input", file):
                stem = f"{HWMON}/{name}/{file.removesuffix('_input')}"
                label = read(f"{stem}_label").strip() or chip
                temperature_c, limit_c = (_celsius(read(f"{stem}_{what}")) or 0.0 for what in ("input", "crit"))
                found.append(
                    Zone(
                        label,
                        temperature_c if temperature_c > 0 else None,
                        limit_c if limit_c >= MIN_TRIP_C else None,
                    )
                )
    return found


def _celsius(text: str) -> float | None:
    """Of a file in thousandths of a degree; None: no plausible value."""
    number = _integer(text)
    return number / 1000 if number is not None and -MAX_C < number / 1000 < MAX_C else None


def _integer(text: str) -> int | None:
    text = text.strip()
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text, re.ASCII) else None


# -- power ------------------------------------------------------------------------------------------------------------


def rails(read: Read = read_text, names: Names = list_names) -> list[Rail]:
    """The supplies that INA sensors measure. Channels without a label are not connected, except the first."""
    found = []
    for name in names(HWMON):
        folder = f"{HWMON}/{name}"
        if not read(f"{folder}/name").strip().startswith(POWER_CHIPS):
            continue
        for file in names(folder):
            match = re.fullmatch(r"in([1-3])_input", file)  # the others are sums, and voltages of shunts
            if match and (rail := _rail(folder, match.group(1), read)) is not None:
                found.append(rail)
    return found


def _rail(folder: str, number: str, read: Read) -> Rail | None:
    voltage_mv, current_ma = (_integer(read(f"{folder}/{kind}{number}_input")) for kind in ("in", "curr"))
    label = read(f"{folder}/in{number}_label").strip()
    if (
        voltage_mv is None
        or current_ma is None
        or not 0 <= voltage_mv < FULL_SCALE
        or not 0 <= current_ma < FULL_SCALE
        or label in ("NC", "Sum of shunt v")
    ):
        return None
    limits = [_integer(read(f"{folder}/curr{number}_{kind}")) for kind in ("max", "crit")]
    limit_ma = min((limit for limit in limits if limit is not None and limit > 0), default=None)
    limit_w = voltage_mv * limit_ma / 1e6 if limit_ma is not None and limit_ma < FULL_SCALE else None
    return Rail(label or f"channel {number}", voltage_mv * current_ma / 1e6, limit_w)


def board_power(found: list[Rail]) -> tuple[float | None, float | None]:
    """(power of the whole board, its limit), in watts."""
    by_name = {rail.name: rail for rail in reversed(found)}
    for name in TOTAL_RAILS:
        if name in by_name:
            return by_name[name].power_w, by_name[name].limit_w
    parts = [by_name[name].power_w for name in PART_RAILS if name in by_name]
    if len(parts) > 1:
        return sum(parts), None
    return (found[0].power_w, found[0].limit_w) if len(found) == 1 else (None, None)  # of several: parts of the board


# -- clocks and throttling --------------------------------------------------------------------------------------------


def cpu_mhz(read: Read = read_text, names: Names = list_names) -> float | None:
    clocks = [_integer(read(f"{CPU}/cpufreq/{name}/scaling_cur_freq")) for name in names(f"{CPU}/cpufreq")]
    known_khz = [clock for clock in clocks if clock]
    return max(known_khz) / 1000 if known_khz else None


def gpu_folder(names: Names) -> str | None:
    """The GPU of a Jetson among the devices with a changing clock: 17000000.gpu, gpu-gpc-0 and others."""
    found = [name for name in names("/sys/class/devfreq") if re.search(r"gpu|ga10b|gv11b|gp10b|gpc", name)]
    return f"/sys/class/devfreq/{found[0]}" if found else None


def gpu_mhz(read: Read = read_text, names: Names = list_names) -> float | None:
    folder = gpu_folder(names)
    clock_hz = _integer(read(f"{folder}/cur_freq")) if folder else None
    return clock_hz / 1e6 if clock_hz else None


def throttle_reasons(read: Read = read_text, names: Names = list_names) -> tuple[str, ...] | None:
    """Why the clocks of the processors are lowered now; empty: they are not. None: nothing here tells."""
    known, reasons = False, []
    for name in names(THERMAL):
        kind = read(f"{THERMAL}/{name}/type").strip()
        if not name.startswith("cooling_device") or not kind.lower().startswith(PROCESSOR_COOLERS):
            continue
        state = _integer(read(f"{THERMAL}/{name}/cur_state"))
        known |= state is not None
        if state is not None and state > 0:
            reasons.append(f"temperature: {kind} at step {state}")
    for name in names(HWMON):
        alarm = _integer(read(f"{HWMON}/{name}/in0_lcrit_alarm"))  # of a Raspberry Pi
        if alarm is not None and read(f"{HWMON}/{name}/name").strip() == "rpi_volt":
            known = True
            if alarm:
                reasons.append(UNDER_VOLTAGE)
    return tuple(reasons) if known else None


def overcurrent_events(read: Read = read_text, names: Names = list_names) -> int | None:
    """How often a Jetson throttled since the boot because it drew too much current; None: unknown."""
    counts = [
        _integer(read(f"{HWMON}/{name}/{file}"))
        for name in names(HWMON)
        for file in names(f"{HWMON}/{name}")
        if re.fullmatch(r"oc[0-9]+_event_cnt", file)
    ]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


# -- tegrastats -------------------------------------------------------------------------------------------------------


def parse_tegrastats(line: str) -> Board:
    """One line of NVIDIA's tegrastats, of JetPack 4 to 7: "… VDD_IN 4970mW/4970mW … cpu@47.5C … GR3D_FREQ 0%@[305]".

    A rail says "now/average"; older releases have no unit. A temperature of -256 °C is a sensor that is off.
    """
    found_rails = [
        Rail(name, int(milliwatts) / 1000, None)
        for name, milliwatts in TEGRASTATS_RAIL.findall(line)
        if name not in ("RAM", "SWAP", "IRAM", "CPU", "EMC_FREQ", "GR3D_FREQ")
    ]
    temperatures = re.findall(r"\b([A-Za-z][A-Za-z0-9_]*)@(-?[0-9]{1,3}(?:\.[0-9]+)?)C\b", line)
    found_zones = [
        Zone(name, float(value) if 0 < float(value) < MAX_C else None, None)
        for name, value in temperatures
        if not name.lower().startswith(OTHER_ZONES)
    ]
    cpu = [
        int(clock)
        for cores in re.findall(r"\bCPU \[([^\]]*)\]", line)
        for clock in re.findall(r"%@([0-9]{1,5})", cores)
    ]
    gpu = re.search(r"\bGR3D_FREQ [0-9]{1,3}%@\[?([0-9]{1,5})", line)
    return Board(
        zones=tuple(found_zones),
        power_w=board_power(found_rails)[0],
        cpu_mhz=max(cpu, default=None),
        gpu_mhz=float(gpu.group(1)) if gpu else None,
    )
