"""What the board draws, from its INA3221 power rails."""

from __future__ import annotations

from pathlib import Path


def power_w(drivers: Path = Path("/sys/bus/i2c/drivers/ina3221")) -> float | None:
    """What the board draws now, by the first rail of its INA3221 (a Jetson's whole module); None where it has none."""
    for volts in sorted(drivers.glob("*/hwmon/hwmon*/in1_input")):
        try:
            return int(volts.read_text()) * int(volts.with_name("curr1_input").read_text()) / 1e6  # mV, mA
        except (OSError, ValueError):
            continue
    return None
