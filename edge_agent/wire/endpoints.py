"""Where the sockets are: the runtime folder, and one path for each stream."""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path

UNIT_FOLDER = Path("/run/edge-agent")  # RuntimeDirectory of systemd/edge-agent.service
CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


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
    return _own_folder()


def _own_folder() -> Path:
    return Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp")) / f"edge-agent-{os.getuid()}"


def why_unreachable(folder: Path, stream: str) -> str:
    """Why a client must not or cannot use a socket, in one line; "": it can, or no daemon has made the folder yet."""
    own = _own_folder()
    if folder == own and not os.path.lexists(own) and UNIT_FOLDER.is_dir():
        folder = UNIT_FOLDER  # runtime_dir() has passed over it: this user may not read it
    try:
        for found in (folder.lstat, folder.stat):  # who owns a link can lead it somewhere else at any moment
            status = found()
            if folder == own and status.st_uid not in (os.getuid(), 0):
                found_uid = f"found one of uid {status.st_uid}"
                return f"{folder}: expected a folder of uid {os.getuid()}, {found_uid}: not your daemon"
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if status.st_mode & stat.S_IWOTH:
        return f"{folder}: everybody may write to it, so anybody can pose as the daemon; use a folder of its user alone"
    is_open = os.access(folder, os.X_OK)
    if is_open and (not (folder / stream).exists() or os.access(folder / stream, os.W_OK)):
        return ""
    return f"{folder}: permission denied; join the group of this folder (gid {status.st_gid})"


def find_listener(path: Path) -> int | None:
    """The process that listens at the socket; None: nobody, the file was left by a process that has ended; 0: somebody,
    or it cannot be found out."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        except (ConnectionRefusedError, FileNotFoundError):
            return None
        except OSError:  # EAGAIN: its queue is full; EACCES: it belongs to somebody else
            return 0
        pid: int = CREDENTIALS.unpack(credentials)[0]
        return pid


def is_listening(path: Path) -> bool:
    """Whether somebody listens at the socket. What cannot be found out counts as yes."""
    return find_listener(path) is not None


def endpoint(folder: Path, stream: str) -> str:
    """The ZeroMQ address of a stream, for example ipc:///run/edge-agent/actions."""
    return f"ipc://{folder}/{stream}"
