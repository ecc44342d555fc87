"""The runtime folder: made and locked by the daemon, and looked at by `edge-agent check`.

A lock on the folder itself keeps a second daemon from it: a file in the folder could be removed by a program that
cleans up.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from pathlib import Path

from edge_agent.errors import FaultName, UserError, fault_of
from edge_agent.supervisor.pause_file import was_paused
from edge_agent.wire.endpoints import find_listener
from edge_agent.wire.streams import STREAMS
from edge_agent.zmtp.listener import MAX_PATH_BYTES, PathError, find_dead_socket

LOCK_TRIES, LOCK_PAUSE_S = 20, 0.05  # a program that cleans up holds its lock for a moment


class EndpointError(UserError):
    """The endpoints cannot be bound. One line."""

    fault: FaultName | None = "runtime-folder"


def endpoint_error(error: PathError) -> EndpointError:
    fault: FaultName = "folder-in-use" if error.is_busy else "runtime-folder"
    fault = fault_of(error.cause, fault) if error.cause is not None else fault
    return EndpointError(f"runtime_dir: {error}", fault)


def lock_folder(folder: Path) -> int:
    """Make the folder and lock it; the descriptor of the folder. Raises EndpointError."""
    _check_name(folder)
    try:
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        _check_owner(folder)
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise EndpointError(
            f"runtime_dir: {folder}: {error.strerror}; set runtime_dir to a folder that you own",
            fault_of(error, "runtime-folder"),
        ) from None
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(folder_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return folder_fd
        except BlockingIOError:
            time.sleep(LOCK_PAUSE_S)
        except OSError as error:
            os.close(folder_fd)
            raise EndpointError(
                f"runtime_dir: {folder}: cannot be locked: {error.strerror}; use a folder of a local file system",
                fault_of(error, "runtime-folder"),
            ) from None
    os.close(folder_fd)
    pid = find_listener(folder / "control")
    who = f"another edge-agent (process {pid})" if pid else "another edge-agent"
    raise EndpointError(
        f"runtime_dir: {folder}: {who} runs in this folder; stop it, or set another runtime_dir", "folder-in-use"
    )


def _check_name(folder: Path) -> None:
    """Raises EndpointError if the sockets cannot have their paths."""
    try:
        longest = max(len(os.fsencode(folder / stream)) for stream in STREAMS)
    except UnicodeEncodeError:
        longest = 0
    if not longest or "\0" in str(folder):
        raise EndpointError(f"runtime_dir: {str(folder)!a}: expected the path of a folder; found characters of no path")
    if longest > MAX_PATH_BYTES:
        raise EndpointError(
            f"runtime_dir: {folder}: socket paths may have {MAX_PATH_BYTES} bytes, found {longest}; use a "
            "shorter folder"
        )


def _check_owner(folder: Path) -> None:
    """Raises EndpointError, OSError."""
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise EndpointError(
            f"runtime_dir: {folder}: expected a folder of uid {os.geteuid()}, found one of uid {found.st_uid}; "
            "choose another folder"
        )
    if found.st_mode & stat.S_IWOTH:
        raise EndpointError(
            f"runtime_dir: {folder}: everybody may write to it, so anybody could answer in place of this daemon; "
            f"chmod o-w {folder}, or choose another folder"
        )


def check_folder(folder: Path) -> str:
    """One line about a folder that a daemon could use now. Makes nothing and replaces nothing. Raises EndpointError."""
    _check_name(folder)
    if not folder.exists():
        _check_parent(folder)
        return f"{folder}: the daemon makes it"
    os.close(lock_folder(folder))
    try:
        for stream in STREAMS:
            find_dead_socket(folder / stream)
    except PathError as error:
        raise endpoint_error(error) from None
    paused = "; paused, and a daemon starts paused: `edge-agent resume` ends it" if was_paused(folder) else ""
    return f"{folder}: free{paused}"


def _check_parent(folder: Path) -> None:
    """Raises EndpointError if the folder cannot be made."""
    parent = next(path for path in folder.absolute().parents if path.exists())
    number = 0 if os.access(parent, os.W_OK | os.X_OK) else errno.EACCES
    number = number if parent.is_dir() else errno.ENOTDIR
    if number:
        why = f"{parent}: {os.strerror(number)}"
        raise EndpointError(f"runtime_dir: {folder}: cannot be made: {why}; set runtime_dir to a folder that you own")
