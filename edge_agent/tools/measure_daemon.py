"""Runs the real daemon for a few seconds under one configuration, and measures its answers as a controller sees them.

The daemon gets a runtime folder of its own, so no controller hears it. Its camera is the configured one; where frames
are pushed by another process (zmq:), synthetic frames are pushed instead.

As a program (python -m edge_agent.tools.measure_daemon COMMAND...) this file becomes COMMAND, which is killed when the
process that started it ends, in whatever way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import msgspec
import numpy as np

from edge_agent.client import Client, FramePusher
from edge_agent.config import Config
from edge_agent.ipc.worker import die_with_parent
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.tools.bench import synthetic_frames
from edge_agent.wire.information_age import PublishedAction, mean_information_age_ms
from edge_agent.wire.messages import Action, Refusal, Status

SETTLE_ANSWERS = 3  # the first answers after the start are slower
MIN_ANSWERS, MAX_STRETCH = 12, 4  # a slow configuration is measured for up to MAX_STRETCH times as long
START_SLACK_S, STOP_S = 30.0, 10.0
PUSHED_SIZE, PUSHED_FPS = (480, 640), 30.0  # height, width; where the configuration does not say
N_FRAMES = 16
MAX_LATE_SHARE = 0.02  # of the answers


_interrupted = threading.Event()


class Measured(msgspec.Struct, frozen=True):
    """What a controller gets. problem: one line, and the figures are None, if the daemon gave too few answers."""

    mean_age_ms: float | None = None  # mean age of information
    age_ms: float | None = None  # of an action when it is published, median
    actions_per_s: float | None = None
    n_actions: int = 0
    refused: dict[str, int] = {}  # reason -> number
    language_backend: str = ""
    vision_backend: str = ""
    problem: str = ""

    @property
    def is_late(self) -> bool:
        """More answers than chance explains were refused as late."""
        n_late = self.refused.get("late", 0)
        return n_late > MAX_LATE_SHARE * (n_late + self.n_actions)


def measure(config: Config, folder: Path, seconds: float) -> Measured:
    """folder: an empty folder for sockets and configuration; short, as socket paths are. Never raises for a daemon that
    fails: `problem` says why."""
    runtime = folder / "run"
    camera = config.camera
    is_pushed = camera.source.startswith("zmq:")
    if is_pushed:
        camera = msgspec.structs.replace(camera, source=f"zmq:ipc://{folder}/frames")
    # A limit of the governor would measure another configuration than this one.
    ungoverned = msgspec.structs.replace(config.governor, enabled=False)
    config = msgspec.structs.replace(config, runtime_dir=str(runtime), camera=camera, governor=ungoverned)
    file = folder / "config.yaml"
    file.write_bytes(msgspec.json.encode(config))  # JSON is YAML
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(_daemon(file, folder / "stderr"))
        if is_pushed:
            stack.enter_context(_pushed_frames(config))
        client = stack.enter_context(Client(str(runtime)))
        limit_s = config.watchdog.model_load_s + START_SLACK_S
        if (status := _wait_until_running(client, process, limit_s)) is None:
            return Measured(problem=_last_line(folder / "stderr") or f"not running after {limit_s:g} s")
        actions, refused, measured_s = _collect(client, process, seconds)
        status = client.status(1.0) or status
    age_ms = mean_information_age_ms(actions)
    if age_ms is None:
        why = ", ".join(f"{n} {reason}" for reason, n in refused.items())
        return Measured(refused=refused, problem=f"no valid actions: {why or status.reason or 'no answer'}")
    ages_ms = [(action.t_pub_ns - action.t_capture_ns) / NS_PER_MS for action in actions]
    return Measured(
        mean_age_ms=round(age_ms, 2),
        age_ms=round(float(np.median(ages_ms)), 2),
        actions_per_s=round(len(actions) / measured_s, 2),
        n_actions=len(actions),
        refused=refused,
        language_backend=status.language_backend,
        vision_backend=status.vision_backend,
    )


@contextlib.contextmanager
def interrupts_at_safe_points() -> Iterator[None]:
    """In the block, Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt while measure() waits, and nowhere else: not
    between the start of a daemon and the line that remembers it. A signal that is ignored stays ignored."""
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: _interrupted.set()) for number in numbers}
    try:
        yield
        _raise_if_interrupted()
    finally:
        _interrupted.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_if_interrupted() -> None:
    if _interrupted.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def _daemon(file: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The daemon, ended with the block, whatever happens in it."""
    env = {key: value for key, value in os.environ.items() if key not in ("NOTIFY_SOCKET", "RUNTIME_DIRECTORY")}
    env["EDGE_AGENT_PARENT"] = str(os.getpid())
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, sys.executable, "-m", "edge_agent.cli.main", "run", "--config", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=env,
            start_new_session=True,  # Ctrl-C reaches this program alone, which then ends the daemon
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()  # its workers end with it
            process.wait()


@contextlib.contextmanager
def _pushed_frames(config: Config) -> Iterator[None]:
    """Synthetic frames of the camera's size at the camera's rate, from a thread."""
    camera = config.camera
    height, width = camera.height or PUSHED_SIZE[0], camera.width or PUSHED_SIZE[1]
    frames = [cv2.resize(frame, (width, height)) for frame in synthetic_frames(N_FRAMES)]
    period_ns = round(NS_PER_S / (camera.fps or PUSHED_FPS))
    is_over = threading.Event()

    def push() -> None:
        frame_id, next_ns = 0, time.monotonic_ns()
        with FramePusher(camera.source.removeprefix("zmq:")) as pusher:
            while not is_over.wait(max(0, next_ns - time.monotonic_ns()) / NS_PER_S):
                frame_id, next_ns = frame_id + 1, next_ns + period_ns
                pusher.push(frames[frame_id % len(frames)], frame_id=frame_id, t_capture_ns=time.monotonic_ns())

    thread = threading.Thread(target=push)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _wait_until_running(client: Client, process: subprocess.Popen[bytes], limit_s: float) -> Status | None:
    """The first status with an action in it; None: the daemon ended, or the time did."""
    end_ns = time.monotonic_ns() + round(limit_s * NS_PER_S)
    while process.poll() is None and time.monotonic_ns() < end_ns:
        _raise_if_interrupted()
        status = client.status(0.5)
        if status is not None and status.state == "running" and status.actions + sum(status.refusals.values()) > 0:
            return status
    return None


def _collect(
    client: Client, process: subprocess.Popen[bytes], seconds: float
) -> tuple[list[PublishedAction], dict[str, int], float]:
    """Actions, refusals by reason, and the seconds that were measured."""
    actions: list[PublishedAction] = []
    refused: dict[str, int] = {}
    n_settled, start_ns = 0, time.monotonic_ns()
    while process.poll() is None:
        _raise_if_interrupted()
        elapsed_s = (time.monotonic_ns() - start_ns) / NS_PER_S
        n_answers = len(actions) + sum(refused.values())
        if elapsed_s > seconds * MAX_STRETCH or (elapsed_s > seconds and n_answers >= MIN_ANSWERS):
            break
        answer = client.next_answer(0.2)
        if answer is not None and n_settled < SETTLE_ANSWERS:
            n_settled, start_ns = n_settled + 1, time.monotonic_ns()
        elif isinstance(answer, Action):
            actions.append(PublishedAction(answer.t_capture_ns, answer.t_pub_ns))
        elif isinstance(answer, Refusal):
            refused[answer.reason] = refused.get(answer.reason, 0) + 1
    return actions, refused, (time.monotonic_ns() - start_ns) / NS_PER_S


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("edge-agent: ") if lines else ""


if __name__ == "__main__":
    die_with_parent(int(os.environ.pop("EDGE_AGENT_PARENT")))  # the kernel keeps this through exec
    os.execv(sys.argv[1], sys.argv[1:])
