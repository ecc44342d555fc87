"""Check the header of a GGUF file before a native parser reads it: bounds, names, and an allow-list.

C++ parsers have had memory errors on crafted files. This parser is Python, reads headers only, and accepts only the
types that it knows. It does not check whether the numbers are useful, nor who made the file (hashes and signature do).

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md   edge_agent/bundle/onnx_check.py does the same for ONNX.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Container, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from edge_agent.errors import UserError

MAX_KEYS, MAX_TENSORS, MAX_KEY_BYTES, MAX_NAME_BYTES = 4096, 65536, 256, 63
MAX_STRING_BYTES = 4096  # longer values are skipped, not returned
MAX_ARRAY = 1 << 24
INCOMPLETE = "the download is not complete, repeat it"
MAX_SHOWN = 60  # characters of a value in an error
MAX_ELEMENTS = 1 << 40
ALIGNMENT_BYTES = 32
# ggml type -> its name, elements in a block, bytes of a block: what edge-quantize and other tools write
BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
GGUF_VERSIONS = (2, 3)  # 3 differs from 2 in that a file may be big-endian
# GGUF value type -> format of struct: 8 to 64 bit integers, float32, bool, float64
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, INT32, FLOAT32 = 4, 5, 6
STRING, ARRAY, INTEGERS = 8, 9, frozenset("bBhHiIqQ")
PARTS, MAX_PARTS = "split.count", 512  # each part that is merged is an open file
TOKENS, TOKEN_TYPES, SCORES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores"))
# Keys of the architecture that llama.cpp reads as a uint32, or as a list with a number for each layer.
UINT32_KEYS = ("block_count", "context_length", "embedding_length", "attention.head_count", "attention.head_count_kv",
               "attention.key_length", "attention.value_length")  # fmt: skip
MAX_KEPT = 1024  # values of an array of strings that are returned: the special tokens come first
MAX_KEPT_NUMBERS = 1024  # a longer array of numbers is not returned: a number for each layer, not for each token


class TensorHeader(NamedTuple):
    """What the header of a GGUF file says about one tensor."""

    shape: list[int]  # in GGUF's order: innermost dimension first
    type_name: str
    offset: int  # bytes from the start of the file
    n_bytes: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


class GgufHeader(NamedTuple):
    """values: numbers, short strings, short arrays of numbers, and the first strings of arrays of strings; None for
    every other value."""

    values: dict[str, object]
    tensors: dict[str, TensorHeader]


class GgufPart(NamedTuple):
    """A GGUF file that may be one part of several. keys: the bytes of each key, with its value, in the file's order."""

    values: dict[str, object]  # as in GgufHeader
    keys: dict[str, bytes]
    tensors: dict[str, TensorHeader]
    data_start: int  # bytes from the start of the file


class Token(NamedTuple):
    """A token of the vocabulary."""

    id: int
    text: str
    type: int | None  # tokenizer.ggml.token_type; None: the file does not say


class UnsafeFileError(UserError):
    """What is wrong with the file; one line, without the file's name."""


def shown(value: object) -> str:
    """A value of a file in an error: a text there can have thousands of characters."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def check_gguf(path: Path, architectures: Container[str]) -> GgufHeader:
    """Check a GGUF file whose general.architecture has to be one of `architectures`. Raises UnsafeFileError."""
    with path.open("rb") as file, map_file(file) as data:
        reader = _Reader(data)
        n_tensors, values = _read_start(reader)
        architecture = values.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in architectures:
            expected = " or ".join(architectures) if isinstance(architectures, tuple) else "a language model"
            raise UnsafeFileError(f"general.architecture: expected {expected}, found {shown(architecture)}")
        _check_alignment(values)
        _check_types(reader, architecture)
        return GgufHeader(values, _read_tensors(reader, n_tensors))


def read_part(path: Path) -> GgufPart:
    """Check one part of a split GGUF file, which may have no tensors. Raises UnsafeFileError."""
    with path.open("rb") as file, map_file(file) as data:
        reader = _Reader(data)
        n_tensors, n_keys = _read_counts(reader, min_tensors=0)
        values, spans = _read_keys(reader, n_keys)
        _check_alignment(values)
        tensors = _read_tensors(reader, n_tensors)
        keys = {key: data[start:end] for key, (start, end) in spans.items()}
        return GgufPart(values, keys, tensors, padded(reader.position))


def read_n_parts(path: Path) -> int:
    """Of how many parts a GGUF file is one; 1: it is not split. Raises UnsafeFileError."""
    with path.open("rb") as file, map_file(file) as data:
        reader = _Reader(data)
        _, n_keys = _read_counts(reader, min_tensors=0)
        return _n_parts(_read_keys(reader, n_keys)[0])


def read_gguf_keys(path: Path) -> dict[str, object]:
    """The keys of any GGUF file, as in GgufHeader.values. Raises UnsafeFileError."""
    with path.open("rb") as file, map_file(file) as data:
        return _read_start(_Reader(data))[1]


def read_tokens(path: Path, texts: Container[str], ids: Container[int] = ()) -> list[Token]:
    """The tokens of a GGUF file that have one of these texts or ids, in the order of their ids. Raises
    UnsafeFileError."""
    with path.open("rb") as file, map_file(file) as data:
        reader = _Reader(data)
        _read_start(reader)
        if TOKENS not in reader.arrays:
            raise UnsafeFileError(f"{TOKENS}: missing: the file has no vocabulary")
        reader.position = reader.arrays[TOKENS]
        if reader.uint32() != STRING:
            raise UnsafeFileError(f"{TOKENS}: expected texts")
        texts_found = enumerate(reader.text(*span) for span in reader.string_spans(reader.uint64()))
        found = [(i, text) for i, text in texts_found if text in texts or i in ids]
        types = _read_token_types(reader, [i for i, _ in found])
        return [Token(i, text, types.get(i)) for i, text in found]


def _read_token_types(reader: _Reader, ids: list[int]) -> dict[int, int]:
    if TOKEN_TYPES not in reader.arrays:
        return {}
    reader.position = reader.arrays[TOKEN_TYPES]
    kind, n = SCALARS.get(reader.uint32(), ""), reader.uint64()
    if kind not in INTEGERS:
        raise UnsafeFileError(f"{TOKEN_TYPES}: expected integers")
    start, size = reader.position, struct.calcsize(f"<{kind}")
    return {i: struct.unpack_from(f"<{kind}", reader.data, start + i * size)[0] for i in ids if i < n}


def _read_start(reader: _Reader) -> tuple[int, dict[str, object]]:
    """The number of tensors, and the keys."""
    n_tensors, n_keys = _read_counts(reader)
    values, _ = _read_keys(reader, n_keys)
    if (n_parts := _n_parts(values)) != 1:
        merge = "llama-gguf-split --merge FIRST_PART MERGED.gguf"
        raise UnsafeFileError(f"{PARTS}: one of {n_parts} parts of a split file; merge the parts first: {merge}")
    return n_tensors, values


def _check_alignment(values: dict[str, object]) -> None:
    alignment = values.get("general.alignment", ALIGNMENT_BYTES)
    if alignment != ALIGNMENT_BYTES:
        raise UnsafeFileError(f"general.alignment: expected {ALIGNMENT_BYTES}, found {shown(alignment)}")


def _check_types(reader: _Reader, architecture: str) -> None:
    """llama.cpp takes these numbers in one type only, and a table of the vocabulary only as long as it is."""
    for name in UINT32_KEYS:
        kind = reader.types.get(f"{architecture}.{name}", UINT32)
        if kind not in (UINT32, ARRAY):
            raise UnsafeFileError(f"{architecture}.{name}: expected a uint32, found GGUF value type {kind}")
    if (kind := reader.types.get("general.alignment", UINT32)) != UINT32:
        raise UnsafeFileError(f"general.alignment: expected a uint32, found GGUF value type {kind}")
    if TOKENS not in reader.arrays:
        return
    element, n_tokens = reader.array_start(TOKENS)
    if element != STRING:
        raise UnsafeFileError(f"{TOKENS}: expected texts")
    for key, element, word in ((TOKEN_TYPES, INT32, "int32"), (SCORES, FLOAT32, "float32")):
        if key in reader.types and (reader.types[key] != ARRAY or reader.array_start(key) != (element, n_tokens)):
            raise UnsafeFileError(f"{key}: expected {n_tokens} numbers of type {word}, one for each token")


def _n_parts(values: dict[str, object]) -> int:
    n_parts = values.get(PARTS) or 1  # 0: merged by llama-gguf-split
    if not isinstance(n_parts, int) or not 1 <= n_parts <= MAX_PARTS:
        raise UnsafeFileError(f"{PARTS}: expected a number from 0 to {MAX_PARTS}, found {str(n_parts)[:40]!r}")
    return n_parts


def _read_counts(reader: _Reader, min_tensors: int = 1) -> tuple[int, int]:
    """The numbers of tensors and of keys."""
    if reader.take(4) != b"GGUF":
        raise UnsafeFileError(f"not a GGUF file; expected GGUF version {GGUF_VERSIONS[-1]}")
    version = reader.uint32()
    if int.from_bytes(version.to_bytes(4, "little"), "big") in GGUF_VERSIONS:
        raise UnsafeFileError("big-endian; convert it with gguf_convert_endian.py of llama.cpp")
    if version not in GGUF_VERSIONS:
        remedy = "make it again with a present llama.cpp" if version < GGUF_VERSIONS[0] else "use a newer edge-agent"
        raise UnsafeFileError(f"GGUF version {version}: expected version {GGUF_VERSIONS[-1]}; {remedy}")
    n_tensors, n_keys = reader.uint64(), reader.uint64()
    if not min_tensors <= n_tensors <= MAX_TENSORS or n_keys > MAX_KEYS:
        expected = f"{min_tensors} to {MAX_TENSORS}, and at most {MAX_KEYS}"
        raise UnsafeFileError(f"{n_tensors} tensors and {n_keys} keys; expected {expected}")
    return n_tensors, n_keys


def _read_keys(reader: _Reader, n_keys: int) -> tuple[dict[str, object], dict[str, tuple[int, int]]]:
    """The values, and where each key starts and its value ends."""
    values: dict[str, object] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(n_keys):
        start = reader.position
        key = reader.string(MAX_KEY_BYTES)
        if key in values:
            raise UnsafeFileError(f"{key}: duplicate key")
        values[key] = reader.value(reader.uint32(), key)
        spans[key] = (start, reader.position)
    return values, spans


def _read_tensors(reader: _Reader, n_tensors: int) -> dict[str, TensorHeader]:
    """By name. The spans of bytes of all tensors must lie inside the file and must not overlap."""
    found: dict[str, TensorHeader] = {}  # with offsets relative to the data section
    for _ in range(n_tensors):
        name = reader.string(MAX_NAME_BYTES)
        if name in found:
            raise UnsafeFileError(f"{name}: duplicate tensor name")
        n_dims = reader.uint32()
        if not 1 <= n_dims <= 4:
            raise UnsafeFileError(f"{name}: {n_dims} dimensions; expected 1 to 4")
        shape = [reader.uint64() for _ in range(n_dims)]
        ggml_type, offset = reader.uint32(), reader.uint64()
        if ggml_type not in BLOCKS:
            raise UnsafeFileError(
                f"{name}: type {ggml_type} is unknown; use a file of another type or a newer edge-agent"
            )
        if not all(0 < side <= MAX_ELEMENTS for side in shape) or math.prod(shape) > MAX_ELEMENTS:
            raise UnsafeFileError(f"{name}: shape {shape}: expected 1 to {MAX_ELEMENTS} elements")
        type_name, block_elements, block_bytes = BLOCKS[ggml_type]
        if shape[0] % block_elements:
            raise UnsafeFileError(f"{name}: rows of {shape[0]} elements; expected a multiple of {block_elements}")
        if offset % ALIGNMENT_BYTES:
            raise UnsafeFileError(f"{name}: offset {offset} is not a multiple of {ALIGNMENT_BYTES}")
        found[name] = TensorHeader(shape, type_name, offset, math.prod(shape) // block_elements * block_bytes)
    data_start = padded(reader.position)
    spans = sorted((tensor.offset, tensor.offset + tensor.n_bytes, name) for name, tensor in found.items())
    for (_, end, name), (next_start, _, next_name) in itertools.pairwise(spans):
        if next_start < end:
            raise UnsafeFileError(f"the tensors {name} and {next_name} overlap")
    if spans and data_start + spans[-1][1] > reader.size:
        raise UnsafeFileError(
            f"expected {data_start + spans[-1][1]} bytes, found {reader.size} ({spans[-1][2]} ends after the end of "
            f"the file); {INCOMPLETE}"
        )
    return {name: tensor._replace(offset=data_start + tensor.offset) for name, tensor in found.items()}


def padded(n_bytes: int) -> int:
    """Up to where data are padded that end here."""
    return -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


_UINT64 = struct.Struct("<Q")


class _Reader:
    """Reads a file's bytes from start to end and checks every bound."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position, self.size = data, 0, len(data)
        self.arrays: dict[str, int] = {}  # key -> position of its array, element type first
        self.types: dict[str, int] = {}  # key -> GGUF value type

    def take(self, n_bytes: int) -> bytes:
        self.skip(n_bytes)
        return self.data[self.position - n_bytes : self.position]

    def skip(self, n_bytes: int) -> None:
        if n_bytes > self.size - self.position:
            raise self.ends_early()
        self.position += n_bytes

    def uint32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def uint64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def string(self, max_bytes: int) -> str:
        n_bytes = self.uint64()
        if n_bytes > max_bytes:
            raise UnsafeFileError(f"a name of {n_bytes} bytes; expected at most {max_bytes}")
        try:
            return self.take(n_bytes).decode()
        except UnicodeDecodeError:
            raise UnsafeFileError("a name that is not UTF-8") from None

    def value(self, value_type: int, key: str) -> object:
        """As in GgufHeader.values."""
        self.types[key] = value_type
        if value_type == STRING:
            n_bytes = self.uint64()
            if n_bytes <= MAX_STRING_BYTES:
                return self.take(n_bytes).decode(errors="replace")
            self.skip(n_bytes)
            return None
        if value_type == ARRAY:
            return self.array(key)
        if value_type not in SCALARS:
            raise UnsafeFileError(f"{key}: value type {value_type} is unknown; use a newer edge-agent")
        return self.numbers(SCALARS[value_type], 1)[0]

    def numbers(self, kind: str, n: int) -> list[int | float | bool]:
        """kind: a value of SCALARS."""
        return list(struct.unpack(f"<{n}{kind}", self.take(n * struct.calcsize(f"<{kind}"))))

    def array(self, key: str) -> object:
        self.arrays[key] = self.position
        element_type, n = self.uint32(), self.uint64()
        if n > MAX_ARRAY or (element_type != STRING and element_type not in SCALARS):
            raise UnsafeFileError(f"{key}: an array of {n} values of type {element_type}")
        if element_type == STRING and key != TOKENS:  # merges, names of tags: nobody needs them
            self.skip_strings(n)
            return None
        if element_type == STRING:
            kept = [self.text(*span) for span in self.string_spans(min(n, MAX_KEPT))]
            self.skip_strings(n - len(kept))
            return kept
        if n <= MAX_KEPT_NUMBERS:
            return self.numbers(SCALARS[element_type], n)
        self.skip(n * struct.calcsize(f"<{SCALARS[element_type]}"))
        return None

    def array_start(self, key: str) -> tuple[int, int]:
        """Element type and length of an array that was read."""
        element, n = struct.unpack_from("<IQ", self.data, self.arrays[key])
        return element, n

    def skip_strings(self, n: int) -> None:
        """A vocabulary and its merges have hundreds of thousands of them."""
        data, last, position, read = self.data, self.size - 8, self.position, _UINT64.unpack_from
        for _ in range(n):
            if position > last:
                raise self.ends_early()
            position += 8 + read(data, position)[0]
        self.position = position
        if position > self.size:
            raise self.ends_early()

    def ends_early(self) -> UnsafeFileError:
        return UnsafeFileError(f"the file ends at byte {self.size}, inside its header; {INCOMPLETE}")

    def string_spans(self, n: int) -> Iterator[tuple[int, int]]:
        """Start and end of each of n strings, which begin here."""
        data, size, position = self.data, self.size, self.position
        for _ in range(n):
            if position + 8 > size:
                break
            (n_bytes,) = _UINT64.unpack_from(data, position)
            position += 8 + n_bytes
            if position > size:
                break
            yield position - n_bytes, position
        else:
            self.position = position
            return
        raise self.ends_early()

    def text(self, start: int, end: int) -> str:
        """A string of an array; "": longer than any text that is needed."""
        return self.data[start:end].decode(errors="replace") if end - start <= MAX_STRING_BYTES else ""


def map_file(file: BinaryIO) -> mmap.mmap:
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise UnsafeFileError("the file is empty") from None
