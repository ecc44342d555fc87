"""Checks of the installation: configuration, unit and drop-ins, groups, clock, and what other runs left."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from edge_agent.doctor.accelerator import has_gpu
from edge_agent.doctor.finding import Finding, failed, passed, warned
from edge_agent.doctor.hardware import is_container, jetson
from edge_agent.doctor.machine import Machine, to_number
from edge_agent.doctor.unit import NAME, Unit, installed_unit, seconds, size_mib

RELOAD = "then sudo systemctl daemon-reload && sudo systemctl restart edge-agent"
CONFIG, PROGRAM, STATE = "/etc/edge-agent.yaml", "/opt/edge-agent", "/var/lib/edge-agent"
RUNTIME_FOLDER = "/run/edge-agent"
OLDEST_YEAR = 2025  # of this software; a clock before it was never set
SOCKETS = ("actions", "text", "status", "control")
CHILDREN = ("edge_agent.camera", "edge_agent.model")


def configuration(machine: Machine) -> Finding | None:
    """The file can be read, and its bundle is right."""
    if machine.config_error:
        return failed("configuration", machine.config_error, "edge-agent check --config FILE shows every fault")
    if machine.config is None:
        return None
    if machine.answers.bundle_error:
        remedy = "build or copy the bundle again, or correct `bundle`"
        if machine.answers.bundle_error.endswith("Permission denied"):
            remedy = "sudo edge-agent doctor: this user may not read it, the daemon's may"
        return failed("configuration", machine.answers.bundle_error, remedy)
    return passed("configuration", machine.config_path or "from the arguments")


# -- the unit ---------------------------------------------------------------------------------------------------------


def unit(machine: Machine) -> Finding | None:
    """Installed, enabled, with a program and a user that exist."""
    found = installed_unit(machine)
    if found is None:
        if is_container(machine) or not any(map(machine.exists, (CONFIG, PROGRAM, STATE))):
            return passed("unit", "not installed: edge-agent is no service here")
        remedy = "sudo sh systemd/install.sh in the folder of this project (docs/jetson.md)"
        return warned("unit", f"{NAME} is not installed", remedy)
    if found.is_masked:
        return failed("unit", f"{found.path}: masked, systemd does not start it", "sudo systemctl unmask edge-agent")
    command = found.command
    n_commands = len(found.settings.get("ExecStart", []))
    if n_commands != 1:
        remedy = f"in the drop-in, write an empty line ExecStart= before the new one, {RELOAD}"
        return failed("unit", f"{n_commands} lines ExecStart, expected 1", remedy)
    program = command[0].lstrip("-+!:@") if command else ""
    if not program or (program.startswith("/") and not machine.exists(program)):
        return failed(
            "unit",
            f"ExecStart: {program or 'a line that cannot be read'}: no such program",
            f"install it there, or correct ExecStart, {RELOAD}",
        )
    if found.config_path and not machine.exists(found.config_path):
        remedy = f"sudo cp systemd/edge-agent.yaml {found.config_path}, then set camera.source and bundle"
        return failed("unit", f"{found.config_path}: no such configuration", remedy)
    user = found.last("User", "root")
    users = {line.partition(":")[0] for line in machine.read("/etc/passwd").splitlines()}
    if users and user not in users and not user.isdigit() and not found.is_on("DynamicUser"):
        return failed(
            "unit",
            f"User={user}: no such user",
            "sudo sh systemd/install.sh in the folder of this project makes it",
        )
    wants = [f"{folder}/{target}.wants/{NAME}" for folder in ("/etc/systemd/system", "/usr/lib/systemd/system")
             for target in ("multi-user.target", "default.target", "graphical.target")]  # fmt: skip
    if not any(machine.files.target(path) is not None or machine.exists(path) for path in wants):
        return warned(
            "unit", f"{found.path}: not enabled: it does not start with the machine", "sudo systemctl enable edge-agent"
        )
    names = ", ".join(path.rsplit("/", 1)[1] for path in found.drop_ins)
    return passed("unit", found.path + (f" with {names}" if names else ""))


def drop_ins(machine: Machine) -> Finding | None:
    """Settings with which the daemon cannot work."""
    found = installed_unit(machine)
    if found is None or found.is_masked:
        return None
    for problem in (_devices, _folders, _limits, _watchdog):
        if (finding := problem(found, machine)) is not None:
            return finding
    return passed("unit settings", f"{len(found.drop_ins)} drop-ins")


def _devices(found: Unit, machine: Machine) -> Finding | None:
    gpu = has_gpu(machine) or jetson(machine) is not None
    if found.is_on("PrivateDevices"):
        return failed(
            "unit settings", "PrivateDevices=yes hides cameras and the GPU", f"remove it from the drop-in, {RELOAD}"
        )
    if found.is_on("MemoryDenyWriteExecute") and gpu:
        remedy = f"remove it from the drop-in, {RELOAD}"
        return failed("unit settings", "MemoryDenyWriteExecute=yes: CUDA cannot start", remedy)
    if found.last("DevicePolicy") in ("closed", "strict"):
        allowed = " ".join(found.settings.get("DeviceAllow", []))
        if "video4linux" not in allowed and "/dev/video" not in allowed:
            return failed(
                "unit settings", "DeviceAllow= has no cameras", f"add DeviceAllow=char-video4linux rw, {RELOAD}"
            )
        if gpu and "nv" not in allowed and ".gpu" not in allowed:
            return failed(
                "unit settings", "DeviceAllow= has no GPU", f"copy the lines DeviceAllow= of systemd/{NAME}, {RELOAD}"
            )
    return None


def _folders(found: Unit, machine: Machine) -> Finding | None:
    config = machine.config
    if config is None:
        return None
    source = config.camera.source
    if "nvargus" in source and found.last("PrivateTmp", "no").lower() not in ("no", "false", "off", "0"):
        remedy = f"sudo sh systemd/install.sh --csi in the folder of this project, {RELOAD}"
        return failed("unit settings", "PrivateTmp=yes hides the socket of the CSI cameras", remedy)
    hidden = found.last("ProtectHome", "no").lower() in ("yes", "true", "on", "1", "tmpfs")
    for path in (config.bundle, *config.trusted_keys, *config.language.adapters.values(), source):
        if hidden and path.startswith(("/home/", "/root/", "/run/user/")):
            return failed(
                "unit settings", f"ProtectHome= hides {path}", f"move it below {STATE}, and correct the configuration"
            )
        if "nvargus" not in source and path.startswith("/tmp/") and found.is_on("PrivateTmp"):
            return failed(
                "unit settings", f"PrivateTmp=yes hides {path}", f"move it below {STATE}, and correct the configuration"
            )
    return None


def _limits(found: Unit, machine: Machine) -> Finding | None:
    needed_mib = machine.answers.needed_mib
    for key in ("MemoryMax", "MemoryHigh", "MemoryLimit", "LimitAS"):
        allowed_mib = size_mib(found.last(key))
        if allowed_mib is not None and needed_mib is not None and allowed_mib < needed_mib:
            found_text = f"{key}={found.last(key)}, and the bundle needs about {needed_mib:.0f} MiB"
            return failed("unit settings", found_text, f"raise {key}=, or use a smaller bundle, {RELOAD}")
    quota = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)%", found.last("CPUQuota"))
    if quota:
        n_threads = machine.config.cpu_threads if machine.config is not None else 0
        if float(quota.group(1)) < 100 * max(1, n_threads):
            remedy = f"raise CPUQuota=, or lower cpu_threads, {RELOAD}"
            return warned("unit settings", f"CPUQuota={quota.group(0)} for {n_threads or 'at least 1'} threads", remedy)
    if machine.config is not None and machine.config.advanced.mlock and found.last("LimitMEMLOCK") != "infinity":
        return warned("unit settings", "advanced.mlock without LimitMEMLOCK=infinity", f"add it in a drop-in, {RELOAD}")
    return None


def _watchdog(found: Unit, machine: Machine) -> Finding | None:
    if found.last("Type") not in ("notify", "notify-reload"):
        remedy = f"remove Type= from the drop-in, {RELOAD}"
        return failed(
            "unit settings", f"Type={found.last('Type') or 'simple'}: systemd does not hear the daemon", remedy
        )
    watchdog_s = seconds(found.last("WatchdogSec", "0"))
    stall_s = machine.config.watchdog.model_stall_s if machine.config is not None else 10.0
    if not watchdog_s:
        return warned(
            "unit settings",
            "no WatchdogSec=: a supervisor that hangs is not restarted",
            f"set WatchdogSec=15, {RELOAD}",
        )
    if watchdog_s <= stall_s:
        found_text = (
            f"WatchdogSec={found.last('WatchdogSec')} is not longer than watchdog.model_stall_s ({stall_s:g} s)"
        )
        return failed("unit settings", found_text, f"set WatchdogSec={stall_s + 5:g}, {RELOAD}")
    return None


# -- user, clock, leftovers -------------------------------------------------------------------------------------------


def user_groups(machine: Machine) -> Finding | None:
    """Cameras belong to group video, the GPU of a Jetson to video and render; a card of a PC is open to all."""
    found = installed_unit(machine)
    user = found.last("User", "root") if found is not None else machine.answers.user
    if not user:
        return None
    if user == "root":
        return passed("groups", "root")
    rows = [line.split(":") for line in machine.read("/etc/group").splitlines() if line.count(":") >= 3]
    members = {row[0]: row[3].split(",") for row in rows}
    primary = next((line.split(":")[3] for line in machine.read("/etc/passwd").splitlines()
                    if line.startswith(f"{user}:") and line.count(":") >= 4), None)  # fmt: skip
    own = {name for name, users in members.items() if user in users} | {row[0] for row in rows if row[2] == primary}
    if found is not None:
        by_number = {row[2]: row[0] for row in rows}
        groups = (*found.words("SupplementaryGroups"), found.last("Group", user))
        own |= {by_number.get(group, group) for group in groups}
    has_camera = any(name.startswith("video") for name in machine.names("/dev"))
    may_open = found is None and machine.answers.may_open_cameras is True
    is_jetson = jetson(machine) is not None
    wanted = {"video"} if is_jetson or (has_camera and not may_open) else set()
    if is_jetson and "render" in members and has_gpu(machine):
        wanted |= {"render"}
    missing = sorted(wanted & members.keys() - own)
    if missing:
        remedy = f"sudo usermod -aG {','.join(missing)} {user}, then log in again"
        if found is not None:
            remedy = f"add SupplementaryGroups={' '.join(missing)} to a drop-in, {RELOAD}"
        return failed("groups", f"{user} is not in {', '.join(missing)}: no camera, or no GPU", remedy)
    return passed("groups", f"{user}: {', '.join(sorted(wanted & own)) or 'no device needs one'}")


def clock(machine: Machine) -> Finding | None:
    """Time of day, for recordings only: ages and deadlines use another clock."""
    year, synchronised = machine.answers.year, machine.answers.clock_synchronised
    if machine.exists("/run/systemd/timesync/synchronized"):
        synchronised = True
    if year is not None and year < OLDEST_YEAR:
        remedy = "sudo date -s 'YEAR-MONTH-DAY HOURS:MINUTES', then sudo hwclock -w; replace the battery of the clock"
        return warned("clock", f"this machine is in the year {year}: recordings get wrong dates", remedy)
    if synchronised is None or is_container(machine):  # a container cannot set the machine's clock
        return None
    if not synchronised:
        remedy = "sudo timedatectl set-ntp true while there is a network; or chrony with a GPS receiver"
        return warned("clock", "not synchronised: dates of recordings may be wrong; actions do not use it", remedy)
    return passed("clock", "synchronised")


def leftovers(machine: Machine) -> Finding | None:
    """Children without a daemon, sockets that nobody has, a pause that is still in force."""
    orphans, daemons, n_processes = [], 0, 0
    is_first = "run" in machine.read("/proc/1/cmdline").split("\0")  # in a container the daemon can be process 1
    for name in machine.names("/proc"):
        if to_number(name) is None or to_number(name) in machine.answers.own_pids:
            continue
        n_processes += 1
        words = machine.read(f"/proc/{name}/cmdline").split("\0")
        status = machine.read(f"/proc/{name}/status")
        parent = re.search(r"^PPid:\s+([0-9]+)$", status, re.MULTILINE)
        if any(child in words for child in CHILDREN):
            state = re.search(r"^State:\s+(\S)", status, re.MULTILINE)
            stuck = state is not None and state.group(1) == "D"
            if stuck or (parent is not None and not is_first and _takes_orphans(parent.group(1), machine)):
                orphans.append(f"{name}{' (in a driver call)' if stuck else ''}")
        daemons += _is_daemon(words)
    if orphans:
        remedy = f"kill -9 {orphans[0].split()[0]}; if it stays, replug the camera or restart the machine"
        return warned("leftovers", f"processes of a daemon that is gone: {', '.join(orphans)}", remedy)
    if daemons > 1:
        return warned(
            "leftovers", f"{daemons} daemons run", "stop all but one: they share camera, memory and processors"
        )
    folder = (machine.config.runtime_dir if machine.config is not None else "") or RUNTIME_FOLDER
    is_running = machine.answers.listening
    if is_running is None:
        is_running = daemons > 0 or not n_processes  # a saved machine without processes does not tell
    sockets = [name for name in machine.names(folder) if name in SOCKETS]
    if machine.exists(f"{folder}/paused") and not is_running:
        return warned("leftovers", f"{folder}/paused: the next daemon starts paused", "edge-agent resume, when it runs")
    if sockets and not is_running:
        return warned(
            "leftovers",
            f"{folder}: sockets of a daemon that is gone",
            "none needed: the next daemon replaces them; if it does not, remove the folder",
        )
    if machine.is_open_to_all(folder):
        return failed("leftovers", f"{folder}: everybody may write to it", f"sudo chmod 750 {folder}")
    return passed("leftovers", "none" if not daemons and not machine.answers.listening else "a daemon runs")


def _is_daemon(words: list[str]) -> bool:
    """Whether the words of a command are `[python] edge-agent run`, and not those of sudo or docker around it."""
    program = PurePosixPath(words[0]).name
    rest = words[1:] if program.startswith("python") else words
    return PurePosixPath(rest[0] if rest else "").name == "edge-agent" and rest[1:2] == ["run"]


def _takes_orphans(pid: str, machine: Machine) -> bool:
    """Whether a parent is one that the kernel gives to processes whose own has ended: init, or a user's systemd."""
    return pid == "1" or PurePosixPath(machine.read(f"/proc/{pid}/cmdline").split("\0")[0]).name == "systemd"


CHECKS = (configuration, unit, drop_ins, user_groups, clock, leftovers)
