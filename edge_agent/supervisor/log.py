"""One line for the log, which is stderr and therefore the journal of systemd."""

from __future__ import annotations

import contextlib
import os
import select

STDERR_FD = 2
MAX_LINE_BYTES = 4000  # below PIPE_BUF: a pipe that is writable takes the whole line at once


def log_line(line: str) -> None:
    """Write one line. The reader may be dead or stuck: then the line is lost, and nothing waits."""
    with contextlib.suppress(OSError):
        if select.select([], [STDERR_FD], [], 0)[1]:
            os.write(STDERR_FD, printable(line).encode(errors="replace")[:MAX_LINE_BYTES] + b"\n")


def printable(text: str) -> str:
    """The text with every character escaped that could start a new line or control a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
