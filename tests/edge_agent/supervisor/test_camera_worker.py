"""The camera process as the supervisor sees it: its faults, its end, and a process that hangs."""

from __future__ import annotations

import os

import pytest

from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraEnded, CameraFault, CameraOpened
from edge_agent.supervisor.managed_worker import Readiness
from edge_agent.supervisor.shutdown import Shutdown
from tests.harness.in_process import InProcess, fake_config

ABSENT = CameraFault("absent", "/dev/video0: no such device")


@pytest.fixture
def running():
    with InProcess() as supervised:
        yield supervised


def with_camera(**changes) -> InProcess:
    return InProcess(fake_config(camera=CameraConfig(**({"source": "zmq:ipc:///none"} | changes))))


def turn_with_model(running: InProcess, seconds: float) -> None:
    """Time passes, and the model process keeps working."""
    step_s = seconds / 20
    for _ in range(20):
        running.supervisor.model.note_progress()
        running.turn(step_s)


# -- before READY -----------------------------------------------------------------------------------------------------


def test_a_source_that_can_never_work_ends_the_start_with_78(running):
    running.camera.emit(CameraFault("absent", "none.mp4: no such file"))
    running.camera.exit_status = os.EX_CONFIG
    with pytest.raises(Shutdown, match=r"^camera\.source: absent: none\.mp4: no such file$") as caught:
        running.turn()
    assert caught.value.status == os.EX_CONFIG


def test_a_camera_that_does_not_appear_ends_the_start_with_69(running):
    """systemd starts the daemon again: a camera that is plugged in later is found."""
    for _ in range(15):
        running.camera.emit(ABSENT)
        running.turn(1.0)
    assert running.state[0] == "starting"
    running.clock.advance(0.1)
    with pytest.raises(Shutdown, match=r"absent: /dev/video0: no such device; connect the camera") as caught:
        running.turn()
    assert caught.value.status == os.EX_UNAVAILABLE


def test_a_camera_without_a_fault_that_never_opens_ends_the_start_too(running):
    turn_with_model(running, 15.0)
    running.clock.advance(0.1)
    with pytest.raises(Shutdown, match=r"camera\.source: stalled: no frame and no event in 11 s; connect") as caught:
        running.turn()
    assert caught.value.status == os.EX_UNAVAILABLE


def test_a_camera_that_was_opened_waits_for_a_model_that_loads_longer(running):
    running.open_camera()
    for _ in range(60):
        running.push_frame()
        turn_with_model(running, 1.0)
    assert running.state == ("starting", "model: starting")


def test_a_frame_before_the_camera_is_reported_open_does_not_make_it_ready(running):
    running.push_frame()
    running.turn()
    assert running.supervisor.camera.readiness is Readiness.STARTING
    assert running.supervisor.camera.last_frame_ns == running.clock()
    assert running.state[0] == "starting"


# -- after READY ------------------------------------------------------------------------------------------------------


def test_a_source_that_can_never_work_costs_no_exit_after_ready(running):
    running.make_ready()
    first = running.camera
    running.camera.emit(ABSENT)
    running.camera.exit_status = os.EX_CONFIG
    running.turn()
    assert first.killed and running.state == ("no-frames", "camera: absent: /dev/video0: no such device")
    assert running.supervisor.camera.faults == {"camera: absent": 1}, "the exit is not counted as well"
    turn_with_model(running, 0.3)
    assert running.camera is not first


def test_a_status_of_78_without_a_fault_is_an_ordinary_exit(running):
    running.camera.exit_status = os.EX_CONFIG
    running.turn()
    assert running.supervisor.camera.reason.text == "camera: ended with status 78"


def test_one_unreadable_frame_among_good_ones_is_only_counted(running):
    running.make_ready()
    running.camera.emit(CameraFault("unreadable", "a broken frame"))
    running.turn()
    assert running.state == ("running", "")
    assert running.supervisor.camera.faults == {"camera: unreadable": 1}
    running.push_frame()
    turn_with_model(running, 0.0)
    assert running.supervisor.camera.reason is None


def test_a_fault_without_a_frame_after_it_is_the_state(running):
    running.make_ready()
    running.camera.emit(ABSENT)
    turn_with_model(running, 1.1)
    assert running.state == ("no-frames", "camera: absent: /dev/video0: no such device")
    running.camera.emit(CameraOpened(width=6, height=4, fps=None, description="fake"))
    running.push_frame()
    turn_with_model(running, 0.0)
    assert running.state == ("running", "")


def test_a_camera_process_that_dies_is_started_again_after_growing_pauses(running):
    running.make_ready()
    pauses_s = []
    for _ in range(4):
        running.camera.exit_status = -11
        turn_with_model(running, 0.0)
        assert running.state == ("no-frames", "camera: killed by SIGSEGV")
        lost_ns = running.clock()
        while running.camera is None:
            turn_with_model(running, 0.05)
        pauses_s.append((running.clock() - lost_ns) / 1e9)
        running.open_camera()
        turn_with_model(running, 0.0)
    assert pauses_s == pytest.approx([0.2, 0.4, 0.8, 1.6], abs=0.051)


def test_after_a_good_period_the_pause_is_short_again(running):
    running.make_ready()
    for _ in range(3):
        for _ in range(11):
            running.push_frame()
            turn_with_model(running, 1.0)
        running.camera.exit_status = -11
        turn_with_model(running, 0.0)
        turn_with_model(running, 0.21)
        assert running.camera is not None
        running.open_camera()


def test_an_invalid_event_costs_the_camera_process(running):
    running.make_ready()
    sender = running.camera
    running.camera.emit(b"\xc1 not msgpack")
    running.turn()
    assert sender.killed and "camera: invalid event from the camera process" in running.state[1]


def test_a_camera_that_delivers_nothing_is_reported_after_the_stall_time(running):
    running.make_ready()
    turn_with_model(running, 3.0)
    assert running.state == ("running", "")
    turn_with_model(running, 0.1)
    assert running.state == ("no-frames", "camera: no frame: for 3 s")


def test_a_slow_camera_has_two_of_its_periods(running):
    with with_camera(fps=0.25) as slow:
        slow.make_ready()
        turn_with_model(slow, 8.0)
        assert slow.state == ("running", "")
        turn_with_model(slow, 0.1)
        assert slow.state[0] == "no-frames"


def test_a_camera_process_that_hangs_is_killed_and_started_again(running):
    running.make_ready()
    hung = running.camera
    turn_with_model(running, 11.0)
    assert not hung.killed
    turn_with_model(running, 0.1)
    assert hung.killed
    assert running.state == ("no-frames", "camera: stalled: no frame and no event in 11 s")
    turn_with_model(running, 0.3)
    assert running.camera is not None and running.supervisor.camera.readiness is Readiness.STARTING


def test_files_that_are_not_played_in_real_time_may_wait_for_the_model():
    with with_camera(realtime=False) as running:
        running.make_ready()
        waiting = running.camera
        turn_with_model(running, 100.0)
        assert not waiting.killed and running.state == ("running", "")


def test_a_source_that_has_ended_is_a_state_and_not_a_failure(running):
    running.make_ready()
    running.camera.emit(CameraEnded())
    turn_with_model(running, 0.0)
    assert running.state == ("no-frames", "camera: the source has ended")
    running.camera.exit_status = 0
    for _ in range(30):
        turn_with_model(running, 1.0)
    assert running.camera is None and running.supervisor.camera.faults == {}
    assert running.state == ("no-frames", "camera: the source has ended")
