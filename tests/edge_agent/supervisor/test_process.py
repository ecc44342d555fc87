"""The supervisor's loop with fake workers and a fake clock: every time-out and every failure, without waiting."""

from __future__ import annotations

import pytest

from edge_agent.ipc.events import StartupFailed
from tests.harness.in_process import InProcess, in_process


@pytest.fixture
def running(monkeypatch):
    with in_process(monkeypatch) as one:
        yield one


def kill_model(running: InProcess, seconds_until_restart: float = 10.0) -> None:
    """The model process dies, and its successor is started."""
    running.model.exit_status = -9
    running.turn()
    running.turn(seconds_until_restart)
    assert running.model is not None


# -- the instruction in force is refused after READY ------------------------------------------------------------------


def test_a_model_that_refuses_the_instruction_after_ready_costs_no_exit(running):
    """A new model process can have a smaller context: memory was planned anew. systemd never retries after 78."""
    running.make_ready()
    kill_model(running)
    running.load_model(error="language.context: the instruction has 900 tokens, the limit is 400")
    state, reason = running.state
    assert state == "fault" and "the limit is 400" in reason


def test_a_model_that_cannot_start_after_ready_costs_no_exit(running):
    running.make_ready()
    kill_model(running)
    running.model.emit(StartupFailed(reason="language.context: expected more", configured=True))
    running.turn()
    assert running.state == ("fault", "model: language.context: expected more")


# -- a child that does not die ----------------------------------------------------------------------------------------


def test_a_killed_process_that_stays_in_the_kernel_holds_up_nothing(running):
    running.make_ready()
    stuck = running.model
    stuck.in_kernel = True
    running.turn(11.0)  # longer than watchdog.model_stall_s without an event
    assert stuck.killed and running.state[0] == "stalled"
    running.turn(1.0)
    assert running.model is not stuck  # its successor is started while the old process is still there
    assert f"old process {stuck.pid} is still in the kernel" in running.state[1]
    stuck.exit_status = -9
    running.turn()
    assert "kernel" not in running.state[1]


# -- commands that the model's socket does not take -------------------------------------------------------------------


@pytest.mark.parametrize("op", ["instruct", "ask"])
def test_a_request_that_cannot_be_sent_is_answered_once_and_forgotten(running, op):
    running.make_ready()
    running.model.takes_messages = False
    for n in range(20):
        running.publisher.request(op, "what?", request_id=f"r{n}")
        running.turn()
    replies = running.publisher.replies
    assert len(replies) == 20 and all("takes no commands" in reply.error for reply in replies)
    running.model.takes_messages = True
    for _ in range(9):
        running.turn(9.0)
        running.answer()
    assert len(replies) == 20, "a request was answered a second time"
    running.publisher.request(op, "what?", request_id="last")
    running.turn()
    assert len(replies) == 20 and running.model.commands[-1]


# -- the pause before a restart ---------------------------------------------------------------------------------------


def test_a_model_that_dies_at_its_first_frame_is_restarted_after_growing_pauses(running):
    running.make_ready()
    pauses_s = []
    for _ in range(8):
        running.model.exit_status = -6
        running.turn()
        lost_ns = running.clock()
        while running.model is None:
            running.turn(0.05)
        pauses_s.append((running.clock() - lost_ns) / 1e9)
        running.load_model()
    assert pauses_s == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0], abs=0.051)
