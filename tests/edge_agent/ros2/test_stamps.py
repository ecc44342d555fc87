"""Stamps of ROS -> CLOCK_MONOTONIC, or a refusal: never an image that looks younger than it is."""

from __future__ import annotations

import pytest

from edge_agent.ros2.stamps import STAMP_REASONS, Clocks, StampReader, StampRefused, read_clocks, to_ros_ns
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from tests.harness.clock import FakeClock

NOW_S = 1_800_000_000  # system time
MONOTONIC_NS = 5 * 10**12


def system(later_s: float = 0, set_by_s: float = 0) -> Clocks:
    later_ns = round(later_s * NS_PER_S)
    return Clocks(NOW_S * NS_PER_S + later_ns + round(set_by_s * NS_PER_S), MONOTONIC_NS + later_ns)


def simulated(ros_s: float, later_s: float = 0) -> Clocks:
    return Clocks(round(ros_s * NS_PER_S), MONOTONIC_NS + round(later_s * NS_PER_S), is_simulated=True)


def read(reader: StampReader, stamp_s: float, clocks: Clocks) -> int:
    ns = round(stamp_s * 1000) * NS_PER_MS
    return reader.captured_ns(ns // NS_PER_S, ns % NS_PER_S, clocks)


def reason(reader: StampReader, stamp_s: float, clocks: Clocks) -> str:
    with pytest.raises(StampRefused) as refused:
        read(reader, stamp_s, clocks)
    assert refused.value.reason in STAMP_REASONS and str(refused.value)
    return refused.value.reason


@pytest.mark.parametrize("age_ms", [0, 40, 1000])
def test_the_age_by_the_nodes_clock_is_the_age_by_clock_monotonic(age_ms):
    found = read(StampReader(), NOW_S - age_ms / 1000, system())
    assert found == MONOTONIC_NS - age_ms * NS_PER_MS


def test_a_stamp_up_to_5_ms_ahead_is_now():
    assert read(StampReader(), NOW_S + 0.005, system()) == MONOTONIC_NS


@pytest.mark.parametrize(
    ("stamp_s", "expected"),
    [
        (0, "zero"),
        (-1, "invalid"),
        (12.5, "wrong-clock"),  # a simulator's
        (NOW_S + 0.006, "future"),
        (NOW_S + 10**7, "future"),
        (NOW_S - 1.001, "old"),
        (NOW_S - 10**7, "old"),
    ],
)
def test_a_stamp_that_says_nothing_is_refused(stamp_s, expected):
    assert reason(StampReader(), stamp_s, system()) == expected


@pytest.mark.parametrize(("seconds", "nanoseconds"), [(NOW_S, 10**9), (NOW_S, 2**32 - 1), (-(2**31), 5)])
def test_an_impossible_stamp_is_refused(seconds, nanoseconds):
    with pytest.raises(StampRefused, match="expected 0 to 999999999"):
        StampReader().captured_ns(seconds, nanoseconds, system())


def test_images_out_of_order_are_dropped():
    reader = StampReader()
    read(reader, NOW_S, system(0.01))
    assert reason(reader, NOW_S, system(0.02)) == "order"
    assert reason(reader, NOW_S - 0.03, system(0.02)) == "order"
    assert read(reader, NOW_S + 0.02, system(0.03)) == MONOTONIC_NS + 20 * NS_PER_MS


@pytest.mark.parametrize("set_by_s", [-3600, -0.5, 0.5, 3600])
def test_after_the_system_clock_was_set_the_age_is_unknown_for_a_second(set_by_s):
    """An image from before, by a clock that was set back by 0.5 s, would look 0.5 s too young."""
    reader = StampReader()
    read(reader, NOW_S, system())
    assert reason(reader, NOW_S + 0.1 + set_by_s, system(0.1, set_by_s)) == "clock-set"
    assert reason(reader, NOW_S + 1.0 + set_by_s, system(1.05, set_by_s)) == "clock-set"
    found = read(reader, NOW_S + 1.2 + set_by_s, system(1.25, set_by_s))
    assert found == MONOTONIC_NS + 1200 * NS_PER_MS


def test_a_clock_that_ntp_slows_was_not_set():
    reader = StampReader()
    for i in range(100):
        clocks = system(i * 100, set_by_s=-i * 0.05)  # 500 ppm
        read(reader, clocks.ros_ns / NS_PER_S - 0.05, clocks)


def test_simulated_time():
    reader = StampReader()
    assert reason(reader, 3.0, simulated(0)) == "no-clock"
    assert read(reader, 3.0, simulated(3.05, later_s=1)) == MONOTONIC_NS + NS_PER_S - 50 * NS_PER_MS
    assert read(reader, 3.1, simulated(3.05, later_s=1.1)) == MONOTONIC_NS + 1100 * NS_PER_MS  # before its /clock
    assert reason(reader, 3.2, simulated(3.05, later_s=1.2)) == "future"
    assert reason(reader, 3.1, simulated(4.2, later_s=1.2)) == "old"
    assert reason(reader, 0, simulated(4.2, later_s=1.3)) == "zero"
    assert reason(reader, NOW_S, simulated(4.2, later_s=1.3)) == "wrong-clock"  # a camera with system time


def test_a_simulation_that_begins_anew():
    reader = StampReader()
    read(reader, 99.0, simulated(99.0))
    assert read(reader, 0.5, simulated(0.5, later_s=2)) == MONOTONIC_NS + 2 * NS_PER_S


def test_to_ros_ns_turns_it_round():
    assert to_ros_ns(MONOTONIC_NS - 40 * NS_PER_MS, system()) == NOW_S * NS_PER_S - 40 * NS_PER_MS
    assert to_ros_ns(MONOTONIC_NS - 9 * NS_PER_S, simulated(3)) == 0


def test_the_clocks_are_read_again_after_an_interruption():
    """100 ms pass between the first two readings: the second pair counts."""
    steps = iter([0.0, 0.1, 0.1, 0.0, 0.0, 0.0])
    monotonic = FakeClock(on_read=lambda clock: clock.advance(next(steps, 0)))
    start_ns = monotonic.now_ns
    clocks = read_clocks(lambda: monotonic.now_ns + 7, False, monotonic)
    assert clocks == Clocks(start_ns + 200 * NS_PER_MS + 7, start_ns + 200 * NS_PER_MS, False)
