"""A clock for tests: it stands still until a test moves it."""

from __future__ import annotations

from collections.abc import Callable

from edge_agent.time_units import NS_PER_MS, NS_PER_S


class FakeClock:
    """Call it for the time in nanoseconds, as time.monotonic_ns."""

    def __init__(self, now_ns: int = 10**15, on_read: Callable[[FakeClock], None] = lambda clock: None) -> None:
        """on_read: called before each reading; it may advance the clock."""
        self.now_ns = now_ns
        self.on_read = on_read

    def __call__(self) -> int:
        self.on_read(self)
        return self.now_ns

    def advance(self, seconds: float) -> None:
        self.now_ns += round(seconds * NS_PER_S)

    def advance_ms(self, ms: float) -> None:
        self.now_ns += round(ms * NS_PER_MS)
