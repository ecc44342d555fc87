"""An autopilot's state as MAVLink messages, in the units and with the signs of the MAVLink definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from edge_agent.mavlink.dialect import mavlink
from models.autopilot.autopilot import Autopilot
from models.autopilot.bodies import ORIGIN_ALT_M, ORIGIN_LAT_DEG, ORIGIN_LON_DEG

M_PER_DEG = 111_319.5  # of latitude
CELL_MV, CELLS = 3_900, 4


def _e7(north_m: float, east_m: float) -> tuple[int, int]:
    """Latitude and longitude in 1e-7 degrees."""
    lat_deg = ORIGIN_LAT_DEG + north_m / M_PER_DEG
    lon_deg = ORIGIN_LON_DEG + east_m / (M_PER_DEG * math.cos(math.radians(ORIGIN_LAT_DEG)))
    return round(lat_deg * 1e7), round(lon_deg * 1e7)


def _heading_deg(autopilot: Autopilot) -> float:
    return math.degrees(autopilot.body.attitude_rad[2]) % 360


def heartbeat(autopilot: Autopilot) -> Any:
    mode = autopilot.flavour.modes[autopilot.mode]
    armed = mavlink.MAV_MODE_FLAG_SAFETY_ARMED if autopilot.is_armed else 0
    status = mavlink.MAV_STATE_ACTIVE if autopilot.is_armed else mavlink.MAV_STATE_STANDBY
    quadrotor = mavlink.MAV_TYPE_QUADROTOR
    return mavlink.MAVLink_heartbeat_message(
        quadrotor, autopilot.flavour.autopilot, mode.base_mode | armed, mode.custom_mode, status, 3
    )


def sys_status(autopilot: Autopilot) -> Any:
    sensors = (
        mavlink.MAV_SYS_STATUS_SENSOR_3D_GYRO
        | mavlink.MAV_SYS_STATUS_SENSOR_3D_ACCEL
        | mavlink.MAV_SYS_STATUS_SENSOR_3D_MAG
        | mavlink.MAV_SYS_STATUS_SENSOR_ABSOLUTE_PRESSURE
        | mavlink.MAV_SYS_STATUS_SENSOR_GPS
        | mavlink.MAV_SYS_STATUS_SENSOR_BATTERY
        | mavlink.MAV_SYS_STATUS_PREARM_CHECK
    )
    return mavlink.MAVLink_sys_status_message(
        sensors, sensors, sensors, 200, CELL_MV * CELLS, 1_200, round(autopilot.battery_percent), 0, 0, 0, 0, 0, 0
    )


def battery_status(autopilot: Autopilot) -> Any:
    unknown = 0xFFFF  # MAVLink's "not provided" for a cell
    cells = [CELL_MV] * CELLS + [unknown] * (10 - CELLS)
    return mavlink.MAVLink_battery_status_message(
        0, mavlink.MAV_BATTERY_FUNCTION_ALL, mavlink.MAV_BATTERY_TYPE_LIPO, 0x7FFF, cells, 1_200, -1, -1,
        round(autopilot.battery_percent),
    )  # fmt: skip


def attitude(autopilot: Autopilot) -> Any:
    roll, pitch, yaw = autopilot.body.attitude_rad
    yaw = math.remainder(yaw, 2 * math.pi)
    return mavlink.MAVLink_attitude_message(autopilot.time_boot_ms, roll, pitch, yaw, 0.0, 0.0, autopilot.yaw_rate)


def local_position_ned(autopilot: Autopilot) -> Any:
    body = autopilot.body
    return mavlink.MAVLink_local_position_ned_message(autopilot.time_boot_ms, *body.position_m, *body.velocity_m_s)


def global_position_int(autopilot: Autopilot) -> Any:
    north, east, down = autopilot.body.position_m
    velocity_cm_s = [round(v * 100) for v in autopilot.body.velocity_m_s]
    return mavlink.MAVLink_global_position_int_message(
        autopilot.time_boot_ms, *_e7(north, east), round((ORIGIN_ALT_M - down) * 1000),
        round((autopilot.home_m[2] - down) * 1000), *velocity_cm_s, round(_heading_deg(autopilot) * 100) % 36_000,
    )  # fmt: skip


def gps_raw_int(autopilot: Autopilot) -> Any:
    north, east, down = autopilot.body.position_m
    v_north, v_east, _ = autopilot.body.velocity_m_s
    course_deg = math.degrees(math.atan2(v_east, v_north)) % 360
    return mavlink.MAVLink_gps_raw_int_message(
        autopilot.time_boot_ms * 1000, autopilot.gps_fix, *_e7(north, east),
        round((ORIGIN_ALT_M - down) * 1000), 80, 120, round(math.hypot(v_north, v_east) * 100),
        round(course_deg * 100) % 36_000, 14,
    )  # fmt: skip


def vfr_hud(autopilot: Autopilot) -> Any:
    v_north, v_east, v_down = autopilot.body.velocity_m_s
    speed_m_s = math.hypot(v_north, v_east)
    altitude_m = ORIGIN_ALT_M - autopilot.body.position_m[2]
    return mavlink.MAVLink_vfr_hud_message(
        speed_m_s, speed_m_s, round(_heading_deg(autopilot)) % 360, 50, altitude_m, -v_down
    )


def home_position(autopilot: Autopilot) -> Any:
    north, east, down = autopilot.home_m
    no_rotation = [1.0, 0.0, 0.0, 0.0]
    return mavlink.MAVLink_home_position_message(
        *_e7(north, east), round((ORIGIN_ALT_M - down) * 1000), north, east, down, no_rotation, 0, 0, 0,
        autopilot.time_boot_ms * 1000,
    )  # fmt: skip


def extended_sys_state(autopilot: Autopilot) -> Any:
    landed, in_air, landing = (
        mavlink.MAV_LANDED_STATE_ON_GROUND, mavlink.MAV_LANDED_STATE_IN_AIR, mavlink.MAV_LANDED_STATE_LANDING
    )  # fmt: skip
    state = landed if autopilot.body.is_landed else landing if autopilot.is_landing else in_air
    return mavlink.MAVLink_extended_sys_state_message(mavlink.MAV_VTOL_STATE_UNDEFINED, state)


def autopilot_version(autopilot: Autopilot) -> Any:
    capabilities = (
        mavlink.MAV_PROTOCOL_CAPABILITY_SET_POSITION_TARGET_LOCAL_NED | mavlink.MAV_PROTOCOL_CAPABILITY_MAVLINK2
    )
    return mavlink.MAVLink_autopilot_version_message(
        capabilities, 0x011000FF, 0, 0, 0, [0] * 8, [0] * 8, [0] * 8, 0, 0, 0x0123456789ABCDEF
    )


MESSAGES: dict[str, Callable[[Autopilot], Any]] = {
    "HEARTBEAT": heartbeat,
    "SYS_STATUS": sys_status,
    "BATTERY_STATUS": battery_status,
    "ATTITUDE": attitude,
    "LOCAL_POSITION_NED": local_position_ned,
    "GLOBAL_POSITION_INT": global_position_int,
    "GPS_RAW_INT": gps_raw_int,
    "VFR_HUD": vfr_hud,
    "HOME_POSITION": home_position,
    "EXTENDED_SYS_STATE": extended_sys_state,
    "AUTOPILOT_VERSION": autopilot_version,
}
