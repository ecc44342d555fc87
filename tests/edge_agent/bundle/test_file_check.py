"""Files are looked over before native parsers: ours pass, crafted ones are named, and nothing else is ever raised."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_agent.bundle.file_check import BLOCKS, OPS, UnsafeFileError, check_gguf, check_onnx
from edge_agent.bundle.files import hash_file
from edge_agent.bundle.manifest import LANGUAGE, MMPROJ, VISION, read_manifest, write_manifest
from edge_agent.bundle.verify import verify_bundle
from edge_agent.errors import BundleError
from tests.harness.native_files import ARCHITECTURE, CLIP, GOOD, file, key, model, string, tensor  # noqa: F401

ARCHITECTURES = ("mistral3", "llama")


@pytest.mark.parametrize("kind", ["bf16", "f16", "f32"])
def test_what_we_write_passes(kind: str, convert, toy_bf16: Path, toy_bundle: Path):
    for folder in (convert(toy_bf16, kind), toy_bundle):
        check_gguf(folder / LANGUAGE, ARCHITECTURES)
        check_gguf(folder / MMPROJ, ("clip",))
        check_onnx(folder / VISION)


def test_every_type_we_write_has_its_size():
    from quantize.measure import bit_allocation

    for kind, size in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == size
    assert {kind.value for kind in bit_allocation.CANDIDATES} < set(BLOCKS)


def test_every_operator_we_write_is_known(toy_bundle: Path):
    used = {node.op_type for node in onnx.load(toy_bundle / VISION).graph.node}
    assert used <= OPS
    assert OPS - used == {"DequantizeLinear"}  # for weights of 8 bits


BAD = {
    "empty": (b"", "empty"),
    "another format": (b"PK\3\4" + bytes(100), "GGUF version 3"),
    "another version": (file([ARCHITECTURE], [tensor()], version=2), "GGUF version 3"),
    "no tensors": (file([ARCHITECTURE], []), "0 tensors"),
    "a billion tensors": (file([ARCHITECTURE], [tensor()], n_tensors=2**60), "tensors and 1 keys"),
    "a billion keys": (file([ARCHITECTURE], [tensor()], n_keys=2**63), "expected at most"),
    "no architecture": (file([], [tensor()]), "general.architecture: expected mistral3 or llama, found None"),
    "another architecture": (file([key(b"general.architecture", 8, string(b"clip"))], [tensor()]), "found 'clip'"),
    "an architecture that is a number": (file([key(b"general.architecture", 4, bytes(4))], [tensor()]), "found 0"),
    "a key twice": (file([ARCHITECTURE, ARCHITECTURE], [tensor()]), "general.architecture: there twice"),
    "a key too long": (file([key(b"k" * 300, 4, bytes(4))], [tensor()]), "a name of 300 bytes"),
    "a key of 2^64 bytes": (file([struct.pack("<Q", 2**64 - 1)], [tensor()]), "a name of 18446744073709551615"),
    "a key not UTF-8": (file([key(b"\xff\xfe", 4, bytes(4))], [tensor()]), "not UTF-8"),
    "a part of a model": (file([ARCHITECTURE, key(b"split.count", 2, b"\2\0")], [tensor()]), "split.count: a part"),
    "a value of no type": (file([ARCHITECTURE, key(b"x", 13, bytes(8))], [tensor()]), "x: a value of type 13"),
    "a string too long": (file([ARCHITECTURE, key(b"x", 8, b"\0" * 7 + b"\1")], [tensor()]), "inside its header"),
    "an array of arrays": (file([ARCHITECTURE, key(b"x", 9, struct.pack("<IQ", 9, 1))], [tensor()]), "of type 9"),
    "an array too long": (file([ARCHITECTURE, key(b"x", 9, struct.pack("<IQ", 0, 2**62))], [tensor()]), "an array of"),
    "another alignment": (
        file([ARCHITECTURE, key(b"general.alignment", 4, b"\1\0\0\0")], [tensor()]),
        "general.alignment: expected 32, found 1",
    ),
    "no dimensions": (file([ARCHITECTURE], [tensor(shape=())]), "0 dimensions"),
    "five dimensions": (file([ARCHITECTURE], [tensor(shape=(32, 1, 1, 1, 1))]), "5 dimensions"),
    "a side of zero": (file([ARCHITECTURE], [tensor(shape=(32, 0))]), "shape [32, 0]"),
    "sides that overflow": (file([ARCHITECTURE], [tensor(shape=(2**32, 2**32))]), "shape"),
    "a side that is negative": (file([ARCHITECTURE], [tensor(shape=(32, 2**64 - 1))]), "shape"),
    "an unknown type": (file([ARCHITECTURE], [tensor(kind=39)]), "type 39"),
    "half a block": (file([ARCHITECTURE], [tensor(shape=(48,), kind=2)]), "no whole blocks of 32"),
    "a crooked offset": (file([ARCHITECTURE], [tensor(offset=8)]), "offset 8"),
    "an offset far away": (file([ARCHITECTURE], [tensor(offset=2**40)]), "behind the file's end"),
    "tensors that overlap": (file([ARCHITECTURE], [tensor(), tensor(b"b", offset=224)]), "a.weight and b overlap"),
    "a tensor twice": (file([ARCHITECTURE], [tensor(), tensor(offset=256)]), "a.weight: there twice"),
    "a name too long": (file([ARCHITECTURE], [tensor(b"a" * 64)]), "a name of 64 bytes"),
    "too little data": (file([ARCHITECTURE], [tensor()], data=255), "behind the file's end"),
    "cut in the header": (GOOD[:70], "inside its header"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "words"), BAD.values(), ids=BAD)
def test_a_crafted_gguf_is_named(raw: bytes, words: str, tmp_path: Path):
    path = tmp_path / "x.gguf"
    path.write_bytes(GOOD)
    check_gguf(path, ARCHITECTURES)
    path.write_bytes(raw)
    with pytest.raises(UnsafeFileError) as found:
        check_gguf(path, ARCHITECTURES)
    assert words in str(found.value) and "\n" not in str(found.value)


@given(st.lists(st.tuples(st.integers(0, 2**31), st.binary(min_size=1, max_size=8)), max_size=6), st.integers(0, 2**31))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_gguf_raises_anything_but_suspect(tmp_path: Path, changes, cut):
    raw = bytearray(GOOD)
    for at, data in changes:
        at %= 200
        raw[at : at + len(data)] = data
    path = tmp_path / "x.gguf"
    path.write_bytes(raw[: cut % len(raw)] if cut % 3 == 0 else raw)
    try:
        check_gguf(path, ARCHITECTURES)
    except UnsafeFileError:
        return


def elsewhere():
    one = numpy_helper.from_array(np.ones(4, np.float32), "w")
    one.ClearField("raw_data")
    one.data_location = TensorProto.EXTERNAL
    one.external_data.add(key="location", value="../../etc/passwd")
    return model(initializers=[one])


def misfit():
    one = numpy_helper.from_array(np.ones(4, np.float32), "w")
    one.dims[0] = 2**39
    return model(initializers=[one])


def inside():
    body = model().graph
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    return model([node])


def with_function():
    made = model()
    made.functions.add(name="f", domain="d")
    return made


def of_words():
    return model(initializers=[helper.make_tensor("w", TensorProto.STRING, [1], [b"x"])])


ONNX = {
    "weights elsewhere": (elsewhere(), "w: lies in another file"),
    "weights that do not fit": (misfit(), "w: 16 bytes for shape [549755813888]"),
    "words": (of_words(), "data type 8"),
    "a graph inside": (inside(), "a graph inside"),
    "an operator of others": (model([helper.make_node("Evil", ["x"], ["y"], domain="custom")]), "custom.Evil"),
    "an operator we never write": (model([helper.make_node("Loop", ["x"], ["y"])]), "operator Loop"),
    "functions": (with_function(), "functions of its own"),
    "a later opset": (model(opset=23), "version 23"),
    "operators of others": (model(domain="com.microsoft"), "'com.microsoft'"),
    "a later format": (model(ir=13), "ir_version 13"),
}


@pytest.mark.parametrize(("made", "words"), ONNX.values(), ids=ONNX)
def test_a_crafted_onnx_is_named(made, words: str, tmp_path: Path):
    path = tmp_path / "x.onnx"
    path.write_bytes(model().SerializeToString())
    check_onnx(path)
    path.write_bytes(made.SerializeToString())
    with pytest.raises(UnsafeFileError) as found:
        check_onnx(path)
    assert words in str(found.value)


@pytest.mark.parametrize(
    "raw", [b"", b"nothing at all", b"\xff" * 40, b"\x3a\xff\xff\xff\xff\x0f" + bytes(20)], ids=repr
)
def test_what_is_no_onnx_is_refused(raw: bytes, tmp_path: Path):
    path = tmp_path / "x.onnx"
    path.write_bytes(raw)
    with pytest.raises(UnsafeFileError):
        check_onnx(path)


@given(st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_onnx_raises_anything_but_suspect(tmp_path: Path, changes):
    weights = numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
    raw = bytearray(model(initializers=[weights]).SerializeToString())
    for at, value in changes:
        raw[at % len(raw)] = value
    path = tmp_path / "x.onnx"
    path.write_bytes(raw)
    try:
        check_onnx(path)
    except UnsafeFileError:
        return


# -- in a bundle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LANGUAGE, MMPROJ, VISION])
def test_a_bundle_is_looked_over_after_its_hashes(toy_bundle: Path, tmp_path: Path, name: str):
    import msgspec

    folder = shutil.copytree(toy_bundle, tmp_path / "bundle")
    (folder / name).write_bytes(b"GGUF crafted")
    with pytest.raises(BundleError, match=r"expected \d+ bytes"):
        verify_bundle(folder)
    manifest = read_manifest(folder).manifest
    files = manifest.files | {name: hash_file(folder / name)}
    write_manifest(folder, msgspec.structs.replace(manifest, files=files))
    with pytest.raises(BundleError, match=rf"{name}: .*build the bundle again"):
        verify_bundle(folder)
