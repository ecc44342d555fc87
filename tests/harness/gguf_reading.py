"""What a GGUF file holds, read with the gguf package: the tests compare with it."""

from __future__ import annotations

import functools
import json
import struct
from pathlib import Path

import numpy as np

from edge_agent.bundle.gguf_package import gguf
from tests.harness import toy_numbers

Kind = gguf.GGUFValueType

# -- the file ---------------------------------------------------------------------------------------------------------


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """A checkpoint's tensors read by hand: name -> (safetensors type, shape, bytes)."""
    raw = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    return {
        name: (
            entry["dtype"],
            tuple(entry["shape"]),
            raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def values(folder: Path, name: str) -> np.ndarray:
    """One tensor in float32, FP8 scale applied, by the number formats of toy.py."""
    tensors = stored(folder)
    kind, shape, raw = tensors[name]
    if kind == "BF16":
        return toy_numbers.from_bf16_bits(np.frombuffer(raw, np.uint16)).reshape(shape)
    scale = toy_numbers.from_bf16_bits(np.frombuffer(tensors[name + "_scale_inv"][2], np.uint16))[0]
    return toy_numbers.e4m3_value(np.frombuffer(raw, np.uint8)).reshape(shape) * scale


class Reader(gguf.GGUFReader):
    """Reads the lists of a vocabulary, thousands of strings and numbers, in a twentieth of the time."""

    def _get(self, offset, dtype, count=1, override_order=None):
        return np.frombuffer(self.data, dtype, int(count), int(offset))

    def _get_field_parts(self, orig_offs, raw_type):
        if raw_type != Kind.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, n = struct.unpack_from("<IQ", self.data, orig_offs)
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        at = orig_offs + 12
        if kind != Kind.STRING:
            values = self._get(at, self.gguf_scalar_to_np[kind], n)
            size = 12 + values.nbytes
            return size, [*head, *values.reshape(-1, 1)], list(range(2, 2 + n)), [Kind.ARRAY, Kind(kind)]
        texts = []
        for _ in range(n):
            (length,) = struct.unpack_from("<Q", self.data, at)
            texts.append(np.frombuffer(self.data, np.uint8, length, at + 8))
            at += 8 + length
        return at - orig_offs, [*head, *texts], list(range(2, 2 + n)), [Kind.ARRAY, Kind.STRING]


reader = functools.cache(Reader)  # no file of a session's fixtures changes


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """A GGUF file's tensors as the `gguf` package reads them, dequantised: name -> float32 in numpy's order of axes."""
    out = {}
    for tensor in reader(path).tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        out[tensor.name] = data.reshape(tuple(int(n) for n in reversed(tensor.shape)))
    return out


def interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """HF's half-split rotary rows -> pairs side by side, row by row: the slow and obvious way."""
    per_head = len(matrix) // heads
    out = np.empty_like(matrix)
    for head in range(heads):
        for pair in range(per_head // 2):
            first = head * per_head + pair
            out[head * per_head + 2 * pair] = matrix[first]
            out[head * per_head + 2 * pair + 1] = matrix[first + per_head // 2]
    return out
