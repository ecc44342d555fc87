"""What `edge-agent check` says about the machine: how many threads, how much memory, and which limit decides."""

from __future__ import annotations

import msgspec
import pytest

from edge_agent.bundle.manifest import read_manifest
from edge_agent.cli.check import _check_memory, _describe_threads
from edge_agent.config import CameraConfig, Config

CONFIG = Config(bundle="b", camera=CameraConfig(source="none"))


@pytest.mark.parametrize(
    ("cpu_threads", "quota", "expected"),
    [
        (0, None, "4 threads (4 cores allowed, no quota of processor time)"),
        (0, 1.5, "1 threads (4 cores allowed, a quota of 1.5 processors)"),
        (3, 1.0, "3 threads (cpu_threads)"),
    ],
)
def test_the_number_of_threads_and_its_reason(monkeypatch, cpu_threads, quota, expected):
    monkeypatch.setattr("edge_agent.board.control_groups.allowed_cores", lambda: 4)
    monkeypatch.setattr("edge_agent.board.control_groups.cpu_quota", lambda read=None: quota)
    assert _describe_threads(msgspec.structs.replace(CONFIG, cpu_threads=cpu_threads)) == expected


@pytest.mark.parametrize(
    ("left_mib", "available_mib", "words"),
    [
        (None, 900.0, "900 MiB available\n"),
        (2000.0, 900.0, "900 MiB available\n"),
        (600.0, 600.0, "600 MiB available, the limit of a control group\n"),
    ],
)
def test_the_limit_of_a_control_group_is_named(toy_bundle, monkeypatch, capsys, left_mib, available_mib, words):
    monkeypatch.setattr("edge_agent.board.control_groups.memory_left_mib", lambda: left_mib)
    monkeypatch.setattr("edge_agent.board.health.mem_available_mib", lambda: available_mib)
    assert _check_memory(CONFIG, read_manifest(toy_bundle).manifest) == 0
    assert words in capsys.readouterr().out
