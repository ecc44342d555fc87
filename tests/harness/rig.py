"""A daemon for tests: a real process with real sockets and a real camera process. The model process is real, or
tests/harness/fake_model.py.

    python -m tests.harness.rig CONFIG [TRACE]      runs the daemon with the fake model
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from edge_agent.actions.space import READY_SPACES, encode_action_space, load_action_space
from edge_agent.bundle.lora_check import verify_adapters
from edge_agent.bundle.manifest import read_manifest
from edge_agent.bundle.model_start import encode_model_start
from edge_agent.client import Client, FramePusher
from edge_agent.config import CameraConfig, Config, LanguageConfig, TaskConfig, VisionConfig, load_config
from edge_agent.supervisor import managed_worker
from edge_agent.supervisor.process import run
from edge_agent.wire.messages import Status
from tests.harness import ROOT

TASK = "Find the red box."


def config_of(folder: Path, **changes) -> Config:
    """For an engine or a model process on a toy. Reproducible: an answer has one right value."""
    defaults = {
        "profile": "reproducible",
        "cpu_threads": 1,
        "vision": VisionConfig(max_image_tokens=64),
        "language": LanguageConfig(context=1024, gpu_layers=0, max_text_tokens=24),
        "task": TaskConfig(deadline_ms=60_000),
    }
    return Config(bundle=str(folder), camera=CameraConfig(source="none"), **(defaults | changes))


def model_start(config: Config) -> bytes:
    """The first message to a model process, as the supervisor sends it. The hashes are not computed here."""
    bundle = verify_adapters(config.language.adapters, read_manifest(config.bundle), ())
    return encode_model_start(config, bundle, encode_action_space(load_action_space(config.task.action_space)))


def numbers_only(folder: Path) -> str:
    """An action space with nothing but velocity_body's move: its answers take several steps."""
    space = yaml.safe_load((READY_SPACES / "velocity_body.yaml").read_text())
    space["actions"] = {"move": space["actions"]["move"]}
    (folder / "numbers.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
    return str(folder / "numbers.yaml")


class Daemon:
    """One running daemon; `daemon(...)` makes it."""

    def __init__(self, process: subprocess.Popen, runtime: Path, log: Path) -> None:
        self.process, self.runtime, self.log = process, runtime, log

    def client(self) -> Client:
        return Client(str(self.runtime))

    def wait(self, *states: str, timeout_s: float = 120.0) -> Status:
        """The first status in one of these states. The time-out only bounds a hang."""
        until_s, status = time.monotonic() + timeout_s, None
        with self.client() as client:
            while time.monotonic() < until_s:
                status = client.status(0.5)
                if status is not None and status.state in states:
                    return status
                assert self.process.poll() is None, f"daemon ended: {self.log.read_text()}"
        raise AssertionError(f"not {states} in {timeout_s} s but {status}: {self.log.read_text()}")

    def stop(self, timeout_s: float = 60.0) -> int:
        """Ask the daemon to stop; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@contextlib.contextmanager
def daemon(
    runtime: Path,
    config: dict,
    *,
    fake: dict | None = None,
    env: dict[str, str] | None = None,
    trace: Path | None = None,
    wait: bool = True,
) -> Iterator[Daemon]:
    """Start a daemon with this configuration; at the end, make sure that none of its processes is left.

    fake: what the fake model does ($FAKE_MODEL); None: the real model. wait: until the state is running.
    """
    runtime.mkdir(exist_ok=True)
    path, log = runtime / "config.yaml", runtime / "log"
    path.write_text(yaml.safe_dump(config | {"runtime_dir": str(runtime)}))
    real = ["edge_agent.cli.main", "run", "--config", str(path), *(["--trace", str(trace)] if trace else [])]
    command = real if fake is None else ["tests.harness.rig", str(path), *([str(trace)] if trace else [])]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=out,
            stderr=out,
            env=os.environ | {"PYTHONPATH": str(ROOT), "FAKE_MODEL": json.dumps(fake or {})} | (env or {}),
        )
    try:
        running = Daemon(process, runtime, log)
        if wait:
            running.wait("running")
        yield running
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


class Pusher:
    """In place of a process that owns the camera: a thread that pushes noise at a steady rate, and keeps a record."""

    def __init__(self, endpoint: str, rate_hz: float = 50.0, height: int = 120, width: int = 160) -> None:
        self.endpoint, self.period_s, self.shape = endpoint, 1 / rate_hz, (height, width, 3)
        self.sent: dict[int, int] = {}  # frame_id -> t_capture_ns
        self.next_id = 1000
        self.running = threading.Event()
        self.running.set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._push)

    def __enter__(self) -> Pusher:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _push(self) -> None:
        generator = np.random.default_rng(0)
        with FramePusher(self.endpoint) as pusher:
            while not self._ended.wait(self.period_s):
                if not self.running.is_set():
                    continue
                image = generator.integers(0, 256, self.shape, dtype=np.uint8)
                self.sent[self.next_id] = stamp_ns = time.monotonic_ns()
                pusher.push(image, frame_id=self.next_id, t_capture_ns=stamp_ns)
                self.next_id += 1


def children(pid: int) -> list[int]:
    """Process ids of the direct children of a process."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until_gone(*pids: int, timeout_s: float = 60.0) -> None:
    """Until none of these processes exists. The time-out only bounds a hang."""
    until_s = time.monotonic() + timeout_s
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < until_s, f"still there: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.02)


if __name__ == "__main__":
    managed_worker.MAX_PAUSE_S = float(os.environ.get("MAX_PAUSE_S", managed_worker.MAX_PAUSE_S))
    sys.exit(run(load_config(sys.argv[1]), *sys.argv[2:], model_module="tests.harness.fake_model"))
