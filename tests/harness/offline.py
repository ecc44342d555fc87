"""Run a command whose processes cannot make an internet socket: the kernel kills a process that tries, with SIGSYS.

    python -m tests.harness.offline COMMAND [ARGUMENT …]

A seccomp filter sees native code too, and the children of children inherit it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import struct
import sys
from pathlib import Path

from tests.harness import ROOT

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
KILL_PROCESS, ALLOW = 0x80000000, 0x7FFF0000
LOAD, IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # of a BPF machine: load a word, compare with a constant, return a constant
SYSCALL_NUMBER, FIRST_ARGUMENT = 0, 16  # offsets in struct seccomp_data
SOCKET_SYSCALL = {"x86_64": 41, "aarch64": 198}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def forbid_internet_sockets() -> None:
    """For this process and all that it starts."""

    def instruction(code: int, value: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, jump_true, jump_false, value)

    program = b"".join(
        [
            instruction(LOAD, SYSCALL_NUMBER),
            instruction(IF_EQUAL, SOCKET_SYSCALL[platform.machine()], jump_false=4),  # to ALLOW
            instruction(LOAD, FIRST_ARGUMENT),
            instruction(IF_EQUAL, socket.AF_INET, jump_true=1),  # to KILL_PROCESS
            instruction(IF_EQUAL, socket.AF_INET6, jump_false=1),  # else to ALLOW
            instruction(RETURN, KILL_PROCESS),
            instruction(RETURN, ALLOW),
        ]
    )
    libc = ctypes.CDLL(None, use_errno=True)
    described = _Program(len(program) // 8, program)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(described), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "this kernel takes no seccomp filter")


def environment(home: Path) -> dict[str, str]:
    """As a user's shell: without CI, which switches onnxruntime's telemetry off, and without what our own files set."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("CI", "ORT_DISABLE_TELEMETRY")}
    return inherited | {"HOME": str(home), "PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    forbid_internet_sockets()
    os.execvp(sys.argv[1], sys.argv[1:])
