"""Requests to the daemon that may take long, each with a client of its own, so that nothing else waits for them."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from edge_agent.client import Client, RequestRefused
from edge_agent.wire.control import Operation

# Operation -> how long its reply is waited for.
TIMEOUTS_S: dict[Operation, float] = {"instruct": 30.0, "ask": 90.0, "pause": 5.0, "resume": 5.0}
ENDED_POLL_S = 0.1


class Outcome(NamedTuple):
    is_done: bool  # the daemon has carried it out
    line: str  # the reason, if it has not
    result: dict[str, Any]


def request(folder: str, op: Operation, text: str, has_ended: threading.Event) -> Outcome:
    """Waits for the reply, but not longer than until has_ended: the thread behind it ends with the process."""
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(_request(folder, op, text)), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(ENDED_POLL_S)
        if has_ended.is_set() and thread.is_alive():
            return Outcome(False, f"{op}: the node ends; it is unknown whether it was carried out", {})
    return outcomes[0]


def _request(folder: str, op: Operation, text: str) -> Outcome:
    try:
        with Client(folder) as client:
            return Outcome(True, "", client.request(op, text, TIMEOUTS_S[op]))
    except (RequestRefused, TimeoutError) as error:
        return Outcome(False, str(error), {})
