"""Folders that the workers of a parallel test run share. The first worker that needs a folder makes it; the others wait
for it and read it.

    shared = SharedFolders(root)
    folder = shared.folder("toy-bf16", write_checkpoint)     # write_checkpoint(folder) makes and fills the folder
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


class SharedFolders:
    """Locks of the kernel: a worker that is killed leaves none."""

    def __init__(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        self.root = root

    def folder(self, name: str, fill: Callable[[Path], object]) -> Path:
        """The folder `name`, complete. fill makes it, under another name, which it must not write down."""
        folder, unfinished = self.root / name, self.root / f"{name}.unfinished" / name
        with (self.root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                unfinished.parent.mkdir(exist_ok=True)
                fill(unfinished)
                unfinished.rename(folder)
        return folder


def of_this_run(tmp_path_factory: pytest.TempPathFactory) -> SharedFolders:
    """pytest-xdist gives each worker a temporary folder of its own, inside that of the run."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    return SharedFolders(root / "shared")
