"""The pause before the next try of something that keeps failing: it doubles with every failure, up to a limit.

    >>> backoff = Backoff(first_s=0.2, max_s=5.0)
    >>> [backoff.next_pause_s() for _ in range(7)]
    [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]

One good result does not make the pause short again. Otherwise a process that starts well and dies at its first frame
would be restarted for ever without a growing pause. Only a period of good results makes the pause short.
"""

from __future__ import annotations

from edge_agent.time_units import NS_PER_S

GOOD_PERIOD_S = 10.0


class Backoff:
    """Counts failures in a row. It reads no clock: the caller gives the time."""

    def __init__(self, first_s: float, max_s: float, good_period_s: float = GOOD_PERIOD_S) -> None:
        """first_s: pause after the first failure. max_s: the longest pause. good_period_s: see note_success()."""
        self.first_s, self.max_s, self.good_period_s = first_s, max_s, good_period_s
        self.failures = 0  # in a row
        self._good_since_ns: int | None = None

    def next_pause_s(self) -> float:
        """Count one failure; the seconds to wait before the next try."""
        pause_s = min(self.first_s * 2.0 ** min(self.failures, 60), self.max_s)
        self.failures += 1
        self._good_since_ns = None
        return pause_s

    def note_success(self, now_ns: int) -> None:
        """Note a good result. After good_period_s of good results without a failure, the count starts again at 0."""
        if self._good_since_ns is None:
            self._good_since_ns = now_ns
        elif now_ns - self._good_since_ns >= self.good_period_s * NS_PER_S:
            self.failures = 0
