"""A suspend is noticed by two clocks, also by a process that is interrupted between their readings."""

from __future__ import annotations

import pytest

from edge_agent.suspend import MAX_GAIN_NS, MAX_READINGS, SuspendDetector
from edge_agent.time_units import NS_PER_MS, NS_PER_S


class Machine:
    """Two clocks, and the times for which the reading process is interrupted, one before each reading of a clock."""

    def __init__(self) -> None:
        self.now_ns, self.asleep_ns = 1000 * NS_PER_S, 0
        self.interruptions_ms: list[float] = []

    def monotonic(self) -> int:
        self._pass_time()
        return self.now_ns

    def boottime(self) -> int:
        self._pass_time()
        return self.now_ns + self.asleep_ns

    def _pass_time(self) -> None:
        self.now_ns += 1000 + round((self.interruptions_ms.pop(0) if self.interruptions_ms else 0) * NS_PER_MS)


@pytest.fixture
def machine() -> Machine:
    return Machine()


def detector_of(machine: Machine, *interruptions_ms: float) -> SuspendDetector:
    """Made while the process is interrupted so. The numbers are (before, between, after) of each reading."""
    machine.interruptions_ms = list(interruptions_ms)
    detector = SuspendDetector(machine.monotonic, machine.boottime)
    machine.interruptions_ms = []
    return detector


EVERY_READING = (0, 1, 0) * MAX_READINGS


@pytest.mark.parametrize("interrupted_ms", [2, 50, 600, 3_600_000])
@pytest.mark.parametrize("place", [1, 2], ids=["before boottime", "after boottime"])
def test_a_suspend_is_noticed_by_a_detector_whose_every_first_reading_was_interrupted(machine, interrupted_ms, place):
    detector = detector_of(machine, *[interrupted_ms if i % 3 == place else 0 for i in range(3 * MAX_READINGS)])
    machine.asleep_ns += MAX_GAIN_NS + 100_000
    assert detector.resumed_ns() == machine.now_ns


@pytest.mark.parametrize("interrupted_ms", [20, 600])
def test_the_second_suspend_is_noticed_when_the_reading_of_the_first_was_interrupted(machine, interrupted_ms):
    detector = detector_of(machine)
    machine.asleep_ns += NS_PER_S
    machine.interruptions_ms = [interrupted_ms * part for part in EVERY_READING]
    first_ns = detector.resumed_ns()
    assert first_ns > 0
    machine.interruptions_ms = []
    machine.asleep_ns += MAX_GAIN_NS + 100_000
    assert detector.resumed_ns() > first_ns


def test_an_interrupted_reading_is_a_suspend_at_most_once(machine):
    """The safe side: what was made before is out of date. The next undisturbed reading is not a suspend again."""
    detector = detector_of(machine, *[50 * part for part in EVERY_READING])
    for _ in range(3):
        assert detector.resumed_ns() == 0, "the base was read late, but there was no suspend"
    machine.interruptions_ms = [50 * part for part in EVERY_READING]
    noticed_ns = detector.resumed_ns()
    assert noticed_ns > 0
    assert [detector.resumed_ns() for _ in range(3)] == [noticed_ns] * 3


def test_the_shortest_of_the_readings_counts(machine):
    """Four readings of 9 ms and one of 2 ms: the base is 2 ms wrong at most."""
    detector = detector_of(machine, *[0, 9, 0] * 2, 0, 2, 0, *[0, 9, 0] * 2)
    machine.asleep_ns += MAX_GAIN_NS + 100_000
    assert detector.resumed_ns() > 0


def test_without_a_suspend_and_without_interruptions_nothing_is_noticed(machine):
    detector = detector_of(machine)
    for _ in range(1000):
        machine.now_ns += NS_PER_S
        assert detector.resumed_ns() == 0
