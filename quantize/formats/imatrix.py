"""An importance matrix: for each column of each weight, the mean square of the activations it was multiplied with.

Read and written in llama.cpp's own GGUF form (`NAME.in_sum2`, `NAME.counts`), so that each program can use the other's
files. measure/collect_imatrix.py collects one.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import msgspec
import numpy as np

from edge_agent.bundle.gguf_package import gguf
from edge_agent.errors import UserError
from quantize.formats.gguf_writer import WriterWithoutArchitecture
from quantize.source.checkpoint import Checkpoint

SUM, COUNT = ".in_sum2", ".counts"


class ImatrixError(UserError):
    """One line."""


class Imatrix(msgspec.Struct):
    """Sums of squared activations, by GGUF tensor name."""

    sums: dict[str, np.ndarray] = {}  # (width,) float64
    counts: dict[str, int] = {}  # of the rows that were added up
    n_chunks: int = 0  # of text
    chunk_size: int = 512  # tokens of a chunk
    datasets: list[str] = []

    def add(self, name: str, rows: np.ndarray) -> None:
        """rows: (n, width) float32, activations that the weight is multiplied with. Raises ImatrixError."""
        squares = np.square(rows).sum(0, dtype=np.float64)
        if not np.isfinite(squares).all():
            raise ImatrixError(f"{name}: activations that are not finite; the checkpoint is damaged")
        if name in self.sums:
            self.sums[name] += squares
            self.counts[name] += len(rows)
        else:
            self.sums[name], self.counts[name] = squares, len(rows)

    def of(self, name: str) -> np.ndarray | None:
        """(width,) float32, as llama-quantize gives it to the kernels. None: this weight is not in the matrix."""
        if name not in self.sums:
            return None
        if not self.counts[name]:
            return np.ones_like(self.sums[name], np.float32)
        return self.sums[name].astype(np.float32) / np.float32(self.counts[name])

    def digest(self) -> str:
        """SHA-256, in hex, of the numbers that the kernels get."""
        digest = hashlib.sha256()
        for name in sorted(self.sums):
            columns = self.of(name)
            assert columns is not None
            digest.update(name.encode() + columns.tobytes())
        return digest.hexdigest()


def write_imatrix(imatrix: Imatrix, path: Path) -> None:
    """llama.cpp's imatrix GGUF. `path` gets a complete file or stays as it was."""
    partial = path.with_name(path.name + ".new")
    writer = WriterWithoutArchitecture(partial)
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", imatrix.datasets or [""])
    writer.add_uint32("imatrix.chunk_count", imatrix.n_chunks)
    writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size)
    for name in sorted(imatrix.sums):
        writer.add_tensor(name + SUM, imatrix.sums[name].astype(np.float32)[None])
        writer.add_tensor(name + COUNT, np.array([[imatrix.counts[name]]], np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_imatrix(path: Path) -> Imatrix:
    """Read a file of edge-quantize or of llama-imatrix. Raises ImatrixError."""
    if not path.is_file():
        raise ImatrixError(f"{path}: no such file; make one with edge-quantize imatrix")
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: np.array(tensor.data, np.float32).reshape(-1) for tensor in reader.tensors}
    except Exception as error:  # the package's reader raises whatever the bytes lead it to
        raise ImatrixError(f"{path}: not a GGUF file, or damaged: {error}; make it again") from None
    if fields.get("general.type") != "imatrix":
        raise ImatrixError(
            f"{path}: general.type: expected 'imatrix', found {fields.get('general.type')!r}; give a file made by "
            "edge-quantize imatrix or llama-imatrix"
        )
    imatrix = Imatrix(
        n_chunks=int(fields.get("imatrix.chunk_count", 0)),
        chunk_size=int(fields.get("imatrix.chunk_size", 512)),
        datasets=list(fields.get("imatrix.datasets", [])),
    )
    for name in (name.removesuffix(SUM) for name in tensors if name.endswith(SUM)):
        sums, count = tensors[name + SUM], tensors.get(name + COUNT)
        if count is None or count.size != 1:
            raise ImatrixError(f"{path}: {name}{COUNT}: expected one number; the file is damaged or of experts")
        if not (np.isfinite(sums).all() and (sums >= 0).all() and np.isfinite(count).all()):
            raise ImatrixError(f"{path}: {name}{SUM}: expected finite sums of squares; make the file again")
        imatrix.sums[name], imatrix.counts[name] = sums.astype(np.float64), int(count[0])
    return imatrix


def check_imatrix(imatrix: Imatrix, path: Path, checkpoint: Checkpoint) -> None:
    """Check that the matrix belongs to this model: every weight of every layer is in it, with the same width.

    path: of the matrix, for the error. Raises ImatrixError.
    """
    layers = {int(layer[1]) for name in imatrix.sums if (layer := re.match(r"blk\.(\d+)\.", name))}
    if layers and max(layers) >= checkpoint.text.layers:
        raise ImatrixError(
            f"{path}: an importance matrix of {max(layers) + 1} layers, but {checkpoint.folder} has "
            f"{checkpoint.text.layers}; make one of this model with edge-quantize imatrix"
        )
    for spec in checkpoint.text_tensors:
        shape = checkpoint.shape(spec)
        if len(shape) != 2:
            continue
        if spec.gguf not in imatrix.sums:
            if spec.gguf.startswith("blk."):
                raise ImatrixError(f"{path}: {spec.gguf}: missing; the matrix is unfinished or of another model")
        elif len(imatrix.sums[spec.gguf]) != shape[1]:
            raise ImatrixError(
                f"{path}: {spec.gguf}: {len(imatrix.sums[spec.gguf])} columns, but {checkpoint.folder} has "
                f"{shape[1]}; the matrix is of another model"
            )
