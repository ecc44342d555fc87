"""Where files are made: a hidden folder beside the target, renamed at the end: the target is whole or not there.

A run that is interrupted or killed leaves the folder with a journal of what is safely on disk; the same work on the
same input goes on from there, anything else clears it. A run that fails leaves nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from edge_agent.bundle import signing
from edge_agent.bundle.files import sync_folder, write_durably
from edge_agent.bundle.manifest import LANGUAGE, MANIFEST, MMPROJ, REPORT, VISION
from edge_agent.errors import UserError

OURS = {LANGUAGE, VISION, MMPROJ, REPORT, MANIFEST, signing.SIGNATURE}
JOURNAL = "journal.json"
JOURNAL_INTERVAL_S = 5.0  # so often what has been written is made safe and noted


class BuildError(UserError):
    """One line: what failed, what was expected, what to do."""


class _Journal(msgspec.Struct):
    key: str
    n_bytes: dict[str, int] = {}  # of each file, from its start, on disk
    whole: list[str] = []  # files that are complete


class BuildFolder:
    """The folder, and what an earlier run has left in it that may be used."""

    def __init__(self, folder: Path, key: str) -> None:
        """key: of everything that the files depend on. Where the folder's journal has another, it is emptied."""
        self.folder, self._journal = folder, _Journal(key)
        with contextlib.suppress(OSError, msgspec.DecodeError):
            found = msgspec.json.decode((folder / JOURNAL).read_bytes(), type=_Journal)
            if found.key == key and all((folder / name).stat().st_size >= n for name, n in found.n_bytes.items()):
                self._journal = found
        for path in folder.iterdir():
            if path.name not in (JOURNAL, *self._journal.n_bytes):
                path.unlink()
        self._noted_s = time.monotonic()

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def found(self) -> str:
        """What is there, in words; empty if nothing is."""
        return ", ".join(
            f"{name}{'' if name in self._journal.whole else f' ({n / 1e6:.1f} MB of it)'}"
            for name, n in self._journal.n_bytes.items()
        )

    def n_bytes(self, name: str) -> int:
        """So many of a file's first bytes are as they should be."""
        return self._journal.n_bytes.get(name, 0)

    def is_whole(self, name: str) -> bool:
        return name in self._journal.whole

    def note(self, name: str, descriptor: int, n_bytes: int, whole: bool = False) -> None:
        """So much of a file is written: if it is the whole, or time has passed, it is made safe and noted."""
        if whole or time.monotonic() - self._noted_s > JOURNAL_INTERVAL_S:
            os.fdatasync(descriptor)
            self._journal.n_bytes[name] = n_bytes
            self._journal.whole += [name] if whole else []
            write_durably(self.folder / JOURNAL, msgspec.json.encode(self._journal))
            self._noted_s = time.monotonic()

    def finish(self, name: str) -> None:
        with (self.folder / name).open("rb") as file:
            self.note(name, file.fileno(), os.fstat(file.fileno()).st_size, whole=True)


def check_target(out: Path, force: bool) -> Path:
    """The absolute path of a folder that may be made there. Raises BuildError."""
    out = Path(os.path.abspath(out))
    if out.is_symlink() or out.exists():
        if not force:
            raise BuildError(f"{out}: exists; give another folder, or --force to replace it")
        strange = [] if out.is_dir() and not out.is_symlink() else [out.name]
        strange = strange or sorted(set(os.listdir(out)) - OURS)
        if strange:
            raise BuildError(f"{out}: --force replaces only folders made by edge-quantize; found {strange[0]!r} in it")
    if not out.parent.is_dir():
        raise BuildError(f"{out.parent}: no such folder; make it first")
    return out


@contextlib.contextmanager
def atomic_folder(out: Path, force: bool, key: str) -> Iterator[BuildFolder]:
    """A hidden folder beside `out` that becomes `out` when the block ends well, vanishes when it fails, and stays for
    the next run of the same key when it is interrupted and the journal holds something."""
    out = check_target(out, force)
    folder = out.with_name(f".{out.name}.part")
    folder.mkdir(mode=0o700, exist_ok=True)
    lock = _locked(folder)
    if lock is None:
        raise BuildError(f"{out}: another edge-quantize is making it; wait for it, or give another folder")
    keep = False
    try:
        work = BuildFolder(folder, key)
        yield work
        (folder / JOURNAL).unlink(missing_ok=True)
        for file in folder.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        folder.chmod(0o755)
        sync_folder(folder)
        _replace(folder, out)
        sync_folder(out.parent)
    except KeyboardInterrupt:
        keep = (folder / JOURNAL).is_file()
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        raise BuildError(f"{out}: {error.strerror} while writing it; make room and start again") from None
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def resumable_bytes(out: Path) -> int:
    """Of what an interrupted run has left there to go on from; 0: nothing."""
    folder = Path(os.path.abspath(out)).with_name(f".{out.name}.part")
    if not (folder / JOURNAL).is_file():
        return 0
    return sum(path.stat().st_size for path in folder.iterdir())


@contextlib.contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, locked while in use, gone afterwards; what a killed run left is cleared first."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.scratch"):
        if (lock := _locked(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".scratch", dir=out.parent))
    lock = _locked(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed or the process ends; None: somebody works in it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _replace(folder: Path, out: Path) -> None:
    """`folder` becomes `out`. An `out` that was there is exchanged for it in one step and goes with its name."""
    if not out.exists():
        os.rename(folder, out)
    elif _libc.renameat2(_AT_FDCWD, os.fsencode(folder), _AT_FDCWD, os.fsencode(out), _RENAME_EXCHANGE):
        old = folder.with_suffix(".old")  # a file system that cannot exchange: killed in between, the old one is here
        os.rename(out, old)
        os.rename(folder, out)
        shutil.rmtree(old)


_libc = ctypes.CDLL(None)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
