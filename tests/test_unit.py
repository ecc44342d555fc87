"""The unit stays valid and hard, and the commented configuration stays true."""

from __future__ import annotations

import re
import shutil
import subprocess

import msgspec
import pytest
import yaml

from edge_agent.config import Config, WatchdogConfig, load_config
from edge_agent.strict_yaml import convert
from edge_agent.supervisor.process import DESCRIPTORS
from edge_agent.supervisor.systemd import MARGIN_S
from tests.harness import ROOT

SYSTEMD = ROOT / "systemd"
has_analyze = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")


@pytest.fixture
def unit(tmp_path):
    """The unit with a program that exists here: `systemd-analyze verify` checks that the program exists."""
    text = (SYSTEMD / "edge-agent.service").read_text()
    path = tmp_path / "edge-agent.service"
    path.write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", text))
    return path


@has_analyze
def test_systemd_analyze_verify_prints_no_warning(unit):
    # The exit status is 0 for unknown keys too, so the output must be empty.
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    ours = [line for line in done.stderr.splitlines() if "edge-agent" in line]
    assert (done.returncode, ours) == (0, [])


@has_analyze
def test_exposure(unit):
    done = subprocess.run(["systemd-analyze", "security", "--offline=true", unit], capture_output=True, text=True)
    if "Unknown" in done.stderr or "unrecognized" in done.stderr:
        pytest.skip("systemd before 250 cannot rate a unit offline")
    exposure = float(re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)[1])
    assert exposure <= 1.0


def test_contract_with_the_supervisor():
    text = (SYSTEMD / "edge-agent.service").read_text()
    for line in (
        "Type=notify",
        "WatchdogSec=15",
        "RestartPreventExitStatus=78",
        "KillMode=mixed",
        "TimeoutStopSec=5",
        f"LimitNOFILE={DESCRIPTORS}",
    ):
        assert f"\n{line}\n" in text


@pytest.mark.parametrize("name", ["bundle", "bundles", "adapters"])
def test_the_service_may_not_write_to_what_it_has_verified(name):
    """The StateDirectory is writable; the folder of the example's bundle and those of the documents are not."""
    text = (SYSTEMD / "edge-agent.service").read_text()
    (paths,) = re.findall(r"^ReadOnlyPaths=(.*)$", text, re.MULTILINE)
    read_only = {path.removeprefix("-") for path in paths.split()}
    assert f"/var/lib/edge-agent/{name}" in read_only
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", SYSTEMD / "edge-agent.yaml"]
    used = {f for page in pages for f in re.findall(r"/var/lib/edge-agent/\w+", page.read_text(encoding="utf-8"))}
    assert used <= read_only | {"/var/lib/edge-agent/tensorrt"}


def test_the_supervisor_restarts_a_stalled_model_before_systemd_restarts_the_daemon():
    interval_s = int(re.search(r"^WatchdogSec=(\d+)$", (SYSTEMD / "edge-agent.service").read_text(), re.MULTILINE)[1])
    assert interval_s >= WatchdogConfig().model_stall_s + MARGIN_S > WatchdogConfig().model_stall_s + interval_s / 4


def test_the_example_names_every_key_with_its_default():
    """Uncommented, the example is the default configuration; a key that is not in it, or not in the code, fails."""
    example = (SYSTEMD / "edge-agent.yaml").read_text()
    assert load_config(SYSTEMD / "edge-agent.yaml").bundle
    lines = [re.sub(r"^( *)# ([a-z]\w*:(?: \S.*)?)$", r"\1\2", line) for line in example.splitlines()]
    values = yaml.safe_load("\n".join(line for line in lines if not line.lstrip().startswith("#")))
    config = convert(values, Config, "example")
    for part in ("camera", "vision", "language", "task", "watchdog", "advanced"):
        fields = msgspec.structs.fields(type(getattr(config, part)))
        assert set(values[part]) == {field.name for field in fields}, part
        for field in fields:
            if field.default is not msgspec.NODEFAULT and field.default is not None:
                assert getattr(getattr(config, part), field.name) == field.default, f"{part}.{field.name}"
    assert set(values) == {field.name for field in msgspec.structs.fields(Config)}
