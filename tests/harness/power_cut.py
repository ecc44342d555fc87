"""What is on a disk if the power is cut, or a process is killed, after each step of what it does with files.

    with recorded(store) as disk:
        install(store, ...)
    for state in disk.states(tmp_path): ...     # each one a folder to start from

Every call that syncs, renames, links, makes or removes something is a step. After each step four things can be found:
what a kill leaves; what a power cut leaves if nothing but synced data and synced names survived; the same with all the
names of the moment, whose unsynced files are empty; and the same as the second, with the newest name alone beside it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

STEPS = ("fsync", "rename", "replace", "symlink", "mkdir", "unlink", "rmdir")
Names = dict[str, "int | str"]  # of a folder: name -> inode, or the target of a link


class RecordedDisk:
    """The folder below `root`, step by step."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._data: dict[int, bytes] = {}  # inode -> content when it was synced last
        self._names: dict[int, Names] = {}  # inode of a folder -> its names when it was synced last
        self._folders: set[int] = set()
        self._kept: list[int] = []  # descriptors: no inode number is used twice while we look
        self._trees: list[dict[str, bytes | str | None]] = []  # path -> content, target of a link, or None: a folder
        self._before: Names = {}
        for folder, _folders, files in os.walk(root):
            self._sync(Path(folder))
            for name in files:
                if not (Path(folder) / name).is_symlink():
                    self._sync(Path(folder) / name)
        self._before = self._listing(root)

    def close(self) -> None:
        for descriptor in self._kept:
            os.close(descriptor)

    @property
    def n_steps(self) -> int:
        return len(self._trees) // 4

    def step(self, synced: Path | None) -> None:
        if synced is not None and synced.is_relative_to(self._root):
            self._sync(synced)
        now = self._listing(self._root)
        newest = {name: now[name] for name in now if self._before.get(name) != now[name]}
        self._before = now
        root = self._root.stat().st_ino
        durable = self._names.get(root, {})
        self._trees += [
            dict(self._actual(self._root, "")),
            dict(self._durable(durable, "", everything=False)),
            dict(self._durable(now, "", everything=True)),
            dict(self._durable({**durable, **newest}, "", everything=False)),
        ]

    def states(self, scratch: Path) -> Iterator[Path]:
        """Each different state, as a folder of its own that may be changed."""
        unique = {repr(sorted(tree.items())): tree for tree in self._trees}
        for number, tree in enumerate(unique.values()):
            folder = scratch / str(number)
            folder.mkdir(parents=True)
            for name, content in sorted(tree.items()):
                path = folder / name
                if content is None:
                    path.mkdir()
                elif isinstance(content, str):
                    path.symlink_to(content)
                else:
                    path.write_bytes(content)
            yield folder
            shutil.rmtree(folder)

    def _sync(self, path: Path) -> None:
        self._kept.append(os.open(path, os.O_RDONLY))
        inode = path.stat().st_ino
        if path.is_dir():
            self._folders.add(inode)
            self._names[inode] = self._listing(path)
        else:
            self._data[inode] = path.read_bytes()

    def _listing(self, folder: Path) -> Names:
        names: Names = {}
        for path in folder.iterdir():
            status = path.lstat()
            names[path.name] = os.readlink(path) if stat.S_ISLNK(status.st_mode) else status.st_ino
            if stat.S_ISDIR(status.st_mode):
                self._folders.add(status.st_ino)
        return names

    def _actual(self, folder: Path, prefix: str) -> Iterator[tuple[str, bytes | str | None]]:
        for path in folder.iterdir():
            name = prefix + path.name
            if path.is_symlink():
                yield name, os.readlink(path)
            elif path.is_dir():
                yield name, None
                yield from self._actual(path, name + "/")
            else:
                yield name, path.read_bytes()

    def _durable(self, names: Names, prefix: str, everything: bool) -> Iterator[tuple[str, bytes | str | None]]:
        for name, entry in names.items():
            if isinstance(entry, str):
                yield prefix + name, entry
            elif entry in self._folders:
                yield prefix + name, None
                inside = self._names.get(entry, {})
                if everything and (self._root / prefix / name).is_dir():
                    inside = self._listing(self._root / prefix / name)
                yield from self._durable(inside, f"{prefix}{name}/", everything)
            else:
                yield prefix + name, self._data.get(entry, b"")


@contextlib.contextmanager
def recorded(root: Path) -> Iterator[RecordedDisk]:
    """Record every step below `root` of this process."""
    disk = RecordedDisk(root)

    def followed(name: str):
        real = getattr(os, name)

        def step(*arguments, **options):
            synced = Path(os.readlink(f"/proc/self/fd/{arguments[0]}")) if name == "fsync" else None
            found = real(*arguments, **options)
            if root.exists():
                disk.step(synced)
            return found

        return step

    with contextlib.ExitStack() as patches:
        for name in STEPS:
            patches.enter_context(mock.patch.object(os, name, followed(name)))
        try:
            yield disk
        finally:
            disk.close()
