"""PEFT LoRA adapters of these models, as PEFT, Unsloth or Axolotl save them: to be merged while a bundle is built, or
written as a GGUF adapter that the runtime can switch on and off.

An adapter adds scale * B @ A to a matrix (Hu et al. 2021), scale = alpha / r, or alpha / sqrt(r) with use_rslora
(Kalajdzievski 2023). Everything is checked against the checkpoint before anything is written. Not here: DoRA, biases,
whole tensors (modules_to_save) and pickles, which are refused by name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np

from edge_agent.bundle import signing
from edge_agent.bundle.files import hash_file, sync_folder, write_durably
from quantize.source.checkpoint import (
    ADAPTER,
    Checkpoint,
    LoraDelta,
    StoredTensor,
    interleave,
    read_header,
    read_tensor,
)
from quantize.source.hf_config import CheckpointError, read_table
from quantize.source.tensor_names import TEXT, TensorSpec, canonical

WEIGHTS = "adapter_model.safetensors"
LORA_A, LORA_B = "lora_A", "lora_B"
FLIPPED = {"lora_embedding_A": LORA_A, "lora_embedding_B": LORA_B}
_NAME = re.compile(
    r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.default)?(?:\.weight)?"
)
EMBEDDING = TEXT[0].hf
# Keys that change what an adapter means, and the values that leave it a plain one.
PLAIN = {"use_dora": (False, None), "bias": ("none", None), "lora_bias": (False, None), "fan_in_fan_out": (False, None),
         "alora_invocation_tokens": ([], None), "layer_replication": ([], None), "use_qalora": (False, None),
         "use_bdlora": (False, None)}  # fmt: skip
Report = Callable[[str, int, int], None]  # (what, done, in all)


class Adapter(msgspec.Struct, frozen=True):
    """An adapter that fits a checkpoint. added: by canonical name."""

    folder: Path
    alpha: float
    ranks: tuple[int, ...]  # that occur
    added: dict[str, LoraDelta]


def read_adapter(folder: str | Path, checkpoint: Checkpoint) -> Adapter:
    """Open and check an adapter of this checkpoint. Raises CheckpointError."""
    folder = Path(folder)
    path, weights = folder / ADAPTER, folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {ADAPTER}: not an adapter; expected the folder that PEFT saved")
    if not weights.is_file():
        pickled = " (a pickle is not read)" if (folder / "adapter_model.bin").exists() else ""
        raise CheckpointError(f"{weights}: missing{pickled}; save the adapter as safetensors")
    config = _Scales(path)
    pairs: dict[str, dict[str, StoredTensor]] = {}
    for source in read_header(weights):
        found = _NAME.fullmatch(source.name)
        if not found:
            raise CheckpointError(
                f"{weights}: {source.name}: expected only low-rank matrices ({LORA_A}, {LORA_B}); train without "
                "modules_to_save, DoRA and biases, or merge it with PEFT first"
            )
        pairs.setdefault(found[1], {})[found[2]] = source
    rows = {row.hf.removesuffix(".weight"): row for row in [*checkpoint.text_rows, *checkpoint.vision_rows]}
    added = {}
    for module, pair in pairs.items():
        row = rows.get(canonical(module + ".").removesuffix("."))
        one = _pair(checkpoint, row, weights, module, pair, config)
        if row.hf in added:
            raise CheckpointError(f"{weights}: {module}: the same matrix as {added[row.hf].down.name}")
        added[row.hf] = one
    ranks = tuple(sorted({_rank(one) for one in added.values()}))
    return Adapter(folder, config.alpha, ranks, added)


def _pair(
    checkpoint: Checkpoint,
    row: TensorSpec | None,
    file: Path,
    module: str,
    pair: dict[str, StoredTensor],
    config: _Scales,
) -> LoraDelta:
    if row is None:
        why = "no such matrix"
        if module.endswith("lm_head") and checkpoint.text.tied:
            why = "its output head is the embedding table, which an adapter would change too"
        n = re.search(r"layers\.(\d+)\.", module)
        if n and "vision" not in module and int(n[1]) >= checkpoint.text.layers:
            why = f"it has {checkpoint.text.layers} layers"
        raise CheckpointError(f"{file}: {module}: {checkpoint.folder} has no place for it: {why}; give its own base")
    flipped = any(name in FLIPPED for name in pair)
    if flipped and (row.hf != EMBEDDING or checkpoint.text.tied):
        tied = row.hf == EMBEDDING
        why = "the embedding table is also the output head" if tied else "only embeddings have lora_embedding matrices"
        raise CheckpointError(f"{file}: {module}: {why}; train an adapter of the linear layers")
    parts = {FLIPPED.get(name, name): source for name, source in pair.items()}
    if parts.keys() != {LORA_A, LORA_B} or len(pair) != 2:
        raise CheckpointError(f"{file}: {module}: expected {LORA_A} and {LORA_B}, found {', '.join(sorted(pair))}")
    down, up = parts[LORA_A], parts[LORA_B]
    rank, shape = config.rank(module), checkpoint.shape(row)
    if len(shape) != 2:
        raise CheckpointError(f"{file}: {module}: expected a matrix, {checkpoint.folder} has shape {shape} there")
    if len(down.shape) != 2 or len(up.shape) != 2 or (down.shape[0], up.shape[1]) != (rank, rank):
        raise CheckpointError(
            f"{file}: {module}: expected rank {rank} by {config.path.name}, found {LORA_A} {down.shape} and {LORA_B} "
            f"{up.shape}; the two files are not of one adapter"
        )
    wide = (down.shape[1], up.shape[0]) if flipped else (up.shape[0], down.shape[1])
    if wide != shape:
        raise CheckpointError(
            f"{file}: {module}: made for a matrix of shape {wide}, but {checkpoint.folder} has {shape} there; "
            f"give its own base{config.base}"
        )
    for source in (down, up):
        if source.dtype == "F8_E4M3":
            raise CheckpointError(f"{file}: {source.name}: dtype: expected F32, F16 or BF16, found F8_E4M3")
        if not np.isfinite(read_tensor(source)).all():
            raise CheckpointError(f"{file}: {source.name}: holds NaN or infinity; the adapter is damaged")
    return LoraDelta(down, up, config.scale(module), flipped)


class _Scales:
    """What adapter_config.json says about rank and scale. Raises CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path, table = path, read_table(path)
        if table.get("peft_type") != "LORA":
            raise CheckpointError(f"{path}: peft_type: expected 'LORA', found {table.get('peft_type')!r}")
        for key, plain in PLAIN.items():
            if table.get(key) not in plain:
                raise CheckpointError(
                    f"{path}: {key}: expected {plain[0]!r}, found {table[key]!r}; merge this adapter with PEFT first"
                )
        self._r, self.alpha = self._number(table, "r"), self._number(table, "lora_alpha")
        self._ranks, self._alphas = self._pattern(table, "rank_pattern"), self._pattern(table, "alpha_pattern")
        self._root = bool(table.get("use_rslora"))
        base = table.get("base_model_name_or_path")
        self.base = f", {base!r} by {path.name}" if isinstance(base, str) and base else ""

    def rank(self, module: str) -> int:
        return int(_matching(self._ranks, module, self._r))

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        return _matching(self._alphas, module, self.alpha) / (math.sqrt(rank) if self._root else rank)

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
    """PEFT's rule: a key is a regular expression for the end of a module's name."""
    for key, value in pattern.items():
        try:
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        except re.error:
            continue
    return otherwise


def _rank(one: LoraDelta) -> int:
    return one.down.shape[0]


def merged(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The checkpoint with the adapter's sums in it: they are added, in float32, as tensors are read."""
    return msgspec.structs.replace(checkpoint, added=adapter.added)


def write_adapter(adapter: Adapter, checkpoint: Checkpoint, out: Path, report: Report, key: Path | None = None) -> None:
    """A GGUF adapter for llama.cpp, float32 like those of its own converter; with a key, OUT.sig beside it.

    Raises CheckpointError, TrustError.
    """
    rows = {row.hf: row for row in checkpoint.text_rows}
    for name, one in adapter.added.items():
        if name not in rows or one.flipped:
            part = "the vision encoder" if name not in rows else "the embedding table"
            raise CheckpointError(
                f"{adapter.folder}: {one.up.name}: changes {part}, which cannot be switched at run time; "
                "merge it: edge-quantize build --merge"
            )
    if key is not None:
        signing.load_private_key(key)  # fail now, and not after the conversion
    plain = all(math.isclose(one.scale, adapter.alpha / _rank(one)) for one in adapter.added.values())
    writer = gguf.GGUFWriter(None, checkpoint.config.family.gguf)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha if plain else 0.0)  # 0: scales are in the numbers
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, f"{checkpoint.family} {checkpoint.size}")
    ordered = [(row, adapter.added[row.hf]) for row in checkpoint.text_rows if row.hf in adapter.added]
    for i, (row, one) in enumerate(ordered):
        up, down = one.factors()
        if row.rope:  # PEFT has HF's order, whatever the base's layout
            up = interleave(up, len(up) // checkpoint.dims[row.rope])
        writer.add_tensor(row.gguf + ".lora_a", np.ascontiguousarray(down))
        writer.add_tensor(row.gguf + ".lora_b", np.ascontiguousarray(up if plain else up * np.float32(one.scale)))
        report(row.gguf, i + 1, len(ordered))
    partial = out.with_name(out.name + ".part")
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        signature = out.with_name(out.name + signing.ADAPTER_SUFFIX)
        signature.unlink(missing_ok=True)  # of what was here before
        if key is not None:
            write_durably(signature, signing.sign(signing.adapter_statement(hash_file(partial).sha256), key))
        os.replace(partial, out)
        sync_folder(out.absolute().parent)
    finally:
        partial.unlink(missing_ok=True)
