"""A peer that writes ZMTP by hand: what a ZeroMQ library would never send, and what one may send."""

from __future__ import annotations

import socket
from pathlib import Path

from edge_agent.zmtp.frames import COMMAND, GREETING

HANG_S = 60.0


def frame(body: bytes, flags: int = 0) -> bytes:
    """One frame in the long form, which every peer must take."""
    return bytes((flags | 2,)) + len(body).to_bytes(8, "big") + body


def command(name: bytes, data: bytes = b"") -> bytes:
    return frame(bytes((len(name),)) + name + data, COMMAND)


def ready(socket_type: bytes, identity: bytes = b"") -> bytes:
    properties = ((b"Socket-Type", socket_type), (b"Identity", identity))
    return command(
        b"READY", b"".join(bytes((len(k),)) + k + len(value).to_bytes(4, "big") + value for k, value in properties)
    )


class RawPeer:
    """Connected to a path; the handshake is sent."""

    def __init__(self, path: Path, socket_type: bytes, identity: bytes = b"") -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(HANG_S)
        self.socket.connect(str(path))
        self.send(GREETING, ready(socket_type, identity))

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *_error: object) -> None:
        self.socket.close()

    def send(self, *data: bytes) -> None:
        self.socket.sendall(b"".join(data))

    def is_ended(self) -> bool:
        """Whether the other side has ended the connection. What it sent before is lost."""
        self.socket.setblocking(False)
        try:
            while self.socket.recv(65536):
                pass
        except BlockingIOError:
            return False
        except ConnectionError:
            pass
        return True
