"""Recipes: what libllama makes of them, what `weigh` says beforehand, and the sizes of the published files."""

from __future__ import annotations

import ctypes
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gguf
import llama_cpp.llama_cpp as ll
import numpy as np
import pytest

from edge_agent.bundle.manifest import LANGUAGE
from quantize.formats import ggml_kernels
from quantize.source.checkpoint import read_checkpoint
from quantize.standard_recipes import BOARDS, RECIPES, kv_bytes_per_token, memory_bytes, weigh_recipes
from tests.harness import toy
from tests.harness.gguf_reading import reader, tensors_of


class Release(NamedTuple):
    """A released size, from its model card."""

    layers: int
    hidden: int
    ffn: int
    tied: bool
    text_parameters: float  # of the language model, billions
    q4_k_m_bytes: int  # the published file, tokenizer included
    kv_bytes_per_token: int


RELEASES = {
    "3B": Release(26, 3072, 9216, True, 3.43, 2_147_023_008, 106_496),
    "8B": Release(34, 4096, 14336, False, 8.49, 5_198_911_904, 139_264),
    "14B": Release(40, 5120, 16384, False, 13.51, 8_239_593_024, 163_840),
}
TOKENIZER_BYTES = 8e6  # of vocabulary and merges in a published file: 6 to 9 MB
BITS = {
    "Q4_K_M": 4.5,
    "Q4_K_S": 4.5,
    "Q4_0": 4.5,
    "IQ4_XS": 4.25,
    "Q5_K_M": 5.5,
    "Q6_K": 6.5625,
    "Q8_0": 8.5,
    "BF16": 16.0,
}


def shapes(release: Release) -> dict[str, tuple[int, ...]]:
    """Every tensor of a released checkpoint, written down by hand."""
    hidden, ffn, heads, vision = release.hidden, release.ffn, 32 * 128, 1024
    out = {"language_model.model.embed_tokens.weight": (131072, hidden), "language_model.model.norm.weight": (hidden,)}
    if not release.tied:
        out["language_model.lm_head.weight"] = (131072, hidden)
    for n in range(release.layers):
        at = f"language_model.model.layers.{n}."
        out |= {
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
            at + "self_attn.q_proj.weight": (heads, hidden),
            at + "self_attn.k_proj.weight": (1024, hidden),
            at + "self_attn.v_proj.weight": (1024, hidden),
            at + "self_attn.o_proj.weight": (hidden, heads),
            at + "mlp.gate_proj.weight": (ffn, hidden),
            at + "mlp.up_proj.weight": (ffn, hidden),
            at + "mlp.down_proj.weight": (hidden, ffn),
        }
    out |= {"vision_tower.patch_conv.weight": (vision, 3, 14, 14), "vision_tower.ln_pre.weight": (vision,)}
    for n in range(24):
        at = f"vision_tower.transformer.layers.{n}."
        out |= {at + f"{name}_norm.weight": (vision,) for name in ("attention", "ffn")}
        out |= {at + f"attention.{name}_proj.weight": (vision, vision) for name in "qkvo"}
        out |= {at + f"feed_forward.{name}_proj.weight": (4096, vision) for name in ("gate", "up")}
        out[at + "feed_forward.down_proj.weight"] = (vision, 4096)
    return out | {
        "multi_modal_projector.norm.weight": (vision,),
        "multi_modal_projector.patch_merger.merging_layer.weight": (vision, 4 * vision),
        "multi_modal_projector.linear_1.weight": (hidden, vision),
        "multi_modal_projector.linear_2.weight": (hidden, hidden),
    }


@pytest.fixture(params=RELEASES)
def released(request, tmp_path: Path) -> tuple[str, Path]:
    """A checkpoint of a released size whose weights are a hole in the file: everything but the numbers is true."""
    release = RELEASES[request.param]
    folder = toy.write_checkpoint(tmp_path / request.param, vocab=2048, tied=release.tied)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "num_hidden_layers": release.layers, "hidden_size": release.hidden, "intermediate_size": release.ffn,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 131072,
    }  # fmt: skip
    config["vision_config"] |= {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
        "head_dim": 64,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for name, shape in shapes(release).items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + 2 * math.prod(shape)]}
        at += 2 * math.prod(shape)
    head = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + at)
    return request.param, folder


def test_a_released_size_weighs_what_its_published_file_does(released: tuple[str, Path]):
    name, folder = released
    release, opened = RELEASES[name], read_checkpoint(folder)
    n_bytes = sum(weigh_recipes(opened, "Q4_K_M").values())
    assert n_bytes == pytest.approx(release.q4_k_m_bytes - TOKENIZER_BYTES, rel=0.002)
    assert n_bytes < release.q4_k_m_bytes
    assert opened.size == name
    assert opened.parameters == sum(math.prod(shape) for shape in shapes(release).values())
    text = sum(math.prod(opened.shape(row)) for row in opened.text_rows)
    assert text / 1e9 == pytest.approx(release.text_parameters, abs=0.006)
    assert kv_bytes_per_token(opened) == release.kv_bytes_per_token


def test_recipes_of_a_released_size_keep_their_order(released: tuple[str, Path]):
    opened = read_checkpoint(released[1])
    text = sum(math.prod(opened.shape(row)) for row in opened.text_rows)
    for name in RECIPES:
        bits = 8 * sum(weigh_recipes(opened, name).values()) / text
        assert BITS[name] <= bits < BITS[name] + 0.6, name  # some tensors get more, none gets less


def test_boards_that_a_released_size_fits(released: tuple[str, Path]):
    name, folder = released
    opened = read_checkpoint(folder)
    memory = memory_bytes(opened, sum(weigh_recipes(opened, "Q4_K_M").values()))
    fits = [board for board, gib in BOARDS.items() if memory <= gib * 2**30]
    assert fits[0] == {"3B": "Orin Nano 8GB", "8B": "Orin NX 16GB", "14B": "Orin NX 16GB"}[name]
    assert fits == list(BOARDS)[-len(fits) :]


# -- the real thing ---------------------------------------------------------------------------------------------------


SOURCES = [("toy_bf16", "Q4_K_M"), *(("toy_small", name) for name in RECIPES)]  # tied, and with a head


@pytest.mark.parametrize(("source", "name"), SOURCES)
def test_weigh_says_what_a_build_makes(source: str, name: str, build: Callable[..., Path], request):
    folder = request.getfixturevalue(source)
    by_type: Counter[str] = Counter()
    for tensor in reader(build(folder, name) / LANGUAGE).tensors:
        by_type[tensor.tensor_type.name] += int(tensor.n_bytes)
    assert weigh_recipes(read_checkpoint(folder), name) == by_type


@pytest.mark.parametrize(("source", "name"), SOURCES)
def test_a_bundle_holds_the_bytes_that_libllama_makes(
    source: str, name: str, build: Callable[..., Path], convert: Callable[..., Path], request, tmp_path: Path
):
    """llama.cpp's own program for this, on the bf16 conversion: the same tensors, types and bytes."""
    folder, theirs = request.getfixturevalue(source), tmp_path / "theirs.gguf"
    params = ll.llama_model_quantize_default_params()
    params.ftype = getattr(ll, f"LLAMA_FTYPE_MOSTLY_{name}")
    full = convert(folder) / LANGUAGE
    assert ll.llama_model_quantize(bytes(full), bytes(theirs), ctypes.byref(params)) == 0
    ours = {tensor.name: tensor for tensor in reader(build(folder, name) / LANGUAGE).tensors}
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
    assert ours.keys() == expected.keys()
    for tensor, found in ours.items():
        assert found.tensor_type == expected[tensor].tensor_type, tensor
        np.testing.assert_array_equal(found.data, expected[tensor].data, err_msg=tensor)


@pytest.mark.parametrize("name", RECIPES)
def test_quantised_values_are_still_those_of_the_model(name: str, toy_small: Path, build: Callable, convert: Callable):
    most = {4: 0.12, 5: 0.06, 6: 0.03, 8: 0.01, 16: 1e-9}[int(BITS[name])]
    before = tensors_of(convert(toy_small) / LANGUAGE)
    for tensor, value in tensors_of(build(toy_small, name) / LANGUAGE).items():
        error = np.linalg.norm(value - before[tensor]) / np.linalg.norm(before[tensor])
        assert error <= most, tensor


def test_recipes_are_those_of_the_issue():
    assert list(RECIPES) == ["Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "Q5_K_M", "Q6_K", "Q8_0", "BF16"]
    for name, number in RECIPES.items():
        assert gguf.LlamaFileType(number).name == f"MOSTLY_{name}"


@pytest.mark.parametrize("kind", ["bf16", "f16", "f32", "Q4_K_M"])
def test_tensor_table_is_that_of_the_gguf_package(kind: str, toy_bf16: Path, toy_bundle: Path, convert):
    path = (toy_bundle if kind == "Q4_K_M" else convert(toy_bf16, kind)) / LANGUAGE
    expected = [(t.name, t.tensor_type.name, t.data_offset, t.n_bytes) for t in reader(path).tensors]
    assert [(t.name, t.ggml_type, t.offset, t.n_bytes) for t in ggml_kernels.tensor_table(path)] == expected


def test_a_file_that_is_no_gguf_is_one_line(tmp_path: Path):
    path = tmp_path / "language.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ggml_kernels.NotGguf, match=r"^[^\n]*language\.gguf[^\n]*$"):
        ggml_kernels.tensor_table(path)
