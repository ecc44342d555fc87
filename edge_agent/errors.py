"""Errors whose text is one line for the user. A command prints that line without a traceback and ends with its status.

Every error of this kind in `edge_agent` and `quantize` is a subclass of UserError, so that a command can catch them all
without importing the modules that raise them. An exception of another class is a defect and keeps its traceback. (The
client's RequestRefused is not a subclass: `edge_agent.client` imports only `edge_agent.wire`.)
"""

from __future__ import annotations

import errno
import os
from typing import Literal, NamedTuple, get_args

EX_FAILED, EX_UNAVAILABLE, EX_CONFIG = 1, os.EX_UNAVAILABLE, os.EX_CONFIG

FaultName = Literal[
    "configuration",
    "bundle",
    "installation",
    "runtime-folder",
    "folder-in-use",
    "source-name",
    "source-file",
    "source-pipeline",
    "frame-size",
    "instruction",
    "source-device",
    "source-in-use",
    "machine",
    "memory",
    "instruction-reduced",
    "native",
    "process",
    "endpoint-lost",
]


class Fault(NamedTuple):
    """One row of FAULTS. exit_status: of the daemon, before READY."""

    exit_status: int
    what: str

    @property
    def is_permanent(self) -> bool:
        """Another start finds the same: systemd does not start the daemon again, and a person has to act."""
        return self.exit_status == EX_CONFIG


# Every fault that can end the start of the daemon. 78: at once, and no other start. 69: a camera may appear; the daemon
# waits for it first. 1: systemd starts the daemon again. docs/troubleshooting.md has the same table.
FAULTS: dict[FaultName, Fault] = {
    "configuration": Fault(EX_CONFIG, "A key of the configuration, an action space or an adapter is wrong."),
    "bundle": Fault(EX_CONFIG, "A file of the bundle is missing, damaged, not signed or of another format."),
    "installation": Fault(EX_CONFIG, "A package or program that the configuration needs is not installed."),
    "runtime-folder": Fault(EX_CONFIG, "The runtime folder cannot hold the sockets, or is not safe."),
    "folder-in-use": Fault(EX_CONFIG, "Another daemon uses the runtime folder, or another process one of its sockets."),
    "source-name": Fault(EX_CONFIG, "`camera.source` is not the name of a source, or not of one that is allowed."),
    "source-file": Fault(EX_CONFIG, "A video or folder does not exist, may not be read, or holds no image."),
    "source-pipeline": Fault(EX_CONFIG, "A `gst:` pipeline has a mistake, or its width and height are not set."),
    "frame-size": Fault(EX_CONFIG, "Frames of the source are larger than `camera.max_megapixels`."),
    "instruction": Fault(EX_CONFIG, "The instruction and the texts do not fit `language.context`."),
    "source-device": Fault(
        EX_UNAVAILABLE, "A camera is absent, delivers nothing or is not usable, or nobody pushes frames."
    ),
    "source-in-use": Fault(EX_UNAVAILABLE, "Another process has the camera, or listens at the path for pushed frames."),
    "machine": Fault(EX_FAILED, "The disk fails or is full; there are no descriptors, processes or memory."),
    "memory": Fault(EX_FAILED, "The memory plan does not fit into the free memory."),
    "instruction-reduced": Fault(EX_FAILED, "The instruction does not fit a context that was reduced to save memory."),
    "native": Fault(EX_FAILED, "llama.cpp or onnxruntime cannot load the model: the GPU, its driver or its memory."),
    "process": Fault(EX_FAILED, "The model process crashed or did not get ready, six times in a row."),
    "endpoint-lost": Fault(EX_FAILED, "A socket or the runtime folder was replaced while the daemon ran."),
}
assert tuple(FAULTS) == get_args(FaultName)

# An operation that failed with one of these fails again. Every other number says something about the machine at this
# moment: EIO, ENOSPC, EMFILE, ENOMEM, ESTALE, ...
PERMANENT_ERRNOS = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG,
    errno.EINVAL, errno.EEXIST, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EADDRINUSE,
}  # fmt: skip


def fault_of(error: OSError, if_permanent: FaultName) -> FaultName:
    """The row of FAULTS of an error of the system. if_permanent: the row if it would fail again."""
    return if_permanent if error.errno in PERMANENT_ERRNOS or error.errno is None else "machine"


class UserError(Exception):
    """One line: what is wrong, what was expected, what was found, and what to do.

    fault: the row of FAULTS. exit_status: the status of a command that ends with this error.
    """

    fault: FaultName | None = None
    exit_status: int = EX_FAILED

    def __init__(self, line: str, fault: FaultName | None = None) -> None:
        super().__init__(one_line(line))
        self.fault = fault or self.fault
        if self.fault is not None:
            self.exit_status = FAULTS[self.fault].exit_status


class ConfigError(UserError):
    """A wrong configuration. One line: file, key, expected, found, and what to do."""

    fault: FaultName | None = "configuration"


class BundleError(UserError):
    """A wrong or damaged bundle. One line: file, key, expected, found, and what to do."""

    fault: FaultName | None = "bundle"


def one_line(text: str) -> str:
    """The text with every control character replaced: a name in a file can have some, and a terminal obeys them."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def encodable(text: str) -> str:
    """The text in characters that UTF-8 can hold. The name of a file in another encoding has others (PEP 383), which
    cannot be printed or sent."""
    return text.encode(errors="backslashreplace").decode()
