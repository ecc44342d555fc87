"""What the bridge says: lines for the log, and STATUSTEXT for the pilot. The same thing is not said again and again.

>>> [part[:8] for part in chunks("x" * 60)]
['xxxxxxxx', 'xxxxxxxx']
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from edge_agent.mavlink.dialect import mavlink
from edge_agent.time_units import NS_PER_S

CHUNK = 50  # bytes of text in one STATUSTEXT
MAX_CHUNKS = 3
AGAIN_NS = 5 * NS_PER_S  # the same topic, with the same or another text
MAX_TOPICS = 100
MAX_TEXT = 300
# Topic -> severity of its STATUSTEXT. Topics that are not here go to the log alone.
SEVERITIES = {
    "hold": mavlink.MAV_SEVERITY_WARNING,
    "silent": mavlink.MAV_SEVERITY_WARNING,
    "follow": mavlink.MAV_SEVERITY_INFO,
    "land": mavlink.MAV_SEVERITY_NOTICE,
    "land ack": mavlink.MAV_SEVERITY_NOTICE,
}


class Words:
    """When each topic was said last."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._said: dict[str, tuple[int, str]] = {}

    def is_due(self, topic: str, text: str) -> bool:
        """Whether to say it now. A new text of a topic waits for one second only."""
        now_ns = self._clock()
        said_ns, before = self._said.get(topic, (None, ""))
        if said_ns is not None and now_ns - said_ns < (AGAIN_NS if text == before else NS_PER_S):
            return False
        if len(self._said) >= MAX_TOPICS:
            self._said.clear()
        self._said[topic] = (now_ns, text)
        return True


def printable(text: str) -> str:
    """One line, whatever an instruction or a daemon says."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_TEXT])


def chunks(text: str) -> list[bytes]:
    """ASCII, because ground stations show nothing else alike; cut to pieces of 50."""
    data = text.encode("ascii", "replace")[: CHUNK * MAX_CHUNKS]
    return [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]


def status_texts(topic: str, text: str, number: int) -> Iterator[Any]:
    """The messages of pymavlink. number: joins the parts of a long text; 1 to 65535."""
    parts = chunks(f"edge-agent {text}")
    for i, part in enumerate(parts):
        yield mavlink.MAVLink_statustext_message(SEVERITIES[topic], part, number if len(parts) > 1 else 0, i)
