"""An importance matrix: how much each column of each weight counts, as mean squares of what it was multiplied with.

Read and written in llama.cpp's own GGUF form (`NAME.in_sum2`, `NAME.counts`), so files travel both ways. Collecting one
is in calibrate.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import msgspec
import numpy as np

from edge_agent.errors import UserError
from quantize.source.checkpoint import Checkpoint

SUM, COUNT = ".in_sum2", ".counts"


class ImatrixError(UserError):
    """One line."""


class Imatrix(msgspec.Struct):
    """Sums of squares by GGUF tensor name, and of how many rows."""

    sums: dict[str, np.ndarray] = {}  # (width,) float64
    counts: dict[str, int] = {}
    n_chunks: int = 0
    chunk_size: int = 512  # rows; what the count of chunks is in
    datasets: list[str] = []

    def add(self, name: str, rows: np.ndarray) -> None:
        """rows: (n, width) float32, what the weight is multiplied with."""
        found = np.square(rows).sum(0, dtype=np.float64)
        if not np.isfinite(found).all():
            raise ImatrixError(f"{name}: activations that are not finite; the checkpoint is damaged")
        if name in self.sums:
            self.sums[name] += found
            self.counts[name] += len(rows)
        else:
            self.sums[name], self.counts[name] = found, len(rows)

    def of(self, name: str) -> np.ndarray | None:
        """(width,) float32, as llama-quantize would hand it to the kernels; None: nothing is known of this weight."""
        if name not in self.sums:
            return None
        if not self.counts[name]:
            return np.ones_like(self.sums[name], np.float32)
        return self.sums[name].astype(np.float32) / np.float32(self.counts[name])


def write_imatrix(importance: Imatrix, path: Path) -> None:
    """llama.cpp's imatrix GGUF. The file appears whole or not at all."""
    partial = path.with_name(path.name + ".new")
    writer = gguf.GGUFWriter(partial, "")
    writer.kv_data[0].clear()  # no architecture: it is no model
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", importance.datasets or [""])
    writer.add_uint32("imatrix.chunk_count", importance.n_chunks)
    writer.add_uint32("imatrix.chunk_size", importance.chunk_size)
    for name in sorted(importance.sums):
        writer.add_tensor(name + SUM, importance.sums[name].astype(np.float32)[None])
        writer.add_tensor(name + COUNT, np.array([[importance.counts[name]]], np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_imatrix(path: Path) -> Imatrix:
    """Raises ImportanceError."""
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
    found = Imatrix(
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
        found.sums[name], found.counts[name] = sums.astype(np.float64), int(count[0])
    return found


def check_imatrix(importance: Imatrix, path: Path, checkpoint: Checkpoint) -> None:
    """The matrix is of this model: every weight of a layer is in it, as wide as here. Raises ImportanceError."""
    layers = {int(found[1]) for name in importance.sums if (found := re.match(r"blk\.(\d+)\.", name))}
    if layers and max(layers) >= checkpoint.text.layers:
        raise ImatrixError(
            f"{path}: an importance matrix of {max(layers) + 1} layers, but {checkpoint.folder} has "
            f"{checkpoint.text.layers}; make one of this model with edge-quantize imatrix"
        )
    for row in checkpoint.text_rows:
        shape = checkpoint.shape(row)
        if len(shape) != 2:
            continue
        if row.gguf not in importance.sums:
            if row.gguf.startswith("blk."):
                raise ImatrixError(f"{path}: {row.gguf}: missing; the matrix is unfinished or of another model")
        elif len(importance.sums[row.gguf]) != shape[1]:
            raise ImatrixError(
                f"{path}: {row.gguf}: {len(importance.sums[row.gguf])} columns, but {checkpoint.folder} has "
                f"{shape[1]}; the matrix is of another model"
            )
