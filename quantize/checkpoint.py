"""Open a released checkpoint: configuration, tensors (lazily), missing and extra names. HF layout, BF16 and FP8.

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
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from quantize import names

BLOCK_BYTES = 64 << 20  # float32 bytes of one block of rows
MAX_COUNT = 1 << 20  # of anything in a configuration: layers are written out one by one
MAX_HEADER_BYTES = 100 << 20  # the safetensors format's own limit
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
# hidden, layers -> the released size
SIZES = {(3072, 26): "3B", (4096, 34): "8B", (5120, 40): "14B"}


class CheckpointError(Exception):
    """One line: file, key, expected, found, what to do."""


class Text(msgspec.Struct, frozen=True):
    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rms_eps: float
    tied: bool
    rope_theta: float
    yarn_factor: float
    yarn_original_context: int
    yarn_beta_fast: float
    yarn_beta_slow: float
    yarn_mscale_all_dim: float
    scaling_beta: float  # llama_4_scaling_beta


class Vision(msgspec.Struct, frozen=True):
    hidden: int
    layers: int
    ffn: int
    heads: int
    channels: int
    patch: int
    merge: int
    image_size: int
    rope_theta: float
    eps: float  # of the norms inside the tower: fixed at 1e-5 by the architecture
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Source(msgspec.Struct, frozen=True):
    """Where one tensor's bytes lie."""

    name: str  # as the file spells it
    file: Path
    offset: int
    dtype: str  # safetensors' word for it
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Checkpoint(msgspec.Struct, frozen=True):
    folder: Path
    text: Text
    vision: Vision
    fp8: bool
    sources: dict[str, Source]  # by canonical name
    ignored: dict[str, str]  # name in the file -> why

    @property
    def family(self) -> str:
        return "ministral3"

    @property
    def size(self) -> str:
        return SIZES.get((self.text.hidden, self.text.layers), f"{self.parameters / 1e6:.1f}M")

    @property
    def parameters(self) -> int:
        return sum(math.prod(s.shape) for name, s in self.sources.items() if not name.endswith(names.SCALE))

    @property
    def text_rows(self) -> list[names.Row]:
        return names.rows(self.text.layers, self.vision.layers, self.text.tied)[0]

    @property
    def vision_rows(self) -> list[names.Row]:
        return names.rows(self.text.layers, self.vision.layers, self.text.tied)[1]

    @property
    def dims(self) -> dict[str, int]:
        """The words in which the tables of `names` give shapes."""
        t, v = self.text, self.vision
        return {
            "hidden": t.hidden,
            "ffn": t.ffn,
            "vocab": t.vocab,
            "heads": t.heads,
            "kv_heads": t.kv_heads,
            "q": t.heads * t.head_dim,
            "kv": t.kv_heads * t.head_dim,
            "v_hidden": v.hidden,
            "v_ffn": v.ffn,
            "v_heads": v.heads,
            "channels": v.channels,
            "patch": v.patch,
            "merged": v.hidden * v.merge * v.merge,
        }

    def shape(self, row: names.Row) -> tuple[int, ...]:
        return tuple(self.dims[word] for word in row.shape)

    def variant(self) -> str:
        """base, instruct or reasoning: no key says so, the chat template does."""
        template = chat_template(self.folder)
        if not template:
            return "base"
        return "reasoning" if "[THINK]" in template and "reasoning" in template.lower() else "instruct"

    def rows(self, row: names.Row, start: int, stop: int) -> np.ndarray:
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

    def float_blocks(self, row: names.Row, unit_rows: int = 1) -> Iterator[np.ndarray]:
        """A tensor in blocks of whole units of rows, float32, FP8 scale applied: the values the model computes with."""
        source = self.sources[row.hf]
        scale = self.scale(row)
        for start, stop in spans(source.shape, unit_rows):
            block = self.rows(row, start, stop).astype(np.float32)
            yield block if scale is None else np.multiply(block, scale, out=block)

    def scale(self, row: names.Row) -> np.float32 | None:
        """The per-tensor FP8 scale, or None for a tensor that is not FP8."""
        if self.sources[row.hf].dtype != "F8_E4M3":
            return None
        source = self.sources[row.hf + names.SCALE]
        with source.file.open("rb") as file:
            file.seek(source.offset)
            value = np.frombuffer(file.read(source.n_bytes), DTYPES[source.dtype]).astype(np.float32)[0]
        if not (np.isfinite(value) and value > 0):
            raise CheckpointError(
                f"{source.file}: {source.name}: expected a finite scale above 0, found {value}; the file is damaged"
            )
        return value


def spans(shape: tuple[int, ...], unit_rows: int = 1) -> Iterator[tuple[int, int]]:
    """[start, stop) over the first dimension in blocks of about BLOCK_BYTES of float32, a multiple of unit_rows."""
    row_bytes = 4 * math.prod(shape[1:])
    step = max(1, BLOCK_BYTES // (row_bytes * unit_rows)) * unit_rows
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def read(folder: str | Path) -> Checkpoint:
    """Open and check a whole checkpoint. Reads headers only. Raises CheckpointError."""
    folder = Path(folder)
    config = _read_config(folder)
    found = _headers(folder)
    text, vision = _text(config, folder, _tied(config, found)), _vision(config, folder)
    checkpoint = _match(folder, config, text, vision, found)
    for row in [*checkpoint.text_rows, *checkpoint.vision_rows]:
        checkpoint.scale(row)  # a NaN or zero scale shows in the first second too
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: damaged: expected a JSON object, found a {type(value).__name__}")
    return value


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


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; expected a checkpoint as downloaded (config.json, *.safetensors)"
        )
    if not (folder / "config.json").is_file():
        if (folder / "params.json").is_file():
            raise CheckpointError(
                f"{folder}: params.json, but no config.json: this is the consolidated layout, which this version does "
                "not read; use the HF layout of the same model"
            )
        raise CheckpointError(f"{folder}: no config.json: not a checkpoint; expected config.json and *.safetensors")
    config = read_table(folder / "config.json")
    found = config.get("architectures") or [config.get("model_type", "none")]
    text = config.get("text_config") or {}
    if not isinstance(text, dict):
        raise CheckpointError(f"{folder}/config.json: text_config: expected a table, found {text!r}")
    inner = text.get("model_type")
    if found[0] != "Mistral3ForConditionalGeneration" or inner != "ministral3":
        raise CheckpointError(
            f"{folder}/config.json: architectures: expected Mistral3ForConditionalGeneration with a ministral3 text "
            f"model, found {found[0]} with {inner}; this tool converts Ministral 3 checkpoints"
        )
    return config


def _get(table: dict[str, Any], key: str, kind: type, where: str, default: Any = None) -> Any:
    value = table.get(key, default)
    if value is None:
        raise CheckpointError(f"{where}: {key}: missing; expected {kind.__name__}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise CheckpointError(f"{where}: {key}: expected {kind.__name__}, found {value!r}")
    if kind is int and value > MAX_COUNT:
        raise CheckpointError(f"{where}: {key}: expected at most {MAX_COUNT}, found {value}")
    if kind in (int, float) and not (0 < value < math.inf):
        raise CheckpointError(f"{where}: {key}: expected a number above 0, found {value:g}")
    return value


def _tied(config: dict[str, Any], found: list[Source]) -> bool:
    """Whether the output head is the embedding table. Releases wrote the key outside, inside or nowhere, and an outer
    `true` may be a default nobody set: a head that is there while the inner key says untied is meant."""
    outer, inner = config.get("tie_word_embeddings"), config["text_config"].get("tie_word_embeddings")
    has_head = any(names.canonical(source.name) == names.HEAD.hf for source in found)
    if inner is False and has_head:
        return False
    said = outer if outer is not None else inner
    return not has_head if said is None else bool(said)


def _text(config: dict[str, Any], folder: Path, tied: bool) -> Text:
    where, t = f"{folder}/config.json: text_config", config["text_config"]
    rope = t.get("rope_parameters") or t.get("rope_scaling")
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where}: rope_parameters: missing; expected the YaRN values of Ministral 3")
    kind = rope.get("rope_type", rope.get("type"))
    if kind != "yarn":
        raise CheckpointError(f"{where}: rope_parameters.rope_type: expected 'yarn', found {kind!r}")
    if t.get("sliding_window"):
        raise CheckpointError(f"{where}: sliding_window: expected null, found {t['sliding_window']}; not a Ministral 3")
    if t.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: hidden_act: expected 'silu', found {t['hidden_act']!r}")
    r = f"{where}.rope_parameters"
    mscale, mscale_all = _get(rope, "mscale", float, r, 1.0), _get(rope, "mscale_all_dim", float, r, 1.0)
    if mscale != mscale_all:  # then attention is rescaled, which the GGUF architecture has no key for
        raise CheckpointError(f"{r}: mscale: expected the value of mscale_all_dim ({mscale_all}), found {mscale}")
    hidden, heads = _get(t, "hidden_size", int, where), _get(t, "num_attention_heads", int, where)
    return Text(
        hidden=hidden,
        layers=_get(t, "num_hidden_layers", int, where),
        ffn=_get(t, "intermediate_size", int, where),
        heads=heads,
        kv_heads=_get(t, "num_key_value_heads", int, where),
        head_dim=_get(t, "head_dim", int, where, hidden // heads),
        vocab=_get(t, "vocab_size", int, where),
        context=_get(t, "max_position_embeddings", int, where),
        rms_eps=_get(t, "rms_norm_eps", float, where),
        tied=tied,
        rope_theta=_get(rope, "rope_theta", float, r, t.get("rope_theta")),
        yarn_factor=_get(rope, "factor", float, r),
        yarn_original_context=_get(rope, "original_max_position_embeddings", int, r),
        yarn_beta_fast=_get(rope, "beta_fast", float, r, 32.0),
        yarn_beta_slow=_get(rope, "beta_slow", float, r, 1.0),
        yarn_mscale_all_dim=mscale_all,
        scaling_beta=_get(rope, "llama_4_scaling_beta", float, r),
    )


def _vision(config: dict[str, Any], folder: Path) -> Vision:
    where, v = f"{folder}/config.json: vision_config", config.get("vision_config")
    if not isinstance(v, dict):
        raise CheckpointError(f"{where}: missing; expected the pixtral encoder's values")
    for key, table, expected in (
        ("hidden_act", v, "silu"),
        ("projector_hidden_act", config, "gelu"),
        ("vision_feature_layer", config, -1),
        ("multimodal_projector_bias", config, False),
    ):
        if table.get(key, expected) != expected:
            raise CheckpointError(f"{folder}/config.json: {key}: expected {expected!r}, found {table[key]!r}")
    rope = v.get("rope_parameters") or {}
    processor = _processor(folder)
    hidden, heads = _get(v, "hidden_size", int, where), _get(v, "num_attention_heads", int, where)
    if hidden % (4 * heads):
        raise CheckpointError(f"{where}: hidden_size: expected a multiple of 4 x {heads} heads, found {hidden}")
    return Vision(
        hidden=hidden,
        layers=_get(v, "num_hidden_layers", int, where),
        ffn=_get(v, "intermediate_size", int, where),
        heads=heads,
        channels=_get(v, "num_channels", int, where, 3),
        patch=_get(v, "patch_size", int, where),
        merge=_get(config, "spatial_merge_size", int, f"{folder}/config.json", 2),
        image_size=_get(v, "image_size", int, where),
        rope_theta=_get(rope, "rope_theta", float, where, v.get("rope_theta", 10000.0)),
        eps=1e-5,
        mean=_pixel(processor, "image_mean", (0.48145466, 0.4578275, 0.40821073), folder),
        std=_pixel(processor, "image_std", (0.26862954, 0.26130258, 0.27577711), folder),
    )


def _processor(folder: Path) -> dict[str, Any]:
    """Pixel mean and deviation: the newer file wins; without any, the family's values stand."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            values = read_table(folder / name)
            values = values.get("image_processor", values)
            if isinstance(values, dict) and "image_mean" in values:
                return values
    return {}


def _pixel(processor: dict[str, Any], key: str, default: tuple[float, ...], folder: Path) -> tuple[float, float, float]:
    value = processor.get(key, default)
    if not isinstance(value, list | tuple) or [type(n) in (int, float) for n in value] != [True] * 3:
        raise CheckpointError(f"{folder}: processor_config.json: {key}: expected three numbers, found {value!r}")
    if key == "image_std" and min(value) <= 0:
        raise CheckpointError(f"{folder}: processor_config.json: {key}: expected numbers above 0, found {value!r}")
    return tuple(map(float, value))


# ---------------------------------------------------------------------------------------------------------------------


def _headers(folder: Path) -> list[Source]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_table(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: weight_map: missing; expected tensor name -> file")
        files = sorted(set(weight_map.values()))
    else:
        weight_map, files = None, ["model.safetensors"]
    found: list[Source] = []
    for name in files:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path}: missing; the checkpoint is incomplete, download this file")
        found += _header(path)
    if weight_map is not None:
        here = {source.name: source.file.name for source in found}
        for name, file in weight_map.items():
            if here.get(name) != file:
                raise CheckpointError(f"{index}: {name}: expected in {file}, found in {here.get(name, 'no file')}")
    return found


def _header(path: Path) -> list[Source]:
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
        source = Source(name, path, 8 + length + start_at, dtype, shape)
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


def _match(folder: Path, config: dict[str, Any], text: Text, vision: Vision, found: list[Source]) -> Checkpoint:
    """Every tensor is used once or named as ignored; a missing, extra or misshapen one stops here."""
    sources: dict[str, Source] = {}
    ignored: dict[str, str] = {}
    for source in found:
        why = next((why for suffix, why in names.IGNORED if source.name.endswith(suffix)), "")
        name = names.canonical(source.name)
        if not why and name == names.HEAD.hf and text.tied:
            why = "output head: config.json ties it to the embeddings"
        if why:
            ignored[source.name] = why
        elif name in sources:
            raise CheckpointError(f"{source.file}: {source.name}: the same tensor as {sources[name].name}")
        else:
            sources[name] = source
    fp8 = any(source.dtype == "F8_E4M3" for source in sources.values())
    _check_quantisation(folder, config, fp8)
    checkpoint = Checkpoint(folder, text, vision, fp8, sources, ignored)
    expected = {row.hf: checkpoint.shape(row) for row in [*checkpoint.text_rows, *checkpoint.vision_rows]}
    scales = {name + names.SCALE for name, s in sources.items() if s.dtype == "F8_E4M3"}
    for name, shape in expected.items():
        if name not in sources:
            raise CheckpointError(f"{folder}: {name}: missing; config.json calls for shape {shape}")
        if sources[name].shape != shape:
            raise CheckpointError(
                f"{sources[name].file}: {sources[name].name}: expected shape {shape} by config.json, found "
                f"{sources[name].shape}"
            )
        if sources[name].dtype == "F8_E4M3" and (not name.startswith("text.layers.") or len(shape) != 2):
            raise CheckpointError(
                f"{sources[name].file}: {sources[name].name}: FP8 is known only for the linear layers"
            )
    for name in sorted(scales - sources.keys()):
        raise CheckpointError(f"{folder}: {name}: missing; the FP8 tensor {name.removesuffix(names.SCALE)} needs it")
    for name in sorted(scales):
        if math.prod(sources[name].shape) != 1:
            raise CheckpointError(f"{folder}: {name}: expected one scale per tensor, found shape {sources[name].shape}")
    extra = sorted(sources[name].name for name in sources.keys() - expected.keys() - scales)
    if extra:
        raise CheckpointError(
            f"{folder}: {len(extra)} tensor(s) that config.json has no place for: {', '.join(extra[:4])}"
            f"{' …' if len(extra) > 4 else ''}"
        )
    return checkpoint


def _check_quantisation(folder: Path, config: dict[str, Any], fp8: bool) -> None:
    quantisation = config.get("quantization_config")
    where = f"{folder}/config.json: quantization_config"
    if quantisation is None:
        if fp8:
            raise CheckpointError(f"{where}: missing, but the checkpoint holds FP8 tensors")
        return
    if not isinstance(quantisation, dict):
        raise CheckpointError(f"{where}: expected a table, found {quantisation!r}")
    method, block = quantisation.get("quant_method"), quantisation.get("weight_block_size")
    if method != "fp8" or block is not None:
        raise CheckpointError(
            f"{where}: expected quant_method 'fp8' with weight_block_size null (as released), found {method!r} with "
            f"{block!r}; start from the BF16 checkpoint"
        )
