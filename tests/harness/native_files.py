"""Small GGUF and ONNX files for tests, written byte by byte."""

from __future__ import annotations

import struct

from onnx import TensorProto, helper

# -- GGUF --------------------------------------------------------------------------------------------------------------


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


ARCHITECTURE = key(b"general.architecture", 8, string(b"llama"))


def tensor(name: bytes = b"a.weight", shape: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(keys: list[bytes], tensors: list[bytes], data: int = 4096, version: int = 3, **header: int) -> bytes:
    """A GGUF file with `data` bytes of weights. header: n_tensors, n_keys, if the header is to claim other numbers."""
    n_tensors, n_keys = header.get("n_tensors", len(tensors)), header.get("n_keys", len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)
    raw = head + b"".join(keys) + b"".join(tensors)
    return raw + bytes(-len(raw) % 32) + bytes(data)


GOOD = file([ARCHITECTURE], [tensor(), tensor(b"b.weight", offset=256)])
CLIP = file([key(b"general.architecture", 8, string(b"clip"))], [tensor()])


# -- ONNX --------------------------------------------------------------------------------------------------------------


def model(nodes=None, initializers=(), opset: int = 17, domain: str = "", ir: int = 8, **more):
    nodes = nodes or [helper.make_node("Identity", ["x"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializer=list(initializers), **more)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, opset)], ir_version=ir)
