"""The stamp of a ROS image -> CLOCK_MONOTONIC of its capture, or a refusal with its reason. Pure but for its memory.

System time: the age of a stamp by the node's clock is its age by CLOCK_MONOTONIC too, unless the clock was set between
the two. Simulated time (`use_sim_time`): the age in simulated seconds counts as real seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, NamedTuple

from edge_agent.time_units import NS_PER_MS, NS_PER_S

MAX_AGE_NS = 1 * NS_PER_S  # of a pushed frame
MAX_AHEAD_NS = 5 * NS_PER_MS  # of a pushed frame
MAX_AHEAD_SIMULATED_NS = 100 * NS_PER_MS  # /clock is published in steps, and an image can be earlier than its step
MAX_READING_NS, MAX_READINGS = 1 * NS_PER_MS, 5  # a process can be interrupted between two clocks
# How far the two clocks move apart without having been set: the time between their readings, and an NTP daemon that
# slows or speeds the clock by 0.05 %.
MAX_DRIFT_NS, DRIFT_PER_NS = 20 * NS_PER_MS, 1000
FIRST_SYSTEM_TIME_NS = 1_000_000_000 * NS_PER_S  # September 2001; an earlier stamp is not system time
NS_PER_DAY = 86_400 * NS_PER_S

StampReason = Literal["zero", "invalid", "wrong-clock", "no-clock", "clock-set", "future", "old", "order"]
# Reason of a refusal -> what is wrong. docs/ros2.md has the same table.
STAMP_REASONS: dict[StampReason, str] = {
    "zero": "The stamp is 0: the publisher sets none.",
    "invalid": "The stamp is negative, or has 10⁹ nanoseconds or more.",
    "wrong-clock": "The stamp is simulated time and the node uses system time, or the other way round.",
    "no-clock": "`use_sim_time` is true, and nothing has come on `/clock`.",
    "clock-set": "The system clock was set less than 1 s ago: the age of an image is unknown.",
    "future": "The stamp is more than 5 ms in the future (simulated time: 100 ms).",
    "old": "The stamp is more than 1 s old.",
    "order": "The stamp is not later than the one of the image before.",
}


class StampRefused(ValueError):
    """One line: what was expected and found."""

    def __init__(self, reason: StampReason, line: str) -> None:
        super().__init__(line)
        self.reason = reason


class Clocks(NamedTuple):
    """Two clocks at one moment."""

    ros_ns: int  # the node's clock: system time or simulated time; 0: simulated, and nothing has come on /clock
    monotonic_ns: int
    is_simulated: bool = False


def read_clocks(ros: Callable[[], int], is_simulated: bool, monotonic: Callable[[], int] = time.monotonic_ns) -> Clocks:
    """The shortest of several readings."""
    shortest_ns, clocks = 0, Clocks(0, 0)
    for i in range(MAX_READINGS):
        before_ns, ros_ns, after_ns = monotonic(), ros(), monotonic()
        if i == 0 or after_ns - before_ns < shortest_ns:
            shortest_ns, clocks = after_ns - before_ns, Clocks(ros_ns, (before_ns + after_ns) // 2, is_simulated)
        if shortest_ns <= MAX_READING_NS:
            break
    return clocks


def to_ros_ns(monotonic_ns: int, clocks: Clocks) -> int:
    """CLOCK_MONOTONIC -> the node's clock."""
    return max(0, clocks.ros_ns - (clocks.monotonic_ns - monotonic_ns))


class StampReader:
    """Remembers the last image and the last reading of the clocks."""

    def __init__(self) -> None:
        self._last: Clocks | None = None
        self._set_ns: int | None = None  # CLOCK_MONOTONIC when the clock was seen to have been set
        self._last_stamp_ns = 0
        self._last_captured_ns = 0

    def captured_ns(self, seconds: int, nanoseconds: int, clocks: Clocks) -> int:
        """CLOCK_MONOTONIC of the capture. clocks: read when the image arrived. Raises StampRefused."""
        self._watch(clocks)
        stamp_ns = seconds * NS_PER_S + nanoseconds
        if seconds < 0 or not 0 <= nanoseconds < NS_PER_S:
            raise StampRefused("invalid", f"stamp {seconds} s, {nanoseconds} ns: expected 0 to 999999999 ns")
        if stamp_ns == 0:
            raise StampRefused("zero", "stamp 0: the publisher sets no stamp, so the age of the image is unknown")
        if clocks.is_simulated and clocks.ros_ns == 0:
            raise StampRefused("no-clock", "use_sim_time is true, but nothing has come on /clock")
        age_ns = clocks.ros_ns - stamp_ns
        self._check_kind_of_clock(stamp_ns, age_ns, clocks)
        if self._set_ns is not None:
            raise StampRefused(
                "clock-set", "the system clock was set less than 1 s ago: the age of an image is unknown"
            )
        if age_ns < -(MAX_AHEAD_SIMULATED_NS if clocks.is_simulated else MAX_AHEAD_NS):
            raise StampRefused("future", f"stamp {-age_ns / NS_PER_MS:.1f} ms in the future; {_host(clocks)}")
        if age_ns > MAX_AGE_NS:
            raise StampRefused("old", f"stamp {age_ns / NS_PER_MS:.1f} ms old, expected 1000 at most; {_host(clocks)}")
        captured_ns = clocks.monotonic_ns - max(0, age_ns)
        behind_ns = max(self._last_stamp_ns - stamp_ns, self._last_captured_ns - captured_ns)
        if behind_ns >= 0:
            raise StampRefused("order", f"stamp {behind_ns / NS_PER_MS:.1f} ms before that of the last image")
        self._last_stamp_ns, self._last_captured_ns = stamp_ns, captured_ns
        return captured_ns

    def _watch(self, clocks: Clocks) -> None:
        """Notice a clock that was set, and a simulation that began anew."""
        last, self._last = self._last, clocks
        if self._set_ns is not None and clocks.monotonic_ns - self._set_ns > MAX_AGE_NS:
            self._set_ns = None
        if last is None:
            return
        if clocks.is_simulated or last.is_simulated:
            if clocks.is_simulated != last.is_simulated or clocks.ros_ns < last.ros_ns:
                self._last_stamp_ns = 0
            return
        elapsed_ns = clocks.monotonic_ns - last.monotonic_ns
        drift_ns = abs(clocks.ros_ns - last.ros_ns - elapsed_ns)
        if drift_ns > MAX_DRIFT_NS + elapsed_ns // DRIFT_PER_NS:
            self._set_ns, self._last_stamp_ns = clocks.monotonic_ns, 0

    def _check_kind_of_clock(self, stamp_ns: int, age_ns: int, clocks: Clocks) -> None:
        found = f"stamp {stamp_ns / NS_PER_S:.3f} s"
        if not clocks.is_simulated and stamp_ns < FIRST_SYSTEM_TIME_NS:
            line = f"{found} is not system time; if a simulator stamps the images, set use_sim_time to true"
            raise StampRefused("wrong-clock", line)
        if clocks.is_simulated and abs(age_ns) > NS_PER_DAY:
            line = f"{found} is not the time of /clock ({clocks.ros_ns / NS_PER_S:.3f} s); without a simulator, "
            raise StampRefused("wrong-clock", f"{line}set use_sim_time to false")


def _host(clocks: Clocks) -> str:
    if clocks.is_simulated:
        return "does the simulator publish /clock often enough?"
    return "if another machine stamps the images, synchronise its clock (chrony, PTP)"
