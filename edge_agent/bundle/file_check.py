"""Check the header of a GGUF or ONNX file before a native parser reads it: bounds, names, and an allow-list.

C++ parsers have had memory errors on crafted files. This parser is Python, reads headers only, and accepts only the
types that it knows. It does not check whether the numbers are useful, nor who made the file (hashes and signature do).

GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md   ONNX: onnx.proto, in protobuf's wire format
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Container, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from edge_agent.errors import UserError

MAX_KEYS, MAX_TENSORS, MAX_KEY_BYTES, MAX_NAME_BYTES = 4096, 65536, 256, 63
MAX_STRING_BYTES = 4096  # longer values are skipped, not returned
MAX_ARRAY = 1 << 24
MAX_ELEMENTS = 1 << 40
ALIGNMENT_BYTES = 32
# ggml type -> its name, elements in a block, bytes of a block: what edge-quantize and other tools write
BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
GGUF_VERSIONS = (2, 3)  # 3 differs from 2 in that a file may be big-endian
# GGUF value type -> format of struct: 8 to 64 bit integers, float32, bool, float64
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, INTEGERS = 8, 9, frozenset("bBhHiIqQ")
TOKENS, TOKEN_TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
MAX_KEPT = 1024  # values of an array of strings that are returned: the special tokens come first
MAX_KEPT_NUMBERS = 1024  # a longer array of numbers is not returned: a number for each layer, not for each token
MAX_OPSET, MAX_IR_VERSION = 21, 10
MAX_DIMENSIONS = 16
DATA_TYPES = {1: 4, 3: 1, 7: 8, 10: 2, 16: 2}  # TensorProto: FLOAT, INT8, INT64, FLOAT16, BFLOAT16 -> bytes
OPS = frozenset((
    "Add", "Cast", "Concat", "Conv", "Cos", "DequantizeLinear", "Div", "Erf", "Expand", "Gemm", "Identity", "MatMul",
    "Mul", "Neg", "Pow", "Range", "ReduceMean", "Reshape", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Sqrt",
    "Squeeze", "Transpose", "Unsqueeze",
))  # fmt: skip


class TensorHeader(NamedTuple):
    """What the header of a GGUF file says about one tensor."""

    shape: list[int]  # in GGUF's order: innermost dimension first
    type_name: str
    offset: int  # bytes from the start of the file
    n_bytes: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


class GgufHeader(NamedTuple):
    """values: numbers, short strings, short arrays of numbers, and the first strings of arrays of strings; None for
    every other value."""

    values: dict[str, object]
    tensors: dict[str, TensorHeader]


class Token(NamedTuple):
    """A token of the vocabulary."""

    id: int
    text: str
    type: int | None  # tokenizer.ggml.token_type; None: the file does not say


class UnsafeFileError(UserError):
    """What is wrong with the file; one line, without the file's name."""


# -- GGUF --------------------------------------------------------------------------------------------------------------


def check_gguf(path: Path, architectures: Container[str]) -> GgufHeader:
    """Check a GGUF file whose general.architecture has to be one of `architectures`. Raises UnsafeFileError."""
    with path.open("rb") as file, _map(file) as data:
        reader = _Reader(data)
        n_tensors, values = _read_start(reader)
        architecture = values.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in architectures:
            expected = " or ".join(architectures) if isinstance(architectures, tuple) else "a language model"
            raise UnsafeFileError(f"general.architecture: expected {expected}, found {architecture!r}")
        alignment = values.get("general.alignment", ALIGNMENT_BYTES)
        if alignment != ALIGNMENT_BYTES:
            raise UnsafeFileError(f"general.alignment: expected {ALIGNMENT_BYTES}, found {alignment!r}")
        return GgufHeader(values, _read_tensors(reader, n_tensors))


def read_gguf_keys(path: Path) -> dict[str, object]:
    """The keys of any GGUF file, as in GgufHeader.values. Raises UnsafeFileError."""
    with path.open("rb") as file, _map(file) as data:
        return _read_start(_Reader(data))[1]


def read_tokens(path: Path, texts: Container[str], ids: Container[int] = ()) -> list[Token]:
    """The tokens of a GGUF file that have one of these texts or ids, in the order of their ids. Raises
    UnsafeFileError."""
    with path.open("rb") as file, _map(file) as data:
        reader = _Reader(data)
        _read_start(reader)
        if TOKENS not in reader.arrays:
            raise UnsafeFileError(f"{TOKENS}: missing: the file has no vocabulary")
        reader.position = reader.arrays[TOKENS]
        if reader.uint32() != STRING:
            raise UnsafeFileError(f"{TOKENS}: expected texts")
        texts_found = enumerate(reader.text(*span) for span in reader.string_spans(reader.uint64()))
        found = [(i, text) for i, text in texts_found if text in texts or i in ids]
        types = _read_token_types(reader, [i for i, _ in found])
        return [Token(i, text, types.get(i)) for i, text in found]


def _read_token_types(reader: _Reader, ids: list[int]) -> dict[int, int]:
    if TOKEN_TYPES not in reader.arrays:
        return {}
    reader.position = reader.arrays[TOKEN_TYPES]
    kind, n = SCALARS.get(reader.uint32(), ""), reader.uint64()
    if kind not in INTEGERS:
        raise UnsafeFileError(f"{TOKEN_TYPES}: expected integers")
    start, size = reader.position, struct.calcsize(f"<{kind}")
    return {i: struct.unpack_from(f"<{kind}", reader.data, start + i * size)[0] for i in ids if i < n}


def _read_start(reader: _Reader) -> tuple[int, dict[str, object]]:
    """The number of tensors, and the keys."""
    if reader.take(4) != b"GGUF":
        raise UnsafeFileError(f"not a GGUF file; expected GGUF version {GGUF_VERSIONS[-1]}")
    version = reader.uint32()
    if int.from_bytes(version.to_bytes(4, "little"), "big") in GGUF_VERSIONS:
        raise UnsafeFileError("big-endian; convert it with gguf_convert_endian.py of llama.cpp")
    if version not in GGUF_VERSIONS:
        raise UnsafeFileError(f"GGUF version {version}: expected version {GGUF_VERSIONS[-1]}; use another edge-agent")
    n_tensors, n_keys = reader.uint64(), reader.uint64()
    if not 0 < n_tensors <= MAX_TENSORS or n_keys > MAX_KEYS:
        raise UnsafeFileError(f"{n_tensors} tensors and {n_keys} keys; expected at most {MAX_TENSORS} and {MAX_KEYS}")
    return n_tensors, _read_keys(reader, n_keys)


def _read_keys(reader: _Reader, n_keys: int) -> dict[str, object]:
    values: dict[str, object] = {}
    for _ in range(n_keys):
        key = reader.string(MAX_KEY_BYTES)
        if key in values:
            raise UnsafeFileError(f"{key}: duplicate key")
        values[key] = reader.value(reader.uint32(), key)
    if (n_parts := values.get("split.count", 0)) not in (0, 1):
        merge = "llama-gguf-split --merge FIRST_PART MERGED.gguf"
        raise UnsafeFileError(f"split.count: one of {n_parts} parts of a split file; merge the parts first: {merge}")
    return values


def _read_tensors(reader: _Reader, n_tensors: int) -> dict[str, TensorHeader]:
    """By name. The spans of bytes of all tensors must lie inside the file and must not overlap."""
    found: dict[str, TensorHeader] = {}  # with offsets relative to the data section
    for _ in range(n_tensors):
        name = reader.string(MAX_NAME_BYTES)
        if name in found:
            raise UnsafeFileError(f"{name}: duplicate tensor name")
        n_dims = reader.uint32()
        if not 1 <= n_dims <= 4:
            raise UnsafeFileError(f"{name}: {n_dims} dimensions; expected 1 to 4")
        shape = [reader.uint64() for _ in range(n_dims)]
        ggml_type, offset = reader.uint32(), reader.uint64()
        if ggml_type not in BLOCKS:
            raise UnsafeFileError(
                f"{name}: type {ggml_type} is unknown; use a file of another type or a newer edge-agent"
            )
        if not all(0 < side <= MAX_ELEMENTS for side in shape) or math.prod(shape) > MAX_ELEMENTS:
            raise UnsafeFileError(f"{name}: shape {shape}: expected 1 to {MAX_ELEMENTS} elements")
        type_name, block_elements, block_bytes = BLOCKS[ggml_type]
        if shape[0] % block_elements:
            raise UnsafeFileError(f"{name}: rows of {shape[0]} elements; expected a multiple of {block_elements}")
        if offset % ALIGNMENT_BYTES:
            raise UnsafeFileError(f"{name}: offset {offset} is not a multiple of {ALIGNMENT_BYTES}")
        found[name] = TensorHeader(shape, type_name, offset, math.prod(shape) // block_elements * block_bytes)
    data_start = -(-reader.position // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    spans = sorted((tensor.offset, tensor.offset + tensor.n_bytes, name) for name, tensor in found.items())
    for (_, end, name), (next_start, _, next_name) in itertools.pairwise(spans):
        if next_start < end:
            raise UnsafeFileError(f"the tensors {name} and {next_name} overlap")
    if data_start + spans[-1][1] > reader.size:
        raise UnsafeFileError(f"{spans[-1][2]}: ends after the end of the file")
    return {name: tensor._replace(offset=data_start + tensor.offset) for name, tensor in found.items()}


_UINT64 = struct.Struct("<Q")


class _Reader:
    """Reads a file's bytes from start to end and checks every bound."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position, self.size = data, 0, len(data)
        self.arrays: dict[str, int] = {}  # key -> position of its array, element type first

    def take(self, n_bytes: int) -> bytes:
        self.skip(n_bytes)
        return self.data[self.position - n_bytes : self.position]

    def skip(self, n_bytes: int) -> None:
        if n_bytes > self.size - self.position:
            raise UnsafeFileError(f"the file ends at byte {self.size}, inside its header")
        self.position += n_bytes

    def uint32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def uint64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def string(self, max_bytes: int) -> str:
        n_bytes = self.uint64()
        if n_bytes > max_bytes:
            raise UnsafeFileError(f"a name of {n_bytes} bytes; expected at most {max_bytes}")
        try:
            return self.take(n_bytes).decode()
        except UnicodeDecodeError:
            raise UnsafeFileError("a name that is not UTF-8") from None

    def value(self, value_type: int, key: str) -> object:
        """As in GgufHeader.values."""
        if value_type == STRING:
            n_bytes = self.uint64()
            if n_bytes <= MAX_STRING_BYTES:
                return self.take(n_bytes).decode(errors="replace")
            self.skip(n_bytes)
            return None
        if value_type == ARRAY:
            return self.array(key)
        if value_type not in SCALARS:
            raise UnsafeFileError(f"{key}: value type {value_type} is unknown; use a newer edge-agent")
        return self.numbers(SCALARS[value_type], 1)[0]

    def numbers(self, kind: str, n: int) -> list[int | float | bool]:
        """kind: a value of SCALARS."""
        return list(struct.unpack(f"<{n}{kind}", self.take(n * struct.calcsize(f"<{kind}"))))

    def array(self, key: str) -> object:
        self.arrays[key] = self.position
        element_type, n = self.uint32(), self.uint64()
        if n > MAX_ARRAY or (element_type != STRING and element_type not in SCALARS):
            raise UnsafeFileError(f"{key}: an array of {n} values of type {element_type}")
        if element_type == STRING:
            spans = self.string_spans(n)
            kept = [self.text(*span) for span in itertools.islice(spans, MAX_KEPT)]
            for _ in spans:
                pass
            return kept
        if n <= MAX_KEPT_NUMBERS:
            return self.numbers(SCALARS[element_type], n)
        self.skip(n * struct.calcsize(f"<{SCALARS[element_type]}"))
        return None

    def string_spans(self, n: int) -> Iterator[tuple[int, int]]:
        """Start and end of each of n strings, which begin here. A vocabulary has hundreds of thousands of them."""
        data, size, position = self.data, self.size, self.position
        for _ in range(n):
            if position + 8 > size:
                break
            (n_bytes,) = _UINT64.unpack_from(data, position)
            position += 8 + n_bytes
            if position > size:
                break
            yield position - n_bytes, position
        else:
            self.position = position
            return
        raise UnsafeFileError(f"the file ends at byte {size}, inside its header")

    def text(self, start: int, end: int) -> str:
        """A string of an array; "": longer than any text that is needed."""
        return self.data[start:end].decode(errors="replace") if end - start <= MAX_STRING_BYTES else ""


# -- ONNX --------------------------------------------------------------------------------------------------------------

# A field's value: an integer (varint), or the start and end of its bytes.
_Span = tuple[int, int]
_Value = int | _Span


def check_onnx(path: Path) -> list[int]:
    """The shape of the graph's first input; 0 is a side that can vary. Raises UnsafeFileError for references to other
    files, functions, subgraphs, unknown operators, wrong sizes.

    The numbers in the code are those of the fields in onnx.proto.
    """
    with path.open("rb") as file, _map(file) as data:
        n_graphs = 0
        input_shape: list[int] = []
        for number, value in _fields(data, 0, len(data)):
            if number == 1 and _integer(value) > MAX_IR_VERSION:
                raise UnsafeFileError(f"ir_version {value}; expected at most {MAX_IR_VERSION}")
            elif number == 7:
                n_graphs += 1
                input_shape = _check_graph(data, *_span(value))
            elif number == 8:
                _check_opset(data, *_span(value))
            elif number in (20, 25):
                raise UnsafeFileError("contains training information or functions; expected one graph only")
        if n_graphs != 1:
            raise UnsafeFileError(f"{n_graphs} graphs; expected one")
        return input_shape


def _check_graph(data: mmap.mmap, start: int, end: int) -> list[int]:
    """The shape of the first input."""
    inputs: list[list[int]] = []
    for number, value in _fields(data, start, end):
        if number == 1:
            _check_node(data, *_span(value))
        elif number == 5:
            _check_initializer(data, *_span(value))
        elif number == 15:
            raise UnsafeFileError("contains sparse tensors")
        elif number == 11:
            inputs.append(_value_shape(data, *_span(value)))
    return inputs[0] if inputs else []


def _value_shape(data: mmap.mmap, start: int, end: int) -> list[int]:
    """ValueInfoProto.type.tensor_type.shape.dim[].dim_value; 0: a side without a number."""
    spans = [(start, end)]
    for number in (2, 1, 2, 1):  # the numbers of these fields, one inside the other
        spans = [_span(value) for span in spans for found, value in _fields(data, *span) if found == number]
    return [next((_integer(value) for found, value in _fields(data, *span) if found == 1), 0) for span in spans]


def _check_node(data: mmap.mmap, start: int, end: int) -> None:
    op, domain = "", ""
    for number, value in _fields(data, start, end):
        if number == 4:
            op = _text(data, value)
        elif number == 7:
            domain = _text(data, value)
        elif number == 5:
            _check_attribute(data, *_span(value))
    if op not in OPS or domain not in ("", "ai.onnx"):
        raise UnsafeFileError(f"operator {domain and domain + '.'}{op}: edge-quantize never writes this operator")


def _check_attribute(data: mmap.mmap, start: int, end: int) -> None:
    for number, value in _fields(data, start, end):
        if number in (6, 11):  # g, graphs
            raise UnsafeFileError("an operator contains a graph")
        if number in (5, 10):  # t, tensors
            _check_initializer(data, *_span(value))


def _check_initializer(data: mmap.mmap, start: int, end: int) -> None:
    shape: list[int] = []
    data_type, raw, name = 0, None, ""
    for number, value in _fields(data, start, end):
        if number == 1:
            shape += [value] if isinstance(value, int) else _packed(data, *value)
            if len(shape) > MAX_DIMENSIONS:
                raise UnsafeFileError(f"a tensor of more than {MAX_DIMENSIONS} dimensions")
        elif number == 2:
            data_type = _integer(value)
        elif number == 8:
            name = _text(data, value)[:80]
        elif number == 9:
            raw = _span(value)
        elif number == 13 or (number == 14 and value):
            raise UnsafeFileError(f"{name or 'a tensor'}: its data is in another file")
    if data_type not in DATA_TYPES:
        raise UnsafeFileError(f"{name}: data type {data_type}: edge-quantize never writes this type")
    if any(side > MAX_ELEMENTS for side in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise UnsafeFileError(f"{name}: shape {shape}: expected at most {MAX_ELEMENTS} elements")
    if raw is not None and raw[1] - raw[0] != math.prod(shape) * DATA_TYPES[data_type]:
        raise UnsafeFileError(f"{name}: {raw[1] - raw[0]} bytes for shape {shape}")


def _check_opset(data: mmap.mmap, start: int, end: int) -> None:
    domain, version = "", 0
    for number, value in _fields(data, start, end):
        if number == 1:
            domain = _text(data, value)
        elif number == 2:
            version = _integer(value)
    if domain not in ("", "ai.onnx") or version > MAX_OPSET:
        raise UnsafeFileError(f"operator set {domain!r} version {version}; expected ONNX's own, at most {MAX_OPSET}")


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, _Value]]:
    """(field number, value) of each field of a protobuf message."""
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        wire_type = tag & 7
        value: _Value
        if wire_type == 0:
            value, position = _varint(data, position, end)
        elif wire_type == 2:
            n_bytes, position = _varint(data, position, end)
            value = (position, position + n_bytes)
            position += n_bytes
        elif wire_type in (1, 5):
            n_bytes = 8 if wire_type == 1 else 4
            value = (position, position + n_bytes)
            position += n_bytes
        else:
            raise UnsafeFileError(f"unknown protobuf wire type {wire_type}")
        if position > end:
            raise UnsafeFileError("a field ends after the end of its message")
        yield tag >> 3, value


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """An integer, and the position after it."""
    value = 0
    for shift in range(0, 64, 7):
        if position >= end:
            raise UnsafeFileError("an integer ends after the end of its message")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise UnsafeFileError("an integer of more than 64 bits")


def _packed(data: mmap.mmap, start: int, end: int) -> list[int]:
    """The integers of a packed field; of a longer list the first MAX_DIMENSIONS + 1."""
    values: list[int] = []
    while start < end and len(values) <= MAX_DIMENSIONS:
        value, start = _varint(data, start, end)
        values.append(value)
    return values


def _span(value: _Value) -> _Span:
    if isinstance(value, int):
        raise UnsafeFileError("expected a length-delimited field, found a varint")
    return value


def _integer(value: _Value) -> int:
    if not isinstance(value, int):
        raise UnsafeFileError("expected a varint, found a length-delimited field")
    return value


def _text(data: mmap.mmap, value: _Value) -> str:
    start, end = _span(value)
    return data[start:end].decode(errors="replace")


def _map(file: BinaryIO) -> mmap.mmap:
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise UnsafeFileError("the file is empty") from None
