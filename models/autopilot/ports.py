"""Where an autopilot's MAVLink bytes go: UDP, TCP, or a pseudo-terminal in place of a serial port."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
import tty
from pathlib import Path
from typing import NamedTuple, Protocol

MAX_DATAGRAM_BYTES = 65_535
TIMESPEC = struct.Struct("=qq")
SO_TIMESTAMPNS = 35  # of Linux; Python has no name for it
N_READINGS = 5  # of two clocks, each time that they are compared
PEERS = 8  # a UDP port answers the newest of them


class Arrival(NamedTuple):
    data: bytes
    t_ns: int  # CLOCK_MONOTONIC; of a datagram the time at which the kernel took it, however late this process is


class Port(Protocol):
    def filenos(self) -> list[int]:
        """What to wait for."""

    def receive(self) -> list[Arrival]:
        """What has arrived, without waiting."""

    def send(self, data: bytes) -> None:
        """Send to every peer, or drop: an autopilot never waits."""

    def close(self) -> None: ...


class UdpListener:
    """Bound to a port; sends to those that have sent to it."""

    def __init__(self, port: int = 0) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._socket.bind(("127.0.0.1", port))
        self.port: int = self._socket.getsockname()[1]
        self.peers: dict[tuple[str, int], None] = {}

    def filenos(self) -> list[int]:
        return [self._socket.fileno()]

    def receive(self) -> list[Arrival]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    data, extra, _, peer = self._socket.recvmsg(MAX_DATAGRAM_BYTES, 64)
                except ConnectionError:  # a peer has closed its port
                    continue
                self.peers.pop(peer, None)
                self.peers[peer] = None
                if len(self.peers) > PEERS:
                    self.peers.pop(next(iter(self.peers)))
                found.append(Arrival(data, _monotonic_ns(extra)))
        return found

    def send(self, data: bytes) -> None:
        for peer in list(self.peers):
            with contextlib.suppress(OSError):
                self._socket.sendto(data, peer)

    def close(self) -> None:
        self._socket.close()


def _monotonic_ns(extra: list[tuple[int, int, bytes]]) -> int:
    """The kernel's stamp of a datagram, which is CLOCK_REALTIME, as CLOCK_MONOTONIC."""
    for level, kind, value in extra:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
            seconds, nanoseconds = TIMESPEC.unpack(value)
            return seconds * 1_000_000_000 + nanoseconds - _realtime_lead_ns()
    return time.monotonic_ns()


def _realtime_lead_ns() -> int:
    """How far CLOCK_REALTIME is ahead of CLOCK_MONOTONIC: of several readings the one during which this thread waited
    least. Of a single one the other threads can make milliseconds."""
    readings = []
    for _ in range(N_READINGS):
        before_ns, realtime_ns, after_ns = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        readings.append((after_ns - before_ns, realtime_ns - (before_ns + after_ns) // 2))
    return min(readings)[1]


class UdpSender(UdpListener):
    """Sends to one address from the start, as PX4 does to port 14540."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        super().__init__()
        self.peers[(host, port)] = None


class TcpListener:
    """Serves the newest connection, as ArduPilot's simulation on port 5760."""

    def __init__(self, port: int = 0) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._peer: socket.socket | None = None

    def filenos(self) -> list[int]:
        return [s.fileno() for s in (self._listener, self._peer) if s is not None]

    def receive(self) -> list[Arrival]:
        with contextlib.suppress(BlockingIOError):
            peer, _ = self._listener.accept()
            self.drop()
            peer.setblocking(False)
            self._peer = peer
        if self._peer is None:
            return []
        try:
            data = self._peer.recv(MAX_DATAGRAM_BYTES)
        except BlockingIOError:
            return []
        except ConnectionError:
            data = b""
        if not data:
            self.drop()
        return [Arrival(data, time.monotonic_ns())] if data else []

    def send(self, data: bytes) -> None:
        if self._peer is not None:
            with contextlib.suppress(OSError):
                self._peer.send(data)

    def drop(self) -> None:
        """End the connection; a new one is accepted."""
        if self._peer is not None:
            self._peer.close()
            self._peer = None

    def close(self) -> None:
        self.drop()
        self._listener.close()


class SerialPort:
    """A pseudo-terminal whose other end is at a path of the caller's choice; it can be unplugged and come back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None
        self._slave_fd: int | None = None  # kept open: without a reader the kernel would report a hang-up
        self.plug_in()

    def plug_in(self) -> None:
        self._fd, self._slave_fd = os.openpty()
        tty.setraw(self._fd)
        tty.setraw(self._slave_fd)
        os.set_blocking(self._fd, False)
        self.path.unlink(missing_ok=True)
        self.path.symlink_to(os.ttyname(self._slave_fd))

    def unplug(self) -> None:
        self.path.unlink(missing_ok=True)
        for fd in (self._slave_fd, self._fd):
            if fd is not None:
                os.close(fd)
        self._fd = self._slave_fd = None

    def filenos(self) -> list[int]:
        return [] if self._fd is None else [self._fd]

    def receive(self) -> list[Arrival]:
        if self._fd is None:
            return []
        with contextlib.suppress(BlockingIOError, OSError):
            return [Arrival(os.read(self._fd, MAX_DATAGRAM_BYTES), time.monotonic_ns())]
        return []

    def send(self, data: bytes) -> None:
        if self._fd is not None and select.select([], [self._fd], [], 0)[1]:
            with contextlib.suppress(OSError):
                os.write(self._fd, data)

    def close(self) -> None:
        self.unplug()
