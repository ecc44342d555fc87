"""Sends the vehicle's state to the daemon from a thread of its own: control that does not answer delays no setpoint.

Newest values only. What the daemon did not take because it did not answer is sent with the next values, unless a newer
value of the same key has come. It also reads the daemon's status, which says why there are no actions.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from edge_agent.client import Client, RequestRefused

PERIOD_S = 0.1  # at most so often
RETRY_S = 1.0  # after the daemon did not answer
NO_STATUS_S = 1.5  # the daemon publishes one five times a second
UNWANTED_S = 5.0  # after it took none of the values: it may be started again with another action space

Values = dict[str, float | str | None]


class StatePush:
    """Owns a thread and a Client; close() ends both."""

    def __init__(self, folder: str, say: Callable[[str, str], None]) -> None:
        """say: topic and text, for the log; called from the thread."""
        self._folder, self._say = folder, say
        self._values: Values = {}  # not sent yet
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._refused: dict[str, str] = {}  # key -> why, said once
        self._status_s = time.monotonic()
        self.daemon_state = ""  # read by the loop: why the daemon sends no actions, by its own status; "": running
        self._thread = threading.Thread(target=self._run, name="vehicle state", daemon=True)
        self._thread.start()

    def put(self, values: Values) -> None:
        with self._lock:
            self._values |= values

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=1.0)  # a thread that waits for a reply ends with the process

    def _run(self) -> None:
        with Client(self._folder) as agent:
            pause_s = PERIOD_S
            while not self._closing.wait(pause_s):
                with self._lock:
                    values, self._values = self._values, {}
                pause_s = self._turn(agent, values)

    def _read_status(self, agent: Client) -> None:
        status = agent.status(0.0)
        if status is not None:
            self._status_s = time.monotonic()
            self.daemon_state = f"{status.state} {status.reason}".strip() if status.state != "running" else ""
        elif time.monotonic() - self._status_s > NO_STATUS_S:
            self.daemon_state = "does not answer"

    def _turn(self, agent: Client, values: Values) -> float:
        """Returns the seconds until the next one."""
        try:
            self._read_status(agent)
            refused = agent.vehicle_state(**values) if values else {}
        except TimeoutError as error:
            self._say("state", str(error))
            with self._lock:
                self._values = values | self._values
            return RETRY_S
        except RequestRefused as error:
            self._say("state", f"vehicle state refused: {error}")
            return UNWANTED_S
        for key, why in refused.items():
            if self._refused.get(key) != why:
                self._refused[key] = why
                self._say(f"state {key}", f"vehicle state {key} refused: {why}")
        return UNWANTED_S if refused and len(refused) == len(values) else PERIOD_S
