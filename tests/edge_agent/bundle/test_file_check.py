"""File headers are checked before native parsers: ours pass, crafted ones are named, nothing else is ever raised."""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.bundle.file_check import BLOCKS, TensorHeader, UnsafeFileError, check_gguf, read_tokens
from edge_agent.bundle.files import hash_file
from edge_agent.bundle.gguf_package import gguf
from edge_agent.bundle.manifest import LANGUAGE, MMPROJ, VISION, read_manifest, write_manifest
from edge_agent.bundle.onnx_check import OPS, check_onnx, weight_type
from edge_agent.bundle.verify import verify_bundle
from edge_agent.errors import BundleError
from tests.harness.native_files import ARCHITECTURE, GOOD, file, key, model, string, tensor

ARCHITECTURES = ("mistral3", "llama")


@pytest.mark.parametrize("kind", ["bf16", "f16", "f32"])
def test_the_files_of_a_bundle_pass(kind: str, convert, toy_bf16: Path, toy_bundle: Path):
    for folder in (convert(toy_bf16, kind), toy_bundle):
        check_gguf(folder / LANGUAGE, ARCHITECTURES)
        check_gguf(folder / MMPROJ, ("clip",))
        check_onnx(folder / VISION)
    assert weight_type(convert(toy_bf16, kind) / VISION) == kind


def test_every_type_has_the_size_of_the_gguf_package():
    from quantize.measure import bit_allocation

    for kind, (name, *size) in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == tuple(size)
        assert gguf.GGMLQuantizationType[name].value == kind
    assert {kind.value for kind in bit_allocation.CANDIDATES} < set(BLOCKS)


def test_the_allowed_operators_are_those_that_are_written(toy_bundle: Path):
    used = {node.op_type for node in onnx.load(toy_bundle / VISION).graph.node}
    assert used <= OPS
    assert OPS - used == {"DequantizeLinear"}  # of --vision int8


ARRAY = file([ARCHITECTURE, key(b"x", 9, struct.pack("<IQ", 8, 9) + string(b"aaaa"))], [tensor()])
MANY = file([ARCHITECTURE, key(b"x", 9, struct.pack("<IQ", 8, 1030) + 1030 * string(b"aaaa"))], [tensor()])
LAST = MANY.rindex(b"aaaa")  # the 1030th; the first 1024 are kept
BAD = {
    "empty": (b"", "empty"),
    "a ZIP file": (b"PK\3\4" + bytes(100), "GGUF version 3"),
    "another version": (file([ARCHITECTURE], [tensor()], version=4), "GGUF version 4: expected version 3"),
    "the other endianness": (file([ARCHITECTURE], [tensor()], version=3 << 24), "big-endian; convert it"),
    "no tensors": (file([ARCHITECTURE], []), "0 tensors"),
    "a billion tensors": (file([ARCHITECTURE], [tensor()], n_tensors=2**60), "tensors and 1 keys"),
    "a billion keys": (file([ARCHITECTURE], [tensor()], n_keys=2**63), "expected 1 to 65536, and at most 4096"),
    "no architecture": (file([], [tensor()]), "general.architecture: expected mistral3 or llama, found None"),
    "another architecture": (file([key(b"general.architecture", 8, string(b"clip"))], [tensor()]), "found 'clip'"),
    "an architecture that is a number": (file([key(b"general.architecture", 4, bytes(4))], [tensor()]), "found 0"),
    "a key that a terminal would obey": (
        file([ARCHITECTURE, *2 * [key(b"a\nok\x1b[2J", 4, bytes(4))]], [tensor()]),
        "a\N{REPLACEMENT CHARACTER}ok\N{REPLACEMENT CHARACTER}[2J: duplicate key",
    ),
    "a duplicate key": (file([ARCHITECTURE, ARCHITECTURE], [tensor()]), "general.architecture: duplicate key"),
    "a key too long": (file([key(b"k" * 300, 4, bytes(4))], [tensor()]), "a name of 300 bytes"),
    "a key of 2^64 bytes": (file([struct.pack("<Q", 2**64 - 1)], [tensor()]), "a name of 18446744073709551615"),
    "a key not UTF-8": (file([key(b"\xff\xfe", 4, bytes(4))], [tensor()]), "not UTF-8"),
    "a split file": (file([ARCHITECTURE, key(b"split.count", 2, b"\2\0")], [tensor()]), "one of 2 parts of"),
    "a value of no type": (file([ARCHITECTURE, key(b"x", 13, bytes(8))], [tensor()]), "x: value type 13 is unknown"),
    "texts of an array that end early": (ARRAY[: ARRAY.index(b"aaaa") + 4], "inside its header"),
    "many texts that end between two": (MANY[: LAST - 8], "inside its header"),
    "many texts that end in a length": (MANY[: LAST - 3], "inside its header"),
    "many texts that end in the last": (MANY[: LAST + 3], "inside its header"),
    "many texts, the last of which is too long": (
        MANY[: LAST - 8] + struct.pack("<Q", 2**60) + MANY[LAST:], "inside its header",
    ),
    "a text of an array that is too long": (
        file([ARCHITECTURE, key(b"x", 9, struct.pack("<IQQ", 8, 9, 2**60))], [tensor()]), "inside its header",
    ),
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
    "an unknown type": (file([ARCHITECTURE], [tensor(kind=99)]), "type 99 is unknown"),
    "half a block": (file([ARCHITECTURE], [tensor(shape=(48,), kind=2)]), "rows of 48 elements; expected"),
    "an unaligned offset": (file([ARCHITECTURE], [tensor(offset=8)]), "offset 8"),
    "an offset far away": (file([ARCHITECTURE], [tensor(offset=2**40)]), "after the end of the file"),
    "tensors that overlap": (file([ARCHITECTURE], [tensor(), tensor(b"b", offset=224)]), "a.weight and b overlap"),
    "a duplicate tensor": (file([ARCHITECTURE], [tensor(), tensor(offset=256)]), "a.weight: duplicate tensor name"),
    "a name too long": (file([ARCHITECTURE], [tensor(b"a" * 64)]), "a name of 64 bytes"),
    "too little data": (file([ARCHITECTURE], [tensor()], data=255), "after the end of the file"),
    "cut in the header": (GOOD[:70], "inside its header"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "words"), BAD.values(), ids=BAD)
def test_a_crafted_gguf_is_named(raw: bytes, words: str, tmp_path: Path):
    path = tmp_path / "x.gguf"
    path.write_bytes(GOOD)
    check_gguf(path, ARCHITECTURES)
    path.write_bytes(raw)
    with pytest.raises(UnsafeFileError) as caught:
        check_gguf(path, ARCHITECTURES)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_and_short_values_are_returned_and_long_ones_skipped(tmp_path: Path):
    path, string_array = tmp_path / "x.gguf", struct.pack("<IQ", 8, 2) + string(b"a") + string(b"bc")
    tokens = struct.pack("<IQ", 8, 1030) + string(b"a") + string(b"x" * 4097) + 1028 * string(b"b")
    values = {
        "text": (8, string(b"llama"), "llama"),
        "long": (8, string(b"x" * 4097), None),
        "uint32": (4, struct.pack("<I", 7), 7),
        "uint64": (10, struct.pack("<Q", 2**40), 2**40),
        "int8": (1, b"\xff", -1),
        "float32": (6, struct.pack("<f", 1.5), 1.5),
        "float64": (12, struct.pack("<d", -2.5), -2.5),
        "bool": (7, b"\1", True),
        "strings": (9, string_array, None),
        "tokenizer.ggml.tokens": (9, tokens, ["a", "", *1022 * ["b"]]),
        "floats": (9, struct.pack("<IQ3f", 6, 3, 0.5, 1, 2), [0.5, 1.0, 2.0]),
        "many floats": (9, struct.pack("<IQ", 6, 1025) + bytes(4100), None),
        "integers": (9, struct.pack("<IQ", 4, 3) + bytes(12), [0, 0, 0]),
    }
    keys = [key(name.encode(), value_type, raw) for name, (value_type, raw, _) in values.items()]
    path.write_bytes(file([ARCHITECTURE, *keys], [tensor(shape=(32, 2)), tensor(b"q", (64,), kind=8, offset=256)]))
    found, tensors = check_gguf(path, ARCHITECTURES)
    assert found == {"general.architecture": "llama"} | {name: value for name, (_, _, value) in values.items()}
    start = path.stat().st_size - 4096
    assert tensors == {
        "a.weight": TensorHeader([32, 2], "F32", start, 256), "q": TensorHeader([64], "Q8_0", start + 256, 68)
    }  # fmt: skip


TOKENS, TOKEN_TYPE = b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([key(TOKENS, 9, struct.pack("<IQ", 4, 1) + bytes(4))], "tokenizer.ggml.tokens: expected texts"),
        (
            [
                key(TOKENS, 9, struct.pack("<IQ", 8, 1) + string(b"a")),
                key(TOKEN_TYPE, 9, struct.pack("<IQ", 8, 1) + string(b"a")),
            ],
            "tokenizer.ggml.token_type: expected integers",
        ),
    ],
)
def test_tokens_of_a_file_that_was_not_checked(tmp_path: Path, keys: list[bytes], words: str):
    (tmp_path / "x.gguf").write_bytes(file([ARCHITECTURE, *keys], [tensor()]))
    with pytest.raises(UnsafeFileError, match=words):
        read_tokens(tmp_path / "x.gguf", {"a"})


@pytest.mark.parametrize("n_bytes", [4, 30])  # in a length, in a text
def test_a_vocabulary_that_is_cut(tmp_path: Path, n_bytes: int):
    texts = struct.pack("<IQ", 8, 3) + 3 * string(b"ten letters")
    raw = file([ARCHITECTURE, key(TOKENS, 9, texts)], [tensor()])
    (tmp_path / "x.gguf").write_bytes(raw[: raw.index(TOKENS) + len(TOKENS) + 16 + n_bytes])
    with pytest.raises(UnsafeFileError, match="inside its header; the download is not complete"):
        check_gguf(tmp_path / "x.gguf", ARCHITECTURES)


def outcomes(check: Callable[[Path], object], path: Path, raw: bytes, limit: int) -> set[str]:
    """Check 300 files with some of the first `limit` bytes changed, and sometimes cut off: each is accepted or refused
    with an UnsafeFileError."""
    found, rng = set(), random.Random(0)
    for _ in range(300):
        changed = bytearray(raw)
        for _ in range(rng.randint(0, 6)):
            start, data = rng.randrange(limit), rng.choice((rng.randbytes(rng.randint(1, 8)), b"\0" * 4, b"\xff" * 8))
            changed[start : start + len(data)] = data
        path.write_bytes(changed[: rng.choice((len(raw), len(raw), rng.randint(0, len(raw))))])
        try:
            check(path)
        except UnsafeFileError:
            found.add("refused")
        else:
            found.add("accepted")
    return found


@pytest.mark.no_cover
def test_any_changed_gguf_is_accepted_or_refused(tmp_path: Path):
    found = outcomes(lambda path: check_gguf(path, ARCHITECTURES), tmp_path / "x.gguf", GOOD, 200)
    assert found == {"accepted", "refused"}


# -- ONNX --------------------------------------------------------------------------------------------------------------


def weights() -> TensorProto:
    return numpy_helper.from_array(np.ones(4, np.float32), "w")


def external_weights():
    tensor = weights()
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return model(initializers=[tensor])


def external_flag_only():
    tensor = weights()
    tensor.data_location = TensorProto.EXTERNAL
    return model(initializers=[tensor])


def reshaped(*shape: int):
    tensor = weights()
    del tensor.dims[:]
    tensor.dims.extend(shape)
    return model(initializers=[tensor])


def subgraph():
    body = model().graph
    return model([helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)])


def with_function():
    container = model()
    container.functions.add(name="f", domain="d")
    return container


def sparse():
    container = model()
    container.graph.sparse_initializer.add()
    return container


def in_attribute(tensor: TensorProto):
    """A tensor in an attribute of an operator."""
    return model([helper.make_node("Cast", ["x"], ["y"], value=tensor, to=1)])


STRINGS = helper.make_tensor("w", TensorProto.STRING, [1], [b"x"])
ONNX = {
    "external weights": (external_weights(), "w: its data is in another file"),
    "external weights without a file name": (external_flag_only(), "w: its data is in another file"),
    "weights of another size": (reshaped(2**39), "w: 16 bytes for shape [549755813888]"),
    "a side too long": (reshaped(2**41), "shape [2199023255552]: expected at most"),
    "sides that overflow": (reshaped(2**32, 2**32), "expected at most"),
    "seventeen dimensions": (reshaped(*[1] * 17), "more than 16 dimensions"),
    "strings": (model(initializers=[STRINGS]), "data type 8"),
    "strings in an attribute": (in_attribute(STRINGS), "data type 8"),
    "a subgraph": (subgraph(), "an operator contains a graph"),
    "a custom operator": (model([helper.make_node("Evil", ["x"], ["y"], domain="custom")]), "custom.Evil"),
    "an operator that is never written": (model([helper.make_node("Loop", ["x"], ["y"])]), "operator Loop"),
    "functions": (with_function(), "functions"),
    "sparse tensors": (sparse(), "sparse"),
    "a later opset": (model(opset=23), "version 23"),
    "custom operators": (model(domain="com.microsoft"), "'com.microsoft'"),
    "a later format": (model(ir=13), "ir_version 13"),
}


@pytest.mark.parametrize(("crafted", "words"), ONNX.values(), ids=ONNX)
def test_a_crafted_onnx_is_named(crafted, words: str, tmp_path: Path):
    path = tmp_path / "x.onnx"
    path.write_bytes(crafted.SerializeToString())
    with pytest.raises(UnsafeFileError) as caught:
        check_onnx(path)
    assert words in str(caught.value)


UNKNOWN_FIELDS = b"\xad\x06" + bytes(4) + b"\xa9\x06" + bytes(8)  # number 101, of 32 and of 64 bits


@pytest.mark.parametrize("container", [model(), reshaped(2, 2), in_attribute(weights())], ids=["plain", "2x2", "value"])
def test_an_onnx_of_allowed_parts_passes(container, tmp_path: Path):
    """Fields that onnx.proto does not have are skipped, as protobuf requires."""
    path = tmp_path / "x.onnx"
    plain, opset = container.SerializeToString(), message(8, varints((2, 17)) + UNKNOWN_FIELDS)
    for raw in (plain, plain + UNKNOWN_FIELDS, plain + opset):
        path.write_bytes(raw)
        check_onnx(path)


def varints(*fields: tuple[int, int]) -> bytes:
    return b"".join(bytes([number << 3, value]) for number, value in fields)


def message(number: int, raw: bytes) -> bytes:
    return bytes([number << 3 | 2, len(raw)]) + raw


def onnx_of_tensor(shape: bytes) -> bytes:
    """A model of nothing but a float32 tensor "w" of 16 bytes; `shape`: the bytes of its dimensions."""
    return message(7, message(5, message(8, b"w") + shape + varints((2, 1)) + message(9, bytes(16))))


def test_dimensions_may_be_packed_or_not(tmp_path: Path):
    path = tmp_path / "x.onnx"
    for shape in (varints((1, 2), (1, 2)), message(1, b"\2\2"), varints((1, 2)) + message(1, b"\2")):
        path.write_bytes(onnx_of_tensor(shape))
        check_onnx(path)
    path.write_bytes(onnx_of_tensor(message(1, b"\2\3")))
    with pytest.raises(UnsafeFileError, match=r"w: 16 bytes for shape \[2, 3\]"):
        check_onnx(path)


GRAPH = message(7, message(1, message(4, b"Add")))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "the file is empty"),
        (b"nothing at all", "unknown protobuf wire type 6"),
        (b"\xff" * 40, "more than 64 bits"),
        (b"\x3a\xff\xff\xff\xff\x0f" + bytes(20), "after the end of its message"),
        (b"\x08", "an integer ends after the end"),
        (varints((7, 1)), "expected a length-delimited field, found a varint"),
        (message(1, b"x") + GRAPH, "expected a varint, found a length-delimited field"),
        (GRAPH * 2, "2 graphs; expected one"),
        (varints((1, 8)), "0 graphs; expected one"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_bytes_that_are_not_an_onnx_are_refused(raw: bytes, words: str, tmp_path: Path):
    path = tmp_path / "x.onnx"
    path.write_bytes(raw)
    with pytest.raises(UnsafeFileError, match=words):
        check_onnx(path)


@pytest.mark.no_cover
def test_any_changed_onnx_is_accepted_or_refused(tmp_path: Path):
    raw = reshaped(2, 2).SerializeToString()
    assert outcomes(check_onnx, tmp_path / "x.onnx", raw, len(raw)) == {"accepted", "refused"}


# -- in a bundle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LANGUAGE, MMPROJ, VISION])
def test_the_headers_of_a_bundle_are_checked_after_its_hashes(toy_bundle: Path, tmp_path: Path, name: str):
    folder = shutil.copytree(toy_bundle, tmp_path / "bundle")
    (folder / name).write_bytes(b"GGUF crafted")
    with pytest.raises(BundleError, match=r"expected \d+ bytes"):
        verify_bundle(folder)
    manifest = read_manifest(folder).manifest
    files = manifest.files | {name: hash_file(folder / name)}
    write_manifest(folder, msgspec.structs.replace(manifest, files=files))
    with pytest.raises(BundleError, match=rf"{name}: .*build the bundle again"):
        verify_bundle(folder)
