"""The parts of a split model become one file of the bundle. gguf-py splits the models here as its converter does."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from edge_agent.bundle.file_check import UnsafeFileError, check_gguf
from edge_agent.bundle.files import hash_file
from edge_agent.bundle.gguf_package import gguf
from edge_agent.bundle.gguf_source import open_source
from edge_agent.bundle.manifest import LANGUAGE
from edge_agent.bundle.verify import verify_bundle
from edge_agent.bundle.wrap import wrap
from edge_agent.errors import BundleError
from tests.harness import gguf_toys as toys

FIRST, SECOND, THIRD = (f"toy-{number:05}-of-00003.gguf" for number in (1, 2, 3))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.write_language(tmp_path_factory.mktemp("whole") / "toy.gguf")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    toys.write_language(folder / "toy.gguf", split={"split_max_tensors": 8})
    return folder


@pytest.fixture
def parts(made: Path, tmp_path: Path) -> Path:
    """A folder with the three parts of a model."""
    return Path(shutil.copytree(made, tmp_path / "parts"))


@pytest.mark.parametrize("small_first_shard", [False, True])
@pytest.mark.parametrize("block_bytes", [256, 4 << 20])
def test_the_merged_file_is_the_one_that_was_split(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_first_shard: bool, block_bytes: int
) -> None:
    monkeypatch.setattr("edge_agent.bundle.gguf_source.BLOCK_BYTES", block_bytes)
    (tmp_path / "parts").mkdir()
    split = {"split_max_tensors": 8, "small_first_shard": small_first_shard}
    toys.write_language(tmp_path / "parts" / "toy.gguf", split=split)
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) == 3 + small_first_shard
    progress: list[tuple[int, int]] = []
    wrap(parts[0], None, tmp_path / "out", report=lambda *done: progress.append(done))
    assert (tmp_path / "out" / LANGUAGE).read_bytes() == whole.read_bytes()
    manifest = verify_bundle(tmp_path / "out").manifest
    assert manifest.source_sha256 == {part.name: hash_file(part).sha256 for part in parts}
    assert progress[-1] == (whole.stat().st_size, whole.stat().st_size)


def test_data_that_end_anywhere_are_padded(tmp_path: Path) -> None:
    def write(path: Path, **split: int) -> Path:
        writer = gguf.GGUFWriter(path, "llama", **split)
        for name, n in (("a", 3), ("b", 11), ("c", 5)):
            writer.add_tensor(name, np.arange(n, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    whole = write(tmp_path / "whole.gguf")
    write(tmp_path / "toy.gguf", split_max_tensors=1)
    with open_source(tmp_path / FIRST) as source:
        merged = b"".join(block.kept for block in source.blocks())
    assert merged == whole.read_bytes() and len(merged) == source.n_bytes


def test_parts_that_links_lead_to(parts: Path, whole: Path, tmp_path: Path) -> None:
    """As in a download cache: every name is a link to a file that is named by its hash."""
    (tmp_path / "names").mkdir()
    for number, part in enumerate(sorted(parts.iterdir())):
        (tmp_path / "names" / part.name).symlink_to(part.rename(tmp_path / f"blob{number}"))
    wrap(tmp_path / "names" / FIRST, None, tmp_path / "out")
    assert (tmp_path / "out" / LANGUAGE).read_bytes() == whole.read_bytes()


def test_a_file_that_was_merged_already(tmp_path: Path) -> None:
    """llama-gguf-split leaves its keys behind, with a count of 0."""
    keys = {"split.count": 0, "split.no": 0, "split.tensors.count": 20}
    path = toys.write_language(tmp_path / "x.gguf", keys=keys)
    wrap(path, None, tmp_path / "out")
    assert (tmp_path / "out" / LANGUAGE).read_bytes() == path.read_bytes()


def replaced(path: Path, *pairs: tuple[bytes, bytes]) -> None:
    raw = path.read_bytes()
    for old, new in pairs:
        assert raw.count(old) == 1, (old, raw.count(old))
        raw = raw.replace(old, new)
    path.write_bytes(raw)


def number(key: str, value: int, kind: int = 2) -> bytes:
    """A key and its value. kind: 2 is uint16, 5 is int32."""
    name = key.encode()
    return struct.pack("<Q", len(name)) + name + struct.pack({2: "<IH", 5: "<Ii"}[kind], kind, value)


def another_model(folder: Path, n_tensors: int = 8, drop: tuple[str, ...] = ()) -> None:
    """The second part is of a model with other tensors, or with other parts."""
    other = folder.parent / "other"
    other.mkdir()
    toys.write_language(other / "toy.gguf", split={"split_max_tensors": n_tensors}, drop=drop)
    other_second = next(path for path in sorted(other.iterdir()) if "-00002-" in path.name)
    other_second.replace(folder / SECOND)


def drop(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


# What is wrong -> (what is done to the folder of the parts, the file that is given, the file that the line names, words
# of the line).
REFUSED = {
    "a part is missing": (
        lambda folder: drop(folder, SECOND), FIRST, FIRST, f"part 1 of 3; missing beside it: {SECOND}; put all parts"
    ),
    "a part that is not the first": (
        lambda folder: None, SECOND, SECOND, f"part 2 of 3; give the first part, {FIRST}",
    ),
    "a name that was changed": (
        lambda folder: (folder / FIRST).rename(folder / "toy.gguf"), "toy.gguf", "toy.gguf",
        "part 1 of 3 of a split file; expected a name that ends with -00001-of-00003.gguf",
    ),
    "a name of another number": (
        lambda folder: (folder / SECOND).replace(folder / FIRST), FIRST, FIRST,
        "part 2 of 3 of a split file; expected a name that ends with -00002-of-00003.gguf",
    ),
    "two parts that are the same": (
        lambda folder: shutil.copy(folder / THIRD, folder / SECOND), FIRST, SECOND, "split.no: expected 1 beside",
    ),
    "a part of a model with more parts": (
        lambda folder: another_model(folder, n_tensors=5), FIRST, SECOND,
        f"split.count: expected 3 beside {FIRST}, found 4; it is a part of another model: download it again",
    ),
    "a part of a model with fewer tensors": (
        lambda folder: another_model(folder, drop=("output_norm.weight",)), FIRST, SECOND,
        "split.tensors.count: expected 20 beside",
    ),
    "a file that is not split": (
        lambda folder: toys.write_language(folder / SECOND), FIRST, SECOND, "split.count: expected 3 beside",
    ),
    "a tensor that is in two parts": (
        lambda folder: replaced(folder / SECOND, (b"blk.0.ffn_gate.weight", b"blk.0.ffn_norm.weight")),
        FIRST, SECOND, f"blk.0.ffn_norm.weight: this tensor is also in {FIRST}",
    ),
    "tensors that are missing": (
        lambda folder: [
            replaced(path, (number("split.tensors.count", 20, 5), number("split.tensors.count", 21, 5)))
            for path in folder.iterdir()
        ],
        FIRST, FIRST, "split.tensors.count: expected 21 tensors in 3 parts, found 20",
    ),
    "a part that is cut": (
        lambda folder: os.truncate(folder / THIRD, 1000), FIRST, THIRD, "ends after the end of the file",
    ),
    "an empty part": (
        lambda folder: os.truncate(folder / THIRD, 0), FIRST, THIRD, "an empty file; download or copy it again",
    ),
    "no number of the part": (
        lambda folder: replaced(folder / FIRST, (b"split.no", b"split.on")), FIRST, FIRST,
        "split.no: expected a number from 0 to 2, found None",
    ),
    "more parts than anybody makes": (
        lambda folder: replaced(folder / FIRST, (number("split.count", 3), number("split.count", 60000))),
        FIRST, FIRST, "split.count: expected a number from 0 to 512, found '60000'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "given", "named", "words"), REFUSED.values(), ids=REFUSED)
def test_parts_that_cannot_be_merged_are_one_line(parts: Path, spoil, given: str, named: str, words: str) -> None:
    spoil(parts)
    before = sorted(os.listdir(parts))
    with pytest.raises(BundleError) as caught:
        wrap(parts / given, None, parts / "out")
    line = str(caught.value)
    assert line.startswith(f"{parts / named}: ") and words in line and "\n" not in line
    assert sorted(os.listdir(parts)) == before


def test_many_missing_parts_are_counted(tmp_path: Path) -> None:
    toys.write_language(tmp_path / "toy.gguf", split={"split_max_tensors": 2})
    first, *others = sorted(tmp_path.iterdir())
    for other in others:
        other.unlink()
    with pytest.raises(BundleError, match=r"toy-00004-of-00010\.gguf and 6 more; put all parts into one folder"):
        wrap(first, None, tmp_path / "out")


@pytest.mark.parametrize(("name", "fits"), [(b"toy llama", True), (b"toy other", False)])
def test_a_part_with_keys_of_the_model(parts: Path, tmp_path: Path, name: bytes, fits: bool) -> None:
    """Some tools write them into every part."""
    raw = (parts / SECOND).read_bytes()
    start, n_tensors, n_keys = struct.unpack_from("<8sQQ", raw)
    key = struct.pack("<Q", 12) + b"general.name" + struct.pack("<IQ", 8, len(name)) + name
    header = struct.pack("<8sQQ", start, n_tensors, n_keys + 1) + key
    part = gguf.GGUFReader(parts / SECOND)
    end = part.tensors[-1].field.offset + sum(each.nbytes for each in part.tensors[-1].field.parts)
    header += raw[24:end]
    (parts / SECOND).write_bytes(header.ljust(-(-len(header) // 32) * 32, b"\0") + raw[part.data_offset :])
    if fits:
        wrap(parts / FIRST, None, tmp_path / "out")
        return
    with pytest.raises(BundleError, match=r"00002-of-00003\.gguf: general\.name: another value than in toy-00001"):
        wrap(parts / FIRST, None, tmp_path / "out")


def test_parts_are_not_linked(parts: Path) -> None:
    with pytest.raises(BundleError, match=r"toy-00001-of-00003\.gguf: 3 parts are merged, not linked; leave out"):
        wrap(parts / FIRST, None, parts / "out", link=True)
    assert not (parts / "out").exists()


def test_a_part_that_changes_while_it_is_read(parts: Path) -> None:
    def overwrite(_n_done: int, _n_total: int) -> None:
        with (parts / SECOND).open("r+b") as file:
            file.write(b"x")

    with pytest.raises(BundleError, match=r"toy-00002-of-00003\.gguf: changed while it was read; try again"):
        wrap(parts / FIRST, None, parts / "out", report=overwrite)
    assert sorted(os.listdir(parts)) == [FIRST, SECOND, THIRD]


def test_a_part_in_a_bundle_is_refused(parts: Path) -> None:
    """Every other reader gets one line about the tool that merges."""
    with pytest.raises(UnsafeFileError, match=r"split\.count: one of 3 parts of a split file; merge the parts first"):
        check_gguf(parts / FIRST, ("llama",))
