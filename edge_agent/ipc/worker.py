"""What the two child processes have in common: how the supervisor starts and kills one, how one starts and ends itself.

A child inherits descriptors of the frame slot and of one socket. A message is msgpack bytes in one datagram (AF_UNIX,
SOCK_SEQPACKET). There is no pickle and no shared Python state. The kernel kills a child when its parent dies, and a
child ends itself when the supervisor closes the socket.
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
from pathlib import Path
from typing import NamedTuple

from edge_agent.ipc.frame_slot import Slot

MAX_EVENT_BYTES = 128 * 1024
MAX_EVENTS_AT_ONCE = 256
MAX_STDERR_BYTES = 64 * 1024
CHILD_OOM_SCORE = 500  # without memory the kernel kills a child, never the supervisor, whose score is 0
PR_SET_PDEATHSIG = 1
ENVIRONMENT = {
    "GGML_NO_BACKTRACE": "1",  # else ggml starts gdb when it aborts, and its pages hide the reason
    "PYTHONSAFEPATH": "1",  # never import a module from the current folder
    "OPENBLAS_NUM_THREADS": "1",  # numpy multiplies no matrices here, and its threads spin while they start
}
_libc = ctypes.CDLL(None)


class Worker:
    """Owns one child process and the supervisor's end of its socket. No method waits for the child."""

    def __init__(self, module: str, slot: Slot, first_message: bytes, extra_arguments: tuple[str, ...] = ()) -> None:
        """Start `python -m module`. extra_arguments: flags that attach_to_supervisor() knows, such as --trace.

        The calling thread must live as long as the child: the kernel kills the child when that thread ends.
        """
        self.hung_up = False  # the child's end of the socket is closed: no message comes any more
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            self.socket, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.callback(self.socket.close)
            theirs.callback(child_end.close)
            self.socket.setblocking(False)
            # Neither end waits: a child whose stderr nobody reads loses lines.
            stderr_fd, child_stderr_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            self._stderr = os.fdopen(stderr_fd, "rb", buffering=0)
            ours.callback(self._stderr.close)
            theirs.callback(os.close, child_stderr_fd)
            fds = (slot.fd, slot.wake_fd, child_end.fileno())
            options = ("--slot", str(fds[0]), "--wake", str(fds[1]), "--events", str(fds[2]))
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *options, *extra_arguments],
                stdin=subprocess.DEVNULL,
                stderr=child_stderr_fd,
                pass_fds=fds,
                env=os.environ | ENVIRONMENT,
            )
            ours.callback(self.process.kill)
            with contextlib.suppress(ConnectionError):  # the child has ended already; its exit status will be read
                self.socket.send(first_message)
            ours.pop_all()  # nothing failed

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def exit_status(self) -> int | None:
        """None: the process exists. Otherwise its status; -N: signal N ended it."""
        return self.process.poll()

    def send(self, message: bytes) -> bool:
        """Whether the child's socket took the message. False: the socket is full, the child is gone, or no memory."""
        try:
            self.socket.send(message)
        except OSError:
            return False
        return True

    def receive(self) -> list[bytes]:
        """Messages that have arrived; at most 256, so that a child that floods does not stop the supervisor."""
        messages: list[bytes] = []
        try:
            while len(messages) < MAX_EVENTS_AT_ONCE:
                message = self.socket.recv(MAX_EVENT_BYTES)
                if not message:
                    self.hung_up = True
                    break
                messages.append(message)
        except ConnectionError:
            self.hung_up = True
        except OSError:  # nothing has arrived, or no memory for it now
            pass
        return messages

    def read_stderr(self) -> bytes:
        """What the child has written on stderr, at most 64 KiB."""
        try:
            return self._stderr.read(MAX_STDERR_BYTES) or b""
        except OSError:
            return b""

    def kill(self) -> None:
        """Send SIGKILL, and close the socket and stderr.

        A child inside a driver call can stay in the kernel for ever. Read `exit_status` until it is not None: only then
        the process is gone, and has released its memory and its devices.
        """
        self.process.kill()
        self.socket.close()
        self._stderr.close()


class Attached(NamedTuple):
    """What a child process gets from the supervisor."""

    slot: Slot
    events: socket.socket  # events to the supervisor, commands from the supervisor
    first: bytes  # the first message: the configuration
    trace: bool  # emit TraceSpan events


def attach_to_supervisor() -> Attached:
    """In the child process: take over what the supervisor passes. Ends the process when the supervisor is gone."""
    parser = argparse.ArgumentParser(description="started by the supervisor, not by hand")
    for name in ("--slot", "--wake", "--events"):
        parser.add_argument(name, type=int, required=True, metavar="FD")
    parser.add_argument("--trace", action="store_true", help="emit what was done when")
    arguments = parser.parse_args()
    die_with_parent(os.getppid())
    with contextlib.suppress(OSError):  # /proc may be hidden
        Path("/proc/self/oom_score_adj").write_text(str(CHILD_OOM_SCORE))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the supervisor, which ends its children
    events = socket.socket(fileno=arguments.events)
    first = events.recv(MAX_EVENT_BYTES)
    if not first:
        sys.exit(0)
    threading.Thread(target=_exit_on_hangup, args=(events,), daemon=True).start()
    return Attached(Slot.attach(arguments.slot, arguments.wake), events, first, arguments.trace)


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent dies."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # the parent died before this process asked
        os._exit(1)


def _exit_on_hangup(events: socket.socket) -> None:
    """Exit at once when the supervisor closes its end, also while the main thread hangs."""
    poll = select.poll()
    poll.register(events, select.POLLRDHUP)
    poll.poll()
    os._exit(0)
