"""The autopilot's time since boot -> our clock. Telemetry that waited in a queue then has its true age.

The shortest way seen so far says how far the two clocks are apart. It may grow by DRIFT, because no two clocks run at
the same rate.

    >>> clock = BootClock()
    >>> clock.stamp("ATTITUDE", 1000, 5_000_000_000)
    (5000000000, False)
    >>> clock.stamp("ATTITUDE", 1100, 5_900_000_000)        # true at 5.1 s, and 0.8 s on the way
    (5100000000, False)
"""

from __future__ import annotations

from edge_agent.time_units import NS_PER_MS, NS_PER_S

DRIFT = 500e-6  # ten times what crystals differ
JUMP_NS = 1 * NS_PER_S  # a change of more than this is no delay and no drift


class BootClock:
    def __init__(self) -> None:
        self._offset_ns: int | None = None  # our clock minus the autopilot's
        self._offset_at_ns = 0
        self._newest_ms: dict[str, int] = {}  # name of a message -> its newest time

    def stamp(self, name: str, boot_ms: int, now_ns: int) -> tuple[int, bool] | None:
        """When a message was true by our clock, and whether the autopilot's clock has jumped. None: the message is not
        newer than the last one of its name. After a jump everything of before is forgotten."""
        newest_ms = self._newest_ms.get(name)
        offset_ns = now_ns - boot_ms * NS_PER_MS
        if newest_ms is not None and boot_ms <= newest_ms:
            if (newest_ms - boot_ms) * NS_PER_MS <= JUMP_NS:
                return None
            self.__init__()  # type: ignore[misc]
            return now_ns, True
        if self._offset_ns is None:
            self._set(offset_ns, now_ns)
        else:
            longest_ns = self._offset_ns + round((now_ns - self._offset_at_ns) * DRIFT)
            if offset_ns < longest_ns - JUMP_NS:
                self.__init__()  # type: ignore[misc]
                return now_ns, True
            if offset_ns < longest_ns:
                self._set(offset_ns, now_ns)
            else:
                self._set(longest_ns, now_ns)
        self._newest_ms[name] = boot_ms
        assert self._offset_ns is not None
        return min(now_ns, boot_ms * NS_PER_MS + self._offset_ns), False

    def _set(self, offset_ns: int, now_ns: int) -> None:
        self._offset_ns, self._offset_at_ns = offset_ns, now_ns
