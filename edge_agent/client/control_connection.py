"""One connection to the daemon's control endpoint, which knows when it has ended.

A reply goes to the connection of its request only, so a client that is connected anew would wait for a reply that can
never come. libzmq connects anew by itself; here it does not, and what a daemon sent before it ended can still be read.
(With its option IMMEDIATE, libzmq drops what was not read yet when it connects anew.)
"""

from __future__ import annotations

import struct
import time

import zmq

from edge_agent.wire.messages import MAX_MESSAGE_BYTES

NEVER_MS = 86_400_000
RETRY_S = 0.02  # a daemon that is starting has no socket yet
EVENT = struct.Struct("=HI")  # of libzmq's monitor: what, and a value


class ControlConnection:
    """Owns a DEALER socket; close() frees it."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        """address: of the endpoint `control`."""
        self._context, self._address = context, address
        self._open()

    def _open(self) -> None:
        self._events: set[int] = set()  # of libzmq's monitor, since the socket was made
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, NEVER_MS)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._monitor: zmq.Socket[bytes] = self.socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED
        )
        self.socket.connect(self._address)

    def close(self, linger_ms: int = 0) -> None:
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=linger_ms)

    def is_connected_within(self, timeout_ms: int) -> bool:
        """Wait until the daemon has accepted the connection and speaks the protocol."""
        end_s = time.monotonic() + timeout_ms / 1000
        self._read_events(0)
        while not self._is_connected:
            self._read_events(max(0, round(1000 * (end_s - time.monotonic()))))
            left_s = end_s - time.monotonic()
            if not self._is_connected:
                if left_s <= 0:
                    return False
                time.sleep(min(RETRY_S, left_s))  # nobody listens yet, or who listened has ended
                self.close()
                self._open()
        return True

    @property
    def _is_connected(self) -> bool:
        return zmq.EVENT_HANDSHAKE_SUCCEEDED in self._events and zmq.EVENT_DISCONNECTED not in self._events

    @property
    def has_ended(self) -> bool:
        """Whether the daemon was stopped, died, or ended the connection."""
        self._read_events(0)
        return zmq.EVENT_DISCONNECTED in self._events

    def poll(self, timeout_ms: int, other: zmq.Socket[bytes] | None = None) -> bool:
        """Wait until a message arrives here or at the other socket. False: none came in time, or the connection has
        ended and nothing waits any more."""
        poller = zmq.Poller()
        sockets = [self.socket] if other is None else [self.socket, other]
        for socket in (*sockets, self._monitor):
            poller.register(socket, zmq.POLLIN)
        has_ended = self.has_ended  # asked first: what came before the end has arrived
        ready = dict(poller.poll(0 if has_ended else timeout_ms))
        if set(ready) == {self._monitor}:
            return any(socket.poll(0) for socket in sockets)
        return bool(ready)

    def _read_events(self, timeout_ms: int) -> None:
        while self._monitor.poll(timeout_ms):
            event, _ = EVENT.unpack(self._monitor.recv_multipart()[0])
            self._events.add(event)
            timeout_ms = 0
