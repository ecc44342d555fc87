"""Whether the machine was suspended: CLOCK_MONOTONIC stands still meanwhile, so what is old looks fresh afterwards.

CLOCK_BOOTTIME counts the suspended time. When it gains on CLOCK_MONOTONIC, everything made before that is out of date.

    >>> detector = SuspendDetector()
    >>> message.t_pub_ns < detector.resumed_ns()        # made before the machine slept
    True
"""

from __future__ import annotations

import time
from collections.abc import Callable

from edge_agent.time_units import NS_PER_MS

Clock = Callable[[], int]
MAX_GAIN_NS = 10 * NS_PER_MS  # more is a suspend; less is the time between the readings of the two clocks
MAX_READING_NS = 1 * NS_PER_MS
MAX_READINGS = 5


def boottime_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class SuspendDetector:
    """Compares the two clocks at every call of resumed_ns(). Make it before the first thing that it has to judge."""

    def __init__(self, monotonic: Clock = time.monotonic_ns, boottime: Clock | None = None) -> None:
        """monotonic, boottime: CLOCK_MONOTONIC and CLOCK_BOOTTIME in nanoseconds.

        With a clock of a test in place of CLOCK_MONOTONIC and no boottime, there is no suspend.
        """
        self._monotonic = monotonic
        self._boottime = boottime or (boottime_ns if monotonic is time.monotonic_ns else monotonic)
        self._resumed_ns = 0
        self._suspended_ns, _ = self._read()

    def resumed_ns(self) -> int:
        """CLOCK_MONOTONIC when the last suspend was noticed; 0 without one. What was made before is out of date."""
        suspended_ns, now_ns = self._read()
        if suspended_ns > self._suspended_ns + MAX_GAIN_NS:
            self._resumed_ns = now_ns
            self._suspended_ns = suspended_ns
        return self._resumed_ns

    def _read(self) -> tuple[int, int]:
        """(how far CLOCK_BOOTTIME is ahead, CLOCK_MONOTONIC). A process that is interrupted between the two readings
        reads again; if that happens every time, it counts as a suspend, which is the safe side."""
        for _ in range(MAX_READINGS):
            before_ns, boottime, after_ns = self._monotonic(), self._boottime(), self._monotonic()
            if after_ns - before_ns <= MAX_READING_NS:
                break
        return boottime - before_ns, after_ns
