"""Budgets of time around the model: what the daemon itself adds to a frame. Run by `make promises` on a quiet machine.

Each test prints one JSON line with its figures, also when it passes. A shared machine takes the processor away now and
then, so a budget is missed only if three tries in a row miss it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import zmq

from edge_agent.client import Client
from edge_agent.supervisor.publisher import Publisher
from edge_agent.wire.endpoints import endpoint
from edge_agent.wire.messages import TextMessage
from edge_agent.wire.streams import STREAMS
from tests.harness import rig

TRIES = 3
WATCHDOG_INTERVAL_S = 0.4

pytestmark = pytest.mark.promise


def config(bundle: Path, runtime: Path) -> dict:
    return {"bundle": str(bundle), "camera": {"source": f"zmq:ipc://{runtime}/frames"}}


def percentiles_ms(values_ms: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(values_ms, (50, 99)).round(3)
    return {"p50_ms": float(p50), "p99_ms": float(p99), "max_ms": round(max(values_ms), 3)}


def test_from_the_models_answer_to_the_wire_takes_less_than_a_millisecond(toy_bundle, runtime, report):
    """Socket, gate and publication of 300 answers: p50 below 0.5 ms, p99 below 1 ms."""
    with (
        rig.Pusher(f"ipc://{runtime}/frames", rate_hz=100.0),
        rig.daemon(runtime, config(toy_bundle, runtime), fake={"timed": True}) as running,
        running.client() as client,
    ):
        for _ in range(TRIES):
            took_ms = []
            while len(took_ms) < 300:
                answer = client.next_answer(30.0)
                took_ms.append(answer.age_ms - answer.stages_ms.queue)
            figures = percentiles_ms(took_ms)
            report({"promise": "answer to wire", "answers": 300} | figures)
            if figures["p50_ms"] < 0.5 and figures["p99_ms"] < 1.0:
                return
    pytest.fail(f"{figures}: expected p50 below 0.5 ms and p99 below 1 ms")


def test_stopped_subscribers_delay_no_answer(toy_bundle, runtime, report):
    """With a subscriber of each stream that never reads: over 50 answers per second, median age below 50 ms."""
    with (
        rig.Pusher(f"ipc://{runtime}/frames", rate_hz=100),
        rig.daemon(runtime, config(toy_bundle, runtime), fake={}) as running,
        zmq.Context() as context,
        running.client() as client,
        contextlib.ExitStack() as sockets,
    ):
        for stream, row in STREAMS.items():
            if row.topic:
                stopped = sockets.enter_context(context.socket(zmq.SUB))
                stopped.setsockopt(zmq.LINGER, 0)
                stopped.setsockopt(zmq.RCVHWM, 1)
                stopped.setsockopt(zmq.SUBSCRIBE, b"")
                stopped.connect(endpoint(runtime, stream))
        for _ in range(TRIES):
            start_s = time.monotonic()
            ages_ms = [client.next_answer(30.0).age_ms for _ in range(200)]
            rate_hz = round(200 / (time.monotonic() - start_s), 1)
            figures = {"answers_per_s": rate_hz} | percentiles_ms(ages_ms)
            report({"promise": "stopped subscribers"} | figures)
            if rate_hz > 50 and figures["p50_ms"] < 50:
                return
    pytest.fail(f"{figures}: expected over 50 answers per second, and p50 below 50 ms")


def test_publishing_to_a_stalled_subscriber_never_waits(tmp_path, report):
    """100,000 messages while a subscriber does not read: the slowest takes less than 50 ms, p99 below 0.2 ms."""
    with (
        contextlib.closing(Publisher(tmp_path)) as publisher,
        zmq.Context() as context,
        context.socket(zmq.SUB) as stalled,
    ):
        stalled.setsockopt(zmq.LINGER, 0)
        stalled.setsockopt(zmq.RCVHWM, 100)
        stalled.setsockopt(zmq.SUBSCRIBE, b"")
        stalled.connect(endpoint(tmp_path, "text"))
        while not stalled.poll(20):
            publisher.serve()
            publisher.send("text", TextMessage, lane="describe", frame_id=1, text="")
        for _ in range(TRIES):
            took_ms = []
            for _ in range(100_000):
                start_ns = time.perf_counter_ns()
                publisher.send("text", TextMessage, lane="describe", frame_id=1, text="a word")
                took_ms.append((time.perf_counter_ns() - start_ns) / 1e6)
            figures = percentiles_ms(took_ms)
            report({"promise": "publish to a stalled subscriber", "messages": 100_000} | figures)
            if figures["max_ms"] < 50 and figures["p99_ms"] < 0.2:
                return
    pytest.fail(f"{figures}: expected a maximum below 50 ms and p99 below 0.2 ms")


def test_the_watchdog_is_fed_in_time(toy_bundle, runtime, report):
    """Answers at 50 Hz: two feeds are never further apart than the interval of the unit."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, rig.Pusher(f"ipc://{runtime}/frames"):
        manager.bind(str(runtime / "notify"))
        manager.settimeout(60.0)
        env = {"NOTIFY_SOCKET": str(runtime / "notify"), "WATCHDOG_USEC": str(round(WATCHDOG_INTERVAL_S * 1e6))}
        with rig.daemon(runtime, config(toy_bundle, runtime), fake={}, env=env):
            for _ in range(TRIES):
                fed_s: list[float] = []
                while len(fed_s) < 40:
                    if manager.recv(4096) == b"WATCHDOG=1":
                        fed_s.append(time.monotonic())
                fed_s = fed_s[12:]  # the queue of the socket held the first ones
                gap_ms = round(1000 * max(later - sooner for sooner, later in itertools.pairwise(fed_s)))
                report({"promise": "watchdog", "interval_ms": 1000 * WATCHDOG_INTERVAL_S, "longest_gap_ms": gap_ms})
                if gap_ms < 1000 * WATCHDOG_INTERVAL_S:
                    return
    pytest.fail(f"the longest gap was {gap_ms} ms, the interval is {1000 * WATCHDOG_INTERVAL_S:g} ms")


def test_pause_is_answered_in_a_tenth_of_a_second_in_every_state(toy_bundle, runtime, report):
    """While the bundle is verified and the model loads, while frames are answered, and without model or camera."""
    took_ms: dict[str, list[float]] = {}

    def pause(client: Client, state: str, n: int) -> None:
        for _ in range(n):
            start_s = time.monotonic()
            client.pause(timeout_s=30.0)
            took_ms.setdefault(state, []).append((time.monotonic() - start_s) * 1000)

    settings = config(toy_bundle, runtime) | {"watchdog": {"model_stall_s": 1.0, "camera_stall_s": 1.0}}
    with (
        rig.Pusher(f"ipc://{runtime}/frames", rate_hz=30.0),
        rig.daemon(runtime, settings, wait=False) as running,
        running.client() as client,
    ):
        while not (runtime / "control").exists():
            time.sleep(0.01)
        status = client.status(30.0)
        while status is None or status.state == "starting":
            pause(client, "starting", 5)
            status = client.status(30.0)
        client.resume()
        status = running.wait("running")
        pause(client, "running", 100)
        pause(client, "paused", 100)
        client.resume()
        for name, worker, number in (
            ("model killed", "model_worker", signal.SIGKILL),
            ("model hangs", "model_worker", signal.SIGSTOP),
            ("camera hangs", "camera_worker", signal.SIGSTOP),
        ):
            os.kill(getattr(running.wait("running"), worker).pid, number)
            pause(client, name, 100)
            client.resume()
        figures = {state: percentiles_ms(values) for state, values in took_ms.items()}
        every = percentiles_ms([value for values in took_ms.values() for value in values])
    report({"promise": "pause to reply", "all": every} | figures)
    assert every["p99_ms"] <= 100.0, every
