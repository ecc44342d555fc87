"""Plain files: opening without following links, hashing, and writing that survives a power cut."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_agent.errors import BundleError, fault_of

BLOCK_BYTES = 4 << 20


class BundleFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Size and hash of one file."""

    bytes: Annotated[int, Meta(ge=0, le=1 << 48)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    linked: bool = False  # the file has another name outside the bundle: edge-agent bundle wrap --link


def open_plain(path: Path, linked: bool = False) -> int:
    """Open a regular file for reading; returns its descriptor.

    Refuses links and, unless `linked`, files with a second name, so that the hashed file is the one that is loaded
    later. Raises FileNotFoundError, or BundleError for anything else that cannot be opened as a plain file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        fault = fault_of(error, "bundle")
        raise BundleError(f"{path}: cannot be opened as a plain file: {error.strerror}", fault) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or (status.st_nlink > 1 and not linked):
        os.close(descriptor)
        raise BundleError(f"{path}: expected a plain file with one name; found a special or hard-linked file")
    return descriptor


def file_stamp(descriptor: int) -> tuple[int, ...]:
    """What changes when an open file is written to, or is given another name or mode."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def hash_file(path: Path, report: Callable[[int], None] = lambda n_bytes: None) -> BundleFile:
    """Size and sha256 of a file. Calls report(number of bytes) after each block that was read."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            report(len(block))
    return BundleFile(bytes=size, sha256=digest.hexdigest())


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file so that a power cut leaves either the old or the new content, never a part. Raises OSError."""
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS, errno.EPERM}


def sync_folder(folder: Path) -> bool:
    """Write the folder's list of names to the disk. False: this file system cannot (FAT, some network shares). Raises
    OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
        return False
    finally:
        os.close(descriptor)
    return True
