"""The loop of edge-agent mavlink: the daemon's actions and the autopilot's telemetry in, setpoints out.

One thread decides and sends. The vehicle's state goes to the daemon from a second one. The loop itself sends our
HEARTBEAT and feeds the watchdog: a loop that hangs is silent.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from edge_agent.client import Client, NotConnected
from edge_agent.mavlink.autopilot import Autopilot, Heard
from edge_agent.mavlink.config import BridgeConfig
from edge_agent.mavlink.dialect import mavlink
from edge_agent.mavlink.follower import Follower
from edge_agent.mavlink.setpoint import Setpoint, encode, line
from edge_agent.mavlink.state_push import StatePush
from edge_agent.mavlink.telemetry import Requests, VehicleState, land_command
from edge_agent.mavlink.words import SEVERITIES, Words, printable, status_texts
from edge_agent.suspend import SuspendDetector
from edge_agent.systemd import Watchdog, notify
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.messages import Action, Refusal

MAX_WAIT_NS = 50 * NS_PER_MS  # what only becomes old is noticed after this at the latest
HEARTBEAT_NS = 1 * NS_PER_S
COUNTS_NS = 60 * NS_PER_S  # how often the counters go to the log
ACCEPTED = mavlink.MAV_RESULT_ACCEPTED, mavlink.MAV_RESULT_IN_PROGRESS


class Wire(Protocol):
    """Where messages go to and come from: a Link, or dry_run's."""

    counts: Counter[str]

    @property
    def why_lost(self) -> str: ...
    @property
    def fixed_peer(self) -> tuple[str, int] | None: ...
    @property
    def is_open(self) -> bool: ...
    @property
    def is_behind(self) -> bool: ...
    def descriptors(self) -> tuple[int, ...]: ...
    def open_if_due(self) -> bool: ...
    def receive(self) -> list[Heard]: ...
    def reopen(self, why: str) -> None: ...
    def send(
        self, message: Any, peer: tuple[str, int] | None, can_wait: bool = False, until_ns: int | None = None, /
    ) -> bool: ...
    def close(self) -> None: ...


class Log:
    """Lines on stderr; with as_json each is one object."""

    def __init__(self, as_json: bool = False) -> None:
        self._as_json, self._lock = as_json, threading.Lock()

    def write(self, topic: str, text: str, **fields: object) -> None:
        if self._as_json:
            out = json.dumps({"t_ns": time.monotonic_ns(), "topic": topic, "text": text, **fields})
        else:
            out = f"edge-agent mavlink: {text}"
        with self._lock, contextlib.suppress(OSError):  # a log that nobody reads ends no flight
            print(out, file=sys.stderr, flush=True)


class Bridge:
    """Owns nothing that it was not given, except the thread that pushes the state; close() ends it."""

    def __init__(
        self,
        config: BridgeConfig,
        agent: Client,
        wire: Wire,
        autopilot: Autopilot,
        log: Log,
        clock: Callable[[], int] = time.monotonic_ns,
        print_sent: bool = False,
    ) -> None:
        """print_sent: one line on stdout for each setpoint, as edge-agent rehearse reads it."""
        self._print_sent = print_sent
        self._config, self._agent, self._wire, self._autopilot = config, agent, wire, autopilot
        self._log, self._clock = log, clock
        self._words, self._push_words = Words(clock), Words(clock)
        self._suspend, self._resumed_ns = SuspendDetector(clock), 0
        self.follower = Follower(config, autopilot, agent.is_valid, self, clock)
        self._push = StatePush(config.runtime_dir, self._say_from_push)
        self._state, self._requests = VehicleState(), Requests()
        self._counts_ns = clock()
        self._heartbeat_ns = clock() - HEARTBEAT_NS  # the first one at once: an autopilot may wait for it
        self._answer: Action | Refusal | None = None  # read, and waits until all of the telemetry is read
        self._n_texts, self._daemon_state = 0, ""
        self._logged_counts: dict[str, int] = {}

    # -- the loop -----------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """One turn: wait, read both sides, do what is due."""
        self._wait()
        self._note_suspend()
        if self._wire.open_if_due():
            self.say("link", "link open")
        # Read before the link: what the autopilot said before this answer was published is known before it is used.
        self._answer = self._read_answer() or self._answer
        was_open = self._wire.is_open
        for heard in self._wire.receive():
            self._autopilot.take(heard, self._clock())
        if not self._wire.is_open:
            self.say("link", f"link lost: {self._wire.why_lost}")
            if was_open:
                self._autopilot.forget()
        if isinstance(self._answer, Refusal):
            self._take_answer()
        # Before a new action: it does not take up what telemetry or time has ended.
        self.follower.turn(may_follow=not self._wire.is_behind)
        if not self._wire.is_behind:
            self._take_answer()
        self._tell_daemon()
        self._tell_autopilot()
        self._log_counts()

    def _take_answer(self) -> None:
        if self._answer is not None:
            answer, self._answer = self._answer, None
            self.follower.take(answer)

    def _wait(self) -> None:
        now_ns = self._clock()
        due_ns = self.follower.due_ns()
        wait_ns = MAX_WAIT_NS if due_ns is None else min(max(0, due_ns - now_ns), MAX_WAIT_NS)
        try:
            self._agent.wait_for_answer(wait_ns / NS_PER_S, *self._wire.descriptors())
        except NotConnected as error:
            self.say("daemon", str(error))
            time.sleep(wait_ns / NS_PER_S)

    def _note_suspend(self) -> None:
        resumed_ns = self._suspend.resumed_ns()
        if resumed_ns != self._resumed_ns:
            self._resumed_ns = resumed_ns
            self._wire.reopen("the machine was suspended")
            self._autopilot.forget()
            self.follower.forget("the machine was suspended")

    def _read_answer(self) -> Action | Refusal | None:
        try:
            return self._agent.next_answer(0.0)
        except NotConnected as error:
            self.say("daemon", str(error))
            return None

    def _tell_daemon(self) -> None:
        self._push.put(self._state.changes(self._autopilot, self._clock()))
        if self._push.daemon_state != self._daemon_state:
            self._daemon_state = self._push.daemon_state
            self.say("daemon", f"daemon {self._daemon_state or 'running'}")
            if self._daemon_state.startswith("stopping"):
                self.follower.end("the daemon stops")

    def _tell_autopilot(self) -> None:
        now_ns = self._clock()
        if (request := self._requests.due(self._autopilot, now_ns)) is not None:
            self._wire.send(request, self._autopilot.peer, True)
        while self._autopilot.acks:
            command, result = self._autopilot.acks.popleft()
            if command == mavlink.MAV_CMD_NAV_LAND:
                verdict = "accepted" if result in ACCEPTED else "refused"
                self.say("land ack", f"landing {verdict} by the autopilot, result {result}")
        if now_ns - self._heartbeat_ns >= HEARTBEAT_NS:
            self._heartbeat_ns = now_ns
            self._wire.send(self._heartbeat(), self._autopilot.peer, True)

    def _heartbeat(self) -> Any:
        """An onboard controller, never a ground station: its heartbeat must not count as a pilot's."""
        state = mavlink.MAV_STATE_STANDBY
        if self.follower.is_following:
            state = mavlink.MAV_STATE_ACTIVE
        elif self.follower.is_holding:
            state = mavlink.MAV_STATE_CRITICAL
        return mavlink.MAVLink_heartbeat_message(
            mavlink.MAV_TYPE_ONBOARD_CONTROLLER, mavlink.MAV_AUTOPILOT_INVALID, 0, 0, state, 3
        )

    def counts(self) -> dict[str, int]:
        return dict(self.follower.counts + self._autopilot.counts + self._wire.counts)

    def _log_counts(self, now: bool = False) -> None:
        now_ns, counts = self._clock(), self.counts()
        if (now or now_ns - self._counts_ns >= COUNTS_NS) and counts != self._logged_counts:
            self._counts_ns, self._logged_counts = now_ns, counts
            text = ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))
            self._log.write("counts", f"counts: {text}", counts=counts)

    def close(self) -> None:
        self._log_counts(now=True)
        self._push.close()

    # -- the follower's outbox ----------------------------------------------------------------------------------------

    def send(self, setpoint: Setpoint, now_ns: int, until_ns: int | None = None) -> bool:
        message = encode(setpoint, now_ns, self._autopilot.system, self._autopilot.component)
        is_sent = self._wire.send(message, self._autopilot.peer, False, until_ns)
        if self._print_sent and is_sent:
            print(f"@{now_ns} {line(setpoint)}", flush=True)
        return is_sent

    def land(self, now_ns: int, until_ns: int) -> bool:
        is_sent = self._wire.send(land_command(self._autopilot), self._autopilot.peer, False, until_ns)
        if self._print_sent and is_sent:
            print(f"@{now_ns} land", flush=True)
        return is_sent

    def say(self, topic: str, text: str) -> None:
        """To the log, and what a pilot must know to the autopilot too."""
        if not self._words.is_due(topic, text):
            return
        if topic in ("hold", "silent") and self._push.daemon_state:
            text = f"{text}; daemon {self._push.daemon_state}"
        text = printable(text)
        self._log.write(topic, text)
        if topic in SEVERITIES:
            self._n_texts = self._n_texts % 65_535 + 1
            for message in status_texts(topic, text, self._n_texts):
                self._wire.send(message, self._autopilot.peer, True)

    def _say_from_push(self, topic: str, text: str) -> None:
        if self._push_words.is_due(topic, text):
            self._log.write(topic, printable(text))


def run(config: BridgeConfig, wire: Wire, as_json: bool, print_sent: bool = False) -> int:
    """Until SIGTERM or Ctrl-C. Then one hold, if an action is followed, and nothing more: silence is what the
    autopilot's fail-safe needs."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    autopilot = Autopilot(config.target_system, config.target_component, config.autopilot, config.home, wire.fixed_peer)
    watchdog, n_turns = Watchdog(), 0
    with Client(config.runtime_dir) as agent:
        bridge = Bridge(config, agent, wire, autopilot, Log(as_json), print_sent=print_sent)
        notify("READY=1")
        try:
            while not stop.is_set():
                bridge.turn()
                n_turns += 1
                watchdog.feed(n_turns)
        finally:
            bridge.follower.end("the bridge stops")
            notify("STOPPING=1")
            bridge.close()
            wire.close()
    return 0
