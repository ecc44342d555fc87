"""The long form of the fault tests, run by `make soak`. Each test prints one JSON line with its figures."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from edge_agent.board import health
from edge_agent.wire.messages import Action
from tests.harness import rig

ROUNDS = 60
KILLS = 500
FLIGHT_S = 180.0
FREEZERS = Path("/sys/fs/cgroup/freezer")  # cgroup v1: a SIGKILL stays pending in a frozen process

pytestmark = pytest.mark.soak


class ActionRecorder(threading.Thread):
    """Keeps of every action when it arrived, of which frame it is, and its age in milliseconds."""

    def __init__(self, client) -> None:
        super().__init__(daemon=True)
        self.client, self.ended = client, threading.Event()
        self.actions: list[tuple[int, int, float]] = []

    def run(self) -> None:
        while not self.ended.is_set():
            answer = self.client.next_answer(0.1)
            if isinstance(answer, Action):
                self.actions.append((time.monotonic_ns(), answer.frame_id, answer.age_ms))


def test_faults(toy_bundle, runtime, capsys):
    """SIGKILL and SIGSTOP to either worker, in random order: silence and a reason in time, and nothing is replayed."""
    generator = random.Random(0)
    config = {
        "bundle": str(toy_bundle),
        "camera": {"source": f"zmq:ipc://{runtime}/frames"},
        "watchdog": {"model_stall_s": 0.6, "camera_stall_s": 0.5},
    }
    reason_ms, silence_ms = [], []
    with (
        rig.Pusher(f"ipc://{runtime}/frames"),
        rig.daemon(runtime, config, fake={}) as running,
        running.client() as listening,
    ):
        recorder = ActionRecorder(listening)
        recorder.start()
        for _ in range(ROUNDS):
            status = running.wait("running", timeout_s=30)
            time.sleep(0.3)
            victim = generator.choice(["camera_worker", "model_worker"])
            hurt_ns = time.monotonic_ns()
            os.kill(getattr(status, victim).pid, generator.choice([signal.SIGKILL, signal.SIGSTOP]))
            hurt = running.wait("fault", "stalled", "no-frames", timeout_s=15)
            reason_ms.append((time.monotonic_ns() - hurt_ns) / 1e6)
            assert victim.split("_")[0] in hurt.reason
            known_ns = time.monotonic_ns()
            after = [at for at, _, _ in recorder.actions if hurt_ns < at < known_ns]
            silence_ms.append((max(after, default=hurt_ns) - hurt_ns) / 1e6)
        running.wait("running", timeout_s=30)
        recorder.ended.set()
        recorder.join()
        assert running.process.poll() is None
    frames = [frame_id for _, frame_id, _ in recorder.actions]
    figures = {
        "promise": 2,
        "rounds": ROUNDS,
        "actions": len(frames),
        "worst_ms_to_reason": round(max(reason_ms)),
        "worst_ms_to_silence": round(max(silence_ms)),
        "replays": len(frames) - len(set(frames)),
        "worst_age_ms": round(max(age for _, _, age in recorder.actions), 1),
    }
    with capsys.disabled():
        print("\n" + json.dumps(figures))
    assert figures["replays"] == 0 and figures["worst_ms_to_reason"] < 2500 and figures["worst_ms_to_silence"] < 1000


def test_no_frame_is_answered_twice_when_the_model_is_killed_and_the_camera_pauses(toy_bundle, runtime, capsys):
    """The answered frame stays in the slot, and the next model process finds it there."""
    config = {"bundle": str(toy_bundle), "camera": {"source": f"zmq:ipc://{runtime}/frames"}}
    with (
        rig.Pusher(f"ipc://{runtime}/frames", rate_hz=100.0) as pusher,
        rig.daemon(runtime, config, fake={}, env={"MAX_PAUSE_S": "0.05"}) as running,
        running.client() as listening,
        running.client() as asking,
    ):
        recorder = ActionRecorder(listening)
        recorder.start()
        pid = running.wait("running").model_worker.pid
        for _ in range(KILLS):
            n_actions = len(recorder.actions)
            pusher.running.set()
            while len(recorder.actions) < n_actions + 2:
                time.sleep(0.002)
            pusher.running.clear()
            time.sleep(0.03)  # the last frame is answered
            os.kill(pid, signal.SIGKILL)
            while (status := asking.status(30.0)).model_worker.pid in (None, pid) or status.state == "fault":
                pass
            pid = status.model_worker.pid
            time.sleep(0.1)  # the new process looks into the slot
        recorder.ended.set()
        recorder.join()
    frames = [frame_id for _, frame_id, _ in recorder.actions]
    figures = {"promise": "answered once", "kills": KILLS, "actions": len(frames)}
    figures["replays"] = len(frames) - len(set(frames))
    with capsys.disabled():
        print("\n" + json.dumps(figures))
    assert figures["replays"] == 0


@pytest.mark.skipif(not os.access(FREEZERS, os.W_OK), reason="needs root and a cgroup v1 freezer")
@pytest.mark.parametrize("victim", ["camera_worker", "model_worker"])
def test_a_worker_that_sigkill_does_not_end_costs_the_worker_alone(toy_bundle, runtime, victim):
    """As a process in state D, inside a driver: the reason is published, control replies, SIGTERM ends the daemon."""
    frozen = FREEZERS / f"edge-agent-test-{os.getpid()}"
    frozen.mkdir()
    config = {
        "bundle": str(toy_bundle),
        "camera": {"source": f"zmq:ipc://{runtime}/frames"},
        "watchdog": {"model_stall_s": 0.5, "camera_stall_s": 0.5},
    }
    try:
        with rig.Pusher(f"ipc://{runtime}/frames"), rig.daemon(runtime, config, fake={}) as running:
            pid = getattr(running.wait("running"), victim).pid
            (frozen / "cgroup.procs").write_text(str(pid))
            (frozen / "freezer.state").write_text("FROZEN")
            status = running.wait("fault", "stalled", "no-frames")
            while "is still in the kernel" not in status.reason:
                status = running.wait("fault", "stalled", "no-frames")
            assert victim.split("_")[0] in status.reason and str(pid) in status.reason
            if victim == "camera_worker":
                running.wait("running")  # its successor took the path over, and the pusher found it
            with running.client() as client:
                client.pause()
                assert client.stats()["uptime_s"] > 0
            assert rig.alive(pid)
            assert running.stop() == 0
            assert rig.alive(pid)
            (frozen / "freezer.state").write_text("THAWED")
            rig.wait_until_gone(pid)
    finally:
        (frozen / "freezer.state").write_text("THAWED")
        for process_id in (frozen / "cgroup.procs").read_text().split():
            rig.wait_until_gone(int(process_id))
        while frozen.exists():  # the kernel needs a moment after the last process has gone
            with contextlib.suppress(OSError):
                frozen.rmdir()


def test_memory_is_flat(toy_bundle, runtime, tmp_path_factory, capsys):
    """The real model at full speed: resident memory after a third of the flight, and at its end."""
    config = {
        "bundle": str(toy_bundle),
        "camera": {"source": f"zmq:ipc://{runtime}/frames"},
        "vision": {"max_image_tokens": 16},
        "language": {"context": 1024, "describe_prompt": "What do you see?", "max_text_tokens": 8},
    }
    with rig.Pusher(f"ipc://{runtime}/frames", rate_hz=200), rig.daemon(runtime, config) as running:
        status = running.wait("running")
        pids = {"supervisor": running.process.pid, "camera": status.camera_worker.pid, "model": status.model_worker.pid}
        time.sleep(FLIGHT_S / 3)
        first = {name: health.rss_mib(pid) for name, pid in pids.items()}
        time.sleep(2 * FLIGHT_S / 3)
        last = {name: health.rss_mib(pid) for name, pid in pids.items()}
        end = running.wait("running")
    growth = {name: round((last[name] - first[name]) * 1024 / (2 * FLIGHT_S / 3 / 3600)) for name in pids}
    with capsys.disabled():
        print("\n" + json.dumps({"promise": 21, "frames": end.frames, "actions": end.actions, "kib_per_hour": growth}))
    assert all(last[name] - first[name] < 4 for name in pids), (first, last)


def test_from_camera_to_wire_all_but_the_model_takes_a_few_milliseconds(toy_bundle, runtime, capsys):
    """640x480 frames that come when the model is free: receiving, slot, wake-up, resizing, gate, publication. Encode,
    prefill and decode do not count. Three tries: a shared machine takes the processor away now and then."""
    for _ in range(3):
        beside_ms = beside_the_model_ms(toy_bundle, runtime, n_frames=380)
        p50, p99 = (round(float(np.percentile(beside_ms, p)), 2) for p in (50, 99))
        with capsys.disabled():
            print(json.dumps({"frames": 380, "camera_to_wire_beside_the_model_ms": {"p50": p50, "p99": p99}}))
        if p99 <= 5.0:
            break
    assert p99 <= 5.0


def beside_the_model_ms(toy_bundle: Path, runtime: Path, n_frames: int) -> list[float]:
    trace = runtime / "trace.json"
    config = {
        "bundle": str(toy_bundle), "camera": {"source": f"zmq:ipc://{runtime}/frames"},
        "vision": {"max_image_tokens": 144}, "language": {"gpu_layers": 0}, "task": {"deadline_ms": 5000},
    }  # fmt: skip
    pusher = rig.Pusher(f"ipc://{runtime}/frames", rate_hz=8.0, height=480, width=640)
    with pusher, rig.daemon(runtime, config, trace=trace) as running:
        with running.client() as client:
            answers = [client.next_answer(5.0) for _ in range(n_frames + 20)][20:]
        running.stop()
    resize_ms, newest_ms = {}, 0.0  # frame id -> duration; the span "waits" of a frame follows its span "resize"
    for span in json.loads(trace.read_text()):
        if span["name"] == "resize":
            newest_ms = span["dur"] / 1000
        elif span["name"].endswith(" waits"):
            resize_ms[int(span["name"].split()[1])] = newest_ms
    stages = [(answer, answer.stages_ms) for answer in answers]
    return [a.age_ms - s.encode - s.prefill - s.decode + resize_ms[a.frame_id] for a, s in stages]
