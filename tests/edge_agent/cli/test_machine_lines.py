"""What `edge-agent check` says about the machine: how many threads, how much memory, and which limit decides."""

from __future__ import annotations

import msgspec
import pytest

from edge_agent.bundle import gpu_memory
from edge_agent.bundle.manifest import read_manifest
from edge_agent.bundle.memory_plan import Gpu
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


def test_the_memory_of_a_card_has_a_line_of_its_own(toy_bundle, monkeypatch, capsys):
    manifest = read_manifest(toy_bundle).manifest
    monkeypatch.setattr("edge_agent.board.health.mem_available_mib", lambda: 9000.0)
    monkeypatch.setattr(gpu_memory, "probe_gpu", lambda config: Gpu(free_mib=2000.0, own_memory=True))
    assert _check_memory(CONFIG, manifest) == 0
    machine, card = capsys.readouterr().out.splitlines()
    assert machine.endswith("9000 MiB available") and "language model" not in machine
    assert "of the GPU: " in card and "language model" in card and card.endswith("2000 MiB available")
    monkeypatch.setattr(gpu_memory, "probe_gpu", lambda config: Gpu(free_mib=500.0, own_memory=True))
    assert _check_memory(CONFIG, manifest) != 0
    assert "GPU memory: " in capsys.readouterr().out
