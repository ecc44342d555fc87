"""The endpoints: one per stream in the runtime folder. Publishing never waits, and control is polled.

    publisher.send("text", TextMessage, lane="describe", frame_id=3, text="a disc")

send() is the only place that writes the header of a message. Only ipc:// endpoints exist. Everybody who may open the
folder may listen and command, so the folder has mode 0750 and the sockets 0660. A lock on the folder itself keeps a
second daemon from it: a file in the folder could be removed by a program that cleans up.
"""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from edge_agent.supervisor.runtime_folder import endpoint_error, lock_folder
from edge_agent.wire.messages import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, Header
from edge_agent.wire.streams import STREAMS, pack
from edge_agent.zmtp.endpoint import Connection, Endpoint, Limits
from edge_agent.zmtp.frames import pack_message
from edge_agent.zmtp.listener import PathError

MAX_REQUESTS_PER_TURN = 64
MAX_SUBSCRIPTION_BYTES = 256
PUBLISH_HWM = {"actions": 8, "text": 1000, "status": 8}  # messages queued per subscriber; then messages are lost
CONTROL_HWM = 256
SOCKET_MODE = 0o660
CHECK_INTERVAL_NS = 1_000_000_000
SESSION_BITS = 48

LIMITS = {stream: Limits(MAX_SUBSCRIPTION_BYTES, 1024, queue_messages=hwm) for stream, hwm in PUBLISH_HWM.items()}
LIMITS["control"] = Limits(MAX_MESSAGE_BYTES, 16 * 1024, queue_messages=CONTROL_HWM)

Message = TypeVar("Message", bound=Header)


class Sender(NamedTuple):
    """Where the reply to a request goes."""

    connection: Connection  # that the request came on
    envelope: tuple[bytes, ...] = ()  # the frames before the request, for example the empty one of a REQ


class Publisher:
    """Owns the lock of the folder and the endpoints, and writes the header of every published message.

    bundle_id: set it when the bundle is verified; it is part of every header.
    """

    def __init__(self, folder: Path, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """Bind every endpoint in `folder`. clock: CLOCK_MONOTONIC in nanoseconds. Raises EndpointError."""
        self.folder = folder
        self.bundle_id = ""
        self.session = random.SystemRandom().getrandbits(SESSION_BITS)
        self._clock = clock
        self._checked_ns = clock()
        self._folder_fd = lock_folder(folder)
        self.endpoints: dict[str, Endpoint] = {}
        self._seq = dict.fromkeys(STREAMS, 0)
        self._requests: deque[tuple[Sender, bytes]] = deque()
        self._n_subscribed = 0  # to status, when has_new_subscriber() was called
        try:
            for stream, limits in LIMITS.items():
                socket_type = STREAMS[stream].socket.encode()
                self.endpoints[stream] = Endpoint(folder / stream, socket_type, limits, SOCKET_MODE, clock)
        except PathError as error:
            self.close()
            raise endpoint_error(error) from None

    def close(self) -> None:
        for endpoint in self.endpoints.values():
            endpoint.close()
        os.close(self._folder_fd)

    def filenos(self) -> list[int]:
        """For poll: one of them is readable when serve() has something to do."""
        return [endpoint.fileno() for endpoint in self.endpoints.values()]

    def serve(self) -> None:
        """Once per turn: connections, subscriptions, requests, and what waits to leave. The work is bounded."""
        for stream, endpoint in self.endpoints.items():
            if stream != "control":
                endpoint.serve()
            elif len(self._requests) < MAX_REQUESTS_PER_TURN:  # else they wait in the sockets of their senders
                for connection, parts in endpoint.serve():
                    *envelope, payload = map(bytes, parts)
                    self._requests.append((Sender(connection, tuple(envelope)), payload))

    def lost_endpoint(self) -> str:
        """About once a second: whether the endpoints are still those that controllers find. One that was removed is
        bound again. Why one is lost for good; "": none is."""
        now_ns = self._clock()
        if now_ns - self._checked_ns < CHECK_INTERVAL_NS:
            return ""
        self._checked_ns = now_ns
        try:
            is_ours = os.path.samestat(self.folder.stat(), os.fstat(self._folder_fd))
        except OSError as error:
            return f"runtime_dir: {self.folder}: {error.strerror}"
        if not is_ours:
            return f"runtime_dir: {self.folder}: another folder is in its place"
        reasons = [endpoint.check() for endpoint in self.endpoints.values()]
        return next((f"runtime_dir: {reason}" for reason in reasons if reason), "")

    # -- publishing ---------------------------------------------------------------------------------------------------

    def send(self, stream: str, message_type: type[Message], *, t_pub_ns: int | None = None, **fields: Any) -> Message:
        """Make a message of these fields and a header, and publish it. Returns the message.

        t_pub_ns: time of publication, CLOCK_MONOTONIC; None: now. Raises ValueError when the message is too large or
        an action holds a number that is not finite: then it is neither sent nor counted.
        """
        message = message_type(
            v=PROTOCOL_VERSION,
            session=self.session,
            seq=self._seq[stream],
            t_pub_ns=self._clock() if t_pub_ns is None else t_pub_ns,
            bundle_id=self.bundle_id,
            **fields,
        )
        self.publish(stream, message)
        return message

    def publish(self, stream: str, message: Header) -> None:
        """Publish a complete message. It is dropped for a subscriber whose queue is full; nothing waits."""
        payload = pack(stream, message)
        self._seq[stream] += 1
        self.endpoints[stream].publish(payload, pack_message(payload))

    def next_seq(self, stream: str) -> int:
        """The number of the next message of a stream."""
        return self._seq[stream]

    def has_new_subscriber(self) -> bool:
        """Whether somebody subscribed to status since the last call."""
        before, self._n_subscribed = self._n_subscribed, self.endpoints["status"].n_subscribed
        return self._n_subscribed > before

    # -- control ------------------------------------------------------------------------------------------------------

    @property
    def has_requests(self) -> bool:
        """Whether requests() returns something without serve()."""
        return bool(self._requests)

    def requests(self) -> list[tuple[Sender, bytes]]:
        """Requests that serve() has read, as (sender, payload); at most 64, so that a flood does not delay a frame."""
        n = min(len(self._requests), MAX_REQUESTS_PER_TURN)
        return [self._requests.popleft() for _ in range(n)]

    def reply(self, sender: Sender, payload: bytes) -> None:
        """Send a reply, or drop it when the sender is gone or reads nothing.

        It goes to the connection of the request only: a controller that was restarted under the same routing id would
        take it for the reply to a request of its own.
        """
        if self.is_connected(sender):
            self.endpoints["control"].send(sender.connection, pack_message(*sender.envelope, payload))

    @staticmethod
    def is_connected(sender: Sender) -> bool:
        """Whether the connection that a request came on is still open."""
        return sender.connection.is_open
