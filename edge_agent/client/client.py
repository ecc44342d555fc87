"""What a controller imports: valid actions, text, status, and control. Loads msgspec and pyzmq, nothing else.

    with Client() as agent:
        for action in agent.actions(silence_s=0.5):
            if action is None:
                hold()                      # no valid action for half a second
            elif action.type == "move":
                fly(action.values["forward_m_s"], action.values["right_m_s"])

Silence means hold: stop, or keep the position; never repeat the last command. The client never returns an action
after its expiry, never returns an action twice, and never returns an action whose time stamps are not from the clock
of this machine, that was published before a suspend, or before the reply to pause(), instruct() or adapter().
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import msgspec
import zmq

from edge_agent.client.control_connection import ControlConnection
from edge_agent.client.received import MAX_RECEIVED_BYTES, is_of_this_clock, only_frame, unpack_or_none
from edge_agent.client.values import plain_value
from edge_agent.suspend import Clock, SuspendDetector
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.codec import encode
from edge_agent.wire.control import Operation, Request, StateValue, decode_reply
from edge_agent.wire.endpoints import endpoint, is_listening, runtime_dir, why_unreachable
from edge_agent.wire.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Action,
    Refusal,
    Status,
    TextMessage,
)
from edge_agent.wire.streams import STREAMS

CONTROL = "control"
MAX_SKIPPED_MESSAGES = 2000  # read at once to find the newest; more than a socket's queue holds
MAX_ENDED_SESSIONS = 1000  # remembered, so that none of their messages is returned
POLL_S = 1.0  # one wait of an iterator that has no time-out
REPLY_S = 5.0  # time-out of requests that the daemon answers at once
CONNECT_S = 2.0  # to connect to a socket of this machine takes no time: after this, nobody is there
CANCEL_LINGER_MS = 100  # it is in the daemon's socket within a millisecond, if the daemon lives
MAX_TIMEOUT_S = 2_000_000.0  # 23 days: what poll() can wait in milliseconds


class RequestRefused(Exception):
    """The daemon refused a request. One line: the reason."""


class NotConnected(TimeoutError):
    """No daemon can be reached. One line: no folder, no permission, or nobody answers there."""


class ConnectionEnded(TimeoutError):
    """A request was sent, and the daemon ended before it replied. One line. Whether it was carried out is unknown."""


class Client:
    """Owns its sockets; close() or a with block frees them. Use one client per thread and per process."""

    def __init__(
        self, folder: str = "", clock: Clock = time.monotonic_ns, suspend: SuspendDetector | None = None
    ) -> None:
        """folder: the daemon's runtime folder; empty: the default folder of a daemon on this machine.

        clock: CLOCK_MONOTONIC in nanoseconds, the clock of the daemon's time stamps. suspend: notices that the machine
        slept.
        """
        self.folder = runtime_dir(folder)
        self._pid = os.getpid()
        self._suspend = suspend or SuspendDetector(clock)
        self._is_closed = False
        self._valid_from_ns = 0  # an action published before this is not returned
        self.expired = 0  # actions that arrived after their expiry, or with stamps of another clock; not returned
        # Gaps in seq on the actions stream: messages that were lost, and messages that were skipped because a newer one
        # had arrived too. A controller that reads slowly skips many; that is no fault.
        self.missed = 0
        self._clock = clock
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}  # stream -> its socket, opened at first use
        self._connections: dict[str, ControlConnection] = {}  # CONTROL, or the id of a question -> its connection
        self._newest: tuple[int, int] | None = None  # session and seq of the newest message of the actions stream
        self._ended = (0, 0)  # session and seq of the newest refusal or expired action: it ends the actions before it
        self._ended_sessions: deque[int] = deque(maxlen=MAX_ENDED_SESSIONS)

    def close(self) -> None:
        self._is_closed = True
        if os.getpid() != self._pid:  # after fork(): the sockets belong to the other process
            self._sockets.clear()
            self._connections.clear()
            return
        for socket in self._sockets.values():
            socket.close()
        for connection in self._connections.values():
            connection.close()
        self._sockets.clear()
        self._connections.clear()
        self._context.term()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    # -- streams ------------------------------------------------------------------------------------------------------

    def next_answer(self, timeout_s: float) -> Action | Refusal | None:
        """The newest message of the actions stream, if it is new and valid; None: none came within timeout_s."""
        deadline_ns = self._deadline_ns(timeout_s)
        while payloads := self._receive("actions", deadline_ns):
            answer = self._newest_of(payloads)
            if isinstance(answer, Action) and self.is_valid(answer):
                return answer
            if answer is not None:  # no action from before it is followed any more
                self._ended = (answer.session, answer.seq)
                if isinstance(answer, Refusal):
                    return answer
                self.expired += 1
            if self._is_over(deadline_ns):
                break
        return None

    def actions(self, silence_s: float | None = None) -> Iterator[Action | None]:
        """Valid actions, newest first, without end.

        With silence_s: also None, each time that silence_s has passed without a valid action. Refusals and expired
        actions do not end a silence.
        """
        silence_ends_ns = None if silence_s is None else self._deadline_ns(silence_s)
        while True:
            if silence_ends_ns is None:
                answer = self.next_answer(POLL_S)
            else:
                answer = self.next_answer(max(0, silence_ends_ns - self._clock()) / NS_PER_S)
            if isinstance(answer, Action):
                yield answer
            elif silence_ends_ns is not None and (answer is None or self._clock() >= silence_ends_ns):
                yield None
            else:
                continue
            silence_ends_ns = None if silence_s is None else self._deadline_ns(silence_s)

    def wait_for_answer(self, timeout_s: float, *descriptors: int) -> None:
        """Wait until a message of the actions stream arrives, a file descriptor can be read, or timeout_s has passed.

        For a loop that serves another connection too; next_answer(0) then reads the message."""
        deadline_ns = self._deadline_ns(timeout_s)
        poller = zmq.Poller()
        for source in (self._subscriber("actions"), *descriptors):
            poller.register(source, zmq.POLLIN)
        poller.poll(self._left_ms(deadline_ns))

    def next_text(self, timeout_s: float) -> TextMessage | None:
        """The next piece of text, in the order of publication; None: none came within timeout_s."""
        message: TextMessage | None = self._next("text", timeout_s)
        return message

    def text(self) -> Iterator[TextMessage]:
        """Every piece of text as the model decodes it, without end."""
        while True:
            message = self.next_text(POLL_S)
            if message is not None:
                yield message

    def status(self, timeout_s: float = 2.0) -> Status | None:
        """The newest status; None: no daemon published one within timeout_s."""
        message: Status | None = self._next("status", timeout_s)
        return message

    def is_valid(self, action: Action) -> bool:
        """Whether a controller may still act on an action: it has not expired, and nothing has ended it before: a newer
        refusal, a newer action that had expired when it was read, the next session."""
        session, seq = self._ended
        if action.session in self._ended_sessions or (action.session == session and action.seq < seq):
            return False
        is_current = action.t_pub_ns > max(self._valid_from_ns, self._suspend.resumed_ns())
        return is_current and is_valid(action, self._clock())

    # -- control ------------------------------------------------------------------------------------------------------

    def instruct(self, text: str, timeout_s: float = 30.0) -> None:
        """Give a new instruction. Returns when the model has taken it; the next frame is answered under it.

        Raises RequestRefused, and TimeoutError if no reply came in time.
        """
        self.request("instruct", text, timeout_s)

    def adapter(self, name: str, timeout_s: float = 30.0) -> None:
        """Switch to one of the configured adapters; "": to none. Raises RequestRefused, TimeoutError."""
        self.request("adapter", name, timeout_s)

    def ask(self, question: str, timeout_s: float = 90.0) -> str:
        """The model's answer to a question about the newest frame. Raises RequestRefused, TimeoutError."""
        return str(self.request("ask", question, timeout_s)["text"])

    def ask_stream(self, question: str, timeout_s: float = 90.0) -> Iterator[str]:
        """The same, piece by piece as the model decodes it. The pieces together are the answer.

        If a piece was lost, the last one is a line feed and the whole answer. Raises RequestRefused, TimeoutError.
        """
        deadline_ns = self._deadline_ns(timeout_s)
        text_socket, received = self._subscriber("text"), ""
        request_id = os.urandom(8).hex()  # and a connection of its own: other requests may be made between two pieces
        control = self._send(request_id, "ask", question, timeout_s, connection=request_id)
        with self._waiting_for("ask", request_id, request_id):
            while control.poll(self._left_ms(deadline_ns), text_socket):
                if (reply := self._reply_to(request_id, control)) is not None:
                    whole = str(reply["text"])  # with the pieces that are lost, or still in the socket
                    agree = whole.startswith(received) or received.startswith(whole)  # a reply is cut at its limit
                    yield whole[len(received) :] if agree else f"\n{whole}"
                    return
                piece = self.next_text(0.0)
                if piece is not None and (piece.request, piece.lane) == (request_id, "answer"):
                    received += piece.text
                    yield piece.text
                if self._is_over(deadline_ns):
                    break
            raise self._no_reply("ask", timeout_s, control)

    def vehicle_state(self, /, **values: object) -> dict[str, str]:
        """Send values of the vehicle's state to the model, by the keys of the action space's vehicle_state.

        Call it whenever a value changes. The newest value of a key is part of the next prompt, until it is older than
        the action space allows. None and NaN mean "unknown". Numbers of numpy and the like are taken.

        Returns key -> why its value was not taken; all other values were. Raises RequestRefused, TimeoutError.
        """
        plain: dict[str, StateValue | None] = {}
        refused: dict[str, str] = {}
        for key, value in values.items():
            try:
                plain[key.encode().decode()] = plain_value(value)
            except ValueError as error:
                refused[key] = str(error)
        if plain or not values:
            refused |= self.request("vehicle_state", "", REPLY_S, values=plain).get("refused", {})
        return refused

    def pause(self, timeout_s: float = REPLY_S) -> None:
        """After it returns, no action is published, and none that was published before is returned.

        The daemon stays paused until resume(), also if it dies and is restarted. Raises TimeoutError; RequestRefused if
        it is paused, but a restarted daemon would not be.
        """
        self.request("pause", "", timeout_s)

    def resume(self, timeout_s: float = REPLY_S) -> None:
        """Publish actions again. Raises RequestRefused, TimeoutError."""
        self.request("resume", "", timeout_s)

    def stats(self, timeout_s: float = REPLY_S) -> dict[str, Any]:
        """The daemon's counters (PROTOCOL.md lists them). Raises RequestRefused, TimeoutError."""
        return self.request("stats", "", timeout_s)

    def request(
        self,
        op: Operation,
        text: str,
        timeout_s: float,
        request_id: str = "",
        values: dict[str, StateValue | None] | None = None,
    ) -> dict[str, Any]:
        """Any operation; returns the result of the reply. Raises RequestRefused, TimeoutError.

        After a TimeoutError the daemon does not carry out a request that it has not read yet, except pause and cancel.
        request_id: empty: a random one.
        """
        ends_older_actions = op == "pause"  # whatever comes of it
        try:
            deadline_ns = self._deadline_ns(timeout_s)
            request_id = request_id or os.urandom(8).hex()
            control = self._send(request_id, op, text, timeout_s, values)
            with self._waiting_for(op, request_id):
                while control.poll(self._left_ms(deadline_ns)):
                    if (result := self._reply_to(request_id, control)) is not None:
                        ends_older_actions |= op in ("instruct", "adapter")
                        return result
                    if self._is_over(deadline_ns):
                        break
                raise self._no_reply(op, timeout_s, control)
        finally:
            if ends_older_actions:
                self._valid_from_ns = self._clock()

    def _send(
        self,
        request_id: str,
        op: Operation,
        text: str,
        timeout_s: float,
        values: dict[str, StateValue | None] | None = None,
        connection: str = CONTROL,
    ) -> ControlConnection:
        """Send to a daemon that is connected: a request must not wait in a queue and be carried out later.

        Returns the connection. Raises RequestRefused, TimeoutError.
        """
        deadline_ns = self._deadline_ns(timeout_s)
        request = Request(
            v=PROTOCOL_VERSION, id=request_id, op=op, text=text, values=values or {}, expires_ns=deadline_ns
        )
        try:
            payload = encode(request)
        except UnicodeEncodeError as error:
            raise RequestRefused(f"text: {error.reason}; expected Unicode") from None
        if len(payload) > MAX_MESSAGE_BYTES:  # the daemon would end the connection without a reply
            raise RequestRefused(f"{op}: expected a request of at most {MAX_MESSAGE_BYTES} bytes; found {len(payload)}")
        control = self._control(connection)
        if control.has_ended:  # since the request before: the daemon was restarted
            self._disconnect(connection)
            control = self._control(connection)
        connect_ms = self._left_ms(min(deadline_ns, self._deadline_ns(CONNECT_S)))
        if not control.is_connected_within(connect_ms):
            raise self._not_connected(op, connection)
        self._check_reachable(CONTROL)
        control.socket.send(payload, zmq.NOBLOCK)
        return control

    @contextlib.contextmanager
    def _waiting_for(self, op: str, request_id: str, connection: str = CONTROL) -> Iterator[None]:
        """Close the connection when the reply is not waited for any longer: after a time-out, Ctrl-C, or the end of an
        iterator. The daemon is told that nobody needs the answer to a question, so that the next one need not wait."""
        try:
            yield
        except RequestRefused:
            raise
        except ConnectionEnded:
            self._disconnect(connection)
            raise
        except BaseException:
            if op == "ask" and connection in self._connections and os.getpid() == self._pid:
                cancel = Request(v=PROTOCOL_VERSION, id=os.urandom(8).hex(), op="cancel", text=request_id)
                with contextlib.suppress(zmq.Again):
                    self._connections[connection].socket.send(encode(cancel), zmq.NOBLOCK)
            self._disconnect(connection, CANCEL_LINGER_MS if op == "ask" else 0)
            raise
        finally:
            if connection != CONTROL:
                self._disconnect(connection)

    def _disconnect(self, connection: str, linger_ms: int = 0) -> None:
        """Close a connection, if it is there and of this process."""
        control = self._connections.pop(connection, None)
        if control is not None and os.getpid() == self._pid:
            control.close(linger_ms)

    def _not_connected(self, op: str, connection: str) -> NotConnected:
        """The error to raise. Closes the socket, and with it drops what has not been sent."""
        self._disconnect(connection)
        where = self.folder / CONTROL
        if is_listening(where):
            return NotConnected(f"{where}: edge-agent does not answer, {op} was not sent; it is stopped or hangs")
        return NotConnected(f"{where}: nobody answers there, {op} was not sent; is edge-agent running?")

    def _no_reply(self, op: str, timeout_s: float, control: ControlConnection) -> TimeoutError:
        where = self.folder / CONTROL
        if control.has_ended:
            unknown = "no reply comes; it is unknown whether it was carried out"
            return ConnectionEnded(f"{where}: the connection ended after {op} was sent: {unknown}")
        return TimeoutError(f"{where}: edge-agent did not reply to {op} in {timeout_s:g} s; its status says why")

    def _reply_to(self, request_id: str, control: ControlConnection) -> dict[str, Any] | None:
        """The result in the waiting reply; None: there is none, or one to another request, which has timed out here."""
        try:
            reply = decode_reply(control.socket.recv(zmq.NOBLOCK))
        except (msgspec.DecodeError, zmq.Again):
            return None
        if reply.id != request_id:
            return None
        if not reply.ok:
            raise RequestRefused(reply.error)
        result: dict[str, Any] = reply.result
        return result

    # -- sockets ------------------------------------------------------------------------------------------------------

    def _check_reachable(self, stream: str) -> None:
        """Raises NotConnected where this user may not connect, or another user could answer.

        Asked before a connection is made and whenever something was received: libzmq connects to whatever is at the
        path, also to what is made there later."""
        if why := why_unreachable(self.folder, stream):
            raise NotConnected(why)

    def _check_usable(self) -> None:
        """Raises RuntimeError after close(), and after fork(): libzmq has no threads in this process, and nothing
        would ever arrive."""
        if os.getpid() != self._pid:
            raise RuntimeError(f"this Client was made in process {self._pid}; make one in process {os.getpid()}")
        if self._is_closed:
            raise RuntimeError("this Client was closed; make another one")

    def _subscriber(self, stream: str) -> zmq.Socket[bytes]:
        self._check_usable()
        if stream not in self._sockets:
            self._check_reachable(stream)
            socket = self._context.socket(zmq.SUB)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_RECEIVED_BYTES)
            socket.setsockopt(zmq.SUBSCRIBE, STREAMS[stream].topic)
            socket.connect(endpoint(self.folder, stream))
            self._sockets[stream] = socket
        return self._sockets[stream]

    def _control(self, connection: str) -> ControlConnection:
        self._check_usable()
        if connection not in self._connections:
            self._check_reachable(CONTROL)
            self._connections[connection] = ControlConnection(self._context, endpoint(self.folder, CONTROL))
        return self._connections[connection]

    def _next(self, stream: str, timeout_s: float) -> Any:
        """The next valid message of a stream, or None."""
        deadline_ns = self._deadline_ns(timeout_s)
        while payloads := self._receive(stream, deadline_ns):
            for payload in reversed(payloads):
                if (message := unpack_or_none(stream, payload)) is not None:
                    return message
            if self._is_over(deadline_ns):
                break
        return None

    def _receive(self, stream: str, deadline_ns: int) -> list[bytes]:
        """The next message of a stream; all that wait, if only the newest counts. Empty: none before the deadline.

        Not with libzmq's CONFLATE: it can hold back a message that arrives during a read until the following one.
        """
        socket = self._subscriber(stream)
        if not socket.poll(self._left_ms(deadline_ns)):
            return []
        payloads = [only_frame(socket.recv_multipart())]
        self._check_reachable(stream)  # the folder may have been made since then, by anybody
        if not self.folder.exists():
            return []
        with contextlib.suppress(zmq.Again):
            for _ in range(MAX_SKIPPED_MESSAGES if STREAMS[stream].newest else 0):
                payloads.append(only_frame(socket.recv_multipart(zmq.NOBLOCK)))
        return payloads

    def _newest_of(self, payloads: list[bytes]) -> Action | Refusal | None:
        """The newest message that counts. What is discarded changes nothing, also not which one is the newest."""
        newest: Action | Refusal | None = None
        for payload in payloads:
            message = unpack_or_none("actions", payload)
            if isinstance(message, Action) and not is_of_this_clock(message, self._clock()):
                self.expired += 1
            elif message is not None and self._is_new(message):
                self.missed += newest is not None
                newest = message
        return newest

    def _is_new(self, message: Action | Refusal) -> bool:
        """Whether a message is newer than every message before it. Counts the ones between, which were not returned."""
        if message.session in self._ended_sessions:
            return False
        if self._newest is not None and self._newest[0] == message.session:
            gap = message.seq - self._newest[1]
            if gap <= 0:
                return False
            self.missed += gap - 1
        elif self._newest is not None:
            self._ended_sessions.append(self._newest[0])
        self._newest = (message.session, message.seq)
        return True

    # -- time ---------------------------------------------------------------------------------------------------------

    def _deadline_ns(self, timeout_s: float) -> int:
        try:
            seconds = float(min(max(timeout_s, 0), MAX_TIMEOUT_S))
            return self._clock() + round(seconds * NS_PER_S)
        except (TypeError, ValueError):
            raise ValueError(f"timeout_s: expected seconds; found {timeout_s!r}") from None

    def _is_over(self, deadline_ns: int) -> bool:
        """Whether a deadline has passed. Other messages can arrive without a pause: then poll() alone never ends."""
        return self._clock() >= deadline_ns

    def _left_ms(self, deadline_ns: int) -> int:
        """The time until a deadline for poll(), rounded up to a millisecond; 0: the deadline has passed."""
        return max(0, -((self._clock() - deadline_ns) // NS_PER_MS))


def is_valid(action: Action, now_ns: int) -> bool:
    """Whether a controller may act on an action: it has not expired, and its stamps can be from this machine's clock.

    now_ns: CLOCK_MONOTONIC.
    """
    return now_ns < action.valid_until_ns and is_of_this_clock(action, now_ns)
