"""GgufFile: header, tensors, end, in this order only; and a file that the gguf package reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_agent.bundle.gguf_package import gguf
from quantize.formats.ggml_kernels import Type
from quantize.formats.gguf_writer import ALIGNMENT, GgufFile, HeaderWriter, State, WriterWithoutArchitecture

FIRST = np.arange(6, dtype=np.float32).reshape(2, 3)
SECOND = np.arange(5, dtype=np.float32)


def declared(path: Path) -> GgufFile:
    file = GgufFile(path, "llama")
    file.fields.add_block_count(1)
    file.declare("first", FIRST.shape, Type.F32)
    file.declare("second", SECOND.shape, Type.F32)
    return file


def test_a_file_is_read_by_the_gguf_package(tmp_path: Path):
    path = tmp_path / "a.gguf"
    file = declared(path)
    file.start()
    file.write(row for row in FIRST)  # in blocks
    assert file.position % ALIGNMENT == 0
    file.write([SECOND])
    file.close()
    assert file.state is State.CLOSED and [each.name for each in tmp_path.iterdir()] == ["a.gguf"]
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["llama.block_count"].contents() == 1
    first, second = reader.tensors
    assert (first.name, second.name) == ("first", "second")
    np.testing.assert_array_equal(first.data, FIRST)
    np.testing.assert_array_equal(second.data, SECOND)


LISTS = {
    "words": ["", "a", "ĠÜber", "천천히 앞으로", "👍🏽"],
    "one word": ["x"],
    "whole numbers": [1, -3, 2**31 - 1],
    "fractions": [0.5, 1.0],
    "yes or no": [True, False],
    "bytes of texts": [b"a", b"\xff"],
}


@pytest.mark.parametrize("values", LISTS.values(), ids=LISTS)
def test_a_list_has_the_bytes_of_the_gguf_package(tmp_path: Path, values: list):
    for writer in (gguf.GGUFWriter(tmp_path / "theirs", "llama"), HeaderWriter(tmp_path / "ours", "llama")):
        writer.add_array("list", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("values", [["a", 1], [1, "a"], [1, 0.5], [1, True]])
def test_a_list_of_mixed_types_is_refused_as_by_the_gguf_package(tmp_path: Path, values: list):
    for kind in (gguf.GGUFWriter, HeaderWriter):
        writer = kind(tmp_path / "a.gguf", "llama")
        writer.add_array("list", values)
        writer.write_header_to_file()
        with pytest.raises(ValueError, match="of the same type"):
            writer.write_kv_data_to_file()
        writer.close()


def test_an_earlier_run_is_continued(tmp_path: Path):
    """The second run writes only the second tensor, and the file is the same."""
    whole, continued = tmp_path / "whole.gguf", tmp_path / "continued.gguf"
    for path in (whole, continued):
        file = declared(path)
        file.start()
        file.write([FIRST])
        kept_bytes = file.position
        if path == whole:
            file.write([SECOND])
            file.close()
        file.abandon()
    assert continued.stat().st_size == kept_bytes
    file = declared(continued)
    file.start(kept_bytes)
    assert file.next_end == kept_bytes
    file.skip()
    file.write([SECOND])
    file.close()
    assert continued.read_bytes() == whole.read_bytes()


def test_every_step_out_of_order_is_refused(tmp_path: Path):
    file = declared(tmp_path / "a.gguf")
    for early in (file.skip, file.close, file.fileno, lambda: file.write([FIRST])):
        with pytest.raises(ValueError, match="expected the state tensors, found header"):
            early()
    file.start()
    for late in (lambda: file.fields, file.start, lambda: file.declare("third", (1,), Type.F32)):
        with pytest.raises(ValueError, match="expected the state header, found tensors"):
            late()
    with pytest.raises(ValueError, match=r"first was declared and not written"):
        file.close()
    file.abandon()
    with pytest.raises(ValueError, match="found closed"):
        file.skip()


@pytest.mark.parametrize("data", [FIRST[:1], np.concatenate([FIRST, FIRST])], ids=["less", "more"])
def test_a_tensor_of_another_size_is_refused(tmp_path: Path, data: np.ndarray):
    file = declared(tmp_path / "a.gguf")
    file.start()
    with pytest.raises(ValueError, match=r"first: expected 24 bytes, wrote \d+"):
        file.write([data])
    file.abandon()


def test_an_abandoned_header_leaves_no_file(tmp_path: Path):
    declared(tmp_path / "a.gguf").abandon()
    assert not any(tmp_path.iterdir())


def test_a_file_that_is_not_a_model_has_no_architecture(tmp_path: Path):
    writer = WriterWithoutArchitecture(tmp_path / "a.gguf")
    writer.add_string("general.type", "imatrix")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert [key for key in fields if not key.startswith("GGUF.")] == ["general.type"]
