"""How the daemon ends itself: the exit status and the line that says why.

    0   asked to stop
    1   the model process never gets ready: systemd starts the whole daemon again
    69  no camera yet: systemd starts the daemon again
    78  the configuration, the bundle or the camera source is wrong: systemd does not start the daemon again

After READY the daemon never ends with 69 or 78. A running vehicle must not lose its agent for good.
"""

from __future__ import annotations

import os

EX_STOPPED = 0
EX_FAILED = 1
EX_UNAVAILABLE = os.EX_UNAVAILABLE
EX_CONFIG = os.EX_CONFIG


class Shutdown(Exception):
    """Leave the loop. status: the exit status of the process. line: why; empty when the daemon was asked to stop."""

    def __init__(self, status: int, line: str = "") -> None:
        super().__init__(line)
        self.status, self.line = status, line
