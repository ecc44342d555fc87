"""A manifest with an odd number or name is one line when it is verified, never a traceback in the model process."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_agent.bundle.manifest import MANIFEST, Manifest, read_manifest
from edge_agent.bundle.manifest_check import Headers, wrong_fact
from edge_agent.bundle.memory_plan import plan_memory
from edge_agent.bundle.verify import HEADER_CHECKS, verify_bundle
from edge_agent.config import CameraConfig, Config
from edge_agent.errors import BundleError
from edge_agent.model.preprocess import Preprocessor

ODD = (0, 1, 2, -1, 3, 27, 2**31, 2**40, 2**63 - 1, 2**64, 10**300, 0.5, 1e-300, 1e300, "", "F64", "x" * 300, "\0",
       True, None, [], [1, 2], {}, {"a": 1})  # fmt: skip
# What may have any value of its type: it is printed and nothing is computed with it.
TEXTS = {"created_by", "recipe", "source_dtype", "licence", "family", "size", "variant"}


def leaves(value: object, path: tuple = ()) -> Iterator[tuple]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))


def changed(fields: dict, path: tuple, value: object) -> dict:
    fields = copy.deepcopy(fields)
    inner = fields
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return fields


@pytest.fixture(scope="module")
def headers(toy_bundle: Path) -> Headers:
    manifest = read_manifest(toy_bundle).manifest
    names = ("language.gguf", "mmproj.gguf", "vision.onnx")
    (language, tokens), mmproj, vision = (HEADER_CHECKS[name](toy_bundle / name, manifest) for name in names)
    return Headers(language, tokens, mmproj, vision)


@pytest.fixture(scope="module")
def fields(toy_bundle: Path) -> dict:
    return json.loads((toy_bundle / MANIFEST).read_text())


def why_refused(raw: bytes, headers: Headers) -> str:
    """One line; "": it is accepted."""
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return str(error)
    return wrong_fact(manifest, headers) if manifest.vision is not None else "a text-only model"


def use(manifest: Manifest) -> None:
    """What the runtime computes with a manifest, but for the model itself."""
    plan_memory(Config(bundle="b", camera=CameraConfig(source="none")), manifest, None)
    preprocessor = Preprocessor(manifest.vision, 64)
    assert np.isfinite(preprocessor.pixels(preprocessor.image(np.zeros((48, 64, 3), np.uint8)))).all()


def test_every_field_of_a_manifest_with_every_odd_value(fields: dict, headers: Headers):
    assert why_refused(json.dumps(fields).encode(), headers) == ""
    accepted = set()
    paths = [path for path in leaves(fields) if path and path[0] not in ("files", "source_sha256", "format")]
    for path in paths:
        for value in ODD:
            raw = json.dumps(changed(fields, path, value)).encode()
            why = why_refused(raw, headers)
            assert "\n" not in why
            if not why:
                use(msgspec.json.decode(raw, type=Manifest))
                accepted |= {path} if changed(fields, path, value) != fields else set()
    assert len(paths) > 45
    # More parameters only make the memory plan larger. The counter is compared with other bundles.
    # Zero pixels less or more are another mean, of a float32.
    assert {path[-1] for path in accepted} <= TEXTS | {"parameters", "counter"}, accepted


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (("model", "layers"), 3, "model.layers: expected 2 by language.gguf, found 3"),
        (("model", "context"), 4096, "model.context: expected 262144 by language.gguf, found 4096"),
        (("model", "kv_bytes_per_token"), 1, "model.kv_bytes_per_token: expected 2048 by language.gguf, found 1"),
        (("model", "parameters"), 7, "model.parameters: expected "),
        (("model", "embedding", "ggml_type"), "F64", "model.embedding.ggml_type: expected 'Q6_K' by"),
        (("bytes_by_type", "Q4_L"), 7, "bytes_by_type: expected {"),
        (("model", "special", "img"), 4096, "model.special.img: expected '[IMG]' by language.gguf, found 'no token"),
        (("model", "special", "img"), 12, "model.special.img: expected '[IMG]' by language.gguf, found '[IMG_BREAK]'"),
        (("model", "special"), {"bos": 1}, "model.special.unk: expected '<unk>' by language.gguf, found 'no token"),
        (("vision", "merge"), 1, "vision.merge: expected 2 by mmproj.gguf, found 1"),
        (("vision", "image_size"), 2**31, "Expected `int` <= 1048576"),
        (("vision", "std"), [0, 1, 1], "vision.std: expected numbers from 0.001 to 100"),
        (("vision", "std"), [-1, 1, 1], "vision.std: expected numbers from 0.001 to 100"),
        (("vision", "mean"), [1e300, 0, 0], "vision.mean: expected numbers of at most 100"),
        (("vision", "mean"), [0.5, 0.5, 0.5], "vision.mean: expected [0.48"),
        (("vision", "fixed"), [28, 28], "vision.fixed: expected [1, 3, 0, 0] by vision.onnx, found [1, 3, 28, 28]"),
    ],
)
def test_an_odd_value_is_named_with_both_files(fields: dict, headers: Headers, path: tuple, value: object, line: str):
    assert why_refused(json.dumps(changed(fields, path, value)).encode(), headers).startswith(line)


def test_one_of_the_two_reasoning_tokens_is_not_enough(fields: dict, headers: Headers):
    special = {name: token for name, token in fields["model"]["special"].items() if name != "think_end"}
    raw = json.dumps(changed(fields, ("model", "special"), special)).encode()
    assert why_refused(raw, headers).startswith("model.special.think_end: expected '[/THINK]'")


def test_a_language_model_without_an_embedding_table(toy_bundle: Path, headers: Headers):
    old = headers.language
    language = old._replace(tensors={"output_norm.weight": old.tensors["output_norm.weight"]})
    manifest = read_manifest(toy_bundle).manifest
    assert wrong_fact(manifest, headers._replace(language=language)).startswith(
        "model.embedding: expected 'no matrix token_embd"
    )


def test_a_text_only_manifest_is_compared_with_its_language_model(toy_bundle: Path, headers: Headers):
    manifest = msgspec.structs.replace(read_manifest(toy_bundle).manifest, vision=None)
    assert wrong_fact(manifest, headers) == ""


def test_verifying_a_bundle_refuses_a_manifest_that_contradicts_its_files(toy_bundle: Path, tmp_path: Path, fields):
    folder = shutil.copytree(toy_bundle, tmp_path / "bundle")
    (folder / MANIFEST).write_text(json.dumps(changed(fields, ("vision", "merge"), 1)))
    with pytest.raises(BundleError, match=r"bundle\.json: vision\.merge: expected 2 by mmproj\.gguf, found 1; build"):
        verify_bundle(folder)


def test_a_file_that_is_written_to_while_it_is_verified_is_refused(toy_bundle: Path, tmp_path: Path, monkeypatch):
    folder = shutil.copytree(toy_bundle, tmp_path / "bundle")

    def write(path: Path, _manifest: Manifest) -> None:
        (folder / "vision.onnx").write_bytes(path.read_bytes())

    monkeypatch.setitem(HEADER_CHECKS, "vision.onnx", write)
    with pytest.raises(BundleError, match=r"vision\.onnx: changed while it was verified; try again"):
        verify_bundle(folder)
