"""Whether the machine was suspended: CLOCK_MONOTONIC stands still meanwhile, so what is old looks fresh afterwards.

CLOCK_BOOTTIME counts the suspended time. When it gains on CLOCK_MONOTONIC, everything made before that is out of date.

    >>> detector = SuspendDetector()
    >>> message.t_pub_ns < detector.resumed_ns()        # made before the machine slept
    True
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from edge_agent.time_units import NS_PER_MS

Clock = Callable[[], int]
MAX_GAIN_NS = 10 * NS_PER_MS  # more is a suspend; less is the time between the readings of the two clocks
MAX_READING_NS = 1 * NS_PER_MS
MAX_READINGS = 5


def boottime_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class _Reading(NamedTuple):
    """How far CLOCK_BOOTTIME is ahead of CLOCK_MONOTONIC, which lies between two bounds, and when it was read.

    The smaller bound is what later readings are compared with: a base that is too large would hide a suspend.
    """

    least_ns: int
    most_ns: int
    now_ns: int


class SuspendDetector:
    """Compares the two clocks at every call of resumed_ns(). Make it before the first thing that it has to judge."""

    def __init__(self, monotonic: Clock = time.monotonic_ns, boottime: Clock | None = None) -> None:
        """monotonic, boottime: CLOCK_MONOTONIC and CLOCK_BOOTTIME in nanoseconds.

        With a clock of a test in place of CLOCK_MONOTONIC and no boottime, there is no suspend.
        """
        self._monotonic = monotonic
        self._boottime = boottime or (boottime_ns if monotonic is time.monotonic_ns else monotonic)
        self._resumed_ns = 0
        self._suspended_ns = self._read().least_ns

    def resumed_ns(self) -> int:
        """CLOCK_MONOTONIC when the last suspend was noticed; 0 without one. What was made before is out of date."""
        found = self._read()
        if found.most_ns > self._suspended_ns + MAX_GAIN_NS:
            self._resumed_ns = found.now_ns
            self._suspended_ns = max(self._suspended_ns, found.least_ns)
        return self._resumed_ns

    def _read(self) -> _Reading:
        """The shortest of several readings, because a process can be interrupted between two clocks. If that happens
        every time, it counts as a suspend, which is the safe side."""
        shortest: _Reading | None = None
        for _ in range(MAX_READINGS):
            before_ns, boottime, after_ns = self._monotonic(), self._boottime(), self._monotonic()
            reading = _Reading(boottime - after_ns, boottime - before_ns, after_ns)
            if shortest is None or reading.most_ns - reading.least_ns <= shortest.most_ns - shortest.least_ns:
                shortest = reading
            if reading.most_ns - reading.least_ns <= MAX_READING_NS:
                break
        assert shortest is not None
        return shortest
