"""A timeline of what was done when, for https://ui.perfetto.dev or chrome://tracing: Chrome's trace format, as a JSON
array of complete events. Asked for by `edge-agent run --trace FILE`; a tool for a bench, not for a flight: it writes to
a disk that may be slow.

An array that was not closed can be opened all the same, so a killed daemon leaves a timeline as well.
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from pathlib import Path

from edge_agent.errors import ConfigError

MAX_EVENTS = 200_000  # about 20 MB; then it is enough


class Trace:
    """Owns the file; close() ends the array. Without a path it does nothing."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError when the file cannot be written."""
        self._threads: dict[str, int] = {}
        self._left = MAX_EVENTS
        try:
            self._file = Path(path).open("w", encoding="ascii") if path else None  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"trace: {path}: cannot be written: {error.strerror}") from None
        if self._file is not None:
            self._file.write('[{"name":"process_name","ph":"M","pid":1,"args":{"name":"edge-agent"}}')

    def span(self, name: str, thread: str, start_ns: int, stop_ns: int) -> None:
        if self._file is None or not self._left:
            return
        self._left -= 1
        if thread not in self._threads:
            self._threads[thread] = len(self._threads) + 1
            self._write({"name": "thread_name", "ph": "M", "tid": self._threads[thread], "args": {"name": thread}})
        times = {"ts": start_ns / 1000, "dur": max(0, stop_ns - start_ns) / 1000}  # microseconds
        self._write({"name": name, "ph": "X", "tid": self._threads[thread], **times})

    def _write(self, event: dict) -> None:
        self._file.write(",\n" + json.dumps(event | {"pid": 1}))

    def close(self) -> None:
        if self._file is not None:
            self._file.write("]\n")
            self._file.close()
            self._file = None
