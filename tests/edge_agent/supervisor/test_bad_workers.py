"""What a worker process that misbehaves, or a system without resources, costs: that process, never the daemon."""

from __future__ import annotations

import errno
import os

import pytest

from edge_agent.ipc.events import (
    CameraEnded,
    Heartbeat,
    InstructionApplied,
    ModelReady,
    StartupFailed,
    TextDelta,
)
from edge_agent.supervisor.process import MAX_PIECE_CHARS
from tests.harness.in_process import InProcess, proposal_of


@pytest.fixture
def running():
    with InProcess() as supervised:
        yield supervised


@pytest.mark.parametrize(
    "invalid",
    [
        b"\xc1 not msgpack",
        ModelReady(vision="", load_s=float("nan"), warmup_ms=1.0),
        ModelReady(vision="", load_s=1.0, warmup_ms=float("inf")),
        TextDelta(lane="describe", frame_id=1, text="x" * (MAX_PIECE_CHARS + 1)),
        InstructionApplied(instruction_id=0, text="x" * 2001, adapter=""),
    ],
    ids=["bytes", "duration", "infinite", "piece", "instruction"],
)
def test_an_invalid_event_costs_the_model_process_and_not_the_daemon(running, invalid):
    running.make_ready()
    sender = running.model
    running.model.emit(invalid, TextDelta(lane="describe", frame_id=1, text="sent after it"))
    running.turn()
    assert sender.killed and running.state[0] == "fault" and "invalid event" in running.state[1]
    assert running.supervisor.model.faults == {"model: invalid event from the model process": 1}
    assert running.publisher.stream("text") == []


@pytest.mark.parametrize(
    "event",
    [
        ModelReady(vision="x" * 100_000, load_s=1.0, warmup_ms=1.0),
        ModelReady(vision="", load_s=1.0, warmup_ms=1.0, language="x" * 100_000),
        InstructionApplied(instruction_id=0, text="Go.", adapter="x" * 100_000),
        proposal_of(frame_seq=2**63),
        proposal_of(frame_seq=-1),
        proposal_of(frame_id=2**63),
        TextDelta(lane="describe", frame_id=-(2**63), text="x"),
    ],
    ids=lambda event: type(event).__name__,
)
def test_an_event_out_of_bounds_costs_the_model_process_and_not_the_daemon(running, event):
    running.make_ready()
    running.model.emit(event)
    running.turn()
    running.turn(1.0)  # the status is published again
    assert running.state[0] == "fault" and "invalid event" in running.state[1]
    running.turn(60.0)
    assert running.model is not None


def test_a_process_that_the_system_cannot_start_is_tried_again(running):
    running.make_ready()
    launch, running.supervisor.model._launch = running.supervisor.model._launch, no_memory
    running.end_model_process()
    running.turn(60.0)
    assert running.state == ("fault", "model: cannot be started: Cannot allocate memory")
    running.supervisor.model._launch = launch
    running.turn(60.0)
    assert running.model is not None


def no_memory() -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_the_fault_that_a_process_sent_before_its_end_is_the_reason(running):
    """The process reports its fault and ends between two steps of a turn."""

    running.make_ready()
    model, receive = running.model, running.model.receive

    def receive_then_end() -> list[bytes]:
        events = receive()
        model.emit(StartupFailed(reason="out of memory", fault="memory"))
        model.exit_status = 1
        return events

    model.receive = receive_then_end
    running.turn()
    model.receive = receive
    running.turn()
    assert "out of memory" in running.state[1]


def test_a_source_that_ended_while_the_model_was_loading_is_no_missing_camera():
    with InProcess() as running:
        running.open_camera()
        running.camera.emit(CameraEnded())
        running.camera.exit_status = 0
        running.turn(16.0)  # longer than the daemon waits for a camera
        running.load_model()
        assert running.supervisor.status.is_ready
        assert running.state[0] == "no-frames" and "the source has ended" in running.state[1]


def test_a_refusal_is_counted_once(running):
    running.make_ready()
    running.restart_model()
    running.load_model(error="too long")
    faults = sum(running.supervisor.model.faults.values())
    refused = running.model
    for _ in range(40):  # the process refuses for 30 s, and makes progress all the time
        running.model.emit(Heartbeat("idle"))
        running.push_frame()
        running.turn(1.0)
        if running.model is None:
            break
    assert refused.killed and sum(running.supervisor.model.faults.values()) == faults
