"""What the two child processes have in common: how the supervisor starts and loses one, how one starts and ends itself.

A child gets the frame slot and one socket as inherited descriptors; messages are msgpack bytes, one per datagram
(AF_UNIX, SOCK_SEQPACKET). No pickle, no shared Python state. It dies with its parent and when the socket closes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import threading

from edge_agent.ipc.frame_slot import Slot

MAX_EVENT_BYTES = 128 * 1024
_libc = ctypes.CDLL(None)


class Worker:
    """Owns one child process and our end of its socket. No method waits for the child."""

    def __init__(self, module: str, slot: Slot, first_message: bytes) -> None:
        """Start `python -m module`. Call from a thread that stays: the kernel ties the child's life to it."""
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        fds = (slot.fd, slot.wake_fd, theirs.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--slot", str(fds[0]), "--wake", str(fds[1]), "--events", str(fds[2])],
            stdin=subprocess.DEVNULL,
            pass_fds=fds,
            env=os.environ | {"PYTHONSAFEPATH": "1"},  # no module of this name from the folder we happen to stand in
        )
        theirs.close()
        self.socket.send(first_message)

    def send(self, message: bytes) -> bool:
        """False when the child is gone or takes nothing any more; it will be found dead or stalled soon enough."""
        try:
            self.socket.send(message)
        except (BlockingIOError, ConnectionError, BrokenPipeError):
            return False
        return True

    def receive(self) -> list[bytes]:
        """Every message that is there; never waits."""
        messages = []
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while message := self.socket.recv(MAX_EVENT_BYTES):
                messages.append(message)
        return messages

    @property
    def exit_status(self) -> int | None:
        return self.process.poll()

    def kill(self) -> None:
        """Send SIGKILL, close the socket, do not wait: a child inside a driver call can stay in the kernel for ever.

        Ask `exit_status` until it is not None; only then is the process gone, with its memory and its devices.
        """
        self.process.kill()
        self.socket.close()


def attach_to_supervisor() -> tuple[Slot, socket.socket, bytes]:
    """In the child: (slot, socket to the supervisor, its first message). Ends the process when the parent is gone."""
    parser = argparse.ArgumentParser(description="started by the supervisor, not by hand")
    for name in ("--slot", "--wake", "--events"):
        parser.add_argument(name, type=int, required=True, metavar="FD")
    fds = parser.parse_args()
    die_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the supervisor, who ends us
    events = socket.socket(fileno=fds.events)
    first = events.recv(MAX_EVENT_BYTES)
    if not first:
        sys.exit(0)
    threading.Thread(target=_exit_on_hangup, args=(events,), daemon=True).start()
    return Slot.attach(fds.slot, fds.wake), events, first


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, however it dies."""
    _libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent_pid:  # it was gone before we asked
        os._exit(1)


def _exit_on_hangup(events: socket.socket) -> None:
    """Exit at once when the supervisor closes its end, whatever the main thread hangs in."""
    poll = select.poll()
    poll.register(events, select.POLLRDHUP)
    poll.poll()
    os._exit(0)
