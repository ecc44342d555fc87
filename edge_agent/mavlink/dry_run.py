"""edge-agent mavlink --dry-run: prints what would be sent, and sends nothing.

Without a connection it assumes an armed autopilot that takes setpoints and hovers above home, so that the decisions can
be seen on a desk. With one it only listens. Each line on stdout has the form that edge-agent rehearse reads:

    @123456789 move forward_m_s=0.25 right_m_s=0 down_m_s=0 yaw_rate_rad_s=0
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from edge_agent.mavlink.autopilot import Heard
from edge_agent.mavlink.config import BridgeConfig
from edge_agent.mavlink.dialect import mavlink
from edge_agent.mavlink.link import Link
from edge_agent.mavlink.modes import ARDUPILOT, PX4
from edge_agent.time_units import NS_PER_MS

QUADROTOR, PX4_OFFBOARD, ARDUCOPTER_GUIDED = mavlink.MAV_TYPE_QUADROTOR, 6 << 16, 4
ARMED = mavlink.MAV_MODE_FLAG_SAFETY_ARMED | mavlink.MAV_MODE_FLAG_CUSTOM_MODE_ENABLED


class Dry:
    """In place of a Link. What is sent to it goes nowhere; the Bridge prints it."""

    def __init__(self, link: Link | None, config: BridgeConfig, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """link: only read from; None: the assumed autopilot."""
        self._link, self._config, self._clock = link, config, clock
        self._start_ns = clock()
        self.counts: Counter[str] = Counter() if link is None else link.counts
        self.fixed_peer = None if link is None else link.fixed_peer

    @property
    def is_open(self) -> bool:
        return self._link is None or self._link.is_open

    @property
    def is_behind(self) -> bool:
        return self._link is not None and self._link.is_behind

    @property
    def why_lost(self) -> str:
        return "" if self._link is None else self._link.why_lost

    def descriptors(self) -> tuple[int, ...]:
        return () if self._link is None else self._link.descriptors()

    def open_if_due(self) -> bool:
        return self._link is not None and self._link.open_if_due()

    def receive(self) -> list[Heard]:
        return self._assumed() if self._link is None else self._link.receive()

    def send(
        self, message: Any, _peer: tuple[str, int] | None, _can_wait: bool = False, _until_ns: int | None = None
    ) -> bool:
        return _until_ns is None or time.monotonic_ns() < _until_ns

    def reopen(self, why: str) -> None:
        if self._link is not None:
            self._link.reopen(why)

    def close(self) -> None:
        if self._link is not None:
            self._link.close()

    def _assumed(self) -> list[Heard]:
        fence, is_ardupilot = self._config.fence, self._config.autopilot == "ardupilot"
        boot_ms = 1000 + (self._clock() - self._start_ns) // NS_PER_MS
        up_m = (fence.min_altitude_m + fence.max_altitude_m) / 2
        autopilot, mode = (ARDUPILOT, ARDUCOPTER_GUIDED) if is_ardupilot else (PX4, PX4_OFFBOARD)
        messages = (
            mavlink.MAVLink_heartbeat_message(QUADROTOR, autopilot, ARMED, mode, mavlink.MAV_STATE_ACTIVE, 3),
            mavlink.MAVLink_home_position_message(0, 0, 0, 0, 0, 0, [1, 0, 0, 0], 0, 0, 0),
            mavlink.MAVLink_local_position_ned_message(boot_ms, 0, 0, -up_m, 0, 0, 0),
            mavlink.MAVLink_global_position_int_message(boot_ms, 1, 1, 0, round(1000 * up_m), 0, 0, 0, 0),
            mavlink.MAVLink_attitude_message(boot_ms, 0, 0, 0, 0, 0, 0),
        )
        return [Heard(message, self._config.target_system, self._config.target_component) for message in messages]
