"""Which commands come of which messages, on a clock that stands still until a test moves it."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest

from edge_agent.client import Client, is_valid
from edge_agent.ros2.follower import MAX_WAIT_S, Command, Follower
from edge_agent.ros2.motion import Velocity
from edge_agent.time_units import NS_PER_MS
from edge_agent.wire.messages import Action
from tests.harness.clock import FakeClock
from tests.harness.fake_daemon import make_action, make_refusal


def velocity(speed: float) -> dict[str, float | str]:
    return {"forward_m_s": speed, "right_m_s": 0.0, "down_m_s": 0.0, "yaw_rate_rad_s": 0.0}


class Rig:
    """A follower, its clock, and the daemon's part of a client."""

    def __init__(self, max_age_ms: float = 0) -> None:
        self.clock = FakeClock()
        self.is_awake = True  # False: the client has noticed a suspend
        self.follower = Follower(cast(Client, self), max_age_ms, clock=self.clock)
        self._seq = 0

    def is_valid(self, action: Action) -> bool:
        return self.is_awake and is_valid(action, self.clock.now_ns)

    def action(self, type: str = "move", speed: float | None = 0.25, **changes: Any) -> Action:
        self._seq += 1
        values = {} if speed is None else velocity(speed)
        return make_action(self._seq, now_ns=self.clock.now_ns, type=type, values=values, **changes)

    def step(self, answer: Any = None, after_ms: float = 1) -> list[str]:
        """The lines of the commands."""
        self.clock.advance(after_ms / 1000)
        return [command.line for command in self.follower.step(answer)]


REST = " right_m_s=0 down_m_s=0 yaw_rate_rad_s=0"
MOVE = f"move forward_m_s=0.25{REST}"


def test_an_action_is_one_command():
    rig = Rig()
    assert rig.step() == []
    action = rig.action(t_capture_ns=rig.clock.now_ns - 30)
    assert rig.follower.step(action) == [
        Command(rig.clock.now_ns, MOVE, Velocity(x_m_s=0.25), captured_ns=action.t_capture_ns)
    ]
    assert rig.step() == rig.step(action) == [] and rig.follower.why == ""


@pytest.mark.parametrize(("type", "speed"), [("move", 0.25), ("search", None), ("land", None)])
def test_at_the_expiry_there_is_one_hold_and_then_nothing(type, speed):
    rig = Rig()
    assert len(rig.step(rig.action(type, speed, valid_ms=500))) == 1
    assert rig.step(after_ms=498) == []
    assert rig.step() == ["hold"]
    assert rig.step() == rig.step(after_ms=5000) == []


def test_an_action_of_type_hold_needs_no_other_hold():
    rig = Rig()
    assert rig.step(rig.action("hold", None)) == ["hold"]
    assert rig.step(after_ms=5000) == []


def test_a_hold_stands_between_an_expired_action_and_the_next_one():
    rig = Rig()
    rig.step(rig.action(valid_ms=100))
    rig.clock.advance(0.2)
    assert rig.step(rig.action(speed=0.5)) == ["hold", f"move forward_m_s=0.5{REST}"]


def test_a_refusal_ends_an_action_and_what_was_published_before_it():
    rig = Rig()
    rig.step(rig.action())
    late = rig.action()
    rig.clock.advance(0.001)
    assert rig.step(make_refusal(9, t_pub_ns=rig.clock.now_ns)) == ["hold"]
    assert "late 2100 ms old" in rig.follower.why
    assert rig.step(late) == [] and rig.step(make_refusal(10)) == []
    assert rig.step(rig.action()) == [MOVE]


def test_a_refusal_with_a_stamp_of_the_future_does_not_end_all_actions():
    rig = Rig()
    rig.step(make_refusal(1, t_pub_ns=10**18))
    rig.step()
    assert rig.step(rig.action()) == [MOVE]


def test_what_is_not_valid_is_not_a_command():
    rig = Rig()
    expired = rig.action(valid_ms=100)
    future = rig.action(t_pub_ns=rig.clock.now_ns + 10**9)
    assert rig.step(expired, after_ms=100) == [] and rig.step(future) == []


def test_after_a_suspend_the_action_is_over():
    rig = Rig()
    rig.step(rig.action())
    rig.is_awake = False
    assert rig.step() == ["hold"]


def test_an_action_that_is_not_newer_is_none():
    """Two daemons, or a message that is sent again by somebody: what was published before the newest is over."""
    rig = Rig()
    older = rig.action(speed=9.0, session=5)
    rig.step()
    assert rig.step(rig.action()) == [MOVE]
    assert rig.step(older) == []


def test_a_new_session_with_the_same_task_is_followed_after_a_hold():
    rig = Rig()
    rig.step(rig.action())
    assert rig.step(rig.action(session=2)) == ["hold", MOVE]
    assert rig.step(rig.action(session=2)) == [MOVE]


@pytest.mark.parametrize("other", [{"instruction": "Fly home."}, {"adapter": "night"}])
def test_a_new_session_with_another_task_is_not_followed_until_it_is_instructed(other):
    rig = Rig()
    rig.step(rig.action())
    assert rig.step(rig.action(session=2, **other)) == ["hold"]
    assert rig.step(rig.action(session=2, **other)) == []
    assert "instruct" in rig.follower.why
    task = (other.get("instruction", "Hold position."), other.get("adapter", ""))
    assert rig.follower.end_actions("a new instruction", task) == [] and rig.step() == []
    assert rig.step(rig.action(session=2, **other)) == [MOVE]


def test_a_new_session_that_gets_the_old_task_back_is_followed():
    rig = Rig()
    rig.step(rig.action())
    rig.step(rig.action(session=2, instruction="Fly home."))
    assert rig.step(rig.action(session=2)) == [MOVE]


def test_another_instruction_in_the_same_session_is_followed():
    rig = Rig()
    rig.step(rig.action())
    assert rig.step(rig.action(instruction="Fly home.")) == [MOVE]
    assert rig.step(rig.action(session=2, instruction="Fly home.")) == ["hold", MOVE]


def test_after_a_reply_older_actions_are_over():
    rig = Rig()
    rig.step(rig.action())
    late = rig.action()
    rig.clock.advance(0.001)
    assert [command.line for command in rig.follower.end_actions("paused")] == ["hold"]
    assert rig.step(late) == []
    assert rig.step(rig.action()) == [MOVE]  # published after the reply


def test_a_stop_lasts_until_go():
    rig = Rig()
    rig.step(rig.action())
    assert [command.why for command in rig.follower.stop("paused here")] == ["paused here"]
    assert rig.follower.stop("paused here") == []
    assert rig.step(rig.action()) == [] and rig.follower.why == "paused here"
    rig.follower.go()
    assert rig.step(rig.action()) == [MOVE]


def test_an_action_that_the_node_does_not_know_is_a_hold():
    rig = Rig()
    rig.step(rig.action())
    unknown = make_action(5, now_ns=rig.clock.now_ns + 1, type="move", values={"speed_m_s": 2.0})
    assert rig.step(unknown) == ["hold"]
    assert "speed_m_s" in rig.follower.why and rig.follower.not_usable == 1
    assert rig.step() == []


def test_an_image_that_is_too_old():
    rig = Rig(max_age_ms=100)
    assert rig.step(rig.action(age_ms=100)) == [MOVE]
    assert rig.step(rig.action(age_ms=101)) == ["hold"]
    assert "max_age_ms is 100" in rig.follower.why


def test_each_step_of_a_chunk_is_one_command_at_its_time():
    rig = Rig()
    chunk = [velocity(0.5), velocity(0.75)]
    action = rig.action(chunk=chunk, chunk_step_ms=100, valid_ms=400)
    assert rig.step(action, after_ms=0) == [MOVE]
    assert rig.follower.wait_s() == MAX_WAIT_S
    rig.clock.advance(0.09)
    assert rig.follower.wait_s() == pytest.approx(0.01)
    assert rig.step(after_ms=10) == [f"move forward_m_s=0.5{REST}"] and rig.step() == []
    assert rig.step(after_ms=99) == [f"move forward_m_s=0.75{REST}"]
    assert rig.step(after_ms=150) == []
    assert rig.step(after_ms=50) == ["hold"]


def test_the_wait_ends_at_the_expiry():
    rig = Rig()
    assert rig.follower.wait_s() == MAX_WAIT_S
    rig.step(rig.action(valid_ms=100), after_ms=0)
    rig.clock.advance(0.095)
    assert rig.follower.wait_s() == pytest.approx(0.005)
    rig.clock.advance(1)
    assert rig.follower.wait_s() == 0


def random_events(n: int) -> list[tuple[str, int]]:
    rng = random.Random(1)
    names = ["action"] * 6 + ["stale", "again", "refusal", "session", "stop", "go", "go", "reply", "nothing"]
    return [(rng.choice(names), rng.choice((0, 3, 20, 90, 300))) for _ in range(n)]


def test_no_command_is_late_or_given_twice():
    check_random_events(random_events(5000))


@pytest.mark.soak
def test_no_command_is_late_or_given_twice_in_100_000_actions():
    check_random_events(random_events(250_000))


def check_random_events(events: list[tuple[str, int]]) -> None:
    """Whatever happens: each action at most once, only while it is valid, and a hold after each that has ended."""
    rig, sent, session, given = Rig(), cast(list[Action], []), 1, set()
    moving: Action | None = None
    for name, after_ms in events:
        rig.clock.advance(after_ms / 1000)
        answer: Any = None
        commands: list[Command] = []
        if name == "session":
            session += 1
        elif name == "stop":
            commands = rig.follower.stop("a test")
        elif name == "go":
            rig.follower.go()
        elif name == "reply":
            commands = rig.follower.end_actions("a reply")
        elif name == "again" and sent:
            answer = sent[-1 - after_ms % len(sent)]
        elif name == "refusal":
            answer = make_refusal(1, t_pub_ns=rig.clock.now_ns)
        elif name in ("action", "stale"):
            answer = rig.action(speed=len(sent) / 1000 + 0.001, session=session, valid_ms=100)
            sent = [*sent[-8:], answer]
            rig.clock.advance(0.2 if name == "stale" else 0.0)
        commands = commands + rig.follower.step(answer)
        for command in commands:
            if command.line == "hold":
                moving = None
                continue
            assert answer is not None and command.captured_ns == answer.t_capture_ns
            assert answer.t_pub_ns <= command.read_ns < answer.valid_until_ns
            assert (answer.session, answer.seq) not in given
            given.add((answer.session, answer.seq))
            assert moving is None or moving.valid_until_ns > rig.clock.now_ns, "no hold after an expiry"
            moving = answer
        assert moving is None or moving.valid_until_ns > rig.clock.now_ns, "an action has expired, and no hold came"
        if name in ("refusal", "stop", "reply"):
            assert moving is None
        if len(given) > 100:
            given = set(sorted(given, key=lambda pair: pair[1])[-50:])
    assert rig.clock.now_ns % NS_PER_MS == 0
