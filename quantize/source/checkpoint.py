"""Open a released checkpoint: configuration, tensors (lazily), missing and extra names. HF and consolidated layouts,
BF16 and FP8.

Only headers are read here; tensor bytes are read in blocks of rows into fresh arrays (never mapped, so that resident
memory stays what it says). Everything that can be wrong with a checkpoint is found before the first tensor byte.
Raises CheckpointError: one line with file, key, expected, found, next step.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np

from quantize.source.hf_config import (
    CheckpointConfig,
    CheckpointError,
    TextConfig,
    VisionTowerConfig,
    read_consolidated,
    read_hf,
    read_table,
)
from quantize.source.tensor_names import HEAD, IGNORED, SCALE, TensorSpec, canonical, consolidated, tensor_specs

BLOCK_BYTES = 64 << 20  # float32 bytes of one block of rows
MAX_HEADER_BYTES = 100 << 20  # the safetensors format's own limit
PARAMS = "params.json"
ADAPTER = "adapter_config.json"  # beside an adapter's adapter_model.safetensors
LAYOUTS = {"config.json": "model", PARAMS: "consolidated"}  # what says it -> how the files of tensors begin
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}


class StoredTensor(msgspec.Struct, frozen=True):
    """Where one tensor's bytes lie."""

    name: str  # as the file spells it
    file: Path
    offset: int
    dtype: str  # safetensors' word for it
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class LoraDelta(msgspec.Struct, frozen=True):
    """What an adapter adds to a matrix: scale * up (rows, rank) @ down (rank, columns). Rotary rows in HF's order."""

    down: StoredTensor
    up: StoredTensor
    scale: float
    flipped: bool = False  # the files hold (up.T, down.T) under each other's names: of embeddings

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """(up, down), float32; without the scale."""
        down, up = read_tensor(self.down), read_tensor(self.up)
        return (down.T, up.T) if self.flipped else (up, down)


class Checkpoint(msgspec.Struct, frozen=True):
    folder: Path
    config: CheckpointConfig
    fp8: bool  # really: some tensors are
    sources: dict[str, StoredTensor]  # by canonical name
    ignored: dict[str, str]  # name in the file -> why
    added: dict[str, LoraDelta] = {}  # by canonical name: an adapter that is merged on the way

    @property
    def files(self) -> list[Path]:
        """All that weights come from."""
        adapter = {one.down.file for one in self.added.values()}
        adapter |= {file.with_name(ADAPTER) for file in adapter}  # its scales
        return sorted({source.file for source in self.sources.values()} | adapter)

    @property
    def text(self) -> TextConfig:
        return self.config.text

    @property
    def vision(self) -> VisionTowerConfig | None:
        return self.config.vision

    @property
    def family(self) -> str:
        return self.config.family.name

    @property
    def layout(self) -> str:
        return "consolidated" if self.interleaved else "HF"

    @property
    def interleaved(self) -> bool:
        """Whether the rows that rotary positions turn stand in pairs, as GGUF has them; HF's stand in halves."""
        return self.config.path.name == PARAMS

    @property
    def size(self) -> str:
        return self.config.family.sizes.get((self.text.hidden, self.text.layers), f"{self.parameters / 1e6:.1f}M")

    @property
    def parameters(self) -> int:
        return sum(math.prod(s.shape) for name, s in self.sources.items() if not name.endswith(SCALE))

    @property
    def text_rows(self) -> list[TensorSpec]:
        return _tensor_specs(self.config)[0]

    @property
    def vision_rows(self) -> list[TensorSpec]:
        return _tensor_specs(self.config)[1]

    @property
    def dims(self) -> dict[str, int]:
        """The words in which the tables of `names` give shapes."""
        t, v = self.text, self.vision
        text = {
            "hidden": t.hidden,
            "ffn": t.ffn,
            "vocab": t.vocab,
            "heads": t.heads,
            "kv_heads": t.kv_heads,
            "q": t.heads * t.head_dim,
            "kv": t.kv_heads * t.head_dim,
        }
        if v is None:
            return text
        return text | {
            "v_hidden": v.hidden,
            "v_ffn": v.ffn,
            "v_heads": v.heads,
            "channels": v.channels,
            "patch": v.patch,
            "merged": v.hidden * v.merge * v.merge,
        }

    def shape(self, row: TensorSpec) -> tuple[int, ...]:
        return tuple(self.dims[word] for word in row.shape)

    def variant(self) -> str:
        """base, instruct or reasoning: no key says so. The chat template or the system prompt does, else the folder."""
        if template := chat_template(self.folder):
            return "reasoning" if "[THINK]" in template and "reasoning" in template.lower() else "instruct"
        prompt = self.folder / "SYSTEM_PROMPT.txt"
        if prompt.is_file():
            return "reasoning" if "[THINK]" in prompt.read_text(encoding="utf-8", errors="replace") else "instruct"
        name = self.folder.resolve().name.lower()
        return next((variant for variant in ("reasoning", "instruct") if variant in name), "base")

    def rows(self, row: TensorSpec, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor as stored: (stop - start, ...) in the source dtype, not yet scaled."""
        source = self.sources[row.hf]
        dtype = DTYPES[source.dtype]
        width = math.prod(source.shape[1:])
        out = np.empty((stop - start, *source.shape[1:]), dtype)
        with source.file.open("rb") as file:
            file.seek(source.offset + start * width * dtype.itemsize)
            wanted = out.nbytes
            if file.readinto(out.view(np.uint8).reshape(-1).data) != wanted:
                raise CheckpointError(f"{source.file}: {source.name}: file ends early; copy the checkpoint again")
        return out

    def is_plain(self, row: TensorSpec) -> bool:
        """Whether the stored numbers are those the model computes with."""
        return self.sources[row.hf].dtype != "F8_E4M3" and row.hf not in self.added

    def float_blocks(self, row: TensorSpec, unit_rows: int = 1) -> Iterator[np.ndarray]:
        """A tensor in blocks of whole units of rows, float32, FP8 scale and adapter applied: the values the model
        computes with."""
        scale, added = self.scale(row), self.added.get(row.hf)
        if added is not None:
            up, down = added.factors()
            if row.rope and self.interleaved:
                up = interleave(up, len(up) // self.dims[row.rope])
        for start, stop in row_ranges(self.sources[row.hf].shape, unit_rows):
            block = self.rows(row, start, stop).astype(np.float32)
            if scale is not None:
                np.multiply(block, scale, out=block)
            if added is not None:
                block += np.float32(added.scale) * (up[start:stop] @ down)
            yield block

    def scale(self, row: TensorSpec) -> np.float32 | None:
        """The per-tensor FP8 scale, or None for a tensor that is not FP8."""
        if self.sources[row.hf].dtype != "F8_E4M3":
            return None
        source = self.sources[row.hf + SCALE]
        value = read_tensor(source).reshape(-1)[0]
        if not (np.isfinite(value) and value > 0):
            raise CheckpointError(
                f"{source.file}: {source.name}: expected a finite scale above 0, found {value}; the file is damaged"
            )
        return value


def interleave(block: np.ndarray, head_rows: int) -> np.ndarray:
    """HF's rotary order (first halves, then second halves, per head) -> llama.cpp's (half pairs side by side)."""
    heads = block.reshape(-1, 2, head_rows // 2, *block.shape[1:])
    return heads.swapaxes(1, 2).reshape(block.shape)


def deinterleave(block: np.ndarray, head_rows: int) -> np.ndarray:
    """The way back."""
    heads = block.reshape(-1, head_rows // 2, 2, *block.shape[1:])
    return heads.swapaxes(1, 2).reshape(block.shape)


def row_ranges(shape: tuple[int, ...], unit_rows: int = 1) -> Iterator[tuple[int, int]]:
    """[start, stop) over the first dimension in blocks of about BLOCK_BYTES of float32, a multiple of unit_rows."""
    row_bytes = 4 * math.prod(shape[1:])
    step = max(1, BLOCK_BYTES // (row_bytes * unit_rows)) * unit_rows
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def read_tensor(source: StoredTensor) -> np.ndarray:
    """A whole small tensor, float32; FP8 without its scale."""
    with source.file.open("rb") as file:
        file.seek(source.offset)
        raw = np.frombuffer(file.read(source.n_bytes), DTYPES[source.dtype])
    return raw.astype(np.float32).reshape(source.shape)


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Open and check a whole checkpoint. Reads headers only. Raises CheckpointError."""
    folder = Path(folder)
    path, found = _open(folder)
    head = {HEAD.hf, HEAD.consolidated}
    has_head = any(canonical(source.name) in head for source in found)
    config = read_consolidated(path, has_head) if path.name == PARAMS else read_hf(path, has_head)
    checkpoint = _match(folder, config, found)
    for row in [*checkpoint.text_rows, *checkpoint.vision_rows]:
        checkpoint.scale(row)  # a NaN or zero scale shows in the first second too
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------------


def chat_template(folder: Path) -> str:
    """The checkpoint's own chat template, or "": carried along as text for other programs, never rendered here."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: not UTF-8: {error.reason}; download it again") from None
    if (folder / "tokenizer_config.json").is_file():
        template = read_table(folder / "tokenizer_config.json").get("chat_template", "")
        return template if isinstance(template, str) else ""
    return ""


def _tensor_specs(config: CheckpointConfig) -> tuple[list[TensorSpec], list[TensorSpec]]:
    return tensor_specs(config.text.layers, config.vision.layers if config.vision else None, config.text.tied)


def _open(folder: Path) -> tuple[Path, list[StoredTensor]]:
    """Which file says what the model is, and the tensors beside it. Of a folder with both layouts, HF."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; expected a checkpoint as downloaded (config.json, *.safetensors)"
        )
    here = [(folder / file, stem) for file, stem in LAYOUTS.items() if (folder / file).is_file()]
    if not here:
        raise CheckpointError(
            f"{folder}: no {' or '.join(LAYOUTS)}: not a checkpoint; expected one of them and *.safetensors"
        )
    path, stem = next((one for one in here if any(folder.glob(f"{one[1]}*.safetensors*"))), here[0])
    return path, _headers(folder, stem)


def _headers(folder: Path, stem: str) -> list[StoredTensor]:
    index, one = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    weight_map = None
    if index.is_file():
        weight_map = read_table(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: weight_map: missing; expected tensor name -> file")
        files = sorted(set(weight_map.values()))
    elif not one.is_file() and (parts := sorted(folder.glob(f"{stem}-*-of-*.safetensors"))):
        n = parts[0].stem.rpartition("-")[2]
        files = [f"{stem}-{i:05d}-of-{n}.safetensors" for i in range(1, int(n) + 1)] if n.isdigit() else [one.name]
    else:
        files = [one.name]
    found: list[StoredTensor] = []
    for name in files:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path}: missing; the checkpoint is incomplete, download this file")
        found += read_header(path)
    if weight_map is not None:
        here = {source.name: source.file.name for source in found}
        for name, file in weight_map.items():
            if here.get(name) != file:
                raise CheckpointError(f"{index}: {name}: expected in {file}, found in {here.get(name, 'no file')}")
    return found


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file. https://github.com/huggingface/safetensors#format"""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length < 2 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: not a safetensors file, or cut in its header ({size} bytes); copy it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path}: safetensors header is not JSON: {error}; copy it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: safetensors header: expected an object, found a {type(header).__name__}")
    header.pop("__metadata__", None)
    found, end_expected = [], 0
    for name, entry in header.items():
        try:
            dtype, shape, (start_at, end_at) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: {name}: header entry is damaged; copy the file again") from None
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name}: dtype: expected one of {', '.join(DTYPES)}, found {dtype}")
        if any(not isinstance(n, int) or n < 0 for n in (*shape, start_at, end_at)):
            raise CheckpointError(f"{path}: {name}: header entry is damaged; copy the file again")
        source = StoredTensor(name, path, 8 + length + start_at, dtype, shape)
        if end_at - start_at != source.n_bytes:
            raise CheckpointError(
                f"{path}: {name}: expected {source.n_bytes} bytes for {shape} {dtype}, found {end_at - start_at}"
            )
        end_expected = max(end_expected, 8 + length + end_at)
        found.append(source)
    for before, after in itertools.pairwise(sorted(found, key=lambda source: source.offset)):
        if before.offset + before.n_bytes > after.offset:
            raise CheckpointError(
                f"{path}: {before.name} and {after.name} overlap; the header is damaged, copy it again"
            )
    if size != end_expected:
        raise CheckpointError(f"{path}: expected {end_expected} bytes by its header, found {size}; copy the file again")
    return found


def _match(folder: Path, config: CheckpointConfig, found: list[StoredTensor]) -> Checkpoint:
    """Every tensor is used once or named as ignored; a missing, extra or misshapen one stops here."""
    sources: dict[str, StoredTensor] = {}
    ignored: dict[str, str] = {}
    text_rows, vision_rows = _tensor_specs(config)
    # The consolidated layout has names of its own; of another layout's names it knows none.
    ours = consolidated([*text_rows, *vision_rows, HEAD]) if config.path.name == PARAMS else None
    for source in found:
        why = next((why for suffix, why in IGNORED if source.name.endswith(suffix)), "")
        name = canonical(source.name) if ours is None else ours.get(source.name, source.name)
        if not why and name == HEAD.hf and config.text.tied:
            why = f"output head: {config.path.name} ties it to the embeddings"
        if why:
            ignored[source.name] = why
        elif name in sources:
            raise CheckpointError(f"{source.file}: {source.name}: the same tensor as {sources[name].name}")
        else:
            sources[name] = source
    fp8 = any(source.dtype == "F8_E4M3" for source in sources.values())
    if fp8 and not config.fp8:
        key = "quantization_config" if ours is None else "quantization"
        raise CheckpointError(f"{config.path}: {key}: missing, but the checkpoint holds FP8 tensors")
    checkpoint = Checkpoint(folder, config, fp8, sources, ignored)
    expected = {row.hf: checkpoint.shape(row) for row in [*checkpoint.text_rows, *checkpoint.vision_rows]}
    scales = {name + SCALE for name, s in sources.items() if s.dtype == "F8_E4M3"}
    for name, shape in expected.items():
        if name not in sources:
            spelled = name if ours is None else next(theirs for theirs, our in ours.items() if our == name)
            raise CheckpointError(f"{folder}: {spelled}: missing; {config.path.name} calls for shape {shape}")
        if sources[name].shape != shape:
            raise CheckpointError(
                f"{sources[name].file}: {sources[name].name}: expected shape {shape} by {config.path.name}, "
                f"found {sources[name].shape}"
            )
        if sources[name].dtype == "F8_E4M3" and (not name.startswith("text.layers.") or len(shape) != 2):
            raise CheckpointError(
                f"{sources[name].file}: {sources[name].name}: FP8 is known only for the linear layers"
            )
    for name in sorted(scales - sources.keys()):
        raise CheckpointError(f"{folder}: {name}: missing; the FP8 tensor {name.removesuffix(SCALE)} needs it")
    for name in sorted(scales):
        if math.prod(sources[name].shape) != 1:
            raise CheckpointError(f"{folder}: {name}: expected one scale per tensor, found shape {sources[name].shape}")
    extra = sorted(sources[name].name for name in sources.keys() - expected.keys() - scales)
    if extra:
        raise CheckpointError(
            f"{folder}: {len(extra)} tensor(s) that {config.path.name} has no place for: {', '.join(extra[:4])}"
            f"{' …' if len(extra) > 4 else ''}"
        )
    return checkpoint
