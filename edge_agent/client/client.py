"""What a controller imports: actions that still stand, words, status, and control. Light: no numpy, no model code.

    with Client() as agent:
        for action in agent.actions(silence_s=0.5):
            if action is None:
                hold()                      # nothing valid for half a second
            elif action.type == "move":
                fly(action.values["forward_m_s"], action.values["right_m_s"])

Silence means hold. An action is never handed out after its expiry, twice, or with a clock that is not this machine's.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import msgspec
import zmq

from edge_agent.wire.codec import encode
from edge_agent.wire.control import Operation, Request, StateValue, decode_reply
from edge_agent.wire.endpoints import endpoint, runtime_dir
from edge_agent.wire.messages import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, Action, Refusal, Status, TextMessage
from edge_agent.wire.streams import STREAMS, unpack

MAX_AHEAD_NS = 5_000_000  # a publication may not lie in our future: another machine's clock, or another boot's
MAX_SKIPPED_MESSAGES = 2000  # messages that a reader who comes late passes over at once, more than its socket holds
MAX_VALID_NS = 1_000_000_000  # the autopilot's own time-out: nothing on this wire stands longer


class RequestRefused(Exception):
    """The daemon answered, and said no. One line."""


class Client:
    """Owns its sockets; close() or a with block frees them. Use from one thread."""

    def __init__(self, folder: str = "") -> None:
        """folder: the daemon's runtime folder; empty: where a daemon on this machine puts it by default."""
        self.folder = runtime_dir(folder)
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket] = {}
        self.expired = 0  # actions received after their expiry, or with a clock we cannot trust; never handed out
        self.missed = 0  # actions of the stream that never reached us, by their seq
        self._last: tuple[int, int] | None = None  # session and seq of the newest message of the actions stream

    def close(self) -> None:
        for socket in self._sockets.values():
            socket.close()
        self._sockets.clear()
        self._context.term()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    # -- streams ------------------------------------------------------------------------------------------------------

    def next_answer(self, timeout_s: float) -> Action | Refusal | None:
        """The newest message of the actions stream, valid now, or None after timeout_s without one."""
        socket, until_s = self._subscriber("actions"), time.monotonic() + timeout_s
        while socket.poll(max(0.0, until_s - time.monotonic()) * 1000):
            with contextlib.suppress(msgspec.DecodeError):
                message = unpack("actions", self._receive("actions"))
                if not self._is_new(message):
                    continue
                if isinstance(message, Refusal) or is_valid(message, time.monotonic_ns()):
                    return message
                self.expired += 1
        return None

    def actions(self, silence_s: float | None = None) -> Iterator[Action | None]:
        """Actions that stand, newest first, for ever. With silence_s: None whenever nothing valid came for so long."""
        heard_s = time.monotonic()
        while True:
            wait_s = 1.0 if silence_s is None else max(0.0, heard_s + silence_s - time.monotonic())
            answer = self.next_answer(wait_s)
            if isinstance(answer, Action):
                yield answer
                heard_s = time.monotonic()
            elif silence_s is not None and time.monotonic() - heard_s >= silence_s:
                yield None
                heard_s = time.monotonic()

    def next_text(self, timeout_s: float) -> TextMessage | None:
        return self._next("text", timeout_s)

    def text(self) -> Iterator[TextMessage]:
        """Every piece of language as it is decoded, for ever."""
        while True:
            if (words := self.next_text(1.0)) is not None:
                yield words

    def status(self, timeout_s: float = 2.0) -> Status | None:
        """The newest status; None when no daemon answers in time."""
        return self._next("status", timeout_s)

    # -- control ------------------------------------------------------------------------------------------------------

    def instruct(self, text: str, timeout_s: float = 30.0) -> None:
        """Give a new instruction; returns once frames are answered under it. Raises Refused, TimeoutError."""
        self.request("instruct", text, timeout_s)

    def adapter(self, name: str, timeout_s: float = 30.0) -> None:
        """Switch to one of the configured adapters; "": to none. Raises Refused, TimeoutError."""
        self.request("adapter", name, timeout_s)

    def ask(self, question: str, timeout_s: float = 90.0) -> str:
        """A question about what the camera sees, answered in words. Raises Refused, TimeoutError."""
        return str(self.request("ask", question, timeout_s)["text"])

    def ask_stream(self, question: str, timeout_s: float = 90.0) -> Iterator[str]:
        """The same, piece by piece as it is decoded; together the pieces are the answer."""
        words, heard = self._subscriber("text"), ""
        until_s = time.monotonic() + timeout_s
        control, request_id = self._send("ask", question, "", timeout_s)
        poller = zmq.Poller()
        poller.register(words, zmq.POLLIN)
        poller.register(control, zmq.POLLIN)
        while ready := dict(poller.poll(max(0.0, until_s - time.monotonic()) * 1000)):
            if control in ready and (reply := self._reply_to(request_id)) is not None:
                whole = str(reply["text"])  # of what was lost or is still on its way, the reply holds all
                yield whole.removeprefix(heard) if whole.startswith(heard) else f"\n{whole}"
                return
            piece = self.next_text(0.0) if words in ready else None
            if piece is not None and (piece.request, piece.lane) == (request_id, "answer"):
                heard += piece.text
                yield piece.text
        raise self._no_answer("ask", timeout_s)

    def vehicle_state(self, /, **values: StateValue) -> None:
        """Tell the model what the vehicle knows of itself: keys of the action space's state. Call it at the rate the
        values change; the newest counts, and an old one is none. Raises Refused, TimeoutError."""
        self.request("vehicle_state", "", 5.0, values=values)

    def pause(self, timeout_s: float = 5.0) -> None:
        self.request("pause", "", timeout_s)

    def resume(self, timeout_s: float = 5.0) -> None:
        self.request("resume", "", timeout_s)

    def stats(self, timeout_s: float = 5.0) -> dict:
        return self.request("stats", "", timeout_s)

    def request(
        self,
        op: Operation,
        text: str,
        timeout_s: float,
        request_id: str = "",
        values: dict[str, StateValue] | None = None,
    ) -> dict:
        """Any operation. The same request_id again gets the first answer again, without doing it twice."""
        until_s = time.monotonic() + timeout_s
        control, request_id = self._send(op, text, request_id, timeout_s, values)
        while control.poll(max(0.0, until_s - time.monotonic()) * 1000):
            if (result := self._reply_to(request_id)) is not None:
                return result
        raise self._no_answer(op, timeout_s)

    def _send(
        self,
        op: Operation,
        text: str,
        request_id: str,
        timeout_s: float,
        values: dict[str, StateValue] | None = None,
    ) -> tuple[zmq.Socket, str]:
        """Only to a daemon that is there: a request must not wait in a queue and be carried out some other day."""
        request = Request(
            v=PROTOCOL_VERSION, id=request_id or os.urandom(8).hex(), op=op, text=text, values=values or {}
        )
        control = self._control()
        if not control.poll(timeout_s * 1000, zmq.POLLOUT):
            raise self._no_answer(op, timeout_s)
        control.send(encode(request), zmq.NOBLOCK)
        return control, request.id

    def _no_answer(self, op: str, timeout_s: float) -> TimeoutError:
        """The error to raise. The socket goes, and with it whatever of the request has not left."""
        self._sockets.pop("control").close()
        where = endpoint(self.folder, "control")
        return TimeoutError(f"{where}: no answer to {op} in {timeout_s:g} s; is edge-agent running?")

    def _reply_to(self, request_id: str) -> dict | None:
        """The result, if the waiting reply is to this request; None if to an earlier one that we gave up on."""
        try:
            reply = decode_reply(self._control().recv())
        except msgspec.DecodeError:
            return None
        if reply.id != request_id:
            return None
        if not reply.ok:
            raise RequestRefused(reply.error)
        return reply.result

    # -- sockets ------------------------------------------------------------------------------------------------------

    def _subscriber(self, stream: str) -> zmq.Socket:
        if stream not in self._sockets:
            row, socket = STREAMS[stream], self._context.socket(zmq.SUB)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            socket.setsockopt(zmq.SUBSCRIBE, row.topic)
            socket.connect(endpoint(self.folder, stream))
            self._sockets[stream] = socket
        return self._sockets[stream]

    def _control(self) -> zmq.Socket:
        if "control" not in self._sockets:
            socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.IMMEDIATE, 1)  # no queue without a connection
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            socket.connect(endpoint(self.folder, "control"))
            self._sockets["control"] = socket
        return self._sockets["control"]

    def _next(self, stream: str, timeout_s: float) -> TextMessage | Status | None:
        socket, until_s = self._subscriber(stream), time.monotonic() + timeout_s
        while socket.poll(max(0.0, until_s - time.monotonic()) * 1000):
            with contextlib.suppress(msgspec.DecodeError):
                return unpack(stream, self._receive(stream))
        return None

    def _receive(self, stream: str) -> bytes:
        """A message that waits: on streams of which only the newest counts, that one.

        Not left to libzmq's CONFLATE: a message that arrives while the reader looks is held back until the next one.
        """
        payload = self._sockets[stream].recv()
        with contextlib.suppress(zmq.Again):
            for _ in range(MAX_SKIPPED_MESSAGES if STREAMS[stream].newest else 0):
                payload = self._sockets[stream].recv(zmq.NOBLOCK)
        return payload

    def _is_new(self, message: Action | Refusal) -> bool:
        """Count what is missing; a message seen before, or older than one seen, is not handed out again."""
        if self._last is not None and self._last[0] == message.session:
            gap = message.seq - self._last[1]
            if gap <= 0:
                return False
            self.missed += gap - 1
        self._last = (message.session, message.seq)
        return True


def is_valid(action: Action, now_ns: int) -> bool:
    """Whether an action may still be followed: not expired, and stamped by a clock that can be this machine's."""
    return (
        action.t_pub_ns <= now_ns + MAX_AHEAD_NS
        and action.t_capture_ns <= action.t_pub_ns
        and now_ns < action.valid_until_ns
        and action.valid_until_ns - action.t_pub_ns <= MAX_VALID_NS
    )
