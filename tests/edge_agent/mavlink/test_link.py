"""Real sockets and a real pseudo terminal: what arrives damaged, what vanishes and returns, what is never sent late."""

from __future__ import annotations

import os
import pty
import random
import select
import socket
from pathlib import Path

import pytest

from edge_agent.mavlink.config import Connection
from edge_agent.mavlink.dialect import mavlink
from edge_agent.mavlink.link import MAX_PAUSE_NS, Link
from edge_agent.mavlink.setpoint import HOLD, encode
from edge_agent.mavlink.transport import LinkLost, Serial, Tcp
from edge_agent.time_units import NS_PER_S
from tests.harness.clock import FakeClock
from tests.harness.mavlink_rig import heartbeat

WAIT_S = 20.0  # bounds a hang, not a duration


def packet(message=None, system: int = 1, component: int = 1, version_1: bool = False) -> bytes:
    sender = mavlink.MAVLink(None, system, component)
    return bytes((message or heartbeat()).pack(sender, force_mavlink1=version_1))


def attitude(yaw: float) -> bytes:
    return packet(mavlink.MAVLink_attitude_message(1000, 0, 0, yaw, 0, 0, 0))


class Peer:
    """The other end of a UDP link, and the link itself."""

    def __init__(self, kind: str = "udpout") -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.settimeout(WAIT_S)
        port = self.socket.getsockname()[1] if kind == "udpout" else free_port()
        self.clock = FakeClock()
        self.link = Link(Connection(kind, "127.0.0.1", port), 1, self.clock)
        assert self.link.open_if_due()
        self.address = ("127.0.0.1", port)

    def __enter__(self) -> Peer:
        if self.link.fixed_peer is not None:
            assert self.link.send(encode(HOLD, 0, 1, 1), self.address)
            self.address = self.socket.recvfrom(2048)[1]
        return self

    def __exit__(self, *_error: object) -> None:
        self.link.close()
        self.socket.close()

    def hear(self, *datagrams: bytes) -> list:
        for datagram in datagrams:
            self.socket.sendto(datagram, self.address)
        select.select(self.link.descriptors(), [], [], WAIT_S)
        return self.link.receive()


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def peer():
    with Peer() as made:
        yield made


# -- bytes ------------------------------------------------------------------------------------------------------------


def test_a_message_and_its_header(peer):
    (heard,) = peer.hear(packet(system=3, component=7))
    assert (heard.message.get_type(), heard.system, heard.component) == ("HEARTBEAT", 3, 7)
    assert heard.peer == peer.socket.getsockname() and not heard.is_version_1


def test_several_messages_in_one_datagram(peer):
    assert len(peer.hear(packet() + attitude(1.0) + packet())) == 3


def test_mavlink_1_is_known_as_such(peer):
    (heard,) = peer.hear(packet(version_1=True))
    assert heard.is_version_1


def test_half_a_packet_does_not_take_the_next_one_with_it(peer):
    heard = peer.hear(attitude(1.0)[:20], attitude(2.0))
    assert [h.message.yaw for h in heard] == [2.0]


def test_no_flipped_bit_gets_through(peer):
    """Of HEARTBEAT, whose bits arm the vehicle in our eyes."""
    whole = packet()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        heard = peer.link._parse(type("R", (), {"data": bytes(damaged), "peer": None, "is_whole": True}))
        # Only a flip in the compatibility flags' byte or in the marker could leave a message: the CRC covers the rest.
        assert heard == [], bit


def test_the_environment_cannot_switch_the_crc_off():
    assert mavlink.MAVLINK_IGNORE_CRC == 0


@pytest.mark.parametrize("seed", range(5))
def test_nothing_that_arrives_ends_the_program(peer, seed):
    rng = random.Random(seed)
    for _ in range(200):
        data = bytearray(rng.choice((packet(), attitude(0.5), rng.randbytes(60))))
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.choice((0xFD, 0xFE, 0x00, 0xFF, rng.randrange(256)))
        for is_whole in (True, False):
            peer.link._parse(type("R", (), {"data": bytes(data), "peer": None, "is_whole": is_whole}))
        assert peer.link._parser.buf_len() < 600
    peer.link._parse(type("R", (), {"data": bytes(600), "peer": None, "is_whole": False}))
    assert [h.message.yaw for h in peer.hear(attitude(0.25))] == [0.25]


def test_a_row_of_bytes_is_cut_anywhere():
    link = Link(Connection("tcp", "127.0.0.1", 1), 1, FakeClock())
    row = packet() + attitude(1.0) + packet(system=9)
    for cut in range(1, len(row)):
        heard = []
        for part in (row[:cut], row[cut:]):
            heard += link._parse(type("R", (), {"data": part, "peer": None, "is_whole": False}))
        assert [h.message.get_type() for h in heard] == ["HEARTBEAT", "ATTITUDE", "HEARTBEAT"]


def test_a_flood_is_read_in_parts(peer):
    for _ in range(100):
        peer.socket.sendto(packet(), peer.address)
    select.select(peer.link.descriptors(), [], [], WAIT_S)
    assert 0 < len(peer.link.receive()) <= 32


# -- what is sent -----------------------------------------------------------------------------------------------------


def test_our_header(peer):
    peer.link.send(encode(HOLD, 0, 1, 1), peer.link.fixed_peer)
    receiver = mavlink.MAVLink(None)
    first = receiver.parse_buffer(peer.socket.recv(2048))[0]
    peer.link.send(encode(HOLD, 0, 1, 1), peer.link.fixed_peer)
    second = receiver.parse_buffer(peer.socket.recv(2048))[0]
    assert (first.get_srcSystem(), first.get_srcComponent()) == (1, mavlink.MAV_COMP_ID_ONBOARD_COMPUTER)
    assert (second.get_seq() - first.get_seq()) % 256 == 1
    assert first.get_msgbuf()[0] == mavlink.PROTOCOL_MARKER_V2


def test_a_listener_sends_nothing_before_it_has_a_peer():
    with Peer("udpin") as listener:
        assert not listener.link.send(encode(HOLD, 0, 1, 1), None)
        (heard,) = listener.hear(packet())
        assert listener.link.send(encode(HOLD, 0, 1, 1), heard.peer)
        assert listener.socket.recv(2048)


def test_nobody_at_the_other_end_is_no_error(peer):
    peer.socket.close()
    for _ in range(3):
        peer.link.send(encode(HOLD, 0, 1, 1), peer.link.fixed_peer)
        assert peer.link.receive() == []
    assert peer.link.is_open


# -- TCP --------------------------------------------------------------------------------------------------------------


def test_tcp_is_opened_again_with_growing_pauses():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        clock = FakeClock()
        link = Link(Connection("tcp", "127.0.0.1", port), 1, clock)
        assert link.open_if_due()
        accepted, _ = server.accept()
        accepted.sendall(packet())
        select.select(link.descriptors(), [], [], WAIT_S)
        assert len(link.receive()) == 1
        accepted.close()
        select.select(link.descriptors(), [], [], WAIT_S)
        assert link.receive() == [] and not link.is_open
        assert link.why_lost == f"TCP 127.0.0.1:{port}: the other side has closed"
    pauses = []
    for _ in range(8):
        before_ns = clock.now_ns
        while not link.open_if_due() and link._next_try_ns > clock.now_ns:
            pauses.append(link._next_try_ns - before_ns)
            clock.now_ns = link._next_try_ns
            break
    assert pauses[-1] == MAX_PAUSE_NS and pauses == sorted(pauses)
    assert not link.send(encode(HOLD, 0, 1, 1), None)


def test_tcp_that_nobody_reads_is_lost_and_sends_nothing_late():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        transport = Tcp(server.getsockname())
        accepted, _ = server.accept()
        with pytest.raises(LinkLost, match=r"does not read|Connection"):
            for _ in range(200_000):
                transport.write(bytes(61), None, False)
        accepted.close()


# -- serial -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def port(tmp_path: Path):
    """A pseudo terminal behind a name that stays, as udev gives one."""
    master, slave = pty.openpty()
    name = tmp_path / "ttyFCU"
    name.symlink_to(os.ttyname(slave))
    os.close(slave)
    yield master, name
    os.close(master)


def read(master: int, n: int) -> bytes:
    data = b""
    while len(data) < n and select.select([master], [], [], WAIT_S)[0]:
        data += os.read(master, 4096)
    return data


def test_serial_carries_every_byte_as_it_is(port):
    master, name = port
    transport = Serial(str(name), 921_600)
    every = bytes(range(256))
    assert transport.read() == []  # no data is not the end
    os.write(master, every)
    received = b""
    while len(received) < 256:
        select.select([transport.fileno()], [], [], WAIT_S)
        received += b"".join(part.data for part in transport.read())
    assert received == every
    assert transport.write(every, None, False)
    assert read(master, 256) == every
    transport.close()


def test_a_serial_port_vanishes_and_returns(tmp_path):
    master, slave = pty.openpty()
    name, clock = tmp_path / "ttyFCU", FakeClock()
    name.symlink_to(os.ttyname(slave))
    os.close(slave)
    link = Link(Connection("serial", str(name), 57_600), 1, clock)
    assert link.open_if_due()
    os.write(master, packet())
    select.select(link.descriptors(), [], [], WAIT_S)
    assert len(link.receive()) == 1
    os.close(master)
    assert link.receive() == [] and not link.is_open
    assert link.why_lost.startswith(f"serial port {name}: ")
    name.unlink()
    clock.advance(5)
    assert not link.open_if_due() and link.why_lost.endswith("No such file or directory")
    master, slave = pty.openpty()
    name.symlink_to(os.ttyname(slave))
    os.close(slave)
    clock.advance(5)
    assert link.open_if_due()
    os.write(master, attitude(0.5))
    select.select(link.descriptors(), [], [], WAIT_S)
    assert len(link.receive()) == 1
    link.close()
    os.close(master)


def test_a_serial_port_that_takes_nothing_is_lost_and_what_lay_in_it_is_dropped(port, monkeypatch):
    _, name = port
    transport = Serial(str(name), 57_600)
    monkeypatch.setattr(transport, "_unsent", lambda: 200)
    assert not transport.write(bytes(9), None, True)  # what can wait
    assert transport.write(bytes(9), None, False)
    monkeypatch.setattr(transport, "_unsent", lambda: 600)
    with pytest.raises(LinkLost, match="the other side does not read"):
        transport.write(bytes(9), None, False)
    transport.close()


def test_a_packet_that_was_taken_in_part_loses_the_link(port, monkeypatch):
    """The rest of it would come late, and the next packet would begin in its middle."""
    _, name = port
    transport = Serial(str(name), 57_600)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: 10)
        assert not transport.write(bytes(61), None, False)
    with pytest.raises(LinkLost, match="the other side does not read"):
        transport.write(bytes(61), None, False)
    transport.close()


def test_a_baud_rate_that_the_system_does_not_have(port):
    _, name = port
    link = Link(Connection("serial", str(name), 12_345), 1, FakeClock())
    assert not link.open_if_due()
    assert "expected a baud rate" in link.why_lost and "found 12345" in link.why_lost


def test_a_file_is_no_serial_port(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    link = Link(Connection("serial", str(path), 57_600), 1, FakeClock())
    assert not link.open_if_due()
    assert "Inappropriate ioctl for device" in link.why_lost


def test_reopen_drops_what_lies_in_the_queue(peer):
    peer.socket.sendto(packet(), peer.address)
    peer.link.reopen("the machine was suspended")
    peer.clock.advance(MAX_PAUSE_NS / NS_PER_S)
    assert peer.link.open_if_due()
    assert peer.link.receive() == []


def test_a_setpoint_that_expires_while_it_is_packed_is_not_sent(peer):
    """The clock goes on between the check of the action and the system call."""
    until_ns = peer.clock.now_ns + 1
    peer.clock.on_read = lambda clock: clock.advance(1e-9)
    assert not peer.link.send(encode(HOLD, 0, 1, 1), peer.link.fixed_peer, False, until_ns)
    assert peer.link.counts["expired before it was sent"] == 1
    assert peer.link.send(encode(HOLD, 7, 1, 1), peer.link.fixed_peer, False, until_ns + 10)
    assert peer.link.send(encode(HOLD, 7, 1, 1), peer.link.fixed_peer)
    (first,) = mavlink.MAVLink(None).parse_buffer(peer.socket.recv(2048))
    assert first.get_seq() == 1  # after the one of the fixture: nothing was sent between
