"""Time for the camera process. Every pause and every time stamp goes through a Clock, so that tests can replace it."""

from __future__ import annotations

import time

from edge_agent.time_units import NS_PER_S


class Clock:
    """CLOCK_MONOTONIC of this machine, in nanoseconds."""

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def sleep_until(self, wake_ns: int) -> None:
        """Return at `wake_ns`, or at once if that time is over."""
        time.sleep(max(0, wake_ns - self.now_ns()) / NS_PER_S)


MONOTONIC = Clock()
