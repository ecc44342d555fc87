"""MAVSDK as the pilot's ground station, in a process of its own: an independent reader of autopilot and bridge.

    python -m tests.harness.mavsdk_peer udpin://127.0.0.1:14550

It prints one JSON object for each thing that MAVSDK reports, and carries out one command for each line of its standard
input: arm, disarm, land, hold, or a mode of PX4 or ArduCopter as `mode MAIN SUB` (the two parameters of DO_SET_MODE).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HANG_S = 60.0  # bounds a hang, not a duration


class MavsdkPeer:
    """The process, from a test's side."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-m", "tests.harness.mavsdk_peer", url]
        self._scratch = tempfile.TemporaryDirectory()  # MAVSDK makes folders and leaves them
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"TMPDIR": self._scratch.name},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.newest: dict[str, Any] = {}  # name -> what MAVSDK reported last
        self.texts: list[str] = []
        self.heartbeats: list[dict[str, Any]] = []  # with component_id of the sender
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith("{"):  # MAVSDK writes its log to the same place
                continue
            with self._changed:
                for name, value in json.loads(line).items():
                    self.newest[name] = value
                    if name == "text":
                        self.texts.append(value)
                    if name == "heartbeat":
                        self.heartbeats.append(value)
                self._changed.notify_all()

    def wait(self, condition: Callable[[], Any]) -> Any:
        with self._changed:
            found = self._changed.wait_for(condition, HANG_S)
            assert found, f"MAVSDK did not report it; the newest: {self.newest}"
            return found

    def command(self, text: str) -> str:
        """Give a command; returns MAVSDK's result, such as SUCCESS."""
        assert self._process.stdin is not None
        with self._changed:
            self.newest.pop("result", None)
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()
        return str(self.wait(lambda: self.newest.get("result")))

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait(HANG_S)
        self._reader.join(HANG_S)
        self._process.stdin.close()
        self._process.stdout.close()
        self._scratch.cleanup()


@contextlib.contextmanager
def mavsdk_peer(url: str) -> Iterator[MavsdkPeer]:
    peer = MavsdkPeer(url)
    try:
        yield peer
    finally:
        peer.close()


_report_lock = threading.Lock()


def report(name: str, value: object) -> None:
    """MAVSDK calls back from several threads."""
    with _report_lock:
        sys.stdout.write(json.dumps({name: value}) + "\n")
        sys.stdout.flush()


def carry_out(line: str, action: Any, direct: Any) -> str:
    """The name of MAVSDK's result."""
    from mavsdk.plugins.action import ActionError
    from mavsdk.plugins.mavlink_direct import MavlinkMessage

    word, *numbers = line.split()
    if word == "mode":
        main, sub = numbers
        fields = {"target_system": 1, "target_component": 1, "command": 176, "confirmation": 0, "param1": 1.0}
        fields |= {
            "param2": float(main),
            "param3": float(sub),
            "param4": 0.0,
            "param5": 0.0,
            "param6": 0.0,
            "param7": 0.0,
        }
        return str(direct.send_message(MavlinkMessage("COMMAND_LONG", 245, 190, 1, 1, json.dumps(fields))).name)
    try:
        return str({"arm": action.arm, "disarm": action.disarm, "land": action.land, "hold": action.hold}[word]().name)
    except ActionError as error:
        return str(error._result.name)


def main() -> int:
    from mavsdk import ComponentType, Configuration, Mavsdk
    from mavsdk.plugins.action import Action
    from mavsdk.plugins.mavlink_direct import MavlinkDirect
    from mavsdk.plugins.telemetry import Telemetry

    mavsdk = Mavsdk(Configuration.create_with_component_type(ComponentType.GROUND_STATION))
    mavsdk.add_any_connection(sys.argv[1])
    system = mavsdk.first_autopilot(HANG_S)
    if system is None:
        return 1
    report("connected", {"autopilot": system.autopilot_type().name, "vehicle": system.vehicle_type().name})
    telemetry, action, direct = Telemetry(system), Action(system), MavlinkDirect(system)
    telemetry.subscribe_armed(lambda armed, _: report("armed", bool(armed)))
    telemetry.subscribe_flight_mode(lambda mode, _: report("mode", mode.name))
    telemetry.subscribe_battery(lambda battery, _: report("battery_percent", battery.remaining_percent))
    telemetry.subscribe_landed_state(lambda state, _: report("landed", state.name))
    telemetry.subscribe_position(
        lambda p, _: report("position", [p.latitude_deg, p.longitude_deg, p.relative_altitude_m])
    )
    telemetry.subscribe_position_velocity_ned(
        lambda p, _: report(
            "ned", [p.position.north_m, p.position.east_m, p.position.down_m, p.velocity.north_m_s, p.velocity.east_m_s]
        )
    )
    telemetry.subscribe_heading(lambda heading, _: report("heading_deg", heading.heading_deg))
    telemetry.subscribe_gps_info(lambda gps, _: report("gps_fix", gps.fix_type.name))
    telemetry.subscribe_status_text(lambda status, _: report("text", status.text))
    direct.subscribe_message(
        "HEARTBEAT", lambda m, _: report("heartbeat", {"component_id": m.component_id} | json.loads(m.fields_json))
    )
    for line in sys.stdin:
        report("result", carry_out(line, action, direct))
    return 0


if __name__ == "__main__":
    sys.exit(main())
