"""PEFT LoRA adapters of these models, as PEFT, Unsloth or Axolotl save them. An adapter is merged while a bundle is
built, or it is written as a GGUF adapter that the runtime can switch on and off.

An adapter adds scale * B @ A to a matrix (Hu et al. 2021), with scale = alpha / r, or alpha / sqrt(r) with use_rslora
(Kalajdzievski 2023). Everything is checked against the checkpoint before anything is written. DoRA, biases, whole
tensors (modules_to_save) and pickles are refused by name.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_agent.bundle import signing
from edge_agent.bundle.files import hash_file, sync_folder, write_durably
from edge_agent.bundle.gguf_package import gguf
from edge_agent.bundle.recognise import describe
from quantize.build_folder import BuildError, check_file_size
from quantize.progress import Progress
from quantize.source.checkpoint import ADAPTER, Checkpoint, LoraDelta, interleave
from quantize.source.hf_config import CheckpointError, read_table
from quantize.source.known_keys import ADAPTER as KNOWN_KEYS
from quantize.source.known_keys import unknown_key
from quantize.source.safetensors import FP8, StoredTensor, read_header, read_tensor
from quantize.source.tensor_names import TEXT, TensorSpec, canonical

WEIGHTS = "adapter_model.safetensors"
LORA_A, LORA_B = "lora_A", "lora_B"
OF_EMBEDDING = {"lora_embedding_A": LORA_A, "lora_embedding_B": LORA_B}
_NAME = re.compile(
    r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.default)?(?:\.weight)?"
)
EMBEDDING = TEXT[0].hf
SPARE_BYTES = 1 << 20  # free space beyond the matrices: header, signature
# With these, training begins with the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, …) change the base first.
INITS_THAT_KEEP_THE_BASE = ("true", "false", "gaussian", "orthogonal", "eva", "none")


class Adapter(msgspec.Struct, frozen=True):
    """An adapter that fits a checkpoint."""

    folder: Path
    alpha: float
    ranks: tuple[int, ...]  # the different ranks that occur
    deltas: dict[str, LoraDelta]  # by canonical name


def read_adapter(folder: str | Path, checkpoint: Checkpoint) -> Adapter:
    """Open an adapter and check it against its checkpoint. Raises CheckpointError."""
    folder = Path(folder)
    path, weights = folder / ADAPTER, folder / WEIGHTS
    if not path.is_file():
        what = describe(folder) or f"no {ADAPTER}: not an adapter"
        raise CheckpointError(f"{folder}: {what}; expected the folder that PEFT saved")
    if not weights.is_file():
        pickled = " (a pickle is not read)" if (folder / "adapter_model.bin").exists() else ""
        raise CheckpointError(f"{weights}: missing{pickled}; save the adapter as safetensors")
    config = _AdapterConfig(path)
    pairs: dict[str, dict[str, StoredTensor]] = {}
    for source in read_header(weights):
        parts = _NAME.fullmatch(source.name)
        if not parts:
            raise CheckpointError(
                f"{weights}: {source.name}: expected only low-rank matrices ({LORA_A}, {LORA_B}); train without "
                "modules_to_save, DoRA and biases, or merge it with PEFT first"
            )
        pairs.setdefault(parts[1], {})[parts[2]] = source
    specs = {spec.hf.removesuffix(".weight"): spec for spec in [*checkpoint.text_tensors, *checkpoint.vision_tensors]}
    deltas: dict[str, LoraDelta] = {}
    for module, pair in pairs.items():
        spec = specs.get(canonical(module + ".").removesuffix("."))
        if spec is None:
            why = _why_no_place(checkpoint, module)
            raise CheckpointError(f"{weights}: {module}: {checkpoint.folder} has no place for it: {why}; "
                                  "give its own base")  # fmt: skip
        if spec.hf in deltas:
            raise CheckpointError(f"{weights}: {module}: the same matrix as {deltas[spec.hf].a.name}")
        deltas[spec.hf] = _delta(checkpoint, spec, module, pair, config)
    ranks = tuple(sorted({delta.rank for delta in deltas.values()}))
    return Adapter(folder, config.alpha, ranks, deltas)


def _why_no_place(checkpoint: Checkpoint, module: str) -> str:
    layer = re.search(r"layers\.(\d+)\.", module)
    if layer and "vision" not in module and int(layer[1]) >= checkpoint.text.layers:
        return f"it has {checkpoint.text.layers} layers"
    if module.endswith("lm_head") and checkpoint.text.tied:
        return "its output head is the embedding table, which an adapter would change too"
    return "no such matrix"


def _delta(
    checkpoint: Checkpoint, spec: TensorSpec, module: str, pair: dict[str, StoredTensor], config: _AdapterConfig
) -> LoraDelta:
    """The two matrices of one module, checked against the checkpoint's matrix. Raises CheckpointError."""
    where, shape = f"{config.path.with_name(WEIGHTS)}: {module}", checkpoint.shape(spec)
    transposed = any(name in OF_EMBEDDING for name in pair)
    if transposed and (spec.hf != EMBEDDING or checkpoint.text.tied):
        tied = spec.hf == EMBEDDING
        why = "the embedding table is also the output head" if tied else "only embeddings have lora_embedding matrices"
        raise CheckpointError(f"{where}: {why}; train an adapter of the linear layers")
    parts = {OF_EMBEDDING.get(name, name): source for name, source in pair.items()}
    if parts.keys() != {LORA_A, LORA_B} or len(pair) != 2:
        raise CheckpointError(f"{where}: expected {LORA_A} and {LORA_B}, found {', '.join(sorted(pair))}")
    a, b, rank = parts[LORA_A], parts[LORA_B], config.rank(module)
    if len(shape) != 2:
        raise CheckpointError(f"{where}: expected a matrix, {checkpoint.folder} has shape {shape} there")
    if len(a.shape) != 2 or len(b.shape) != 2 or (a.shape[0], b.shape[1]) != (rank, rank):
        raise CheckpointError(
            f"{where}: expected rank {rank} by {config.path.name}, found {LORA_A} {a.shape} and {LORA_B} {b.shape}; "
            "the two files are not of one adapter"
        )
    adapted_shape = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
    if adapted_shape != shape:
        raise CheckpointError(
            f"{where}: made for a matrix of shape {adapted_shape}, but {checkpoint.folder} has {shape} there; "
            f"give its own base{config.base}"
        )
    for source in (a, b):
        if source.dtype == FP8:
            raise CheckpointError(f"{source.file}: {source.name}: dtype: expected F32, F16 or BF16, found {FP8}")
        if not np.isfinite(read_tensor(source)).all():
            raise CheckpointError(f"{source.file}: {source.name}: holds NaN or infinity; the adapter is damaged")
    return LoraDelta(a, b, config.scale(module), transposed)


class _AdapterConfig:
    """Rank and scale by module, from adapter_config.json. Raises CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path, table = path, read_table(path)
        if table.get("peft_type") != "LORA":
            raise CheckpointError(f"{path}: peft_type: expected 'LORA', found {table.get('peft_type')!r}")
        if (init := str(table.get("init_lora_weights")).lower()) not in INITS_THAT_KEEP_THE_BASE:
            raise CheckpointError(
                f"{path}: init_lora_weights: expected {', '.join(INITS_THAT_KEEP_THE_BASE)}, found {init!r}: such a "
                "training changes the base, and the adapter does not fit the released one; with PEFT, save it again "
                "with path_initial_model_for_weight_conversion, or merge it (merge_and_unload) and build that model"
            )
        if table.get("bias") not in ("none", None):
            raise CheckpointError(f"{path}: bias: expected 'none', found {table['bias']!r}; merge it with PEFT first")
        if key := unknown_key(table, KNOWN_KEYS):
            raise CheckpointError(
                f"{path}: {key}: expected it not to be set, found {str(table[key])[:60]!r}; merge this adapter "
                "with PEFT first"
            )
        if type(table.get("use_rslora") or False) is not bool:
            raise CheckpointError(f"{path}: use_rslora: expected true or false, found {table['use_rslora']!r}")
        self._r, self.alpha = self._number(table, "r"), self._number(table, "lora_alpha")
        self._ranks, self._alphas = self._pattern(table, "rank_pattern"), self._pattern(table, "alpha_pattern")
        self._use_rslora = bool(table.get("use_rslora"))
        base = table.get("base_model_name_or_path")
        self.base = f", {base!r} by {path.name}" if isinstance(base, str) and base else ""

    def rank(self, module: str) -> int:
        return int(_matching(self._ranks, module, self._r))

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        return _matching(self._alphas, module, self.alpha) / (math.sqrt(rank) if self._use_rslora else rank)

    def _number(self, table: dict[str, Any], key: str) -> float:
        value = table.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise CheckpointError(f"{self.path}: {key}: expected a number above 0, found {value!r}")
        return value

    def _pattern(self, table: dict[str, Any], key: str) -> dict[str, float]:
        pattern = table.get(key) or {}
        if not isinstance(pattern, dict):
            raise CheckpointError(f"{self.path}: {key}: expected module -> number, found {pattern!r}")
        return {module: self._number(pattern, module) for module in pattern}


def _matching(pattern: dict[str, float], module: str, otherwise: float) -> float:
    """PEFT's rule: a key is a regular expression that the end of a module's name must match."""
    for key, value in pattern.items():
        try:
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        except re.error:
            continue
    return otherwise


def merged(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The checkpoint with the adapter merged: its products are added, in float32, while tensors are read."""
    return msgspec.structs.replace(checkpoint, lora=adapter.deltas)


def write_adapter(
    adapter: Adapter, checkpoint: Checkpoint, out: Path, progress: Progress, signing_key: Path | None = None
) -> None:
    """A GGUF adapter for llama.cpp, float32 like those of its own converter. With a key, OUT.sig is written beside it.

    Raises CheckpointError, SigningError, BuildError.
    """
    text_names = {spec.hf for spec in checkpoint.text_tensors}
    for name, delta in adapter.deltas.items():
        if name not in text_names or delta.transposed:
            part = "the vision encoder" if name not in text_names else "the embedding table"
            raise CheckpointError(
                f"{adapter.folder}: {delta.b.name}: changes {part}, which cannot be switched at run time; "
                "merge it: edge-quantize build --merge"
            )
    if signing_key is not None:
        signing.load_private_key(signing_key)  # an invalid key is reported before any work
    _check_room(adapter, out)
    writer = _filled_writer(adapter, checkpoint, progress)
    signature = out.with_name(out.name + signing.ADAPTER_SUFFIX)
    partial, partial_signature = (path.with_name(path.name + ".part") for path in (out, signature))
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        if signing_key is not None:
            statement = signing.adapter_statement(hash_file(partial).sha256)
            write_durably(partial_signature, signing.sign(statement, signing_key))
        os.replace(partial, out)  # everything is on the disk: an older file and its signature stay up to here
        if signing_key is not None:
            os.replace(partial_signature, signature)
        else:
            signature.unlink(missing_ok=True)  # of the older file
        sync_folder(out.absolute().parent)
    except OSError as error:
        where = error.filename or out
        raise BuildError(f"{where}: {error.strerror} while {out} was written; run the command again") from None
    finally:
        for path in (partial, partial_signature):
            with contextlib.suppress(OSError):  # a file system that is read-only by now
                path.unlink(missing_ok=True)


def _check_room(adapter: Adapter, out: Path) -> None:
    """Raises BuildError if the disk has too little room for the file, cannot hold it, or cannot be written to."""
    folder = out.absolute().parent
    n_bytes = sum(4 * math.prod(part.shape) for delta in adapter.deltas.values() for part in (delta.a, delta.b))
    try:
        check_file_size(folder, n_bytes, out.name)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise BuildError(f"{folder}: {error.strerror}; give a folder that can be written to") from None
    if free < n_bytes + SPARE_BYTES:
        raise BuildError(
            f"{folder}: {(n_bytes + SPARE_BYTES) / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free; make room"
        )


def _filled_writer(adapter: Adapter, checkpoint: Checkpoint, progress: Progress) -> gguf.GGUFWriter:
    """A writer that holds all header fields and matrices. An adapter is small enough for memory."""
    # llama.cpp computes alpha / rank. Where a module's scale differs, alpha is 0 and the scale is in the numbers of B.
    uniform = all(math.isclose(delta.scale, adapter.alpha / delta.rank) for delta in adapter.deltas.values())
    writer = gguf.GGUFWriter(None, checkpoint.config.family.gguf)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha if uniform else 0.0)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, f"{checkpoint.family} {checkpoint.size}")
    ordered = [(spec, adapter.deltas[spec.hf]) for spec in checkpoint.text_tensors if spec.hf in adapter.deltas]
    for i, (spec, delta) in enumerate(ordered):
        b, a = delta.factors()
        if spec.rope:  # PEFT has HF's order, whatever the base's layout is
            b = interleave(b, len(b) // checkpoint.dims[spec.rope])
        writer.add_tensor(spec.gguf + ".lora_a", np.ascontiguousarray(a))
        writer.add_tensor(spec.gguf + ".lora_b", np.ascontiguousarray(b if uniform else b * np.float32(delta.scale)))
        progress.step("adapter", spec.gguf, i + 1, len(ordered))
    return writer
