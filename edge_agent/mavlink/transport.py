"""Bytes to and from the autopilot: UDP, TCP or a serial port. Never waits, and keeps no packet for later.

A packet that the link does not take now is dropped: a setpoint that arrives late is worse than none. Errors of the
link are LinkLost.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import struct
import termios
from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

from edge_agent.mavlink.config import Connection

MAX_DATAGRAM = 2048  # larger ones are cut; autopilots send one network packet at most
MAX_READS = 32  # of one turn: a flood does not keep the loop from its work
MAX_BYTES = 8192
CONNECT_S = 0.2
MAX_UNSENT = 512  # bytes in the kernel's queue: then the link stands still
BUSY = 128  # bytes: then only setpoints are sent, and what can wait is not
BAUD_RATES = {int(name[1:]): getattr(termios, name) for name in dir(termios) if name[0] == "B" and name[1:].isdigit()}
Address = tuple[str, int]


class LinkLost(Exception):
    """One line: what happened to the link."""


class Received(NamedTuple):
    data: bytes
    peer: Address | None  # None: the link has one peer
    is_whole: bool  # a datagram: it begins and ends with a packet


class Transport(Protocol):
    @property
    def fixed_peer(self) -> Address | None:
        """The only address that counts, if the configuration names it."""

    def fileno(self) -> int: ...
    def read(self) -> list[Received]: ...
    def write(self, packet: bytes, peer: Address | None, can_wait: bool) -> bool: ...
    def close(self) -> None: ...


def open_transport(connection: Connection) -> Transport:
    """Raises LinkLost."""
    try:
        if connection.kind == "serial":
            return Serial(connection.address, connection.number)
        if connection.kind == "tcp":
            return Tcp((connection.address, connection.number))
        return Udp(connection.kind, (connection.address, connection.number))
    except (OSError, termios.error) as error:
        number = error.args[0] if error.args else None
        text = os.strerror(number) if isinstance(number, int) else str(error)
        raise LinkLost(f"{connection.kind}:{connection.address}:{connection.number}: {text}") from None


class Udp:
    def __init__(self, kind: str, address: Address) -> None:
        self.fixed_peer = address if kind == "udpout" else None
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            if kind == "udpin":
                self._socket.bind(address)
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> list[Received]:
        received = []
        for _ in range(MAX_READS):
            try:
                data, peer = self._socket.recvfrom(MAX_DATAGRAM)
            except BlockingIOError:
                break
            except ConnectionRefusedError:  # of a packet that was sent before: nobody listens there yet
                continue
            except OSError as error:
                raise LinkLost(f"UDP: {error.strerror}") from None
            received.append(Received(data, peer, is_whole=True))
        return received

    def write(self, packet: bytes, peer: Address | None, can_wait: bool) -> bool:
        if peer is None:
            return False
        try:
            return self._socket.sendto(packet, peer) == len(packet)
        except OSError:  # no buffer, no route, nobody listens: UDP has no connection that could be lost
            return False

    def close(self) -> None:
        self._socket.close()


class _Stream(ABC):
    """A link whose bytes come in a row: TCP and serial."""

    fixed_peer: Address | None = None
    name = ""

    def __init__(self) -> None:
        self._rest = b""  # of a packet that the kernel has taken in part

    @abstractmethod
    def fileno(self) -> int: ...

    @abstractmethod
    def _flush(self) -> None:
        """Drop what was not sent."""

    @abstractmethod
    def _unsent(self) -> int: ...

    def read(self) -> list[Received]:
        try:
            data = os.read(self.fileno(), MAX_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise LinkLost(f"{self.name}: {error.strerror}") from None
        if not data:
            raise LinkLost(f"{self.name}: the other side has closed")
        return [Received(data, None, is_whole=False)]

    def write(self, packet: bytes, _peer: Address | None, can_wait: bool) -> bool:
        """can_wait: drop it if there is a queue. Raises LinkLost if the packets before this one still lie in it."""
        try:
            unsent = self._unsent()
            if self._rest or unsent > MAX_UNSENT:
                self._flush()
                raise LinkLost(f"{self.name}: the other side does not read")
            if can_wait and unsent > BUSY:
                return False
            sent = os.write(self.fileno(), packet)
        except BlockingIOError:
            return False
        except OSError as error:
            raise LinkLost(f"{self.name}: {error.strerror}") from None
        self._rest = packet[sent:]
        return not self._rest


class Tcp(_Stream):
    def __init__(self, address: Address) -> None:
        super().__init__()
        self.name = f"TCP {address[0]}:{address[1]}"
        self._socket = socket.create_connection(address, timeout=CONNECT_S)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # close() drops what was not sent: it would arrive late.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def fileno(self) -> int:
        return self._socket.fileno()

    def _unsent(self) -> int:
        return _queued(self.fileno(), termios.TIOCOUTQ)

    def _flush(self) -> None:
        self._socket.close()

    def close(self) -> None:
        self._socket.close()


class Serial(_Stream):
    def __init__(self, device: str, baud: int) -> None:
        super().__init__()
        self.name = f"serial port {device}"
        if baud not in BAUD_RATES:
            raise LinkLost(f"{self.name}: expected a baud rate of {sorted(BAUD_RATES)[-20:]}; found {baud}")
        self._fd = os.open(device, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(self._fd, termios.TIOCEXCL)  # no second program beside us
            self._set_raw(BAUD_RATES[baud])
            termios.tcflush(self._fd, termios.TCIOFLUSH)
        except BaseException:
            os.close(self._fd)
            raise

    def _set_raw(self, speed: int) -> None:
        """8 bits, no parity, 1 stop bit, no flow control, no characters with a meaning."""
        attributes = termios.tcgetattr(self._fd)
        characters = attributes[6]
        characters[termios.VMIN], characters[termios.VTIME] = b"\x01", b"\x00"  # no data: EAGAIN, not 0 bytes
        control = termios.CS8 | termios.CREAD | termios.CLOCAL
        attributes[:] = [0, 0, control, 0, speed, speed, characters]
        termios.tcsetattr(self._fd, termios.TCSANOW, attributes)

    def fileno(self) -> int:
        return self._fd

    def _unsent(self) -> int:
        return _queued(self._fd, termios.TIOCOUTQ)

    def _flush(self) -> None:
        with contextlib.suppress(termios.error):
            termios.tcflush(self._fd, termios.TCOFLUSH)

    def close(self) -> None:
        self._flush()
        os.close(self._fd)


def _queued(fd: int, request: int) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(fd, request, count)
    return count[0]
