"""The steps of an action chunk: each at its time, none after the expiry."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.client import ChunkPlayer, ChunkStep, Client
from edge_agent.suspend import SuspendDetector
from edge_agent.wire.messages import Action
from tests.harness.clock import FakeClock
from tests.harness.fake_daemon import make_action, make_refusal

START_NS = 10**15
MS = 1_000_000


def chunk_of(
    n_steps: int = 4, step_ms: int = 100, valid_ms: int = 500, at_ns: int = START_NS, **changes: Any
) -> Action:
    """An action published at at_ns, whose step k moves forward with k m/s."""
    first, *later = [{"forward_m_s": float(n)} for n in range(n_steps)]
    parts = {"type": "move", "values": first, "chunk": later, "chunk_step_ms": step_ms}
    return make_action(1, now_ns=at_ns, valid_ms=valid_ms, **(parts | changes))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(START_NS)


@pytest.fixture
def player(client: Client, clock: FakeClock) -> ChunkPlayer:
    return ChunkPlayer(client, clock)


def speeds(player: ChunkPlayer, clock: FakeClock, times_ms: list[int]) -> list[float | None]:
    """The speed of the step that is due at each time after START_NS."""
    found: list[float | None] = []
    for time_ms in times_ms:
        clock.now_ns = START_NS + time_ms * MS
        step = player.step()
        found.append(None if step is None else float(step.values["forward_m_s"]))
    return found


def test_without_an_action_there_is_no_step(player):
    assert player.step() is None
    player.take(None)
    assert player.step() is None


def test_every_step_comes_at_its_time_and_the_last_stays_until_the_expiry(player, clock):
    player.take(chunk_of(4, step_ms=100, valid_ms=500))
    times_ms = [0, 99, 100, 199, 200, 300, 399, 400, 499, 500, 501, 499]
    assert speeds(player, clock, times_ms) == [0, 0, 1, 1, 2, 3, 3, 3, 3, None, None, None]


def test_a_step_has_its_index(player, clock):
    player.take(chunk_of())
    clock.advance(0.25)
    assert player.step() == ChunkStep(2, "move", {"forward_m_s": 2.0})


def test_an_action_without_a_chunk_has_one_step(player, clock):
    player.take(make_action(1, now_ns=START_NS, valid_ms=500, type="move", values={"forward_m_s": 7.0}))
    assert speeds(player, clock, [0, 250, 499, 500]) == [7, 7, 7, None]
    player.take(chunk_of(step_ms=0, at_ns=clock.now_ns))  # not from our daemon: a chunk without times
    assert speeds(player, clock, [750]) == [0]


def test_steps_that_would_begin_after_the_expiry_are_not_played(player, clock):
    player.take(chunk_of(16, step_ms=100, valid_ms=250))
    assert speeds(player, clock, [0, 100, 249, 250, 300, 1500]) == [0, 1, 2, None, None, None]


def test_a_chunk_that_arrives_late_begins_with_the_step_that_is_due(player, clock):
    clock.advance(0.22)
    player.take(chunk_of())
    assert player.step().step_index == 2


def test_a_newer_action_replaces_the_rest_at_once(player, clock):
    player.take(chunk_of())
    assert speeds(player, clock, [150]) == [1]
    player.take(make_action(2, now_ns=START_NS + 150 * MS, type="move", values={"forward_m_s": 9.0}))
    assert speeds(player, clock, [150, 300, 649, 650]) == [9, 9, 9, None]


def test_an_older_action_does_not_replace_a_newer_one(player, clock):
    clock.advance(0.1)
    player.take(make_action(2, now_ns=clock.now_ns, type="move", values={"forward_m_s": 9.0}))
    player.take(chunk_of())
    assert player.step().values == {"forward_m_s": 9.0}


def test_a_refusal_means_hold_and_nothing_new_changes_nothing(player, clock):
    player.take(chunk_of())
    player.take(None)
    assert speeds(player, clock, [100]) == [1]
    player.take(make_refusal(2))
    assert player.step() is None


def test_an_action_of_another_clock_is_not_played(player, clock):
    for stamps in ({"t_pub_ns": START_NS + 10**9}, {"valid_until_ns": START_NS + 2 * 10**9}, {"t_pub_ns": 0}):
        player.take(chunk_of(**stamps))
        assert player.step() is None


@settings(deadline=None)
@given(
    n_steps=st.integers(1, 16),
    step_ms=st.integers(0, 2000),
    valid_ms=st.integers(0, 2000),
    times_ms=st.lists(st.integers(-100, 3000)),
)
def test_no_step_is_played_outside_its_time(tmp_path_factory, n_steps, step_ms, valid_ms, times_ms):
    clock = FakeClock(START_NS)
    with Client(str(tmp_path_factory.getbasetemp()), clock) as client:
        player = ChunkPlayer(client, clock)
        player.take(chunk_of(n_steps, step_ms, valid_ms))
        for time_ms in times_ms:
            clock.now_ns = START_NS + time_ms * MS
            step = player.step()
            if step is not None:
                assert -5 <= time_ms < valid_ms <= 1000
                assert step.step_index * step_ms <= max(0, time_ms)


def test_a_suspend_ends_the_action(tmp_path, clock):
    boottime = FakeClock(START_NS)
    with Client(str(tmp_path), clock, SuspendDetector(clock, boottime)) as client:
        player = ChunkPlayer(client, clock)
        player.take(chunk_of())
        clock.advance(0.001)
        boottime.advance(5.001)
        assert player.step() is None
        boottime.advance(-5.0)
        assert player.step() is None
