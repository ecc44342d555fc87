"""The pause before the next try: it grows with failures in a row, and only a good period makes it short again."""

from __future__ import annotations

from edge_agent.ipc.backoff import Backoff
from edge_agent.time_units import NS_PER_S


def test_the_pause_doubles_up_to_its_limit():
    backoff = Backoff(first_s=0.5, max_s=5.0)
    assert [backoff.next_pause_s() for _ in range(6)] == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]


def test_a_good_period_starts_again_at_the_first_pause():
    backoff = Backoff(first_s=0.5, max_s=5.0, good_period_s=10.0)
    backoff.next_pause_s()
    for second in range(11):
        backoff.note_success(second * NS_PER_S)
    assert (backoff.failures, backoff.next_pause_s()) == (0, 0.5)


def test_a_good_result_now_and_then_does_not():
    backoff = Backoff(first_s=0.5, max_s=5.0, good_period_s=10.0)
    pauses_s = []
    for n in range(4):
        backoff.note_success(n * 100 * NS_PER_S)
        backoff.note_success(n * 100 * NS_PER_S + 9 * NS_PER_S)
        pauses_s.append(backoff.next_pause_s())
    assert pauses_s == [0.5, 1.0, 2.0, 4.0]


def test_failures_without_end_do_not_overflow():
    backoff = Backoff(first_s=0.5, max_s=5.0)
    assert {backoff.next_pause_s() for _ in range(5000)} == {0.5, 1.0, 2.0, 4.0, 5.0}
