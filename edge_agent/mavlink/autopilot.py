"""What the autopilot says about itself, with its age. What stops coming becomes unknown; nothing is guessed.

It reads no clock and no socket: every message comes with the time of its arrival. Three things make everything unknown
until it has been said anew: a lost link, a clock of the autopilot that jumps, and a second sender with the same id.

    >>> autopilot = Autopilot(system=1, component=1)
    >>> autopilot.why_not_engaged(now_ns=0)
    'no HEARTBEAT from system 1 component 1'
"""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import Any, Literal, NamedTuple

from edge_agent.mavlink.boot_clock import BootClock
from edge_agent.mavlink.dialect import mavlink
from edge_agent.mavlink.modes import (
    ARDUPILOT,
    HOVERING_TYPES,
    LOST_STATES,
    NAMES,
    PX4,
    SETPOINT_MODE,
    mode_name,
)
from edge_agent.mavlink.setpoint import Position
from edge_agent.time_units import NS_PER_S

HEARTBEAT_MAX_AGE_NS = 2_500_000_000  # they come once a second: one may be lost
POSITION_MAX_AGE_NS = 500_000_000
PEER_SILENCE_NS = 5 * NS_PER_S  # after this, the autopilot may come back from another address
CONFLICT_NS = 5 * NS_PER_S  # how long two senders with one id keep us in hold after the last sign of the second
VERSION_1_GRACE_NS = 3 * NS_PER_S  # PX4 begins with MAVLink 1 and changes when it hears MAVLink 2
HISTORY_NS = 5 * NS_PER_S  # of poses; longer than the age of any image that is used
MAX_HISTORY = 1000
MAX_GAP_NS = 500_000_000  # between two poses of which the one between is wanted
RESET_M, RESET_S = 2.0, 1.0  # a step of more than this, and than the speed makes in this time, is no flight
MAX_AHEAD_NS = 200_000_000  # an image can be newer than the newest pose
BACKWARD, MAX_BACKWARD = range(129, 256), 3  # steps of a sequence number that are not a loss
M_PER_DEGREE = 6_371_000 * math.pi / 180
MAX_DEGREES_E7 = 1_800_000_000
UNKNOWN_HEADING = 65535
Source = tuple[str, int] | None


class Heard(NamedTuple):
    """A message that arrived, with its header."""

    message: Any  # of pymavlink
    system: int
    component: int
    sequence: int = 0
    is_version_1: bool = False
    peer: Source = None  # the address of the sender; None where a link has only one


class Motion(NamedTuple):
    """LOCAL_POSITION_NED, and when it was true by our clock."""

    t_ns: int
    north_m: float
    east_m: float
    down_m: float
    north_m_s: float
    east_m_s: float
    down_m_s: float


class Turn(NamedTuple):
    """ATTITUDE, and when it was true by our clock."""

    t_ns: int
    yaw_rad: float
    yaw_rate_rad_s: float


class Globe(NamedTuple):
    """GLOBAL_POSITION_INT, and when it was true by our clock."""

    t_ns: int
    latitude_deg: float
    longitude_deg: float
    above_home_m: float


class Home(NamedTuple):
    """HOME_POSITION. local: north, east, down from the origin; None: ArduPilot sends zeros there."""

    latitude_deg: float
    longitude_deg: float
    local: tuple[float, float, float] | None


class Place(NamedTuple):
    """Where the vehicle is and how it moves, relative to home. It is known completely, or there is no Place."""

    t_ns: int  # of the oldest part
    north_m: float
    east_m: float
    up_m: float
    north_m_s: float
    east_m_s: float
    down_m_s: float
    yaw_rad: float


class Heartbeat(NamedTuple):
    t_ns: int
    armed: bool
    autopilot: int
    vehicle_type: int
    mode: str
    state: int
    is_version_1: bool


class Autopilot:
    """The newest words of one autopilot. It holds nothing that must be closed."""

    def __init__(
        self,
        system: int = 1,
        component: int = 1,
        kind: Literal["auto", "px4", "ardupilot"] = "auto",
        home: Literal["autopilot", "origin"] = "autopilot",
        peer: Source = None,
    ) -> None:
        """peer: the only address that counts; None: that of the first HEARTBEAT of this system and component."""
        self.system, self.component = system, component
        self._kind, self._home_kind = kind, home
        self._fixed_peer, self.peer = peer is not None, peer
        self.counts: Counter[str] = Counter()  # what was not used, and why
        self.gaps: dict[str, int] = {}  # name of a message -> time between the last two of them
        self.others: set[tuple[int, int]] = set()  # system and component of other autopilots
        self.values: dict[str, tuple[int, float | str]] = {}  # of the vehicle's state: key -> time, value
        self.seen: dict[str, int] = {}  # name of a message -> time of its arrival
        self.acks: deque[tuple[int, int]] = deque(maxlen=16)  # command and result of COMMAND_ACK
        # How often a HEARTBEAT said "disarmed" or another mode, and how often anything else ended what was flown. A
        # reader that comes late sees by the counts that it has missed a change that is over.
        self.departures = self.interruptions = 0
        self._conflict: tuple[int, str] | None = None  # until when, and what was seen
        self._identity: tuple[int, int] | None = None  # autopilot and vehicle type of the first HEARTBEAT
        self._new_identity: tuple[tuple[int, int], int] | None = None  # of the newest HEARTBEATs, and since when
        self._peer_seen_ns = 0
        self._jumps: deque[int] = deque(maxlen=2)
        self._backward: deque[int] = deque(maxlen=MAX_BACKWARD)
        self._sequence: int | None = None
        self._version_1_since_ns: int | None = None
        self.asked_time_ns = 0  # when TIMESYNC was sent: the answer repeats this number
        self.forget()

    def forget(self) -> None:
        """Everything is unknown until it is said anew: after a lost link, a restart of the autopilot, a suspend."""
        self.interruptions += 1
        self.heartbeat: Heartbeat | None = None
        self._motions: deque[Motion] = deque(maxlen=MAX_HISTORY)
        self._turns: deque[Turn] = deque(maxlen=MAX_HISTORY)
        self._globe: Globe | None = None
        self._home: Home | None = None
        self._clock = BootClock()
        self.late_ns = 0  # how long the newest telemetry was on the way
        self._sequence = None
        self.values.clear()
        self.seen.clear()

    # -- what arrives -------------------------------------------------------------------------------------------------

    def take(self, heard: Heard, now_ns: int) -> None:
        """now_ns: CLOCK_MONOTONIC of the arrival."""
        name = heard.message.get_type()
        if (heard.system, heard.component) != (self.system, self.component):
            self.counts["message of another system or component"] += 1
            if name == "HEARTBEAT" and heard.message.autopilot in NAMES and len(self.others) < 16:
                self.others.add((heard.system, heard.component))
            return
        if not self._is_from_the_peer(heard, name, now_ns):
            self.counts["message of another address"] += 1
            return
        self._note_sequence(heard.sequence, now_ns)
        boot_ms = getattr(heard.message, "time_boot_ms", 0)
        t_ns = now_ns
        if boot_ms:  # 0: not provided
            stamp = self._clock.stamp(name, boot_ms, now_ns)
            if stamp is None:
                self.counts["telemetry out of order"] += 1
                return
            t_ns, has_jumped = stamp
            if has_jumped:
                self._note_jump(now_ns)
                self._clock.stamp(name, boot_ms, now_ns)
                t_ns = now_ns
            self.late_ns = now_ns - t_ns
        handle = _HANDLERS.get(name)
        if handle is not None:
            self.gaps[name] = now_ns - self.seen.get(name, now_ns)
            self.seen[name] = now_ns
            handle(self, heard, t_ns)

    def _is_from_the_peer(self, heard: Heard, name: str, now_ns: int) -> bool:
        if heard.peer is None:
            return True
        if heard.peer != self.peer:
            is_free = self.peer is None or now_ns - self._peer_seen_ns > PEER_SILENCE_NS
            if name != "HEARTBEAT":
                return False
            if self._fixed_peer or not is_free:
                self._see_conflict(now_ns, f"two senders with id {self.system}/{self.component}")
                return False
            if self.peer is not None:
                self.forget()
            self.peer = heard.peer
        self._peer_seen_ns = now_ns
        return True

    def _note_sequence(self, sequence: int, now_ns: int) -> None:
        """The numbers of one sender go on; those of two that take turns go back again and again."""
        if self._sequence is not None and (sequence - self._sequence) % 256 in BACKWARD:
            self._backward.append(now_ns)
            if len(self._backward) == MAX_BACKWARD and now_ns - self._backward[0] < CONFLICT_NS:
                self._see_conflict(now_ns, f"two senders with id {self.system}/{self.component}")
        self._sequence = sequence

    def _note_jump(self, now_ns: int) -> None:
        """The clock of the autopilot jumped: it has started again, or there are two of them."""
        self.counts["clock of the autopilot jumped"] += 1
        self._jumps.append(now_ns)
        if len(self._jumps) == 2 and now_ns - self._jumps[0] < CONFLICT_NS:
            self._see_conflict(now_ns, f"two clocks with id {self.system}/{self.component}")
        self.forget()

    def _see_conflict(self, now_ns: int, what: str) -> None:
        self.counts["sign of a second autopilot"] += 1
        self.interruptions += 1
        self._conflict = (now_ns + CONFLICT_NS, what)

    # -- by message ---------------------------------------------------------------------------------------------------

    def _take_heartbeat(self, heard: Heard, t_ns: int) -> None:
        message = heard.message
        if self._version_1_since_ns is None or not heard.is_version_1:
            self._version_1_since_ns = t_ns if heard.is_version_1 else None
        identity = (message.autopilot, message.type)
        self._note_identity(identity, t_ns)
        is_custom = bool(message.base_mode & mavlink.MAV_MODE_FLAG_CUSTOM_MODE_ENABLED)
        self.heartbeat = Heartbeat(
            t_ns=t_ns,
            armed=bool(message.base_mode & mavlink.MAV_MODE_FLAG_SAFETY_ARMED),
            autopilot=message.autopilot,
            vehicle_type=message.type,
            mode=mode_name(message.autopilot, message.custom_mode) if is_custom else "UNKNOWN",
            state=message.system_status,
            is_version_1=heard.is_version_1,
        )
        self.values["mode"] = (t_ns, self.heartbeat.mode)
        if not self.heartbeat.armed or self.heartbeat.mode != SETPOINT_MODE.get(message.autopilot):
            self.departures += 1

    def _note_identity(self, identity: tuple[int, int], t_ns: int) -> None:
        """Two vehicles with one id take turns. A vehicle that has only learnt its type does not go back."""
        if self._identity is None:
            self._identity = identity if identity[0] in NAMES else None
        elif identity == self._identity:
            self._new_identity = None
        elif self._new_identity is None or self._new_identity[0] != identity:
            self._new_identity = (identity, t_ns)
            self._see_conflict(t_ns, f"HEARTBEATs of {self.system}/{self.component} that differ")
        elif t_ns - self._new_identity[1] < CONFLICT_NS:
            self._see_conflict(t_ns, f"HEARTBEATs of {self.system}/{self.component} that differ")
        else:
            self._identity, self._new_identity = identity, None

    def _take_local_position(self, heard: Heard, t_ns: int) -> None:
        m = heard.message
        numbers = (m.x, m.y, m.z, m.vx, m.vy, m.vz)
        if not all(map(math.isfinite, numbers)):  # unknown now, not when the last one has become old
            self.counts["LOCAL_POSITION_NED that is not finite"] += 1
            self._motions.clear()
            self.values.pop("speed_m_s", None)
            return
        motion = Motion(t_ns, *numbers)
        if self._motions and _is_reset(self._motions[-1], motion):
            self.counts["position that jumped"] += 1
            self.interruptions += 1
            self._motions.clear()  # they are places of another frame
        self._motions.append(motion)
        _drop_old(self._motions, t_ns)
        self.values["speed_m_s"] = (t_ns, math.hypot(m.vx, m.vy, m.vz))

    def _take_attitude(self, heard: Heard, t_ns: int) -> None:
        m = heard.message
        if not (math.isfinite(m.yaw) and math.isfinite(m.yawspeed)):
            self.counts["ATTITUDE that is not finite"] += 1
            self._turns.clear()
            self.values.pop("heading_deg", None)
            return
        self._turns.append(Turn(t_ns, m.yaw, m.yawspeed))
        _drop_old(self._turns, t_ns)
        self.values["heading_deg"] = (t_ns, math.degrees(m.yaw) % 360)

    def _take_global_position(self, heard: Heard, t_ns: int) -> None:
        m = heard.message
        if (m.lat, m.lon) == (0, 0) or abs(m.lat) > MAX_DEGREES_E7 // 2 or abs(m.lon) > MAX_DEGREES_E7:
            self.counts["GLOBAL_POSITION_INT without a position"] += 1
            self._globe = None
            return
        self._globe = Globe(t_ns, m.lat / 1e7, m.lon / 1e7, m.relative_alt / 1000)

    def _take_home(self, heard: Heard, _t_ns: int) -> None:
        m = heard.message
        local = (m.x, m.y, m.z)
        is_local = self.autopilot == PX4 and all(map(math.isfinite, local))
        self._home = Home(m.latitude / 1e7, m.longitude / 1e7, local if is_local else None)

    def _take_gps(self, heard: Heard, t_ns: int) -> None:
        fix = heard.message.fix_type
        self.values["gps_fix"] = (t_ns, GPS_FIXES[fix] if fix < len(GPS_FIXES) else f"fix {fix}")

    def _take_system_status(self, heard: Heard, t_ns: int) -> None:
        self._take_percent(heard.message.battery_remaining, t_ns)

    def _take_battery(self, heard: Heard, t_ns: int) -> None:
        if heard.message.id == 0:
            self._take_percent(heard.message.battery_remaining, t_ns)

    def _take_percent(self, percent: int, t_ns: int) -> None:
        if 0 <= percent <= 100:  # -1: not provided
            self.values["battery_percent"] = (t_ns, float(percent))

    def _take_time(self, heard: Heard, now_ns: int) -> None:
        m = heard.message
        if m.tc1 > 0 and m.ts1 == self.asked_time_ns:  # tc1 is 0: the autopilot asks
            self._clock.note_answer(m.tc1, m.ts1, now_ns)

    def _take_ack(self, heard: Heard, _t_ns: int) -> None:
        self.acks.append((heard.message.command, heard.message.result))

    # -- what is asked ------------------------------------------------------------------------------------------------

    @property
    def autopilot(self) -> int | None:
        """PX4, ARDUPILOT or the number of another one; None: no HEARTBEAT."""
        return None if self.heartbeat is None else self.heartbeat.autopilot

    def fresh_heartbeat(self, now_ns: int) -> Heartbeat | None:
        beat = self.heartbeat
        return beat if beat is not None and now_ns - beat.t_ns <= HEARTBEAT_MAX_AGE_NS else None

    def waits_for_setpoints(self, now_ns: int) -> bool:
        """PX4 whose fresh HEARTBEAT says that it is disarmed or not in OFFBOARD, which it enters only while setpoints
        come. To ArduPilot, zero velocity would be the end of a take-off in GUIDED."""
        beat = self.fresh_heartbeat(now_ns)
        if beat is None or beat.autopilot != PX4:
            return False
        return not beat.armed or beat.mode != SETPOINT_MODE[PX4]

    def why_not_engaged(self, now_ns: int) -> str:
        """Why no setpoint but hold may be sent, in a few words; "": the autopilot is armed and takes setpoints."""
        if self._conflict is not None:
            until_ns, what = self._conflict
            if now_ns < until_ns:
                return what
            self._conflict = None
        beat = self.fresh_heartbeat(now_ns)
        if beat is None:
            others = ", ".join(f"{system}/{component}" for system, component in sorted(self.others))
            if self.heartbeat is None:
                found = f"; found {others}" if others else ""
                return f"no HEARTBEAT from system {self.system} component {self.component}{found}"
            return "no HEARTBEAT any more"
        return _why_not_to_follow(beat, self._kind, self._version_1_since_ns, now_ns)

    def place(self, now_ns: int) -> Place | str:
        """Where the vehicle is and how it moves, or why that is not known."""
        if not self._motions or now_ns - self._motions[-1].t_ns > POSITION_MAX_AGE_NS:
            return "LOCAL_POSITION_NED is missing or old"
        if not self._turns or now_ns - self._turns[-1].t_ns > POSITION_MAX_AGE_NS:
            return "ATTITUDE is missing or old"
        where = self.from_home(now_ns)
        if isinstance(where, str):
            return where
        motion, turn = self._motions[-1], self._turns[-1]
        t_ns, north_m, east_m, up_m = where
        speeds = motion.north_m_s, motion.east_m_s, motion.down_m_s
        return Place(min(t_ns, motion.t_ns, turn.t_ns), north_m, east_m, up_m, *speeds, turn.yaw_rad)

    def from_home(self, now_ns: int) -> tuple[int, float, float, float] | str:
        """When, and north, east and up from home in metres; or why that is not known. PX4 says where home is in the
        local frame. ArduPilot does not: there, latitude and longitude are compared."""
        origin = (0.0, 0.0, 0.0) if self._home_kind == "origin" else None
        if origin is None:
            if self._home is None:
                return "HOME_POSITION is missing"
            origin = self._home.local
        if origin is not None:
            if not self._motions:
                return "LOCAL_POSITION_NED is missing or old"
            motion = self._motions[-1]
            return motion.t_ns, motion.north_m - origin[0], motion.east_m - origin[1], origin[2] - motion.down_m
        if self._globe is None or now_ns - self._globe.t_ns > POSITION_MAX_AGE_NS:
            return "GLOBAL_POSITION_INT is missing or old"
        assert self._home is not None
        return self._globe.t_ns, *_from_home(self._globe, self._home), self._globe.above_home_m

    def pose_at(self, t_ns: int) -> Position | None:
        """Position and yaw in the local frame at a time of our clock; None: unknown."""
        motion, turn = _around(self._motions, t_ns), _around(self._turns, t_ns)
        if motion is None or turn is None:
            return None
        (before, after, share), (turn_before, turn_after, turn_share) = motion, turn
        north, east, down = (
            before[i] + share * (after[i] - before[i])
            if after is not before
            else before[i] + before[i + 3] * (t_ns - before.t_ns) / NS_PER_S
            for i in (1, 2, 3)
        )
        if turn_after is turn_before:
            yaw = turn_before.yaw_rad + turn_before.yaw_rate_rad_s * (t_ns - turn_before.t_ns) / NS_PER_S
        else:
            change = math.remainder(turn_after.yaw_rad - turn_before.yaw_rad, math.tau)  # the short way round
            yaw = turn_before.yaw_rad + turn_share * change
        return Position(north, east, down, math.remainder(yaw, math.tau))


_HANDLERS = {
    "HEARTBEAT": Autopilot._take_heartbeat,
    "LOCAL_POSITION_NED": Autopilot._take_local_position,
    "ATTITUDE": Autopilot._take_attitude,
    "GLOBAL_POSITION_INT": Autopilot._take_global_position,
    "HOME_POSITION": Autopilot._take_home,
    "GPS_RAW_INT": Autopilot._take_gps,
    "SYS_STATUS": Autopilot._take_system_status,
    "BATTERY_STATUS": Autopilot._take_battery,
    "COMMAND_ACK": Autopilot._take_ack,
    "TIMESYNC": Autopilot._take_time,
}
# GPS_FIX_TYPE, as words that the vehicle's state may have.
GPS_FIXES = ("no GPS", "no fix", "2D fix", "3D fix", "DGPS", "RTK float", "RTK fixed", "static", "PPP")


def _why_not_to_follow(beat: Heartbeat, kind: str, version_1_since_ns: int | None, now_ns: int) -> str:
    """The same as why_not_engaged, of a HEARTBEAT that is fresh."""
    if beat.autopilot not in NAMES or kind not in ("auto", NAMES[beat.autopilot]):
        expected = "PX4 or ArduPilot" if kind == "auto" else kind
        found = NAMES.get(beat.autopilot, f"autopilot type {beat.autopilot}")
        return f"autopilot: expected {expected}; found {found}"
    if beat.is_version_1:
        if version_1_since_ns is None or now_ns - version_1_since_ns < VERSION_1_GRACE_NS:
            return "the autopilot speaks MAVLink 1 so far"
        parameter = "SERIALn_PROTOCOL=2" if beat.autopilot == ARDUPILOT else "MAV_PROTO_VER=2"
        return f"MAVLink 1: set {parameter}"
    if beat.vehicle_type not in HOVERING_TYPES:
        return f"vehicle type: {beat.vehicle_type} cannot hover"
    if beat.state in LOST_STATES:
        return f"autopilot says {LOST_STATES[beat.state]}"
    if not beat.armed:
        return "disarmed"
    wanted = SETPOINT_MODE[beat.autopilot]
    return "" if beat.mode == wanted else f"mode: {beat.mode}, not {wanted}"


def _from_home(globe: Globe, home: Home) -> tuple[float, float]:
    """North and east of home, in metres."""
    north_m = (globe.latitude_deg - home.latitude_deg) * M_PER_DEGREE
    east_deg = math.remainder(globe.longitude_deg - home.longitude_deg, 360)
    return north_m, east_deg * M_PER_DEGREE * math.cos(math.radians(home.latitude_deg))


def _is_reset(before: Motion, now: Motion) -> bool:
    """The estimator has moved its frame: no vehicle flies so far between two messages, of which some may be lost."""
    speed_m_s = max(math.hypot(*before[4:]), math.hypot(*now[4:]))
    way_s = max(RESET_S, (now.t_ns - before.t_ns) / NS_PER_S)
    return math.dist(before[1:4], now[1:4]) > RESET_M + speed_m_s * way_s


def _drop_old(samples: deque[Any], now_ns: int) -> None:
    while samples and now_ns - samples[0].t_ns > HISTORY_NS:
        samples.popleft()


def _around(samples: deque[Any], t_ns: int) -> tuple[Any, Any, float] | None:
    """The samples before and after a time, and where the time is between them, 0 to 1. Twice the same one: the newest,
    shortly before the time. None: the time is in a gap, or before the first sample."""
    after: Any = None
    for sample in reversed(samples):
        if sample.t_ns <= t_ns:
            if after is None:
                return (sample, sample, 0.0) if t_ns - sample.t_ns <= MAX_AHEAD_NS else None
            span_ns = after.t_ns - sample.t_ns
            return (sample, after, (t_ns - sample.t_ns) / span_ns) if span_ns <= MAX_GAP_NS else None
        after = sample
    return None
