"""Where files are written: a hidden folder beside the target, renamed at the end. The target is complete or absent.

A run that is interrupted or killed leaves the folder, with a journal of what is safely on disk. The same work on the
same input continues from there; other work empties the folder. A run that fails leaves nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_agent.bundle import signing
from edge_agent.bundle.files import sync_folder, write_durably
from edge_agent.bundle.manifest import LANGUAGE, MANIFEST, MMPROJ, REPORT, VISION
from edge_agent.errors import UserError

OUR_FILES = {LANGUAGE, VISION, MMPROJ, REPORT, MANIFEST, signing.SIGNATURE}
JOURNAL, LOCK = "journal.json", "lock"
JOURNAL_INTERVAL_S = 5.0  # between two entries in the journal; each one waits for the disk


class BuildError(UserError):
    """One line: what failed, what was expected, what to do."""


class _Journal(msgspec.Struct):
    key: str
    n_bytes: dict[str, int] = {}  # file -> bytes from its start that are safely on disk
    complete: list[str] = []  # files


class BuildFolder:
    """The hidden folder, and what an earlier run of the same work has left in it."""

    def __init__(self, folder: Path, key: str, missing: list[str]) -> None:
        """key: fingerprint of everything that the files depend on. Files of another key are removed. missing: what
        this file system does not guarantee."""
        self.folder, self.missing, self._journal = folder, missing, _Journal(key)
        with contextlib.suppress(OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            journal = msgspec.json.decode((folder / JOURNAL).read_bytes(), type=_Journal)
            if journal.key == key and all((folder / name).stat().st_size >= n for name, n in journal.n_bytes.items()):
                self._journal = journal
        for path in folder.iterdir():
            if path.name not in (JOURNAL, LOCK, *self._journal.n_bytes):
                path.unlink()
        self._journalled_s = time.monotonic()

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def left_by_earlier_run(self) -> str:
        """The files that an earlier run has left, as a list for people; empty: none."""
        return ", ".join(
            f"{name}{'' if name in self._journal.complete else f' ({n / 1e6:.1f} MB of it)'}"
            for name, n in self._journal.n_bytes.items()
        )

    def kept_bytes(self, name: str) -> int:
        """Bytes from the start of a file that an earlier run has written correctly."""
        return self._journal.n_bytes.get(name, 0)

    def is_complete(self, name: str) -> bool:
        return name in self._journal.complete

    def checkpoint_progress(self, name: str, descriptor: int, n_bytes: int) -> None:
        """The first n_bytes of a file are written. Every JOURNAL_INTERVAL_S, sync the file and write the journal."""
        if time.monotonic() - self._journalled_s > JOURNAL_INTERVAL_S:
            self._write_journal(name, descriptor, n_bytes)

    def mark_complete(self, name: str) -> None:
        """A file is written. Sync it and write the journal."""
        with (self.folder / name).open("rb") as file:
            self._journal.complete.append(name)
            self._write_journal(name, file.fileno(), os.fstat(file.fileno()).st_size)

    def _write_journal(self, name: str, descriptor: int, n_bytes: int) -> None:
        os.fdatasync(descriptor)
        self._journal.n_bytes[name] = n_bytes
        write_durably(self.folder / JOURNAL, msgspec.json.encode(self._journal))
        self._journalled_s = time.monotonic()


def check_target(out: Path, force: bool) -> Path:
    """The absolute path of the target, after a check that a folder may be written there. Raises BuildError."""
    out = Path(os.path.abspath(out))
    if out.is_symlink() or out.exists():
        if not force:
            raise BuildError(f"{out}: exists; give another folder, or --force to replace it")
        foreign = [] if out.is_dir() and not out.is_symlink() else [out.name]
        foreign = foreign or sorted(set(os.listdir(out)) - OUR_FILES)
        if foreign:
            raise BuildError(f"{out}: --force replaces only folders made by edge-quantize; found {foreign[0]!r} in it")
    if not out.parent.is_dir():
        raise BuildError(f"{out.parent}: no such folder; make it first")
    return out


def check_file_size(folder: Path, n_bytes: int, name: str) -> None:
    """Raises BuildError if this folder cannot hold a file of n_bytes: FAT's limit is 4 GiB, a process can have one too
    (ulimit -f). Found before the work, and nothing is written for it."""
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft_limit != resource.RLIM_INFINITY and n_bytes > soft_limit:
        raise BuildError(
            f"{folder}: {name} has {n_bytes / 1e6:.1f} MB, but this process may write files of at most "
            f"{soft_limit / 1e6:.1f} MB (ulimit -f); raise the limit"
        )
    with tempfile.TemporaryFile(dir=folder) as probe:
        try:
            os.lseek(probe.fileno(), n_bytes, os.SEEK_SET)  # the kernel compares it with the file system's limit
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EFBIG, errno.EOVERFLOW):
                raise
            raise BuildError(
                f"{folder}: {name} has {n_bytes / 1e9:.2f} GB, and this file system cannot hold such a file (FAT: at "
                "most 4.29 GB); use a disk with ext4, exFAT or another file system"
            ) from None


@contextlib.contextmanager
def atomic_folder(out: Path, key: str, force: bool = False) -> Iterator[BuildFolder]:
    """A hidden folder beside `out`. It becomes `out` when the block ends without error and is removed when the block
    fails. When the block is interrupted and the journal is not empty, it stays for the next run with the same key.

    Raises BuildError: `out` exists and `force` is not set, another process writes there, or the disk is full.
    """
    out = check_target(out, force)
    folder = out.with_name(f".{out.name}.part")
    if folder.is_symlink():
        raise BuildError(f"{folder}: expected what an interrupted run has left, found a link; remove it")
    is_new = not folder.exists()
    folder.mkdir(mode=0o700, exist_ok=True)
    keep = False
    try:
        lock, missing = _locked(folder), _missing_features(folder)
    except OSError:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if lock is None:
        raise BuildError(f"{out}: another edge-quantize is writing it; wait for it, or give another folder")
    try:
        yield BuildFolder(folder, key, [*lock.missing, *missing])
        keep = True  # what is finished stays, whatever fails from here on
        for file in folder.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        with contextlib.suppress(OSError):  # the file system may have no modes
            folder.chmod(0o755)
        for name in (JOURNAL, LOCK):
            (folder / name).unlink(missing_ok=True)
        sync_folder(folder)
        _replace(folder, out)
        keep = False  # under the hidden name is now nothing, or what was replaced
        sync_folder(out.parent)
    except KeyboardInterrupt:
        keep = (folder / JOURNAL).is_file()
        raise
    except OSError as error:
        if keep:
            why = f"{error.strerror} at the end; the finished files are in {folder}: rename this folder to {out.name}"
            raise BuildError(f"{out}: {why}") from None
        if error.errno == errno.EFBIG:
            why = "a file is too large for this file system or for ulimit -f; use another disk"
            raise BuildError(f"{out}: {error.strerror} while writing it: {why}") from None
        if error.filename is not None:
            raise
        raise BuildError(f"{out}: {error.strerror} while writing it; make room and run the command again") from None
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock.descriptor)


def _missing_features(folder: Path) -> list[str]:
    """What the file system of a folder cannot do and a build can do without. Found before the work, not after it."""
    missing = []
    try:
        folder.chmod(0o700)
    except OSError:
        missing.append("no modes: everybody who can open this disk may be able to change the files")
    if not sync_folder(folder):
        missing.append("no fsync of folders: a power cut can lose the new folder; unmount before you unplug")
    return missing


def resumable_bytes(out: Path) -> int:
    """Bytes that an interrupted run has left and that the next run of the same work can use; 0: none."""
    folder = Path(os.path.abspath(out)).with_name(f".{out.name}.part")
    if not (folder / JOURNAL).is_file():
        return 0
    return sum(path.stat().st_size for path in folder.iterdir())


@contextlib.contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, locked while in use, then removed. Those of killed runs are removed first."""
    for abandoned in out.parent.glob(f".{glob.escape(out.name)}.*.scratch"):
        if (lock := _locked(abandoned)) is not None:
            if not lock.missing:  # without locks nobody knows whether it is abandoned
                shutil.rmtree(abandoned, ignore_errors=True)
            os.close(lock.descriptor)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".scratch", dir=out.parent))
    lock = _locked(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock.descriptor)


class _Lock(NamedTuple):
    descriptor: int  # holds the lock until it is closed
    missing: list[str]  # what is not guaranteed


def _locked(folder: Path) -> _Lock | None:
    """The folder's lock. None: another process has it. The lock is on a file that is open for writing: NFS gives no
    other."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a server without a lock service
        return _Lock(descriptor, ["no locks: do not start a second build of the same folder"])
    return _Lock(descriptor, [])


def _replace(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`. An existing `out` is exchanged for it in one step and keeps the hidden name."""
    if not out.exists():
        os.rename(folder, out)
    elif _libc.renameat2(_AT_FDCWD, os.fsencode(folder), _AT_FDCWD, os.fsencode(out), _RENAME_EXCHANGE):
        # A file system that cannot exchange names. If we are killed between the two renames, the old folder is here.
        old = folder.with_suffix(".old")
        os.rename(out, old)
        os.rename(folder, out)
        shutil.rmtree(old)


_libc = ctypes.CDLL(None)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
