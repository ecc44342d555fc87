"""All checks, in the order in which a reader wants them, and the exit status that they mean."""

from __future__ import annotations

import os
from collections.abc import Callable

from edge_agent.doctor import accelerator, camera, hardware, memory, service, storage
from edge_agent.doctor.finding import Finding
from edge_agent.doctor.machine import Machine

Check = Callable[[Machine], Finding | None]
CHECKS: tuple[Check, ...] = (
    *hardware.CHECKS,
    *accelerator.CHECKS,
    *memory.CHECKS,
    *camera.CHECKS,
    *storage.CHECKS,
    *service.CHECKS,
)
EX_WARNED = 1
STATUSES = {"pass": 0, "warn": EX_WARNED, "fail": os.EX_CONFIG}


def examine(machine: Machine) -> list[Finding]:
    """What was found. A check of something that this machine does not have, or does not tell, is left out."""
    return [finding for check in CHECKS if (finding := check(machine)) is not None]


def exit_status(findings: list[Finding]) -> int:
    """0: everything passed; 1: there are warnings; 78: something failed."""
    return max((STATUSES[finding.state] for finding in findings), default=0)
