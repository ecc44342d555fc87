"""Open a released checkpoint: its configuration, its tensors (read later, in blocks), missing and extra tensor names.
HF and consolidated layouts, BF16 and FP8.

Only headers are read here. Tensor bytes are read in blocks of rows into new arrays; files are never mapped, because
mapped pages would count as resident memory. Every error of a checkpoint is found before the first tensor byte is read.
Raises CheckpointError: one line with file, key, expected, found, next step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from edge_agent.bundle.recognise import describe
from quantize.source.hf_config import (
    CheckpointConfig,
    CheckpointError,
    TextConfig,
    VisionTowerConfig,
    read_consolidated,
    read_hf,
    read_table,
    refuse_quantised,
)
from quantize.source.safetensors import FP8, StoredTensor, read_header, read_rows, read_tensor
from quantize.source.tensor_names import HEAD, IGNORED, SCALE, TensorSpec, canonical, consolidated, tensor_specs

BLOCK_BYTES = 64 << 20  # of one block of rows, in float32
PARAMS = "params.json"
ADAPTER = "adapter_config.json"  # beside an adapter's adapter_model.safetensors
LAYOUTS = {"config.json": "model", PARAMS: "consolidated"}  # configuration file -> how its tensor files begin


# The ending of a file's name -> why it is not used.
UNUSED = (
    (ADAPTER, "an adapter, which is not merged: give its folder with --merge"),
    ("adapter_model.safetensors", "an adapter, which is not merged: give its folder with --merge"),
    (".safetensors", "not of the layout that is read"),
    (".bin", "a pickle, which is not read"),
    (".pt", "a pickle, which is not read"),
    (".pth", "a pickle, which is not read"),
    (".gguf", "a GGUF file, which is not read"),
    (".part", "a part of a download"),
    (".incomplete", "a part of a download"),
)


class LoraDelta(msgspec.Struct, frozen=True):
    """What a LoRA adapter adds to a matrix: scale * B (rows, rank) @ A (rank, columns). Rotary rows in HF's order."""

    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool = False  # PEFT's lora_embedding matrices: `a` holds B.T and `b` holds A.T

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """(B, A): (rows, rank) and (rank, columns), float32, without the scale."""
        a, b = read_tensor(self.a), read_tensor(self.b)
        return (a.T, b.T) if self.transposed else (b, a)

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class Checkpoint(msgspec.Struct, frozen=True):
    """A checkpoint whose headers are read and checked."""

    folder: Path
    config: CheckpointConfig
    fp8: bool  # some tensors are stored as FP8
    sources: dict[str, StoredTensor]  # by canonical name
    ignored: dict[str, str]  # name in the file -> why it is not used
    lora: dict[str, LoraDelta] = {}  # by canonical name: an adapter that is merged while tensors are read

    @property
    def files(self) -> list[Path]:
        """Every file that weights are read from."""
        adapter = {delta.a.file for delta in self.lora.values()}
        adapter |= {file.with_name(ADAPTER) for file in adapter}  # it holds the scales
        return sorted({source.file for source in self.sources.values()} | adapter)

    @property
    def unused(self) -> dict[str, str]:
        """Files that are not read although they look like parts of a model -> why. `inspect` shows them."""
        used = {file.name for file in self.files}
        found = {}
        for path in sorted(self.folder.iterdir()):
            why = next((why for ending, why in UNUSED if path.name.endswith(ending)), "")
            if path.is_file() and path.name not in used and why and not path.name.startswith("."):
                found[path.name] = why
        return found

    @property
    def text(self) -> TextConfig:
        return self.config.text

    @property
    def vision(self) -> VisionTowerConfig | None:
        return self.config.vision

    @property
    def vision_tower(self) -> VisionTowerConfig:
        """As `vision`, for code that needs a vision encoder. Raises CheckpointError for a text-only model."""
        if self.config.vision is None:
            raise CheckpointError(f"{self.folder}: a text-only model; expected one with a vision encoder")
        return self.config.vision

    @property
    def family(self) -> str:
        return self.config.family.name

    @property
    def layout(self) -> str:
        return "consolidated" if self.interleaved else "HF"

    @property
    def interleaved(self) -> bool:
        """Whether rotary row pairs are side by side, as in GGUF. In HF's layout a head's halves follow each other."""
        return self.config.path.name == PARAMS

    @property
    def size(self) -> str:
        return self.config.family.sizes.get((self.text.hidden, self.text.layers), f"{self.parameters / 1e6:.1f}M")

    @property
    def parameters(self) -> int:
        return sum(math.prod(s.shape) for name, s in self.sources.items() if not name.endswith(SCALE))

    @property
    def text_tensors(self) -> list[TensorSpec]:
        return _tensor_specs(self.config)[0]

    @property
    def vision_tensors(self) -> list[TensorSpec]:
        return _tensor_specs(self.config)[1]

    @property
    def dims(self) -> dict[str, int]:
        """Sizes by the words that the tables of tensor_names.py use for shapes."""
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

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        return tuple(self.dims[word] for word in spec.shape)

    def n_elements(self, specs: list[TensorSpec]) -> int:
        return sum(math.prod(self.shape(spec)) for spec in specs)

    def variant(self) -> str:
        """base, instruct or reasoning. No key gives it: the chat template or the system prompt does, or the folder."""
        if template := chat_template(self.folder):
            return "reasoning" if "[THINK]" in template and "reasoning" in template.lower() else "instruct"
        prompt = self.folder / "SYSTEM_PROMPT.txt"
        if prompt.is_file():
            return "reasoning" if "[THINK]" in prompt.read_text(encoding="utf-8", errors="replace") else "instruct"
        name = self.folder.resolve().name.lower()
        return next((variant for variant in ("reasoning", "instruct") if variant in name), "base")

    def read_rows(self, spec: TensorSpec, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor as stored: (stop - start, ...) in the stored dtype, not scaled."""
        return read_rows(self.sources[spec.hf], start, stop)

    def needs_no_conversion(self, spec: TensorSpec) -> bool:
        """Whether the stored values are those that the model computes with: no FP8 scale, no adapter."""
        return self.sources[spec.hf].dtype != FP8 and spec.hf not in self.lora

    def dequantised_blocks(self, spec: TensorSpec, rows_per_head: int = 1) -> Iterator[np.ndarray]:
        """A tensor's values as the model computes with them: blocks of whole heads, (rows, ...) float32, with FP8 scale
        and adapter applied."""
        scale, delta = self.scale(spec), self.lora.get(spec.hf)
        if delta is not None:
            b, a = delta.factors()
            if spec.rope and self.interleaved:
                b = interleave(b, len(b) // self.dims[spec.rope])
        for start, stop in row_ranges(self.sources[spec.hf].shape, rows_per_head):
            block = self.read_rows(spec, start, stop).astype(np.float32)
            if scale is not None:
                np.multiply(block, scale, out=block)
            if delta is not None:
                block += np.float32(delta.scale) * (b[start:stop] @ a)
            yield block

    def scale(self, spec: TensorSpec) -> np.float32 | None:
        """The per-tensor FP8 scale, or None for a tensor that is not FP8. Raises CheckpointError at a damaged scale."""
        if self.sources[spec.hf].dtype != FP8:
            return None
        source = self.sources[spec.hf + SCALE]
        value = read_tensor(source).reshape(-1)[0]
        if not (np.isfinite(value) and value > 0):
            raise CheckpointError(
                f"{source.file}: {source.name}: expected a finite scale above 0, found {value}; the file is damaged"
            )
        return value


def interleave(block: np.ndarray, rows_per_head: int) -> np.ndarray:
    """HF's rotary order (per head: all first halves, then all second halves) -> llama.cpp's (pairs side by side)."""
    heads = block.reshape(-1, 2, rows_per_head // 2, *block.shape[1:])
    return heads.swapaxes(1, 2).reshape(block.shape)


def deinterleave(block: np.ndarray, rows_per_head: int) -> np.ndarray:
    """The inverse of `interleave`."""
    heads = block.reshape(-1, rows_per_head // 2, 2, *block.shape[1:])
    return heads.swapaxes(1, 2).reshape(block.shape)


def row_ranges(shape: tuple[int, ...], rows_per_head: int = 1) -> Iterator[tuple[int, int]]:
    """[start, stop) over the first dimension: blocks of about BLOCK_BYTES of float32, each a number of whole heads."""
    row_bytes = 4 * math.prod(shape[1:])
    step = max(1, BLOCK_BYTES // (row_bytes * rows_per_head)) * rows_per_head
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def fingerprint(checkpoint: Checkpoint, *parts: object) -> str:
    """SHA-256, in hex, of everything that some work on a checkpoint depends on.

    Of the files (weights, configuration, tokenizer, chat template): name, size and modification time, not the content.
    parts: whatever else the work depends on, with a `repr` that says all of it.
    """
    files = {path for path in checkpoint.folder.iterdir() if path.suffix in (".json", ".jinja")} | {*checkpoint.files}
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    return hashlib.sha256(repr((stamps, parts)).encode()).hexdigest()


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Open and check a whole checkpoint. Reads headers only. Raises CheckpointError."""
    folder = Path(folder)
    path, tensors = _open(folder)
    head_names = {HEAD.hf, HEAD.consolidated}
    has_head = any(canonical(tensor.name) in head_names for tensor in tensors)
    config = read_consolidated(path, has_head) if path.name == PARAMS else read_hf(path, has_head)
    checkpoint = _match(folder, config, tensors)
    for spec in [*checkpoint.text_tensors, *checkpoint.vision_tensors]:
        checkpoint.scale(spec)  # a NaN or zero scale is reported now, not in the middle of a conversion
    _check_same_model(checkpoint)
    return checkpoint


def chat_template(folder: Path) -> str:
    """The checkpoint's own chat template, or "". It is copied as text for other programs and never rendered here."""
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


# ---------------------------------------------------------------------------------------------------------------------


def _tensor_specs(config: CheckpointConfig) -> tuple[list[TensorSpec], list[TensorSpec]]:
    return tensor_specs(config.text.layers, config.vision.layers if config.vision else None, config.text.tied)


def _open(folder: Path) -> tuple[Path, list[StoredTensor]]:
    """The configuration file, and the tensors that belong to it. In a folder with both layouts, HF is taken."""
    expected = "expected a checkpoint as downloaded (config.json, *.safetensors)"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {describe(folder) or 'no such folder'}; {expected}")
    layouts = [(folder / file, stem) for file, stem in LAYOUTS.items() if (folder / file).is_file()]
    if not layouts:
        what = describe(folder) or f"no {' or '.join(LAYOUTS)}: not a checkpoint"
        raise CheckpointError(f"{folder}: {what}; {expected}")
    path, stem = next((layout for layout in layouts if any(folder.glob(f"{layout[1]}*.safetensors*"))), layouts[0])
    refuse_quantised(path)
    return path, _headers(folder, stem)


def _headers(folder: Path, stem: str) -> list[StoredTensor]:
    """The tensors of a checkpoint in one file, or in shards with or without an index."""
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    weight_map = None
    if index.is_file():
        weight_map = read_table(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: weight_map: missing; expected tensor name -> file")
        files = sorted(set(weight_map.values()))
    elif not single.is_file() and (shards := sorted(folder.glob(f"{stem}-*-of-*.safetensors"))):
        n = shards[0].stem.rpartition("-")[2]
        files = [f"{stem}-{i:05d}-of-{n}.safetensors" for i in range(1, int(n) + 1)] if n.isdigit() else [single.name]
    else:
        files = [single.name]
    _refuse_other_weights(folder, stem, files)
    tensors: list[StoredTensor] = []
    for name in files:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            what = describe(path) if path.is_symlink() else "missing; the checkpoint is incomplete, download this file"
            raise CheckpointError(f"{path}: {what or 'missing'}{_instead(folder)}")
        tensors += read_header(path)
    if weight_map is not None:
        file_of = {tensor.name: tensor.file.name for tensor in tensors}
        for name, file in weight_map.items():
            if file_of.get(name) != file:
                raise CheckpointError(f"{index}: {name}: expected in {file}, found in {file_of.get(name, 'no file')}")
    return tensors


def _refuse_other_weights(folder: Path, stem: str, used: list[str]) -> None:
    """Other files of the same kind hold another model, or parts of one: transformers and other loaders would not agree
    which one to take. Raises CheckpointError."""
    index = f"{stem}.safetensors.index.json"
    present = {path.name for path in folder.glob(f"{stem}.safetensors")}
    present |= {path.name for path in folder.glob(f"{stem}-*-of-*.safetensors")}
    if others := sorted(present - set(used)):
        by_index = f" by {index}" if (folder / index).is_file() else ""
        raise CheckpointError(
            f"{folder}: two sets of weights: {used[0]}{' …' if len(used) > 1 else ''}{by_index}, and {others[0]}"
            f"{' …' if len(others) > 1 else ''}; remove the set that is not meant"
        )


def _check_same_model(checkpoint: Checkpoint) -> None:
    """In a folder with both layouts: the files that are not used hold the same model. Reads one row of
    each tensor. Raises CheckpointError when the two are of different models."""
    folder = checkpoint.folder
    if checkpoint.interleaved or not any(folder.glob("consolidated*.safetensors")):
        return
    specs = [*checkpoint.text_tensors, *checkpoint.vision_tensors]
    theirs = {tensor.name: tensor for tensor in _headers(folder, LAYOUTS[PARAMS])}
    for spec in specs:
        ours, other = checkpoint.sources[spec.hf], theirs.get(spec.consolidated)
        same = other is not None and other.shape == ours.shape
        if same and other is not None and other.dtype == ours.dtype and not spec.rope:
            same = all(
                np.array_equal(read_rows(ours, n, n + 1), read_rows(other, n, n + 1)) for n in (0, ours.shape[0] - 1)
            )
        if not same:
            raise CheckpointError(
                f"{folder}: two sets of weights: {ours.file.name} and consolidated*.safetensors differ in {ours.name}; "
                "remove the set that is not meant"
            )


def _instead(folder: Path) -> str:
    """What is in the folder in place of safetensors."""
    others = [path for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth", ".gguf")]
    return "".join(f"; {path.name} is {what}" for path in others[:1] if (what := describe(path)))


def _match(folder: Path, config: CheckpointConfig, tensors: list[StoredTensor]) -> Checkpoint:
    """Give every tensor its canonical name. Raises CheckpointError at a missing, extra or wrongly shaped tensor."""
    text, vision = _tensor_specs(config)
    # The consolidated layout has its own names, and only those.
    names = consolidated([*text, *vision, HEAD]) if config.path.name == PARAMS else None
    sources, ignored = _by_canonical_name(config, tensors, names)
    fp8 = any(source.dtype == FP8 for source in sources.values())
    if fp8 and not config.fp8:
        key = "quantization_config" if names is None else "quantization"
        raise CheckpointError(f"{config.path}: {key}: missing, but the checkpoint holds FP8 tensors")
    checkpoint = Checkpoint(folder, config, fp8, sources, ignored)
    expected = {spec.hf: checkpoint.shape(spec) for spec in [*text, *vision]}
    for name, shape in expected.items():
        if name not in sources:
            in_file = name if names is None else next(theirs for theirs, ours in names.items() if ours == name)
            raise CheckpointError(f"{folder}: {in_file}: missing; {config.path.name} calls for shape {shape}")
        _check_tensor(config.path.name, sources[name], name, shape)
    scales = _check_scales(folder, sources)
    extra = sorted(sources[name].name for name in sources.keys() - expected.keys() - scales)
    if extra:
        raise CheckpointError(
            f"{folder}: {len(extra)} tensor(s) that {config.path.name} has no place for: {', '.join(extra[:4])}"
            f"{' …' if len(extra) > 4 else ''}"
        )
    return checkpoint


def _by_canonical_name(
    config: CheckpointConfig, tensors: list[StoredTensor], names: dict[str, str] | None
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """(tensors by canonical name, ignored names and why). names: of the consolidated layout, or None for HF."""
    sources: dict[str, StoredTensor] = {}
    ignored: dict[str, str] = {}
    for tensor in tensors:
        why = next((why for suffix, why in IGNORED if tensor.name.endswith(suffix)), "")
        name = canonical(tensor.name) if names is None else names.get(tensor.name, tensor.name)
        if not why and name == HEAD.hf and config.text.tied:
            why = f"output head: {config.path.name} ties it to the embeddings"
        if why:
            ignored[tensor.name] = why
        elif name in sources:
            raise CheckpointError(f"{tensor.file}: {tensor.name}: the same tensor as {sources[name].name}")
        else:
            sources[name] = tensor
    return sources, ignored


def _check_tensor(config_name: str, source: StoredTensor, name: str, shape: tuple[int, ...]) -> None:
    if source.shape != shape:
        raise CheckpointError(
            f"{source.file}: {source.name}: expected shape {shape} by {config_name}, found {source.shape}"
        )
    if source.dtype == FP8 and (not name.startswith("text.layers.") or len(shape) != 2):
        raise CheckpointError(f"{source.file}: {source.name}: FP8 is known only for the linear layers")


def _check_scales(folder: Path, sources: dict[str, StoredTensor]) -> set[str]:
    """The canonical names of the FP8 scales. Raises CheckpointError when one is missing or is not a single number."""
    scales = {name + SCALE for name, source in sources.items() if source.dtype == FP8}
    for name in sorted(scales - sources.keys()):
        raise CheckpointError(f"{folder}: {name}: missing; the FP8 tensor {name.removesuffix(SCALE)} needs it")
    for name in sorted(scales):
        if math.prod(sources[name].shape) != 1:
            raise CheckpointError(f"{folder}: {name}: expected one scale per tensor, found shape {sources[name].shape}")
    return scales
