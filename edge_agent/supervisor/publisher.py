"""The sockets: one endpoint per stream in the runtime folder. Publishing never waits, and control is polled.

    publisher.send("text", TextMessage, lane="describe", frame_id=3, text="a disc")

send() is the only place that writes the header of a message. Only ipc:// endpoints exist. Everybody who may open the
folder may listen and command, so the folder has mode 0750 and the sockets 0660. A lock file keeps a second daemon from
taking over the endpoints of the first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import zmq

from edge_agent.errors import UserError
from edge_agent.wire.endpoints import endpoint
from edge_agent.wire.messages import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, Header
from edge_agent.wire.streams import STREAMS, pack

MAX_REQUESTS_PER_TURN = 64
MAX_SOCKET_PATH_BYTES = 107  # sun_path
PUBLISH_HWM = {"actions": 8, "text": 1000, "status": 8}  # messages queued per subscriber; then messages are lost
CONTROL_HWM = 256
LAST_MESSAGE_LINGER_MS = 100  # the last status says why no more will come: give it time to leave
SESSION_BITS = 48

Message = TypeVar("Message", bound=Header)


class Sender(NamedTuple):
    """Where the reply to a request goes."""

    routing: tuple[bytes, ...]  # the first is the routing id of the socket that sent the request
    connection: tuple[int, int] | None = None  # descriptor and inode of the connection that it came on; None: unknown


class EndpointError(UserError):
    """The endpoints cannot be bound. One line."""

    exit_status = os.EX_CONFIG


class Publisher:
    """Owns the lock file and the sockets, and writes the header of every published message.

    bundle_id: set it when the bundle is verified; it is part of every header.
    """

    def __init__(self, folder: Path, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """Bind every endpoint in `folder`. clock: CLOCK_MONOTONIC in nanoseconds. Raises EndpointError."""
        self.folder = folder
        self.bundle_id = ""
        self.session = random.SystemRandom().getrandbits(SESSION_BITS)
        self._clock = clock
        self._lock_fd = _lock(folder)
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._seq = dict.fromkeys(STREAMS, 0)
        old_umask = os.umask(0o117)
        stream = ""
        try:
            for stream, row in STREAMS.items():
                self._bind(stream, getattr(zmq, row.socket))
        except zmq.ZMQError as error:
            self.close()
            raise EndpointError(f"runtime_dir: {endpoint(folder, stream)}: cannot be bound: {error.strerror}") from None
        finally:
            os.umask(old_umask)

    def _bind(self, stream: str, socket_type: int) -> None:
        socket = self._sockets[stream] = self._context.socket(socket_type)  # stored first: close() must find it
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        if stream in PUBLISH_HWM:
            socket.setsockopt(zmq.SNDHWM, PUBLISH_HWM[stream])
        else:
            socket.setsockopt(zmq.RCVHWM, CONTROL_HWM)
            socket.setsockopt(zmq.SNDHWM, CONTROL_HWM)
            socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a controller that reconnects takes its routing id with it
        if stream == "status":
            socket.setsockopt(zmq.XPUB_VERBOSE, 1)  # report every subscription, so that each gets the last value
        socket.bind(endpoint(self.folder, stream))

    def close(self) -> None:
        for stream, socket in self._sockets.items():
            socket.close(linger=LAST_MESSAGE_LINGER_MS if stream in ("status", "control") else 0)
            with contextlib.suppress(OSError):
                (self.folder / stream).unlink()
        self._context.term()
        os.close(self._lock_fd)

    @property
    def control(self) -> zmq.Socket[bytes]:
        return self._sockets["control"]

    @property
    def status(self) -> zmq.Socket[bytes]:
        return self._sockets["status"]

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
        """Publish a complete message. The socket drops it for a subscriber whose queue is full; nothing waits."""
        payload = pack(stream, message)
        self._seq[stream] += 1
        with contextlib.suppress(zmq.Again):
            self._sockets[stream].send(payload, zmq.NOBLOCK)

    def next_seq(self, stream: str) -> int:
        """The number of the next message of a stream."""
        return self._seq[stream]

    def has_new_subscriber(self) -> bool:
        """Whether somebody subscribed to status since the last call. Reads a bounded number of subscriptions."""
        subscribed = False
        with contextlib.suppress(zmq.Again):
            for _ in range(MAX_REQUESTS_PER_TURN):
                subscribed |= self.status.recv(zmq.NOBLOCK)[:1] == b"\x01"
        return subscribed

    # -- control ------------------------------------------------------------------------------------------------------

    def requests(self) -> list[tuple[Sender, bytes]]:
        """Requests that have arrived, as (sender, payload); at most 64, so that a flood does not delay a frame."""
        requests: list[tuple[Sender, bytes]] = []
        with contextlib.suppress(zmq.Again):
            while len(requests) < MAX_REQUESTS_PER_TURN:
                *routing, last = self.control.recv_multipart(zmq.NOBLOCK, copy=False)
                sender = Sender(tuple(frame.bytes for frame in routing), _connection(last))
                requests.append((sender, last.bytes))
        return requests

    def reply(self, sender: Sender, payload: bytes) -> None:
        """Send a reply, or drop it when the sender is gone or reads nothing."""
        with contextlib.suppress(zmq.ZMQError):
            self.control.send_multipart([*sender.routing, payload], zmq.NOBLOCK)

    @staticmethod
    def is_connected(sender: Sender) -> bool:
        """Whether the connection that a request came on is still open; True if that is unknown."""
        return sender.connection is None or _inode(sender.connection[0]) == sender.connection[1]


def _connection(frame: zmq.Frame) -> tuple[int, int] | None:
    """libzmq closes the descriptor when the peer is gone; a later connection may get the number, but not the inode."""
    fd = frame.get(zmq.SRCFD)
    inode = _inode(fd) if isinstance(fd, int) else None
    return (fd, inode) if inode is not None else None


def _inode(fd: int) -> int | None:
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return None


def _lock(folder: Path) -> int:
    """Make the folder and take its lock file; the descriptor of that file. Raises EndpointError."""
    longest = max(len(os.fsencode(folder / stream)) for stream in STREAMS)
    if longest > MAX_SOCKET_PATH_BYTES:
        raise EndpointError(
            f"runtime_dir: {folder}: socket paths may have {MAX_SOCKET_PATH_BYTES} bytes, found {longest}; use a "
            "shorter folder"
        )
    try:
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
        if owner != os.geteuid():
            raise EndpointError(
                f"runtime_dir: {folder}: expected a folder of uid {os.geteuid()}, found one of uid {owner}; choose "
                "another folder"
            )
        lock_fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    except OSError as error:
        raise EndpointError(
            f"runtime_dir: {folder}: {error.strerror}; set runtime_dir to a folder that you own"
        ) from None
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock_fd)
        raise EndpointError(
            f"runtime_dir: {folder}: another edge-agent runs in this folder; stop it, or set another runtime_dir"
        ) from None
    return lock_fd
