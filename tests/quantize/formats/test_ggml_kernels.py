"""ggml's kernels and reader, held against the gguf package, which has its own."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.bundle.gguf_package import gguf
from quantize.formats import ggml_kernels
from tests.harness.gguf_reading import Reader

Type = gguf.GGMLQuantizationType


@pytest.mark.parametrize("n_rows", [1, 2, 7, 64])
@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0])
def test_rows_are_those_of_another_implementation(n_rows, kind):
    """For any number of rows, however the cores share them."""
    rows = np.random.default_rng(n_rows).normal(size=(n_rows, 256)).astype(np.float32)
    assert np.array_equal(ggml_kernels.quantise_rows(rows, kind), gguf.quants.quantize(rows, kind))


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_XS])
def test_dequantised_rows_are_close_to_the_original(kind):
    rows = np.random.default_rng(0).normal(size=(5, 512)).astype(np.float32)
    packed = ggml_kernels.quantise_rows(rows, kind)
    assert packed.shape == (5, ggml_kernels.row_bytes(kind, 512))
    error = np.linalg.norm(gguf.quants.dequantize(packed, kind) - rows) / np.linalg.norm(rows)
    assert 0 < error < 0.1


def test_the_table_is_that_of_the_gguf_package(toy_bundle):
    path = toy_bundle / "language.gguf"
    expected = [
        (tensor.name, tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes) for tensor in Reader(path).tensors
    ]
    assert [(t.name, t.ggml_type, t.offset, t.n_bytes) for t in ggml_kernels.tensor_table(path)] == expected


@pytest.mark.parametrize("content", [b"", b"no model", b"GGUF" + bytes(8)])
def test_a_file_that_is_not_gguf_is_one_line(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ggml_kernels.NotGguf, match=r"^[^\n]*x\.gguf[^\n]*$"):
        ggml_kernels.tensor_table(path)


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("blk.0.attn_k.weight", "blk.0.attn_k.weight"),
        ("CUDA0#blk.0.attn_k.weight#0", "blk.0.attn_k.weight"),
        ("CUDA1#token_embd.weight#3", "token_embd.weight"),
        ("Vulkan0#blk.25.ffn_down.weight#12", "blk.25.ffn_down.weight"),
        ("CPU#cache_k_l0 (view)#0", "cache_k_l0 (view)"),
        ("attn_norm-0 (copy)", "attn_norm-0 (copy)"),
        ("#1", "#1"),
        ("a#b", "a#b"),
        ("", ""),
    ],
)
def test_a_copy_in_a_graph_is_known_by_the_name_of_its_original(name, original):
    """As ggml-backend.cpp names the inputs of a split: backend#tensor#number."""
    assert ggml_kernels.original_name(name) == original
