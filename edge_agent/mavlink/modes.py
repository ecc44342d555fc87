"""The flight modes of PX4 and ArduPilot, by name, and which of them take setpoints from us."""

from __future__ import annotations

from edge_agent.mavlink.dialect import mavlink

PX4, ARDUPILOT = mavlink.MAV_AUTOPILOT_PX4, mavlink.MAV_AUTOPILOT_ARDUPILOTMEGA
NAMES = {PX4: "px4", ARDUPILOT: "ardupilot"}
SETPOINT_MODE = {PX4: "OFFBOARD", ARDUPILOT: "GUIDED"}

# Vehicles that can stop in the air: to them, zero velocity is hold. A VTOL aircraft can be flying as a plane.
HOVERING_TYPES = {
    mavlink.MAV_TYPE_QUADROTOR, mavlink.MAV_TYPE_COAXIAL, mavlink.MAV_TYPE_HELICOPTER, mavlink.MAV_TYPE_HEXAROTOR,
    mavlink.MAV_TYPE_OCTOROTOR, mavlink.MAV_TYPE_TRICOPTER, mavlink.MAV_TYPE_DODECAROTOR, mavlink.MAV_TYPE_DECAROTOR,
    43,  # MAV_TYPE_GENERIC_MULTIROTOR, which pymavlink has from 2.4.50 on
}  # fmt: skip

# PX4: bits 16 to 23 of custom_mode are the main mode, bits 24 to 31 the sub mode.
PX4_AUTO_MAIN = 4
PX4_MAIN = {1: "MANUAL", 2: "ALTCTL", 3: "POSCTL", 4: "AUTO", 5: "ACRO", 6: "OFFBOARD", 7: "STABILIZED", 8: "RATTITUDE"}
PX4_AUTO = {
    1: "AUTO.READY", 2: "AUTO.TAKEOFF", 3: "AUTO.LOITER", 4: "AUTO.MISSION", 5: "AUTO.RTL", 6: "AUTO.LAND",
    8: "AUTO.FOLLOW", 9: "AUTO.PRECLAND",
}  # fmt: skip
ARDUCOPTER = {
    0: "STABILIZE", 1: "ACRO", 2: "ALT_HOLD", 3: "AUTO", 4: "GUIDED", 5: "LOITER", 6: "RTL", 7: "CIRCLE", 9: "LAND",
    11: "DRIFT", 13: "SPORT", 14: "FLIP", 15: "AUTOTUNE", 16: "POSHOLD", 17: "BRAKE", 18: "THROW", 19: "AVOID_ADSB",
    20: "GUIDED_NOGPS", 21: "SMART_RTL", 22: "FLOWHOLD", 23: "FOLLOW", 24: "ZIGZAG", 25: "SYSTEMID", 26: "AUTOROTATE",
    27: "AUTO_RTL",
}  # fmt: skip
# The autopilot says itself that it no longer flies as it should.
LOST_STATES = {
    mavlink.MAV_STATE_EMERGENCY: "EMERGENCY",
    mavlink.MAV_STATE_POWEROFF: "POWEROFF",
    mavlink.MAV_STATE_FLIGHT_TERMINATION: "FLIGHT_TERMINATION",
}


def mode_name(autopilot: int, custom_mode: int) -> str:
    """The mode of a HEARTBEAT, for people and for the vehicle's state. A mode without a name is "MODE n"."""
    if autopilot == PX4:
        main, sub = custom_mode >> 16 & 0xFF, custom_mode >> 24 & 0xFF
        if main == PX4_AUTO_MAIN and sub in PX4_AUTO:
            return PX4_AUTO[sub]
        return PX4_MAIN.get(main, f"MODE {main}.{sub}")
    return ARDUCOPTER.get(custom_mode, f"MODE {custom_mode}")
