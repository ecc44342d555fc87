"""The bridge's core with a clock of the test: an autopilot that says what a test likes, and a list of what was sent."""

from __future__ import annotations

from typing import Any, NamedTuple

from edge_agent.client import is_valid
from edge_agent.mavlink.autopilot import Autopilot, Heard
from edge_agent.mavlink.config import BridgeConfig
from edge_agent.mavlink.dialect import mavlink
from edge_agent.mavlink.follower import Follower
from edge_agent.mavlink.modes import ARDUPILOT, PX4
from edge_agent.mavlink.setpoint import Setpoint
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.messages import Action
from tests.harness.clock import FakeClock
from tests.harness.fake_daemon import make_action

ARMED = mavlink.MAV_MODE_FLAG_SAFETY_ARMED | mavlink.MAV_MODE_FLAG_CUSTOM_MODE_ENABLED
DISARMED = mavlink.MAV_MODE_FLAG_CUSTOM_MODE_ENABLED
OFFBOARD, POSCTL, GUIDED, LOITER = 6 << 16, 3 << 16, 4, 5
STILL = {"forward_m_s": 0.0, "right_m_s": 0.0, "down_m_s": 0.0, "yaw_rate_rad_s": 0.0}


class Sent(NamedTuple):
    t_ns: int  # of the clock when it was handed over
    setpoint: Setpoint


class Outbox:
    """Where the follower's decisions go."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.sent: list[Sent] = []
        self.lands: list[int] = []
        self.words: list[tuple[str, str]] = []
        self.takes = True  # whether the link takes packets

    def send(self, setpoint: Setpoint, now_ns: int, until_ns: int | None = None) -> bool:
        if self.takes:
            self.sent.append(Sent(self._clock.now_ns, setpoint))
        return self.takes

    def land(self, now_ns: int, until_ns: int) -> bool:
        if self.takes:
            self.lands.append(self._clock.now_ns)
        return self.takes

    def say(self, topic: str, text: str) -> None:
        self.words.append((topic, text))


class Rig:
    """A follower above an autopilot that is armed, takes setpoints and hovers 10 m above home."""

    def __init__(self, config: BridgeConfig | None = None, kind: int = PX4) -> None:
        self.clock = FakeClock()
        self.boot_ns = self.clock.now_ns - 100 * NS_PER_S
        self.kind, self.seq, self.resumed_ns = kind, 0, 0
        self.autopilot = Autopilot()
        self.outbox = Outbox(self.clock)
        self.follower = Follower(
            config or BridgeConfig(),
            self.autopilot,
            self.is_valid,
            self.outbox,
            self.clock,
        )
        self.fly()

    def is_valid(self, action: Action) -> bool:
        """As Client.is_valid."""
        return action.t_pub_ns > self.resumed_ns and is_valid(action, self.clock())

    # -- the autopilot ------------------------------------------------------------------------------------------------

    def hear(self, message: Any, **header: Any) -> None:
        self.autopilot.take(Heard(message, **({"system": 1, "component": 1} | header)), self.clock.now_ns)

    def fly(self, **place: float) -> None:
        self.heartbeat()
        self.home()
        self.move_to(**place)

    def heartbeat(self, base_mode: int = ARMED, mode: int | None = None, **header: Any) -> None:
        self.hear(heartbeat(base_mode, mode, self.kind), **header)

    def home(self) -> None:
        local = (0, 0, 0) if self.kind == ARDUPILOT else (0.0, 0.0, 0.0)
        self.hear(mavlink.MAVLink_home_position_message(0, 0, 0, *local, [1, 0, 0, 0], 0, 0, 0))

    def hear_nan_position(self) -> None:
        nan = float("nan")
        self.hear(mavlink.MAVLink_local_position_ned_message(self.boot_ms() + 1, nan, 0, 0, 0, 0, 0))

    def boot_ms(self) -> int:
        return (self.clock.now_ns - self.boot_ns) // NS_PER_MS

    def move_to(
        self, north: float = 0, east: float = 0, up: float = 10, velocity: tuple[float, ...] = (0, 0, 0), yaw: float = 0
    ) -> None:
        boot_ms = self.boot_ms()
        self.hear(mavlink.MAVLink_local_position_ned_message(boot_ms, north, east, -up, *velocity))
        self.hear(mavlink.MAVLink_attitude_message(boot_ms, 0, 0, yaw, 0, 0, 0))
        e7 = 1e7 / (6_371_000 * 3.141592653589793 / 180)
        self.hear(
            mavlink.MAVLink_global_position_int_message(
                boot_ms, round(north * e7) or 1, round(east * e7), 0, round(up * 1000), 0, 0, 0, 0
            )
        )

    # -- the daemon ---------------------------------------------------------------------------------------------------

    def action(self, type: str = "move", values: dict[str, Any] | None = None, **changes: Any) -> Action:
        """A valid action that is published now."""
        self.seq += 1
        values = STILL | values if values is not None and type == "move" else values or {}
        return make_action(self.seq, now_ns=self.clock.now_ns, type=type, values=values, **changes)

    def take(self, type: str = "move", values: dict[str, Any] | None = None, **changes: Any) -> Action:
        action = self.action(type, values, **changes)
        self.follower.take(action)
        return action

    # -- time ---------------------------------------------------------------------------------------------------------

    def pass_time(self, seconds: float, telemetry: bool = True, step_s: float = 0.01) -> None:
        """Turns of the loop; with telemetry that stays as it was at 10 m."""
        end_ns = self.clock.now_ns + round(seconds * NS_PER_S)
        n = 0
        while self.clock.now_ns < end_ns:
            self.clock.now_ns = min(end_ns, self.clock.now_ns + round(step_s * NS_PER_S))
            n += 1
            if telemetry and n % 5 == 0:
                self.heartbeat()
                self.move_to()
            self.follower.turn()

    @property
    def sent(self) -> list[str]:
        return [sent.setpoint.type for sent in self.outbox.sent]


def heartbeat(base_mode: int = ARMED, mode: int | None = None, kind: int = PX4, vehicle: int = 2) -> Any:
    """mode: custom_mode; None: the one that takes setpoints."""
    if mode is None:
        mode = OFFBOARD if kind == PX4 else GUIDED
    return mavlink.MAVLink_heartbeat_message(vehicle, kind, base_mode, mode, mavlink.MAV_STATE_ACTIVE, 3)
