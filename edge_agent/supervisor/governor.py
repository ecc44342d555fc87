"""Lowers the load before the board throttles: first image tokens, then the rate of answers. Pure; nothing is read here.

A board that throttles lowers its clocks by itself, and then every answer is later than planned. The governor gives way
before: fewer image tokens cost detail, a lower rate costs actions, and both are said in the status. It never raises a
deadline and never changes for how long an action is valid: what it cannot prevent is a refusal, as ever.

    governor = Governor.of(max_image_tokens=256)
    governor = governor.update(Heat(headroom_c=6.0), answers_per_s=12.0, now_s=1.0)     # once a second
    governor.limit        # LoadLimit(max_image_tokens=192, answers_per_s=12.0)

Fewer tokens alone save nothing while a frame always waits: the model would answer more frames, at the same power. So
from the first step on, the rate is also held at what it was before.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from edge_agent.ipc.token_sizes import token_sizes

# Of the rate before the first step: 0.95 to 0.3. Steps of 0.1 swing further around what the heat sink can take: with
# them, simulated boards kept 1 to 4 % fewer of their actions.
RATE_STEPS = tuple(percent / 100 for percent in range(95, 25, -5))
# Degrees below the throttle point, which is expected HORIZON_S from now: a heat sink follows in tens of seconds.
LOWER_AT_C, RAISE_AT_C = 4.0, 7.0
NOW_AT_C = 2.0  # this near, two steps come at once
HORIZON_S = 10.0
LOWER_AT_POWER, RAISE_AT_POWER = 0.95, 0.8  # of the limit
LOWER_EVERY_S, NOW_EVERY_S = 4.0, 1.0
RAISE_EVERY_S, MAX_RAISE_EVERY_S = 30.0, 480.0
REGRET_S = 120.0  # a step back that is undone within this time: the next one waits twice as long
FIRST_STEPS = 7
BASE_RATE_MEMORY = 0.98  # a second
EMA_WEIGHT = 0.3  # weight of the newest reading
MAX_POWER_SHARE = 2.0  # of the limit; more is a wrong reading, which would count for minutes
SLOPE_WEIGHT = 0.1  # HORIZON_S multiplies the sensor's noise too


class Heat(NamedTuple):
    """One reading of the board. None: unknown."""

    headroom_c: float | None = None  # from the hottest part to where it throttles
    power_share: float | None = None  # of the power limit
    throttle_reasons: tuple[str, ...] = ()  # clocks are lowered now

    @property
    def is_known(self) -> bool:
        return self.headroom_c is not None or self.power_share is not None or bool(self.throttle_reasons)


class LoadLimit(NamedTuple):
    """What the model process may do. None: no limit."""

    max_image_tokens: int | None = None
    answers_per_s: float | None = None


class Governor(msgspec.Struct, frozen=True, kw_only=True):
    """A value: update() returns the next one."""

    steps: tuple[tuple[int | None, float], ...]  # (image tokens, share of the rate); the first one limits nothing
    level: int = 0
    base_rate: float | None = None  # answers per second before the first step
    reason: str = ""  # of the level; "" at level 0
    has_headroom: bool = False  # it was known once
    headroom_c: float | None = None  # smoothed
    slope_c_s: float = 0.0  # of the headroom, smoothed; below 0: it gets hotter
    power_share: float | None = None  # smoothed
    updated_s: float | None = None
    changed_s: float | None = None
    raised_s: float | None = None
    raise_every_s: float = RAISE_EVERY_S

    @classmethod
    def of(cls, max_image_tokens: int | None) -> Governor:
        """max_image_tokens: as configured; None: fewer change nothing, so the rate alone goes down."""
        if max_image_tokens is None:
            return cls(steps=((None, 1.0), *((None, share) for share in RATE_STEPS)))
        sizes = token_sizes(max_image_tokens)
        tokens: list[tuple[int | None, float]] = [(size, 1.0) for size in sizes[1:]]
        rates: list[tuple[int | None, float]] = [(sizes[-1], share) for share in RATE_STEPS]
        return cls(steps=((None, 1.0), *tokens, *rates))

    @property
    def limit(self) -> LoadLimit:
        if not self.level:
            return LoadLimit()
        tokens, share = self.steps[self.level]
        return LoadLimit(tokens, None if self.base_rate is None else self.base_rate * share)

    def update(self, heat: Heat, answers_per_s: float | None, now_s: float) -> Governor:
        """heat: read now. answers_per_s: of the last seconds; None or 0: no frame was answered."""
        known = self._with_reading(heat, now_s)
        if answers_per_s and (not self.level or self.base_rate is None):
            # A pause of the camera or of the controller is no lower rate: what was seen is forgotten slowly.
            base_rate = max(answers_per_s, BASE_RATE_MEMORY * (self.base_rate or 0.0))
            known = msgspec.structs.replace(known, base_rate=base_rate)
        since_s = float("inf") if self.changed_s is None else now_s - self.changed_s
        is_first = not self.has_headroom  # started hot: the heat sink is full, and the chip follows in seconds
        why, is_urgent = known._why_lower(heat, RAISE_AT_C if is_first else LOWER_AT_C)
        if why and since_s >= (NOW_EVERY_S if is_urgent else LOWER_EVERY_S):
            n_steps = FIRST_STEPS if is_first else 2 if is_urgent else 1
            return known._lower(why, now_s, n_steps)
        if not why and self.level and since_s >= self.raise_every_s and known._is_cool(heat):
            return known._raise(now_s)
        return known

    def _with_reading(self, heat: Heat, now_s: float) -> Governor:
        slope, headroom_c = 0.0, heat.headroom_c
        if heat.headroom_c is not None and self.headroom_c is not None and self.updated_s is not None:
            headroom_c = self.headroom_c + EMA_WEIGHT * (heat.headroom_c - self.headroom_c)
            elapsed_s = max(now_s - self.updated_s, 0.1)
            slope = self.slope_c_s + SLOPE_WEIGHT * ((headroom_c - self.headroom_c) / elapsed_s - self.slope_c_s)
        power = None if heat.power_share is None else min(heat.power_share, MAX_POWER_SHARE)
        if power is not None and self.power_share is not None:
            power = self.power_share + EMA_WEIGHT * (power - self.power_share)
        return msgspec.structs.replace(
            self,
            has_headroom=self.has_headroom or headroom_c is not None,
            headroom_c=headroom_c,
            slope_c_s=slope,
            power_share=power,
            updated_s=now_s,
        )

    def _why_lower(self, heat: Heat, lower_at_c: float) -> tuple[str, bool]:
        """(why the load must be lower, "": it need not; whether that is urgent)."""
        if heat.throttle_reasons:
            return f"the board throttles: {', '.join(heat.throttle_reasons)}", True
        now_c = heat.headroom_c
        if now_c is not None and (now_c < NOW_AT_C or self._expected_c() < lower_at_c):
            where = "below" if now_c >= 0 else "above"
            return f"temperature {abs(now_c):.0f} °C {where} the limit", now_c < NOW_AT_C
        if self.power_share is not None and self.power_share > LOWER_AT_POWER:
            return f"power at {self.power_share:.0%} of its limit", self.power_share > 1
        return "", False

    def _expected_c(self) -> float:
        """The headroom HORIZON_S from now, if it goes on to get hotter as now."""
        return (self.headroom_c or 0.0) + min(0.0, self.slope_c_s) * HORIZON_S

    def _is_cool(self, heat: Heat) -> bool:
        """Whether everything that is known is far from its limit. An unknown board stays as it is."""
        if self.headroom_c is not None and self._expected_c() < RAISE_AT_C:
            return False
        if self.power_share is not None and self.power_share > RAISE_AT_POWER:
            return False
        return heat.is_known

    def _lower(self, why: str, now_s: float, n_steps: int) -> Governor:
        level = min(self.level + n_steps, len(self.steps) - 1)
        is_regret = self.raised_s is not None and now_s - self.raised_s < REGRET_S
        factor = 2.0 if is_regret else 0.5
        wait_s = min(max(factor * self.raise_every_s, RAISE_EVERY_S), MAX_RAISE_EVERY_S)
        return msgspec.structs.replace(
            self, level=level, reason=why, changed_s=now_s, raised_s=None, raise_every_s=wait_s
        )

    def _raise(self, now_s: float) -> Governor:
        level = self.level - 1
        reason = self.reason if level else ""
        return msgspec.structs.replace(self, level=level, reason=reason, changed_s=now_s, raised_s=now_s)
