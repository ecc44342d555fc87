"""Where the sockets are: the runtime folder, and one path for each stream."""

from __future__ import annotations

import os
from pathlib import Path

UNIT_FOLDER = Path("/run/edge-agent")  # RuntimeDirectory of systemd/edge-agent.service


def runtime_dir(configured: str = "") -> Path:
    """The folder of the sockets, the same for the daemon and for a client on the same machine.

    The first of these: `configured`; $RUNTIME_DIRECTORY, which systemd sets for the unit; /run/edge-agent, the folder
    of the unit, if this user can read it; a folder of this user below $XDG_RUNTIME_DIR, or below /tmp.
    """
    if configured:
        return Path(configured)
    if os.environ.get("RUNTIME_DIRECTORY"):
        return Path(os.environ["RUNTIME_DIRECTORY"].split(":")[0])
    if UNIT_FOLDER.is_dir() and os.access(UNIT_FOLDER, os.R_OK | os.X_OK):
        return UNIT_FOLDER
    return Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp")) / f"edge-agent-{os.getuid()}"


def endpoint(folder: Path, stream: str) -> str:
    """The ZeroMQ address of a stream, for example ipc:///run/edge-agent/actions."""
    return f"ipc://{folder}/{stream}"
