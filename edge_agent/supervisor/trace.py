"""A timeline of what was done when, for https://ui.perfetto.dev or chrome://tracing: a JSON array of complete events in
Chrome's trace format. `edge-agent run --trace FILE` asks for it. It is for a bench, not for a flight: the disk that the
file is on may be slow.

Viewers also open an array that is not closed, so a daemon that was killed leaves a usable timeline.
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from edge_agent.errors import ConfigError, fault_of
from edge_agent.supervisor.log import log_line

MAX_EVENTS = 200_000  # about 20 MB; later events are not written
NS_PER_US = 1000


class Trace:
    """Owns the file; close() ends the array. Without a path it does nothing."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError when the file cannot be written."""
        self._thread_numbers: dict[str, int] = {}
        self._events_left = MAX_EVENTS
        try:
            # Line buffered: a daemon that is killed leaves whole events.
            self._file = Path(path).open("w", buffering=1, encoding="ascii") if path else None  # noqa: SIM115
        except OSError as error:
            fault = fault_of(error, "configuration")
            raise ConfigError(f"--trace: {path}: cannot be written: {error.strerror}", fault) from None
        if self._file is not None:
            self._write_text('[{"name":"process_name","ph":"M","pid":1,"args":{"name":"edge-agent"}}')

    @property
    def is_on(self) -> bool:
        return self._file is not None

    def span(self, name: str, thread: str, start_ns: int, stop_ns: int) -> None:
        """One event: `name` was done in `thread` from start_ns to stop_ns, CLOCK_MONOTONIC."""
        if self._file is None or not self._events_left:
            return
        self._events_left -= 1
        number = self._thread_numbers.get(thread)
        if number is None:
            number = self._thread_numbers[thread] = len(self._thread_numbers) + 1
            self._write({"name": "thread_name", "ph": "M", "tid": number, "args": {"name": thread}})
        times_us = {"ts": start_ns / NS_PER_US, "dur": max(0, stop_ns - start_ns) / NS_PER_US}
        self._write({"name": name, "ph": "X", "tid": number, **times_us})

    def _write(self, event: dict[str, Any]) -> None:
        self._write_text(",\n" + json.dumps(event | {"pid": 1}))

    def _write_text(self, text: str) -> None:
        """A file that takes no more (a full disk) ends the timeline, never the daemon."""
        if self._file is None:
            return
        try:
            self._file.write(text)
        except OSError as error:
            log_line(f"--trace: {error.strerror}; the timeline ends here")
            self._close_file()

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def close(self) -> None:
        self._write_text("]\n")
        self._close_file()
