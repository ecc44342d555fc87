"""ZMTP 3.0, the protocol below ZeroMQ, as bytes: what the daemon writes, and a reader of what one peer sends.

    reader = Reader(peers=frozenset({b"DEALER", b"REQ"}), max_message_bytes=65_536, max_parts=2)
    space = reader.space(scratch)
    for parts in reader.take(space[: connection.recv_into(space)]):
        ...

There is no input or output here. The security mechanism is NULL: who may connect is decided by the file system.
https://rfc.zeromq.org/spec/23/
"""

from __future__ import annotations

from collections.abc import Iterator

GREETING_BYTES = 64
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)  # version 3.0
MORE, LONG, COMMAND = 1, 2, 4  # flags of a frame
MAX_COMMAND_BYTES = 1024
MAX_IDENTITY_BYTES = 255
LARGE_BYTES = 64 * 1024  # the body of a longer frame is received into memory of its own, without a copy

Body = bytes | bytearray
Message = list[Body]  # its parts


class ProtocolError(Exception):
    """The peer sent what this endpoint does not take. The connection ends."""


def pack_message(*parts: bytes) -> bytes:
    """One message as frames."""
    last = len(parts) - 1
    return b"".join(_frame(part, MORE if i < last else 0) for i, part in enumerate(parts))


def pack_ready(socket_type: bytes) -> bytes:
    """The command READY of a socket of this type."""
    return _frame(b"\x05READY" + _property(b"Socket-Type", socket_type) + _property(b"Identity", b""), COMMAND)


def _frame(body: bytes, flags: int) -> bytes:
    if len(body) < 256:
        return bytes((flags, len(body))) + body
    return bytes((flags | LONG,)) + len(body).to_bytes(8, "big") + body


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value


class Reader:
    """The bytes of one peer -> its messages. It holds at most one incomplete message of max_message_bytes.

    is_greeted: the greeting has arrived. is_ready: the handshake is done. identity: the routing id that the peer chose.
    outgoing: bytes to send to the peer; the caller empties it.
    """

    def __init__(self, peers: frozenset[bytes], max_message_bytes: int, max_parts: int) -> None:
        """peers: socket types that may connect. max_message_bytes, max_parts: of one message."""
        self._peers, self._max_bytes, self._max_parts = peers, max_message_bytes, max_parts
        self.is_ready = False
        self.identity = b""
        self.outgoing = b""
        self.is_greeted = False
        self._rest = b""  # the beginning of a greeting or of a frame
        self._large: bytearray | None = None  # the body of a large frame, of which _n_filled bytes have arrived
        self._large_flags = self._n_filled = 0
        self._parts: Message = []  # of an incomplete message
        self._n_bytes = 0  # in _parts

    def space(self, scratch: memoryview) -> memoryview:
        """Where the next bytes of the peer belong: in the body of a large frame, or in `scratch`."""
        return scratch if self._large is None else memoryview(self._large)[self._n_filled :]

    def take(self, received: memoryview) -> list[Message]:
        """The messages that are complete with these bytes. received: the part of space() that was filled.

        A subscription is a message b"\\x01" + topic, its end b"\\x00" + topic, also if the peer sent it as a command.
        Raises ProtocolError.
        """
        if self._large is not None:
            self._n_filled += len(received)
            if self._n_filled < len(self._large):
                return []
            body, self._large = self._large, None
            return list(self._add_frame(self._large_flags, body))
        data = self._rest + received
        position = 0
        if not self.is_greeted:
            if not self._check_greeting(data):
                self._rest = data
                return []
            position = GREETING_BYTES
        return list(self._take_frames(data, position))

    def _check_greeting(self, data: bytes) -> bool:
        """Whether the greeting is complete. Raises ProtocolError if it is none of ZMTP 3 with mechanism NULL."""
        if data[:1] not in (b"", b"\xff"):
            raise ProtocolError("not ZMTP")
        if len(data) < GREETING_BYTES:
            return False
        if not data[9] & 1 or data[10] < 3 or data[12:32] != GREETING[12:32]:
            raise ProtocolError("expected ZMTP 3 with mechanism NULL")
        self.is_greeted = True
        return True

    def _take_frames(self, data: bytes, position: int) -> Iterator[Message]:
        while len(data) - position >= 2:
            flags = data[position]
            head_bytes = 9 if flags & LONG else 2
            if len(data) - position < head_bytes:
                break
            body_bytes = int.from_bytes(data[position + 1 : position + head_bytes], "big")
            self._check_size(flags, body_bytes)
            start = position + head_bytes
            body = data[start : start + body_bytes]
            position = start + len(body)
            if len(body) == body_bytes:
                yield from self._add_frame(flags, body)
            elif body_bytes > LARGE_BYTES:
                # Pages that nothing was written to cost nothing: a peer cannot make us hold what it only announces.
                self._large, self._large_flags, self._n_filled = bytearray(body_bytes), flags, len(body)
                self._large[: len(body)] = body
                position = len(data)
            else:
                position = start - head_bytes
                break
        self._rest = data[position:]

    def _check_size(self, flags: int, body_bytes: int) -> None:
        limit = MAX_COMMAND_BYTES if flags & COMMAND else self._max_bytes - self._n_bytes
        if flags & ~(MORE | LONG | COMMAND) or body_bytes > limit:
            raise ProtocolError(f"a frame of {body_bytes} bytes with flags {flags}; at most {limit} bytes")

    def _add_frame(self, flags: int, body: Body) -> Iterator[Message]:
        if flags & COMMAND:
            yield from self._command(bytes(body))
            return
        if not self.is_ready or len(self._parts) >= self._max_parts:
            raise ProtocolError(f"expected READY, then messages of at most {self._max_parts} parts")
        self._parts.append(body)
        self._n_bytes += len(body)
        if not flags & MORE:
            message, self._parts, self._n_bytes = self._parts, [], 0
            yield message

    def _command(self, body: bytes) -> Iterator[Message]:
        name_bytes = body[0] if body else 0
        name, data = body[1 : 1 + name_bytes], body[1 + name_bytes :]
        if not self.is_ready:
            if name != b"READY":
                raise ProtocolError(f"expected READY, found {name!r}")
            self._check_properties(_properties(data))
            self.is_ready = True
        elif name == b"SUBSCRIBE":  # ZMTP 3.1
            yield [b"\x01" + data]
        elif name == b"CANCEL":
            yield [b"\x00" + data]
        elif name == b"PING":  # two bytes of time-to-live, then what the answer repeats
            self.outgoing += _frame(b"\x04PONG" + data[2:18], COMMAND)
        elif name == b"ERROR":
            raise ProtocolError("the peer ends the connection")

    def _check_properties(self, properties: dict[bytes, bytes]) -> None:
        socket_type = properties.get(b"socket-type", b"")
        if socket_type not in self._peers:
            raise ProtocolError(f"expected one of {sorted(self._peers)}, found {socket_type!r}")
        self.identity = properties.get(b"identity", b"")
        if len(self.identity) > MAX_IDENTITY_BYTES or self.identity[:1] == b"\0":  # ours begin with a zero byte
            raise ProtocolError(f"an identity of {len(self.identity)} bytes, or one that begins with a zero byte")


def _properties(data: bytes) -> dict[bytes, bytes]:
    """Name in small letters -> value. Raises ProtocolError."""
    found: dict[bytes, bytes] = {}
    while data:
        name_end = 1 + data[0]
        value_start = name_end + 4
        value_end = value_start + int.from_bytes(data[name_end:value_start], "big")
        if value_end > len(data):
            raise ProtocolError("a property is cut off")
        found[data[1:name_end].lower()] = data[value_start:value_end]
        data = data[value_end:]
    return found
