"""From an empty environment to a running controller: at most 15 seconds and two dependencies."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.harness import ROOT, wheels
from tests.harness.fake_daemon import FakeDaemon, make_action

MAX_S = 15.0

pytestmark = pytest.mark.promise


def test_an_empty_environment_runs_a_controller_within_15_s(tmp_path: Path):
    """Wheels of msgspec and pyzmq come from the disk, as from pip's cache; ours is built from the tree."""
    for name in ("msgspec", "pyzmq"):
        wheels.repack(name, tmp_path)
    start_s = time.monotonic()
    wheels.build_wheel(tmp_path)
    wheels.install(tmp_path, tmp_path / "environment", "edge-agent")
    installed_s = time.monotonic() - start_s
    python = tmp_path / "environment" / "bin" / "python"
    command = [python, ROOT / "examples" / "controller.py", "--runtime-dir", tmp_path]
    with FakeDaemon(tmp_path) as daemon, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        daemon.wait_for_subscriber("actions")
        for seq, line in enumerate(process.stdout, 1):
            if " move " in line:
                break
            values = dict.fromkeys(("forward_m_s", "right_m_s", "down_m_s", "yaw_rate_rad_s"), 0.0)
            daemon.publish("actions", make_action(seq, valid_ms=1000, type="move", values=values))
        running_s = time.monotonic() - start_s
        process.kill()
    code = "from importlib.metadata import requires; print(sum('extra' not in r for r in requires('edge-agent')))"
    n = int(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    print(json.dumps({"promise": "install", "installed_s": round(installed_s, 1), "controller_s": round(running_s, 1),
                      "dependencies": n}))  # fmt: skip
    assert n == 2
    assert running_s <= MAX_S
