"""A GGUF file that is wrapped, opened once: what was checked is what is copied. The parts of a split file are one such
file: its header is made here, and the data of the parts follow it as they are.

    with open_source(Path("model-00001-of-00003.gguf")) as source:
        header = check_gguf(source.opened, ARCHITECTURES)
        for block in source.blocks():
            out.write(block.kept)

`llama-gguf-split` divides a model between two tensors. The first part has all keys of the model, and every part has the
keys split.no (from 0), split.count and split.tensors.count (of all parts together). The merged file has no key split.*,
so it is the file before it was split.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edge_agent.bundle import recognise
from edge_agent.bundle.file_check import (
    ALIGNMENT_BYTES,
    BLOCKS,
    GGUF_VERSIONS,
    PARTS,
    GgufPart,
    UnsafeFileError,
    padded,
    read_n_parts,
    read_part,
)
from edge_agent.bundle.files import BLOCK_BYTES, file_stamp
from edge_agent.errors import BundleError

PART, ALL_TENSORS, SPLIT_KEYS = "split.no", "split.tensors.count", "split."
PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
MAX_NAMED = 3  # missing parts that are named
TYPE_NUMBERS = {name: number for number, (name, *_) in BLOCKS.items()}


class OpenFile(NamedTuple):
    path: Path
    descriptor: int
    stamp: tuple[int, ...]

    @property
    def opened(self) -> Path:
        return Path(f"/proc/self/fd/{self.descriptor}")


class Piece(NamedTuple):
    """The bytes of a file that are copied: from start to end."""

    file: OpenFile
    start: int
    end: int


class Block(NamedTuple):
    """part: the name of the part that `read` is from; "": not of a part. kept: what is copied."""

    part: str
    read: bytes
    kept: bytes | memoryview


class Source(NamedTuple):
    path: Path  # of the file, or of the first part
    opened: Path  # what is checked: the file; or the header of the merged file, and zeros in place of its data
    header: bytes  # of the merged file; b"": one file
    pieces: tuple[Piece, ...]

    @property
    def is_split(self) -> bool:
        return bool(self.header)

    @property
    def n_bytes(self) -> int:
        return len(self.header) + sum(piece.end - piece.start + self._padding(piece) for piece in self.pieces)

    def _padding(self, piece: Piece) -> int:
        return -(piece.end - piece.start) % ALIGNMENT_BYTES if self.is_split else 0

    def blocks(self) -> Iterator[Block]:
        """All bytes, in order. Every part is read as a whole, its header too, so that it can be hashed."""
        if self.is_split:
            yield Block("", b"", self.header)
        for piece in self.pieces:
            part, position = piece.file.path.name if self.is_split else "", 0
            while read := os.pread(piece.file.descriptor, BLOCK_BYTES, position):
                kept = memoryview(read)[max(0, piece.start - position) : max(0, piece.end - position)]
                yield Block(part, read, kept)
                position += len(read)
            if n_padding := self._padding(piece):
                yield Block("", b"", bytes(n_padding))

    def check_unchanged(self) -> None:
        """Raises BundleError if a file was written to since it was opened."""
        for piece in self.pieces:
            if file_stamp(piece.file.descriptor) != piece.file.stamp:
                raise BundleError(f"{piece.file.path}: changed while it was read; try again")


@contextlib.contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """path: a file, or the first part of several; the others lie beside it. Raises BundleError."""
    with contextlib.ExitStack() as opened:
        first = opened.enter_context(_open_gguf(path))
        try:
            n_parts = read_n_parts(first.opened)
        except UnsafeFileError:  # said by the check of its header
            n_parts = 1
        if n_parts == 1:
            yield Source(path, first.opened, b"", (Piece(first, 0, os.fstat(first.descriptor).st_size),))
            return
        files = [first, *(opened.enter_context(_open_gguf(other)) for other in _other_parts(first, n_parts))]
        parts = [_read_part(file) for file in files]
        _check_one_model(files, parts, n_parts)
        header = merged_header(parts)
        pieces = (Piece(file, part.data_start, _data_end(part)) for file, part in zip(files, parts, strict=True))
        source = Source(path, Path(), header, tuple(pieces))
        yield source._replace(opened=opened.enter_context(_in_memory(header, source.n_bytes)))


@contextlib.contextmanager
def _open_gguf(path: Path) -> Iterator[OpenFile]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from None
    try:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if not is_file or os.pread(descriptor, 4, 0) != b"GGUF":
            raise BundleError(f"{path}: {recognise.describe(path) or 'not a GGUF file'}; expected a GGUF file")
        yield OpenFile(path, descriptor, file_stamp(descriptor))
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _in_memory(header: bytes, n_bytes: int) -> Iterator[Path]:
    """A file of this size that begins with `header`. What follows takes no memory."""
    descriptor = os.memfd_create("merged.gguf", os.MFD_CLOEXEC)
    with open(descriptor, "wb") as file:
        file.write(header)
        file.truncate(n_bytes)
        file.flush()
        yield Path(f"/proc/self/fd/{descriptor}")


# -- the parts of a split file -----------------------------------------------------------------------------------------


def _read_part(file: OpenFile) -> GgufPart:
    try:
        return read_part(file.opened)
    except UnsafeFileError as error:
        raise BundleError(f"{file.path}: {error}") from None


def _other_parts(first: OpenFile, n_parts: int) -> list[Path]:
    """The paths of the other parts, which are there. Raises BundleError."""
    number = _read_part(first).values.get(PART)
    if not isinstance(number, int) or not 0 <= number < n_parts:
        raise BundleError(f"{first.path}: {PART}: expected a number from 0 to {n_parts - 1}, found {str(number)[:40]}")
    match = PART_NAME.fullmatch(first.path.name)
    if match is None or (int(match[2]), int(match[3])) != (number + 1, n_parts):
        raise BundleError(
            f"{first.path}: part {number + 1} of {n_parts} of a split file; expected a name that ends with "
            f"{_ending(number, n_parts)}; give the parts their names back"
        )
    paths = [first.path.with_name(match[1] + _ending(i, n_parts)) for i in range(n_parts)]
    if number:
        raise BundleError(f"{first.path}: part {number + 1} of {n_parts}; give the first part, {paths[0].name}")
    if missing := [path.name for path in paths if not path.exists()]:
        more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
        raise BundleError(
            f"{first.path}: part 1 of {n_parts}; missing beside it: {', '.join(missing[:MAX_NAMED])}{more}; put all "
            "parts into one folder"
        )
    return paths[1:]


def _ending(number: int, n_parts: int) -> str:
    return f"-{number + 1:05}-of-{n_parts:05}.gguf"


def _check_one_model(files: list[OpenFile], parts: list[GgufPart], n_parts: int) -> None:
    """Raises BundleError unless these are all parts of one model."""
    first, n_tensors = parts[0], parts[0].values.get(ALL_TENSORS)
    place_of: dict[str, str] = {}  # tensor -> name of its part
    for number, (file, part) in enumerate(zip(files, parts, strict=True)):
        for key, expected in ((PARTS, n_parts), (PART, number), (ALL_TENSORS, n_tensors)):
            if (found := part.values.get(key)) != expected:
                raise BundleError(
                    f"{file.path}: {key}: expected {expected} beside {files[0].path.name}, found {str(found)[:40]}; "
                    "it is a part of another model: download it again"
                )
        for key in part.keys.keys() & first.keys.keys():
            if not key.startswith(SPLIT_KEYS) and part.keys[key] != first.keys[key]:
                raise BundleError(
                    f"{file.path}: {key}: another value than in {files[0].path.name}; it is a part of another model: "
                    "download it again"
                )
        for name in part.tensors:
            if other := place_of.get(name):
                raise BundleError(
                    f"{file.path}: {name}: this tensor is also in {other}; it is a part of another model: download it "
                    "again"
                )
            place_of[name] = file.path.name
    if len(place_of) != n_tensors:
        raise BundleError(
            f"{files[0].path}: {ALL_TENSORS}: expected {str(n_tensors)[:40]} tensors in {n_parts} parts, found "
            f"{len(place_of)}; download the parts again"
        )


def _data_end(part: GgufPart) -> int:
    return max((tensor.offset + tensor.n_bytes for tensor in part.tensors.values()), default=part.data_start)


def merged_header(parts: list[GgufPart]) -> bytes:
    """Keys and tensors of the file whose data are those of the parts, one after the other, each padded."""
    keys = [raw for key, raw in parts[0].keys.items() if not key.startswith(SPLIT_KEYS)]
    tensors, n_before = [], 0
    for part in parts:
        for name, tensor in part.tensors.items():
            offset = n_before + tensor.offset - part.data_start
            shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
            kind = struct.pack("<IQ", TYPE_NUMBERS[tensor.type_name], offset)
            tensors.append(struct.pack("<Q", len(name.encode())) + name.encode() + shape + kind)
        n_before += padded(_data_end(part) - part.data_start)
    counts = struct.pack("<IQQ", GGUF_VERSIONS[-1], len(tensors), len(keys))
    header = b"".join((b"GGUF", counts, *keys, *tensors))
    return header.ljust(padded(len(header)), b"\0")
