"""How the daemon ends itself: the exit status and the line that says why.

    0   asked to stop
    1   the model process never gets ready: systemd starts the whole daemon again
    69  no camera yet: systemd starts the daemon again
    78  the configuration, the bundle or the camera source is wrong: systemd does not start the daemon again

FAULTS in edge_agent/errors.py says which fault ends the daemon with which status.

After READY the daemon never ends with 69 or 78. A running vehicle must not lose its agent for good.
"""

from __future__ import annotations

from edge_agent.errors import FAULTS, FaultName

EX_STOPPED = 0


class Shutdown(Exception):
    """Leave the loop. fault: the row of FAULTS; None: the daemon was asked to stop. line: why; status: the exit status
    of the process."""

    def __init__(self, fault: FaultName | None = None, line: str = "") -> None:
        super().__init__(line)
        self.status = EX_STOPPED if fault is None else FAULTS[fault].exit_status
        self.line = line
