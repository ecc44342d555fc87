"""Temperature, power, clocks and throttling: what boards really have in sysfs, and unknown for everything else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.board import sensors
from edge_agent.board.sensors import Rail, Zone, parse_tegrastats, read_board
from tests.harness import boards


def files(table: boards.Table) -> boards.TableFiles:
    return boards.TableFiles(table, {})


def board_of(table: boards.Table) -> sensors.Board:
    return read_board(files(table).read, files(table).names)


def text_zone(number: int, text: str) -> boards.Table:
    return boards.zone(number, f"zone{number}", 1) | {f"/sys/class/thermal/thermal_zone{number}/temp": text}


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("45500\n", "51250\n", "48000\n"), 51.25),
        (("45500\n", "-256000\n"), 45.5),  # on a Tegra: the sensor is off
        (("-256000\n",), None),
        (("0\n",), None),
        (("0\n", "31000\n"), 31.0),
        (("200000\n", "31000\n"), 31.0),
        (("150000\n",), None),
        (("149999\n",), 149.999),
        (("", "hot\n", "45.5\n", "0x20\n", "4 5\n"), None),
        (("--5\n", "31000\n"), 31.0),
        (("²\n", "31000\n"), 31.0),
        ((), None),
    ],
)
def test_temperature_is_that_of_the_hottest_sensor_that_works(texts, expected):
    table: boards.Table = {"/sys/class/thermal/cooling_device0/temp": "99000\n"}
    for i, text in enumerate(texts):
        table |= text_zone(i, text)
    assert board_of(table).temperature_c == expected


def test_sensors_of_this_kind_in_a_real_folder(tmp_path, monkeypatch):
    """A sensor that is a folder, one of a chip that is powered down, and one that is no text."""
    monkeypatch.setattr(sensors, "THERMAL", str(tmp_path))
    for i in range(3):
        (tmp_path / f"thermal_zone{i}").mkdir()
    (tmp_path / "thermal_zone0" / "temp").mkdir()
    os.symlink("/proc/self/mem", tmp_path / "thermal_zone1" / "temp")
    (tmp_path / "thermal_zone2" / "temp").write_bytes(b"\xff\xfe31000")
    assert [zone.temperature_c for zone in sensors.zones()] == [None] * 3
    monkeypatch.setattr(sensors, "THERMAL", str(tmp_path / "none"))
    assert sensors.zones() == []


@pytest.mark.parametrize(
    ("trips", "expected"),
    [
        ({"passive": 99, "hot": 102, "critical": 104.5}, 99.0),
        ({"hot": 102, "critical": 104.5}, 102.0),
        ({"critical": 104.5}, 99.5),
        ({"active": 50}, None),
        ({"passive": 0, "critical": 110}, 105.0),  # a trip point that is switched off
        ({}, None),
    ],
)
def test_where_a_zone_throttles(trips, expected):
    board = board_of(boards.zone(0, "cpu-thermal", 60, **trips))
    assert board.zones == (Zone("cpu-thermal", 60.0, expected),)
    assert board.headroom_c == (None if expected is None else expected - 60)


def test_the_headroom_is_that_of_the_zone_that_throttles_first():
    table = (
        boards.zone(0, "cpu", 70, passive=99)
        | boards.zone(1, "gpu", 60, passive=75)
        | boards.zone(2, "cv", None, passive=60)
    )
    assert (board_of(table).temperature_c, board_of(table).headroom_c) == (70.0, 15.0)


def test_a_radio_or_a_battery_is_not_the_processor():
    table = (
        boards.zone(0, "iwlwifi_1", 90, passive=80) | boards.zone(1, "x86_pkg_temp", 50) | boards.zone(2, "battery", 95)
    )
    assert board_of(table).temperature_c == 50.0


def test_a_raspberry_pi_throttles_below_its_trip_point():
    board = board_of(boards.RASPBERRY_PI.files)
    assert board.zones == (Zone("cpu-thermal", 58.0, 80.0),)


def test_a_pc_has_sensors_in_its_processor_that_tell_the_limit():
    folder = "/sys/class/hwmon/hwmon1"
    table: boards.Table = {
        f"{folder}/name": "coretemp\n",
        f"{folder}/temp1_input": "61000\n",
        f"{folder}/temp1_crit": "100000\n",
        f"{folder}/temp1_label": "Package id 0\n",
        "/sys/class/hwmon/hwmon2/name": "nvme\n",
        "/sys/class/hwmon/hwmon2/temp1_input": "80000\n",
    }
    assert board_of(table).zones == (Zone("Package id 0", 61.0, 100.0),)
    board = board_of(table | boards.zone(0, "x86_pkg_temp", 62, passive=0))
    assert (board.temperature_c, board.headroom_c) == (62.0, 39.0)


# -- power ------------------------------------------------------------------------------------------------------------


def test_the_power_of_a_module_is_that_of_its_input():
    table = boards.rail(1, 2, "VDD_CPU_GPU_CV", 5000, 400) | boards.rail(1, 1, "VDD_IN", 5000, 1500, limit_ma=5000)
    assert (board_of(table).power_w, board_of(table).power_limit_w) == (7.5, 25.0)


def test_an_agx_orin_has_parts_only():
    assert board_of(boards.AGX_ORIN.files).power_w == pytest.approx(19.84 * 0.2 + 19.84 * 0.04 + 5 * 0.6)


def test_one_rail_of_several_is_not_the_power_of_the_board():
    parts = boards.rail(1, 1, "VDD_GPU", 5000, 400) | boards.rail(1, 2, "VDD_CPU_SOC_MSS", 5000, 200)
    assert (board_of(parts).power_w, board_of(parts).power_limit_w) == (None, None)


def test_the_sum_of_shunts_is_no_rail():
    table = boards.rail(1, 1, "VDD_IN", 5000, 1500) | boards.rail(1, 7, "", 1, 1)
    assert [rail.name for rail in sensors.rails(files(table).read, files(table).names)] == ["VDD_IN"]


@pytest.mark.parametrize(
    ("voltage", "current"),
    [
        ("32760", "1"),
        ("5000", "32760"),
        ("", "1"),
        ("5000", "x"),
        ("5000", ""),
        ("-1", "1"),
        ("5000", "-3"),
        ("²", "1"),
    ],
)
def test_a_rail_that_cannot_be_read_is_skipped(voltage, current):
    folder = "/sys/class/hwmon/hwmon1"
    broken = boards.rail(1, 1, "VDD_IN", 1, 1) | {f"{folder}/in1_input": voltage, f"{folder}/curr1_input": current}
    assert board_of(broken).power_w is None
    other = broken | boards.rail(2, 1, "", 5000, 2000)
    assert sensors.rails(files(other).read, files(other).names) == [Rail("channel 1", 10.0, None)]
    assert board_of(other).power_w == 10.0


def test_a_board_without_sensors_is_unknown():
    assert board_of({}) == sensors.Board()
    assert board_of(boards.PC.files).power_w is None


# -- clocks and throttling --------------------------------------------------------------------------------------------


def test_clocks():
    board = board_of(boards.ORIN_NANO.files)
    assert (board.cpu_mhz, board.gpu_mhz) == (755.2, 612.0)


def test_a_fan_is_no_throttling_and_a_processor_that_is_cooled_is():
    assert board_of(boards.ORIN_NANO.files).throttle_reasons == ()
    assert board_of(boards.cooler(0, "pwm-fan", 3)).throttle_reasons is None
    hot = boards.ORIN_NANO.files | boards.cooler(2, "devfreq-17000000.gpu", 1)
    assert board_of(hot).throttle_reasons == ("temperature: devfreq-17000000.gpu at step 1",)
    weak = boards.RASPBERRY_PI.files | {"/sys/class/hwmon/hwmon2/in0_lcrit_alarm": "1\n"}
    assert board_of(weak).throttle_reasons == ("under-voltage",)


def test_events_of_too_much_current():
    table = boards.ORIN_NANO.files | {
        "/sys/class/hwmon/hwmon5/oc1_event_cnt": "2\n",
        "/sys/class/hwmon/hwmon5/oc2_event_cnt": "x",
    }
    assert sensors.overcurrent_events(files(table).read, files(table).names) == 2
    assert sensors.overcurrent_events(files({}).read, files({}).names) is None


# -- tegrastats -------------------------------------------------------------------------------------------------------

ORIN_NANO = (
    "11-27-2026 10:00:01 RAM 3162/7620MB (lfb 3x4MB) SWAP 0/3810MB (cached 0MB) CPU [5%@1510,1%@729,off,off] EMC_FREQ "
    "0%@2133 GR3D_FREQ 12%@[611] NVDEC off APE 174 cpu@47.562C soc2@46.9C gpu@48.4C tj@48.5C VDD_IN 4970mW/4900mW "
    "VDD_CPU_GPU_CV 845mW/845mW VDD_SOC 1451mW/1451mW"
)
AGX = (
    "RAM 5000/62841MB (lfb 4x4MB) CPU [1%@2201] GR3D_FREQ 0% CV0@-256C CPU@45C Tboard@76C SOC2@42.5C VDD_GPU_SOC "
    "2395mW/2395mW VDD_CPU_CV 798mW/798mW VIN_SYS_5V0 2924mW/2924mW NC 0mW/0mW VDDQ_VDD2_1V8AO 300mW/300mW"
)
XAVIER = "RAM 1/2MB CPU [1%@102] PLL@30C POM_5V_GPU 40/40 POM_5V_IN 1500/1400 EMC_FREQ 0%@1600 GR3D_FREQ 0%@76"


@pytest.mark.parametrize(
    ("line", "power_w", "temperature_c", "cpu_mhz", "gpu_mhz"),
    [
        (ORIN_NANO, 4.97, 48.5, 1510, 611),
        (AGX, 6.117, 45.0, 2201, None),
        (XAVIER, 1.5, 30.0, 102, 76),
        ("", None, None, None, None),
    ],
)
def test_a_line_of_tegrastats(line, power_w, temperature_c, cpu_mhz, gpu_mhz):
    board = parse_tegrastats(line)
    assert board.power_w == (None if power_w is None else pytest.approx(power_w))
    assert (board.temperature_c, board.cpu_mhz, board.gpu_mhz) == (temperature_c, cpu_mhz, gpu_mhz)
    assert board.throttle_reasons is None and board.headroom_c is None


@given(st.text() | st.text().map(lambda text: f"VDD_IN {text}mW/1mW {text}@{text}C CPU [{text}%@{text}]"))
def test_any_text_is_a_board(text):
    parse_tegrastats(text)


def test_names_of_a_folder(tmp_path: Path):
    (tmp_path / "b").touch()
    (tmp_path / "a").touch()
    assert sensors.list_names(str(tmp_path)) == ["a", "b"] and sensors.list_names(str(tmp_path / "none")) == []
