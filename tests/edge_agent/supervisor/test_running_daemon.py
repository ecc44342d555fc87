"""A real daemon with the fake model: real processes that die, hang or are stopped, real sockets, real signals.

What needs no process is in the other files of this folder, where a fake clock makes every time-out a matter of
microseconds. Here a time-out only bounds a hang.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import zmq

from edge_agent.client import Client, RequestRefused
from edge_agent.wire.endpoints import endpoint
from edge_agent.wire.messages import Action, Refusal
from edge_agent.wire.streams import STREAMS
from tests.harness import rig

WATCHDOG = {"model_stall_s": 3.0, "camera_stall_s": 2.0}
HANG_S = 120.0


@pytest.fixture
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")  # short: the path of a socket may have 107 bytes


class Common(NamedTuple):
    """A daemon that every test leaves as it was, and who pushes its frames."""

    runtime: Path
    pusher: rig.Pusher
    running: rig.Daemon


@pytest.fixture(scope="module")
def common(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Common]:
    runtime = tmp_path_factory.mktemp("r")
    with (
        rig.Pusher(f"ipc://{runtime}/frames") as pusher,
        rig.daemon(runtime, config(toy_bundle, runtime), fake={}, env={"MAX_PAUSE_S": "0.2"}) as running,
    ):
        yield Common(runtime, pusher, running)
        assert running.process.poll() is None


def config(bundle: Path, runtime: Path, **changes: object) -> dict:
    source = {"source": f"zmq:ipc://{runtime}/frames"}
    return {"bundle": str(bundle), "camera": source, "watchdog": WATCHDOG} | changes


def next_answers(client: Client, n: int) -> list[Action | Refusal]:
    answers = []
    for _ in range(n):
        answer = client.next_answer(HANG_S)
        assert answer is not None, "no answer"
        answers.append(answer)
    return answers


def assert_never_twice(answers: list[Action | Refusal], pusher: rig.Pusher) -> None:
    """Every answer is of another frame, with the time at which that frame was captured."""
    assert answers
    assert len({answer.frame_id for answer in answers}) == len(answers), "a frame was answered twice"
    for answer in answers:
        assert pusher.sent[answer.frame_id] == answer.t_capture_ns


def test_ids_and_times_come_out_as_they_went_in(common):
    status = common.running.wait("running")
    with common.running.client() as client:
        answers = next_answers(client, 20)
    assert_never_twice(answers, common.pusher)
    for answer in answers:
        assert isinstance(answer, Action)
        assert answer.capture_clock == "sender"
        assert answer.values == {"forward_m_s": 1.0, "right_m_s": 0.0, "down_m_s": 0.0, "yaw_rate_rad_s": 0.0}
        assert answer.valid_until_ns == answer.t_pub_ns + answer.valid_for_ms * 1_000_000
        assert answer.age_ms == pytest.approx((answer.t_pub_ns - answer.t_capture_ns) / 1e6)
        assert (answer.session, answer.bundle_id) == (status.session, status.bundle_id)
    assert len(status.bundle_id) == 16


def test_an_answer_that_takes_longer_than_the_deadline_is_refused(toy_bundle, runtime):
    late = config(toy_bundle, runtime, task={"deadline_ms": 50})
    with (
        rig.Pusher(f"ipc://{runtime}/frames"),
        rig.daemon(runtime, late, fake={"delay_ms": 120}) as running,
        running.client() as client,
    ):
        answers = next_answers(client, 5)
    assert {getattr(answer, "reason", "") for answer in answers} == {"late"}


@pytest.mark.parametrize("how", ["abort", "segv", "exit", "garbage", "hang"])
def test_while_the_model_is_down_no_action_is_published_and_the_status_has_the_reason(toy_bundle, runtime, how):
    fake = {"after": 40, "then": how}
    with (
        rig.Pusher(f"ipc://{runtime}/frames") as pusher,
        rig.daemon(runtime, config(toy_bundle, runtime), fake=fake) as running,
        running.client() as client,
    ):
        answers = next_answers(client, 3)
        failed = running.wait("fault", "stalled")
        assert failed.state == ("stalled" if how == "hang" else "fault")
        assert failed.reason.startswith("model: ") and sum(failed.faults.values()) >= 1
        restarted = running.wait("running")
        assert restarted.model_worker.restarts >= 1 and restarted.model_worker.pid != failed.model_worker.pid
        answers += next_answers(client, 3)
        assert rig.alive(running.process.pid)
    assert_never_twice(answers, pusher)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", ["camera_worker", "model_worker"])
def test_killed_or_stopped_workers_come_back(common, victim, number):
    running = common.running
    pid = getattr(running.wait("running"), victim).pid
    os.kill(pid, number)
    hurt = running.wait("fault", "stalled", "no-frames")
    assert victim.split("_")[0] in hurt.reason
    status = running.wait("running")
    assert getattr(status, victim).pid != pid
    assert not rig.alive(pid)


def test_requests_reach_the_model_and_come_back(common):
    running = common.running
    running.wait("running")
    with running.client() as client:
        client.instruct("Go to the red disc.")
        assert next(client.actions()).instruction == "Go to the red disc."
        with pytest.raises(RequestRefused, match="too long"):
            client.instruct("refuse this")
        assert client.stats()["instruction"] == "Go to the red disc."
        assert client.ask("what?") == "a pad"
        assert "".join(client.ask_stream("what?")) == "a pad"
        client.pause()
        assert running.wait("paused").reason.startswith("by control")
        client.resume()
        assert isinstance(next(client.actions()), Action)


def test_a_rep_socket_gets_its_reply(common):
    """A REQ socket sends an empty frame before the request, and needs it before the reply."""
    with zmq.Context() as context, context.socket(zmq.REQ) as requester:
        requester.setsockopt(zmq.LINGER, 0)
        requester.setsockopt(zmq.RCVTIMEO, int(HANG_S * 1000))
        requester.connect(endpoint(common.runtime, "control"))
        requester.send(b"\x84\xa1v\x01\xa2id\xa1a\xa2op\xa5stats\xa4text\xa0")
        assert b"uptime_s" in requester.recv()


def test_stopped_subscribers_cost_the_others_nothing(common):
    common.running.wait("running")
    with zmq.Context() as context, common.running.client() as client:
        sockets = []
        for stream, row in STREAMS.items():
            if row.topic:
                sockets.append(context.socket(zmq.SUB))
                sockets[-1].setsockopt(zmq.RCVHWM, 1)
                sockets[-1].setsockopt(zmq.SUBSCRIBE, b"")
                sockets[-1].connect(endpoint(common.runtime, stream))  # and never read
        answers = next_answers(client, 150)
        for stopped in sockets:
            stopped.close(0)
    assert_never_twice(answers, common.pusher)


def test_a_clean_stop_leaves_nothing(toy_bundle, runtime):
    with rig.Pusher(f"ipc://{runtime}/frames"), rig.daemon(runtime, config(toy_bundle, runtime), fake={}) as running:
        pids = rig.children(running.process.pid)
        assert len(pids) == 2
        assert running.stop() == 0
        assert not any(rig.alive(pid) for pid in pids)
        assert not (runtime / "actions").exists()


def test_kill_9_leaves_no_orphans_and_no_lock(toy_bundle, runtime):
    with rig.Pusher(f"ipc://{runtime}/frames"), rig.daemon(runtime, config(toy_bundle, runtime), fake={}) as running:
        pids = rig.children(running.process.pid)
        session = running.wait("running").session
        running.process.kill()
        rig.wait_until_gone(*pids)
        with rig.daemon(runtime, config(toy_bundle, runtime), fake={}) as second:
            assert second.wait("running").session != session


def test_systemd_gets_ready_and_watchdog(toy_bundle, runtime):
    """That the watchdog is fed only with progress: test_process.py, test_systemd.py."""
    lines: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, rig.Pusher(f"ipc://{runtime}/frames"):
        manager.bind(str(runtime / "notify"))
        manager.settimeout(HANG_S)
        env = {"NOTIFY_SOCKET": str(runtime / "notify"), "WATCHDOG_USEC": "400000"}
        with rig.daemon(runtime, config(toy_bundle, runtime), fake={}, env=env) as running:
            while lines.count("WATCHDOG=1") < 5 or "READY=1" not in lines:
                lines += manager.recv(4096).decode().split("\n")
            running.process.send_signal(signal.SIGTERM)
            while "STOPPING=1" not in lines:
                lines += manager.recv(4096).decode().split("\n")
            assert running.process.wait(HANG_S) == 0
    assert lines.index("STATUS=verifying the bundle") < lines.index("STATUS=loading") < lines.index("READY=1")


def test_a_source_that_can_never_work_ends_the_start_with_78(toy_bundle, runtime):
    missing = config(toy_bundle, runtime) | {"camera": {"source": str(runtime / "none.mp4")}}
    with rig.daemon(runtime, missing, fake={}, wait=False) as running:
        assert running.process.wait(HANG_S) == os.EX_CONFIG
        line = running.log.read_text().splitlines()[-1]
        assert line.startswith("edge-agent: camera.source:") and "none.mp4" in line


def test_a_model_that_dies_at_its_first_frame_is_started_again(toy_bundle, runtime):
    fake = {"after": 0, "then": "abort"}
    with (
        rig.Pusher(f"ipc://{runtime}/frames"),
        rig.daemon(runtime, config(toy_bundle, runtime), fake=fake, wait=False) as running,
    ):
        assert "SIGABRT" in running.wait("fault").reason
        while running.wait("fault", "running").model_worker.restarts < 3:
            assert running.process.poll() is None
