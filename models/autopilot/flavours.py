"""What PX4 and ArduCopter do with a companion computer: modes, time-outs, and what they accept.

The facts are from their sources, release 1.16 and 4.6:

PX4: `commander/px4_custom_mode.h` (modes), `mavlink/streams/HEARTBEAT.hpp` (base mode), `commander/commander_params.c`
(COM_OF_LOSS_T), `commander/HealthAndArmingChecks/checks/offboardCheck.cpp` (age of the stream), the guide's page
"Offboard Mode" (2 Hz for more than one second before OFFBOARD is accepted).
ArduCopter: `mode.h` (modes), `GCS_MAVLink_Copter.cpp` (base mode), `mode_guided.cpp` (GUID_TIMEOUT: the target velocity
becomes zero, the mode stays), `mode.cpp` (HEARTBEAT at a change of the mode).
"""

from __future__ import annotations

from typing import NamedTuple

from edge_agent.mavlink.dialect import mavlink

CUSTOM = mavlink.MAV_MODE_FLAG_CUSTOM_MODE_ENABLED
MANUAL = mavlink.MAV_MODE_FLAG_MANUAL_INPUT_ENABLED
STABILIZE = mavlink.MAV_MODE_FLAG_STABILIZE_ENABLED
GUIDED = mavlink.MAV_MODE_FLAG_GUIDED_ENABLED
AUTO = mavlink.MAV_MODE_FLAG_AUTO_ENABLED


# Message id -> name: what both send, at a rate or when asked
TELEMETRY: dict[int, str] = {
    getattr(mavlink, f"MAVLINK_MSG_ID_{name}"): name
    for name in (
        "HEARTBEAT", "SYS_STATUS", "BATTERY_STATUS", "ATTITUDE", "LOCAL_POSITION_NED", "GLOBAL_POSITION_INT",
        "GPS_RAW_INT", "VFR_HUD", "HOME_POSITION", "EXTENDED_SYS_STATE", "AUTOPILOT_VERSION",
    )
}  # fmt: skip


class Mode(NamedTuple):
    """A flight mode as HEARTBEAT reports it; the bit for "armed" is added."""

    custom_mode: int
    base_mode: int


class Flavour(NamedTuple):
    name: str
    autopilot: int  # MAV_AUTOPILOT
    modes: dict[str, Mode]
    first_mode: str  # after the start
    external_mode: str  # follows the setpoints of a companion computer
    land_mode: str
    loss_mode: str  # after the loss of setpoints; the same as external_mode: it stays, and the velocity becomes zero
    loss_s: float  # time without a setpoint that counts as a loss
    stream_s: float  # time that the setpoints must have come before external_mode is accepted; 0: no such rule
    stream_hz: float  # and at least this often
    disarm_s: float  # from touching the ground in land_mode to disarmed
    default_rates_hz: dict[str, float]  # what comes without SET_MESSAGE_INTERVAL
    refused_mode: int  # MAV_RESULT for a mode that cannot be entered
    tells_mode_at_once: bool  # a HEARTBEAT at each change of the mode; else a second may pass


def _px4(main: int, sub: int, base_mode: int) -> Mode:
    return Mode(main << 16 | sub << 24, CUSTOM | base_mode)


_PX4_AUTO = AUTO | STABILIZE | GUIDED
PX4 = Flavour(
    name="PX4",
    autopilot=mavlink.MAV_AUTOPILOT_PX4,
    modes={
        "MANUAL": _px4(1, 0, MANUAL),
        "ALTCTL": _px4(2, 0, MANUAL | STABILIZE),
        "POSCTL": _px4(3, 0, MANUAL | STABILIZE),
        "AUTO.TAKEOFF": _px4(4, 2, _PX4_AUTO),
        "AUTO.LOITER": _px4(4, 3, _PX4_AUTO),
        "AUTO.MISSION": _px4(4, 4, _PX4_AUTO),
        "AUTO.RTL": _px4(4, 5, _PX4_AUTO),
        "AUTO.LAND": _px4(4, 6, _PX4_AUTO),
        "OFFBOARD": _px4(6, 0, STABILIZE),
        "STABILIZED": _px4(7, 0, MANUAL | STABILIZE),
    },
    first_mode="AUTO.LOITER",
    external_mode="OFFBOARD",
    land_mode="AUTO.LAND",
    loss_mode="AUTO.LOITER",  # COM_OBL_RC_ACT 5; the default 0 is Position mode, which needs a pilot
    loss_s=1.0,  # COM_OF_LOSS_T
    stream_s=1.0,
    stream_hz=2.0,
    disarm_s=2.0,  # COM_DISARM_LAND
    default_rates_hz={
        "HEARTBEAT": 1.0, "SYS_STATUS": 1.0, "ATTITUDE": 10.0, "LOCAL_POSITION_NED": 5.0, "GLOBAL_POSITION_INT": 5.0,
        "VFR_HUD": 5.0, "GPS_RAW_INT": 1.0, "BATTERY_STATUS": 0.5, "EXTENDED_SYS_STATE": 1.0, "HOME_POSITION": 0.5,
    },
    refused_mode=mavlink.MAV_RESULT_TEMPORARILY_REJECTED,
    tells_mode_at_once=False,
)  # fmt: skip

_COPTER_BASE = CUSTOM | STABILIZE | MANUAL
_COPTER_POSITION = _COPTER_BASE | GUIDED  # a position controller is active
ARDUCOPTER = Flavour(
    name="ArduCopter",
    autopilot=mavlink.MAV_AUTOPILOT_ARDUPILOTMEGA,
    modes={
        "STABILIZE": Mode(0, _COPTER_BASE),
        "ALT_HOLD": Mode(2, _COPTER_BASE),
        "AUTO": Mode(3, _COPTER_POSITION),
        "GUIDED": Mode(4, _COPTER_POSITION),
        "LOITER": Mode(5, _COPTER_POSITION),
        "RTL": Mode(6, _COPTER_POSITION),
        "LAND": Mode(9, _COPTER_POSITION),
        "BRAKE": Mode(17, _COPTER_POSITION),
    },
    first_mode="STABILIZE",
    external_mode="GUIDED",
    land_mode="LAND",
    loss_mode="GUIDED",
    loss_s=3.0,  # GUID_TIMEOUT
    stream_s=0.0,
    stream_hz=0.0,
    disarm_s=0.0,
    default_rates_hz={"HEARTBEAT": 1.0},  # a serial port whose SRn_ parameters are 0
    refused_mode=mavlink.MAV_RESULT_FAILED,
    tells_mode_at_once=True,
)
