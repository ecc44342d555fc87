"""What the node reports, from a status and from its counters."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from edge_agent.ros2.diagnostics import ERROR, LEVELS, OK, STALE, WARN, FrameCounters, commands_entry, daemon_entry
from edge_agent.time_units import NS_PER_S
from edge_agent.wire.messages import DaemonState
from tests.harness.clock import FakeClock
from tests.harness.fake_daemon import make_status


@pytest.mark.parametrize("state", get_args(DaemonState))
def test_each_state_has_a_level(state):
    entry = daemon_entry(msgspec.structs.replace(make_status("why"), state=state), 0)
    assert entry.level == max(LEVELS[state], WARN) and entry.message == f"{state}: why"


def test_a_running_daemon():
    entry = daemon_entry(make_status(), 0)
    assert (entry.level, entry.message) == (OK, "running")
    assert entry.values["instruction"] == "Hold position." and entry.values["model_worker.rss_mib"] == "80.0"
    assert entry.values["temperature_c"] == "unknown"


def test_a_pause_shows_in_every_state():
    status = msgspec.structs.replace(make_status(), state="no-frames", paused=True)
    assert daemon_entry(status, 0).message == "no-frames (paused)"


def test_without_a_status_for_a_second_the_daemon_does_not_run():
    assert daemon_entry(None, 0).level == STALE
    assert daemon_entry(make_status(), NS_PER_S).level == OK
    entry = daemon_entry(make_status(), NS_PER_S + 1)
    assert entry.level == STALE and entry.values == {"last_state": "running"}


def test_commands():
    assert commands_entry("", {"expired": 2}, [])[1:] == (OK, "follows the actions", {"expired": "2"})
    assert commands_entry("refusal: late", {}, [])[1:3] == (WARN, "hold: refusal: late")
    assert commands_entry("", {}, ["/cmd_vel: a", "b"])[1:3] == (ERROR, "/cmd_vel: a; b")


def test_frames():
    said: list[str] = []
    clock = FakeClock()
    counters = FrameCounters(said.append, clock)
    assert counters.entry([])[1:3] == (WARN, "no image has come")
    for _ in range(3):
        counters.refuse("zero", "stamp 0")
    assert said == ["image refused (zero): stamp 0"]
    assert counters.entry([])[1:3] == (ERROR, "zero: stamp 0")
    counters.push(was_taken=True)
    assert counters.entry([]) == (
        "frames",
        OK,
        "images are pushed",
        {"pushed": "1", "not_taken": "0", "refused.zero": "3"},
    )
    counters.refuse("zero", "stamp 0")
    assert len(said) == 2, "it was said once, and again after a good image"
    counters.push(was_taken=False)
    assert counters.entry([]).level == WARN and counters.not_taken == 1
    clock.advance(2.1)
    assert counters.entry([])[1:3] == (WARN, "no image has come for 2 s")
    assert counters.entry(["/image: x"])[1:3] == (ERROR, "/image: x")
