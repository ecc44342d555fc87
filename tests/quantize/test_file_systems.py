"""Network shares and USB disks: what a file system cannot do is said before the work, and never costs the result.

The writers are the build folder (build, convert, imatrix, evaluate, --budget) and the adapter's (lora).
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_agent.bundle.files import sync_folder, write_durably
from quantize import build_folder
from quantize.build import convert
from quantize.build_folder import BuildError, BuildFolder, atomic_folder, check_file_size, temporary_folder
from quantize.formats.build_plan import plan_conversion
from quantize.measure.perplexity import write_reference
from quantize.progress import SILENT
from quantize.source.checkpoint import Checkpoint, read_checkpoint
from quantize.source.lora import Adapter, read_adapter, write_adapter
from tests.harness import toy


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


# -- the largest file -------------------------------------------------------------------------------------------------

FAT_BYTES = (1 << 32) - 1


def like_fat(monkeypatch, largest: int = FAT_BYTES) -> None:
    """The kernel refuses an offset beyond the file system's limit, before anything is written."""
    real = os.lseek

    def lseek(descriptor: int, offset: int, how: int) -> int:
        if offset > largest:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, offset, how)

    monkeypatch.setattr(os, "lseek", lseek)


def test_a_file_that_fat_cannot_hold_is_named_before_the_work(tmp_path: Path, monkeypatch):
    like_fat(monkeypatch)
    check_file_size(tmp_path, FAT_BYTES, "language.gguf")
    with pytest.raises(BuildError, match=r"language\.gguf has 8\.20 GB, and this file system cannot hold .*FAT"):
        check_file_size(tmp_path, 8_200_000_000, "language.gguf")
    assert not any(tmp_path.iterdir())


def test_the_probe_writes_nothing(tmp_path: Path):
    """A file of the full size would be written with zeros on FAT, which takes minutes."""
    before = shutil.disk_usage(tmp_path).free
    check_file_size(tmp_path, 1 << 40, "language.gguf")
    assert before - shutil.disk_usage(tmp_path).free < 1 << 36 and not any(tmp_path.iterdir())


def test_the_limit_of_this_process_counts(tmp_path: Path):
    """Real: ulimit -f."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        check_file_size(tmp_path, 1 << 20, "vision.onnx")
        with pytest.raises(BuildError, match=r"vision\.onnx has 1\.0 MB, .* \(ulimit -f\); raise the limit"):
            check_file_size(tmp_path, (1 << 20) + 1, "vision.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_takes_no_file_is_an_error_of_the_system(tmp_path: Path, monkeypatch, number: int):
    fail(monkeypatch, os, "open", number)
    with pytest.raises(OSError, match=os.strerror(number)):
        check_file_size(tmp_path, 1, "language.gguf")


def test_a_file_that_becomes_too_large_anyway_is_named(tmp_path: Path):
    with (
        pytest.raises(BuildError, match=r"File too large while writing it: .* use another disk"),
        atomic_folder(tmp_path / "out", "key"),
    ):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), "language.gguf")


def refused_before_the_work(write, tmp_path: Path, monkeypatch) -> None:
    like_fat(monkeypatch, 100)
    with pytest.raises(BuildError, match="this file system cannot hold such a file"):
        write()
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*")) and not list(tmp_path.glob("out*"))


@pytest.fixture
def checkpoint(toy_bf16: Path) -> Checkpoint:
    return read_checkpoint(toy_bf16)


def test_a_conversion_is_refused_before_the_work(checkpoint, tmp_path: Path, monkeypatch):
    plan = plan_conversion(checkpoint, "bf16")
    refused_before_the_work(lambda: convert(plan, tmp_path / "out", SILENT), tmp_path, monkeypatch)


def test_work_that_an_earlier_run_has_left_is_refused_and_stays(checkpoint, tmp_path: Path, monkeypatch):
    """The disk was copied to one with FAT."""
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out", "key") as folder:
        (folder / "language.gguf").write_bytes(b"work")
        folder.mark_complete("language.gguf")
        raise KeyboardInterrupt
    plan = plan_conversion(checkpoint, "bf16")
    like_fat(monkeypatch, 100)
    with pytest.raises(BuildError, match="this file system cannot hold such a file"):
        convert(plan, tmp_path / "out", SILENT)
    assert (tmp_path / ".out.part" / "language.gguf").read_bytes() == b"work"


# -- the adapter's file -----------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(checkpoint, tmp_path_factory) -> Iterator[Adapter]:
    folder = tmp_path_factory.mktemp("adapter")
    toy.write_adapter(folder, {"model.language_model.layers.0.mlp.up_proj": (512, 256)})
    return read_adapter(folder, checkpoint)


def test_an_adapter_is_refused_before_the_work(adapter, checkpoint, tmp_path: Path, monkeypatch):
    write = lambda: write_adapter(adapter, checkpoint, tmp_path / "out.gguf", SILENT)  # noqa: E731
    refused_before_the_work(write, tmp_path, monkeypatch)


def test_an_adapter_that_has_no_room_is_refused_before_the_work(adapter, checkpoint, tmp_path: Path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(BuildError, match=r"MB needed, 0\.0 MB free; make room"):
        write_adapter(adapter, checkpoint, tmp_path / "out.gguf", SILENT)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_to_is_named_before_the_work(
    adapter, checkpoint, tmp_path: Path, monkeypatch, number: int
):
    creates = os.O_CREAT | os.O_TMPFILE
    fail(monkeypatch, os, "open", number, lambda path, flags=0, *_mode, **_more: flags & creates)
    with pytest.raises(BuildError, match=f"{os.strerror(number)}; give a folder that can be written to"):
        write_adapter(adapter, checkpoint, tmp_path / "out.gguf", SILENT)
    monkeypatch.undo()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (os, "replace")])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EFBIG])
def test_an_older_adapter_and_its_signature_stay_when_the_disk_fails(
    adapter, checkpoint, tmp_path: Path, monkeypatch, owner: Any, name: str, number: int
):
    out, signature = tmp_path / "out.gguf", tmp_path / "out.gguf.sig"
    out.write_bytes(b"old")
    signature.write_bytes(b"old too")
    fail(monkeypatch, owner, name, number)
    with pytest.raises(BuildError, match=f"{os.strerror(number)} while .* was written"):
        write_adapter(adapter, checkpoint, out, SILENT)
    monkeypatch.undo()
    assert (out.read_bytes(), signature.read_bytes()) == (b"old", b"old too")
    assert sorted(os.listdir(tmp_path)) == ["out.gguf", "out.gguf.sig"]


def test_an_adapter_on_a_share_without_locks_modes_and_folder_sync(adapter, checkpoint, tmp_path: Path, monkeypatch):
    fail(monkeypatch, fcntl, "flock", errno.ENOLCK)
    fail(monkeypatch, os, "chmod", errno.EPERM)
    fail(monkeypatch, os, "fsync", errno.EINVAL, is_folder)
    write_adapter(adapter, checkpoint, tmp_path / "out.gguf", SILENT)
    assert os.listdir(tmp_path) == ["out.gguf"]


def test_a_reference_of_an_evaluation_is_refused_before_the_work(tmp_path: Path, monkeypatch):
    """Log-probabilities of a long text: 134 MB for each chunk of 512 tokens with a full vocabulary."""
    like_fat(monkeypatch)
    model = SimpleNamespace(n_vocab=131_072)  # nothing is evaluated
    with pytest.raises(BuildError, match=r"reference\.kld has .*cannot hold such a file"):
        write_reference(model, np.zeros((128, 512), np.int32), tmp_path / "reference.kld", SILENT)
    assert not any(tmp_path.iterdir())
