"""Look a GGUF or ONNX file over before a native parser sees it: bounds, names, and only what bundles of ours hold.

Parsers in C++ have had memory errors on crafted files; this one is Python, reads headers only, and knows an allow-list.
Not here: whether the numbers make sense (edge-quantize tried them), and whose the file is (hashes and signature).

GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md   ONNX: onnx.proto, in protobuf's wire format
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from edge_agent.errors import UserError

MAX_KEYS, MAX_TENSORS, MAX_KEY_BYTES, MAX_NAME_BYTES = 4096, 65536, 256, 63
MAX_ARRAY = 1 << 24
MAX_ELEMENTS = 1 << 40
# ggml type -> numbers in a block, bytes of it: what edge-quantize writes
BLOCKS = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    30: (1, 2),  # BF16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    20: (32, 18),  # IQ4_NL
    23: (256, 136),  # IQ4_XS
}
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # GGUF value type -> bytes
STRING, ARRAY = 8, 9
MAX_OPSET, MAX_IR_VERSION = 21, 10
DATA_TYPES = {1: 4, 3: 1, 7: 8, 10: 2, 16: 2}  # TensorProto: FLOAT, INT8, INT64, FLOAT16, BFLOAT16 -> bytes
OPS = frozenset((
    "Add", "Cast", "Concat", "Conv", "Cos", "DequantizeLinear", "Div", "Erf", "Expand", "Gemm", "Identity", "MatMul",
    "Mul", "Neg", "Pow", "Range", "ReduceMean", "Reshape", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Sqrt",
    "Squeeze", "Transpose", "Unsqueeze",
))  # fmt: skip


class UnsafeFileError(UserError):
    """What is wrong with the file; one line, without its name."""


# -- GGUF --------------------------------------------------------------------------------------------------------------


def check_gguf(path: Path, architectures: tuple[str, ...]) -> tuple[dict[str, object], dict[str, list[int]]]:
    """-> keys (values of strings and whole numbers only), and tensors' shapes as GGUF has them, innermost first.

    Raises Suspect. architectures: general.architecture has to be one of them.
    """
    with path.open("rb") as file, _mapped(file) as data:
        reader = _Reader(data)
        if reader.take(4) != b"GGUF" or reader.number("<I") != 3:
            raise UnsafeFileError("expected GGUF version 3")
        n_tensors, n_keys = reader.number("<Q"), reader.number("<Q")
        if not 0 < n_tensors <= MAX_TENSORS or n_keys > MAX_KEYS:
            raise UnsafeFileError(
                f"{n_tensors} tensors and {n_keys} keys; expected at most {MAX_TENSORS} and {MAX_KEYS}"
            )
        keys = _keys(reader, n_keys)
        if (found := keys.get("general.architecture")) not in architectures:
            raise UnsafeFileError(f"general.architecture: expected {' or '.join(architectures)}, found {found!r}")
        alignment = keys.get("general.alignment", 32)
        if alignment != 32:
            raise UnsafeFileError(f"general.alignment: expected 32, found {alignment!r}")
        return keys, _tensors(reader, n_tensors)


def _keys(reader: _Reader, n: int) -> dict[str, object]:
    """Every key; the values of strings and whole numbers only."""
    found: dict[str, object] = {}
    for _ in range(n):
        key = reader.string(MAX_KEY_BYTES)
        if key in found:
            raise UnsafeFileError(f"{key}: there twice")
        if key.startswith("split."):
            raise UnsafeFileError(f"{key}: a part of a model; expected a whole one")
        found[key] = reader.value(reader.number("<I"), key)
    return found


def _tensors(reader: _Reader, n: int) -> dict[str, list[int]]:
    shapes, spans = {}, []
    for _ in range(n):
        name = reader.string(MAX_NAME_BYTES)
        if name in shapes:
            raise UnsafeFileError(f"{name}: there twice")
        n_dims = reader.number("<I")
        if not 1 <= n_dims <= 4:
            raise UnsafeFileError(f"{name}: {n_dims} dimensions; expected 1 to 4")
        shape = shapes[name] = [reader.number("<Q") for _ in range(n_dims)]
        kind, offset = reader.number("<I"), reader.number("<Q")
        if kind not in BLOCKS:
            raise UnsafeFileError(f"{name}: type {kind}: not one that edge-quantize writes")
        if not all(0 < side <= MAX_ELEMENTS for side in shape) or math.prod(shape) > MAX_ELEMENTS:
            raise UnsafeFileError(f"{name}: shape {shape}")
        per_block, n_bytes = BLOCKS[kind]
        if shape[0] % per_block:
            raise UnsafeFileError(f"{name}: rows of {shape[0]} numbers are no whole blocks of {per_block}")
        if offset % 32:
            raise UnsafeFileError(f"{name}: offset {offset} is not a multiple of 32")
        spans.append((offset, offset + math.prod(shape) // per_block * n_bytes, name))
    start = -(-reader.at // 32) * 32
    spans.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise UnsafeFileError(f"{name} and {other} overlap")
    if start + spans[-1][1] > reader.size:
        raise UnsafeFileError(f"{spans[-1][2]}: ends behind the file's end")
    return shapes


class _Reader:
    """Bounds-checked steps through a file's bytes."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.size = data, 0, len(data)

    def take(self, n: int) -> bytes:
        self.skip(n)
        return self.data[self.at - n : self.at]

    def skip(self, n: int) -> None:
        if n > self.size - self.at:
            raise UnsafeFileError(f"ends at byte {self.size}, inside its header")
        self.at += n

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self, at_most: int) -> str:
        n = self.number("<Q")
        if n > at_most:
            raise UnsafeFileError(f"a name of {n} bytes; expected at most {at_most}")
        try:
            return self.take(n).decode()
        except UnicodeDecodeError:
            raise UnsafeFileError("a name that is not UTF-8") from None

    def value(self, kind: int, key: str) -> object:
        """A value, or None for those that nobody here looks at."""
        if kind == STRING:
            n = self.number("<Q")
            return self.take(n).decode(errors="replace") if n <= 4096 else self.skip(n)
        if kind == ARRAY:
            inner, n = self.number("<I"), self.number("<Q")
            if n > MAX_ARRAY or (inner != STRING and inner not in SCALARS):
                raise UnsafeFileError(f"{key}: an array of {n} values of type {inner}")
            if inner != STRING:
                return self.skip(n * SCALARS[inner])
            for _ in range(n):
                self.skip(self.number("<Q"))
            return None
        if kind not in SCALARS:
            raise UnsafeFileError(f"{key}: a value of type {kind}")
        raw = self.take(SCALARS[kind])
        return int.from_bytes(raw, "little") if kind in (4, 10) else None


# -- ONNX --------------------------------------------------------------------------------------------------------------


def check_onnx(path: Path) -> None:
    """Raises Suspect: other files named inside, functions, subgraphs, unknown operators, tensors that do not fit."""
    with path.open("rb") as file, _mapped(file) as data:
        graphs = 0
        for field, value in _fields(data, 0, len(data)):
            if field == 1 and not (isinstance(value, int) and value <= MAX_IR_VERSION):
                raise UnsafeFileError(f"ir_version {value}; expected at most {MAX_IR_VERSION}")
            elif field == 7:
                graphs += 1
                _graph(data, *_span(value))
            elif field == 8:
                _opset(data, *_span(value))
            elif field in (20, 25):
                raise UnsafeFileError("training information or functions of its own")
        if graphs != 1:
            raise UnsafeFileError(f"{graphs} graphs; expected one")


def _graph(data: mmap.mmap, start: int, end: int) -> None:
    for field, value in _fields(data, start, end):
        if field == 1:
            _node(data, *_span(value))
        elif field == 5:
            _initializer(data, *_span(value))
        elif field == 15:
            raise UnsafeFileError("sparse tensors")


def _node(data: mmap.mmap, start: int, end: int) -> None:
    op, domain = "", ""
    for field, value in _fields(data, start, end):
        if field == 4:
            op = data[slice(*_span(value))].decode(errors="replace")
        elif field == 7:
            domain = data[slice(*_span(value))].decode(errors="replace")
        elif field == 5:
            for inner, part in _fields(data, *_span(value)):
                if inner in (6, 11):  # g, graphs
                    raise UnsafeFileError("an operator with a graph inside")
                if inner in (5, 10):  # t, tensors
                    _initializer(data, *_span(part))
    if op not in OPS or domain not in ("", "ai.onnx"):
        raise UnsafeFileError(f"operator {domain and domain + '.'}{op}: not one that edge-quantize writes")


def _initializer(data: mmap.mmap, start: int, end: int) -> None:
    dims, kind, raw, name = [], 0, None, ""
    for field, value in _fields(data, start, end):
        if field == 1:
            if isinstance(value, int):
                dims.append(value)
            else:
                dims += _packed(data, *value)
        elif field == 2:
            kind = value
        elif field == 8:
            name = data[slice(*_span(value))].decode(errors="replace")[:80]
        elif field == 9:
            raw = _span(value)
        elif field == 13 or (field == 14 and value):
            raise UnsafeFileError(f"{name or 'a tensor'}: lies in another file")
    if kind not in DATA_TYPES:
        raise UnsafeFileError(f"{name}: data type {kind}: not one that edge-quantize writes")
    if any(side > MAX_ELEMENTS for side in dims) or math.prod(dims) > MAX_ELEMENTS:
        raise UnsafeFileError(f"{name}: shape {dims}")
    if raw is not None and raw[1] - raw[0] != math.prod(dims) * DATA_TYPES[kind]:
        raise UnsafeFileError(f"{name}: {raw[1] - raw[0]} bytes for shape {dims}")


def _opset(data: mmap.mmap, start: int, end: int) -> None:
    domain, version = "", 0
    for field, value in _fields(data, start, end):
        if field == 1:
            domain = data[slice(*_span(value))].decode(errors="replace")
        elif field == 2:
            version = value
    if domain not in ("", "ai.onnx") or not (isinstance(version, int) and version <= MAX_OPSET):
        raise UnsafeFileError(f"operators {domain!r} version {version}; expected ONNX's own, at most {MAX_OPSET}")


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """(number, value) of a message's fields: a whole number, or (start, end) of bytes."""
    at = start
    while at < end:
        tag, at = _varint(data, at, end)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at, end)
        elif kind == 2:
            n, at = _varint(data, at, end)
            value, at = (at, at + n), at + n
        elif kind in (1, 5):
            value = (at, at + (8 if kind == 1 else 4))
            at = value[1]
        else:
            raise UnsafeFileError(f"protobuf wire type {kind}")
        if at > end:
            raise UnsafeFileError("a field ends behind its message")
        yield tag >> 3, value


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= end:
            raise UnsafeFileError("a number ends behind its message")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise UnsafeFileError("a number of more than 64 bits")


def _packed(data: mmap.mmap, start: int, end: int) -> list[int]:
    values, at = [], start
    while at < end and len(values) <= 16:
        value, at = _varint(data, at, end)
        values.append(value)
    return values


def _span(value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        raise UnsafeFileError("a number where bytes belong")
    return value


def _mapped(file) -> mmap.mmap:
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise UnsafeFileError("empty") from None
