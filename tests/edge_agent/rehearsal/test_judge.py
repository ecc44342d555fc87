"""The judge by itself: events and commands with times written by hand, and what it finds."""

from __future__ import annotations

import math

import pytest

from edge_agent.rehearsal.judge import hold_delays_ms, is_done, judge
from edge_agent.rehearsal.records import Command, Due, Sent, parse_command
from edge_agent.time_units import NS_PER_MS as MS

T0 = 10**15


def sent(n: int, at_ms: int = 0, valid_ms: int = 300, rule: str = "follow", **changes) -> Sent:
    """Action number n: forward speed 0.100 + n / 1000."""
    t_ns = T0 + at_ms * MS
    steps = ({"forward_m_s": 0.1 + n / 1000, "right_m_s": 0.05, "down_m_s": -0.02},)
    message = Sent(t_ns, f"action {n}", rule, "move", steps, t_ns, t_ns + valid_ms * MS)
    return message._replace(**changes)


def move(n: int, at_ms: float, read_ms: float | None = None, **changes) -> Command:
    values = {"forward_m_s": 0.1 + n / 1000} | changes
    return Command(T0 + round(at_ms * MS), "move", values, T0 + round((at_ms if read_ms is None else read_ms) * MS))


def hold(at_ms: float) -> Command:
    return Command(T0 + round(at_ms * MS), "hold", {}, T0 + round(at_ms * MS))


CHUNK = sent(
    1,
    valid_ms=900,
    steps=({"forward_m_s": 0.101}, {"forward_m_s": 0.102}, {"forward_m_s": 0.103}, {"forward_m_s": 0.104}),
    chunk_step_ns=150 * MS,
)
SEARCH = sent(1, type="search", steps=({},))
ONE, TWO, BAD = sent(1), sent(2, 100), sent(3, 200, rule="discard")


@pytest.mark.parametrize(
    ("events", "commands", "said"),
    [
        ([ONE], [], ""),
        ([ONE], [move(1, 10), move(1, 299.9), hold(300)], ""),
        ([ONE], [move(1, 300)], "the action had expired by 0.0 ms"),
        ([ONE], [move(1, 299.9, read_ms=320)], ""),  # it was valid when the controller looked
        ([ONE], [move(1, -1)], "not published yet"),
        ([ONE], [move(7, 10)], "belongs to no action"),
        ([ONE], [Command(T0, "move", {"forward_m_s": math.nan}, T0)], "belongs to no action"),
        ([ONE], [Command(T0, "move", {}, T0)], "belongs to no action"),
        ([ONE], [move(1, 10)._replace(type="drive")], "the type of the action is move"),
        ([ONE, TWO, BAD], [move(1, 10), move(2, 110), move(2, 150), hold(400)], ""),
        ([ONE, TWO, BAD], [move(2, 110), move(1, 150)], "went back to an older action"),
        ([ONE, TWO, BAD], [move(3, 210)], "had to be discarded"),
        ([ONE], [move(1, 10), hold(20), move(1, 30)], "again after a hold"),
        ([ONE, TWO], [move(1, 10), hold(20), move(2, 130)], ""),
        # A controller may do less than the action asks for, never more and never the opposite.
        ([ONE], [move(1, 10, right_m_s=0.05, down_m_s=-0.02)], ""),
        ([ONE], [move(1, 10, right_m_s=0.0, down_m_s=-0.01, camera=1.0)], ""),
        ([ONE], [move(1, 10, right_m_s=0.06)], "right_m_s of the action is 0.05"),
        ([ONE], [move(1, 10, right_m_s=-0.01)], "right_m_s of the action is 0.05"),
        ([ONE], [move(1, 10, right_m_s=math.nan)], "right_m_s of the action is 0.05"),
        ([ONE], [move(1, 10, right_m_s="0.05m")], "right_m_s of the action is 0.05"),
        # Chunks: each step at its time; who plays none follows the first step.
        ([CHUNK], [move(1, 10), move(2, 150), move(3, 440), move(4, 890), hold(900)], ""),
        ([CHUNK], [move(1, 10), move(1, 890)], ""),
        ([CHUNK], [move(2, 149.9, read_ms=150.1)], ""),  # the next step began after the time was taken
        ([CHUNK], [move(2, 149)], "too early for this step"),
        ([CHUNK], [move(2, 300)], "too late for this step"),
        ([CHUNK], [move(4, 900)], "expired"),
        # Types without values.
        ([SEARCH], [Command(T0 + 10, "search", {}, T0 + 10)], ""),
        ([SEARCH], [Command(T0 + 300 * MS, "search", {}, 0)], "expired"),
        ([SEARCH], [Command(T0 - 10, "search", {}, T0 - 10)], "belongs to no action"),
        ([SEARCH], [Command(T0 + 10, "land", {}, T0 + 10)], "belongs to no action"),
    ],
)
def test_each_command_is_judged_by_its_action(events, commands, said):
    faults = judge(events, commands)
    assert len(faults) == bool(said) and said in "".join(faults), faults


def test_of_many_commands_with_the_same_fault_the_first_is_named():
    (fault,) = judge([ONE], [move(1, 301.5), move(1, 310), move(1, 320)])
    assert fault == "at 0.301 s: move forward_m_s=0.101: the action had expired by 1.5 ms (message: action 1)"


def test_who_went_back_to_an_older_action_has_not_forgotten_the_newer_one():
    faults = judge([ONE, TWO], [move(2, 110), move(1, 120), hold(130), move(2, 140)])
    assert ["older action" in faults[0], "again after a hold" in faults[1]] == [True, True]


HOLD_AT_1 = Due(T0 + 300 * MS, "hold", "expired", begin=1, end=2)


@pytest.mark.parametrize(
    ("due", "commands", "said"),
    [
        (HOLD_AT_1, [move(1, 10), hold(310)], ""),
        (HOLD_AT_1._replace(end=1), [move(1, 10), hold(310)], "no hold (expired); the last command was move"),
        (HOLD_AT_1, [hold(10), hold(310)], ""),
        (HOLD_AT_1._replace(begin=0, end=0), [], ""),  # who never moved need not stop
        (HOLD_AT_1._replace(before_ns=T0 + 200 * MS), [move(1, 10), hold(190)], ""),
        (HOLD_AT_1._replace(before_ns=T0 + 200 * MS), [move(1, 10), hold(310)], "hold came only when"),
        (HOLD_AT_1._replace(ends=("hold", "move")), [hold(1), move(1, 10)], ""),
        (Due(T0, "follow", "why", 0, 1, keys=frozenset({101})), [move(1, 10)], ""),
        (Due(T0, "follow", "why", 1, 2, keys=frozenset({101})), [move(1, 10), hold(11)], "none of the valid actions"),
        (Due(T0, "follow", "why", 0, 0, keys=frozenset({101})), [], "none of the valid actions"),
    ],
)
def test_what_was_due_must_have_come_before_the_script_went_on(due, commands, said):
    faults = judge([ONE, due], commands)
    assert len(faults) == bool(said) and said in "".join(faults), faults
    assert is_done(due, commands) == (not said)


def test_the_delay_of_a_hold_counts_from_when_it_was_due():
    early = Due(T0 + 500 * MS, "hold", "early", begin=3, end=4)
    standing = Due(T0 + 600 * MS, "hold", "it held before", begin=4, end=5)
    commands = [move(1, 10), hold(312), move(2, 400), hold(480), hold(700)]
    assert hold_delays_ms([ONE, HOLD_AT_1, early, standing], commands) == [12.0, 0.0]


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("@12 move forward_m_s=0.101 right_m_s=-1e-3\n", (12, "move", {"forward_m_s": 0.101, "right_m_s": -0.001})),
        ("move forward_m_s=1", (99, "move", {"forward_m_s": 1.0})),
        ("  @7   hold  ", (7, "hold", {})),
        ("waypoint forward_m=2.001 pace=slow", (99, "waypoint", {"forward_m": 2.001, "pace": "slow"})),
        ("move forward_m_s=", (99, "move", {"forward_m_s": ""})),
        ("moved forward_m_s=1", None),
        ("[INFO] hold", None),
        ("hold on, please", None),
        ("@x hold", None),
        ("@99999999999999999999999 hold", None),
        ("", None),
    ],
)
def test_lines_of_a_controller(line, command):
    found = parse_command(line, 99)
    assert found == (None if command is None else Command(*command, 99))
