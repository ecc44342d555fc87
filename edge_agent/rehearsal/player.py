"""Plays a script on the daemon's own endpoints, in real time: no camera, no model, no process beside this one.

A script calls the methods of a Player. Each message has its rule: what a right controller does with it. Where the
commands of the controller are known, the script waits for what the controller has to do (`fly`, `hold`), so that a slow
machine changes nothing. Otherwise it waits for a fixed time.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.errors import UserError
from edge_agent.rehearsal.control import ANSWER, ControlState
from edge_agent.rehearsal.judge import is_done
from edge_agent.rehearsal.records import HOLD, Command, Due, Event, Note, Sent, Value, keys_of
from edge_agent.supervisor.publisher import Publisher
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.codec import encode
from edge_agent.wire.control import Request
from edge_agent.wire.messages import (
    PROTOCOL_VERSION,
    Action,
    DaemonState,
    Refusal,
    RefusalReason,
    StageTimes,
    Status,
    TextMessage,
    WorkerStatus,
)
from edge_agent.wire.streams import STREAMS, pack
from edge_agent.zmtp.frames import pack_message

PATIENCE_S = 10.0  # how long a controller may need for what it has to do
CONNECT_S = 30.0  # and to start and subscribe
SETTLE_S = 0.15  # after a message that has to be discarded: time for a wrong controller to act on it
PERIOD_S = 0.1  # between two actions of a flight
N_UNSEEN = 5  # actions of a flight where the commands are not known
TURN_S = 0.005
STATUS_NS = 200 * NS_PER_MS
AGE_NS = 40 * NS_PER_MS  # of the picture behind an action
VALID_MS = 300
LONG_MS = 900
TRIES = 3  # of what a right controller can miss only if the machine stands still
BUNDLE_ID = "0" * 16

# Action space -> the type that moves the vehicle, its first forward number, and its other values.
SPACES: dict[str, tuple[str, str, int, dict[str, Value]]] = {
    "velocity_body": (
        "move", "forward_m_s", 101, {"right_m_s": 0.05, "down_m_s": -0.02, "yaw_rate_rad_s": 0.03},
    ),
    "waypoint": ("waypoint", "forward_m", 2001, {"right_m": 0.5, "down_m": -0.5, "pace": "slow"}),
}  # fmt: skip

Fields = dict[str, Any]  # an action as the map that goes on the wire


class NoController(UserError):
    """Nobody subscribed to actions. One line."""


class ScriptEnded(Exception):
    """The controller did not do what was due, or has ended: the rest of the script would prove nothing."""


class Player:
    """Owns the endpoints of a runtime folder. close() frees them."""

    def __init__(
        self,
        folder: Path,
        commands: Sequence[Command] | None,
        space: str = "velocity_body",
        patience_s: float | None = None,
        has_ended: Callable[[], bool] = lambda: False,
        report: Callable[[Event], None] = lambda event: None,
    ) -> None:
        """commands: those of the controller, which grow while it runs; None: they are not known. patience_s: how long
        the controller may need for what it has to do; None: PATIENCE_S.

        has_ended: whether the controller has ended. report: is called with each event. Raises EndpointError.
        """
        self.folder, self.space = folder, space
        self.patience_s = PATIENCE_S if patience_s is None else patience_s
        self.has_ended, self.report = has_ended, report
        self.commands: Sequence[Command] = commands if commands is not None else ()
        self.sees_commands = commands is not None
        self.events: list[Event] = []
        self.type, self.forward, first, self.other_values = SPACES[space]
        self._keys = itertools.count(first)
        self.control = ControlState()
        self.answers_requests = True
        self.hangs = False  # it reads nothing and publishes nothing, and its connections stay
        self.state: DaemonState = "running"
        self.valid_until_ns = 0  # of the newest action that may be followed
        self._publisher: Publisher | None = Publisher(folder)
        self._start_session()

    def close(self) -> None:
        if self._publisher is not None:
            self._publisher.close()
        self._publisher = None

    def _start_session(self) -> None:
        assert self._publisher is not None
        self.session = self._publisher.session
        self.seq = dict.fromkeys(STREAMS, 0)  # of the next message
        self.started_ns = time.monotonic_ns()
        self._status_due_ns = 0
        self.refusals: dict[str, int] = {}
        self.n_frames = self.n_actions = 0

    # -- time ---------------------------------------------------------------------------------------------------------

    def wait(self, seconds: float, until: Callable[[], bool] | None = None) -> bool:
        """Serve the endpoints for a time, or until something is so. Whether it is so. Raises ScriptEnded."""
        end_ns = time.monotonic_ns() + round(seconds * NS_PER_S)
        while until is None or not until():
            left_s = (end_ns - time.monotonic_ns()) / NS_PER_S
            if left_s <= 0:
                return False
            if self.has_ended():
                raise ScriptEnded
            self._turn(min(left_s, TURN_S))
        return True

    def wait_for_controller(self) -> None:
        """Until somebody subscribes to actions. Raises ScriptEnded, NoController."""
        assert self._publisher is not None
        actions = self._publisher.endpoints["actions"]
        seconds = CONNECT_S if self.sees_commands else float("1e6")
        if not self.wait(seconds, lambda: actions.n_subscribed > 0):
            where = self.folder / "actions"
            raise NoController(
                f"{where}: nobody subscribed within {CONNECT_S:g} s; start the controller with this folder"
            )

    def _turn(self, seconds: float) -> None:
        if self._publisher is None or self.hangs:
            time.sleep(seconds)
            return
        poll = select.poll()
        for fd in self._publisher.filenos():
            poll.register(fd, select.POLLIN)
        poll.poll(seconds * 1000)
        self._publisher.serve()
        for sender, payload in self._publisher.requests():
            was_paused = self.control.is_paused
            if self.answers_requests:
                now_ns = time.monotonic_ns()
                reply = self.control.answer(payload, now_ns, self._counters(), self._publish_answer)
                self._publisher.reply(sender, reply)
            else:
                self.control.leave_unanswered(payload)
            if self.control.is_paused != was_paused:
                self._status_due_ns = 0
        if self._publisher.has_new_subscriber() or time.monotonic_ns() >= self._status_due_ns:
            self.publish_status()

    # -- what the controller has to do --------------------------------------------------------------------------------

    def fly(self, n: int = 1, text: str = "a valid action", period_s: float = PERIOD_S, **changes: Any) -> None:
        """Publish n valid actions, and more until the controller follows the last one or one after it.

        Raises ScriptEnded.
        """
        since_ns = time.monotonic_ns()
        due = Due(since_ns, "follow", text, len(self.commands), 0)
        end_ns = since_ns + round(self.patience_s * NS_PER_S)
        n = n if self.sees_commands else max(n, N_UNSEEN if period_s <= PERIOD_S else 2)
        while not (self.control.may_stay_still and n <= 0) and time.monotonic_ns() < end_ns:
            keys = keys_of(self.follow(text, **changes))
            n -= 1
            if n > 0:
                self.wait(period_s)
                continue
            due = due._replace(keys=due.keys | keys)
            if self.wait_for(due, period_s) or not self.sees_commands:
                break
        if not self.control.may_stay_still:
            self.demand(due._replace(end=len(self.commands)))

    def hold(self, why: str, since_ns: int | None = None) -> None:
        """Wait until the controller holds. since_ns: from when it has to; None: the expiry of the newest action.

        Raises ScriptEnded.
        """
        begin = len(self.commands)
        since_ns = self.valid_until_ns if since_ns is None else since_ns
        if self.sees_commands:
            self.wait(self.patience_s, self._has_stopped)
        else:
            self.wait(max(0, since_ns - time.monotonic_ns()) / NS_PER_S + 0.5)
        self.demand(Due(since_ns, "hold", why, begin, len(self.commands)))

    def stop_in_flight(self, why: str, publish: Callable[[], object], ends: tuple[str, ...] = (HOLD,)) -> None:
        """Publish a message that ends the movement while an action stands: the controller does not wait for its expiry.

        ends: types of commands that end the movement. Raises ScriptEnded.
        """
        for i in range(TRIES):
            self.fly(text=f"a valid action before {why}", valid_for_ms=LONG_MS)
            before_ns = self.valid_until_ns
            due = Due(time.monotonic_ns(), "hold", why, len(self.commands), 0, before_ns, ends=ends)
            publish()
            self.wait(self.patience_s if self.sees_commands else 0.5, lambda: self._has_stopped(ends))
            due = due._replace(end=len(self.commands))
            if is_done(due, self.commands) or i == TRIES - 1 or not self.sees_commands:
                self.demand(due)
                return

    def refuse_in_flight(self, reason: RefusalReason) -> None:
        """Raises ScriptEnded."""
        self.stop_in_flight(f"a refusal `{reason}`", lambda: self.publish_refusal(reason))

    def wait_for(self, due: Due, seconds: float) -> bool:
        """Wait until the controller has done what is due, or for a time. Whether it has."""
        return self.wait(seconds, lambda: is_done(due._replace(end=len(self.commands)), self.commands))

    def note(self, text: str) -> None:
        self._add(Note(time.monotonic_ns(), text))

    def _has_stopped(self, ends: tuple[str, ...] = (HOLD,)) -> bool:
        return self.sees_commands and (not self.commands or self.commands[-1].type in ends)

    def demand(self, due: Due) -> None:
        """Raises ScriptEnded if the controller has not done it, as far as its commands are known."""
        self._add(due)
        if self.sees_commands and not is_done(due, self.commands):
            raise ScriptEnded

    def _add(self, event: Event) -> None:
        self.events.append(event)
        self.report(event)

    # -- actions ------------------------------------------------------------------------------------------------------

    def follow(
        self, text: str = "a valid action", alter: Callable[[Fields], Fields] = lambda fields: fields, **changes: Any
    ) -> tuple[dict[str, Value], ...]:
        """Publish an action that may be followed; its values and those of its chunk. Nothing while paused.

        alter: makes another map of it. changes: fields with other values.
        """
        if self.control.is_paused:
            return ()
        return self.send("follow", text, alter(self.action(**changes)))

    def discard(self, text: str, fields: Fields | None = None, **changes: Any) -> None:
        """Publish an action that has to be discarded, and give a wrong controller the time to follow it."""
        self.send("discard", text, self.action(**changes) if fields is None else fields)
        self.wait(SETTLE_S)

    def values(self) -> dict[str, Value]:
        """Values that no other action of this script has."""
        return {self.forward: next(self._keys) / 1000, **self.other_values}

    def action(self, n_chunk: int = 0, **changes: Any) -> Fields:
        """A valid action of now. changes: fields with other values; n_chunk: entries of its chunk."""
        now_ns = time.monotonic_ns()
        fields: Fields = self._header("actions", now_ns) | {
            **self._of_frame(now_ns),
            "stages_ms": StageTimes(queue=5.0, encode=10.0, prefill=10.0, decode=14.0, check=1.0),
            "valid_for_ms": VALID_MS,
            "action_space": self.space,
            "type": self.type,
            "values": self.values(),
            "clamped": {},
        }
        fields |= {"chunk": [self.values() for _ in range(n_chunk)]} | changes
        if "valid_until_ns" not in changes:
            fields["valid_until_ns"] = fields["t_pub_ns"] + fields["valid_for_ms"] * NS_PER_MS
        if "seq" in changes or "session" in changes:
            self.seq["actions"] -= 1
        plain: Fields = msgspec.to_builtins(Action(**fields))
        return plain

    def send(
        self, rule: Any, text: str, fields: Fields, topic: bytes = b"A", more: tuple[bytes, ...] = ()
    ) -> tuple[dict[str, Value], ...]:
        """Publish an action as it is. more: further ZeroMQ frames of the same message."""
        steps = (fields.get("values"), *(fields.get("chunk") or ()))
        values = tuple(step for step in steps if isinstance(step, dict))
        self.send_bytes("actions", topic + encode(fields), *more)
        sent = Sent(time.monotonic_ns(), text, rule, str(fields.get("type")), values)
        if rule == "follow":
            sent = sent._replace(
                t_pub_ns=fields["t_pub_ns"],
                valid_until_ns=fields["valid_until_ns"],
                chunk_step_ns=fields["chunk_step_ms"] * NS_PER_MS,
            )
            self.valid_until_ns = sent.valid_until_ns
            self.n_actions += 1
        self._add(sent)
        return values

    def send_bytes(self, stream: str, *frames: bytes) -> None:
        """Send a message to every subscriber of a stream, whatever is in it."""
        if self._publisher is not None:
            self._publisher.endpoints[stream].publish(STREAMS[stream].topic, pack_message(*frames))

    def replay(self, fields: Fields, text: str) -> None:
        """Send the bytes of an action again. Its rule was told when it was sent."""
        self.send_bytes("actions", b"A" + encode(fields))
        self._add(Sent(time.monotonic_ns(), text, "none"))
        self.wait(SETTLE_S)

    # -- other messages -----------------------------------------------------------------------------------------------

    def publish_refusal(self, reason: RefusalReason) -> None:
        now_ns = time.monotonic_ns()
        detail = f"a refusal of the rehearsal: {reason}"
        self._publish("actions", Refusal(**self._header("actions", now_ns), **self._of_frame(now_ns), reason=reason,
                                         detail=detail))  # fmt: skip
        self.refusals[reason] = self.refusals.get(reason, 0) + 1
        self._add(Sent(now_ns, f"refusal `{reason}`", "none"))

    def publish_text(self, lane: Any, text: str, request: str = "", final: bool = True) -> None:
        header = self._header("text", time.monotonic_ns())
        self._publish("text", TextMessage(**header, lane=lane, frame_id=1, text=text, request=request, final=final))

    def publish_status(self) -> None:
        now_ns = time.monotonic_ns()
        self._status_due_ns = now_ns + STATUS_NS
        worker = WorkerStatus(alive=True, pid=None, restarts=0, rss_mib=None)
        state: DaemonState = "paused" if self.control.is_paused and self.state == "running" else self.state
        counters = self._counters() | {"state": state}
        status = Status(
            **self._header("status", now_ns),
            **counters,
            reason="" if state == "running" else "a rehearsal",
            camera="rehearsal",
            camera_worker=worker,
            model_worker=worker,
            last_frame_age_ms=None,
            last_action_age_ms=None,
            vision_backend="rehearsal",
            mem_available_mib=None,
            temperature_c=None,
            paused=self.control.is_paused,
        )
        self._publish("status", status)

    def _publish_answer(self, request: Request) -> None:
        self.publish_text("answer", ANSWER, request=request.id)

    def _publish(self, stream: str, message: Any) -> None:
        self.send_bytes(stream, pack(stream, message))

    def _header(self, stream: str, now_ns: int) -> Fields:
        seq = self.seq[stream]
        self.seq[stream] += 1
        return {
            "v": PROTOCOL_VERSION, "session": self.session, "seq": seq, "t_pub_ns": now_ns, "bundle_id": BUNDLE_ID,
        }  # fmt: skip

    def _of_frame(self, now_ns: int) -> Fields:
        self.n_frames += 1
        return {
            "camera": "rehearsal",
            "frame_id": self.n_frames,
            "t_capture_ns": now_ns - AGE_NS,
            "capture_clock": "driver",
            "age_ms": AGE_NS / NS_PER_MS,
            "instruction": self.control.instruction,
            "dropped_frames": 0,
        }

    def _counters(self) -> dict[str, Any]:
        """The result of `stats`."""
        return {
            "uptime_s": (time.monotonic_ns() - self.started_ns) / NS_PER_S,
            "frames": self.n_frames,
            "frames_dropped": 0,
            "actions": self.n_actions,
            "refusals": self.refusals,
            "faults": {},
            "inference_count": self.n_frames,
            "instruction": self.control.instruction,
            "adapter": "",
            "state": "paused" if self.control.is_paused else "running",
        }

    # -- the end of the daemon ----------------------------------------------------------------------------------------

    def die(self, text: str, last_bytes: bytes = b"") -> None:
        """End as a process that is killed does: every connection ends, the paths stay and nobody listens there.

        last_bytes: what is sent to the subscribers of actions before, for example half a message.
        """
        assert self._publisher is not None
        if last_bytes:
            self._publisher.endpoints["actions"].publish(b"A", last_bytes)
        self.close()
        for stream in STREAMS:
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as dead:
                dead.bind(str(self.folder / stream))
        self._add(Sent(time.monotonic_ns(), text, "none"))

    def stop(self) -> None:
        """End as the daemon does after SIGTERM: a last status, and the paths are removed."""
        self.state = "stopping"
        self.publish_status()
        self.close()
        self.state = "running"
        self._add(Sent(time.monotonic_ns(), "the daemon stops", "none"))

    def start_again(self) -> None:
        """A new daemon in the same folder: a new session, seq from 0, the configured instruction, paused if it was."""
        self._publisher = Publisher(self.folder)
        is_paused, self.control = self.control.is_paused, ControlState()
        self.control.is_paused = is_paused
        self._start_session()
        self._add(Sent(time.monotonic_ns(), "the daemon has started again: a new session", "none"))
