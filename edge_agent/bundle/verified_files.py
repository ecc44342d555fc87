"""The files that native code loads are those that were verified: opened once, hashed, and loaded through the same
descriptor.

A name can be given to another file between two openings, so a loader gets /proc/self/fd/N in place of the name. A file
can also be overwritten in place. Size and times are therefore compared after loading with those before hashing.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from edge_agent.bundle.files import BundleFile, file_stamp, open_plain
from edge_agent.bundle.verify import check_hash
from edge_agent.errors import BundleError

# TensorRT names its cached engines after the file name, which is here a number: it has to be the same at each start.
FIRST_DESCRIPTOR = 64


class _Opened(NamedTuple):
    path: Path
    descriptor: int
    stamp: tuple[int, ...]  # of file_stamp, before the file was hashed


class VerifiedFiles:
    """Use it in a `with` statement; leaving it closes the descriptors. Loaders that map a file keep it open."""

    def __init__(
        self, expected: Mapping[Path, BundleFile], report: Callable[[Path, int], None] = lambda path, n_done: None
    ) -> None:
        """expected: every file that may be loaded. report: called with the bytes hashed of a file, after each block."""
        self._expected, self._report = expected, report
        self._opened: list[_Opened] = []

    def __enter__(self) -> VerifiedFiles:
        return self

    def __exit__(self, *_error: object) -> None:
        for file in self._opened:
            os.close(file.descriptor)

    def open(self, path: Path) -> Path:
        """Open and hash a file. Returns the path to load it from. Raises BundleError if it is not the verified file."""
        try:
            first = open_plain(path, self._expected[path].linked)
        except FileNotFoundError:
            raise BundleError(f"{path}: missing; it was there when it was verified; copy it again") from None
        try:
            descriptor = fcntl.fcntl(first, fcntl.F_DUPFD_CLOEXEC, FIRST_DESCRIPTOR)
        finally:
            os.close(first)
        self._opened.append(_Opened(path, descriptor, file_stamp(descriptor)))
        check_hash(descriptor, path, self._expected[path], lambda n_done: self._report(path, n_done))
        return Path(f"/proc/self/fd/{descriptor}")

    def check_unchanged(self) -> None:
        """Call it when everything is loaded. Raises BundleError if a file was written to since open()."""
        for file in self._opened:
            if file_stamp(file.descriptor) != file.stamp:
                raise BundleError(
                    f"{file.path}: changed while it was loaded; stop the daemon before you replace a bundle"
                )

    def with_names(self, text: str) -> str:
        """An error line of a loader, with the names of the files in place of /proc/self/fd/N."""
        for file in self._opened:
            text = text.replace(f"/proc/self/fd/{file.descriptor}", str(file.path))
        return text
