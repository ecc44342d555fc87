"""edge-agent doctor: what is wrong with this machine, one line for each check, and what to do about it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import msgspec

from edge_agent.apps.wire_log import printable
from edge_agent.cli.check import probe_camera
from edge_agent.cli.daemon import read_config
from edge_agent.config import CameraConfig, Config, load_config_text
from edge_agent.doctor.collect import this_machine
from edge_agent.doctor.examine import examine, exit_status
from edge_agent.doctor.finding import Finding
from edge_agent.doctor.machine import CameraAnswer, LocalFiles, Machine, saved_answers
from edge_agent.doctor.unit import installed_unit
from edge_agent.errors import ConfigError


def doctor(arguments: argparse.Namespace) -> int:
    """Returns the exit status: 0, 1 with warnings, 78 with failures."""
    machine = saved_machine(Path(arguments.root), arguments.config) if arguments.root else _this(arguments)
    findings = examine(machine)
    status = exit_status(findings)
    if arguments.json:
        print(json.dumps({"exit_status": status, "checks": [msgspec.to_builtins(finding) for finding in findings]}))
    else:
        for finding in findings:
            print_finding(finding)
    return status


def print_finding(finding: Finding) -> None:
    word = {"pass": "ok", "warn": "WARN", "fail": "FAIL"}[finding.state]
    print(printable(f"{word:5} {finding.check:14} {finding.found}".rstrip()))
    if finding.remedy:
        print(printable(f"{'':20} -> {finding.remedy}"))


def _this(arguments: argparse.Namespace) -> Machine:
    if not (arguments.config or arguments.bundle or arguments.camera):
        return this_machine(None, _ask_camera)
    try:
        return this_machine(read_config(arguments), _ask_camera, arguments.config or "")
    except ConfigError as error:
        return this_machine(None, _ask_camera, arguments.config or "", str(error))


def _ask_camera(config: CameraConfig) -> CameraAnswer:
    probe = probe_camera(config)
    line = f"{config.source}: {probe.line}" if probe.is_open else probe.line
    return CameraAnswer(works=probe.is_open, line=line, formats=probe.formats, clock=probe.clock)


def saved_machine(root: Path, config_path: str | None = None) -> Machine:
    """A copy of another machine's files. config_path: on that machine; None: the one that its unit names.

    Raises ConfigError.
    """
    files, answers = LocalFiles(root), saved_answers(root)
    unit = installed_unit(Machine(files, answers))
    path = config_path or (unit.config_path if unit is not None else "")
    config: Config | None = None
    error = ""
    if path and files.mode(path) is not None:
        try:
            config = load_config_text(files.read(path), path)
        except ConfigError as wrong:
            error = str(wrong)
    elif config_path:
        error = f"{path}: no such file below {root}"
    return Machine(files, answers, config, path if config is not None else "", error)


HANDLERS = {"doctor": doctor}
