"""What the autopilot says: ages, NaN, restarts, other senders, other versions."""

from __future__ import annotations

import math

import pytest

from edge_agent.mavlink.autopilot import Autopilot, Heard, Place
from edge_agent.mavlink.boot_clock import BootClock
from edge_agent.mavlink.dialect import mavlink
from edge_agent.mavlink.modes import ARDUPILOT, PX4, mode_name
from edge_agent.mavlink.telemetry import WANTED_HZ, Requests, VehicleState
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from tests.harness.mavlink_rig import ARMED, DISARMED, GUIDED, LOITER, OFFBOARD, POSCTL, Rig, heartbeat


@pytest.fixture
def rig() -> Rig:
    return Rig()


def why(rig: Rig) -> str:
    return rig.autopilot.why_not_engaged(rig.clock.now_ns)


# -- engaged ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beat", "expected"),
    [
        (heartbeat(ARMED, OFFBOARD, PX4), ""),
        (heartbeat(ARMED, GUIDED, ARDUPILOT), ""),
        (heartbeat(DISARMED, OFFBOARD, PX4), "disarmed"),
        (heartbeat(ARMED, POSCTL, PX4), "mode: POSCTL, not OFFBOARD"),
        (heartbeat(ARMED, 4 << 16 | 3 << 24, PX4), "mode: AUTO.LOITER, not OFFBOARD"),
        (heartbeat(ARMED, LOITER, ARDUPILOT), "mode: LOITER, not GUIDED"),
        (heartbeat(ARMED, OFFBOARD, ARDUPILOT), "mode: MODE 393216, not GUIDED"),
        (heartbeat(ARMED, GUIDED, PX4), "mode: MODE 0.0, not OFFBOARD"),
        (heartbeat(0x80, GUIDED, ARDUPILOT), "mode: UNKNOWN, not GUIDED"),  # custom_mode does not count
        (heartbeat(ARMED, OFFBOARD, 0), "autopilot: expected PX4 or ArduPilot; found autopilot type 0"),
        (heartbeat(ARMED, OFFBOARD, PX4, vehicle=1), "vehicle type: 1 cannot hover"),
    ],
)
def test_only_armed_and_in_its_own_mode(beat, expected):
    autopilot = Autopilot()
    autopilot.take(Heard(beat, 1, 1), 0)
    assert autopilot.why_not_engaged(0) == expected


def test_a_configured_kind_is_the_only_one():
    autopilot = Autopilot(kind="ardupilot")
    autopilot.take(Heard(heartbeat(), 1, 1), 0)
    assert autopilot.why_not_engaged(0) == "autopilot: expected ardupilot; found px4"


def test_an_emergency_of_the_autopilot_is_no_time_for_setpoints(rig):
    beat = heartbeat()
    beat.system_status = mavlink.MAV_STATE_EMERGENCY
    rig.hear(beat)
    assert why(rig) == "autopilot says EMERGENCY"


def test_another_system_is_named_and_not_followed():
    autopilot = Autopilot(system=1)
    autopilot.take(Heard(heartbeat(), 7, 1), 0)
    assert autopilot.why_not_engaged(0) == "no HEARTBEAT from system 1 component 1; found 7/1"
    assert autopilot.counts["message of another system or component"] == 1


def test_a_ground_station_or_a_gimbal_is_no_autopilot(rig):
    for component in (154, 190, 191):
        rig.hear(mavlink.MAVLink_heartbeat_message(6, mavlink.MAV_AUTOPILOT_INVALID, 0, 0, 4, 3), component=component)
    assert why(rig) == "" and rig.autopilot.others == set()


def test_mavlink_1_gets_three_seconds_and_then_a_word(rig):
    rig.heartbeat(is_version_1=True)
    assert why(rig) == "the autopilot speaks MAVLink 1 so far"
    for _ in range(3):
        rig.clock.advance(1)
        rig.heartbeat(is_version_1=True)
    assert why(rig) == "MAVLink 1: set MAV_PROTO_VER=2"
    rig.heartbeat()
    assert why(rig) == ""


def test_mavlink_1_of_ardupilot_names_its_own_parameter():
    rig = Rig(kind=ARDUPILOT)
    for _ in range(4):
        rig.heartbeat(is_version_1=True)
        rig.clock.advance(1)
    assert why(rig) == "MAVLink 1: set SERIALn_PROTOCOL=2"


# -- two of them ------------------------------------------------------------------------------------------------------


def test_heartbeats_that_differ(rig):
    rig.hear(heartbeat(ARMED, GUIDED, ARDUPILOT))
    rig.heartbeat()
    assert why(rig) == "HEARTBEATs of 1/1 that differ"
    for _ in range(6):
        rig.clock.advance(1)
        rig.heartbeat()
    assert why(rig) == ""  # five seconds after the last sign


def test_a_second_address(rig):
    autopilot = Autopilot()
    autopilot.take(Heard(heartbeat(), 1, 1, peer=("10.0.0.1", 14550)), 0)
    autopilot.take(Heard(heartbeat(DISARMED), 1, 1, peer=("10.0.0.2", 14550)), NS_PER_S)
    assert autopilot.peer == ("10.0.0.1", 14550)
    assert autopilot.why_not_engaged(NS_PER_S) == "two senders with id 1/1"
    assert autopilot.heartbeat is not None and autopilot.heartbeat.armed


def test_an_autopilot_that_comes_back_from_another_address_starts_anew():
    autopilot = Autopilot()
    autopilot.take(Heard(heartbeat(), 1, 1, peer=("10.0.0.1", 14550)), 0)
    interruptions = autopilot.interruptions
    autopilot.take(Heard(heartbeat(), 1, 1, peer=("10.0.0.1", 9999)), 6 * NS_PER_S)
    assert autopilot.peer == ("10.0.0.1", 9999)
    assert autopilot.why_not_engaged(6 * NS_PER_S) == "" and autopilot.interruptions == interruptions + 1


def test_only_the_configured_address_counts():
    autopilot = Autopilot(peer=("127.0.0.1", 14540))
    autopilot.take(Heard(mavlink.MAVLink_attitude_message(1, 0, 0, 0, 0, 0, 0), 1, 1, peer=("127.0.0.1", 9)), 0)
    assert autopilot.why_not_engaged(0) == "no HEARTBEAT from system 1 component 1"
    autopilot.take(Heard(heartbeat(), 1, 1, peer=("127.0.0.1", 9)), 10 * NS_PER_S)
    assert autopilot.why_not_engaged(10 * NS_PER_S) == "two senders with id 1/1"


def test_two_that_take_turns_on_one_link(rig):
    for i in range(5):
        rig.clock.advance(0.1)
        rig.heartbeat(sequence=10 + i)
        rig.heartbeat(sequence=90 + i)
    assert why(rig) == "two senders with id 1/1"


def test_lost_packets_and_the_end_of_the_sequence_are_no_second_sender(rig):
    sequence = 0
    for step in (1, 5, 100, 1, 128, 1, 77) * 10:
        rig.clock.advance(0.01)
        sequence = (sequence + step) % 256
        rig.heartbeat(sequence=sequence)
    assert why(rig) == ""


def test_two_clocks(rig):
    for boot_ms in (200_000, 300_000, 200_050, 300_050):
        rig.clock.advance(0.02)
        rig.hear(mavlink.MAVLink_attitude_message(boot_ms, 0, 0, 0, 0, 0, 0))
        rig.heartbeat()
    assert why(rig) == "two clocks with id 1/1"


# -- telemetry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["x", "y", "z", "vx", "vy", "vz"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_position_that_is_not_finite_is_unknown_at_once(rig, field, number):
    rig.clock.advance(0.02)
    message = mavlink.MAVLink_local_position_ned_message(rig.boot_ms(), 0, 0, -10, 0, 0, 0)
    setattr(message, field, number)
    rig.hear(message)
    assert rig.autopilot.place(rig.clock.now_ns) == "LOCAL_POSITION_NED is missing or old"


@pytest.mark.parametrize("field", ["yaw", "yawspeed"])
def test_an_attitude_that_is_not_finite_is_unknown_at_once(rig, field):
    rig.clock.advance(0.02)
    message = mavlink.MAVLink_attitude_message(rig.boot_ms(), 0, 0, 0, 0, 0, 0)
    setattr(message, field, math.nan)
    rig.hear(message)
    assert rig.autopilot.place(rig.clock.now_ns) == "ATTITUDE is missing or old"


@pytest.mark.parametrize("missing", ["LOCAL_POSITION_NED", "ATTITUDE"])
def test_what_stops_coming_becomes_unknown(rig, missing):
    for _ in range(12):
        rig.clock.advance(0.05)
        local = mavlink.MAVLink_local_position_ned_message(rig.boot_ms(), 0, 0, -10, 0, 0, 0)
        attitude = mavlink.MAVLink_attitude_message(rig.boot_ms(), 0, 0, 0, 0, 0, 0)
        rig.hear(attitude if missing == "LOCAL_POSITION_NED" else local)
    assert rig.autopilot.place(rig.clock.now_ns) == f"{missing} is missing or old"


def test_telemetry_that_waited_in_a_queue_is_old():
    """A second of it arrives at once."""
    rig = Rig()
    messages = []
    for _ in range(20):
        rig.clock.advance(0.05)
        messages.append(mavlink.MAVLink_local_position_ned_message(rig.boot_ms(), 0, 0, -10, 0, 0, 0))
    rig.clock.advance(0.3)
    for message in messages[:10]:
        rig.hear(message)
    assert rig.autopilot.place(rig.clock.now_ns) == "LOCAL_POSITION_NED is missing or old"


def test_home_of_px4_is_in_the_local_frame():
    rig = Rig()
    rig.hear(mavlink.MAVLink_home_position_message(0, 0, 0, 3.0, -2.0, -1.0, [1, 0, 0, 0], 0, 0, 0))
    place = rig.autopilot.place(rig.clock.now_ns)
    assert isinstance(place, Place) and place[1:4] == (-3.0, 2.0, 9.0)


def test_home_of_ardupilot_is_on_the_globe():
    """It sends zeros for the local frame, whose origin is not at home."""
    rig = Rig(kind=ARDUPILOT)
    rig.clock.advance(0.05)
    rig.hear(mavlink.MAVLink_local_position_ned_message(rig.boot_ms(), 500, 500, -90, 1, 0, 0))
    rig.hear(mavlink.MAVLink_attitude_message(rig.boot_ms(), 0, 0, 0, 0, 0, 0))
    rig.hear(mavlink.MAVLink_home_position_message(473977418, 85455938, 488000, 0, 0, 0, [1, 0, 0, 0], 0, 0, 0))
    # 11.12 m north, 7.53 m east at this latitude
    rig.hear(mavlink.MAVLink_global_position_int_message(rig.boot_ms(), 473978418, 85456938, 500000, 12000, 0, 0, 0, 0))
    place = rig.autopilot.place(rig.clock.now_ns)
    assert isinstance(place, Place) and place[1:4] == pytest.approx((11.12, 7.53, 12.0), abs=0.01)


@pytest.mark.parametrize("lat_lon", [(0, 0), (2_000_000_000, 0), (0, 2_000_000_000)])
def test_a_position_on_the_globe_that_is_none(lat_lon):
    rig = Rig(kind=ARDUPILOT)
    rig.clock.advance(0.05)
    rig.hear(mavlink.MAVLink_global_position_int_message(rig.boot_ms(), *lat_lon, 0, 12000, 0, 0, 0, 0))
    assert rig.autopilot.place(rig.clock.now_ns) == "GLOBAL_POSITION_INT is missing or old"


def test_no_home_no_place():
    rig = Rig()
    rig.autopilot.forget()
    rig.heartbeat()
    rig.move_to()
    assert rig.autopilot.place(rig.clock.now_ns) == "HOME_POSITION is missing"


def test_a_pose_between_two_samples_turns_the_short_way():
    rig = Rig()
    rig.clock.advance(0.05)
    rig.move_to(north=1, yaw=3.0)
    rig.clock.advance(0.1)
    rig.move_to(north=2, yaw=-3.0)
    pose = rig.autopilot.pose_at(rig.clock.now_ns - NS_PER_S // 20)
    assert pose is not None and pose.north_m == pytest.approx(1.5) and abs(pose.yaw_rad) == pytest.approx(math.pi)


def test_a_pose_shortly_after_the_newest_sample_goes_on():
    rig = Rig()
    rig.clock.advance(0.05)
    rig.move_to(north=1, velocity=(2, 0, 0))
    pose = rig.autopilot.pose_at(rig.clock.now_ns + NS_PER_S // 10)
    assert pose is not None and pose.north_m == pytest.approx(1.2)
    assert rig.autopilot.pose_at(rig.clock.now_ns + NS_PER_S // 4) is None
    assert rig.autopilot.pose_at(rig.clock.now_ns - NS_PER_S) is None


# -- the clock of the autopilot ---------------------------------------------------------------------------------------


def test_a_clock_that_drifts_and_packets_that_are_late():
    clock, now_ns = BootClock(), 50 * NS_PER_S
    for i in range(1000):
        boot_ms = 1000 + 50 * i
        now_ns = 50 * NS_PER_S + round(50 * i * NS_PER_MS * (1 + 100e-6))
        late_ns = (i % 3) * 40 * NS_PER_MS
        stamped = clock.stamp("ATTITUDE", boot_ms, now_ns + late_ns)
        assert stamped is not None and not stamped[1]
        assert abs(stamped[0] - now_ns) < 2 * NS_PER_MS


@pytest.mark.parametrize("jump_ms", [-5000, -300, 300, 60_000])
def test_a_jump(jump_ms):
    clock = BootClock()
    assert clock.stamp("ATTITUDE", 5_000, NS_PER_S) == (NS_PER_S, False)
    now_ns = 6 * NS_PER_S
    assert clock.stamp("ATTITUDE", 10_000, now_ns) == (now_ns, False)
    now_ns += 150 * NS_PER_MS
    assert clock.stamp("ATTITUDE", 10_150 + jump_ms, now_ns) == (now_ns, True)


def test_a_first_message_that_was_late_is_no_jump():
    """A busy machine: the first one was read half a second late, and the next one at once."""
    clock = BootClock()
    clock.stamp("ATTITUDE", 10_000, 10 * NS_PER_S + 500 * NS_PER_MS)
    assert clock.stamp("ATTITUDE", 10_500, 10 * NS_PER_S + 500 * NS_PER_MS) == (10_500 * NS_PER_MS, False)


def answer_time(rig: Rig, requests: Requests, boot_ms: int) -> bool:
    """Ask what is due; the autopilot answers TIMESYNC. Returns whether it was asked."""
    asked = requests.due(rig.autopilot, rig.clock.now_ns)
    is_asked = asked is not None and asked.get_type() == "TIMESYNC"
    if is_asked:
        rig.hear(mavlink.MAVLink_timesync_message(boot_ms * NS_PER_MS, asked.ts1))
    return is_asked


@pytest.mark.parametrize("rate", [1.0, 0.98, 0.5])
def test_a_simulation_slower_than_our_clock_is_not_old(rate):
    """PX4's own physics sleeps a little too long in each step, and a busy machine is slower by far more."""
    rig, requests, n_asked = Rig(), Requests(), 0
    began_ns, began_ms = rig.clock.now_ns, rig.boot_ms()
    for _ in range(1200):
        rig.clock.advance(0.05)
        boot_ms = began_ms + round((rig.clock.now_ns - began_ns) * rate) // NS_PER_MS
        rig.boot_ns = rig.clock.now_ns - boot_ms * NS_PER_MS
        rig.heartbeat()
        rig.move_to()
        n_asked += answer_time(rig, requests, boot_ms)
        assert isinstance(rig.autopilot.place(rig.clock.now_ns), Place)
    assert (n_asked > 0) == (rate < 1.0)


def test_the_answer_to_timesync_does_not_make_old_telemetry_young():
    """A queue grows until telemetry waits 0.8 s in it, and so does the answer."""
    rig, requests, answers = Rig(), Requests(), []
    boot_ns, n_answers = rig.boot_ns, 0
    for i in range(200):
        rig.clock.advance(0.05)
        rig.heartbeat()
        waited_ns = min(20 * i, 800) * NS_PER_MS
        rig.boot_ns = boot_ns + waited_ns
        rig.move_to()
        rig.boot_ns = boot_ns
        asked = requests.due(rig.autopilot, rig.clock.now_ns)
        if asked is not None and asked.get_type() == "TIMESYNC":
            answers.append((rig.clock.now_ns + waited_ns, rig.boot_ms(), asked.ts1))
        while answers and answers[0][0] <= rig.clock.now_ns:
            _, boot_ms, ts1 = answers.pop(0)
            rig.hear(mavlink.MAVLink_timesync_message(boot_ms * NS_PER_MS, ts1))
            n_answers += 1
    assert n_answers > 5 and rig.autopilot.place(rig.clock.now_ns) == "LOCAL_POSITION_NED is missing or old"


@pytest.mark.parametrize(
    ("boot_ms", "ts1"),
    [(100_900, 1), (0, None), (50_000, None), (900_000, None)],
    ids=["not ours", "a question", "another clock, less", "another clock, more"],
)
def test_an_answer_to_timesync_that_does_not_count(boot_ms, ts1):
    rig, requests = Rig(), Requests()
    rig.clock.advance(0.8)
    rig.heartbeat()
    rig.boot_ns += 700 * NS_PER_MS
    rig.move_to()
    late_ns = rig.autopilot.late_ns
    asked = requests.due(rig.autopilot, rig.clock.now_ns)
    assert asked is not None and asked.get_type() == "TIMESYNC" and late_ns > 600 * NS_PER_MS
    rig.hear(mavlink.MAVLink_timesync_message(boot_ms * NS_PER_MS, ts1 or asked.ts1))
    rig.clock.advance(0.05)
    rig.move_to()
    assert rig.autopilot.late_ns == pytest.approx(late_ns, abs=NS_PER_MS)


def test_two_packets_that_changed_places():
    clock = BootClock()
    clock.stamp("ATTITUDE", 10_000, NS_PER_S)
    assert clock.stamp("ATTITUDE", 9_980, NS_PER_S + NS_PER_MS) is None


def test_the_same_packet_twice_is_no_restart_even_after_a_stall():
    clock = BootClock()
    clock.stamp("ATTITUDE", 10_000, NS_PER_S)
    assert clock.stamp("ATTITUDE", 10_000, 3 * NS_PER_S) is None


def test_a_restart_makes_everything_unknown(rig):
    rig.clock.advance(1)
    rig.boot_ns = rig.clock.now_ns - NS_PER_S
    rig.hear(mavlink.MAVLink_attitude_message(rig.boot_ms(), 0, 0, 0, 0, 0, 0))
    assert why(rig) == "no HEARTBEAT from system 1 component 1"
    assert rig.autopilot.counts["clock of the autopilot jumped"] == 1


# -- for the model ----------------------------------------------------------------------------------------------------


def test_the_vehicles_state_and_what_becomes_unknown():
    rig, state = Rig(), VehicleState()
    rig.clock.advance(0.05)
    rig.move_to(up=3.25, velocity=(3, 4, 0), yaw=-math.pi / 2)
    rig.hear(mavlink.MAVLink_sys_status_message(0, 0, 0, 0, 11000, -1, 77, 0, 0, 0, 0, 0, 0))
    rig.hear(mavlink.MAVLink_gps_raw_int_message(0, 3, 0, 0, 0, 65535, 65535, 65535, 65535, 255))
    first = state.changes(rig.autopilot, rig.clock.now_ns)
    assert first == {
        "altitude_m": 3.25, "speed_m_s": 5.0, "heading_deg": 270.0, "battery_percent": 77.0, "mode": "OFFBOARD",
        "gps_fix": "3D fix",
    }  # fmt: skip
    assert state.changes(rig.autopilot, rig.clock.now_ns) == {}  # nothing new
    rig.clock.advance(1.5)
    assert state.changes(rig.autopilot, rig.clock.now_ns) == dict.fromkeys(("altitude_m", "speed_m_s", "heading_deg"))
    assert state.changes(rig.autopilot, rig.clock.now_ns) == {}  # once


def test_fields_that_are_not_provided_are_left_out():
    rig, state = Rig(), VehicleState()
    rig.autopilot.forget()
    rig.hear(mavlink.MAVLink_sys_status_message(0, 0, 0, 0, 65535, -1, -1, 0, 0, 0, 0, 0, 0))
    cells, more = [65535] * 10, [0] * 4
    rig.hear(mavlink.MAVLink_battery_status_message(0, 0, 0, 32767, cells, -1, -1, -1, -1, 0, 0, more, 0, 0))
    rig.hear_nan_position()
    rig.hear(mavlink.MAVLink_attitude_message(rig.boot_ms(), 0, 0, math.nan, 0, 0, 0))
    assert state.changes(rig.autopilot, rig.clock.now_ns) == {}


def test_only_the_first_battery_counts():
    rig = Rig()
    for number, percent in ((0, 60), (1, 20)):
        message = mavlink.MAVLink_battery_status_message(number, 0, 0, 0, [0] * 10, -1, -1, -1, percent, 0, 0)
        rig.hear(message)
    assert rig.autopilot.values["battery_percent"][1] == 60


def test_messages_that_do_not_come_are_asked_for_again():
    rig, requests = Rig(), Requests()
    asked = []
    for _ in range(200):
        rig.clock.advance(0.1)
        rig.heartbeat()
        rig.move_to()
        command = requests.due(rig.autopilot, rig.clock.now_ns)
        if command is not None:
            asked.append((command.command, int(command.param1), int(command.param2)))
    ids = {name: kind.id for kind in mavlink.mavlink_map.values() if (name := kind.msgname) in WANTED_HZ}
    assert set(asked[: len(ids)]) == {
        (mavlink.MAV_CMD_SET_MESSAGE_INTERVAL, ids[name], round(1e6 / hz)) for name, hz in WANTED_HZ.items()
    }
    again = [row[1] for row in asked[len(ids) :]]
    assert ids["SYS_STATUS"] in again and ids["ATTITUDE"] not in again


def test_a_rate_that_a_ground_station_has_made_lower_is_asked_for_again():
    """On one link, the last one who asks decides."""
    rig, requests, n_asked = Rig(), Requests(), 0
    for n in range(400):
        rig.clock.advance(0.05)
        rig.heartbeat()
        if n < 200 or n % 10 == 0:
            rig.move_to()
        command = requests.due(rig.autopilot, rig.clock.now_ns)
        if command is not None and int(command.param1) == mavlink.MAVLINK_MSG_ID_ATTITUDE:
            n_asked += 1
            assert n < 20 or n > 200
    assert n_asked == 3


def test_nothing_is_asked_of_nobody():
    autopilot = Autopilot()
    assert Requests().due(autopilot, NS_PER_S) is None


def test_mode_names():
    assert mode_name(PX4, 4 << 16 | 6 << 24) == "AUTO.LAND"
    assert mode_name(PX4, 4 << 16 | 77 << 24) == "AUTO"
    assert mode_name(ARDUPILOT, 6) == "RTL"
    assert mode_name(ARDUPILOT, 99) == "MODE 99"
