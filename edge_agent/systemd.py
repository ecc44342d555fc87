"""Messages to systemd: READY, STATUS, WATCHDOG, STOPPING. Without a service manager nothing is sent.

Watchdog.feed() sends WATCHDOG=1 when work was done, never because time has passed.
https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Callable

FEEDS_PER_INTERVAL = 4
MARGIN_S = 5.0  # longer than the pause between two feeds of the unit's interval, 15 s / 4
NS_PER_US = 1000
MAX_UNSENT = 16
WATCHDOG_FED = "WATCHDOG=1"  # only now is it true


_unsent: deque[str] = deque(maxlen=MAX_UNSENT)


def notify(*lines: str) -> None:
    """Send lines such as "READY=1" to $NOTIFY_SOCKET, never waiting. A manager that does not listen is not an error.

    The kernel queues few messages for a manager that is busy. What found no room goes with the next message: a READY
    that is lost would end the start.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as out:
        try:
            out.sendto("\n".join([*_unsent, *lines]).encode(), address)
        except BlockingIOError:
            _unsent.extend(line for line in lines if line != WATCHDOG_FED)
        else:
            _unsent.clear()


class Watchdog:
    """Feeds systemd's watchdog when the count of finished work has grown, at most four times per interval."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """Reads WATCHDOG_PID and WATCHDOG_USEC. clock: monotonic time in nanoseconds."""
        is_for_us = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.interval_us = int(os.environ.get("WATCHDOG_USEC", "0")) if is_for_us else 0  # 0: no watchdog
        self._clock = clock
        self._fed_ns: int | None = None
        self._fed_count = -1

    def feed(self, work_count: int) -> None:
        """work_count: how much work was ever finished."""
        if not self.interval_us or work_count == self._fed_count:
            return
        now_ns = self._clock()
        if self._fed_ns is None or now_ns - self._fed_ns > self.interval_us * NS_PER_US / FEEDS_PER_INTERVAL:
            self._fed_ns, self._fed_count = now_ns, work_count
            notify(WATCHDOG_FED)

    def set_interval_above(self, stall_s: float) -> None:
        """Make the interval longer than the time after which the supervisor itself restarts a stalled model process.

        Without the margin systemd would end the whole daemon for a fault that costs only the model process. The
        interval is never shorter than that of the unit.
        """
        if self.interval_us:
            longest_us = max(self.interval_us, round((stall_s + MARGIN_S) * 1e6))
            notify(f"WATCHDOG_USEC={longest_us}", WATCHDOG_FED)
