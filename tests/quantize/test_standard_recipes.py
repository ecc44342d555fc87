"""Recipes: the types that libllama chooses, sizes before a build, and the sizes of the published files."""

from __future__ import annotations

import ctypes
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import llama_cpp.llama_cpp as ll
import numpy as np
import pytest

from edge_agent.bundle.gguf_package import gguf
from edge_agent.bundle.manifest import LANGUAGE
from quantize import standard_recipes
from quantize.boards import BOARDS, boards_that_fit
from quantize.build import expected_manifest, kv_bytes_per_token
from quantize.formats import ggml_kernels
from quantize.source.checkpoint import read_checkpoint
from quantize.source.tokenizer import Tokenizer
from quantize.standard_recipes import RECIPES, bytes_by_type, plan_bundle, recipe_types
from tests.harness import recipe_types as pinned
from tests.harness.gguf_reading import Reader, reader, tensors_of
from tests.harness.releases import RELEASES, shapes, write_release

# No test here reads a tokenizer: the releases have 131072 tokens.
TOKENIZER = Tokenizer(Path("tekken.json"), [], [], [], {})


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


@pytest.fixture(scope="module", params=RELEASES)
def released(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, write_release(tmp_path_factory.mktemp("release") / request.param, request.param)


@pytest.fixture(scope="module")
def released_types(released: tuple[str, Path]) -> dict[str, dict[str, ggml_kernels.Type]]:
    """Recipe -> GGUF name -> type."""
    return pinned.types_by_recipe(released[1])


def test_a_released_size_weighs_what_its_published_file_does(released: tuple[str, Path], released_types: dict):
    name, folder = released
    release, opened = RELEASES[name], read_checkpoint(folder)
    n_bytes = sum(bytes_by_type(opened, released_types["Q4_K_M"]).values())
    assert n_bytes == pytest.approx(release.q4_k_m_bytes - TOKENIZER_BYTES, rel=0.002)
    assert n_bytes < release.q4_k_m_bytes
    assert opened.size == name
    assert opened.parameters == sum(math.prod(shape) for shape in shapes(release).values())
    text = sum(math.prod(opened.shape(row)) for row in opened.text_tensors)
    assert text / 1e9 == pytest.approx(release.text_parameters, abs=0.006)
    assert kv_bytes_per_token(opened) == release.kv_bytes_per_token


def test_a_recipe_is_the_same_as_with_the_last_checked_release_of_llama_cpp_python(
    released: tuple[str, Path], released_types: dict
):
    """A difference is a new libllama with other rules: read it, then run python -m tests.harness.recipe_types."""
    name, _ = released
    expected = json.loads(pinned.PATH.read_text(encoding="utf-8"))
    assert expected["llama_cpp_python"] == llama_cpp.__version__
    assert released_types.keys() == expected[name].keys()
    for recipe, types in released_types.items():
        assert pinned.runs_by_role(types) == expected[name][recipe], recipe


def test_types_do_not_come_from_the_words_of_a_log(toy_small: Path, monkeypatch):
    """libllama's log is text for people: a release may change its words."""
    expected = recipe_types(read_checkpoint(toy_small), "Q4_K_M")
    log_to = standard_recipes.log_to
    monkeypatch.setattr(
        standard_recipes, "log_to", lambda take: log_to(take and (lambda line: take(line.replace("size", "bytes"))))
    )
    assert recipe_types(read_checkpoint(toy_small), "Q4_K_M") == expected
    assert expected["blk.0.attn_v.weight"] == ggml_kernels.Type.Q6_K


def test_recipes_of_a_released_size_keep_their_order(released: tuple[str, Path], released_types: dict):
    opened = read_checkpoint(released[1])
    text = sum(math.prod(opened.shape(row)) for row in opened.text_tensors)
    for name in RECIPES:
        bits = 8 * sum(bytes_by_type(opened, released_types[name]).values()) / text
        assert BITS[name] <= bits < BITS[name] + 0.6, name  # some tensors get more, none gets less


def test_boards_that_a_released_size_fits(released: tuple[str, Path]):
    name, folder = released
    opened = read_checkpoint(folder)
    fits = boards_that_fit(expected_manifest(plan_bundle(opened, "Q4_K_M", tokenizer=TOKENIZER)))
    assert fits[0] == {"3B": "Orin Nano 8GB", "8B": "Orin NX 16GB", "14B": "Orin NX 16GB"}[name]
    assert fits == list(BOARDS)[-len(fits) :]


# -- the real thing ---------------------------------------------------------------------------------------------------


SOURCES = [("toy_bf16", "Q4_K_M"), *(("toy_small", name) for name in RECIPES)]  # tied, and with a head


@pytest.mark.parametrize(("source", "name"), SOURCES)
def test_the_bytes_of_a_recipe_are_known_before_a_build(source: str, name: str, build: Callable[..., Path], request):
    folder = request.getfixturevalue(source)
    by_type: Counter[str] = Counter()
    for tensor in reader(build(folder, name) / LANGUAGE).tensors:
        by_type[tensor.tensor_type.name] += int(tensor.n_bytes)
    opened = read_checkpoint(folder)
    assert bytes_by_type(opened, recipe_types(opened, name)) == by_type


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
    expected = {tensor.name: tensor for tensor in Reader(theirs).tensors}
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


def test_recipes_have_llama_cpps_file_types():
    assert list(RECIPES) == ["Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "Q5_K_M", "Q6_K", "Q8_0", "BF16"]
    for name, number in RECIPES.items():
        assert gguf.LlamaFileType(number).name == f"MOSTLY_{name}"


@pytest.mark.parametrize("kind", ["bf16", "f16", "f32", "Q4_K_M"])
def test_tensor_table_is_that_of_the_gguf_package(kind: str, toy_bf16: Path, toy_bundle: Path, convert):
    path = (toy_bundle if kind == "Q4_K_M" else convert(toy_bf16, kind)) / LANGUAGE
    expected = [(t.name, t.tensor_type.name, t.data_offset, t.n_bytes) for t in reader(path).tensors]
    assert [(t.name, t.ggml_type, t.offset, t.n_bytes) for t in ggml_kernels.tensor_table(path)] == expected


def test_a_file_that_is_not_gguf_is_one_line(tmp_path: Path):
    path = tmp_path / "language.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ggml_kernels.NotGguf, match=r"^[^\n]*language\.gguf[^\n]*$"):
        ggml_kernels.tensor_table(path)
