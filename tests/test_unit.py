"""The units stay valid and hard, and the commented configuration stays true."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess

import msgspec
import pytest
import yaml

from edge_agent.config import Config, WatchdogConfig, load_config
from edge_agent.strict_yaml import convert
from edge_agent.supervisor.process import DESCRIPTORS
from edge_agent.systemd import MARGIN_S
from tests.harness import ROOT

SYSTEMD = ROOT / "systemd"
has_analyze = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")


MAX_EXPOSURE = {"edge-agent.service": 1.0, "edge-agent-mavlink.service": 1.5}  # the bridge has serial ports and UDP


@pytest.fixture(params=MAX_EXPOSURE)
def unit(request, tmp_path):
    """The unit with a program that exists here: `systemd-analyze verify` checks that the program exists."""
    text = (SYSTEMD / request.param).read_text()
    path = tmp_path / request.param
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
    assert exposure <= MAX_EXPOSURE[unit.name]


# The second half of /proc/devices never counts: block devices have names of their own.
BLOCK = "\nBlock devices:\n  7 loop\n  8 sd\n259 blkext\n"
ALWAYS = "Character devices:\n  1 mem\n  4 tty\n 10 misc\n 13 input\n 29 fb\n 81 video4linux\n 89 i2c\n153 spi\n"
OTHERS = "180 usb\n188 ttyUSB\n226 drm\n239 hidraw\n250 watchdog\n251 rtc\n254 gpiochip\n"
# Character devices that CUDA opens, by system, as the drivers name them in /proc/devices.
GPU_DEVICES = {
    "Orin, JetPack 5": ("nvhost", "nvhost-gpu", "nvhost-as-gpu", "nvhost-ctrl-gpu", "17000000.ga10b", "nvgpu"),
    "Orin, JetPack 6": ("nvhost-ctrl", "host1x-fence", "17000000.gpu"),
    "Thor, JetPack 7": ("nvhost-ctrl", "host1x-fence", "nvidia", "nvidiactl", "nvidia-uvm", "nvidia-caps"),
    "Xavier, JetPack 5": ("nvhost", "17000000.gv11b"),
    "TX2, JetPack 4": ("nvhost", "17000000.gp10b"),
    "driver 470": ("nvidia-frontend", "nvidia-uvm", "nvidia-caps", "nvidia-nvswitch"),
    "driver 535": ("nvidia-frontend", "nvidia-uvm", "nvidia-caps"),
    "driver 550": ("nvidia", "nvidiactl", "nvidia-uvm", "nvidia-caps", "nvidia-caps-imex-channels"),
}


def allowed_devices(proc_devices: str) -> set[str]:
    """Names of the character devices that the unit allows, by systemd's rule: a name or a pattern of fnmatch."""
    unit = (SYSTEMD / "edge-agent.service").read_text()
    patterns = re.findall(r"^DeviceAllow=char-(\S+) rw$", unit, re.MULTILINE)
    names = re.findall(r"^ *[0-9]+ (\S+)$", proc_devices.partition("\nBlock devices:")[0], re.MULTILINE)
    return {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}


@pytest.mark.parametrize("system", GPU_DEVICES)
def test_the_gpu_and_the_cameras_are_allowed_and_nothing_else(system):
    gpu = GPU_DEVICES[system]
    table = ALWAYS + OTHERS + "".join(f"{500 + n} {name}\n" for n, name in enumerate(gpu)) + BLOCK
    assert allowed_devices(table) == {"video4linux", "drm", *gpu}


def test_a_device_that_shares_its_number_with_others_is_allowed_by_path():
    """systemd knows no patterns in paths: a path with one would allow nothing, without a word."""
    unit = (SYSTEMD / "edge-agent.service").read_text()
    paths = re.findall(r"^DeviceAllow=(/\S+) rw$", unit, re.MULTILINE)
    assert paths == ["/dev/nvmap"] and "DeviceAllow=char-misc" not in unit
    assert unit.count("\nDeviceAllow=") == unit.count("\nDeviceAllow=char-") + len(paths)


def test_contract_with_the_supervisor():
    text = (SYSTEMD / "edge-agent.service").read_text()
    for line in (
        "Type=notify",
        "WatchdogSec=15",
        "RestartPreventExitStatus=2 78",
        "KillMode=mixed",
        "TimeoutStopSec=5",
        "RuntimeDirectoryPreserve=restart",  # the file of a pause
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
