"""A ROS graph in two processes of a Python with ROS: `edge-agent ros2`, and a peer that a test drives."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT

HANG_S = 60.0  # bounds a hang, not a duration
PEER = ROOT / "tests" / "harness" / "ros2_peer.py"


def ros_python() -> str:
    """The Python of an installed ROS 2. Skips the test where there is none."""
    named = os.environ.get("EDGE_AGENT_ROS2_PYTHON", "")
    own = Path(sys.prefix) / "ros2" / "bin" / "python"
    if not named and not own.exists():
        pytest.skip(f"no ROS 2: no {own} (make test makes it on x86-64), and EDGE_AGENT_ROS2_PYTHON names no other")
    return named or str(own)


def ros_environment(domain: int, log: Path) -> dict[str, str]:
    own = {"ROS_DOMAIN_ID": str(domain), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST", "ROS_LOG_DIR": str(log)}
    return os.environ | own | {"PYTHONPATH": str(ROOT)}


class LineProcess:
    """A process whose lines are kept as they come."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._arrived = threading.Condition()
        self._threads = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.lines)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.errors)),
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, stream: Any, lines: list[str]) -> None:
        for line in stream:
            with self._arrived:
                lines.append(line.rstrip("\n"))
                self._arrived.notify_all()

    def wait_until(self, is_so: Callable[[], Any], what: str) -> Any:
        """Waits for lines until is_so() is true; returns what it returned."""
        end_s = time.monotonic() + HANG_S
        with self._arrived:
            while not (found := is_so()):
                self._arrived.wait(0.05)
                assert time.monotonic() < end_s, f"{what}: not seen; stderr: {self.errors[-20:]}"
        return found

    def tell(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def close(self, kill: bool = False) -> int:
        if self.process.poll() is None:
            self.process.kill() if kill else self.process.terminate()
        status = self.process.wait(HANG_S)
        for thread in self._threads:
            thread.join(HANG_S)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        return status


class Peer(LineProcess):
    """Drives tests/harness/ros2_peer.py."""

    def __init__(self, environment: dict[str, str]) -> None:
        super().__init__([ros_python(), str(PEER)], environment)
        self.messages: list[dict[str, Any]] = []
        self.topics: dict[str, list[dict[str, Any]]] = {}  # the same, by their topic
        self._n_read = 0
        self._lock = threading.Lock()
        self.wait_for("ready")

    def all(self, topic: str, since: int = 0) -> list[dict[str, Any]]:
        """The messages of a topic, from the message `since` of all topics on."""
        with self._lock:
            while self._n_read < len(self.lines):
                message = json.loads(self.lines[self._n_read])
                self.messages.append(message)
                self.topics.setdefault(message["topic"], []).append(message)
                self._n_read += 1
            if not since:
                return self.topics.get(topic, [])[:]
            return [message for message in self.messages[since:] if message["topic"] == topic]

    def mark(self) -> int:
        self.all("")
        return len(self.messages)

    def wait_for(
        self, topic: str, is_so: Callable[[dict[str, Any]], Any] = lambda _message: True, since: int = 0
    ) -> dict[str, Any]:
        """The first message of a topic for which is_so is true."""

        def found() -> dict[str, Any] | None:
            return next((message for message in self.all(topic, since) if is_so(message)), None)

        message: dict[str, Any] = self.wait_until(found, topic)
        return message

    def call(self, service: str, text: str | None = None) -> dict[str, Any]:
        since = self.mark()
        self.tell(do="call", service=service, text=text)
        return self.wait_for(service, since=since)


@contextlib.contextmanager
def node_process(environment: dict[str, str], folder: Path, *arguments: str) -> Iterator[LineProcess]:
    """`edge-agent ros2`. Ends it when the block ends."""
    command = [ros_python(), "-m", "edge_agent.cli.main", "ros2", "--runtime-dir", str(folder), *arguments]
    node = LineProcess(command, environment)
    try:
        yield node
    finally:
        node.close()
