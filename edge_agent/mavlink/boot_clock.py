"""The autopilot's time since boot -> our clock. Telemetry that waited in a queue then has its true age.

The shortest way seen so far says how far the two clocks are apart. It may grow by DRIFT, because no two clocks run at
the same rate. The clock of a simulation can be slower by far more: then telemetry seems to wait longer and longer. The
autopilot's answer to TIMESYNC tells the two apart: it was not made before it was asked for.

    >>> clock = BootClock()
    >>> clock.stamp("ATTITUDE", 1000, 5_000_000_000)
    (5000000000, False)
    >>> clock.stamp("ATTITUDE", 1100, 5_900_000_000)        # true at 5.1 s, and 0.8 s on the way
    (5100000000, False)
"""

from __future__ import annotations

from edge_agent.time_units import NS_PER_MS, NS_PER_S

DRIFT = 500e-6  # ten times what crystals differ
JUMP_NS = NS_PER_S // 5  # a change of more than this is no drift
SETTLE_NS, FIRST_JUMP_NS = 3 * NS_PER_S, 3 * NS_PER_S  # so long, all so far may have been late by so much
BOOT_MS = 2**32  # time_boot_ms begins anew
REORDER_NS = NS_PER_S // 10  # two packets that changed places arrive so soon after each other


class BootClock:
    def __init__(self) -> None:
        self._offset_ns: int | None = None  # our clock minus the autopilot's
        self._offset_at_ns = self._began_ns = 0
        self._arrived_offset_ns = 0  # the same of the newest message, with the time that it was on the way
        self._newest: dict[str, tuple[int, int]] = {}  # name of a message -> its newest time, and when that arrived

    def stamp(self, name: str, boot_ms: int, now_ns: int) -> tuple[int, bool] | None:
        """When a message was true by our clock, and whether the autopilot's clock has jumped. None: the message is not
        newer than the last one of its name. After a jump everything of before is forgotten."""
        newest_ms, arrived_ns = self._newest.get(name, (-1, 0))
        self._arrived_offset_ns = offset_ns = now_ns - boot_ms * NS_PER_MS
        if boot_ms == newest_ms:  # the same packet twice, or two within a millisecond
            return None
        if boot_ms < newest_ms:
            if (newest_ms - boot_ms) * NS_PER_MS <= JUMP_NS and now_ns - arrived_ns <= REORDER_NS:
                return None
            return self._jump(now_ns)
        if self._offset_ns is None:
            self._offset_ns, self._began_ns = offset_ns, now_ns
        else:
            longest_ns = self._offset_ns + round((now_ns - self._offset_at_ns) * DRIFT)
            jump_ns = JUMP_NS if now_ns - self._began_ns > SETTLE_NS else FIRST_JUMP_NS
            if offset_ns < longest_ns - jump_ns:
                return self._jump(now_ns)
            self._offset_ns = min(offset_ns, longest_ns)
        self._offset_at_ns = now_ns
        self._newest[name] = (boot_ms, now_ns)
        return min(now_ns, boot_ms * NS_PER_MS + self._offset_ns), False

    def note_answer(self, boot_ns: int, asked_ns: int, now_ns: int) -> None:
        """The autopilot read boot_ns from its clock after asked_ns. A time that the newest message contradicts is not
        from the clock of its telemetry, and does not count."""
        least_ns = asked_ns - (boot_ns // NS_PER_MS % BOOT_MS + 1) * NS_PER_MS
        if self._offset_ns is not None and self._offset_ns < least_ns <= self._arrived_offset_ns + JUMP_NS:
            self._offset_ns, self._offset_at_ns = least_ns, now_ns

    def _jump(self, now_ns: int) -> tuple[int, bool]:
        self._offset_ns = None
        self._newest.clear()
        return now_ns, True
