"""Small GGUF and ONNX files for tests, written byte by byte."""

from __future__ import annotations

import struct

from onnx import TensorProto, helper

from edge_agent.bundle.manifest import SPECIAL_TOKENS, THINK_TOKENS

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


def number(name: bytes, value: int) -> bytes:
    return key(name, 4, struct.pack("<I", value))


def strings(name: bytes, values: list[str]) -> bytes:
    texts = b"".join(string(value.encode()) for value in values)
    return key(name, 9, struct.pack("<IQ", 8, len(values)) + texts)


GOOD = file([ARCHITECTURE], [tensor(), tensor(b"b.weight", offset=256)])
CLIP = file([key(b"general.architecture", 8, string(b"clip"))], [tensor()])


# The language model of a small bundle, and its projector. The manifest of tests/edge_agent/bundle fits them.
TOKENS = [*SPECIAL_TOKENS.values(), *THINK_TOKENS.values(), "a", "b", "c"]
HIDDEN = 32
LANGUAGE_KEYS = [
    ARCHITECTURE,
    number(b"llama.block_count", 3),
    number(b"llama.context_length", 4096),
    number(b"llama.attention.head_count_kv", 2),
    number(b"llama.attention.key_length", 16),
    number(b"llama.attention.value_length", 16),
    strings(b"tokenizer.ggml.tokens", TOKENS),
]
TABLE_BYTES = 4 * HIDDEN * len(TOKENS)
LANGUAGE_FILE = file(LANGUAGE_KEYS, [tensor(b"token_embd.weight", (HIDDEN, len(TOKENS)))], data=TABLE_BYTES)
CLIP_KEYS = [
    key(b"general.architecture", 8, string(b"clip")),
    number(b"clip.vision.patch_size", 14),
    number(b"clip.vision.spatial_merge_size", 2),
    number(b"clip.vision.image_size", 1540),
    number(b"clip.vision.projection_dim", HIDDEN),
    key(b"clip.vision.image_mean", 9, struct.pack("<IQ3f", 6, 3, 0.5, 0.5, 0.5)),
    key(b"clip.vision.image_std", 9, struct.pack("<IQ3f", 6, 3, 0.25, 0.25, 0.25)),
]
CLIP_FILE = file(CLIP_KEYS, [tensor()])


# -- ONNX --------------------------------------------------------------------------------------------------------------


def model(nodes=None, initializers=(), opset: int = 17, domain: str = "", ir: int = 8, sides=(1,), **more):
    nodes = nodes or [helper.make_node("Identity", ["x"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, sides) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializer=list(initializers), **more)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, opset)], ir_version=ir)
