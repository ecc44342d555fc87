"""Runs an autopilot in a thread: waits for its ports, carries messages, flies, and keeps what arrived.

with Driver(Autopilot(PX4, PointMass(5.0), time.monotonic_ns), [UdpListener(14540)]) as driver:
    driver.wait(lambda: driver.setpoints)
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from models.autopilot.autopilot import NS_PER_S, Autopilot
from models.autopilot.link import Link, Received
from models.autopilot.ports import Port

STEP_S = 0.01
HANG_S = 60.0  # bounds a hang, not a duration


class Driver:
    """Owns the ports and the thread; close() or a with block ends them. Change the autopilot under `lock`."""

    def __init__(self, autopilot: Autopilot, ports: Sequence[Port]) -> None:
        self.autopilot = autopilot
        self.links = [Link(autopilot, port, time.monotonic_ns) for port in ports]
        self.received: list[Received] = []
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._ends = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        self._ends = True
        self._thread.join(HANG_S)
        for link in self.links:
            link.port.close()
        if self._error is not None:
            raise self._error

    @property
    def setpoints(self) -> list[Received]:
        """Every setpoint so far, of any kind."""
        with self.lock:
            return [item for item in self.received if item.type.startswith("SET_")]

    def happens(self, condition: Callable[[], Any], timeout_s: float) -> bool:
        """Wait until condition() is true. False: it was not within timeout_s."""
        with self._changed:
            is_true = self._changed.wait_for(lambda: self._error or condition(), timeout_s)
            if self._error is not None:
                raise self._error
            return bool(is_true)

    def wait(self, condition: Callable[[], Any], timeout_s: float = HANG_S) -> None:
        """Wait until condition() is true. Raises AssertionError after timeout_s."""
        assert self.happens(condition, timeout_s), f"did not happen in {timeout_s:g} s"

    def _run(self) -> None:
        try:
            while not self._ends:
                self._turn()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _turn(self) -> None:
        with self.lock:
            filenos = [fd for link in self.links for fd in link.port.filenos()]
            due_s = (min(link.next_due_ns for link in self.links) - time.monotonic_ns()) / NS_PER_S
        with contextlib.suppress(OSError):  # a port that a test has closed meanwhile
            select.select(filenos, [], [], min(STEP_S, max(0.0, due_s)))
        with self._changed:
            arrived = [(link, item) for link in self.links for item in link.receive()]
            self.received += [item for _, item in arrived]
            self.autopilot.step()
            for link in self.links:
                for origin, item in arrived:
                    if origin is not link and not getattr(item.message, "target_system", 0):
                        link.forward(item.message)
                for text in self.autopilot.texts:
                    link.send(text)
                link.send_due()
            self.autopilot.texts.clear()
            self._changed.notify_all()
