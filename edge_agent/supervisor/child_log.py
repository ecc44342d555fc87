"""What a child process writes on stderr -> the log, with a limit. Its last line often says why the process ended.

Python's tracebacks and messages of native libraries come this way. A library can write a line for every damaged frame.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_agent.supervisor.log import log_line, printable
from edge_agent.time_units import NS_PER_S

MAX_LINES_PER_S = 20
MAX_LINE_BYTES = 500  # the rest of a line is lost
RECENT_NS = 10 * NS_PER_S  # an older line does not say why a process ended


class ChildLog:
    """Owns the beginning of a line that is not complete, and the count of what was dropped."""

    def __init__(self, name: str, clock: Callable[[], int]) -> None:
        """name: what the lines begin with. clock: monotonic time in nanoseconds."""
        self._name, self._clock = name, clock
        self._rest = b""
        self._second = clock() // NS_PER_S
        self._n_written = self._n_dropped = 0  # in this second
        self._last, self._last_ns = "", 0

    def add(self, data: bytes) -> None:
        """What the process has written since the last call; may be empty. Call it in every turn."""
        self._begin_second()
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[: MAX_LINE_BYTES + 1]
        for line in lines:
            self._write(line)

    def last_line(self) -> str:
        """The last line of a process that has ended; "" if it wrote none shortly before."""
        if self._rest:
            self._write(self._rest)
            self._rest = b""
        return self._last if self._clock() - self._last_ns <= RECENT_NS else ""

    def _write(self, line: bytes) -> None:
        text = printable(line[:MAX_LINE_BYTES].decode(errors="replace").strip())
        if not text:
            return
        self._last, self._last_ns = text, self._clock()
        if self._n_written < MAX_LINES_PER_S:
            self._n_written += 1
            log_line(f"{self._name}: {text}")
        else:
            self._n_dropped += 1

    def _begin_second(self) -> None:
        second = self._clock() // NS_PER_S
        if second == self._second:
            return
        if self._n_dropped:
            log_line(f"{self._name}: {self._n_dropped} more lines are not shown")
        self._second, self._n_written, self._n_dropped = second, 0, 0
