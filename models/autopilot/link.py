"""One MAVLink connection of an autopilot: codec, message rates, and faults of the line.

The rates are those of this connection, as in both autopilots: MAV_CMD_SET_MESSAGE_INTERVAL changes them for the one who
asks. Nothing here waits.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from edge_agent.mavlink.dialect import mavlink
from models.autopilot.autopilot import NS_PER_S, Autopilot
from models.autopilot.flavours import TELEMETRY
from models.autopilot.ports import Port
from models.autopilot.telemetry import MESSAGES

MAX_LATE_S = 0.5  # a message that is later than this is not caught up


class Received(NamedTuple):
    """A message that arrived, and the autopilot's state at that time."""

    t_ns: int
    message: Any  # of pymavlink
    outcome: str  # of a setpoint: followed, heard or refused; "" for other messages
    mode: str
    is_armed: bool

    @property
    def type(self) -> str:
        return str(self.message.get_type())

    @property
    def source(self) -> tuple[int, int]:
        return self.message.get_srcSystem(), self.message.get_srcComponent()


class LineFaults:
    """What happens to packets on the way: probabilities, from a seed."""

    def __init__(self, seed: int = 0, **shares: float) -> None:
        """shares: lose, duplicate, delay (behind the next packet), flip (one bit), cut (a part of the packet)."""
        self._random = random.Random(seed)
        self.shares = shares
        self.directions = {"in", "out"}  # to the autopilot, from the autopilot
        self._delayed: dict[str, bytes] = {}  # direction -> packet that waits for the next one

    def apply(self, packet: bytes, direction: str) -> list[bytes]:
        if direction not in self.directions:
            return [packet]
        happens = {name: self._random.random() < share for name, share in self.shares.items()}
        if happens.get("lose"):
            return []
        if happens.get("flip"):
            i = self._random.randrange(len(packet))
            packet = packet[:i] + bytes([packet[i] ^ 1 << self._random.randrange(8)]) + packet[i + 1 :]
        if happens.get("cut"):
            packet = packet[: self._random.randrange(len(packet))]
        if happens.get("delay") and direction not in self._delayed:
            self._delayed[direction] = packet
            return []
        packets = [packet, *([self._delayed.pop(direction)] if direction in self._delayed else [])]
        return packets * 2 if happens.get("duplicate") else packets


class Link:
    """Owns a port. `silent`, `changed` and `faults` are a test's to set at any time."""

    def __init__(self, autopilot: Autopilot, port: Port, clock: Callable[[], int]) -> None:
        self.autopilot, self.port, self._clock = autopilot, port, clock
        self.is_cut = False  # nothing gets through, in either direction
        self.silent: set[str] = set()  # message types that are not sent
        self.changed: dict[str, dict[str, Any]] = {}  # message type -> field -> value in place of the right one
        self.faults: LineFaults | None = None
        self.is_mavlink1 = False
        self.bad_bytes = 0
        self._told_mode = autopilot.mode
        self._codec = mavlink.MAVLink(None, srcSystem=autopilot.system, srcComponent=autopilot.component)
        self._parser = mavlink.MAVLink(None)
        self._parser.robust_parsing = True
        self._interval_ns: dict[str, int] = {}
        self._due_ns: dict[str, int] = {}
        for name, rate_hz in autopilot.flavour.default_rates_hz.items():
            self.set_interval(name, round(NS_PER_S / rate_hz))

    def set_interval(self, name: str, interval_ns: int) -> None:
        """interval_ns: 0: do not send."""
        self._interval_ns.pop(name, None)
        self._due_ns.pop(name, None)
        if interval_ns:
            self._interval_ns[name], self._due_ns[name] = interval_ns, self._clock()

    @property
    def next_due_ns(self) -> int:
        return min(self._due_ns.values(), default=self._clock() + NS_PER_S)

    def receive(self) -> list[Received]:
        """Read and carry out what has arrived."""
        found = []
        for data, t_ns in self.port.receive():
            packets = [data] if self.faults is None else self.faults.apply(data, "in")
            for message in [m for packet in packets for m in self._parser.parse_buffer(packet) or []]:
                if self.is_cut:
                    continue
                if message.get_type() == "BAD_DATA" or message.get_type().startswith("UNKNOWN"):
                    self.bad_bytes += len(message.get_msgbuf())
                    continue
                mode, is_armed = self.autopilot.mode, self.autopilot.is_armed
                outcome, replies = self.autopilot.receive(message)
                found.append(Received(t_ns, message, outcome, mode, is_armed))
                for reply in replies:
                    self.send(reply)
                if replies and getattr(replies[0], "result", None) == mavlink.MAV_RESULT_ACCEPTED:
                    self._serve(message)
        return found

    def _serve(self, command: Any) -> None:
        """The commands that concern this connection alone."""
        if command.command == mavlink.MAV_CMD_SET_MESSAGE_INTERVAL:
            name, interval_us = TELEMETRY[int(command.param1)], command.param2
            default_hz = self.autopilot.flavour.default_rates_hz.get(name, 0.0)
            default_ns = round(NS_PER_S / default_hz) if default_hz else 0
            self.set_interval(
                name, round(interval_us * 1000) if interval_us > 0 else 0 if interval_us < 0 else default_ns
            )
        elif command.command == mavlink.MAV_CMD_REQUEST_MESSAGE:
            self.send(MESSAGES[TELEMETRY[int(command.param1)]](self.autopilot))

    def send_due(self) -> None:
        now_ns, mode = self._clock(), self.autopilot.mode
        if mode != self._told_mode and self.autopilot.flavour.tells_mode_at_once and "HEARTBEAT" in self._due_ns:
            self._due_ns["HEARTBEAT"] = now_ns
        self._told_mode = mode
        for name, due_ns in list(self._due_ns.items()):
            if now_ns >= due_ns:
                self.send(MESSAGES[name](self.autopilot))
                next_ns = due_ns + self._interval_ns[name]
                self._due_ns[name] = next_ns if now_ns - next_ns < MAX_LATE_S * NS_PER_S else now_ns

    def tell(self, name: str) -> None:
        """Send a message of this type now."""
        self.send(MESSAGES[name](self.autopilot))

    def send(self, message: Any) -> None:
        name = message.get_type()
        for field, value in self.changed.get(name, {}).items():
            setattr(message, field, value)
        if name not in self.silent:
            self.send_bytes(message.pack(self._codec, force_mavlink1=self.is_mavlink1))
            self._codec.seq = (self._codec.seq + 1) % 256

    def send_bytes(self, packet: bytes) -> None:
        if not self.is_cut:
            for part in [packet] if self.faults is None else self.faults.apply(packet, "out"):
                self.port.send(part)

    def forward(self, message: Any) -> None:
        """Pass a message of another connection on, byte for byte, as both autopilots do with a broadcast."""
        self.send_bytes(bytes(message.get_msgbuf()))
