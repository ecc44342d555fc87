"""Power: true where the sensor tells it, None where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.board.power import power_w


def sensor(drivers: Path, name: str, voltage_mv: str | None, current_ma: str | None) -> None:
    folder = drivers / name / "hwmon" / "hwmon3"
    folder.mkdir(parents=True)
    for file, text in (("in1_input", voltage_mv), ("curr1_input", current_ma)):
        if text is not None:
            (folder / file).write_text(text)


def test_power_is_millivolts_times_milliamperes(tmp_path):
    sensor(tmp_path, "1-0040", "5000\n", "1500\n")
    sensor(tmp_path, "1-0041", "12000\n", "9000\n")  # the second sensor measures parts of the board
    assert power_w(tmp_path) == 7.5


@pytest.mark.parametrize(("voltage_mv", "current_ma"), [("", "1"), ("5000", "x"), ("5000", None), ("\xff", "1")])
def test_a_sensor_that_cannot_be_read_is_skipped(tmp_path, voltage_mv, current_ma):
    sensor(tmp_path, "1-0040", voltage_mv, current_ma)
    assert power_w(tmp_path) is None
    sensor(tmp_path, "1-0041", "5000", "2000")
    assert power_w(tmp_path) == 10.0


def test_without_a_sensor_the_power_is_unknown(tmp_path):
    assert power_w(tmp_path) is None and power_w(tmp_path / "none") is None
