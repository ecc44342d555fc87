"""No answer leaves that is late, that is from before a suspend, or that answers a frame a second time."""

from __future__ import annotations

import pytest

from edge_agent.suspend import SuspendDetector
from edge_agent.wire.messages import Action
from tests.harness.clock import FakeClock
from tests.harness.in_process import InProcess


@pytest.fixture
def running():
    with InProcess() as supervised:
        supervised.make_ready()
        yield supervised


def test_no_frame_is_answered_twice(running):
    """A model process that is killed after its answer leaves the frame in the slot, and its successor takes it."""
    running.answer()
    running.restart_model()
    running.load_model()
    answered = running.counters.last_frame_seq
    n_messages = len(running.publisher.stream("actions"))
    for frame_seq in (answered, answered - 1, 0):
        for stop_reason in ("", "late", "cancelled"):
            running.answer(frame_seq=frame_seq, stop_reason=stop_reason)
    assert len(running.publisher.stream("actions")) == n_messages and running.counters.last_frame_seq == answered
    running.answer()
    assert len(running.publisher.stream("actions")) == n_messages + 1


def test_the_age_is_asked_again_at_the_time_of_publication(running, monkeypatch):
    """The supervisor may be stopped between the check and the publication: by a quota, a signal, a suspend."""
    gate, check = running.supervisor.gate, running.supervisor.gate.check

    def stopped_after_the_check(*arguments, **keywords):
        result = check(*arguments, **keywords)
        running.clock.advance(2.5)
        return result

    monkeypatch.setattr(gate, "check", stopped_after_the_check)
    running.answer()
    last = running.publisher.stream("actions")[-1]
    assert (last.reason, round(last.age_ms)) == ("late", 2500)


def test_a_suspend_between_the_check_and_the_publication_is_noticed(running, monkeypatch):
    gate, check = running.supervisor.gate, running.supervisor.gate.check
    boottime = FakeClock()
    boottime.now_ns = running.clock.now_ns
    running.supervisor.suspend = SuspendDetector(running.clock, boottime)

    def slept_after_the_check(*arguments, **keywords):
        result = check(*arguments, **keywords)
        boottime.advance(3600.0)
        for clock in (running.clock, boottime):
            clock.advance(0.001)
        return result

    monkeypatch.setattr(gate, "check", slept_after_the_check)
    running.answer()
    last = running.publisher.stream("actions")[-1]
    assert (last.reason, last.detail) == ("late", "the machine was suspended since the frame was captured")


def test_after_a_suspend_the_frames_from_before_are_refused(running):
    boottime = FakeClock()
    boottime.now_ns = running.clock.now_ns
    running.supervisor.suspend = SuspendDetector(running.clock, boottime)
    captured_ns = running.clock()
    for clock in (running.clock, boottime):
        clock.advance(0.05)
    boottime.advance(3600.0)
    running.answer(t_capture_ns=captured_ns)
    assert running.publisher.stream("actions")[-1].reason == "late"
    running.answer()
    assert isinstance(running.publisher.stream("actions")[-1], Action)
