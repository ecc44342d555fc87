"""Where the lanes send what is not their result: text as it is decoded, and spans of a timeline."""

from __future__ import annotations

from collections.abc import Callable

from edge_agent.ipc.events import ModelEvent, TextDelta, TraceSpan


class Events:
    """Passed to each call that emits something. Owns nothing."""

    def __init__(self, send: Callable[[ModelEvent], None], *, trace: bool = False) -> None:
        """trace: also send spans."""
        self.send, self._trace = send, trace

    def text(self, delta: TextDelta) -> None:
        self.send(delta)

    def span(self, name: str, thread: str, start_ns: int, stop_ns: int) -> None:
        """For the timeline: what was done, by which thread or resource, from when to when (CLOCK_MONOTONIC)."""
        if self._trace:
            self.send(TraceSpan(name=name, thread=thread, start_ns=start_ns, stop_ns=stop_ns))


NULL_EVENTS = Events(lambda event: None)
