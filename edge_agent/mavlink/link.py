"""The link to the autopilot: messages in, messages out, opened again when it is lost.

Damaged packets are dropped by their CRC and counted. Nothing that arrives can end the program.
"""

from __future__ import annotations

import contextlib
import select
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

from edge_agent.mavlink.autopilot import Heard
from edge_agent.mavlink.config import Connection
from edge_agent.mavlink.dialect import mavlink
from edge_agent.mavlink.transport import Address, LinkLost, Received, Transport, open_transport
from edge_agent.time_units import NS_PER_S

COMPONENT = mavlink.MAV_COMP_ID_ONBOARD_COMPUTER
FIRST_PAUSE_NS, MAX_PAUSE_NS = NS_PER_S // 10, 2 * NS_PER_S
# What pymavlink raises on bytes that it cannot read; MAVError is not all of it.
PARSE_ERRORS = (mavlink.MAVError, struct.error, ValueError, TypeError, IndexError, KeyError, OverflowError)


class Link:
    """Owns a transport; close() frees it."""

    def __init__(
        self,
        connection: Connection,
        system: int,
        clock: Callable[[], int],
        opener: Callable[[Connection], Transport] = open_transport,
    ) -> None:
        """system: of the vehicle; we are a component of it. opener: for tests."""
        self._connection, self._clock, self._open = connection, clock, opener
        self.counts: Counter[str] = Counter()
        self.why_lost = "not opened yet"
        self._transport: Transport | None = None
        self._pause_ns, self._next_try_ns = FIRST_PAUSE_NS, clock()
        self._out = mavlink.MAVLink(None, srcSystem=system, srcComponent=COMPONENT)
        self._parser = _parser()

    # -- open and close -----------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self._transport is not None

    @property
    def is_behind(self) -> bool:
        """More has arrived than receive() has read: what the autopilot says now is not known yet."""
        return self._transport is not None and bool(select.select(self.descriptors(), [], [], 0)[0])

    @property
    def fixed_peer(self) -> Address | None:
        return (self._connection.address, self._connection.number) if self._connection.kind == "udpout" else None

    def descriptors(self) -> tuple[int, ...]:
        """To wait for."""
        return () if self._transport is None else (self._transport.fileno(),)

    def open_if_due(self) -> bool:
        """Try to open a link that is lost, with growing pauses. True: it has been opened now."""
        now_ns = self._clock()
        if self._transport is not None or now_ns < self._next_try_ns:
            return False
        try:
            self._transport = self._open(self._connection)
        except LinkLost as error:
            self._lose(str(error))
            return False
        self._parser, self.why_lost = _parser(), ""
        self.counts["opened"] += 1
        return True

    def _lose(self, why: str) -> None:
        if self._transport is not None:
            with contextlib.suppress(OSError):
                self._transport.close()
            self._transport = None
            self.counts["lost"] += 1
        self.why_lost = why
        self._next_try_ns = self._clock() + self._pause_ns
        self._pause_ns = min(2 * self._pause_ns, MAX_PAUSE_NS)

    def reopen(self, why: str) -> None:
        """Drop what lies in the queues."""
        if self._transport is not None:
            self._lose(why)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    # -- messages -----------------------------------------------------------------------------------------------------

    def receive(self) -> list[Heard]:
        """What has arrived, at most a bounded amount. A link that is lost meanwhile gives nothing."""
        if self._transport is None:
            return []
        try:
            received = self._transport.read()
        except LinkLost as error:
            self._lose(str(error))
            return []
        heard = [message for part in received for message in self._parse(part)]
        if heard:
            self._pause_ns = FIRST_PAUSE_NS
        return heard

    def _parse(self, received: Received) -> list[Heard]:
        if received.is_whole:
            self._parser = _parser()  # half a packet in a datagram does not take the next one with it
        try:
            messages = self._parser.parse_buffer(received.data) or []
        except PARSE_ERRORS:
            self.counts["damaged"] += 1
            self._parser = _parser()
            return []
        del self._parser.buf[: self._parser.buf_index]  # pymavlink drops it only when all of it is read
        self._parser.buf_index = 0
        heard = []
        for message in messages:
            kind = message.get_type()
            if kind == "BAD_DATA":
                self.counts["damaged"] += 1
            elif not kind.startswith("UNKNOWN"):
                is_version_1 = message.get_msgbuf()[0] == mavlink.PROTOCOL_MARKER_V1
                heard.append(
                    Heard(
                        message, message.get_srcSystem(), message.get_srcComponent(), message.get_seq(), is_version_1,
                        received.peer,
                    )
                )  # fmt: skip
        return heard

    def send(self, message: Any, peer: Address | None, can_wait: bool = False, until_ns: int | None = None) -> bool:
        """Now or never. False: it was not sent. peer: where to, if the link can have several. can_wait: a slow link is
        left to the setpoints. until_ns: not then or later; the clock is read when the packet is ready, because the
        process may be stopped meanwhile."""
        if self._transport is None:
            return False
        packet = bytes(message.pack(self._out))
        if until_ns is not None and self._clock() >= until_ns:
            self.counts["expired before it was sent"] += 1
            return False
        self._out.seq = (self._out.seq + 1) % 256
        try:
            is_sent = self._transport.write(packet, peer, can_wait)
        except LinkLost as error:
            self._lose(str(error))
            return False
        if not is_sent:
            self.counts["not sent"] += 1
        return is_sent


def _parser() -> Any:
    parser = mavlink.MAVLink(None)
    parser.robust_parsing = True  # damaged bytes become a message BAD_DATA
    return parser
