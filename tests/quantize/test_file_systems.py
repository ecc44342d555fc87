"""Network shares and USB disks: what a file system cannot do is said before the work, and never costs the result."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from edge_agent.bundle.files import sync_folder, write_durably
from quantize import build_folder
from quantize.build_folder import BuildError, BuildFolder, atomic_folder, temporary_folder


def fail(monkeypatch, owner: Any, name: str, number: int, only=lambda *arguments: True) -> None:
    """owner.name fails with this errno for the arguments that `only` chooses."""
    real = getattr(owner, name)

    def failing(*arguments: Any, **keywords: Any) -> Any:
        if only(*arguments):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **keywords)

    monkeypatch.setattr(owner, name, failing)


def is_folder(descriptor: int) -> bool:
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


def read_only(descriptor: int, _operation: int) -> bool:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def made(out: Path) -> list[str]:
    """Build a folder of one file; what was said before the work."""
    with atomic_folder(out, "key") as folder:
        missing = folder.missing
        (folder / "language.gguf").write_bytes(b"work")
        folder.mark_complete("language.gguf")
    assert os.listdir(out) == ["language.gguf"] and (out / "language.gguf").read_bytes() == b"work"
    assert os.listdir(out.parent) == [out.name]
    return missing


def test_a_local_disk_misses_nothing(tmp_path: Path):
    assert made(tmp_path / "out") == []


def test_nfs_gives_locks_only_on_files_that_are_open_for_writing(tmp_path: Path, monkeypatch):
    fail(monkeypatch, fcntl, "flock", errno.EBADF, read_only)
    assert made(tmp_path / "out") == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EIO])
def test_a_server_without_locks(tmp_path: Path, monkeypatch, number: int):
    fail(monkeypatch, fcntl, "flock", number)
    assert made(tmp_path / "out") == ["no locks: do not start a second build of the same folder"]
    with temporary_folder(tmp_path / "x") as first, temporary_folder(tmp_path / "x") as second:
        assert first.is_dir() and second.is_dir()  # nobody knows whether the first is abandoned


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EACCES, errno.EROFS])
def test_fat_has_no_modes(tmp_path: Path, monkeypatch, number: int):
    fail(monkeypatch, os, "chmod", number)
    assert [line.split(":")[0] for line in made(tmp_path / "out")] == ["no modes"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS, errno.EPERM])
def test_folders_that_cannot_be_synced(tmp_path: Path, monkeypatch, number: int):
    fail(monkeypatch, os, "fsync", number, is_folder)
    assert [line.split(":")[0] for line in made(tmp_path / "out")] == ["no fsync of folders"]
    write_durably(tmp_path / "state", b"new")
    assert not sync_folder(tmp_path)


def test_a_disk_that_fails_is_not_a_missing_feature(tmp_path: Path, monkeypatch):
    fail(monkeypatch, os, "fsync", errno.EIO, is_folder)
    with pytest.raises(OSError, match="Input/output"):
        made(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_share_with_nothing_of_this_kind(tmp_path: Path, monkeypatch):
    fail(monkeypatch, fcntl, "flock", errno.ENOLCK)
    fail(monkeypatch, os, "chmod", errno.EPERM)
    fail(monkeypatch, os, "fsync", errno.EINVAL, is_folder)
    assert len(made(tmp_path / "out")) == 3


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOSPC, errno.EXDEV])
def test_finished_files_stay_when_the_last_step_fails(tmp_path: Path, monkeypatch, number: int):
    fail(monkeypatch, build_folder, "_replace", number)
    with pytest.raises(BuildError, match=r"out: .* at the end; the finished files are in .*\.out\.part: rename this"):
        made(tmp_path / "out")
    assert (tmp_path / ".out.part" / "language.gguf").read_bytes() == b"work"


def test_a_folder_that_cannot_be_locked_leaves_nothing(tmp_path: Path, monkeypatch):
    fail(monkeypatch, os, "open", errno.EACCES, lambda path, *_flags: str(path).endswith("/lock"))
    with pytest.raises(OSError, match="Permission denied"):
        made(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_run_that_fails_still_leaves_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match="broken"), atomic_folder(tmp_path / "out", "key") as folder:
        assert isinstance(folder, BuildFolder)
        raise ValueError("broken")
    assert not any(tmp_path.iterdir())
