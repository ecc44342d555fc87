"""No program of this project makes an internet socket or writes below the home folder, and no CI variable helps it.

The kernel kills a process that asks for an internet socket. onnxruntime asks for one some seconds after its import, but
writes below the home folder at once.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest

from tests.harness import offline, rig, toy

HANG_S = 300.0
OFFLINE = [sys.executable, "-m", "tests.harness.offline", sys.executable]
PROBES = {
    "IPv4": "import socket; socket.socket(socket.AF_INET)",
    "IPv6": "import socket; socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
    "a name": "import socket; socket.getaddrinfo('example.invalid', 443)",
    "after exec": "import os, sys; os.execv(sys.executable, ['python', '-c', 'import socket; socket.socket()'])",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def run(home: Path, *command: object, variables: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A Python program under the filter."""
    return subprocess.run(
        [*OFFLINE, *map(str, command)],
        env=offline.environment(home) | (variables or {}),
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


def assert_clean(done: subprocess.CompletedProcess[str], home: Path) -> None:
    assert done.returncode == 0, done.stderr
    assert "SIGSYS" not in done.stderr
    assert [path for path in home.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("code", PROBES.values(), ids=PROBES)
def test_the_filter_ends_whoever_asks_for_an_internet_socket(home, code):
    assert run(home, "-c", code).returncode == -signal.SIGSYS


def test_building_checking_examining_and_measuring_a_bundle_use_no_network(home, tmp_path, toy_small):
    bundle = tmp_path / "bundle"
    (tmp_path / "pictures").mkdir()
    cv2.imwrite(str(tmp_path / "pictures" / "0.png"), toy.toy_image(112, 112, 0))
    assert_clean(run(home, "-m", "quantize.cli", "build", toy_small, bundle), home)
    here = ("--bundle", bundle)
    assert_clean(run(home, "-m", "edge_agent.cli.main", "check", *here, "--camera", tmp_path / "pictures"), home)
    assert_clean(run(home, "-m", "edge_agent.cli.main", "bench", *here, "--max-image-tokens", 32, "-n", 1), home)
    examined = run(home, "-m", "edge_agent.cli.main", "doctor", *here, "--camera", tmp_path / "pictures", "--json")
    assert "onnxruntime" in {row["check"] for row in json.loads(examined.stdout)["checks"]}
    assert "SIGSYS" not in examined.stderr + examined.stdout and list(home.iterdir()) == []


@contextlib.contextmanager
def serving(home: Path, bundle: Path, folder: Path, variables: dict[str, str]) -> Iterator[rig.Daemon]:
    """A daemon under the filter, when it answers frames. Afterwards: none of its processes was ended by the filter."""
    cv2.imwrite(str(folder / "0.png"), toy.toy_image(112, 112, 0))
    settings = {
        "bundle": str(bundle),
        "camera": {"source": str(folder), "realtime": False},
        "vision": {"max_image_tokens": 32},
        "task": {"deadline_ms": 60_000},
        "runtime_dir": str(folder),
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    command = [*OFFLINE, "-m", "edge_agent.cli.main", "run", "--config", str(folder / "config.yaml")]
    env = offline.environment(home) | variables
    with (folder / "log").open("wb") as log, subprocess.Popen(command, env=env, stderr=log) as process:
        try:
            running = rig.Daemon(process, folder, folder / "log")
            running.wait("running")
            yield running
            status = running.wait("running")
            assert (status.faults, status.model_worker.restarts, status.camera_worker.restarts) == ({}, 0, 0)
            assert running.stop() == 0
        finally:
            process.kill()
    assert "SIGSYS" not in running.log.read_text()
    assert list(home.iterdir()) == []


def test_the_three_processes_of_the_daemon_use_no_network(home, tmp_path_factory, toy_bundle):
    """Whatever the user's shell says: here it asks for telemetry."""
    shell = {"ORT_DISABLE_TELEMETRY": "0"}
    with serving(home, toy_bundle, tmp_path_factory.mktemp("r"), shell) as running, running.client() as client:
        assert next(client.actions(HANG_S)) is not None


@pytest.mark.soak
def test_a_daemon_that_serves_for_a_minute_uses_no_network(home, tmp_path_factory, toy_bundle):
    """onnxruntime begins to send about ten seconds after its start."""
    with serving(home, toy_bundle, tmp_path_factory.mktemp("r"), {}):
        time.sleep(60)
