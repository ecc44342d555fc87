"""The daemon's state, when status is published, and what it counts."""

from __future__ import annotations

import pytest

from tests.harness.in_process import InProcess


@pytest.fixture
def running():
    with InProcess() as supervised:
        supervised.make_ready()
        yield supervised


def n_published(running: InProcess) -> int:
    return len(running.publisher.stream("status"))


def test_the_reason_at_the_start_is_the_process_that_is_not_ready():
    with InProcess() as starting:
        assert starting.state == ("starting", "model: starting")
        starting.load_model()
        assert starting.state == ("starting", "camera: starting")
        starting.supervisor.status.is_stopping = True
        assert starting.state == ("stopping", "")


def test_a_missing_model_is_reported_before_everything_else(running):
    running.publisher.request("pause")
    running.turn()
    assert running.state[0] == "paused"
    running.end_model_process()
    assert running.state[0] == "fault"


def test_status_is_published_five_times_a_second(running):
    running.turn(1.0)
    before = n_published(running)
    for _ in range(100):
        running.push_frame()
        running.supervisor.model.note_progress()
        running.turn(0.01)
    assert n_published(running) - before == 5


def test_while_frames_are_answered_the_status_comes_right_after_an_answer(running):
    """Then the next answer does not wait for it: a status takes longer than the check of an answer."""
    beside_an_answer, alone = 0, 0
    for _ in range(25):
        before = n_published(running)
        running.answer()
        beside_an_answer += n_published(running) - before
        for _ in range(4):
            before = n_published(running)
            running.turn(0.01)
            alone += n_published(running) - before
    assert alone == 0 and 5 <= beside_an_answer <= 7, "in a second"


def test_a_change_and_a_new_subscriber_are_published_at_once(running):
    running.turn(1.0)
    before = n_published(running)
    running.turn()
    assert n_published(running) == before
    running.publisher.new_subscriber = True
    running.turn()
    assert n_published(running) == before + 1
    running.publisher.request("pause")
    running.turn()
    assert n_published(running) == before + 2


def test_a_change_is_one_line_in_the_log(running, capfd):
    running.publisher.request("pause")
    running.turn()
    running.turn(1.0)
    assert capfd.readouterr().err.count("state paused: by control") == 1


def test_a_reason_whose_number_grows_is_not_a_change(running, capfd):
    for _ in range(8):
        running.supervisor.model.note_progress()
        running.turn(1.0)
    assert running.publisher.stream("status")[-1].reason == "camera: no frame: for 8 s"
    assert capfd.readouterr().err.count("state no-frames") == 1


def test_status_has_the_counters_and_the_ages(running):
    running.push_frame()
    running.answer(text="not json")
    running.turn(0.5)
    status = running.publisher.stream("status")[-1]
    assert (status.state, status.reason, status.camera, status.uptime_s) == ("running", "", "front", 0.5)
    assert (status.frames, status.frames_dropped, status.actions) == (4, 2, 1)
    assert (status.refusals, status.faults) == ({"invalid": 1}, {})
    assert (status.last_frame_age_ms, status.last_action_age_ms) == (500.0, 500.0)
    assert (status.instruction, status.adapter) == ("Hold position.", "")
    assert (status.vision_backend, status.language_backend) == ("fake", "fake too")
    assert status.camera_worker.alive and status.model_worker.pid == running.model.pid
    assert status.mem_available_mib is None or status.mem_available_mib > 0


def information_age(running: InProcess) -> float | None:
    running.turn(0.2)
    return running.publisher.stream("status")[-1].information_age_ms


def wait(running: InProcess, seconds: float) -> None:
    """The processes are well, and no action is published."""
    for _ in range(round(seconds)):
        running.push_frame()
        running.supervisor.model.note_progress()
        running.turn(1.0)


def answer_after(running: InProcess, seconds: float, age_ms: float) -> None:
    running.push_frame()
    captured_ns = running.clock()
    running.clock.advance(age_ms / 1000)
    running.answer(t_capture_ns=captured_ns)
    running.clock.advance(seconds - age_ms / 1000)


def test_the_mean_age_of_information_is_age_and_half_the_time_to_the_next_action(running):
    assert information_age(running) is None, "there was one action"
    wait(running, 31.0)  # the action at the start is forgotten
    for _ in range(5):
        answer_after(running, 0.1, age_ms=40.0)
    assert information_age(running) == pytest.approx(40 + 50)
    for _ in range(300):
        answer_after(running, 0.1, age_ms=20.0)
    assert information_age(running) == pytest.approx(20 + 50), "the last 30 s count"
    wait(running, 31.0)
    assert information_age(running) is None


def test_a_refusal_makes_the_time_to_the_next_action_longer(running):
    wait(running, 31.0)  # the action at the start is forgotten
    for _ in range(6):
        answer_after(running, 0.1, age_ms=40.0)
        running.answer(text="not json")
        running.clock.advance(0.1)
    assert information_age(running) == pytest.approx(40 + 100)


def test_a_pause_is_no_time_to_the_next_action(running):
    wait(running, 31.0)  # the action at the start is forgotten
    for _ in range(3):
        answer_after(running, 0.1, age_ms=40.0)
    running.publisher.request("pause")
    assert information_age(running) is None
    wait(running, 5.0)
    running.publisher.request("resume")
    running.turn()
    for _ in range(3):
        answer_after(running, 0.1, age_ms=40.0)
    assert information_age(running) == pytest.approx(40 + 50)


def test_before_the_first_frame_the_ages_are_unknown():
    with InProcess() as starting:
        starting.turn()
        status = starting.publisher.stream("status")[-1]
    assert (status.last_frame_age_ms, status.last_action_age_ms) == (None, None)


def test_the_age_of_a_frame_counts_from_its_capture(running):
    slot = running.supervisor.slot
    slot.write(4, 6)
    slot.publish(9, running.clock() - 300_000_000, "driver")  # the driver needed 300 ms
    running.turn(0.2)
    assert running.publisher.stream("status")[-1].last_frame_age_ms == 500.0


REFUSED = {
    "late": {"t_capture_ns": 1},
    "invalid": {"text": "not json"},
    "truncated": {"stop_reason": "length"},
    "not-finite": {"stop_reason": "not-finite"},
    "no-state": {"stop_reason": "no-state"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_model_whose_every_answer_is_refused_has_a_reason(running, reason, capfd):
    for _ in range(10):
        running.answer(**REFUSED[reason])
        running.turn(0.3)
    expected = f"model: every answer is refused: for 3 s, the last one: {reason}"
    assert running.state == ("running", expected)
    assert running.publisher.stream("status")[-1].reason == expected
    running.answer()
    assert running.state == ("running", "")
    assert capfd.readouterr().err.count("state running: model: every answer is refused") == 1


def test_some_refusals_and_those_that_follow_from_a_request_are_no_reason(running):
    for refused in [{"text": "not json"}] * 3 + [{"instruction_id": 99}] * 20 + [{}]:
        running.answer(**refused)
        running.turn(0.3)
        assert running.state == ("running", "")
    running.answer(text="not json")
    running.restart_model()
    running.load_model()
    running.answer(text="not json")
    assert running.state == ("running", "")


def test_faults_of_both_workers_are_counted_by_their_reason(running):
    running.camera.exit_status = 3
    running.end_model_process()
    running.turn(1.0)
    expected = {"camera: ended with status 3": 1, "model: killed by SIGABRT": 1}
    assert running.publisher.stream("status")[-1].faults == expected


def test_a_reason_of_any_length_can_be_published(running):
    running.restart_model()
    running.load_model(error="x" * 100_000)
    assert len(running.publisher.stream("status")[-1].reason) == 1000
