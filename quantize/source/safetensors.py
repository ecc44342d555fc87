"""Headers and tensors of safetensors files. https://github.com/huggingface/safetensors#format

The `safetensors` package maps files and returns whole tensors. Here only headers are read at first, every byte range is
checked against the file's size, and tensor bytes are read later in blocks of rows, so that memory stays bounded.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np

from edge_agent.bundle.recognise import describe
from quantize.source.hf_config import CheckpointError

MAX_HEADER_BYTES = 100 << 20  # the format's own limit
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
FP8 = "F8_E4M3"


class StoredTensor(msgspec.Struct, frozen=True):
    """Where the bytes of one tensor are."""

    name: str  # as the file spells it
    file: Path
    offset: int  # bytes from the start of the file
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(path: Path) -> list[StoredTensor]:
    """Every tensor of one file, in the header's order. Raises CheckpointError when the header or the size is wrong."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if length < 2 or length > min(size - 8, MAX_HEADER_BYTES):
            what = describe(path) or f"not a safetensors file, or cut in its header ({size} bytes); copy it again"
            raise CheckpointError(f"{path}: {what}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path}: safetensors header is not JSON: {error}; copy it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: safetensors header: expected an object, found a {type(header).__name__}")
    header.pop("__metadata__", None)
    tensors = [_stored_tensor(path, 8 + length, name, entry) for name, entry in header.items()]
    for before, after in itertools.pairwise(sorted(tensors, key=lambda tensor: tensor.offset)):
        if before.offset + before.n_bytes > after.offset:
            raise CheckpointError(
                f"{path}: {before.name} and {after.name} overlap; the header is damaged, copy it again"
            )
    expected_size = max((tensor.offset + tensor.n_bytes for tensor in tensors), default=0)
    if size != expected_size:
        raise CheckpointError(
            f"{path}: expected {expected_size} bytes by its header, found {size}; copy the file again"
        )
    return tensors


def _stored_tensor(path: Path, data_start: int, name: str, entry: object) -> StoredTensor:
    """One entry of a header, checked. data_start: where the tensor bytes begin in the file."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: {name}: header entry is damaged; copy the file again") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name}: dtype: expected one of {', '.join(DTYPES)}, found {dtype}")
    if any(not isinstance(n, int) or n < 0 for n in (*shape, start, end)):
        raise CheckpointError(f"{path}: {name}: header entry is damaged; copy the file again")
    tensor = StoredTensor(name, path, data_start + start, dtype, shape)
    if end - start != tensor.n_bytes:
        raise CheckpointError(
            f"{path}: {name}: expected {tensor.n_bytes} bytes for {shape} {dtype}, found {end - start}"
        )
    return tensor


def read_tensor(tensor: StoredTensor) -> np.ndarray:
    """A whole small tensor: its shape, float32. An FP8 tensor is returned without its scale."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        raw = np.frombuffer(file.read(tensor.n_bytes), DTYPES[tensor.dtype])
    return raw.astype(np.float32).reshape(tensor.shape)


def read_rows(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a tensor: (stop - start, ...) in the stored dtype. Raises CheckpointError."""
    dtype = DTYPES[tensor.dtype]
    rows = np.empty((stop - start, *tensor.shape[1:]), dtype)
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset + start * math.prod(tensor.shape[1:]) * dtype.itemsize)
        if file.readinto(rows.view(np.uint8).reshape(-1).data) != rows.nbytes:
            raise CheckpointError(f"{tensor.file}: {tensor.name}: file ends early; copy the checkpoint again")
    return rows
