"""Electrical power of the board, from its INA3221 sensor. An unknown value is None, never 0."""

from __future__ import annotations

from pathlib import Path


def power_w(drivers: Path = Path("/sys/bus/i2c/drivers/ina3221")) -> float | None:
    """Power in watts now, from the first rail of the INA3221: on a Jetson that is the whole module.

    None on a board without this sensor, and where neither voltage nor current can be read.
    """
    for voltage_file in sorted(drivers.glob("*/hwmon/hwmon*/in1_input")):
        try:
            voltage_mv = int(voltage_file.read_text())
            current_ma = int(voltage_file.with_name("curr1_input").read_text())
        except (OSError, ValueError):
            continue
        return voltage_mv * current_ma / 1e6
    return None
