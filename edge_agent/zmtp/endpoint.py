"""One ZeroMQ endpoint of the daemon at a path: who connects, what arrives, what leaves. Nothing waits.

    endpoint = Endpoint(path, ROUTER, Limits(max_message_bytes=65_536, read_bytes=16_384, queue_messages=256))
    for connection, parts in endpoint.serve():
        endpoint.send(connection, pack_message(b"reply"))

libzmq is not used on this side. It has no bound for a message of endless parts, for the number and the length of
subscriptions, or for connections, and it aborts the process when descriptors run out. Here each peer has a budget, and
a connection that exceeds it ends. Controllers use any ZeroMQ library: the bytes are the same.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from edge_agent.wire.endpoints import CREDENTIALS
from edge_agent.zmtp.frames import GREETING, Message, ProtocolError, Reader, pack_ready
from edge_agent.zmtp.listener import Listener, PathError

MAX_EVENTS_PER_TURN, MAX_ACCEPTS_PER_TURN = 16, 64
MAX_MESSAGES_PER_TURN = 64  # and what one read adds
HANDSHAKE_NS = 10_000_000_000  # a connection that is not ready after this time ends
MAX_TOPICS, MAX_TOPIC_BYTES = 16, 64  # subscriptions of one connection

PUB, ROUTER, PULL = b"PUB", b"ROUTER", b"PULL"
PEERS = {  # socket type of this endpoint -> socket types that may connect
    PUB: frozenset({b"SUB", b"XSUB"}),
    ROUTER: frozenset({b"DEALER", b"REQ", b"ROUTER"}),
    PULL: frozenset({b"PUSH"}),
}


class Limits(NamedTuple):
    """The budget of an endpoint."""

    max_message_bytes: int  # of one message that arrives
    read_bytes: int  # per turn and connection. An empty message has two bytes on the wire and costs a hundred here
    max_parts: int = 4  # of one message that arrives
    queue_messages: int = 0  # per connection, that wait to leave; then messages are lost
    queue_bytes: int = 128 * 1024  # the same in bytes
    max_connections: int = 128


class Connection:
    """One peer. Only its endpoint changes it."""

    __slots__ = (
        "identity", "opened_ns", "pid", "process_group", "queue", "queue_bytes", "reader", "socket", "topics", "uid",
    )  # fmt: skip

    def __init__(self, peer: socket.socket, reader: Reader, opened_ns: int) -> None:
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        self.pid, self.uid, _ = CREDENTIALS.unpack(credentials)
        self.process_group = _process_group(self.pid)
        self.socket, self.reader, self.opened_ns = peer, reader, opened_ns
        self.queue: deque[bytes | memoryview] = deque()
        self.queue_bytes = 0
        self.topics: set[bytes] = set()
        self.identity = b""

    @property
    def is_open(self) -> bool:
        return self.socket.fileno() >= 0


def _process_group(pid: int) -> int:
    """The process group of a process; 0: it has ended, or is not in our namespace."""
    try:
        return os.getpgid(pid) if pid else 0
    except ProcessLookupError:
        return 0


def _largest_group(connections: list[Connection], key: Callable[[Connection], int]) -> list[Connection]:
    """The connections of the group that has most; of equal groups, the one that began last. The order stays."""
    groups: dict[int, list[Connection]] = {}
    for connection in connections:
        groups.setdefault(key(connection), []).append(connection)
    return max(reversed(groups.values()), key=len)


class Endpoint:
    """Owns the path, the listening socket and the connections of one endpoint. fileno() is readable when serve() has
    something to do."""

    def __init__(
        self,
        path: Path,
        socket_type: bytes,
        limits: Limits,
        mode: int | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """mode: permissions of the path; None: by the umask. Raises PathError."""
        self.path, self.socket_type, self.limits = path, socket_type, limits
        self.n_subscribed = 0  # how often somebody subscribed
        self.n_refused = 0  # connections that ended because the peer exceeded its budget, or does not speak ZMTP
        self._mode, self._clock = mode, clock
        self._listener = Listener(path, mode)
        self._epoll = select.epoll()
        self._epoll.register(self._listener.socket, select.EPOLLIN)
        self._connections: dict[int, Connection] = {}  # descriptor -> connection, the oldest first
        self._by_identity: dict[bytes, Connection] = {}
        self._identities = itertools.count(1)
        self._scratch = memoryview(bytearray(limits.read_bytes))

    def fileno(self) -> int:
        return self._epoll.fileno()

    def close(self) -> None:
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._listener.close()
        self._epoll.close()

    # -- once per turn ------------------------------------------------------------------------------------------------

    def serve(self) -> list[tuple[Connection, Message]]:
        """Accept, read and write what can be done without waiting; the messages that arrived."""
        arrived: list[tuple[Connection, Message]] = []
        for fd, events in self._epoll.poll(0, MAX_EVENTS_PER_TURN):
            if len(arrived) >= MAX_MESSAGES_PER_TURN:
                break  # the rest waits in the sockets of the senders
            if fd == self._listener.socket.fileno():
                self._accept()
                continue
            connection = self._connections.get(fd)  # None: it was ended by another event of this turn
            if connection is not None and events & select.EPOLLOUT:
                self._flush(connection)
            if connection is not None and events & ~select.EPOLLOUT:
                arrived += [(connection, message) for message in self._read(connection)]
        return arrived

    def check(self) -> str:
        """About once a second: end connections without a handshake, and see whether the path is still ours. A path that
        was removed is bound again; connections stay. Why the endpoint is lost; "": it is not."""
        now_ns = self._clock()
        for connection in list(self._connections.values()):
            if not connection.reader.is_ready and now_ns - connection.opened_ns > HANDSHAKE_NS:
                self._drop(connection)
        with contextlib.suppress(FileExistsError):  # accept() had failed for want of descriptors
            self._epoll.register(self._listener.socket, select.EPOLLIN)
        if self._listener.is_ours():
            return ""
        try:
            listener = Listener(self.path, self._mode)
        except PathError as error:
            return str(error)
        self._epoll.unregister(self._listener.socket)
        self._listener.close()
        self._listener = listener
        self._epoll.register(listener.socket, select.EPOLLIN)
        return ""

    # -- what leaves --------------------------------------------------------------------------------------------------

    def publish(self, topic: bytes, data: bytes) -> None:
        """Send bytes of pack_message() to every connection that subscribed to the topic."""
        for connection in list(self._connections.values()):
            if any(topic.startswith(prefix) for prefix in connection.topics):
                self.send(connection, data)

    def send(self, connection: Connection, data: bytes) -> None:
        """Send bytes of pack_message(), or drop them when the queue of the connection is full."""
        n_sent = 0
        if not connection.queue:
            try:
                n_sent = connection.socket.send(data)
            except BlockingIOError:
                pass
            except OSError:
                self._drop(connection)
                return
            if n_sent == len(data):
                return
        is_full = len(connection.queue) >= self.limits.queue_messages
        if not n_sent and (is_full or connection.queue_bytes + len(data) > self.limits.queue_bytes):
            return
        if not connection.queue:
            self._epoll.modify(connection.socket, select.EPOLLIN | select.EPOLLOUT)
        connection.queue.append(memoryview(data)[n_sent:])
        connection.queue_bytes += len(data) - n_sent

    def _flush(self, connection: Connection) -> None:
        try:
            while connection.queue:
                data = connection.queue[0]
                n_sent = connection.socket.send(data)
                connection.queue_bytes -= n_sent
                if n_sent < len(data):
                    connection.queue[0] = memoryview(data)[n_sent:]
                    return
                connection.queue.popleft()
            self._epoll.modify(connection.socket, select.EPOLLIN)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection)

    # -- what arrives -------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(MAX_ACCEPTS_PER_TURN):
            try:
                peer, _ = self._listener.socket.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError:  # no descriptors: check() tries again
                self._epoll.unregister(self._listener.socket)
                return
            try:
                self._epoll.register(peer, select.EPOLLIN)
            except OSError:  # no memory for it
                peer.close()
                return
            peer.setblocking(False)
            reader = Reader(PEERS[self.socket_type], self.limits.max_message_bytes, self.limits.max_parts)
            connection = self._connections[peer.fileno()] = Connection(peer, reader, self._clock())
            self.send(connection, GREETING)
            if len(self._connections) > self.limits.max_connections:
                self._drop_one()

    def _drop_one(self) -> None:
        """End a connection of the user, of the process group and of the process that have most: who leaks connections
        harms itself, and so does a program that starts many processes. Of equals, the newest one loses.

        A process that has several connections has forgotten its oldest one.
        """
        candidates = list(self._connections.values())
        candidates = _largest_group(candidates, lambda connection: connection.uid)
        candidates = _largest_group(candidates, lambda connection: connection.process_group)
        own = _largest_group(candidates, lambda connection: connection.pid)
        self._drop(own[0] if len(own) > 1 else candidates[-1])

    def _read(self, connection: Connection) -> list[Message]:
        reader = connection.reader
        was_greeted, was_ready = reader.is_greeted, reader.is_ready
        space = reader.space(self._scratch)
        try:
            n_bytes = connection.socket.recv_into(space)
            if not n_bytes:
                raise ConnectionResetError
            messages = reader.take(space[:n_bytes])
            if reader.is_greeted and not was_greeted:
                self.send(connection, pack_ready(self.socket_type))
            if reader.is_ready and not was_ready:
                self._introduce(connection)
            if reader.outgoing:
                self.send(connection, reader.outgoing)
                reader.outgoing = b""
            if self.socket_type != PUB:
                return messages
            for message in messages:
                self._subscribe(connection, message)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection)
        except ProtocolError:
            self.n_refused += 1
            self._drop(connection)
        return []

    def _introduce(self, connection: Connection) -> None:
        """Give the connection its routing id. A newer connection takes over the id of an older one."""
        identity = connection.reader.identity or b"\0" + next(self._identities).to_bytes(8, "big")
        if (older := self._by_identity.get(identity)) is not None:
            self._drop(older)
        connection.identity = identity
        self._by_identity[identity] = connection

    def _subscribe(self, connection: Connection, message: Message) -> None:
        """Take in a subscription or its end. Raises ProtocolError."""
        kind, topic = message[0][:1], bytes(message[0][1:])
        if len(message) > 1 or kind not in (b"\x00", b"\x01") or len(topic) > MAX_TOPIC_BYTES:
            raise ProtocolError("not a subscription")
        if kind == b"\x00":
            connection.topics.discard(topic)
            return
        connection.topics.add(topic)
        self.n_subscribed += 1
        if len(connection.topics) > MAX_TOPICS:
            raise ProtocolError("too many subscriptions")

    def _drop(self, connection: Connection) -> None:
        fd = connection.socket.fileno()
        if self._connections.get(fd) is not connection:
            return
        del self._connections[fd]
        if self._by_identity.get(connection.identity) is connection:
            del self._by_identity[connection.identity]
        connection.socket.close()  # epoll forgets it
        connection.queue.clear()
