"""Checkpoint -> vision.onnx: pixels in, embeddings for the language model out. Built without torch.

    pixel_values (1, 3, H, W) float32, H and W multiples of 28  ->  rows (n, hidden) float32

The rows are in reading order of the merged patches. The [IMG_BREAK] embedding follows every line but the last.
[IMG_END] is a text token and is not part of this file.

The graph is plain ONNX (opset 17, for onnxruntime >= 1.20). Weights are stored in the wanted type and cast to float32
in the graph; a session does that once, when it folds constants. int8: matrices only, symmetric, one scale for each
output channel.

The `onnx` package builds the graph. The weights are streamed behind it, because a protobuf message of this size would
be in memory twice. In protobuf's wire format a message is the concatenation of its fields, so weights can be appended
to the graph field: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from quantize.formats.build_plan import INT8, BuildPlan
from quantize.formats.tensor_blocks import BFLOAT16, img_break_row, tensor_blocks
from quantize.progress import Progress
from quantize.source.checkpoint import Checkpoint
from quantize.source.hf_config import CheckpointError
from quantize.source.tensor_names import TensorSpec

OPSET, IR_VERSION = 17, 8
MAX_FILE_BYTES = 2**31 - 1  # protobuf's limit; external data files are refused on the device
STORED = {  # how matrices are stored -> (ONNX data type, numpy dtype)
    "bf16": (TensorProto.BFLOAT16, BFLOAT16),
    "f16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "f32": (TensorProto.FLOAT, np.dtype(np.float32)),
    INT8: (TensorProto.INT8, np.dtype(np.int8)),
}
SCALES = ".scale"


def write_vision(plan: BuildPlan, path: Path, progress: Progress, stage: str = "vision") -> None:
    """Stream vision.onnx to `path`. Raises CheckpointError when the file would be larger than protobuf's 2 GB."""
    checkpoint, kind = plan.checkpoint, plan.vision.onnx
    graph = _Graph(checkpoint, kind, plan.vision.fixed)
    graph.build(img_break_row(plan))
    head, small = _model_head(checkpoint), graph.proto().SerializeToString()
    parts = [part for spec in checkpoint.vision_tensors for part in _parts(checkpoint, spec, kind)]
    part_heads = [_initializer_head(part) for part in parts]
    graph_bytes = len(small) + sum(len(prefix) + n_bytes for prefix, n_bytes in part_heads)
    if len(head) + graph_bytes + 16 > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{path.name}: {graph_bytes} bytes as {kind} is over protobuf's 2 GB; use --type bf16 or f16"
        )
    done, total = 0, checkpoint.n_elements(checkpoint.vision_tensors)
    with path.open("wb") as file:
        file.write(head + _tag(onnx.ModelProto, "graph") + _varint(graph_bytes) + small)
        for part, (prefix, _) in zip(parts, part_heads, strict=True):
            file.write(prefix)
            for block in part.blocks():
                file.write(block.view(np.uint8).data)
                done += block.size if not part.name.endswith(SCALES) else 0
                progress.step(stage, part.name, done, total)


def _model_head(checkpoint: Checkpoint) -> bytes:
    """Everything of the ModelProto but its graph."""
    model = helper.make_model(
        helper.make_graph([], "x", [], []), opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    model.ClearField("graph")
    model.producer_name = "edge-quantize"
    v = checkpoint.vision_tower
    for key, value in (("patch", v.patch), ("merge", v.merge)):
        model.metadata_props.add(key=key, value=str(value))
    return model.SerializeToString()


class _Part(NamedTuple):
    """One initializer of the graph: a tensor, or the scales of an int8 tensor."""

    name: str
    shape: tuple[int, ...]
    kind: str  # a key of STORED
    blocks: Callable[[], Iterator[np.ndarray]]


def _parts(checkpoint: Checkpoint, spec: TensorSpec, kind: str) -> list[_Part]:
    """The initializers of one tensor. The graph uses HF's rotary order."""
    shape = checkpoint.shape(spec)
    width = math.prod(shape[1:])

    def values(dtype: np.dtype) -> Iterator[np.ndarray]:
        return tensor_blocks(checkpoint, spec, dtype, interleaved=False)

    if kind != INT8 or len(shape) == 1:
        stored = "f32" if kind == INT8 else kind
        return [_Part(spec.hf, shape, stored, lambda: values(STORED[stored][1]))]

    def rows() -> Iterator[np.ndarray]:
        return (block.reshape(-1, width) for block in values(np.dtype(np.float32)))

    return [
        _Part(spec.hf, shape, INT8, lambda: (np.rint(b / _scales(b)[:, None]).astype(np.int8) for b in rows())),
        _Part(spec.hf + SCALES, shape[:1], "f32", lambda: (_scales(b) for b in rows())),
    ]


def _scales(rows: np.ndarray) -> np.ndarray:
    """(n, width) float32 -> (n,) float32: scales with which the largest magnitude of a row becomes 127."""
    return np.maximum(np.abs(rows).max(1), np.float32(1e-20)) / np.float32(127)


def _initializer_head(part: _Part) -> tuple[bytes, int]:
    """(everything of a GraphProto.initializer up to its raw bytes, number of raw bytes that follow)."""
    data_type, dtype = STORED[part.kind]
    tensor = TensorProto(name=part.name, dims=part.shape, data_type=data_type).SerializeToString()
    n_bytes = math.prod(part.shape) * dtype.itemsize
    raw = _tag(TensorProto, "raw_data") + _varint(n_bytes)
    return _tag(onnx.GraphProto, "initializer") + _varint(len(tensor) + len(raw) + n_bytes) + tensor + raw, n_bytes


def _tag(message: Any, field: str) -> bytes:
    return _varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | 2)  # 2: length-delimited


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


class _Graph:
    """Collects nodes and small constants. Every method returns the name of the value that it adds."""

    def __init__(self, checkpoint: Checkpoint, kind: str, fixed: tuple[int, int] | None) -> None:
        self.v, self.hidden, self.kind, self.fixed = checkpoint.vision_tower, checkpoint.text.hidden, kind, fixed
        self.matrices = {spec.hf for spec in checkpoint.vision_tensors if len(spec.shape) > 1}
        self.text_eps = checkpoint.text.rms_eps
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def const(self, value: object, dtype: type = np.int64) -> str:
        array: np.ndarray = np.asarray(value, dtype)
        name = f"c_{array.dtype}_{'x'.join(map(str, array.shape))}_{array.tobytes().hex()[:48]}"
        if array.size > 6:
            name = f"c_{len(self.constants)}"
        self.constants.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def scalar(self, value: float) -> str:
        return self.const(value, np.float32)

    def weight(self, name: str) -> str:
        if self.kind == INT8 and name in self.matrices:
            return self.node("DequantizeLinear", name, name + SCALES, axis=0)
        return name if self.kind in ("f32", INT8) else self.node("Cast", name, to=TensorProto.FLOAT)

    def linear(self, x: str, name: str) -> str:
        """x (n, in) times the stored (out, in) weight: (n, out)."""
        return self.node("Gemm", x, self.weight(name), transB=1)

    def rms_norm(self, x: str, name: str, eps: float) -> str:
        square = self.node("Pow", x, self.scalar(2.0))
        mean = self.node("ReduceMean", square, axes=[-1], keepdims=1)
        scale = self.node("Sqrt", self.node("Add", mean, self.scalar(eps)))
        return self.node("Mul", self.node("Div", x, scale), self.weight(name))

    def shape(self, *parts: str | int) -> str:
        """A shape for Reshape or Expand, made of one-element vectors and numbers."""
        return self.node("Concat", *(self.const([p]) if isinstance(p, int) else p for p in parts), axis=0)

    def build(self, break_row: np.ndarray) -> None:
        v = self.v
        patches = self.node(
            "Conv",
            "pixel_values",
            self.weight("vision.patch_conv.weight"),
            kernel_shape=[v.patch, v.patch],
            strides=[v.patch, v.patch],
        )
        grid = self.node("Shape", patches)
        h = self.node("Slice", grid, self.const([2]), self.const([3]))
        w = self.node("Slice", grid, self.const([3]), self.const([4]))
        x = self.node("Transpose", self.node("Reshape", patches, self.const([v.hidden, -1])), perm=[1, 0])
        x = self.rms_norm(x, "vision.ln_pre.weight", v.eps)
        cos, sin = self.rotary(h, w)
        for n in range(v.layers):
            x = self.layer(x, f"vision.transformer.layers.{n}.", cos, sin)
        x = self.merge(self.rms_norm(x, "projector.norm.weight", self.text_eps), h, w)
        x = self.linear(x, "projector.linear_1.weight")
        half, one = self.scalar(0.5), self.scalar(1.0)
        erf = self.node("Erf", self.node("Mul", x, self.scalar(math.sqrt(0.5))))
        x = self.node("Mul", self.node("Mul", x, half), self.node("Add", erf, one))
        self.breaks(self.linear(x, "projector.linear_2.weight"), h, w, break_row)

    def rotary(self, h: str, w: str) -> tuple[str, str]:
        """(cos, sin) of axial 2-D rotary positions, (h * w, head_dim): even frequencies rotate by the line, odd ones by
        the column, as in PixtralVisionRotaryEmbedding of transformers.
        """
        head_dim = self.v.hidden // self.v.heads
        frequencies = (1.0 / self.v.rope_theta ** (np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
        quarter = head_dim // 4

        def angles(count: str, use: np.ndarray, other_axis: int) -> str:
            zero, one = self.const(0), self.const(1)
            steps = self.node("Range", zero, self.node("Squeeze", count, self.const([0])), one)
            column = self.node("Unsqueeze", self.node("Cast", steps, to=TensorProto.FLOAT), self.const([1]))
            table = self.node("Mul", column, self.const(use.reshape(1, -1), np.float32))  # (count, quarter)
            table = self.node("Unsqueeze", table, self.const([other_axis]))
            full = self.node("Expand", table, self.shape(h, w, quarter))
            return self.node("Reshape", full, self.const([-1, quarter]))

        line = angles(h, frequencies[0::2], other_axis=1)
        column = angles(w, frequencies[1::2], other_axis=0)
        table = self.node("Concat", line, column, line, column, axis=1)
        return self.node("Cos", table), self.node("Sin", table)

    def layer(self, x: str, at: str, cos: str, sin: str) -> str:
        v, head_dim = self.v, self.v.hidden // self.v.heads
        y = self.rms_norm(x, at + "attention_norm.weight", v.eps)

        def heads(name: str) -> str:
            projected = self.linear(y, f"{at}attention.{name}_proj.weight")
            split = self.node("Reshape", projected, self.const([-1, v.heads, head_dim]))
            return self.node("Transpose", split, perm=[1, 0, 2])  # (heads, n, head_dim)

        def rotate(z: str) -> str:
            first = self.node("Slice", z, self.const([0]), self.const([head_dim // 2]), self.const([2]))
            second = self.node("Slice", z, self.const([head_dim // 2]), self.const([head_dim]), self.const([2]))
            rotated = self.node("Concat", self.node("Neg", second), first, axis=2)
            return self.node("Add", self.node("Mul", z, cos), self.node("Mul", rotated, sin))

        q = self.node("Mul", rotate(heads("q")), self.scalar(head_dim**-0.5))
        k = self.node("Transpose", rotate(heads("k")), perm=[0, 2, 1])
        weights = self.node("Softmax", self.node("MatMul", q, k), axis=-1)  # (heads, n, n)
        attended = self.node("Transpose", self.node("MatMul", weights, heads("v")), perm=[1, 0, 2])
        attended = self.node("Reshape", attended, self.const([-1, v.hidden]))
        x = self.node("Add", x, self.linear(attended, at + "attention.o_proj.weight"))

        y = self.rms_norm(x, at + "ffn_norm.weight", v.eps)
        gate = self.linear(y, at + "feed_forward.gate_proj.weight")
        gate = self.node("Mul", gate, self.node("Sigmoid", gate))
        y = self.node("Mul", gate, self.linear(y, at + "feed_forward.up_proj.weight"))
        return self.node("Add", x, self.linear(y, at + "feed_forward.down_proj.weight"))

    def merge(self, x: str, h: str, w: str) -> str:
        """merge x merge patches become one row, (n, hidden). Channels are outermost, as torch's unfold orders them."""
        m = self.v.merge
        lines = self.node("Div", h, self.const([m]))
        columns = self.node("Div", w, self.const([m]))
        x = self.node("Reshape", x, self.shape(lines, m, columns, m, self.v.hidden))
        x = self.node("Transpose", x, perm=[0, 2, 4, 1, 3])
        x = self.node("Reshape", x, self.const([-1, self.v.hidden * m * m]))
        return self.linear(x, "projector.patch_merger.merging_layer.weight")

    def breaks(self, x: str, h: str, w: str, break_row: np.ndarray) -> None:
        """Insert the [IMG_BREAK] row after every line but the last; the result is the graph's output."""
        m = self.v.merge
        lines = self.node("Div", h, self.const([m]))
        columns = self.node("Div", w, self.const([m]))
        x = self.node("Reshape", x, self.shape(lines, columns, self.hidden))
        row = self.node(
            "Expand", self.const(break_row.reshape(1, 1, -1), np.float32), self.shape(lines, 1, self.hidden)
        )
        x = self.node("Reshape", self.node("Concat", x, row, axis=1), self.const([-1, self.hidden]))
        without_last = self.node("Slice", x, self.const([0]), self.const([-1]), self.const([0]))
        self.nodes.append(helper.make_node("Identity", [without_last], ["rows"], name="rows"))

    def proto(self) -> onnx.GraphProto:
        """The graph without its weights, which follow in the file."""
        pixels = helper.make_tensor_value_info(
            "pixel_values", TensorProto.FLOAT, [1, self.v.channels, *(self.fixed or "HW")]
        )
        n: str | int = "n"
        if self.fixed is not None:
            lines, columns = (side // (self.v.patch * self.v.merge) for side in self.fixed)
            n = lines * (columns + 1) - 1
        rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, [n, self.hidden])
        return helper.make_graph(self.nodes, "vision", [pixels], [rows], initializer=list(self.constants.values()))
