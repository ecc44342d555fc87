"""A small simulated autopilot: PX4 or ArduCopter, as a companion computer meets them over MAVLink.

It is a state machine over decoded messages: no socket, no thread, no clock of its own. It decides what the real ones
decide, by their rules: which setpoints count, when a mode is entered and left, what a command is answered. flavours.py
has the modes and the time-outs with their sources. It does not simulate sensors, estimators, parameters, missions, or
a pilot's sticks; in every mode that is not listed below it keeps its position.

    autopilot = Autopilot(PX4, PointMass(height_m=5), time.monotonic_ns)
    autopilot.arm(), autopilot.set_mode("OFFBOARD")                  # by the test, as a pilot
    replies = autopilot.receive(message)                             # a message of pymavlink
    autopilot.step()                                                 # time-outs, flight
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from edge_agent.mavlink.dialect import mavlink
from models.autopilot.bodies import ORIGIN_ALT_M, Body, Vector
from models.autopilot.flavours import TELEMETRY, Flavour

NS_PER_S = 1_000_000_000
STILL: Vector = (0.0, 0.0, 0.0)
# POSITION_TARGET_TYPEMASK
IGNORE_POSITION, IGNORE_VELOCITY, IGNORE_ACCELERATION = 0x007, 0x038, 0x1C0
FORCE, IGNORE_YAW, IGNORE_YAW_RATE = 0x200, 0x400, 0x800
LANDING_M_S = 0.7  # MPC_LAND_SPEED of PX4; LAND_SPEED of ArduCopter is 0.5
TAKE_OFF_M_S, TAKE_OFF_M = 1.5, 2.5  # the height if none is given
CRUISE_M_S = 5.0  # to a position, until MAV_CMD_DO_CHANGE_SPEED
HOLD_M_S = 1.0  # back to the position to keep
MAX_SANE_M_S = 1_000.0  # ArduCopter's sane_vel_or_acc_vector
TICK_S = 0.02  # of the position controller
MAX_STEP_S = 0.5  # of simulated flight at once, after a pause of this process
# What is done with a setpoint that arrives
FOLLOWED, HEARD, REFUSED = (
    "followed",
    "heard",
    "refused",
)  # heard: it counts for the stream, the vehicle does not follow


class Target(NamedTuple):
    """What the vehicle follows in the external mode, north, east, down. One of the two is None."""

    velocity_m_s: Vector | None = STILL
    position_m: Vector | None = None
    yaw_rate_rad_s: float = 0.0
    yaw_rad: float | None = None


class Autopilot:
    """loss_mode: the mode after the loss of setpoints, "" for that of the flavour."""

    def __init__(
        self,
        flavour: Flavour,
        body: Body,
        clock: Callable[[], int],
        *,
        system: int = 1,
        component: int = 1,
        loss_mode: str = "",
    ) -> None:
        self.flavour, self.body, self.system, self.component = flavour, body, system, component
        self.loss_mode = loss_mode or flavour.loss_mode
        self.battery_percent = 87.0
        self.gps_fix = mavlink.GPS_FIX_TYPE_3D_FIX
        self.real_time = True  # False: the vehicle flies only in fly()
        self.clock_rate = 1.0  # of its time since boot; a simulation on a busy machine has less
        self.texts: list[Any] = []  # STATUSTEXT messages to broadcast; the link takes them
        self._clock = clock
        self._boot(clock())

    def _boot(self, now_ns: int) -> None:
        self._boot_ns = self._stepped_ns = now_ns
        self.mode, self.is_armed = self.flavour.first_mode, False
        self.target = Target()
        self.home_m: Vector = self.body.position_m if self.body.is_landed else (0.0, 0.0, 0.0)
        self.speed_m_s = CRUISE_M_S
        self.losses = 0  # how often setpoints were lost in the external mode
        self._arrivals_ns: deque[int] = deque()  # of setpoints that count, in the last stream_s
        self._stream_since_ns = self._newest_ns = 0  # 0: none
        self._kept_m: Vector | None = None  # the position that it keeps
        self._take_off_m: float | None = None
        self._landed_ns: int | None = None

    # -- the pilot -----------------------------------------------------------------------------------------------------

    def arm(self) -> bool:
        """Arm, as a pilot. False: refused."""
        if self.mode == self.flavour.external_mode and not self.accepts_external_mode():
            return False
        self.is_armed = True
        return True

    def disarm(self) -> None:
        self.is_armed = False

    def set_mode(self, mode: str) -> bool:
        """Change the mode, as a pilot. False: refused."""
        if mode == self.flavour.external_mode and not self.accepts_external_mode():
            self._say(mavlink.MAV_SEVERITY_CRITICAL, f"{mode} refused: no setpoints")
            return False
        self._enter(mode)
        return True

    def _enter(self, mode: str) -> None:
        self.mode, self.target, self._kept_m, self._landed_ns = mode, Target(), None, None
        self._take_off_m = None

    def restart(self) -> None:
        """Power off and on: the time since boot begins at 0, disarmed, in the first mode."""
        self._boot(self._clock())

    def jump_clock(self, seconds: float) -> None:
        """Move the time since boot, without a restart."""
        self._boot_ns -= round(seconds * NS_PER_S)

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def boot_ns(self) -> int:
        """Its time since boot."""
        return self._clock() - self._boot_ns

    @property
    def time_boot_ms(self) -> int:
        return self.boot_ns // 1_000_000 & 0xFFFF_FFFF

    @property
    def is_landing(self) -> bool:
        return self.mode == self.flavour.land_mode

    @property
    def yaw_rate(self) -> float:
        return self.target.yaw_rate_rad_s if self._is_external else 0.0

    @property
    def _is_external(self) -> bool:
        return self.mode == self.flavour.external_mode

    def accepts_external_mode(self) -> bool:
        """PX4: setpoints come for longer than stream_s, at stream_hz or more, and the newest is not older than the
        time-out. ArduCopter: always."""
        if not self.flavour.stream_s:
            return True
        now_ns, window_ns = self._clock(), round(self.flavour.stream_s * NS_PER_S)
        recent = sum(arrival_ns > now_ns - window_ns for arrival_ns in self._arrivals_ns)
        is_long_enough = bool(self._stream_since_ns) and now_ns - self._stream_since_ns > window_ns
        return is_long_enough and not self._is_lost(now_ns) and recent >= self.flavour.stream_hz * self.flavour.stream_s

    def _is_lost(self, now_ns: int) -> bool:
        return now_ns - self._newest_ns >= self.flavour.loss_s * NS_PER_S

    # -- messages ------------------------------------------------------------------------------------------------------

    def is_for_me(self, message: Any) -> bool:
        """Whether both targets are this autopilot, or everybody (0)."""
        system, component = getattr(message, "target_system", 0), getattr(message, "target_component", 0)
        return system in (0, self.system) and component in (0, self.component)

    def receive(self, message: Any) -> tuple[str, list[Any]]:
        """Takes a decoded message. Returns what was done with a setpoint ("" for other messages), and the replies."""
        kind = message.get_type()
        if not self.is_for_me(message):
            return (REFUSED if kind == "SET_POSITION_TARGET_LOCAL_NED" else "", [])
        if kind == "SET_POSITION_TARGET_LOCAL_NED":
            return (self._px4_setpoint if self.flavour.stream_s else self._copter_setpoint)(message), []
        if kind in ("COMMAND_LONG", "COMMAND_INT"):
            return "", self._command(message)
        if kind == "SET_MODE":
            self._set_custom_mode(message.custom_mode)
        if kind == "TIMESYNC" and not message.tc1:
            return "", [mavlink.MAVLink_timesync_message(self.boot_ns, message.ts1)]
        return "", []

    def _say(self, severity: int, text: str) -> None:
        self.texts.append(mavlink.MAVLink_statustext_message(severity, text.encode()[:50]))

    def _to_ned(self, forward: float, right: float, down: float) -> Vector:
        """Body axes -> NED with the yaw of now, and not turned any more when the vehicle turns: as both do."""
        yaw = self.body.attitude_rad[2]
        return (
            forward * math.cos(yaw) - right * math.sin(yaw),
            forward * math.sin(yaw) + right * math.cos(yaw),
            down,
        )

    def _px4_setpoint(self, message: Any) -> str:
        """As mavlink_receiver.cpp, handle_message_set_position_target_local_ned, of PX4."""
        mask, frame = message.type_mask, message.coordinate_frame
        velocity: Vector | None = (message.vx, message.vy, message.vz)
        position: Vector | None = (message.x, message.y, message.z)
        if frame == mavlink.MAV_FRAME_BODY_NED:
            velocity = None if mask & IGNORE_VELOCITY else self._to_ned(message.vx, message.vy, message.vz)
            position = None
        elif frame == mavlink.MAV_FRAME_LOCAL_NED:
            velocity = None if mask & IGNORE_VELOCITY == IGNORE_VELOCITY else velocity
            position = None if mask & IGNORE_POSITION == IGNORE_POSITION else position
        else:
            self._say(mavlink.MAV_SEVERITY_CRITICAL, f"SET_POSITION_TARGET_LOCAL_NED frame {frame} unsupported")
            return REFUSED
        has_acceleration = not mask & IGNORE_ACCELERATION
        if has_acceleration and mask & FORCE:
            return REFUSED
        if not has_acceleration and not _is_finite(velocity) and not _is_finite(position):
            self._say(mavlink.MAV_SEVERITY_CRITICAL, "SET_POSITION_TARGET_LOCAL_NED invalid")
            return REFUSED
        self._count_setpoint()
        if not self._is_external:
            return HEARD
        self._follow(velocity if _is_finite(velocity) else None, position if _is_finite(position) else None, message)
        return FOLLOWED

    def _copter_setpoint(self, message: Any) -> str:
        """As GCS_MAVLink_Copter.cpp, handle_message_set_position_target_local_ned, of ArduCopter."""
        if not self._is_external:
            return REFUSED
        mask, frame = message.type_mask, message.coordinate_frame
        is_body = frame in (mavlink.MAV_FRAME_BODY_NED, mavlink.MAV_FRAME_BODY_OFFSET_NED)
        is_known = is_body or frame in (mavlink.MAV_FRAME_LOCAL_NED, mavlink.MAV_FRAME_LOCAL_OFFSET_NED)
        velocity: Vector | None = None if mask & IGNORE_VELOCITY else (message.vx, message.vy, message.vz)
        position: Vector | None = None if mask & IGNORE_POSITION else (message.x, message.y, message.z)
        is_sane = velocity is None or (_is_finite(velocity) and max(map(abs, velocity)) <= MAX_SANE_M_S)
        has_acceleration = not mask & IGNORE_ACCELERATION
        nothing = velocity is None and (position is None or has_acceleration)
        if not is_known or not is_sane or (has_acceleration and mask & FORCE) or nothing:
            self.target = Target()  # "input is not valid so stop"
            return REFUSED
        if is_body and velocity is not None:
            velocity = self._to_ned(*velocity)
        if position is not None and frame != mavlink.MAV_FRAME_LOCAL_NED:
            offset = self._to_ned(*position) if is_body else position
            position = _add(self.body.position_m, offset)
        self._count_setpoint()
        self._follow(velocity, position, message)
        return FOLLOWED

    def _count_setpoint(self) -> None:
        now_ns = self._clock()
        if not self._stream_since_ns or self._is_lost(now_ns):
            self._stream_since_ns = now_ns
            self._arrivals_ns.clear()
        self._newest_ns = now_ns
        self._arrivals_ns.append(now_ns)
        while self._arrivals_ns[0] < now_ns - max(1.0, self.flavour.stream_s) * NS_PER_S:
            self._arrivals_ns.popleft()

    def _follow(self, velocity_m_s: Vector | None, position_m: Vector | None, message: Any) -> None:
        yaw_rate = 0.0 if message.type_mask & IGNORE_YAW_RATE or math.isnan(message.yaw_rate) else message.yaw_rate
        yaw = None if message.type_mask & IGNORE_YAW or math.isnan(message.yaw) else message.yaw
        if position_m is not None:
            velocity_m_s = None
        if velocity_m_s != STILL:
            self._kept_m = None
        self._take_off_m = None  # in GUIDED, any setpoint ends a take-off
        self.target = Target(velocity_m_s, position_m, yaw_rate, yaw)

    # -- commands ------------------------------------------------------------------------------------------------------

    def _command(self, message: Any) -> list[Any]:
        commands: dict[int, Callable[[Any], int]] = {
            mavlink.MAV_CMD_COMPONENT_ARM_DISARM: self._arm_or_disarm,
            mavlink.MAV_CMD_DO_SET_MODE: self._do_set_mode,
            mavlink.MAV_CMD_NAV_LAND: lambda _: self._land(),
            mavlink.MAV_CMD_NAV_TAKEOFF: self._take_off,
            mavlink.MAV_CMD_DO_CHANGE_SPEED: self._change_speed,
            # The link has the rates and sends the message; here they are only answered.
            mavlink.MAV_CMD_SET_MESSAGE_INTERVAL: _if_known,
            mavlink.MAV_CMD_REQUEST_MESSAGE: _if_known,
        }
        handle = commands.get(message.command, lambda _: mavlink.MAV_RESULT_UNSUPPORTED)
        ack = mavlink.MAVLink_command_ack_message(
            message.command, handle(message), 0, 0, message.get_srcSystem(), message.get_srcComponent()
        )
        return [ack]

    def _arm_or_disarm(self, message: Any) -> int:
        if message.param1 == 1:
            return mavlink.MAV_RESULT_ACCEPTED if self.arm() else mavlink.MAV_RESULT_TEMPORARILY_REJECTED
        self.disarm()
        return mavlink.MAV_RESULT_ACCEPTED

    def _do_set_mode(self, message: Any) -> int:
        custom_mode = int(message.param2)
        if self.flavour.stream_s:  # PX4 has the main mode and the sub mode in two parameters
            custom_mode = custom_mode << 16 | int(message.param3) << 24
        return self._set_custom_mode(custom_mode)

    def _set_custom_mode(self, custom_mode: int) -> int:
        names = {mode.custom_mode: name for name, mode in self.flavour.modes.items()}
        is_entered = custom_mode in names and self.set_mode(names[custom_mode])
        return mavlink.MAV_RESULT_ACCEPTED if is_entered else self.flavour.refused_mode

    def _land(self) -> int:
        self._enter(self.flavour.land_mode)
        return mavlink.MAV_RESULT_ACCEPTED

    def _take_off(self, message: Any) -> int:
        if not self.is_armed:
            return mavlink.MAV_RESULT_FAILED
        if "AUTO.TAKEOFF" in self.flavour.modes:
            self._enter("AUTO.TAKEOFF")
        elif not self._is_external:
            return mavlink.MAV_RESULT_FAILED
        height_m = message.param7 - ORIGIN_ALT_M if self.flavour.stream_s else message.param7  # PX4: above sea level
        self._take_off_m = -height_m if height_m > 0 else self.home_m[2] - TAKE_OFF_M
        return mavlink.MAV_RESULT_ACCEPTED

    def _change_speed(self, message: Any) -> int:
        if message.param2 > 0:
            self.speed_m_s = message.param2
        return mavlink.MAV_RESULT_ACCEPTED

    # -- time ----------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Call it often: time-outs, and in real time the flight since the last call."""
        now_ns = self._clock()
        seconds = min(MAX_STEP_S, (now_ns - self._stepped_ns) / NS_PER_S)
        self._boot_ns += round((now_ns - self._stepped_ns) * (1 - self.clock_rate))
        self._stepped_ns = now_ns
        has_more_to_lose = self.loss_mode != self.mode or self.target != Target()
        if self._is_external and self.is_armed and has_more_to_lose and self._is_lost(now_ns):
            self._lose_setpoints()
        if self.real_time:
            self.fly(seconds)
        if self.is_landing and self.is_armed and self.body.is_landed:
            self._landed_ns = self._landed_ns or now_ns
            if now_ns - self._landed_ns >= self.flavour.disarm_s * NS_PER_S:
                self.disarm()

    def _lose_setpoints(self) -> None:
        self._stream_since_ns = 0
        if self.loss_mode == self.mode and self.target.position_m is not None:
            self.target = self.target._replace(yaw_rate_rad_s=0.0)  # ArduCopter flies on to a position
            return
        self.losses += 1
        if self.loss_mode == self.mode:
            self.target, self._kept_m = Target(), None  # ArduCopter: the velocity becomes zero
        else:
            self._say(mavlink.MAV_SEVERITY_CRITICAL, "Failsafe: no offboard control")
            self._enter(self.loss_mode)

    def fly(self, seconds: float) -> None:
        """Fly for some time with the target of now. A disarmed vehicle stays where it is."""
        while seconds > 0 and self.is_armed:
            tick_s = min(seconds, TICK_S)
            self.body.fly(self._velocity_m_s(), self.yaw_rate, tick_s)
            seconds -= tick_s

    def _velocity_m_s(self) -> Vector:
        """What the vehicle is to fly now, north, east, down."""
        if self._take_off_m is not None:
            if self.body.position_m[2] <= self._take_off_m + 0.1:
                self._take_off_m = None
                if self.mode == "AUTO.TAKEOFF":
                    self._enter("AUTO.LOITER")
            return (0.0, 0.0, -TAKE_OFF_M_S if self._take_off_m is not None else 0.0)
        if self.is_landing:
            north, east, _ = self._keep()
            return (north, east, LANDING_M_S)
        if not self._is_external:
            return self._keep()
        if self.target.position_m is not None:
            return _toward(self.body.position_m, self.target.position_m, self.speed_m_s)
        velocity = self.target.velocity_m_s or STILL
        if velocity[:2] == (
            0.0,
            0.0,
        ):  # both keep the place then: ArduCopter's GUIDED has a position, PX4 an integrator
            north, east, down = self._keep()
            return (north, east, velocity[2] or down)
        self._kept_m = None
        return velocity

    def _keep(self) -> Vector:
        """The velocity back to the place where the vehicle was told to stay. A place on the ground is kept as it is."""
        if self._kept_m is None or (self._is_external and (self.target.velocity_m_s or STILL)[2]):
            place = self._kept_m or self.body.position_m
            self._kept_m = (place[0], place[1], self.body.position_m[2])
        return _toward(self.body.position_m, self._kept_m, HOLD_M_S)


def _is_finite(vector: Vector | None) -> bool:
    return vector is not None and all(map(math.isfinite, vector))


def _add(a: Vector, b: Vector) -> Vector:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2])


def _toward(here_m: Vector, there_m: Vector, speed_m_s: float) -> Vector:
    """A velocity that is slower within the last metre."""
    away = [there - here for here, there in zip(here_m, there_m, strict=True)]
    scale = speed_m_s / max(1.0, math.hypot(*away))
    return (away[0] * scale, away[1] * scale, away[2] * scale)


def _if_known(message: Any) -> int:
    return mavlink.MAV_RESULT_ACCEPTED if int(message.param1) in TELEMETRY else mavlink.MAV_RESULT_UNSUPPORTED
