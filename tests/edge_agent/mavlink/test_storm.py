"""The bridge process in a storm: random stalls, kills, cut links, changes of the mode, restarts, lies of the daemon.

Judged from the autopilot's side: no setpoint but hold outside the validity of its action, none twice, none of an action
that was published after the autopilot had said that it is disarmed or in another mode. The seed is in the test's name.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.time_units import NS_PER_MS
from models.autopilot.flavours import ARDUCOPTER, PX4, Flavour
from models.autopilot.link import LineFaults, Received
from tests.harness.bridge_rig import NAME, SHORT_HOLD_S, Rig, is_hold, name_of, rig

TELEMETRY = ("HEARTBEAT", "LOCAL_POSITION_NED", "ATTITUDE", "GLOBAL_POSITION_INT")
JUDGE_AFTER = 500  # actions; less than there are names


class Storm:
    def __init__(self, made: Rig, seed: int) -> None:
        self.rig, self._random = made, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self._is_disengaged = False  # and the autopilot has said so over a whole link
        self._forbidden: set[float] = set()  # names of the actions that were published meanwhile
        self._heal_in = 0  # actions until everything is mended again
        self._events: list[tuple[float, Callable[[], None]]] = [
            (0.020, self._wait), (0.004, self._stall), (0.006, self._cut), (0.008, self._leave), (0.006, self._disarm),
            (0.004, self._damage), (0.006, self._silence), (0.003, self._restart_autopilot), (0.010, self._refuse),
            (0.004, self._new_session), (0.020, self._replay), (0.010, self._lie), (0.001, self._kill),
        ]  # fmt: skip

    def run(self, n_actions: int) -> None:
        self.rig.fly()
        self.rig.driver.received.clear()
        for i in range(1, n_actions + 1):
            self._publish(self._random.choice((30, 100, 300, 900)))
            time.sleep(self._random.random() * 0.01)
            for share, event in self._events:
                if self._random.random() < share:
                    self.counts[event.__name__.strip("_")] += 1
                    event()
            self._heal_in -= 1
            if self._heal_in == 0:
                self._heal()
            if i % JUDGE_AFTER == 0 or i == n_actions:
                self._judge()

    def _publish(self, valid_ms: int, **changes: int) -> None:
        action = self.rig.action(valid_ms, **changes)
        if self._is_disengaged:
            self._forbidden.add(float(action.values[NAME]))
        self.rig.daemon.publish("actions", action)

    def _judge(self) -> None:
        made = self.rig
        made.driver.happens(lambda: False, 0.05)
        with made.driver.lock:
            assert made.wrong() == [], made.report()
            moves = [item for item in made.driver.setpoints if not is_hold(item)]
            forbidden = [item for item in moves if name_of(item) in self._forbidden and not self._is_engaged(item)]
            assert forbidden == [], made.report()
            self.counts["setpoints"] += len(moves)
            self.counts["holds"] += len(made.driver.setpoints) - len(moves)
            made.driver.received.clear()
            made.published = {}
            self._forbidden = set()
        assert made.bridge.process.poll() is None, made.report()

    def _is_engaged(self, item: Received) -> bool:
        """The autopilot followed again when it arrived: then an action of before may still stand."""
        return item.is_armed and item.mode == self.rig.flavour.external_mode

    # -- events --------------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        time.sleep(self._random.random() * 0.1)

    def _stall(self) -> None:
        """The bridge stands still while actions come and expire."""
        self.rig.bridge.process.send_signal(signal.SIGSTOP)
        for _ in range(10):
            self._publish(100)
            time.sleep(self._random.random() * 0.04)
        self.rig.bridge.process.send_signal(signal.SIGCONT)

    def _fault(self) -> None:
        self._heal_in = self._random.randrange(10, 60)

    def _cut(self) -> None:
        self.rig.link.is_cut = True
        self._fault()

    def _damage(self) -> None:
        faults = LineFaults(self._random.randrange(1000), flip=0.2, cut=0.1, lose=0.2, delay=0.1, duplicate=0.1)
        faults.directions = {"out"}
        self.rig.link.faults = faults
        self._fault()

    def _silence(self) -> None:
        self.rig.link.silent = {self._random.choice(TELEMETRY)}
        self._fault()

    def _leave(self) -> None:
        mode = "AUTO.LOITER" if self.rig.flavour is PX4 else "LOITER"
        self._disengage(lambda: self.rig.autopilot.set_mode(mode))

    def _disarm(self) -> None:
        self._disengage(self.rig.autopilot.disarm)

    def _restart_autopilot(self) -> None:
        self._disengage(self.rig.autopilot.restart)

    def _disengage(self, change: Callable[[], object]) -> None:
        """From now on no new action may be followed, if the autopilot could say it."""
        link = self.rig.link
        with self.rig.driver.lock:
            change()
            link.tell("HEARTBEAT")
        self._is_disengaged = not link.is_cut and link.faults is None and "HEARTBEAT" not in link.silent
        self._fault()

    def _heal(self) -> None:
        with self.rig.driver.lock:
            link, autopilot = self.rig.link, self.rig.autopilot
            link.is_cut, link.faults, link.silent = False, None, set()
            autopilot.arm()
            autopilot.set_mode(self.rig.flavour.external_mode)
            link.tell("HEARTBEAT")
        self._is_disengaged = False

    def _refuse(self) -> None:
        self.rig.refuse()

    def _new_session(self) -> None:
        self.rig.session += 1

    def _replay(self) -> None:
        """A message of before, byte for byte."""
        if self.rig.published:
            self.rig.daemon.publish("actions", self._random.choice(list(self.rig.published.values())))

    def _lie(self) -> None:
        """Time stamps that cannot be."""
        now_ns = time.monotonic_ns() + self._random.choice((-3000, -950, 20, 5000)) * NS_PER_MS
        self._publish(self._random.choice((100, 900, 2000)), now_ns=now_ns)

    def _kill(self) -> None:
        self.rig.bridge.process.kill()
        self.rig.restart_bridge()


def storm(folder: Path, flavour: Flavour, seed: int, n_actions: int) -> Counter[str]:
    with rig(folder, flavour, hold_s=SHORT_HOLD_S) as made:
        weather = Storm(made, seed)
        for _ in range(10):  # on a busy machine many actions expire before they are read
            weather.run(n_actions)
            if weather.counts["setpoints"] > n_actions / 20:
                return weather.counts
        pytest.fail(f"it hardly flew: {weather.counts}\n{made.report()}")


@pytest.mark.parametrize("seed", [1])
def test_a_short_storm(tmp_path_factory: pytest.TempPathFactory, seed: int):
    storm(tmp_path_factory.mktemp("s"), ARDUCOPTER, seed, 500)


@pytest.mark.soak
@pytest.mark.parametrize("flavour", [PX4, ARDUCOPTER], ids=lambda flavour: flavour.name)
def test_a_long_storm(tmp_path_factory: pytest.TempPathFactory, flavour: Flavour):
    print(storm(tmp_path_factory.mktemp("s"), flavour, 7, 50_000))


def test_a_storm_finds_what_it_is_for(tmp_path_factory: pytest.TempPathFactory):
    """A setpoint that is late, one that comes twice, one of no action, and one of an action that was forbidden."""
    with rig(tmp_path_factory.mktemp("s"), ARDUCOPTER) as made:
        weather = Storm(made, 1)
        made.fly()
        action = made.follow_one()
        item = made.wait_for_move(action)
        with made.driver.lock:
            received, name = made.driver.received, float(action.values[NAME])
            assert made.wrong() == []
            received.append(item)
            assert made.wrong() == [f"{name} rad/s twice"]
            received[-1] = item._replace(t_ns=action.valid_until_ns)
            assert "outside" in made.wrong()[0]
            received.pop()
            made.published.pop(name)
            assert "action: None" in made.wrong()[0]
            made.published[name] = action
        weather._forbidden.add(name)
        with made.driver.lock:
            received[:] = [item._replace(is_armed=False)]
        with pytest.raises(AssertionError):
            weather._judge()
