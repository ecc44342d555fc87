"""The simulated autopilot: time-outs, modes, frames and units with a clock that a test moves; faults of the line."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from pymavlink.dialects.v20 import common as mavlink

from models.autopilot.autopilot import FOLLOWED, HEARD, REFUSED, Autopilot, Target
from models.autopilot.bodies import PointMass
from models.autopilot.flavours import ARDUCOPTER, PX4, TELEMETRY, Flavour
from models.autopilot.link import LineFaults, Link
from models.autopilot.ports import Arrival, UdpListener
from models.autopilot.telemetry import MESSAGES
from tests.harness.clock import FakeClock

VELOCITY_MASK, POSITION_MASK = 0x5C7, 0xDF8
BODY, LOCAL = mavlink.MAV_FRAME_BODY_NED, mavlink.MAV_FRAME_LOCAL_NED
BOTH = pytest.mark.parametrize("flavour", [PX4, ARDUCOPTER], ids=lambda flavour: flavour.name)


def setpoint(velocity: tuple[float, float, float] = (1.0, 0.0, 0.0), yaw_rate: float = 0.0, **changes: Any) -> Any:
    fields = {"system": 1, "component": 1, "frame": BODY, "mask": VELOCITY_MASK, "position": (0.0, 0.0, 0.0)} | changes
    return mavlink.MAVLink_set_position_target_local_ned_message(
        0, fields["system"], fields["component"], fields["frame"], fields["mask"], *fields["position"], *velocity,
        0.0, 0.0, 0.0, 0.0, yaw_rate,
    )  # fmt: skip


def command(number: int, *params: float) -> Any:
    message = mavlink.MAVLink_command_long_message(1, 1, number, 0, *[*params, *[0.0] * 7][:7])
    message._header = mavlink.MAVLink_header(message.id, srcSystem=255, srcComponent=190)
    return message


def flying(flavour: Flavour, yaw_rad: float = 0.0) -> tuple[Autopilot, FakeClock]:
    """Armed and in the mode that follows setpoints, 10 m above the ground."""
    clock = FakeClock()
    autopilot = Autopilot(flavour, PointMass(10.0, yaw_rad), clock)
    stream(autopilot, clock, setpoint((0.0, 0.0, 0.0)), 1.2)
    assert autopilot.arm() and autopilot.set_mode(flavour.external_mode)
    return autopilot, clock


def stream(autopilot: Autopilot, clock: FakeClock, message: Any, seconds: float, rate_hz: float = 10.0) -> None:
    for _ in range(round(seconds * rate_hz)):
        autopilot.receive(message)
        wait(autopilot, clock, 1 / rate_hz)


def wait(autopilot: Autopilot, clock: FakeClock, seconds: float) -> None:
    for _ in range(round(seconds * 100)):
        clock.advance(0.01)
        autopilot.step()


# -- time-outs and modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "rate_hz", "accepted"),
    [(1.2, 10.0, True), (0.9, 10.0, False), (2.4, 2.5, True), (3.0, 1.0, False), (0.0, 1.0, False)],
)
def test_px4_wants_more_than_a_second_of_setpoints_at_2_hz(seconds: float, rate_hz: float, accepted: bool):
    clock = FakeClock()
    autopilot = Autopilot(PX4, PointMass(10.0), clock)
    stream(autopilot, clock, setpoint(), seconds, rate_hz)
    assert autopilot.set_mode("OFFBOARD") is accepted
    assert autopilot.mode == ("OFFBOARD" if accepted else "AUTO.LOITER")
    assert bool(autopilot.texts) is not accepted


def test_a_gap_of_the_time_out_begins_the_stream_anew():
    clock = FakeClock()
    autopilot = Autopilot(PX4, PointMass(10.0), clock)
    stream(autopilot, clock, setpoint(), 1.5)
    wait(autopilot, clock, 1.0)
    stream(autopilot, clock, setpoint(), 0.5)
    assert not autopilot.set_mode("OFFBOARD")


def test_px4_leaves_offboard_a_second_after_the_last_setpoint():
    autopilot, clock = flying(PX4)
    stream(autopilot, clock, setpoint(), 1.0)
    wait(autopilot, clock, 0.89)
    assert autopilot.mode == "OFFBOARD" and autopilot.losses == 0
    wait(autopilot, clock, 0.02)
    assert autopilot.mode == "AUTO.LOITER" and autopilot.losses == 1
    assert (
        autopilot.receive(setpoint())[0] == HEARD and autopilot.mode == "AUTO.LOITER"
    )  # it does not come back by itself


def test_arducopter_stays_in_guided_with_zero_velocity_after_three_seconds():
    autopilot, clock = flying(ARDUCOPTER)
    stream(autopilot, clock, setpoint(yaw_rate=0.3), 0.5)
    wait(autopilot, clock, 2.88)
    assert autopilot.target.velocity_m_s != (0.0, 0.0, 0.0)
    wait(autopilot, clock, 0.04)
    assert autopilot.target == Target() and autopilot.mode == "GUIDED" and autopilot.losses == 1
    wait(autopilot, clock, 5.0)
    assert math.hypot(*autopilot.body.velocity_m_s) < 0.01


def test_arducopter_flies_on_to_a_position_without_more_setpoints():
    autopilot, clock = flying(ARDUCOPTER)
    autopilot.receive(setpoint(frame=LOCAL, mask=POSITION_MASK, position=(30.0, 0.0, -10.0)))
    wait(autopilot, clock, 5.0)
    assert autopilot.target.position_m == (30.0, 0.0, -10.0) and autopilot.body.position_m[0] > 10


@BOTH
def test_an_autopilot_that_is_not_in_the_mode_does_not_follow(flavour: Flavour):
    autopilot, clock = flying(flavour)
    assert autopilot.set_mode("RTL" if flavour is ARDUCOPTER else "AUTO.RTL")
    assert autopilot.receive(setpoint())[0] == (HEARD if flavour is PX4 else REFUSED)
    wait(autopilot, clock, 1.0)
    assert math.hypot(*autopilot.body.velocity_m_s) < 0.01


@BOTH
def test_a_disarmed_vehicle_does_not_move(flavour: Flavour):
    autopilot, clock = flying(flavour)
    autopilot.disarm()
    stream(autopilot, clock, setpoint(), 1.0)
    assert autopilot.body.position_m == (0.0, 0.0, -10.0)


@BOTH
def test_landing_ends_on_the_ground_disarmed(flavour: Flavour):
    autopilot, clock = flying(flavour)
    outcome, (ack,) = autopilot.receive(command(mavlink.MAV_CMD_NAV_LAND))
    assert (outcome, ack.command, ack.result) == ("", mavlink.MAV_CMD_NAV_LAND, mavlink.MAV_RESULT_ACCEPTED)
    assert (ack.target_system, ack.target_component) == (255, 190)
    assert autopilot.mode == flavour.land_mode and autopilot.is_landing
    autopilot.receive(setpoint())  # does not bring the landing to an end
    wait(autopilot, clock, 18.0)
    assert autopilot.body.is_landed and not autopilot.is_armed and autopilot.mode == flavour.land_mode


@BOTH
def test_the_pilot_arms_takes_off_and_changes_modes_by_command(flavour: Flavour):
    clock = FakeClock()
    autopilot = Autopilot(flavour, PointMass(0.0), clock)
    modes = {"PX4": (6.0, 0.0), "ArduCopter": (4.0, 0.0)}[flavour.name]
    stream(autopilot, clock, setpoint((0.0, 0.0, 0.0)), 1.2)
    replies = autopilot.receive(command(mavlink.MAV_CMD_DO_SET_MODE, 1.0, *modes))[1]
    assert replies[0].result == mavlink.MAV_RESULT_ACCEPTED and autopilot.mode == flavour.external_mode
    assert autopilot.receive(command(mavlink.MAV_CMD_COMPONENT_ARM_DISARM, 1.0))[1][0].result == 0
    assert autopilot.is_armed
    altitude_m = 5.0 + (488.0 if flavour is PX4 else 0.0)  # PX4 takes it above sea level
    assert autopilot.receive(command(mavlink.MAV_CMD_NAV_TAKEOFF, *[0.0] * 6, altitude_m))[1][0].result == 0
    wait(autopilot, clock, 6.0)
    assert -autopilot.body.position_m[2] == pytest.approx(5.0, abs=0.5)
    assert autopilot.receive(command(mavlink.MAV_CMD_DO_PARACHUTE))[1][0].result == mavlink.MAV_RESULT_UNSUPPORTED


def test_in_guided_a_setpoint_ends_a_take_off():
    """Also zero velocity: ArduCopter leaves its submode TakeOff, and the vehicle stays where it is."""
    clock = FakeClock()
    autopilot = Autopilot(ARDUCOPTER, PointMass(0.0), clock)
    assert autopilot.set_mode("GUIDED") and autopilot.arm()
    assert autopilot.receive(command(mavlink.MAV_CMD_NAV_TAKEOFF, *[0.0] * 6, 5.0))[1][0].result == 0
    wait(autopilot, clock, 1.0)
    autopilot.receive(setpoint((0.0, 0.0, 0.0)))
    wait(autopilot, clock, 6.0)
    assert 0.2 < -autopilot.body.position_m[2] < 2.0


def test_px4_refuses_offboard_and_arming_in_it_without_setpoints():
    autopilot, clock = flying(PX4)
    autopilot.disarm()
    wait(autopilot, clock, 3.0)
    assert not autopilot.arm()
    (ack,) = autopilot.receive(command(mavlink.MAV_CMD_DO_SET_MODE, 1.0, 6.0))[1]
    assert ack.result == mavlink.MAV_RESULT_TEMPORARILY_REJECTED


def test_timesync_is_answered_with_the_time_since_boot():
    """Of a simulation that is slower than the clock, too."""
    autopilot, clock = flying(PX4)
    autopilot.step()
    began_ns, autopilot.clock_rate = autopilot.boot_ns, 0.5
    clock.advance(2)
    autopilot.step()
    _, (answer,) = autopilot.receive(mavlink.MAVLink_timesync_message(0, 77))
    assert (answer.tc1, answer.ts1) == (began_ns + 1_000_000_000, 77)
    assert autopilot.receive(mavlink.MAVLink_timesync_message(5, 77)) == ("", [])


def test_a_restart_and_a_jump_of_the_clock_change_the_time_since_boot():
    autopilot, clock = flying(PX4)
    wait(autopilot, clock, 2.0)
    assert autopilot.time_boot_ms == pytest.approx(3200, abs=30)
    autopilot.jump_clock(-2.0)
    assert autopilot.time_boot_ms == pytest.approx(1200, abs=30)
    autopilot.restart()
    assert autopilot.time_boot_ms == 0 and not autopilot.is_armed and autopilot.mode == "AUTO.LOITER"


# -- which setpoints count ---------------------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    ("message", "px4", "copter"),
    [
        (setpoint(), FOLLOWED, FOLLOWED),
        (setpoint(system=0, component=0), FOLLOWED, FOLLOWED),
        (setpoint(system=2), REFUSED, REFUSED),
        (setpoint(component=190), REFUSED, REFUSED),
        (setpoint(frame=mavlink.MAV_FRAME_BODY_OFFSET_NED), REFUSED, FOLLOWED),
        (setpoint(frame=mavlink.MAV_FRAME_GLOBAL), REFUSED, REFUSED),
        (setpoint((NAN, NAN, NAN)), REFUSED, REFUSED),
        (setpoint((2000.0, 0.0, 0.0)), FOLLOWED, REFUSED),
        (setpoint(mask=0xFFF), REFUSED, REFUSED),
        (setpoint(mask=0x5C7 & ~0x1C0 | 0x200), REFUSED, REFUSED),
        (setpoint(mask=VELOCITY_MASK | 0x008), REFUSED, REFUSED),  # a part of the velocity: none of it
        (setpoint(frame=LOCAL, mask=POSITION_MASK, position=(1.0, 2.0, -3.0)), FOLLOWED, FOLLOWED),
        (setpoint(frame=BODY, mask=POSITION_MASK, position=(1.0, 2.0, -3.0)), REFUSED, FOLLOWED),
    ],
    ids=lambda value: f"{value.coordinate_frame}-{value.type_mask:x}" if hasattr(value, "type_mask") else str(value),
)
def test_which_setpoints_are_followed(message: Any, px4: str, copter: str):
    assert flying(PX4)[0].receive(message)[0] == px4
    assert flying(ARDUCOPTER)[0].receive(message)[0] == copter


@BOTH
@pytest.mark.parametrize(
    ("yaw_deg", "body", "local"),
    [
        (0, (1, 0, 0), (1, 0, 0)), (90, (1, 0, 0), (0, 1, 0)), (180, (1, 0, 0), (-1, 0, 0)),
        (-90, (1, 0, 0), (0, -1, 0)), (0, (0, 1, 0), (0, 1, 0)), (90, (0, 1, 0), (-1, 0, 0)),
        (37, (0, 0, 1), (0, 0, 1)), (37, (0, 0, -1), (0, 0, -1)),
    ],
)  # fmt: skip
def test_a_body_velocity_is_turned_by_the_yaw(flavour: Flavour, yaw_deg: float, body: tuple, local: tuple):
    autopilot, clock = flying(flavour, math.radians(yaw_deg))
    stream(autopilot, clock, setpoint(body), 2.0)
    assert autopilot.body.velocity_m_s == pytest.approx(local, abs=0.01)


@BOTH
def test_a_positive_yaw_rate_turns_clockwise_from_above(flavour: Flavour):
    autopilot, clock = flying(flavour)
    stream(autopilot, clock, setpoint((0.0, 0.0, 0.0), 0.5), 1.0)
    assert autopilot.body.attitude_rad[2] == pytest.approx(0.5, abs=0.02)
    assert autopilot.body.position_m == pytest.approx((0, 0, -10), abs=0.01)


# -- telemetry ---------------------------------------------------------------------------------------------------------


def test_telemetry_has_the_units_of_mavlink():
    autopilot, clock = flying(PX4, math.radians(-90))
    stream(autopilot, clock, setpoint((2.0, 0.0, 1.0)), 2.0)  # west and down
    north, east, down = autopilot.body.position_m
    read = {name: make(autopilot) for name, make in MESSAGES.items()}
    assert {message.get_msgId(): message.get_type() for message in read.values()} == TELEMETRY
    assert read["LOCAL_POSITION_NED"].vy == pytest.approx(-2.0, abs=0.01) and read["LOCAL_POSITION_NED"].z == down
    position = read["GLOBAL_POSITION_INT"]
    assert (position.vx, position.vy, position.vz) == (0, -200, 100) and position.hdg == 27_000
    assert (
        position.relative_alt == pytest.approx(-down * 1000, abs=1) and position.alt == position.relative_alt + 488_000
    )
    east_m = (position.lon / 1e7 - 8.545594) * 111_319.5 * math.cos(math.radians(47.397742))
    assert east_m == pytest.approx(east, abs=0.02) and abs(north) < 0.01
    assert read["ATTITUDE"].yaw == pytest.approx(-math.pi / 2) and read["VFR_HUD"].heading == 270
    assert read["VFR_HUD"].climb == pytest.approx(-1.0, abs=0.01) and read["VFR_HUD"].groundspeed == pytest.approx(
        2, abs=0.01
    )
    assert read["SYS_STATUS"].battery_remaining == read["BATTERY_STATUS"].battery_remaining == 87
    assert read["HEARTBEAT"].base_mode & mavlink.MAV_MODE_FLAG_SAFETY_ARMED
    assert read["HEARTBEAT"].custom_mode == 6 << 16 and read["GPS_RAW_INT"].fix_type == 3


class Wire:
    """A port that keeps what is sent, and gives what a test puts in."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.arriving: list[bytes] = []

    def filenos(self) -> list[int]:
        return []

    def receive(self) -> list[Arrival]:
        arriving, self.arriving = self.arriving, []
        return [Arrival(data, 0) for data in arriving]

    def send(self, data: bytes) -> None:
        self.sent.append(data)

    def close(self) -> None: ...


@pytest.fixture
def wired() -> Callable[[Flavour], tuple[Link, Wire, FakeClock]]:
    def make(flavour: Flavour) -> tuple[Link, Wire, FakeClock]:
        clock, wire = FakeClock(), Wire()
        return Link(Autopilot(flavour, PointMass(10.0), clock), wire, clock), wire, clock

    return make


PAYLOADS = {made.msgname for made in mavlink.mavlink_map.values()}


def read_all(packets: list[bytes]) -> list[Any]:
    parser = mavlink.MAVLink(None)
    parser.robust_parsing = True
    return [m for packet in packets for m in parser.parse_buffer(packet) or [] if m.get_type() in PAYLOADS]


def packed(message: Any) -> bytes:
    return bytes(message.pack(mavlink.MAVLink(None, srcSystem=255, srcComponent=190)))


@BOTH
def test_message_intervals_are_those_that_were_asked_for(wired, flavour: Flavour):
    link, wire, clock = wired(flavour)
    number = mavlink.MAVLINK_MSG_ID_ATTITUDE
    wire.arriving.append(packed(command(mavlink.MAV_CMD_SET_MESSAGE_INTERVAL, number, 50_000)))
    wire.arriving.append(packed(command(mavlink.MAV_CMD_SET_MESSAGE_INTERVAL, mavlink.MAVLINK_MSG_ID_HEARTBEAT, -1)))
    wire.arriving.append(packed(command(mavlink.MAV_CMD_REQUEST_MESSAGE, mavlink.MAVLINK_MSG_ID_HOME_POSITION)))
    assert [item.type for item in link.receive()] == ["COMMAND_LONG"] * 3
    for _ in range(100):
        link.send_due()
        clock.advance(0.01)
    kinds = [message.get_type() for message in read_all(wire.sent)]
    assert kinds.count("ATTITUDE") == 20 and "HEARTBEAT" not in kinds and kinds.count("COMMAND_ACK") == 3
    assert "HOME_POSITION" in kinds


def test_arducopter_sends_nothing_but_a_heartbeat_until_it_is_asked(wired):
    link, wire, clock = wired(ARDUCOPTER)
    for _ in range(300):
        link.send_due()
        clock.advance(0.01)
    assert {message.get_type() for message in read_all(wire.sent)} == {"HEARTBEAT"} and len(wire.sent) == 3


def test_a_test_can_silence_change_and_cut(wired):
    link, wire, _clock = wired(PX4)
    link.silent, link.changed = {"ATTITUDE"}, {"LOCAL_POSITION_NED": {"x": NAN}}
    link.send_due()
    read = {message.get_type(): message for message in read_all(wire.sent)}
    assert "ATTITUDE" not in read and math.isnan(read["LOCAL_POSITION_NED"].x) and read["LOCAL_POSITION_NED"].z == -10
    link.is_cut, before = True, len(wire.sent)
    wire.arriving.append(packed(setpoint()))
    assert link.receive() == [] and not link.send_due() and len(wire.sent) == before


def test_mavlink_1_is_mavlink_1(wired):
    link, wire, _ = wired(PX4)
    link.is_mavlink1 = True
    link.send_due()
    assert {packet[0] for packet in wire.sent} == {0xFE}


@pytest.mark.parametrize(
    ("shares", "least", "most"),
    [
        ({"lose": 0.5}, 30, 70), ({"duplicate": 0.5}, 130, 170), ({"flip": 1.0}, 0, 8), ({"cut": 1.0}, 0, 8),
        ({"delay": 0.5}, 95, 100), ({}, 100, 100),
    ],
)  # fmt: skip
def test_faults_of_the_line(shares: dict[str, float], least: int, most: int):
    """How many of 100 packets can be read; a flipped bit can be in a part that makes no difference."""
    faults, codec = LineFaults(seed=1, **shares), mavlink.MAVLink(None)
    packets = []
    for i in range(100):
        codec.seq = i
        packets.append(bytes(mavlink.MAVLink_attitude_message(i, 1, 2, 3, 4, 5, 6).pack(codec)))
    arrived = [message for packet in packets for out in faults.apply(packet, "out") for message in read_all([out])]
    assert least <= len(arrived) <= most
    in_order = [message.time_boot_ms for message in arrived]
    assert (in_order != sorted(in_order)) == ("delay" in shares)


def test_bad_bytes_are_counted_and_the_next_packet_is_read(wired):
    link, wire, _ = wired(PX4)
    wire.arriving += [b"\xfd\x00garbage", packed(setpoint())[:20], packed(setpoint()), packed(setpoint())]
    assert [item.type for item in link.receive()][-1:] == ["SET_POSITION_TARGET_LOCAL_NED"] and link.bad_bytes


def test_a_datagram_is_not_older_than_its_sending_when_the_thread_waits_between_two_clocks(monkeypatch):
    """As on a busy machine: a setpoint that looks older than its action would be judged as one without an action."""
    waits = iter([True, True, False] + [True] * 100)
    realtime_ns = time.time_ns

    def waiting_ns() -> int:
        if next(waits):
            time.sleep(0.05)
        return realtime_ns()

    port = UdpListener()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        monkeypatch.setattr(time, "time_ns", waiting_ns)
        before_ns = time.monotonic_ns()
        sender.sendto(b"x", ("127.0.0.1", port.port))
        [arrival] = port.receive()
        received_ns = time.monotonic_ns()
    port.close()
    assert before_ns <= arrival.t_ns <= received_ns
