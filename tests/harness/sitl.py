"""A real autopilot in simulation, and a pilot for it: ArduCopter's `arducopter`, or PX4's `px4` with its own physics.

EDGE_AGENT_SITL names the binary. Neither needs another simulator. Command lines and ports are those of the two
projects: ArduPilot, libraries/AP_HAL_SITL/SITL_cmdline.cpp (serial 0 is TCP 5760, serial 1 is TCP 5762); PX4,
Tools/simulation/sitl_multiple_run.sh and ROMFS/px4fmu_common/init.d-posix/px4-rc.mavlink (UDP 18570 to 14550 for the
ground station, 14580 to 14540 for a companion computer). PX4 needs `etc` beside `bin`, as `make px4_sitl` leaves it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pymavlink.dialects.v20 import common as mavlink

VARIABLE = "EDGE_AGENT_SITL"
START_S = 180.0  # until the estimator has a position
STEP_S = 0.05
# A calibrated quadrotor without a transmitter. A name that this release does not know is ignored.
COPTER_PARAMETERS = """\
FRAME_CLASS 1
FRAME_TYPE 0
BATT_MONITOR 4
ARMING_CHECK 0
ARMING_SKIPCHK -1
FS_THR_ENABLE 0
DISARM_DELAY 0
COMPASS_OFS_X 5
COMPASS_OFS_Y 13
COMPASS_OFS_Z -18
COMPASS_OFS2_X 5
COMPASS_OFS2_Y 13
COMPASS_OFS2_Z -18
COMPASS_OFS3_X 5
COMPASS_OFS3_Y 13
COMPASS_OFS3_Z -18
INS_ACCOFFS_X 0.001
INS_ACCOFFS_Y 0.001
INS_ACCOFFS_Z 0.001
INS_ACCSCAL_X 1.001
INS_ACCSCAL_Y 1.001
INS_ACCSCAL_Z 1.001
INS_ACC2OFFS_X 0.001
INS_ACC2OFFS_Y 0.001
INS_ACC2OFFS_Z 0.001
INS_ACC2SCAL_X 1.001
INS_ACC2SCAL_Y 1.001
INS_ACC2SCAL_Z 1.001
SIM_BARO_RND 0
"""
# No transmitter, no ground station needed, and Hold after the loss of setpoints.
PX4_PARAMETERS = {"COM_RC_IN_MODE": "4", "NAV_RCL_ACT": "0", "NAV_DLL_ACT": "0", "COM_OBL_RC_ACT": "5",
                  "CBRK_SUPPLY_CHK": "894281", "COM_ARM_WO_GPS": "1"}  # fmt: skip


class Kind(NamedTuple):
    name: str
    external_mode: tuple[int, int]  # parameters 2 and 3 of MAV_CMD_DO_SET_MODE
    other_mode: tuple[int, int]  # keeps the position
    external_custom_mode: int
    land_custom_mode: int
    bridge_connection: str


ARDUCOPTER = Kind("arducopter", (4, 0), (17, 0), 4, 9, "tcp:127.0.0.1:5762")  # GUIDED, BRAKE
PX4 = Kind("px4", (6, 0), (4, 3), 6 << 16, 4 << 16 | 6 << 24, "udpin:127.0.0.1:14540")  # OFFBOARD, AUTO.LOITER


def binary() -> tuple[Path, Kind]:
    """The simulation that the variable names. Skips the test without it."""
    name = os.environ.get(VARIABLE, "")
    if not name:
        pytest.skip(f"{VARIABLE} names no simulation: set it to the path of arducopter or px4")
    path = Path(name).resolve()
    for kind in (ARDUCOPTER, PX4):
        if kind.name in path.name.lower():
            assert os.access(path, os.X_OK), f"{VARIABLE}={name}: expected an executable file"
            return path, kind
    raise AssertionError(f"{VARIABLE}={name}: expected a file whose name has arducopter or px4")


class Pilot:
    """The ground station: reads what the autopilot says, and commands it. Owns a socket."""

    def __init__(self, kind: Kind) -> None:
        self._codec = mavlink.MAVLink(None, srcSystem=255, srcComponent=190)
        self._parser = mavlink.MAVLink(None)
        self._parser.robust_parsing = True
        self.newest: dict[str, Any] = {}
        self.texts: list[str] = []
        self.companion: list[Any] = []  # HEARTBEAT and STATUSTEXT of the bridge
        self._peer: Any = None
        self._heard_s = 0.0
        if kind is PX4:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._socket.bind(("127.0.0.1", 14550))
            self._peer = ("127.0.0.1", 18570)
        else:
            self._socket = _connected(("127.0.0.1", 5760))
        self._socket.setblocking(False)

    def close(self) -> None:
        self._socket.close()

    def send(self, message: Any) -> None:
        packet = message.pack(self._codec)
        self._codec.seq = (self._codec.seq + 1) % 256
        if self._peer is None:
            self._socket.sendall(packet)
        else:
            self._socket.sendto(packet, self._peer)

    def step(self) -> None:
        """Read for STEP_S, and be heard once a second."""
        if time.monotonic() - self._heard_s > 1.0:
            self._heard_s = time.monotonic()
            gcs, invalid = mavlink.MAV_TYPE_GCS, mavlink.MAV_AUTOPILOT_INVALID
            self.send(mavlink.MAVLink_heartbeat_message(gcs, invalid, 0, 0, mavlink.MAV_STATE_ACTIVE, 3))
        until_s = time.monotonic() + STEP_S
        while (left_s := until_s - time.monotonic()) > 0:
            if select.select([self._socket], [], [], left_s)[0]:
                for message in self._parser.parse_buffer(self._socket.recv(65536)) or []:
                    self._take(message)

    def _take(self, message: Any) -> None:
        kind, component = message.get_type(), message.get_srcComponent()
        if kind == "STATUSTEXT":
            self.texts.append(message.text)
        if component == mavlink.MAV_COMP_ID_AUTOPILOT1:
            self.newest[kind] = message
        elif component == mavlink.MAV_COMP_ID_ONBOARD_COMPUTER:
            self.companion.append(message)

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = START_S) -> None:
        until_s = time.monotonic() + timeout_s
        while not condition():
            self.step()
            assert time.monotonic() < until_s, f"{what}: not in {timeout_s:g} s; the autopilot said {self.texts[-8:]}"

    def command(self, number: int, *params: float) -> None:
        """Give a command until it is accepted: an autopilot that starts refuses at first."""
        padded = [*params, *[0.0] * 7][:7]
        until_s = time.monotonic() + START_S
        while True:
            self.newest.pop("COMMAND_ACK", None)
            self.send(mavlink.MAVLink_command_long_message(1, 1, number, 0, *padded))
            for _ in range(40):
                self.step()
                ack = self.newest.get("COMMAND_ACK")
                if ack is not None and ack.command == number:
                    break
            if ack is not None and ack.command == number and ack.result == mavlink.MAV_RESULT_ACCEPTED:
                return
            assert time.monotonic() < until_s, f"command {number}: {ack}; the autopilot said {self.texts[-8:]}"

    def ask_for(self, name: str, rate_hz: float) -> None:
        number = getattr(mavlink, f"MAVLINK_MSG_ID_{name}")
        self.command(mavlink.MAV_CMD_SET_MESSAGE_INTERVAL, number, 1e6 / rate_hz)

    @property
    def is_armed(self) -> bool:
        beat = self.newest.get("HEARTBEAT")
        return beat is not None and bool(beat.base_mode & mavlink.MAV_MODE_FLAG_SAFETY_ARMED)

    @property
    def custom_mode(self) -> int:
        beat = self.newest.get("HEARTBEAT")
        return -1 if beat is None else int(beat.custom_mode)

    @property
    def height_m(self) -> float:
        position = self.newest.get("GLOBAL_POSITION_INT")
        return 0.0 if position is None else position.relative_alt / 1000

    @property
    def speed_m_s(self) -> float:
        p = self.newest["LOCAL_POSITION_NED"]
        return float((p.vx**2 + p.vy**2 + p.vz**2) ** 0.5)


def _connected(address: tuple[str, int]) -> socket.socket:
    until_s = time.monotonic() + START_S
    while True:
        try:
            return socket.create_connection(address, timeout=1.0)
        except OSError:
            assert time.monotonic() < until_s, f"{address}: the simulation does not listen there"
            time.sleep(0.2)


@contextlib.contextmanager
def simulation(path: Path, kind: Kind, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The autopilot's process, in an empty folder; its output is in folder/sitl.log."""
    env = os.environ.copy()
    if kind is PX4:
        command = [str(path), "-i", "0", "-d", str(path.parent.parent / "etc")]
        env |= {"PX4_SIM_MODEL": "sihsim_quadx", "HEADLESS": "1"}
        env |= {f"PX4_PARAM_{name}": value for name, value in PX4_PARAMETERS.items()}
    else:
        parameters = folder / "copter.parm"
        parameters.write_text(COPTER_PARAMETERS)
        command = [str(path), "--model", "quad", "--speedup", "1", "--home", "47.397742,8.545594,488,0"]
        command += ["--defaults", str(parameters), "-w"]
    with (folder / "sitl.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
