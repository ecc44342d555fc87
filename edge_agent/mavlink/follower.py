"""Decides what may be sent to the autopilot, and when. This is the bridge's state machine; it owns no socket.

Three states. SILENT: nothing is sent. FOLLOWING: an action was sent once, and stands until its expiry. HOLDING: zero
velocity is sent at HOLD_HZ, until hold_s after the last action that was followed; then SILENT, so that the autopilot's
own fail-safe takes over. Actions that are not followed do not make it longer, except while a pilot flies PX4, which
enters OFFBOARD only while setpoints come.

    take(action)   valid, engaged, inside the fence: one setpoint, FOLLOWING. Valid, but not to be followed: HOLDING.
    take(refusal), expiry, end(why): FOLLOWING becomes HOLDING, at once.
    turn()         what is due by the clock.

The clock is read right before each setpoint, and the action is checked against it: nothing is late by the time that
was spent on deciding.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from edge_agent.mavlink.autopilot import Autopilot, Place
from edge_agent.mavlink.config import BridgeConfig
from edge_agent.mavlink.envelope import (
    limit_change,
    limit_speeds,
    rounded,
    why_not_on_the_wire,
    why_not_position,
    why_not_velocity,
    why_outside,
)
from edge_agent.mavlink.search import Search
from edge_agent.mavlink.setpoint import HOLD, Position, Setpoint, Velocity, to_body, to_local, toward_zero
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.messages import Action, ActionValue, Refusal

HOLD_HZ = 10  # PX4 wants 2 Hz or more
HOLD_PERIOD_NS = NS_PER_S // HOLD_HZ
CHANGE_NS = NS_PER_S // 10  # the acceleration is that over this time
MAX_SENT = 64
LAND_AGAIN_NS = 1 * NS_PER_S  # the autopilot's HEARTBEAT with the new mode is under way that long
LAND_HEARTBEAT_NS = NS_PER_S // 2  # landing is a change of mode: the pilot may have changed it since the HEARTBEAT
LAND_GAP_NS = 3 * NS_PER_S  # between two actions `land` of one landing
RESTARTED = "the daemon has started again"
MOVE_NAMES = ("forward_m_s", "right_m_s", "down_m_s", "yaw_rate_rad_s")
WAYPOINT_NAMES = ("forward_m", "right_m", "down_m")
MAX_WAYPOINT_M = 1000.0
SEARCH_WITHIN = 0.8  # of the fence's radius: there the vehicle can still turn


class Outbox(Protocol):
    """Where the follower's decisions go."""

    def send(self, setpoint: Setpoint, now_ns: int, until_ns: int | None = None) -> bool:
        """Put it on the link now or never, and not at until_ns or later. now_ns: read before the action was checked.
        False: it was not sent."""

    def land(self, now_ns: int, until_ns: int) -> bool:
        """MAV_CMD_NAV_LAND, once."""

    def say(self, topic: str, text: str) -> None:
        """For the pilot and the log. topic: limits how often."""


class Followed(NamedTuple):
    """Whose actions are followed: they may not change with a restart of the daemon."""

    session: int
    instruction: str
    adapter: str


class Follower:
    """One thread calls it. counts: what was sent and what was not, and why."""

    def __init__(
        self,
        config: BridgeConfig,
        autopilot: Autopilot,
        is_valid: Callable[[Action], bool],
        outbox: Outbox,
        clock: Callable[[], int],
    ) -> None:
        """is_valid: Client.is_valid. clock: CLOCK_MONOTONIC in nanoseconds."""
        self._config, self._autopilot, self._is_valid = config, autopilot, is_valid
        self._outbox, self._clock = outbox, clock
        self.counts: Counter[str] = Counter()
        self.why = ""  # why hold is sent, or nothing
        self._action: Action | None = None  # FOLLOWING
        self._step = 0  # of its chunk: the one that was sent
        self._next_hold_ns: int | None = None  # HOLDING
        self._last_followed_ns: int | None = None  # when the last action that was followed arrived
        self._followed: Followed | None = None
        self._departures, self._interruptions = autopilot.departures, autopilot.interruptions
        # What the autopilot was given lately, and when; None: not a velocity.
        self._sent: deque[tuple[int, Velocity | None]] = deque(maxlen=MAX_SENT)
        self._landed_ns: int | None = None  # when MAV_CMD_NAV_LAND was sent
        self._land_wanted_ns: tuple[int, int] | None = None  # the first and the last `land` of this landing
        self._search = Search(config.search_m_s, min(config.search_radius_m, SEARCH_WITHIN * config.fence.radius_m))

    # -- what happens -------------------------------------------------------------------------------------------------

    @property
    def is_following(self) -> bool:
        return self._action is not None

    @property
    def is_holding(self) -> bool:
        return self._next_hold_ns is not None

    def take(self, answer: Action | Refusal) -> None:
        """A new answer of the daemon. It ends what was followed before."""
        if isinstance(answer, Refusal):
            self.counts["refusals"] += 1
            self.end(f"refusal: {answer.reason}")
            return
        self._note_changes()
        now_ns = self._clock()
        if not self._is_valid(answer):
            self.counts["expired before use"] += 1
            self.end("the newest action came too late")
            return
        if self._last_followed_ns is None:
            self._last_followed_ns = now_ns  # the first action: it is hold at least
        if why := self._why_not(answer, now_ns):
            if why == RESTARTED or self._autopilot.waits_for_setpoints(now_ns):
                self._last_followed_ns = now_ns
            self.counts[f"held: {_kind(why)}"] += 1
            self._hold(why)
        else:
            self._follow(answer, now_ns)

    def end(self, why: str) -> None:
        """The action that is followed ends now, and is not taken up again."""
        if self._action is not None:
            self.counts[f"ended: {_kind(why)}"] += 1
            self._hold(why)
        elif self._next_hold_ns is not None and why != self.why:
            self.why = why
            self._outbox.say("hold", f"hold: {why}")

    def forget(self, why: str) -> None:
        """The machine was suspended: nothing of before counts, not even the time for which hold is sent."""
        self._land_wanted_ns = None
        if self._action is not None or self._next_hold_ns is not None:
            self._fall_silent(why)

    def turn(self, may_follow: bool = True) -> None:
        """What is due: the end of an action, the next step of a chunk, the next hold, the end of holding.

        may_follow: False: not all that the autopilot has said is read, so no step begins."""
        now_ns = self._clock()
        self._note_changes()
        if self._action is not None:
            if not self._is_valid(self._action):
                self.end("no new action in time")
            elif why := self._why_not_engaged(now_ns) or self._why_outside_now(now_ns, self._action.type != "land"):
                self.end(why)
            elif may_follow and self._step_due(now_ns) > self._step:
                self._follow_step(self._action, self._step_due(now_ns))
        elif self._next_hold_ns is not None and now_ns >= self._next_hold_ns:
            self._send_hold()

    def _note_changes(self) -> None:
        """What the autopilot has said since the last call, also if it is over: an action does not outlive it."""
        if self._autopilot.departures != self._departures:
            self._departures, self._followed = self._autopilot.departures, None
            self._search.forget()
            self._land_wanted_ns = None
            self.end("disarmed, or another mode")
        if self._autopilot.interruptions != self._interruptions:
            self._interruptions = self._autopilot.interruptions
            self.end("the link or the autopilot was interrupted")

    def due_ns(self) -> int | None:
        """When turn() has something to do; None: only when something happens."""
        if self._action is not None:
            action = self._action
            due_ns = action.valid_until_ns
            if action.chunk and self._step < len(action.chunk):
                due_ns = min(due_ns, action.t_pub_ns + (self._step + 1) * action.chunk_step_ms * NS_PER_MS)
            return due_ns
        return self._next_hold_ns

    # -- hold ---------------------------------------------------------------------------------------------------------

    def _hold(self, why: str) -> None:
        is_due = self._action is not None or self._next_hold_ns is None or self._clock() >= self._next_hold_ns
        self._action = None
        self.why = why
        if is_due:
            self._send_hold()
        if self._next_hold_ns is not None:  # said when it is sent
            self._outbox.say("hold", f"hold: {why}")

    def _send_hold(self) -> None:
        now_ns = self._clock()
        last_ns = self._last_followed_ns
        if last_ns is None or now_ns - last_ns >= self._config.hold_s * NS_PER_S:
            self._fall_silent(self.why)
            return
        self._next_hold_ns = now_ns + HOLD_PERIOD_NS
        if self._outbox.send(HOLD, now_ns):
            self._note_sent(HOLD, now_ns)

    def _fall_silent(self, why: str) -> None:
        self.counts["fell silent"] += self._action is not None or self._next_hold_ns is not None
        self._action = self._next_hold_ns = None
        self.why = why
        self._outbox.say("silent", f"nothing is sent any more: {why}")

    # -- follow -------------------------------------------------------------------------------------------------------

    def _follow(self, action: Action, now_ns: int) -> None:
        """now_ns: when it arrived."""
        if action.type != "search":
            self._search.reset()
        if action.type != "land":
            self._land_wanted_ns = None
        if action.type == "hold":
            self.counts["followed: hold"] += 1
            self._last_followed_ns = now_ns
            self._hold("the model says hold")
        else:
            self._action, self._step = action, -1
            if action.type == "land":
                self._last_followed_ns = now_ns
                self._land(action)
            else:
                self._follow_step(action, self._step_due(self._clock()))
            if self._action is None:
                return  # it was hold after all
        is_first, self._last_followed_ns = self._followed is None, now_ns
        self._followed = Followed(action.session, action.instruction, action.adapter)
        if is_first:
            self._outbox.say("follow", f"following: {action.instruction}")

    def _follow_step(self, action: Action, step: int) -> None:
        """One setpoint for one step, once. Step 0 is the action itself."""
        self._step = step
        values = action.values if step <= 0 else action.chunk[step - 1]
        made = self._make(action, values)
        if isinstance(made, str):
            self.counts[f"held: {_kind(made)}"] += 1
            self._hold(made)
            return
        now_ns = self._clock()
        if not self._is_valid(action):
            self.end("no new action in time")
            return
        if why := why_not_on_the_wire(made, self._config.limits):
            self.counts["held: last check"] += 1
            self._hold(why)
            return
        if self._outbox.send(made, now_ns, action.valid_until_ns):
            if self.why:
                self._outbox.say("follow", "actions again")
            self.why, self._next_hold_ns = "", None
            self._note_sent(made, now_ns)
        else:
            self.end("the link does not take it" if self._is_valid(action) else "no new action in time")

    def _land(self, action: Action) -> None:
        """Zero velocity first: the action before must not go on while the autopilot changes its mode."""
        now_ns = self._clock()
        wanted = self._land_wanted_ns
        first_ns = now_ns if wanted is None or now_ns - wanted[1] > LAND_GAP_NS else wanted[0]
        self._land_wanted_ns = (first_ns, now_ns)
        is_under_way = self._landed_ns is not None and now_ns - self._landed_ns < LAND_AGAIN_NS
        if self._outbox.send(HOLD, now_ns):
            self._note_sent(HOLD, now_ns)
        now_ns = self._clock()
        beat = self._autopilot.fresh_heartbeat(now_ns)
        is_confirmed = beat is not None and beat.t_ns > first_ns and now_ns - beat.t_ns <= LAND_HEARTBEAT_NS
        if (
            is_confirmed
            and not is_under_way
            and self._is_valid(action)
            and self._outbox.land(now_ns, action.valid_until_ns)
        ):
            self._landed_ns = now_ns
            self.counts["sent: land"] += 1
            self._outbox.say("land", "landing: MAV_CMD_NAV_LAND sent")
        self._step, self._next_hold_ns = len(action.chunk), None

    def _step_due(self, now_ns: int) -> int:
        action = self._action
        if action is None or not action.chunk or action.chunk_step_ms <= 0:
            return 0
        elapsed_ns = max(0, now_ns - action.t_pub_ns)
        return min(elapsed_ns // (action.chunk_step_ms * NS_PER_MS), len(action.chunk))

    def _note_sent(self, setpoint: Setpoint, now_ns: int) -> None:
        self.counts[f"sent: {setpoint.type}"] += 1
        self._sent.append((now_ns, setpoint.target if isinstance(setpoint.target, Velocity) else None))

    def _before(self, now_ns: int) -> tuple[int, Velocity | None]:
        """The setpoint that the autopilot had CHANGE_NS ago. Not the last one: it can be a hold that was sent a moment
        ago, between two actions, and the vehicle has not even begun to follow it."""
        older = (sent for sent in reversed(self._sent) if sent[0] <= now_ns - CHANGE_NS)
        return next(older, self._sent[0] if len(self._sent) == MAX_SENT else (now_ns, None))

    # -- why not ------------------------------------------------------------------------------------------------------

    def _why_not(self, action: Action, now_ns: int) -> str:
        """Why hold takes the place of a valid action; "": it may be followed."""
        if why := self._why_not_engaged(now_ns):
            return why
        if why := self._why_not_this_session(action):
            return why
        if action.age_ms > self._config.max_image_age_ms:
            return f"image too old: {action.age_ms:.0f} ms"
        if action.type == "land":
            if not self._config.land:
                return "land is not allowed: land: true"
            return self._why_outside_now(now_ns, lowest=False)
        if action.type == "search" and not self._config.search_m_s:
            return "the model searches"
        if action.type not in ("move", "waypoint", "search", "hold"):
            return f"action type: {action.type[:16]} is unknown here"
        return ""

    def _why_not_engaged(self, now_ns: int) -> str:
        return self._autopilot.why_not_engaged(now_ns)

    def _why_not_this_session(self, action: Action) -> str:
        """After a restart, the daemon has the instruction of its configuration: it may not be the pilot's."""
        followed = self._followed
        if followed is None or followed.session == action.session:
            return ""
        if (action.instruction, action.adapter) != (followed.instruction, followed.adapter):
            return "restarted with another instruction"
        self._followed = followed._replace(session=action.session)
        return RESTARTED  # the next action is followed

    def _why_outside_now(self, now_ns: int, lowest: bool = True) -> str:
        """lowest: False: below the fence is no reason, because a landing ends there."""
        place = self._autopilot.place(now_ns)
        if isinstance(place, str):
            return place
        up_m = place.up_m if lowest else max(place.up_m, self._config.fence.min_altitude_m)
        why = why_outside(place.north_m, place.east_m, up_m, self._config.fence)
        return f"fence: {why}" if why else ""

    # -- setpoints ----------------------------------------------------------------------------------------------------

    def _make(self, action: Action, values: dict[str, ActionValue]) -> Setpoint | str:
        """The setpoint of one step, inside the envelope; or why there is none."""
        now_ns = self._clock()
        place = self._autopilot.place(now_ns)
        if isinstance(place, str):
            return place
        if action.type == "waypoint":
            return self._make_position(action, values, place)
        if action.type == "search":
            wanted = self._search.velocity(place)
        else:
            numbers = _numbers(values, MOVE_NAMES)
            if isinstance(numbers, str):
                return numbers
            wanted = Velocity(*numbers)
            self._search.note_move(place, wanted)
        velocity = self._limit(wanted, place, now_ns)
        if why := why_not_velocity(velocity, place, now_ns, action.valid_until_ns, self._config.fence):
            return why
        return Setpoint("search" if action.type == "search" else "move", velocity)

    def _limit(self, wanted: Velocity, place: Place, now_ns: int) -> Velocity:
        limits = self._config.limits
        slower, reduced = limit_speeds(wanted, limits)
        measured = Velocity(*to_body(place.yaw_rad, place.north_m_s, place.east_m_s), place.down_m_s)
        before_ns, before = self._before(now_ns)
        step_s = (now_ns - before_ns) / NS_PER_S
        smoother, is_changed = limit_change(slower, before, step_s, measured, limits.acceleration_m_s2)
        for name in [*reduced, *(["acceleration_m_s2"] if is_changed else [])]:
            self.counts[f"limited: {name}"] += 1
            self._outbox.say(f"limit {name}", f"limited by {name}")
        return rounded(smoother)

    def _make_position(self, action: Action, values: dict[str, ActionValue], place: Place) -> Setpoint | str:
        numbers = _numbers(values, WAYPOINT_NAMES)
        if isinstance(numbers, str):
            return numbers
        forward_m, right_m, down_m = numbers
        if max(map(abs, numbers)) > MAX_WAYPOINT_M:
            return f"a waypoint more than {MAX_WAYPOINT_M:g} m away"
        seen_from = self._autopilot.pose_at(action.t_capture_ns)
        here = self._autopilot.pose_at(place.t_ns)
        if seen_from is None or here is None:
            return "pose at the image's time is unknown"
        if "pace" in values:
            self._outbox.say("pace", "pace has no effect: the autopilot's speed limit counts")
        north_m, east_m = to_local(seen_from.yaw_rad, forward_m, right_m)
        target = Position(
            seen_from.north_m + north_m, seen_from.east_m + east_m, seen_from.down_m + down_m, seen_from.yaw_rad
        )
        if why := why_not_position(target, here, place, self._config.fence):
            return why
        return Setpoint("waypoint", Position(*(toward_zero(number) for number in target)))


def _numbers(values: dict[str, ActionValue], names: tuple[str, ...]) -> list[float] | str:
    """The numbers of these names, all finite; or what is wrong."""
    missing = [name for name in names if name not in values]
    if missing:
        return f"no {missing[0]} in the values"
    numbers = []
    for name in names:
        value = values[name]
        if isinstance(value, str) or not math.isfinite(value):
            return f"{name} is not a number"
        numbers.append(float(value))
    return numbers


def _kind(why: str) -> str:
    """A reason without its figures, for a counter."""
    return why.partition(":")[0]
