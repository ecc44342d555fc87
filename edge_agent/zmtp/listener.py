"""The path of a socket that this process binds: what it may replace, whether it is still ours, how it is removed.

    listener = Listener(Path("/run/edge-agent/control"), mode=0o660)
    listener.is_ours()          # False: the path was removed, or something else is there
    listener.close()            # removes the path if it is still ours

Only a socket that nobody listens on any more is replaced, or whose process was killed and hangs in the kernel: it will
never accept a connection, although connections to it succeed. Everything else at the path is refused by name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat
from pathlib import Path

from edge_agent.wire.endpoints import find_listener

BACKLOG = 128  # connections that wait for accept()
MAX_PATH_BYTES = 107  # sun_path

KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class PathError(Exception):
    """The path cannot be bound: one line. is_busy: another process listens there. is_taken: no socket is there, but
    something else: trying again does not help. cause: the error of the system, if that is the reason."""

    def __init__(
        self, line: str, *, is_busy: bool = False, is_taken: bool = False, cause: OSError | None = None
    ) -> None:
        super().__init__(line)
        self.is_busy, self.is_taken, self.cause = is_busy, is_taken, cause


class Listener:
    """Owns a listening socket and its path."""

    def __init__(self, path: Path, mode: int | None = None) -> None:
        """mode: permissions of the path; None: by the umask. Raises PathError."""
        self.path = path
        _make_room(path)
        try:
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise PathError(f"{path}: cannot be bound: {error.strerror}", cause=error) from None
        try:
            self.socket.bind(str(path))
            self._identity = _identity(path)
            if mode is not None:
                os.chmod(path, mode)  # nobody can connect before listen()
            self.socket.listen(BACKLOG)
        except OSError as error:
            self.socket.close()
            is_busy = error.errno == errno.EADDRINUSE  # bound by somebody else since _make_room()
            line = f"{path}: cannot be bound: {error.strerror or error}"
            raise PathError(line, is_busy=is_busy, cause=error) from None
        self.socket.setblocking(False)

    def is_ours(self) -> bool:
        """Whether the path still leads to this socket."""
        try:
            return _identity(self.path) == self._identity
        except OSError:
            return False

    def close(self) -> None:
        if self.is_ours():
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.socket.close()


def _identity(path: Path) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _make_room(path: Path) -> None:
    """Remove a socket that nobody listens on. Raises PathError if something else is at the path."""
    if find_dead_socket(path):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise PathError(f"{path}: cannot be bound: {error.strerror}", cause=error) from None


def find_dead_socket(path: Path) -> bool:
    """Whether a socket is at the path that nobody will accept connections on; False: nothing is there. Raises PathError
    if something else is there."""
    try:
        found = os.lstat(path)
        if not stat.S_ISSOCK(found.st_mode):
            kind = KINDS.get(stat.S_IFMT(found.st_mode), "something else")
            raise PathError(
                f"{path}: cannot be bound: expected a socket or nothing, found {kind}; remove it", is_taken=True
            )
        pid = find_listener(path)
        if pid is not None and not is_killed(pid):
            who = f"process {pid}" if pid else "another process"
            raise PathError(f"{path}: cannot be bound: {who} listens there; stop it", is_busy=True)
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        raise PathError(f"{path}: cannot be bound: {error.strerror}", cause=error) from None
    except ValueError as error:  # a NUL, or what is not text
        raise PathError(f"{str(path)!a}: cannot be bound: {error}", is_taken=True) from None


def is_killed(pid: int, proc: Path = Path("/proc")) -> bool:
    """Whether SIGKILL was sent to a process that still exists: it hangs in a driver, and will run no more code of its
    own. What cannot be found out counts as no."""
    try:
        status = (proc / str(pid) / "status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    pending = int(fields.get("SigPnd", "0"), 16) | int(fields.get("ShdPnd", "0"), 16)
    return bool(pending & 1 << (signal.SIGKILL - 1))
