"""Tell systemd how we are: READY, STATUS, WATCHDOG, STOPPING. Does nothing where no service manager listens.

The watchdog is fed by `Watchdog.feed` when work was done, never by a clock.
https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html
"""

from __future__ import annotations

import contextlib
import os
import socket
import time


def notify(*lines: str) -> None:
    """Send lines like "READY=1" to $NOTIFY_SOCKET; a manager that does not listen is no error of ours."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as out:
        out.sendto("\n".join(lines).encode(), address)


class Watchdog:
    """Feeds systemd's watchdog when `progress` has grown, at most four times per interval."""

    def __init__(self) -> None:
        ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.interval_us = int(os.environ.get("WATCHDOG_USEC", "0")) if ours else 0
        self._fed_s, self._progress = 0.0, -1

    def feed(self, progress: int) -> None:
        now_s = time.monotonic()
        if self.interval_us and progress != self._progress and now_s - self._fed_s > self.interval_us / 4e6:
            self._fed_s, self._progress = now_s, progress
            notify("WATCHDOG=1")

    def allow(self, seconds: float | None) -> None:
        """While a model loads nothing can be fed: ask for so many seconds; None: the unit's own interval again."""
        if self.interval_us:
            notify(f"WATCHDOG_USEC={self.interval_us if seconds is None else round(seconds * 1e6)}", "WATCHDOG=1")
