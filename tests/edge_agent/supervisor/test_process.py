"""The loop with fake workers and a fake clock: what the daemon makes of each event and each failure."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator

import msgspec
import pytest
import yaml

from edge_agent.actions.space import READY_SPACES
from edge_agent.config import LanguageConfig, TaskConfig, WatchdogConfig
from edge_agent.ipc.events import (
    Heartbeat,
    LogLine,
    ModelReady,
    SetInstruction,
    StartupFailed,
    TextDelta,
    TraceSpan,
)
from edge_agent.supervisor.model_worker import MAX_FAILURES_BEFORE_READY
from edge_agent.supervisor.process import MAX_PIECE_CHARS, Supervisor
from edge_agent.supervisor.shutdown import Shutdown
from edge_agent.wire.messages import Action, Refusal, StageTimes
from tests.harness.in_process import InProcess, fake_config


@pytest.fixture
def running():
    with InProcess() as supervised:
        yield supervised


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """The handlers of the test's own process are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def notified(monkeypatch):
    """What is sent to systemd; the unit's watchdog interval is five seconds."""
    lines: list[str] = []
    monkeypatch.setenv("WATCHDOG_USEC", "5000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    for module in ("supervisor.process", "systemd"):
        monkeypatch.setattr(f"edge_agent.{module}.notify", lambda *new: lines.extend(new))
    return lines


# -- one frame --------------------------------------------------------------------------------------------------------


def test_an_answer_becomes_an_action_with_the_ids_and_times_of_its_frame(running):
    running.make_ready()
    captured_ns = running.clock()
    running.answer(stages_ms=StageTimes(queue=1, encode=2, prefill=3, decode=4, check=0))
    action = running.publisher.stream("actions")[-1]
    assert isinstance(action, Action)
    assert (action.frame_id, action.t_capture_ns, action.capture_clock) == (running.frame_id, captured_ns, "driver")
    assert action.type == "move" and action.values["forward_m_s"] == 1.0
    assert action.age_ms == 0 and action.t_pub_ns == captured_ns
    assert action.valid_until_ns == action.t_pub_ns + action.valid_for_ms * 1_000_000
    assert msgspec.structs.astuple(action.stages_ms) == (1, 2, 3, 4, 0)
    assert (action.camera, action.instruction, action.adapter) == ("front", "Hold position.", "")


def test_age_is_from_capture_to_publication(running):
    running.make_ready()
    running.answer(t_capture_ns=running.clock() - 250_000_000)
    assert running.publisher.stream("actions")[-1].age_ms == 250.0


def test_a_refusal_is_published_and_counted_with_its_reason(running):
    running.make_ready()
    running.answer(text="not json", t_capture_ns=running.clock() - 5_000_000)
    refusal = running.publisher.stream("actions")[-1]
    assert isinstance(refusal, Refusal) and refusal.reason == "invalid" and "not JSON" in refusal.detail
    assert (refusal.frame_id, refusal.age_ms) == (running.frame_id, 5.0)
    assert running.counters.refusals == {"invalid": 1} and running.counters.actions == 1


def test_frames_between_two_answers_are_counted_as_dropped(running):
    running.make_ready()
    dropped_before = running.counters.dropped_frames
    for _ in range(3):
        running.push_frame()
    running.answer()
    assert running.publisher.stream("actions")[-1].dropped_frames == 3
    assert running.counters.dropped_frames == dropped_before + 3


def test_a_chunk_goes_out_whole(tmp_path):
    space = yaml.safe_load((READY_SPACES / "velocity_body_action_tokens.yaml").read_text())
    (tmp_path / "chunk.yaml").write_text(yaml.safe_dump(space | {"horizon": 3, "chunk_step_ms": 100}, sort_keys=False))
    step = '"vx":%s,"vy":0,"vz":0,"yaw":0'
    text = '{"action":"move",' + step % 1 + ',"chunk":[{' + step % 9 + "},{" + step % -1 + "}]}"
    config = fake_config(task=TaskConfig(action_space=str(tmp_path / "chunk.yaml")))
    with InProcess(config) as running:
        running.open_camera()
        running.load_model()
        running.answer(text=text)
        action = running.publisher.stream("actions")[-1]
    assert (action.values["forward_m_s"], action.chunk_step_ms) == (1.0, 100)
    assert [values["forward_m_s"] for values in action.chunk] == [2.0, -1.0]
    assert action.clamped == {"chunk.0.forward_m_s": 9.0}


def test_every_event_of_the_model_process_counts_as_progress(running):
    running.make_ready()
    before = running.counters.model_events
    span = TraceSpan(name="encode", thread="vision", start_ns=1, stop_ns=2)
    running.model.emit(Heartbeat("idle"), LogLine("a line"), span)
    running.turn()
    assert running.counters.model_events == before + 3


# -- the start --------------------------------------------------------------------------------------------------------


def test_ready_is_sent_once_when_camera_and_model_work(notified, monkeypatch):
    with InProcess() as running:
        running.load_model()
        assert running.state[0] == "starting" and "READY=1" not in notified
        running.open_camera()
        running.turn()
        assert running.state[0] == "running" and "STATUS=fake 0B" in notified
        running.restart_model()
        running.load_model()
        running.answer()
    assert notified.count("READY=1") == 1


def test_a_model_that_cannot_load_ends_the_start_and_the_status_depends_on_the_cause(running):
    for fault, status in (("instruction", os.EX_CONFIG), ("memory", 1)):
        with InProcess() as starting:
            starting.model.emit(StartupFailed(reason="language.context: too small", fault=fault))
            with pytest.raises(Shutdown, match=r"language\.context: too small") as caught:
                starting.turn()
        assert caught.value.status == status


def test_an_instruction_that_is_refused_at_the_start_is_a_wrong_configuration(running):
    running.open_camera()
    with pytest.raises(Shutdown, match="too long") as caught:
        running.load_model(error="task.instruction: too long")
    assert caught.value.status == os.EX_CONFIG


def test_an_instruction_that_is_refused_for_lack_of_memory_is_tried_again_by_systemd(running):
    """The memory plan made the context smaller; at the next start another program may have ended."""
    running.open_camera()
    running.model.emit(ModelReady(vision="fake", load_s=1.0, warmup_ms=5.0, memory_reduced=True))
    running.turn()
    with pytest.raises(Shutdown, match="does not fit") as caught:
        running.apply_instruction(error="language.context: does not fit")
    assert caught.value.status == 1


def test_a_model_slower_than_the_deadline_is_reported_in_the_log(running, capfd):
    running.model.emit(ModelReady(vision="fake", load_s=1.0, warmup_ms=2500.0))
    running.turn()
    assert "raise task.deadline_ms" in capfd.readouterr().err


def test_the_model_process_gets_the_instruction_the_adapter_and_the_trace_flag(tmp_path):
    language = LanguageConfig(adapters={"night": "night.gguf"}, adapter="night")
    with InProcess(fake_config(language=language)) as running:
        running.load_model()
        commands = [command for command in running.model.commands if isinstance(command, SetInstruction)]
        assert [(c.text, c.adapter) for c in commands] == [("Hold position.", "night")]
        assert (running.model.module, running.model.flags) == ("edge_agent.model", ())
        assert running.camera.module == "edge_agent.camera"


def test_files_that_change_in_flight_never_end_the_daemon(running):
    """A new start of the daemon would find the changed bundle and end with 78: no agent for the rest of the flight."""
    running.make_ready()
    running.end_model_process()
    for _ in range(3 * MAX_FAILURES_BEFORE_READY):
        running.turn(6.0)
        running.push_frame()
        running.model.emit(StartupFailed(reason="vision.onnx: sha256: expected a, found b", fault="bundle"))
        running.turn()
        state, reason = running.state
        assert state == "fault" and "model: cannot start: vision.onnx: sha256" in reason
    running.turn(6.0)
    running.push_frame()
    running.load_model()  # the right files are back
    running.answer()
    assert running.state == ("running", "")


def test_files_that_change_before_ready_are_a_fault_of_the_configuration(running):
    running.model.emit(StartupFailed(reason="vision.onnx: sha256", fault="bundle"))
    with pytest.raises(Shutdown) as ended:
        running.turn()
    assert ended.value.status == os.EX_CONFIG


# -- the instruction in force is refused after READY -------------------------------------------------------------------


def test_a_model_that_refuses_the_instruction_after_ready_costs_no_exit(running):
    """A new model process can have a smaller context: memory was planned anew. systemd never retries after 78."""
    running.make_ready()
    running.restart_model()
    running.load_model(error="language.context: the instruction has 900 tokens, the limit is 400")
    state, reason = running.state
    assert state == "fault" and "the limit is 400" in reason and "send another instruction" in reason
    answered = len(running.publisher.stream("actions"))
    running.answer()
    assert running.publisher.stream("actions")[answered].reason == "stale-instruction"


def test_another_instruction_ends_the_refusal(running):
    running.make_ready()
    running.restart_model()
    running.load_model(error="too long")
    running.publisher.request("instruct", "Land.")
    running.turn()
    command = running.model.commands[-1]
    assert (command.text, command.adapter) == ("Land.", "")  # the new process does not hold the adapter in force
    running.apply_instruction()
    assert running.publisher.replies[-1].result == {"instruction": "Land.", "adapter": ""}
    assert running.state == ("running", "")


def test_an_instruction_that_is_refused_as_well_leaves_the_refusal(running):
    running.make_ready()
    running.restart_model()
    running.load_model(error="too long")
    running.publisher.request("instruct", "Also too long.")
    running.turn()
    running.apply_instruction(error="too long as well")
    assert running.publisher.replies[-1].error == "too long as well" and running.state[0] == "fault"
    running.publisher.request("ask", "what?")
    running.turn()
    assert "the model is not ready" in running.publisher.replies[-1].error


def test_a_refused_model_is_started_again_because_memory_may_be_free_by_then(running):
    running.make_ready()
    running.restart_model()
    running.load_model(error="too long")
    refused = running.model
    for _ in range(31):
        running.model.emit(Heartbeat("idle"))
        running.push_frame()
        running.turn(1.0)
    assert refused.killed and running.state[0] == "fault"
    running.turn(6.0)
    running.load_model()
    running.answer()
    assert running.state == ("running", "")


def test_a_model_that_cannot_start_after_ready_costs_no_exit(running):
    running.make_ready()
    running.restart_model()
    running.model.emit(StartupFailed(reason="language.context: expected more", fault="configuration"))
    running.turn()
    assert running.state == ("fault", "model: cannot start: language.context: expected more")


# -- a child that does not die -----------------------------------------------------------------------------------------


def test_a_killed_process_that_stays_in_the_kernel_holds_up_nothing(running, capfd):
    running.make_ready()
    stuck = running.model
    stuck.in_kernel = True
    running.turn(11.0)  # longer than watchdog.model_stall_s without an event
    assert stuck.killed and running.state[0] == "stalled"
    running.turn(1.1)
    assert running.model is not stuck  # its successor is started while the old process is still there
    assert f"the old process {stuck.pid} is still in the kernel" in running.state[1]
    assert f"model: the old process {stuck.pid} was killed and is still in the kernel" in capfd.readouterr().err
    running.turn(1.1)
    assert "in the kernel" not in capfd.readouterr().err, "the log has one line for each process"
    stuck.exit_status = -9
    running.turn()
    assert "kernel" not in running.state[1]


def test_the_end_waits_for_a_bounded_time_only(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr("edge_agent.supervisor.process.time.sleep", slept.append)
    with InProcess() as running:
        running.make_ready()
        running.model.in_kernel = True
    assert sum(slept) == pytest.approx(2.0)


def test_the_end_waits_no_longer_than_the_children_need(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr("edge_agent.supervisor.process.time.sleep", slept.append)
    with InProcess() as running:
        running.make_ready()
    assert slept == []


# -- the pause before a restart ----------------------------------------------------------------------------------------


def pauses_s(running: InProcess, n: int, good_s: float = 0.0) -> list[float]:
    """The pauses before the restarts of a model that gets ready, answers a frame after good_s, and dies."""
    pauses = []
    for _ in range(n):
        running.end_model_process()
        lost_ns = running.clock()
        while running.model is None:
            running.turn(0.05)
        pauses.append((running.clock() - lost_ns) / 1e9)
        running.load_model()
        running.answer()
        if good_s:
            running.clock.advance(good_s)
            running.answer()
    return pauses


def test_a_model_that_dies_soon_after_it_is_ready_is_restarted_after_growing_pauses(running):
    running.make_ready()
    expected = [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert pauses_s(running, 8) == pytest.approx(expected, abs=0.051)
    assert running.state[0] == "running", "a model that gets ready is restarted for ever"


def test_after_a_good_period_the_pause_is_short_again(running):
    running.make_ready()
    assert pauses_s(running, 4, good_s=10.0) == pytest.approx([0.2] * 4, abs=0.051)


def test_a_model_that_never_gets_ready_again_ends_the_daemon_with_1(running):
    """systemd then starts everything anew."""
    running.make_ready()
    running.restart_model()  # this process was ready, and does not count
    for _ in range(5):
        running.restart_model()
    with pytest.raises(Shutdown, match=r"SIGABRT; 6 model processes in a row did not get ready") as caught:
        running.end_model_process()
    assert caught.value.status == 1


def test_an_event_with_stage_times_that_are_not_finite_is_invalid(running):
    running.make_ready()
    running.answer(stages_ms=StageTimes(queue=float("nan"), encode=0, prefill=0, decode=0, check=0))
    assert "a stage time is not finite" in running.state[1] and running.counters.actions == 1


def test_the_largest_piece_of_text_can_be_published(running):
    running.make_ready()
    running.model.emit(TextDelta(lane="describe", frame_id=1, text="\U0001f6d1" * MAX_PIECE_CHARS))
    running.turn()
    assert len(running.publisher.stream("text")[-1].text) == MAX_PIECE_CHARS


def test_nothing_is_published_while_there_is_no_model(running):
    running.make_ready()
    n_answers = len(running.publisher.stream("actions"))
    running.end_model_process()
    for _ in range(20):
        running.push_frame()
        running.turn(0.005)
    assert len(running.publisher.stream("actions")) == n_answers
    assert running.state == ("fault", "model: killed by SIGABRT")


def test_a_model_that_hangs_is_stalled_and_started_again(running):
    running.make_ready()
    hung = running.model
    running.turn(9.9)
    assert not hung.killed
    running.turn(0.2)
    assert hung.killed and running.state == ("stalled", "model: stalled: no progress in 10 s")
    running.turn(0.3)
    assert running.model is not None and running.state[0] == "stalled", "until the new process is ready"


def test_a_model_that_loads_too_long_is_stalled(running):
    running.make_ready()
    running.restart_model()
    loading = running.model
    running.turn(119.0)
    assert not loading.killed
    running.turn(2.0)
    assert loading.killed and running.state == ("stalled", "model: stalled: no progress in 120 s")


def test_a_loaded_model_that_takes_no_commands_is_restarted(running):
    running.make_ready()
    running.restart_model()
    running.model.takes_messages = False
    running.load_model()
    assert running.state == ("fault", "model: takes no commands")


def test_a_socket_that_is_closed_is_not_polled_any_more(running):
    """The exit status follows; until then the closed socket would wake the loop without a pause."""
    running.make_ready()

    def polled() -> set[int]:
        return set(running.supervisor._waiting_for()[0]) - set(running.publisher.filenos())

    assert polled() == {running.model.socket.fileno(), running.camera.socket.fileno()}
    running.model.hung_up = True
    assert polled() == {running.camera.socket.fileno()} and running.supervisor._waiting_for()[1] < 50
    running.restart_model()
    assert polled() == {running.model.socket.fileno(), running.camera.socket.fileno()}


# -- systemd ----------------------------------------------------------------------------------------------------------


def test_the_watchdog_is_fed_by_events_of_the_model_only(notified):
    with InProcess() as running:
        running.make_ready()
        running.turn(2.0)
        fed = notified.count("WATCHDOG=1")
        for _ in range(8):
            running.push_frame()
            running.turn(1.0)
        assert notified.count("WATCHDOG=1") == fed, "fed without progress of the model"
        running.answer()
        assert notified.count("WATCHDOG=1") == fed + 1


def test_the_watchdog_waits_longer_while_a_model_loads(notified):
    config = fake_config(watchdog=WatchdogConfig(model_load_s=90.0))
    with InProcess(config) as running:
        running.make_ready()
        running.end_model_process()
        intervals = [line for line in notified if line.startswith("WATCHDOG_USEC")]
        assert intervals == ["WATCHDOG_USEC=15000000", "WATCHDOG_USEC=95000000"]  # 10 s and 90 s, with the margin


def test_the_watchdog_of_a_slow_model_waits_for_its_frames(notified):
    with InProcess() as running:
        running.model.emit(ModelReady(vision="fake", load_s=1.0, warmup_ms=4000.0))
        running.turn()
        running.apply_instruction()
        assert "WATCHDOG_USEC=17000000" in notified  # three warm-up frames, with the margin


# -- run() ------------------------------------------------------------------------------------------------------------


def stop_after(supervisor: Supervisor, n_turns: int, monkeypatch) -> None:
    turns = itertools.count(1)
    poll_once = supervisor.poll_once

    def poll_and_stop() -> None:
        poll_once()
        if next(turns) >= n_turns:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(supervisor, "poll_once", poll_and_stop)


def test_sigterm_ends_the_loop_with_0_and_a_last_status(running, notified, signal_handlers, monkeypatch):
    monkeypatch.setattr(running.supervisor, "start", lambda: None)  # they are started already
    stop_after(running.supervisor, 3, monkeypatch)
    closed = []
    monkeypatch.setattr(running.supervisor, "close", lambda: closed.append(True))
    assert running.supervisor.run() == 0
    monkeypatch.undo()
    assert closed and "STOPPING=1" in notified
    assert running.publisher.stream("status")[-1].state == "stopping"


def test_a_shutdown_is_the_reason_of_the_last_status(running, notified, signal_handlers, monkeypatch, capfd):
    monkeypatch.setattr(running.supervisor, "start", lambda: None)
    monkeypatch.setattr(running.supervisor, "close", lambda: None)
    running.model.emit(StartupFailed(reason="bundle: damaged", fault="machine"))
    assert running.supervisor.run() == 1
    monkeypatch.undo()
    last = running.publisher.stream("status")[-1]
    assert (last.state, last.reason) == ("stopping", "bundle: damaged")
    assert "edge-agent: bundle: damaged" in capfd.readouterr().err


def test_a_shutdown_refuses_the_requests_that_wait(running, notified, signal_handlers, monkeypatch):
    running.make_ready()
    running.publisher.request("ask", "what?", "q")
    running.turn()
    monkeypatch.setattr(running.supervisor, "start", lambda: None)
    monkeypatch.setattr(running.supervisor, "close", lambda: None)
    stop_after(running.supervisor, 1, monkeypatch)
    assert running.supervisor.run() == 0
    monkeypatch.undo()
    last = running.publisher.replies[-1]
    assert (last.id, last.ok) == ("q", False) and "the daemon was stopped" in last.error
