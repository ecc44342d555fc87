"""Telemetry -> values of the vehicle's state for the model; and what to ask the autopilot for.

>>> VehicleState().values(autopilot, now_ns)
{'altitude_m': 3.2, 'mode': 'OFFBOARD'}
"""

from __future__ import annotations

from typing import Any

from edge_agent.mavlink.autopilot import Autopilot
from edge_agent.mavlink.dialect import mavlink
from edge_agent.time_units import NS_PER_S

US_PER_S = 1_000_000
# Message -> how often it is wanted, in Hz.
WANTED_HZ = {
    "LOCAL_POSITION_NED": 20,
    "ATTITUDE": 20,
    "GLOBAL_POSITION_INT": 10,
    "GPS_RAW_INT": 2,
    "SYS_STATUS": 1,
    "BATTERY_STATUS": 0.5,
    "HOME_POSITION": 0.5,
}
PAUSE_NS = NS_PER_S // 20
LATE_NS = NS_PER_S // 10  # telemetry that seems older than this when it arrives: TIMESYNC tells whether it is
TIME_AGAIN_NS = NS_PER_S // 5
ASK_AGAIN_NS = 5 * NS_PER_S  # for a message that does not come, or too rarely
SLOW = 3  # times the period that was asked for
# Key of the vehicle's state -> after what age it is unknown.
MAX_AGE_NS = {
    "altitude_m": 1 * NS_PER_S,
    "speed_m_s": 1 * NS_PER_S,
    "heading_deg": 1 * NS_PER_S,
    "battery_percent": 10 * NS_PER_S,
    "mode": 3 * NS_PER_S,
    "gps_fix": 5 * NS_PER_S,
}
IDS = {kind.msgname: kind.id for kind in mavlink.mavlink_map.values() if kind.msgname in WANTED_HZ}


class VehicleState:
    """Which values are new, and which have stopped coming: those become null once."""

    def __init__(self) -> None:
        self._sent_ns: dict[str, int] = {}  # key -> when its newest value was true; not in it: unknown

    def changes(self, autopilot: Autopilot, now_ns: int) -> dict[str, float | str | None]:
        """The values since the last call."""
        found = dict(autopilot.values)
        where = autopilot.from_home(now_ns)
        if not isinstance(where, str):
            found["altitude_m"] = (where[0], where[3])
        fresh = {key: value for key, value in found.items() if now_ns - value[0] <= MAX_AGE_NS[key]}
        changed: dict[str, float | str | None] = {
            key: value for key, (t_ns, value) in fresh.items() if self._sent_ns.get(key) != t_ns
        }
        changed |= dict.fromkeys(self._sent_ns.keys() - fresh.keys())
        self._sent_ns = {key: t_ns for key, (t_ns, _) in fresh.items()}
        return changed


class Requests:
    """Asks for messages that do not come, again and again, but rarely, and one at a time: a slow serial port has to
    carry setpoints too."""

    def __init__(self) -> None:
        self._asked_ns: dict[str, int] = {}
        self._home_ns, self._last_ns = -ASK_AGAIN_NS, 0

    def due(self, autopilot: Autopilot, now_ns: int) -> Any | None:
        """A message to send now, if there is one. None before there is a HEARTBEAT."""
        if autopilot.fresh_heartbeat(now_ns) is None:
            self._asked_ns.clear()
            return None
        if now_ns - self._last_ns < PAUSE_NS:
            return None
        if autopilot.late_ns > LATE_NS and now_ns - autopilot.asked_time_ns >= TIME_AGAIN_NS:
            autopilot.asked_time_ns = self._last_ns = now_ns
            return mavlink.MAVLink_timesync_message(0, now_ns)
        for name, rate_hz in WANTED_HZ.items():
            asked_ns = self._asked_ns.get(name)
            if asked_ns is None or (now_ns - asked_ns >= ASK_AGAIN_NS and not _is_coming(autopilot, name, now_ns)):
                self._asked_ns[name] = self._last_ns = now_ns
                return _command(autopilot, mavlink.MAV_CMD_SET_MESSAGE_INTERVAL, IDS[name], round(US_PER_S / rate_hz))
        if "HOME_POSITION" not in autopilot.seen and now_ns - self._home_ns >= ASK_AGAIN_NS:
            self._home_ns = self._last_ns = now_ns
            return _command(autopilot, mavlink.MAV_CMD_REQUEST_MESSAGE, IDS["HOME_POSITION"])
        return None


def _is_coming(autopilot: Autopilot, name: str, now_ns: int) -> bool:
    """At about the rate that is wanted: a ground station on the same link may have asked for less."""
    period_ns = NS_PER_S / WANTED_HZ[name]
    seen_ns = autopilot.seen.get(name)
    if seen_ns is None or now_ns - seen_ns >= max(ASK_AGAIN_NS, 2 * period_ns):
        return False
    return autopilot.gaps[name] <= SLOW * period_ns


def land_command(autopilot: Autopilot) -> Any:
    """Land here: both autopilots change to their mode for landing, and read no parameter."""
    return _command(autopilot, mavlink.MAV_CMD_NAV_LAND)


def _command(autopilot: Autopilot, command: int, param1: float = 0, param2: float = 0) -> Any:
    return mavlink.MAVLink_command_long_message(
        autopilot.system, autopilot.component, command, 0, param1, param2, 0, 0, 0, 0, 0
    )
