"""Where the sockets are: the runtime folder and one path per stream."""

from __future__ import annotations

import os
from pathlib import Path


def runtime_dir(configured: str = "") -> Path:
    """The folder of the sockets, the same for the daemon and for a client on the same machine.

    systemd sets $RUNTIME_DIRECTORY for the unit; a client finds the unit's folder if it exists, else the one that a
    daemon started by hand by the same user makes.
    """
    if configured:
        return Path(configured)
    if os.environ.get("RUNTIME_DIRECTORY"):
        return Path(os.environ["RUNTIME_DIRECTORY"].split(":")[0])
    unit = Path("/run/edge-agent")
    if unit.is_dir() and os.access(unit, os.R_OK | os.X_OK):
        return unit
    return Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp")) / f"edge-agent-{os.getuid()}"


def endpoint(folder: Path, stream: str) -> str:
    return f"ipc://{folder}/{stream}"
