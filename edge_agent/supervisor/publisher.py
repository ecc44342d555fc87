"""The sockets: one endpoint per stream below the runtime folder. Publishing never waits; control is polled.

Messages are made elsewhere (messages.py). Only ipc:// endpoints exist: who may open the folder may listen and command,
so the folder is 0750 and the sockets 0660. A lock file keeps a second daemon from taking the endpoints without a word.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

import zmq

from edge_agent.errors import UserError
from edge_agent.wire.endpoints import endpoint
from edge_agent.wire.messages import MAX_MESSAGE_BYTES, Header
from edge_agent.wire.streams import STREAMS, pack

MAX_REQUESTS_PER_TURN = 64
MAX_SOCKET_PATH_BYTES = 107  # sun_path
PUBLISH_HWM = {"actions": 8, "text": 1000, "status": 8}  # a slow subscriber loses messages, and sees it in seq


class EndpointError(UserError):
    """The endpoints cannot be bound. One line."""

    exit_status = os.EX_CONFIG


class Publisher:
    """Owns the lock file and the sockets."""

    def __init__(self, folder: Path) -> None:
        """Bind everything. Raises LinkError."""
        self.folder = folder
        longest = max(len(os.fsencode(folder / stream)) for stream in STREAMS)
        if longest > MAX_SOCKET_PATH_BYTES:
            raise EndpointError(
                f"runtime_dir: {folder}: socket paths may have {MAX_SOCKET_PATH_BYTES} bytes, found {longest}; use a "
                "shorter folder"
            )
        try:
            folder.mkdir(mode=0o750, parents=True, exist_ok=True)
            status = folder.stat()
            if status.st_uid != os.geteuid():
                raise EndpointError(
                    f"runtime_dir: {folder}: belongs to uid {status.st_uid}, we are {os.geteuid()}; choose another"
                )
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        except OSError as error:
            raise EndpointError(
                f"runtime_dir: {folder}: {error.strerror}; set runtime_dir to a folder of yours"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise EndpointError(
                f"runtime_dir: {folder}: another edge-agent runs there; stop it, or set another runtime_dir"
            ) from None
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket] = {}
        self._seq = dict.fromkeys(STREAMS, 0)
        old_umask = os.umask(0o117)
        try:
            for stream, row in STREAMS.items():
                self._bind(stream, getattr(zmq, row.socket))
        except zmq.ZMQError as error:
            self.close()
            raise EndpointError(f"runtime_dir: {endpoint(folder, stream)}: cannot be bound: {error.strerror}") from None
        finally:
            os.umask(old_umask)

    def _bind(self, stream: str, kind: int) -> None:
        socket = self._sockets[stream] = self._context.socket(kind)  # known before it can fail: close() finds it
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        if stream in PUBLISH_HWM:
            socket.setsockopt(zmq.SNDHWM, PUBLISH_HWM[stream])
        else:
            socket.setsockopt(zmq.RCVHWM, 256)
            socket.setsockopt(zmq.SNDHWM, 256)
        if stream == "status":
            socket.setsockopt(zmq.XPUB_VERBOSE, 1)  # every subscription is told, so that each gets the last value
        socket.bind(endpoint(self.folder, stream))

    def close(self) -> None:
        for stream, socket in self._sockets.items():
            socket.close(linger=100 if stream == "status" else 0)  # the last status says why there is no next one
            with contextlib.suppress(OSError):
                (self.folder / stream).unlink()
        self._context.term()
        os.close(self._lock)

    @property
    def control(self) -> zmq.Socket:
        return self._sockets["control"]

    @property
    def status(self) -> zmq.Socket:
        return self._sockets["status"]

    def next_seq(self, stream: str) -> int:
        return self._seq[stream]

    def publish(self, stream: str, message: Header) -> None:
        """Send or drop, never wait. A PUB socket drops for a full subscriber by itself."""
        payload = pack(stream, message)
        self._seq[stream] += 1
        with contextlib.suppress(zmq.Again):
            self._sockets[stream].send(payload, zmq.NOBLOCK)

    def new_subscriber(self) -> bool:
        """Whether somebody subscribed to status since the last call; of a flood, some are left for the next."""
        subscribed = False
        with contextlib.suppress(zmq.Again):
            for _ in range(MAX_REQUESTS_PER_TURN):
                subscribed |= self.status.recv(zmq.NOBLOCK)[:1] == b"\x01"
        return subscribed

    def requests(self) -> list[tuple[list[bytes], bytes]]:
        """(who asks, payload) of waiting requests; at most 64: a flood must not hold up a frame."""
        found = []
        with contextlib.suppress(zmq.Again):
            while len(found) < MAX_REQUESTS_PER_TURN:
                *sender, payload = self.control.recv_multipart(zmq.NOBLOCK)
                found.append((sender, payload))
        return found

    def reply(self, sender: list[bytes], payload: bytes) -> None:
        with contextlib.suppress(zmq.Again, zmq.ZMQError):
            self.control.send_multipart([*sender, payload], zmq.NOBLOCK)
