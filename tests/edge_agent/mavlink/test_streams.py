"""Random streams: actions, refusals, sessions, modes, telemetry, stalls, losses. What may never be sent never is.

The oracle knows only what was put in: the newest words of the autopilot, and every action with its times.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.mavlink.config import BridgeConfig, Fence, Limits
from edge_agent.mavlink.modes import PX4
from edge_agent.mavlink.setpoint import Position, Setpoint, Velocity, to_local
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.messages import Action
from tests.harness.fake_daemon import make_refusal
from tests.harness.mavlink_rig import ARMED, DISARMED, OFFBOARD, POSCTL, Rig, heartbeat

CONFIG = BridgeConfig(
    land=True, search_m_s=0.5, limits=Limits(acceleration_m_s2=20), fence=Fence(min_altitude_m=2, radius_m=30)
)
N_YAW = 700  # an action is known by its yaw rate in thousandths, which no limit changes
SPEEDS = (0.0, 0.5, -1.0, 2.0, -4.0, math.nan, math.inf, 1e30)
PAUSES_MS = (0, 1, 5, 20, 60, 150, 499, 500, 900, 2100, 6000)
TYPES = ("move",) * 8 + ("hold", "land", "land", "land", "search", "waypoint", "waypoint", "dance")
BEATS = (
    *((ARMED, OFFBOARD, PX4, 2),) * 12,
    (DISARMED, OFFBOARD, PX4, 2), (ARMED, POSCTL, PX4, 2), (ARMED, OFFBOARD, PX4, 1), (ARMED, OFFBOARD, 0, 2),
    (ARMED, 4, 3, 2), (1, 0, PX4, 2),
)  # fmt: skip
PLACES = (
    *((0.0, 0.0, 10.0),) * 8,
    (29.0, 0.0, 10.0),
    (31.0, 0.0, 10.0),
    (0.0, 0.0, 29.8),
    (0.0, -5.0, 1.9),
    (1.0, 1.0, 2.3),
)
KINDS = (
    "action", "action", "action", "action", "action", "action", "fly", "fly", "fly", "wait", "wait", "turn", "turn",
    "beat", "place", "stall", "refusal", "old action", "session", "nan", "link", "reboot", "suspend", "other sender",
    "chunk", "jump",
)  # fmt: skip
EVENTS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2**24)), min_size=5, max_size=80)


class Oracle(Rig):
    """The rig, and what is true in it."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        self.actions: dict[int, Action] = {}  # yaw rate in thousandths -> the newest action with it
        self.sent_steps: set[tuple[int, int]] = set()
        self.n_actions = 0
        self.session, self.instruction = 1, "Hold position."
        self.last_valid_ns: int | None = None
        self.suspended_ns = self.conflict_ns = -(10**18)
        self.beat: tuple[int, tuple[int, int, int, int]] | None = (self.clock.now_ns, BEATS[0])
        self.place: tuple[int, tuple[float, float, float], tuple[float, float, float]] | None = None
        self.yaw: tuple[int, float] | None = (self.clock.now_ns, 0.0)
        self.has_home = True
        self.place = (self.clock.now_ns, (0, 0, 10), (0, 0, 0))
        self.outbox.send = self.check_and_send  # type: ignore[method-assign]
        self.outbox.land = self.check_and_land  # type: ignore[method-assign]
        self.newest: Action | None = None

    # -- events -------------------------------------------------------------------------------------------------------

    def happen(self, kind: str, n: int) -> None:
        getattr(self, f"on_{kind.replace(' ', '_')}")(n)

    def on_action(self, n: int, delay_ms: int = 0, **changes: Any) -> None:
        self.n_actions += 1
        mark = self.n_actions % N_YAW + 1
        type = TYPES[n % len(TYPES)]
        speeds = [SPEEDS[n // 16**i % (5 if n % 3 else 8)] for i in range(3)]
        values: dict[str, Any] = {}
        if type == "waypoint":
            values = dict(zip(("forward_m", "right_m", "down_m"), (n % 41 - 20, n % 7, n % 11 - 5), strict=True))
        elif type == "move":
            names = ("forward_m_s", "right_m_s", "down_m_s")
            values = dict(zip(names, speeds, strict=True)) | {"yaw_rate_rad_s": mark / 1000}
            if n % 29 == 0:
                del values[names[n % 3]]
        valid_ms = (500, 900, 60, 1)[n % 4]
        action = self.action(
            type, values, valid_ms=valid_ms, session=self.session, instruction=self.instruction, **changes
        )
        if type == "move" and "down_m_s" not in values:
            action = action.__class__(**{f: getattr(action, f) for f in action.__struct_fields__} | {"values": values})
        self.actions[mark] = self.newest = action
        self.sent_steps = {step for step in self.sent_steps if step[0] != mark}
        self.clock.now_ns += delay_ms * NS_PER_MS
        if self.clock.now_ns < action.valid_until_ns and action.t_pub_ns > self.suspended_ns:
            self.last_valid_ns = self.clock.now_ns
        self.follower.take(action)

    def on_chunk(self, n: int) -> None:
        mark = (self.n_actions + 1) % N_YAW + 1
        steps = [{"forward_m_s": 0.1, "right_m_s": 0, "down_m_s": 0, "yaw_rate_rad_s": mark / 1000}] * (n % 5)
        self.on_action(0, chunk=steps, chunk_step_ms=100)

    def on_old_action(self, n: int) -> None:
        self.on_action(n, delay_ms=PAUSES_MS[n % len(PAUSES_MS)])

    def on_refusal(self, n: int) -> None:
        self.follower.take(make_refusal(n))

    def on_session(self, n: int) -> None:
        self.session += 1
        self.instruction = ("Hold position.", "Hold position.", "Land.")[n % 3]

    def on_wait(self, n: int) -> None:
        for _ in range(PAUSES_MS[n % len(PAUSES_MS)] // 20 + 1):
            self.clock.now_ns += 20 * NS_PER_MS
            self.follower.turn()

    def on_stall(self, n: int) -> None:
        self.clock.now_ns += PAUSES_MS[n % len(PAUSES_MS)] * NS_PER_MS

    def on_turn(self, n: int) -> None:
        self.follower.turn()

    def on_fly(self, n: int) -> None:
        """All is well."""
        self.clock.now_ns += 20 * NS_PER_MS
        self.on_beat(0)
        if not self.has_home:
            self.home()
            self.has_home = True
        self.on_place(0)

    def on_beat(self, n: int) -> None:
        beat = BEATS[n % len(BEATS)]
        self.hear(heartbeat(beat[0], beat[1], beat[2], beat[3]))
        self.beat = (self.clock.now_ns, beat)
        if beat[2:] != (PX4, 2):
            self.conflict_ns = self.clock.now_ns

    def on_place(self, n: int) -> None:
        self.clock.now_ns += 2 * NS_PER_MS  # a new time since boot
        place = PLACES[n % len(PLACES)]
        velocity = ((0, 0, 0), (0.0, 1.0, 0.0), (3.0, 0.0, -2.0))[n // 100 % 3 if n else 0]
        yaw = n % 7 - 3.0
        self.move_to(*place, velocity=velocity, yaw=yaw)
        self.place = (self.clock.now_ns, place, velocity)
        self.yaw = (self.clock.now_ns, yaw)

    def on_nan(self, n: int) -> None:
        self.clock.now_ns += 2 * NS_PER_MS
        self.hear_nan_position()
        self.place = None

    def on_link(self, n: int) -> None:
        self.outbox.takes = not self.outbox.takes
        if n % 2:
            self.autopilot.forget()
            self._forget()

    def on_reboot(self, n: int) -> None:
        if self.boot_ms() < 1500 or self.place is None:  # or nobody could know
            return
        self.boot_ns = self.clock.now_ns - NS_PER_S
        self.move_to()
        self._forget()
        self.place, self.yaw = (self.clock.now_ns, (0, 0, 10), (0, 0, 0)), (self.clock.now_ns, 0.0)

    on_jump = on_reboot

    def on_suspend(self, n: int) -> None:
        self.suspended_ns = self.resumed_ns = self.clock.now_ns
        self.autopilot.forget()
        self.follower.forget("the machine was suspended")
        self._forget()
        self.last_valid_ns = None

    def on_other_sender(self, n: int) -> None:
        self.hear(heartbeat(), system=2)
        self.hear(heartbeat(ARMED, OFFBOARD, 8, 18), component=191)

    def _forget(self) -> None:
        self.beat = self.place = self.yaw = None
        self.has_home = False

    # -- what may be sent ---------------------------------------------------------------------------------------------

    def check_and_send(self, setpoint: Setpoint, now_ns: int, until_ns: int | None = None) -> bool:
        now_ns = self.clock.now_ns
        assert (until_ns is None) == (setpoint.type == "hold")
        assert all(map(math.isfinite, setpoint.target))
        if setpoint.type == "hold":
            assert setpoint.target == Velocity()
            assert self.last_valid_ns is not None and now_ns - self.last_valid_ns < CONFIG.hold_s * NS_PER_S
        else:
            self.check_followed(setpoint, now_ns)
        return self.outbox.takes

    def check_followed(self, setpoint: Setpoint, now_ns: int) -> None:
        self.check_engaged(now_ns)
        action = self.newest
        assert action is not None
        if setpoint.type == "move":
            mark = round(setpoint.target[3] * 1000)
            action = self.actions[mark]
            step = min((now_ns - action.t_pub_ns) // (100 * NS_PER_MS), len(action.chunk)) if action.chunk else 0
            assert (mark, step) not in self.sent_steps, "twice"
            self.sent_steps.add((mark, step))
        assert action is self.newest and action.type == setpoint.type
        assert action.t_pub_ns <= now_ns < action.valid_until_ns
        assert action.t_pub_ns > self.suspended_ns
        assert self.place is not None and self.yaw is not None
        _, (north, east, up), _ = self.place
        if isinstance(setpoint.target, Position):
            target = setpoint.target
            ahead = (target.north_m, target.east_m, -target.down_m)
        else:
            forward, right, down, yaw_rate = setpoint.target
            assert math.hypot(forward, right) <= 2.0 * (1 + 1e-9) and -1.0 <= down <= 1.0 and abs(yaw_rate) <= 0.8
            rest_s = (action.valid_until_ns - now_ns) / NS_PER_S
            north_m_s, east_m_s = to_local(self.yaw[1], forward, right)
            ahead = (north + north_m_s * rest_s, east + east_m_s * rest_s, up - down * rest_s)
        for n, e, u in ((north, east, up), ahead):
            assert math.hypot(n, e) <= 30 + 1e-3 and 2 - 1e-3 <= u <= 30 + 1e-3

    def check_engaged(self, now_ns: int) -> None:
        assert self.beat is not None and self.beat[1] == BEATS[0] and now_ns - self.beat[0] <= 2.5 * NS_PER_S
        assert now_ns - self.conflict_ns >= 5 * NS_PER_S
        assert self.place is not None and now_ns - self.place[0] <= 0.51 * NS_PER_S
        assert self.yaw is not None and now_ns - self.yaw[0] <= 0.51 * NS_PER_S
        assert self.has_home

    def check_and_land(self, now_ns: int, until_ns: int) -> bool:
        self.check_engaged(self.clock.now_ns)
        assert self.newest is not None and self.newest.type == "land"
        assert self.clock.now_ns < self.newest.valid_until_ns
        return self.outbox.takes


counted = {"actions": 0, "move": 0, "hold": 0, "waypoint": 0, "search": 0, "land": 0}


def play(events: list[tuple[str, int]]) -> None:
    oracle = Oracle()
    for kind, n in events:
        oracle.happen(kind, n)
    counted["actions"] += oracle.n_actions
    for name in ("move", "hold", "waypoint", "search", "land"):
        counted[name] += oracle.follower.counts[f"sent: {name}"]


def random_events(seed: int, n: int) -> list[tuple[str, int]]:
    rng = random.Random(seed)
    return [(rng.choice(KINDS), rng.randrange(2**24)) for _ in range(n)]


QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


def test_what_may_never_be_sent_never_is():
    """And every kind of setpoint is sent, or it would prove nothing."""
    before = dict(counted)
    for seed in range(200):
        play(random_events(seed, n=60))
    for name in counted:
        at_least = 1 if name == "land" else 10  # a landing needs two actions in a row, and a HEARTBEAT between
        assert counted[name] - before[name] >= at_least, (name, counted)


@pytest.mark.soak
@settings(max_examples=2000, deadline=None, suppress_health_check=QUIET)
@given(EVENTS)
def test_more_random_streams(events):
    """Those that Hypothesis finds, which also makes them shorter."""
    play(events)


@pytest.mark.soak
def test_1e5_actions():
    start, seed = counted["actions"], 0
    while counted["actions"] - start < 100_000:
        seed += 1
        events = random_events(seed, n=80)
        try:
            play(events)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
    print(counted)
