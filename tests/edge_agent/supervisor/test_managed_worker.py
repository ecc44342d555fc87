"""One worker over its restarts, with a fake process and a fake clock."""

from __future__ import annotations

import os
import signal

import pytest

from edge_agent.config import WatchdogConfig
from edge_agent.ipc.events import Heartbeat, SetPaused
from edge_agent.supervisor.managed_worker import ManagedWorker, Readiness, Reason, ReasonKind, describe_exit
from edge_agent.supervisor.model_worker import ModelWorker
from edge_agent.supervisor.shutdown import Shutdown
from edge_agent.wire.codec import encode
from tests.harness.clock import FakeClock
from tests.harness.in_process import FakeWorker

FAILED = Reason("model", ReasonKind.FAILED, "ended with status 3")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def managed(clock):
    worker = ManagedWorker("model", FakeWorker, clock)
    yield worker
    worker.end(FAILED)


def test_before_its_start_there_is_no_process(managed):
    managed.start_if_due()
    assert managed.readiness is Readiness.STARTING and managed.is_gone
    assert managed.reason.text == "model: starting"
    assert managed.receive() == [] and not managed.send(b"") and managed.exit_reason() is None
    status = managed.status()
    assert (status.alive, status.pid, status.restarts, status.rss_mib) == (False, None, 0, None)


def test_a_start_launches_a_process(managed):
    managed.start()
    assert managed.readiness is Readiness.STARTING and managed.status().pid == managed.worker.pid
    managed.worker.emit(Heartbeat("weights"))
    assert managed.receive() == [encode(Heartbeat("weights"))]
    assert managed.send(encode(SetPaused(True))) and managed.worker.commands == [SetPaused(True)]


def test_resident_memory_is_of_the_process(managed):
    managed.start()
    managed.worker.pid = os.getpid()
    assert managed.status().rss_mib > 1


def test_a_fault_kills_the_process_and_the_next_one_starts_after_the_pause(managed, clock):
    managed.start()
    first = managed.worker
    managed.mark_ready()
    assert managed.reason is None
    managed.restart_after_fault(FAILED)
    assert first.killed and managed.readiness is Readiness.RESTARTING and managed.reason is FAILED
    assert managed.faults == {"model: ended with status 3": 1}
    clock.advance(0.19)
    managed.start_if_due()
    assert managed.worker is None
    clock.advance(0.01)
    managed.start_if_due()
    assert managed.worker is not first and managed.status().restarts == 1
    managed.start_if_due()
    assert managed.status().restarts == 1, "one process at a time"
    assert managed.reason is FAILED, "the reason stays until the new process is ready"


def test_restart_later_counts_no_fault(managed):
    managed.start()
    managed.restart_later(FAILED)
    assert managed.faults == {} and managed.failures_before_ready == 1


def test_an_ended_worker_is_not_started_again(managed, clock):
    managed.start()
    managed.end(Reason("camera", ReasonKind.ENDED, "the source has ended"))
    clock.advance(1000.0)
    managed.start_if_due()
    assert managed.worker is None and managed.readiness is Readiness.ENDED


def test_failures_before_ready_end_with_the_first_ready(managed):
    for expected in (1, 2, 3):
        managed.start()
        managed.restart_after_fault(FAILED)
        assert managed.failures_before_ready == expected
    managed.start()
    managed.mark_ready()
    assert managed.failures_before_ready == 0


def test_the_time_without_progress_begins_at_the_last_sign_of_progress(managed, clock):
    assert not managed.has_no_progress_for(0.0)
    managed.start()
    clock.advance(5.0)
    assert managed.has_no_progress_for(4.9) and not managed.has_no_progress_for(5.0)
    managed.note_progress()
    assert not managed.has_no_progress_for(4.9)


def test_a_process_that_does_not_die_stays_on_the_list_until_it_is_gone(managed, clock, capfd):
    managed.start()
    stuck = managed.worker
    stuck.in_kernel = True
    managed.restart_after_fault(FAILED)
    assert not managed.is_gone
    assert managed.full_reason().text == (
        f"model: ended with status 3: the old process {stuck.pid} is still in the kernel"
    )
    managed.reason = Reason("model", ReasonKind.STALLED, "stalled", "no progress in 10 s")
    assert managed.full_reason().text == (
        f"model: stalled: no progress in 10 s; the old process {stuck.pid} is still in the kernel"
    )
    for _ in range(3):
        clock.advance(0.6)
        managed.reap()
    assert capfd.readouterr().err.count("is still in the kernel") == 1
    stuck.exit_status = -9
    managed.reap()
    assert managed.is_gone and managed.full_reason() is managed.reason


def test_the_exit_reason_is_made_from_the_exit_status(managed):
    managed.start()
    assert managed.exit_reason() is None
    managed.worker.exit_status = -signal.SIGSEGV
    assert managed.exit_reason().text == "model: killed by SIGSEGV"
    assert describe_exit(3) == "ended with status 3" and describe_exit(0) == "ended with status 0"
    assert describe_exit(-1000) == "ended with status -1000"


DYING_WORDS = {
    b"Traceback ...\nImportError: libcudnn.so.9: no such file\n": "ImportError: libcudnn.so.9: no such file",
    b"GGML_ASSERT(n > 0) failed": "GGML_ASSERT(n > 0) failed",
    b"two \x1b[31mred\x1b[0m\r\n\n  \n": "two \\x1b[31mred\\x1b[0m",
    b"x" * 5000 + b"\n": "x" * 500,
    b"\xff\xfe": "\ufffd\ufffd",
}


@pytest.mark.parametrize(("written", "detail"), DYING_WORDS.items(), ids=range(len(DYING_WORDS)))
def test_the_last_line_of_a_process_is_part_of_the_reason(managed, written, detail):
    managed.start()
    managed.worker.stderr, managed.worker.exit_status = written, 1
    reason = managed.exit_reason()
    assert (reason.key, reason.detail) == ("model: ended with status 1", detail)


def test_a_line_of_long_ago_and_of_another_process_is_no_reason(managed, clock):
    managed.start()
    managed.worker.stderr = b"a warning\n"
    managed.forward_stderr()
    clock.advance(10.1)
    managed.worker.exit_status = 1
    assert managed.exit_reason().detail == ""
    managed.worker.stderr = b"last words"
    managed.restart_after_fault(managed.exit_reason())
    managed.start()
    managed.worker.exit_status = 2
    assert managed.exit_reason().text == "model: ended with status 2"


def test_lines_of_a_process_go_to_the_log_with_a_limit_and_a_count(managed, clock, capfd):
    managed.start()
    for _ in range(3):  # three seconds, each with several turns
        for turn in range(4):
            managed.worker.stderr = b"Corrupt JPEG data\n" * 100 + b"half a "
            managed.forward_stderr()
            managed.worker.stderr = b"line %d\n" % turn
            managed.forward_stderr()
        clock.advance(1.0)
    managed.forward_stderr()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 * (20 + 1)
    assert lines[0] == "model: Corrupt JPEG data" and lines[20] == "model: 384 more lines are not shown"


def test_a_line_without_an_end_is_not_collected(managed, capfd):
    managed.start()
    for _ in range(1000):
        managed.worker.stderr = b"x" * 1000
        managed.forward_stderr()
    assert len(managed._log._rest) <= 501
    managed.worker.stderr = b"\nthe next\n"
    managed.forward_stderr()
    assert capfd.readouterr().err.splitlines() == ["model: " + "x" * 500, "model: the next"]


def test_the_key_of_a_reason_omits_the_detail_and_its_text_has_it():
    reason = Reason("camera", ReasonKind.NO_FRAME, "no frame", "for 4 s")
    assert (reason.key, reason.text) == ("camera: no frame", "camera: no frame: for 4 s")
    assert Reason("", ReasonKind.PAUSED, "by control").text == "by control"


# -- the model process ------------------------------------------------------------------------------------------------


@pytest.fixture
def model(clock):
    worker = ModelWorker(WatchdogConfig(model_stall_s=10.0, model_load_s=120.0), FakeWorker, clock)
    worker.start()
    yield worker
    worker.end(FAILED)


def test_the_stall_limit_is_longer_while_it_loads_and_for_a_slow_model(model):
    assert model.stall_s == 120.0 and not model.is_loaded
    model.mark_ready()
    assert model.stall_s == 10.0 and model.is_loaded
    model.note_warmup(4.0)
    assert model.stall_s == 12.0


@pytest.mark.parametrize(
    ("warmup_s", "frames_s", "expected_s"),
    [
        (60.0, [0.2], 10.0),
        (60.0, [5.0], 15.0),
        (60.0, [5.0] + [0.2] * 15, 15.0),
        (60.0, [5.0] + [0.2] * 16, 10.0),
        (4.0, [0.2] * 20 + [9.0], 12.0),
        (4.0, [], 12.0),
        (0.1, [9.0] * 20, 10.0),
    ],
    ids=["slow warm-up", "slow board", "one of 16", "long ago", "one slow frame", "no frame", "quick warm-up"],
)
def test_one_slow_frame_does_not_raise_the_stall_limit_for_good(model, warmup_s, frames_s, expected_s):
    model.mark_ready()
    model.note_warmup(warmup_s)
    changes = [model.note_frame(seconds) for seconds in frames_s]
    assert model.stall_s == expected_s
    assert any(changes) == (any(max(10.0, 3 * warmup_s) != max(10.0, 3 * min(warmup_s, s)) for s in frames_s))


def test_a_new_process_is_judged_by_its_own_frames(model):
    model.mark_ready()
    model.note_warmup(60.0)
    model.note_frame(0.2)
    model.note_warmup(60.0)
    assert model.stall_s == 180.0


def test_a_silent_model_is_stalled(model, clock):
    model.mark_ready()
    clock.advance(10.0)
    assert model.timeout_reason() is None
    clock.advance(0.1)
    assert model.timeout_reason().kind is ReasonKind.STALLED


def test_a_model_that_refuses_the_instruction_is_restarted_after_30_s(model, clock):
    model.mark_refused("too long")
    assert model.readiness is Readiness.REFUSED and model.is_loaded and model.failures_before_ready == 0
    for _ in range(30):
        clock.advance(1.0)
        model.note_progress()
        assert model.timeout_reason() is None
    clock.advance(0.1)
    assert model.timeout_reason() is model.reason and model.reason.kind is ReasonKind.REFUSED


def test_six_failures_before_ready_end_the_daemon(model, clock):
    for _ in range(5):
        model.restart_after_fault(FAILED)
        model.shut_down_after_failures()
        clock.advance(6.0)
        model.start_if_due()
    model.restart_after_fault(FAILED)
    with pytest.raises(Shutdown, match="model: ended with status 3; 6 model processes in a row") as caught:
        model.shut_down_after_failures()
    assert caught.value.status == 1
