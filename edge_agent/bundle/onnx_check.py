"""Check an ONNX file before a native parser reads it, as edge_agent/bundle/file_check.py does for GGUF files.

onnx.proto, in protobuf's wire format. The numbers in the code are those of the fields there.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from edge_agent.bundle.file_check import MAX_ELEMENTS, UnsafeFileError, map_file

MAX_OPSET, MAX_IR_VERSION = 21, 10
MAX_DIMENSIONS = 16
# data_type of TensorProto -> its name, bytes
DATA_TYPES = {1: ("f32", 4), 3: ("int8", 1), 7: ("int64", 8), 10: ("f16", 2), 16: ("bf16", 2)}
OPS = frozenset((
    "Add", "Cast", "Concat", "Conv", "Cos", "DequantizeLinear", "Div", "Erf", "Expand", "Gemm", "Identity", "MatMul",
    "Mul", "Neg", "Pow", "Range", "ReduceMean", "Reshape", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Sqrt",
    "Squeeze", "Transpose", "Unsqueeze",
))  # fmt: skip

# A field's value: an integer (varint), or the start and end of its bytes.
_Span = tuple[int, int]
_Value = int | _Span


def check_onnx(path: Path) -> list[int]:
    """The shape of the graph's first input; 0 is a side that can vary. Raises UnsafeFileError for references to other
    files, functions, subgraphs, unknown operators, wrong sizes."""
    with path.open("rb") as file, map_file(file) as data:
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


def weight_type(path: Path) -> str:
    """The type of most bytes of the weights, such as "bf16", in a file that check_onnx() accepts."""
    by_type: Counter[str] = Counter()
    with path.open("rb") as file, map_file(file) as data:
        graphs = [_span(value) for number, value in _fields(data, 0, len(data)) if number == 7]
        for start, end in [_span(value) for graph in graphs for number, value in _fields(data, *graph) if number == 5]:
            fields = dict(_fields(data, start, end))
            raw_start, raw_end = _span(fields.get(9, (0, 0)))
            by_type[DATA_TYPES[_integer(fields[2])][0]] += raw_end - raw_start
    return max(by_type, key=by_type.__getitem__)


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
    if raw is not None and raw[1] - raw[0] != math.prod(shape) * DATA_TYPES[data_type][1]:
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
