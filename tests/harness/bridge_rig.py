"""The real bridge process between a played daemon and a simulated autopilot.

Each action that a test publishes has its own yaw rate, a multiple of 0.001, so that a setpoint names its action. The
bridge may reduce a velocity, but does not change a yaw rate inside its limit.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from edge_agent.wire.messages import Action, Refusal
from models.autopilot.autopilot import Autopilot
from models.autopilot.bodies import PointMass
from models.autopilot.driver import Driver
from models.autopilot.flavours import Flavour
from models.autopilot.link import LineFaults, Received
from models.autopilot.ports import Port, UdpListener
from tests.harness import ROOT
from tests.harness.fake_daemon import HANG_S, FakeDaemon, make_action, make_refusal, make_reply

BRIDGE = 191  # MAV_COMP_ID_ONBOARD_COMPUTER
CONFIG = {
    "limits": {"speed_m_s": 20, "up_m_s": 10, "down_m_s": 10, "yaw_rate_rad_s": 3, "acceleration_m_s2": 50},
    "fence": {"min_altitude_m": 0.5, "max_altitude_m": 1000, "radius_m": 10_000},
    "max_image_age_ms": 2000,
    "hold_s": 10.0,  # the longest: what a test waits for comes also on a busy machine
}
SHORT_HOLD_S = 2.0  # for tests of the silence after it
NAME = "yaw_rate_rad_s"
N_NAMES, STEP_RAD_S = 2900, 0.001
PAUSE_S = 0.04  # between two actions: the bridge limits what a velocity changes in this time


class Bridge:
    """Owns a process of `edge-agent mavlink`; its log is kept."""

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        path = folder / "mavlink.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "edge_agent.cli.main", "mavlink", "--config", str(path)]
        self.log: list[str] = []
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line.rstrip())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(HANG_S)
        self._reader.join(HANG_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Rig:
    """daemon: played by the test. driver: the autopilot. bridge: the process between them."""

    def __init__(
        self,
        folder: Path,
        flavour: Flavour,
        port: Port | None = None,
        connection: str = "",
        more_ports: Sequence[Port] = (),
        **changes: Any,
    ) -> None:
        """port, connection: the autopilot's end and the bridge's end of their link; else UDP. more_ports: of the
        autopilot, for other peers. changes: of the bridge's configuration."""
        self.folder, self.flavour = folder, flavour
        self.daemon = FakeDaemon(folder)
        answering = self.daemon.answering(lambda request: [make_reply(request, refused={})])
        self.requests = answering.__enter__()
        self._answering: contextlib.AbstractContextManager | None = answering
        port = port or UdpListener()
        self.driver = Driver(Autopilot(flavour, PointMass(20.0), time.monotonic_ns), [port, *more_ports])
        if isinstance(port, UdpListener) and not connection:
            connection = f"udpout:127.0.0.1:{port.port}"
        config = CONFIG | {"runtime_dir": str(folder), "connection": connection}
        self.config = config | changes
        self.published: dict[float, Action] = {}  # yaw rate -> the newest action with it
        self._n = self._seq = 0
        self.session = 1
        self.bridge = Bridge(self.config, folder)

    @property
    def autopilot(self) -> Autopilot:
        return self.driver.autopilot

    @property
    def link(self) -> Any:
        return self.driver.links[0]

    def close(self) -> None:
        self.bridge.close()
        self.driver.close()
        self.end_daemon()

    def end_daemon(self) -> None:
        """The played daemon ends; the test starts another one in its folder."""
        if self._answering is not None:
            self._answering.__exit__(None, None, None)
            self.daemon.__exit__()
            self._answering = None

    def restart_bridge(self) -> None:
        self.bridge.close()
        self.bridge = Bridge(self.config, self.folder)

    # -- the daemon ----------------------------------------------------------------------------------------------------

    def action(self, valid_ms: int = 500, **changes: Any) -> Action:
        """The next action; a move with its own yaw rate, if `changes` say nothing else."""
        values = move(self._n)
        self._n, self._seq = self._n + 1, self._seq + 1
        fields = {"type": "move", "values": values, "session": self.session} | changes
        action = make_action(self._seq, valid_ms=valid_ms, **fields)
        if action.type == "move" and NAME in action.values:
            self.published[float(action.values[NAME])] = action
        return action

    def publish(self, valid_ms: int = 500, **changes: Any) -> Action:
        time.sleep(PAUSE_S)
        action = self.action(valid_ms, **changes)
        self.daemon.publish("actions", action)
        return action

    def refuse(self, reason: str = "late") -> Refusal:
        self._seq += 1
        now_ns = time.monotonic_ns()
        refusal = make_refusal(self._seq, session=self.session, reason=reason, t_pub_ns=now_ns, t_capture_ns=now_ns)
        self.daemon.publish("actions", refusal)
        return refusal

    # -- the vehicle ---------------------------------------------------------------------------------------------------

    def fly(self) -> None:
        """Arm and enter the mode that follows setpoints, and publish moves until one is followed.

        Everything that a test may have broken is mended before, and what has arrived is forgotten."""
        link = self.link
        with self.driver.lock:
            self.driver.received.clear()
            link.is_cut, link.is_mavlink1, link.faults = False, False, None
            link.silent, link.changed = set(), {}
            self.autopilot.body = PointMass(20.0)
            if not self.autopilot.is_armed or self.autopilot.mode != self.flavour.external_mode:
                self.autopilot.set_mode(self.flavour.first_mode)
                self.autopilot.arm()
            time.sleep(0.002)  # a new time since boot
            link.tell("LOCAL_POSITION_NED")  # the jump to the new body is over before the first action
        began_ns, until_s = time.monotonic_ns(), time.monotonic() + HANG_S
        while not self.driver.happens(lambda: self._is_following(began_ns), 0.1):
            self.publish()
            assert time.monotonic() < until_s, f"no action is followed:\n{self.report()}"

    def _is_following(self, since_ns: int) -> bool:
        """Enters the mode that follows setpoints as soon as the autopilot allows it."""
        if self.autopilot.mode != self.flavour.external_mode and self.autopilot.accepts_external_mode():
            self.autopilot.set_mode(self.flavour.external_mode)
        return bool(self.moves_since(since_ns))

    def follow(self, daemon: DaemonProcess) -> None:
        """The same with a daemon that publishes by itself."""
        with self.driver.lock:
            self.autopilot.arm()
        self.driver.wait(lambda: self._is_following(0))

    def report(self) -> str:
        """For an assertion: what the bridge and the autopilot say."""
        autopilot = self.autopilot
        lines = [*self.bridge.log[-15:], f"autopilot: {autopilot.mode}, armed {autopilot.is_armed}, {autopilot.target}"]
        return "\n".join(lines)

    def setpoints_since(self, t_ns: int) -> list[Received]:
        return [item for item in self.driver.setpoints if item.t_ns >= t_ns]

    def moves_since(self, t_ns: int) -> list[Received]:
        return [item for item in self.setpoints_since(t_ns) if not is_hold(item)]

    def holds_since(self, t_ns: int) -> list[Received]:
        return [item for item in self.setpoints_since(t_ns) if is_hold(item)]

    def wait_for_move(self, action: Action) -> Received:
        name = action.values[NAME]
        self.driver.wait(lambda: any(name_of(item) == name for item in self.moves_since(action.t_pub_ns)))
        return next(item for item in self.moves_since(action.t_pub_ns) if name_of(item) == name)

    def follow_one(self, valid_ms: int = 900) -> Action:
        """Publish moves until one is followed. On a busy machine an action may expire before it is read."""
        until_s = time.monotonic() + HANG_S
        while True:
            action = self.publish(valid_ms)
            if self.driver.happens(lambda action=action: self.is_followed(action), valid_ms / 1000):
                return action
            assert time.monotonic() < until_s, f"no action is followed:\n{self.report()}"

    def is_followed(self, action: Action) -> bool:
        return any(name_of(item) == action.values[NAME] for item in self.moves_since(action.t_pub_ns))

    def wait_for_hold(self, since_ns: int) -> Received:
        self.driver.wait(lambda: self.holds_since(since_ns))
        return self.holds_since(since_ns)[0]

    def publish_and_see_hold(self, n: int = 3) -> None:
        """Actions that must not be followed: each is answered with hold."""
        for _ in range(n):
            action = self.publish()
            self.wait_for_hold(action.t_pub_ns)
            assert self.moves_since(action.t_pub_ns) == [], self.report()

    def publish_until_held(self) -> None:
        """Publish moves until one is not followed while it is valid. The first hold may be older than the action, of an
        action before that has expired."""
        until_s = time.monotonic() + HANG_S
        while True:
            action = self.publish(valid_ms=900)
            began_ns = action.t_pub_ns
            self.driver.happens(lambda: self.moves_since(began_ns) or len(self.holds_since(began_ns)) > 2, 0.9)  # noqa: B023
            holds = self.holds_since(began_ns)
            if len(holds) > 2 and holds[2].t_ns < action.valid_until_ns and not self.moves_since(began_ns):
                return
            assert time.monotonic() < until_s, f"every action is followed:\n{self.report()}"

    def wait_for_silence(self) -> int:
        """Wait until the bridge writes that it sends no setpoints any more, and has sent another HEARTBEAT: all that it
        sent before has arrived. Returns when the last setpoint arrived."""
        self.driver.wait(lambda: any("nothing is sent any more" in line for line in self.bridge.log))
        self.wait_for_heartbeats(1)
        return self.driver.setpoints[-1].t_ns

    def wait_for_heartbeats(self, n: int) -> None:
        """Of the bridge, from now on."""
        now_ns = time.monotonic_ns()

        def beats() -> list[Received]:
            return [item for item in self.driver.received if item.type == "HEARTBEAT" and item.source == (1, BRIDGE)]

        self.driver.wait(lambda: sum(item.t_ns > now_ns for item in beats()) >= n)

    def wrong(self) -> list[str]:
        """Setpoints that are not hold and should not be there: late, twice, of no action, disarmed, in another mode."""
        found, seen = [], set()
        for item in self.driver.setpoints:
            if is_hold(item):
                continue
            name = name_of(item)
            action = self.published.get(name)
            if action is None or not action.t_pub_ns <= item.t_ns < action.valid_until_ns:
                found.append(f"{name} rad/s at {item.t_ns}, outside the validity of its action: {action}")
            if name in seen:
                found.append(f"{name} rad/s twice")
            seen.add(name)
        return found


def move(n: int) -> dict[str, float]:
    """The values of action number n."""
    name = round(STEP_RAD_S * (1 + n % N_NAMES), 3)
    return {"forward_m_s": 1.0, "right_m_s": 0.0, "down_m_s": 0.0, NAME: name}


def name_of(item: Received) -> float:
    """The yaw rate by which a setpoint names its action."""
    return round(item.message.yaw_rate, 3)


def is_hold(item: Received) -> bool:
    """Zero velocity and zero yaw rate, and nothing else that would be followed."""
    m = item.message
    is_velocity = item.type == "SET_POSITION_TARGET_LOCAL_NED" and m.type_mask == 0x5C7
    return is_velocity and (m.vx, m.vy, m.vz, m.yaw_rate) == (0, 0, 0, 0)


def commands(driver: Driver, number: int) -> list[Received]:
    """What the bridge commanded, by the number of the MAV_CMD."""
    return [
        item
        for item in driver.received
        if item.type in ("COMMAND_LONG", "COMMAND_INT") and item.message.command == number and item.source[1] == BRIDGE
    ]


@contextlib.contextmanager
def rig(folder: Path, flavour: Flavour, **options: Any) -> Iterator[Rig]:
    made = Rig(folder, flavour, **options)
    try:
        yield made
    finally:
        made.close()


# -- a daemon that can be killed ---------------------------------------------------------------------------------------


class DaemonProcess:
    """Publishes a move at a rate, in a process of its own, and says which ones. kill() is kill -9."""

    def __init__(self, folder: Path, rate_hz: float, valid_ms: int) -> None:
        command = [sys.executable, "-m", "tests.harness.bridge_rig", str(folder), str(rate_hz), str(valid_ms)]
        self._process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
        self.published: dict[float, tuple[int, int]] = {}  # yaw rate -> t_pub_ns, valid_until_ns
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # the last line of a process that was killed
                name, t_pub_ns, until_ns = json.loads(line)
                self.published[name] = (t_pub_ns, until_ns)

    def kill(self) -> int:
        """Returns the time of the kill."""
        now_ns = time.monotonic_ns()
        self._process.kill()
        self._process.wait(HANG_S)
        self._reader.join(HANG_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return now_ns


def publish_for_ever(folder: Path, rate_hz: float, valid_ms: int, out: Callable[[str], None]) -> None:
    with FakeDaemon(folder) as daemon, daemon.answering(lambda request: [make_reply(request, refused={})]):
        for seq in range(10**9):
            action = make_action(seq, valid_ms=valid_ms, type="move", values=move(seq))
            daemon.publish("actions", action)
            out(json.dumps([action.values[NAME], action.t_pub_ns, action.valid_until_ns]))
            time.sleep(1 / rate_hz)


if __name__ == "__main__":
    publish_for_ever(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), lambda line: print(line, flush=True))

__all__ = [
    "BRIDGE", "SHORT_HOLD_S", "Bridge", "DaemonProcess", "LineFaults", "Rig", "commands", "is_hold", "name_of", "rig",
]  # fmt: skip
