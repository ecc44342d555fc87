"""A daemon under a quota of processor time is as steady with its own number of threads as with one set by hand.

Needs two cores and a control group that this user may make. Prints one JSON line with its figures.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_agent.board.control_groups import groups
from tests.harness import ROOT, rig

TRIES = 3
N_ANSWERS = 100
MAX_RATIO = 1.2

pytestmark = pytest.mark.promise


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group with one processor's time."""
    for found in groups("cpu"):
        folder = Path(found.folder) / f"edge-agent-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            folder.mkdir()
            try:
                if found.version == 2:
                    (folder / "cpu.max").write_text("100000 100000")
                else:
                    (folder / "cpu.cfs_quota_us").write_text("100000")
                yield folder
                return
            finally:
                folder.rmdir()
    pytest.skip("this user may not make a control group with a quota")


def ages_ms(group: Path, bundle: Path, runtime: Path, cpu_threads: int) -> np.ndarray:
    """Ages of answers to the demo model's frames of 256 image tokens."""
    config = {
        "bundle": str(bundle),
        "camera": {"source": f"zmq:ipc://{runtime}/frames"},
        "cpu_threads": cpu_threads,
        "task": {"deadline_ms": 60_000},
    }
    with (
        rig.Pusher(f"ipc://{runtime}/frames", rate_hz=30.0, height=480, width=640),
        rig.daemon(runtime, config, wait=False) as running,
        running.client() as client,
    ):
        (group / "cgroup.procs").write_text(str(running.process.pid))  # before it starts its children
        running.wait("running")
        for _ in range(20):
            client.next_answer(30.0)
        return np.array([client.next_answer(30.0).age_ms for _ in range(N_ANSWERS)])


def test_the_default_is_as_steady_as_one_thread_under_a_quota_of_one_processor(group, build, tmp_path_factory, capsys):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    bundle = build(ROOT / "models" / "pad_pilot" / "checkpoint", "Q4_K_M")
    for _ in range(TRIES):
        p99_ms = {
            name: float(np.percentile(ages_ms(group, bundle, tmp_path_factory.mktemp("r"), threads), 99).round(1))
            for name, threads in (("one thread", 1), ("default", 0))
        }
        ratio = round(p99_ms["default"] / p99_ms["one thread"], 2)
        with capsys.disabled():
            print("\n" + json.dumps({"promise": "processor quota", "p99_age_ms": p99_ms, "ratio": ratio}))
        if ratio <= MAX_RATIO:
            return
    pytest.fail(f"{p99_ms}: expected at most {MAX_RATIO} times the age of one thread")
