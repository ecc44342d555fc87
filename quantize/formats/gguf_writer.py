"""One GGUF file, written in order: header fields, the list of tensors, then the bytes of every tensor in blocks.

The `gguf` package writes the header. Its own tensor writer would need each tensor whole in memory; the format behind
the header is only bytes with padding between tensors, so they are written here.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from edge_agent.bundle.gguf_package import gguf
from quantize.formats.ggml_kernels import Type, tensor_bytes

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
HEADER_SUFFIX = ".head"  # of the temporary file that the package writes the header to


class State(enum.Enum):
    HEADER = "header"  # fields are added and tensors declared
    TENSORS = "tensors"  # the header is on disk; tensors are written in the order of their declaration
    CLOSED = "closed"


class _Tensor(NamedTuple):
    name: str
    n_bytes: int  # without padding
    padded_bytes: int


class HeaderWriter(gguf.GGUFWriter):
    """Packs the list of tokens, of their types and of merges at once. The package packs every entry by itself, which
    takes seconds for 131072 tokens."""

    def _pack_val(
        self,
        val: Any,
        vtype: gguf.GGUFValueType,
        add_vtype: bool,
        sub_type: gguf.GGUFValueType | None = None,
    ) -> bytes:
        if vtype == gguf.GGUFValueType.ARRAY and sub_type is None and isinstance(val, list) and val:
            if all(isinstance(item, str) for item in val):
                return self._array(gguf.GGUFValueType.STRING, len(val), _packed_strings(val))
            if all(type(item) is int for item in val):
                return self._array(gguf.GGUFValueType.INT32, len(val), np.array(val, "<i4").tobytes())
        packed: bytes = super()._pack_val(val, vtype, add_vtype, sub_type)
        return packed

    def _array(self, kind: gguf.GGUFValueType, n: int, items: bytes) -> bytes:
        return struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, kind, n) + items


def _packed_strings(texts: list[str]) -> bytes:
    encoded = [text.encode() for text in texts]
    return b"".join(part for text in encoded for part in (struct.pack("<Q", len(text)), text))


class GgufFile:
    """HEADER -> start() -> TENSORS -> close() -> CLOSED. Every method checks its state."""

    def __init__(self, path: Path, architecture: str) -> None:
        self.path, self.state = path, State.HEADER
        self._header = HeaderWriter(path.with_name(path.name + HEADER_SUFFIX), architecture)
        self._tensors: list[_Tensor] = []
        self._n_written = 0
        self._file: BinaryIO | None = None

    @property
    def fields(self) -> gguf.GGUFWriter:
        """The package's writer, for its add_* methods of header fields."""
        self._expect(State.HEADER)
        return self._header

    def declare(self, name: str, shape: tuple[int, ...], kind: Type) -> None:
        """Add a tensor to the header. shape: outermost dimension first."""
        self._expect(State.HEADER)
        n_bytes = tensor_bytes(shape, kind)
        self._header.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, kind)
        self._tensors.append(_Tensor(name, n_bytes, gguf.GGUFWriter.ggml_pad(n_bytes, ALIGNMENT)))

    def start(self, kept_bytes: int = 0) -> None:
        """Write the header. kept_bytes: how much of the file, from its start, an earlier run has left complete."""
        self._expect(State.HEADER)
        header = self._header_bytes()
        self._file = self.path.open("r+b" if kept_bytes else "wb")
        self._file.write(header)
        self.state = State.TENSORS

    def write(self, blocks: Iterable[np.ndarray]) -> None:
        """Write the next declared tensor from blocks of its bytes, as the file stores them, and flush the file."""
        file, tensor = self._next()
        start = file.tell()
        for block in blocks:
            file.write(block.view(np.uint8).data)
        if file.tell() - start != tensor.n_bytes:
            raise ValueError(f"{tensor.name}: expected {tensor.n_bytes} bytes, wrote {file.tell() - start}")
        file.write(bytes(tensor.padded_bytes - tensor.n_bytes))
        file.flush()

    def skip(self) -> None:
        """Leave the next declared tensor as an earlier run has written it, or as a hole in the file."""
        file, tensor = self._next()
        file.seek(tensor.padded_bytes, os.SEEK_CUR)

    @property
    def position(self) -> int:
        """The end of what is written or skipped: bytes from the start of the file, padding included."""
        return self._opened().tell()

    @property
    def next_end(self) -> int:
        """Where the next declared tensor will end: bytes from the start of the file, padding included."""
        return self.position + self._tensors[self._n_written].padded_bytes

    def fileno(self) -> int:
        return self._opened().fileno()

    def close(self) -> None:
        """End the file behind the last tensor. Every declared tensor must be written or skipped."""
        file = self._opened()
        if self._n_written < len(self._tensors):
            raise ValueError(f"{self.path}: {self._tensors[self._n_written].name} was declared and not written")
        file.truncate()
        self.abandon()

    def abandon(self) -> None:
        """Close without checks, after an error. May be called in every state."""
        if self.state is State.HEADER:
            self._header.close()
        if self._file is not None:
            self._file.close()
        self.state = State.CLOSED

    def _header_bytes(self) -> bytes:
        temporary = self.path.with_name(self.path.name + HEADER_SUFFIX)
        try:
            self._header.write_header_to_file()
            self._header.write_kv_data_to_file()
            self._header.write_ti_data_to_file()
            self._header.close()
            header = temporary.read_bytes()
        finally:
            temporary.unlink(missing_ok=True)
        return header + bytes(-len(header) % ALIGNMENT)

    def _next(self) -> tuple[BinaryIO, _Tensor]:
        """(file, next declared tensor); the tensor now counts as written."""
        file, tensor = self._opened(), self._tensors[self._n_written]
        self._n_written += 1
        return file, tensor

    def _opened(self) -> BinaryIO:
        self._expect(State.TENSORS)
        assert self._file is not None
        return self._file

    def _expect(self, state: State) -> None:
        if self.state is not state:
            raise ValueError(f"{self.path}: expected the state {state.value}, found {self.state.value}")


class WriterWithoutArchitecture(gguf.GGUFWriter):
    """For GGUF files that are not a model, such as llama.cpp's importance matrix."""

    def __init__(self, path: os.PathLike[str]) -> None:
        super().__init__(path, "")

    def add_architecture(self) -> None:
        """The package calls this from its constructor; the field is left out."""
