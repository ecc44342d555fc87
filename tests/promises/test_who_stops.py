"""The times of the table "Who stops the vehicle" in docs/mavlink.md: one JSON line for each fault, the worst of five.

A played daemon, the real bridge, a simulated ArduCopter, UDP of this machine. hold_s is as delivered, 2 s.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pymavlink.dialects.v20 import common as mavlink

from models.autopilot.bodies import PointMass
from models.autopilot.flavours import ARDUCOPTER
from tests.harness.bridge_rig import Rig, name_of, rig
from tests.harness.fake_daemon import make_status

pytestmark = pytest.mark.promise
N = 5
VALID_MS, HOLD_S, PERIOD_S = 500, 2.0, 0.05
MAX_AGE_MS = 500  # of a position that is followed
TELEMETRY_MS = 50  # between two positions
SILENCE_S = 0.5


def silent(_rig: Rig) -> None:
    """The loop below publishes nothing more."""


def refusal(rig: Rig) -> None:
    rig.refuse()


def stopping(rig: Rig) -> None:
    status = msgspec.structs.replace(make_status(), state="stopping", session=rig.session, t_pub_ns=time.monotonic_ns())
    rig.daemon.publish("status", status)


def new_session(rig: Rig) -> None:
    rig.session, rig._seq = rig.session + 1, 0
    rig.daemon.publish("actions", rig.action())


def other_mode(rig: Rig) -> None:
    with rig.driver.lock:
        rig.autopilot.set_mode("LOITER")
        rig.link.tell("HEARTBEAT")


def disarmed(rig: Rig) -> None:
    with rig.driver.lock:
        rig.autopilot.disarm()
        rig.link.tell("HEARTBEAT")


def out_of_fence(rig: Rig) -> None:
    with rig.driver.lock:
        rig.autopilot.body = PointMass(2 * rig.config["fence"]["max_altitude_m"])
        rig.link.tell("GLOBAL_POSITION_INT")
        rig.link.tell("LOCAL_POSITION_NED")


def restarted(rig: Rig) -> None:
    with rig.driver.lock:
        rig.autopilot.restart()
        rig.link.tell("HEARTBEAT")


def clock_jump(rig: Rig) -> None:
    with rig.driver.lock:
        rig.autopilot.jump_clock(-100.0)
        rig.link.tell("LOCAL_POSITION_NED")


def no_telemetry(rig: Rig) -> None:
    with rig.driver.lock:
        rig.link.silent = {"LOCAL_POSITION_NED", "GLOBAL_POSITION_INT", "ATTITUDE"}


def not_a_number(rig: Rig) -> None:
    with rig.driver.lock:
        rig.link.changed = {"LOCAL_POSITION_NED": {"x": float("nan")}}
        rig.link.tell("LOCAL_POSITION_NED")


def second_autopilot(rig: Rig) -> None:
    other = mavlink.MAVLink(None, srcSystem=1, srcComponent=1)
    with rig.driver.lock:
        rig.link.port.send(
            mavlink.MAVLink_heartbeat_message(2, mavlink.MAV_AUTOPILOT_PX4, 0x81, 6 << 16, 4, 3).pack(other)
        )


# Fault: what happens, does the daemon still publish, when the first hold must be there. Disarmed or in another mode,
# every action is hold, so there the daemon publishes no more.
FAULTS: dict[str, tuple[Callable[[Rig], None], bool, int]] = {
    "the daemon is silent": (silent, False, VALID_MS),
    "refusal": (refusal, False, 0),
    "the daemon says that it stops": (stopping, False, 100),
    "new session": (new_session, False, 0),
    "the pilot changes the mode": (other_mode, False, 0),
    "disarmed": (disarmed, False, 0),
    "out of the fence": (out_of_fence, True, 0),
    "the autopilot starts again": (restarted, False, 0),
    "the clock of the autopilot jumps": (clock_jump, False, 0),
    "no telemetry": (no_telemetry, True, MAX_AGE_MS),
    "NaN in the position": (not_a_number, True, 0),
    "a second autopilot with this id": (second_autopilot, True, 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_who_stops(runtime: Path, report: Callable[[dict[str, Any]], None], fault: str):
    happen, publishes, due_ms = FAULTS[fault]
    holds_ms, ends_ms = [], []
    with rig(runtime, ARDUCOPTER, hold_s=HOLD_S) as made:
        for _ in range(N):
            made.fly()
            for _ in range(10):
                made.publish(VALID_MS)
            began_ns = time.monotonic_ns()
            happen(made)
            while made.driver.setpoints[-1].t_ns > time.monotonic_ns() - SILENCE_S * 1e9 or not made.holds_since(
                began_ns
            ):
                if publishes:
                    made.publish(VALID_MS)
                time.sleep(PERIOD_S)
            followed = made.published[name_of(made.moves_since(0)[-1])]
            holds_ms.append((made.holds_since(began_ns)[0].t_ns - began_ns) / 1e6)
            ends_ms.append((made.driver.setpoints[-1].t_ns - followed.t_pub_ns) / 1e6)
            assert made.wrong() == [], made.report()
    figures = {"first_hold_ms": round(max(holds_ms), 1), "last_setpoint_after_last_followed_ms": round(max(ends_ms))}
    report({"promise": "who stops", "fault": fault, "n": N, "hold_s": HOLD_S} | figures)
    assert figures["first_hold_ms"] <= due_ms + TELEMETRY_MS
    assert figures["last_setpoint_after_last_followed_ms"] <= HOLD_S * 1000 + 50
