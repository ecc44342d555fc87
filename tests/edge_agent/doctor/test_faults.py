"""`edge-agent doctor` on eight machines: no false alarm on the healthy ones, and every planted fault is found."""

from __future__ import annotations

import stat

import pytest

from edge_agent.doctor.examine import examine, exit_status
from edge_agent.doctor.machine import Answers, CameraAnswer, DiskAnswer
from edge_agent.doctor.unit import NAME
from tests.harness import boards
from tests.harness.board_faults import BOARD_FAULTS, UNIT_FILE, Fault, onnx, service
from tests.harness.boards import AGX_ORIN, CONTAINER, ORIN_NANO, ORIN_NX, PC, PC_WITH_CARD, RASPBERRY_PI, THOR

INSTALLATION_FAULTS: dict[str, Fault] = {
    # -- found by a reviewer with other drop-ins
    "a masked unit": Fault(PC, {"files": {UNIT_FILE: "->/dev/null"}}, "unit", "fail", "systemctl unmask"),
    "too little memory, with a fraction": Fault(
        PC, {"files": service("MemoryMax=1.5G")}, "unit settings", "fail", "MemoryMax=1.5G"
    ),
    "a soft limit of addresses": Fault(
        PC, {"files": service("LimitAS=1G:200G")}, "unit settings", "fail", "LimitAS=1G:200G"
    ),
    "a quota with a fraction": Fault(
        PC, {"files": service("CPUQuota=12.5%")}, "unit settings", "warn", "CPUQuota=12.5%"
    ),
    "private devices in one letter": Fault(
        PC, {"files": service("PrivateDevices=y")}, "unit settings", "fail", "PrivateDevices"
    ),
    "two daemons, and what started them": Fault(
        PC,
        {
            "files": {
                "/proc/4001/cmdline": "/usr/bin/python3\0/opt/edge-agent/.venv/bin/edge-agent\0run\0",
                "/proc/4002/cmdline": "sudo\0edge-agent\0run\0",
                "/proc/4003/cmdline": "edge-agent\0run\0",
            }
        },
        "leftovers",
        "warn",
        "2 daemons run",
    ),
    "a camera process of a daemon that is gone, under a user's systemd": Fault(
        PC,
        {
            "files": {
                "/proc/900/cmdline": "/usr/lib/systemd/systemd\0--user\0",
                "/proc/901/cmdline": "python\0-m\0edge_agent.camera\0",
                "/proc/901/status": "State:\tS (sleeping)\nPPid:\t900\n",
            }
        },
        "leftovers",
        "warn",
        "kill -9 901",
    ),
    "a bundle that this user may not read": Fault(
        PC,
        {"bundle_error": "/var/lib/edge-agent/bundle: Permission denied"},
        "configuration",
        "fail",
        "sudo edge-agent doctor",
    ),
    # -- camera
    "no pusher": Fault(
        PC,
        {
            "config": boards.CONFIG.replace("/dev/video0", "zmq:ipc:///run/edge-agent/frames"),
            "camera": CameraAnswer(works=False, line="stalled: ipc:///run/edge-agent/frames: no frame for 2 s"),
        },
        "camera",
        "warn",
        "FramePusher",
    ),
    "no runtime folder for pushed frames yet": Fault(
        PC,
        {
            "config": boards.CONFIG.replace("/dev/video0", "zmq:ipc:///run/edge-agent/frames"),
            "camera": CameraAnswer(works=False, line="absent: /run/edge-agent/frames: cannot be bound: No such file"),
            "files": {"/run/edge-agent/actions": None, "/run/edge-agent/control": None},
        },
        "camera",
        "warn",
        "start the daemon",
    ),
    "a runtime folder that frames cannot be pushed to": Fault(
        PC,
        {
            "config": boards.CONFIG.replace("/dev/video0", "zmq:ipc:///run/edge-agent/frames"),
            "camera": CameraAnswer(works=False, line="absent: cannot be bound: Permission denied"),
        },
        "camera",
        "fail",
        "Permission denied",
    ),
    "no folder for pushed frames": Fault(
        PC,
        {
            "config": boards.CONFIG.replace("/dev/video0", "zmq:ipc:///run/other/frames"),
            "camera": CameraAnswer(works=False, line="absent: /run/other/frames: cannot be bound: No such file"),
        },
        "camera",
        "fail",
        "cannot be bound",
    ),
    "no camera": Fault(ORIN_NANO, {"files": {"/dev/video0": None}}, "camera", "fail", "no such device"),
    "a camera that fails": Fault(
        PC,
        {"camera": CameraAnswer(works=False, line="busy: /dev/video0: another process uses it")},
        "camera",
        "fail",
        "another process uses it",
    ),
    "a raw sensor": Fault(
        RASPBERRY_PI,
        {"camera": CameraAnswer(works=False, line="unreadable", formats=("pBAA", "RG10"))},
        "camera",
        "fail",
        "gst:",
    ),
    "another clock": Fault(
        AGX_ORIN,
        {"camera": CameraAnswer(works=True, line="640x480", formats=("YUYV",), clock="arrival")},
        "camera",
        "warn",
        "another clock",
    ),
    "no CSI daemon": Fault(ORIN_NX, {"files": {"/tmp/argus_socket": None}}, "camera", "fail", "nvargus-daemon"),
    "a device without rights": Fault(PC, {"modes": {"/dev/video0": stat.S_IFCHR | 0o600}}, "camera", "fail", "udev"),
    # -- disk, keys, rights
    "a full disk": Fault(
        RASPBERRY_PI, {"disks": {"/": DiskAnswer(total_mib=30_000, free_mib=12)}}, "disk", "fail", "full"
    ),
    "a disk almost full": Fault(
        PC, {"disks": {"/": DiskAnswer(total_mib=30_000, free_mib=300)}}, "disk", "warn", "300 of 30000"
    ),
    "a read-only disk": Fault(
        AGX_ORIN,
        {"disks": {"/": DiskAnswer(total_mib=30_000, free_mib=9000, read_only=True)}},
        "disk",
        "fail",
        "read-only",
    ),
    "no more files": Fault(
        PC, {"disks": {"/": DiskAnswer(total_mib=30_000, free_mib=9000, free_files=3)}}, "disk", "fail", "3 more files"
    ),
    "a worn eMMC": Fault(AGX_ORIN, {"files": boards.emmc("0x0b 0x05", "0x03")}, "wear", "fail", "replace"),
    "an eMMC near its end": Fault(AGX_ORIN, {"files": boards.emmc("0x09 0x05")}, "wear", "warn", "90 %"),
    "no key": Fault(ORIN_NANO, {"files": {"/etc/edge-agent/fleet.pub": None}}, "keys", "fail", "no such file"),
    "a private key": Fault(
        ORIN_NANO, {"files": {"/etc/edge-agent/fleet.pub": "-----BEGIN PRIVATE KEY-----\n"}}, "keys", "fail", "new pair"
    ),
    "a key that others may change": Fault(
        PC, {"modes": {"/etc/edge-agent/fleet.pub": stat.S_IFREG | 0o666}}, "keys", "fail", "chmod o-w"
    ),
    "a bundle that others may change": Fault(
        PC, {"modes": {"/var/lib/edge-agent/bundle": stat.S_IFDIR | 0o777}}, "permissions", "fail", "chmod o-w"
    ),
    # -- installation
    "a wrong configuration": Fault(
        PC, {"config_error": "/etc/edge-agent.yaml: camera: unknown key 'sorce'"}, "configuration", "fail", "'sorce'"
    ),
    "a damaged bundle": Fault(
        ORIN_NANO,
        {"bundle_error": "/var/lib/edge-agent/bundle/vision.onnx: missing"},
        "configuration",
        "fail",
        "vision.onnx",
    ),
    "no unit": Fault(
        THOR,
        {"files": {UNIT_FILE: None, "/etc/systemd/system/multi-user.target.wants/edge-agent.service": None}},
        "unit",
        "warn",
        "is not installed",
    ),
    "a unit that is not enabled": Fault(
        PC,
        {"files": {"/etc/systemd/system/multi-user.target.wants/edge-agent.service": None}},
        "unit",
        "warn",
        "systemctl enable",
    ),
    "no program": Fault(
        PC, {"files": {"/opt/edge-agent/.venv/bin/edge-agent": None}}, "unit", "fail", "no such program"
    ),
    "no user": Fault(PC, {"files": {"/etc/passwd": "root:x:0:0::/root:/bin/sh\n"}}, "unit", "fail", "User=edge-agent"),
    "two commands": Fault(
        PC,
        {"files": service("ExecStart=/opt/edge-agent/.venv/bin/edge-agent run --config /etc/b.yaml")},
        "unit",
        "fail",
        "2 lines ExecStart",
    ),
    "PrivateDevices": Fault(PC, {"files": service("PrivateDevices=yes")}, "unit settings", "fail", "hides cameras"),
    "MemoryDenyWriteExecute": Fault(
        ORIN_NANO, {"files": service("MemoryDenyWriteExecute=true")}, "unit settings", "fail", "CUDA"
    ),
    "no GPU for the unit": Fault(
        ORIN_NX,
        {"files": service("DeviceAllow=", "DeviceAllow=char-video4linux rw")},
        "unit settings",
        "fail",
        "DeviceAllow= has no GPU",
    ),
    "CSI without its drop-in": Fault(
        ORIN_NX, {"files": {f"{UNIT_FILE}.d/csi.conf": None}}, "unit settings", "fail", "install.sh --csi"
    ),
    "a bundle at home": Fault(
        PC,
        {"config": "bundle: /home/me/bundle\ncamera: {source: /dev/video0}\n"},
        "unit settings",
        "fail",
        "ProtectHome",
    ),
    "MemoryMax": Fault(ORIN_NANO, {"files": service("MemoryMax=2G")}, "unit settings", "fail", "MemoryMax=2G"),
    "CPUQuota": Fault(PC, {"files": service("CPUQuota=50%")}, "unit settings", "warn", "CPUQuota=50%"),
    "a short watchdog": Fault(PC, {"files": service("WatchdogSec=8")}, "unit settings", "fail", "model_stall_s"),
    "no watchdog": Fault(PC, {"files": service("WatchdogSec=0")}, "unit settings", "warn", "WatchdogSec=15"),
    "Type=simple": Fault(PC, {"files": service("Type=simple")}, "unit settings", "fail", "does not hear"),
    "not in group video": Fault(
        PC,
        {"files": {**service("SupplementaryGroups="), "/etc/group": "video:x:44:\nedge-agent:x:998:\n"}},
        "groups",
        "fail",
        "edge-agent is not in video",
    ),
    "not in group render": Fault(
        ORIN_NANO,
        {
            "files": {
                **service("SupplementaryGroups=", "SupplementaryGroups=video"),
                "/etc/group": "video:x:44:\nrender:x:104:\nedge-agent:x:998:\n",
            }
        },
        "groups",
        "fail",
        "render",
    ),
    "no time": Fault(
        RASPBERRY_PI,
        {"files": {"/run/systemd/timesync/synchronized": None}, "clock_synchronised": False},
        "clock",
        "warn",
        "not synchronised",
    ),
    "1970": Fault(ORIN_NANO, {"year": 1970}, "clock", "warn", "1970"),
    "an orphan": Fault(
        PC,
        {
            "files": {
                "/proc/4711/cmdline": "python\0-m\0edge_agent.camera\0--slot\0" + "3\0",
                "/proc/4711/status": "Name:\tpython\nState:\tD (disk sleep)\nPPid:\t1\n",
            }
        },
        "leftovers",
        "warn",
        "4711 (in a driver call)",
    ),
    "two daemons": Fault(
        PC,
        {"files": {f"/proc/{pid}/cmdline": "python\0/x/bin/edge-agent\0run\0" for pid in (10, 11)}},
        "leftovers",
        "warn",
        "2 daemons",
    ),
    "an old pause": Fault(
        ORIN_NX, {"files": {"/run/edge-agent/paused": ""}, "listening": False}, "leftovers", "warn", "starts paused"
    ),
    "dead sockets": Fault(AGX_ORIN, {"listening": False}, "leftovers", "warn", "a daemon that is gone"),
    "an open runtime folder": Fault(
        PC, {"modes": {"/run/edge-agent": stat.S_IFDIR | 0o777}}, "leftovers", "fail", "chmod 750"
    ),
}


FAULTS = BOARD_FAULTS | INSTALLATION_FAULTS


def alarms(machine) -> dict[str, str]:
    return {finding.check: finding.state for finding in examine(machine) if finding.state != "pass"}


@pytest.mark.parametrize("board", boards.BOARDS, ids=lambda board: board.name)
def test_a_healthy_machine_has_no_alarm(board):
    findings = examine(board.machine())
    assert [finding for finding in findings if finding.state != "pass"] == []
    assert exit_status(findings) == 0
    assert len({finding.check for finding in findings}) == len(findings) >= 15
    assert all(finding.found or finding.check == "largest block" for finding in findings)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_with_a_remedy_and_nothing_else_is(name):
    fault = FAULTS[name]
    machine = fault.board.machine(**fault.planted)
    assert alarms(machine) == {fault.check: fault.state}
    findings = {finding.check: finding for finding in examine(machine)}
    found = findings[fault.check]
    assert fault.words in f"{found.found} {found.remedy}" and len(found.remedy) > 10
    assert "\n" not in found.found + found.remedy
    assert exit_status(list(findings.values())) == {"warn": 1, "fail": 78}[fault.state]


@pytest.mark.parametrize(
    "planted",
    [
        onnx(ORIN_NANO, error="ModuleNotFoundError: no onnxruntime"),
        onnx(ORIN_NANO, providers={"CPUExecutionProvider": ""}),
        onnx(ORIN_NANO, providers={"CPUExecutionProvider": "", "CUDAExecutionProvider": "it fell back"}),
    ],
)
def test_a_wrapped_bundle_needs_no_onnxruntime(planted):
    """It has no vision.onnx: mtmd encodes its images, or it is text-only."""
    assert alarms(ORIN_NANO.machine(**planted)) != {}
    assert alarms(ORIN_NANO.machine(**planted, has_vision_onnx=False)) == {}
    assert alarms(ORIN_NANO.machine(**planted, has_vision_onnx=True)) != {}


NO_UNIT = {UNIT_FILE: None, f"/etc/systemd/system/multi-user.target.wants/{NAME}": None}
DESKTOP_USER = {
    "/etc/passwd": "root:x:0:0:root:/root:/bin/bash\nalice:x:1000:1000::/home/alice:/bin/bash\n",
    "/etc/group": "root:x:0:\nvideo:x:44:\nrender:x:104:\nalice:x:1000:\n",
    "/dev/dri/renderD128": "",
    "/opt/edge-agent/.venv/bin/edge-agent": None,
    "/var/lib/edge-agent/bundle/bundle.json": None,
    "/run/edge-agent/actions": None,
    "/run/edge-agent/control": None,
}
NO_FAULTS: dict[str, tuple[boards.Fixture, dict]] = {
    "a desktop session opens the camera without a group": (
        PC_WITH_CARD,
        {
            "files": {**NO_UNIT, **DESKTOP_USER, boards.CONFIG_PATH: None},
            "config": "bundle: /home/alice/bundle\ncamera: {source: /dev/video0}\n",
            "user": "alice",
            "may_open_cameras": True,
            "listening": False,
        },
    ),
    "groups by number": (
        ORIN_NANO,
        {
            "files": service("SupplementaryGroups=", "SupplementaryGroups=44 104")
            | {"/etc/group": "root:x:0:\nvideo:x:44:\nrender:x:104:\nedge-agent:x:998:\n"}
        },
    ),
    "a watchdog in words": (PC, {"files": service("WatchdogSec=20seconds")}),
    "a unit that tells systemd of a reload": (PC, {"files": service("Type=notify-reload")}),
    "a daemon that sudo started": (
        PC, {"files": {"/proc/4002/cmdline": "sudo\0edge-agent\0run\0", "/proc/4003/cmdline": "edge-agent\0run\0"}}
    ),
    "a notification of a processor's package": (
        PC, {"files": boards.zone(7, "x86_pkg_temp", 52.0, passive=50)}
    ),
    "a sensor of a chip without a limit": (
        PC,
        {
            "files": {
                "/sys/class/hwmon/hwmon8/name": "coretemp\n",
                "/sys/class/hwmon/hwmon8/temp1_input": "52000\n",
                "/sys/class/hwmon/hwmon8/temp1_crit": "0\n",
                "/sys/class/hwmon/hwmon8/temp2_input": "-5000\n",
                "/sys/class/hwmon/hwmon8/temp2_crit": "100000\n",
            }
        },
    ),
    "a card that is not used": (
        PC,
        {
            "files": {
                "/sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
                "/sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
                "/proc/modules": "nouveau 2300000 1 - Live 0x0\n",
            },
            "config": boards.CONFIG + "language: {gpu_layers: 0}\n",
        },
    ),
    "a container that may not write to its own system": (
        CONTAINER, {"disks": {"/": DiskAnswer(total_mib=60_000, free_mib=30_000, read_only=True)}}
    ),
    "what was killed on a container's machine": (CONTAINER, {"files": {"/proc/vmstat": "oom_kill 5\n"}}),
    "a cooler that does not tell its step": (PC, {"files": boards.cooler(9, "Processor", -1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_FAULTS)
def test_what_only_looks_like_a_fault_is_none(name):
    board, planted = NO_FAULTS[name]
    assert alarms(board.machine(**planted)) == {}


def test_every_topic_has_a_planted_fault():
    checks = {finding.check for board in boards.BOARDS for finding in examine(board.machine())}
    assert checks == {fault.check for fault in FAULTS.values()}
    assert len(FAULTS) >= 40 and len(boards.BOARDS) == 8


@pytest.mark.parametrize("board", boards.BOARDS, ids=lambda board: board.name)
def test_without_any_file_nothing_is_reported_as_a_fault(board):
    """A machine that tells nothing is not a faulty one, and no check raises."""
    empty = board.machine(files=dict.fromkeys(board.files), config="")
    assert "fail" not in alarms(empty).values()


ODD_TEXTS = ("", "\0", "²", "-", "9" * 30, "a b c\n" * 50, "[Service\nExecStart='", "0x", "pmode:9", "1 2 3")


@pytest.mark.parametrize("board", (ORIN_NANO, RASPBERRY_PI, PC_WITH_CARD), ids=lambda board: board.name)
def test_any_text_in_any_file_is_survived(board):
    for i, path in enumerate(board.files):
        machine = board.machine({path: ODD_TEXTS[i % len(ODD_TEXTS)]})
        assert all(finding.state == "pass" or finding.remedy for finding in examine(machine))


def test_the_page_lists_every_check():
    page = (boards.ROOT / "docs" / "doctor.md").read_text()
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    listed = {name.strip() for row in rows for name in row.split(",")}
    assert {fault.check for fault in FAULTS.values()} <= listed


def test_a_saved_machine_without_answers_tells_what_its_files_tell():
    """A folder of files alone: the processor and a read-only disk are still found."""
    bare = boards.RASPBERRY_PI.files | {"/proc/mounts": "/dev/mmcblk0p2 / ext4 ro,noatime 0 0\n"}
    machine = boards.Fixture("bare", bare, Answers()).machine()
    assert alarms(machine) == {"disk": "fail"}
    read_only = {"/etc/fstab": "/dev/root / ext4 ro,noatime 0 1\n"}  # as its owner wants it
    assert alarms(boards.Fixture("bare", bare | read_only, Answers()).machine()) == {}
    old = boards.cpu(8, "powersave", "intel_pstate", 4_200_000, "fpu sse4_2")
    assert alarms(boards.Fixture("old", boards.PC.files | old, Answers()).machine()) == {"processor": "warn"}


@pytest.mark.parametrize("board", boards.BOARDS, ids=lambda board: board.name)
def test_without_answers_no_healthy_machine_has_an_alarm(board):
    assert alarms(board._replace(answers=Answers()).machine()) == {}
