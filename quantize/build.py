"""Checkpoint -> a folder: the three files at source precision, or a whole bundle, checked and with its manifest last.

Made in a hidden folder that a second run goes on from (work.py). The bundle is tried before it gets its manifest: it is
loaded by the runtime's own code.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gguf
import llama_cpp
import msgspec
import numpy as np

import edge_agent
from edge_agent.bundle import signing
from edge_agent.bundle.files import hash_file, write_durably
from edge_agent.bundle.manifest import (
    FORMAT,
    LANGUAGE,
    MANIFEST,
    MMPROJ,
    REPORT,
    VISION,
    Bundle,
    EmbeddingInfo,
    Manifest,
    ModelInfo,
    VisionInfo,
    write_manifest,
)
from quantize.build_folder import BuildError, BuildFolder, atomic_folder, resumable_bytes
from quantize.formats import ggml_kernels
from quantize.formats.gguf_files import TYPES, img_break, uniform, write_language, write_mmproj
from quantize.formats.imatrix import Imatrix
from quantize.formats.vision_onnx import INT8, write_vision
from quantize.source.checkpoint import Checkpoint
from quantize.source.tensor_names import TensorSpec
from quantize.source.tokenizer import read_tokenizer
from quantize.standard_recipes import bytes_by_type, file_type, kv_bytes_per_token, plan_recipe
from quantize.validate import REFERENCE, ValidationRequest

Report = Callable[[str, str, int, int], None]  # (stage, what, done, in all); of 0 in all: a remark


def convert(checkpoint: Checkpoint, out: Path, kind: str, force: bool, report: Report) -> None:
    """language.gguf, mmproj.gguf and vision.onnx at source precision (or as `kind` says)."""
    rows = [*checkpoint.text_rows, *checkpoint.vision_rows, *checkpoint.vision_rows]  # vision is written twice
    _need_space(out, _elements(rows, checkpoint) * {"bf16": 2, "f16": 2, "f32": 4}[kind])
    types = uniform(checkpoint, checkpoint.text_rows, kind)
    with atomic_folder(out, force, _key(checkpoint, types, None, VisionFormat(kind, kind))) as work:
        _write_files(checkpoint, work, types, TYPES[kind][1], None, VisionFormat(kind, kind), report, "language")


class VisionFormat(NamedTuple):
    """How the vision encoder is stored, twice: for onnxruntime and for llama.cpp."""

    vision: str = "bf16"  # bf16, f16, f32 or int8
    mmproj: str = "bf16"  # bf16, f16, f32 or q8_0
    fixed: tuple[int, int] | None = None  # height and width in pixels: the only size vision.onnx takes

    @property
    def lossy(self) -> bool:
        """Whether vision.onnx needs another one to be held against."""
        return self.vision in ("f16", INT8)

    @property
    def bytes_per_weight(self) -> int:
        """Of all that is written while building."""
        size = {"bf16": 2, "f16": 2, "f32": 4, INT8: 1, "q8_0": 2}  # of q8_0 a little over one
        return size[self.vision] + size[self.mmproj] + (2 if self.lossy else 0)


def build(
    checkpoint: Checkpoint,
    out: Path,
    recipe: str,
    force: bool,
    report: Report,
    *,
    importance: Imatrix | None = None,
    types: dict[str, gguf.GGMLQuantizationType] | None = None,
    facts: dict | None = None,
    key: Path | None = None,
    eyes: VisionFormat | None = None,
) -> Manifest:
    """The same with a quantised language model, tried and described: a bundle.

    types: a plan of one's own, by GGUF name; then `recipe` is only what it is called. facts: more for report.json.
    key: a private key to sign with. Raises BuildError, RecipeError, CheckpointError, TrustError.
    """
    eyes = eyes or VisionFormat()
    if key is not None:
        signing.load_private_key(key)  # fail now, and not after the build
    if eyes.fixed is not None:
        _check_fixed(checkpoint, eyes.fixed)
    if types is None:
        types = plan_recipe(checkpoint, recipe, importance)
    vision_bytes = _elements(checkpoint.vision_rows, checkpoint) * eyes.bytes_per_weight
    _need_space(out, sum(bytes_by_type(checkpoint, types).values()) + vision_bytes)
    mostly = file_type(recipe, bytes_by_type(checkpoint, types))
    with atomic_folder(out, force, _key(checkpoint, types, importance, eyes)) as work:
        _write_files(checkpoint, work, types, mostly, importance, eyes, report, f"language {recipe}")
        manifest = _validate_and_hash(checkpoint, work.folder, recipe, importance, eyes, facts or {}, report)
        write_manifest(work.folder, manifest)
        if key is not None:
            signature = signing.sign((work / MANIFEST).read_bytes(), key)
            write_durably(work / signing.SIGNATURE, signature)
        return manifest


def _write_files(
    checkpoint: Checkpoint,
    work: BuildFolder,
    types: dict[str, gguf.GGMLQuantizationType],
    file_type: int,
    importance: Imatrix | None,
    eyes: VisionFormat,
    report: Report,
    stage: str,
) -> None:
    """What an earlier run has not written yet."""
    if work.found:
        report(f"going on: an earlier run left {work.found}", "", 0, 0)
    if not work.is_whole(LANGUAGE):
        write_language(checkpoint, work / LANGUAGE, types, file_type, _stage(report, stage), importance, work)
        work.finish(LANGUAGE)
    if checkpoint.vision is None:
        return
    if not work.is_whole(MMPROJ):
        write_mmproj(checkpoint, work / MMPROJ, eyes.mmproj, _stage(report, "mmproj"))
        work.finish(MMPROJ)
    if not work.is_whole(VISION):
        write_vision(checkpoint, work / VISION, eyes.vision, _stage(report, "vision"), eyes.fixed)
        work.finish(VISION)


def _key(
    checkpoint: Checkpoint,
    types: dict[str, gguf.GGMLQuantizationType],
    importance: Imatrix | None,
    eyes: VisionFormat,
) -> str:
    """Of everything that the files depend on; of the checkpoint's files names, sizes and times."""
    files = {path for path in checkpoint.folder.iterdir() if path.suffix in (".json", ".jinja")} | {*checkpoint.files}
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    named = {name: kind.name for name, kind in types.items()}
    digest = hashlib.sha256(repr((edge_agent.__version__, llama_cpp.__version__, stamps, named, eyes)).encode())
    for name in sorted(importance.sums) if importance is not None else ():
        digest.update(name.encode() + importance.of(name).tobytes())
    return digest.hexdigest()


def _check_fixed(checkpoint: Checkpoint, fixed: tuple[int, int]) -> None:
    v = checkpoint.vision
    if v is None:
        raise BuildError(f"--fixed: {checkpoint.folder} is a text-only model; leave it out")
    unit = v.patch * v.merge
    if any(side % unit or not unit <= side <= v.image_size for side in fixed):
        raise BuildError(
            f"--fixed: expected sides that are multiples of {unit}, up to {v.image_size}, found {fixed[0]}x{fixed[1]}"
        )


def _stage(report: Report, stage: str) -> Callable[[str, int, int], None]:
    return lambda what, done, total: report(stage, what, done, total)


def _elements(rows: list[TensorSpec], checkpoint: Checkpoint) -> int:
    return sum(math.prod(checkpoint.shape(row)) for row in rows)


def _need_space(out: Path, n_bytes: int) -> None:
    folder = Path(os.path.abspath(out)).parent
    if not folder.is_dir():
        raise BuildError(f"{folder}: no such folder; make it first")
    free = shutil.disk_usage(folder).free
    needed = n_bytes + (32 << 20) - resumable_bytes(out)
    if free < needed:
        raise BuildError(f"{folder}: {needed / 1e9:.2f} GB needed while building, {free / 1e9:.2f} GB free; make room")


def unverified_bundle(checkpoint: Checkpoint, work: Path) -> Bundle:
    """A folder of files as the runtime's parts want it: facts about the model, nothing checked or hashed."""
    t, v, table = checkpoint.text, checkpoint.vision, ggml_kernels.tensor_table(work / LANGUAGE)
    by_type: Counter[str] = Counter()
    for tensor in table:
        by_type[tensor.ggml_type] += tensor.n_bytes
    embedding = next(tensor for tensor in table if tensor.name == "token_embd.weight")
    model = ModelInfo(
        family=checkpoint.family,
        size=checkpoint.size,
        variant=checkpoint.variant(),
        parameters=checkpoint.parameters,
        layers=t.layers,
        hidden=t.hidden,
        vocab=t.vocab,
        context=t.context,
        kv_bytes_per_token=kv_bytes_per_token(checkpoint),
        special=read_tokenizer(checkpoint.folder, t.vocab).special,
        embedding=EmbeddingInfo(
            offset=embedding.offset, ggml_type=embedding.ggml_type, row_bytes=embedding.n_bytes // t.vocab
        ),
    )
    seen = None
    if v is not None:
        seen = VisionInfo(patch=v.patch, merge=v.merge, image_size=v.image_size, mean=v.mean, std=v.std)
    manifest = Manifest(
        format=FORMAT,
        created_by=f"edge-quantize {edge_agent.__version__}, llama-cpp-python {llama_cpp.__version__}",
        files={},
        model=model,
        vision=seen,
        recipe="",
        bytes_by_type=dict(by_type),
        source_dtype="FP8" if checkpoint.fp8 else "BF16",
        source_sha256={},
        licence=_licence(checkpoint.folder),
    )
    return Bundle(folder=work, manifest=manifest, id="")


def _validate_and_hash(
    checkpoint: Checkpoint,
    work: Path,
    recipe: str,
    importance: Imatrix | None,
    eyes: VisionFormat,
    facts: dict,
    report: Report,
) -> Manifest:
    """Try the files as the runtime will use them, then hash everything."""
    manifest = unverified_bundle(checkpoint, work).manifest
    model, seen = manifest.model, manifest.vision
    if seen is not None:
        seen = msgspec.structs.replace(seen, fixed=eyes.fixed)
        if eyes.lossy:
            write_vision(checkpoint, work / REFERENCE, "bf16", _stage(report, "reference"), eyes.fixed)
    report("try", "language and vision", 0, 1)
    tried = _validate_in_subprocess(work, model, seen, eyes, img_break(checkpoint, model.special["img_break"]))
    (work / REFERENCE).unlink(missing_ok=True)
    report("try", "language and vision", 1, 1)
    facts = {"recipe": recipe, "bytes_by_type": manifest.bytes_by_type, "tried": tried} | facts
    if seen is not None:
        facts["vision"] = {"vision.onnx": eyes.vision, "mmproj.gguf": eyes.mmproj}
    if importance is not None:
        facts["importance"] = {"chunks": importance.n_chunks, "datasets": importance.datasets}
    write_durably(work / REPORT, msgspec.json.format(msgspec.json.encode(facts), indent=2) + b"\n")
    names = [LANGUAGE, *([VISION, MMPROJ] if seen else []), REPORT]
    files = {name: hash_file(work / name) for name in names}
    sources = _hash_sources(checkpoint, report)
    return msgspec.structs.replace(manifest, vision=seen, files=files, recipe=recipe, source_sha256=sources)


def _validate_in_subprocess(
    work: Path, model: ModelInfo, seen: VisionInfo | None, eyes: VisionFormat, break_row: np.ndarray
) -> dict[str, float]:
    """Load and use the files in a process of its own: native code may abort on what a checkpoint holds."""
    question = ValidationRequest(str(work), model, seen, eyes.vision, eyes.mmproj, break_row.tolist())
    done = subprocess.run(
        [sys.executable, "-m", "quantize.validate"],
        input=msgspec.json.encode(question),
        capture_output=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},  # no module of this name from the folder we happen to stand in
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise BuildError(f"the files made cannot be used, the checkpoint is damaged: {said[-1][:300]}")
    return msgspec.json.decode(done.stdout)


def _hash_sources(checkpoint: Checkpoint, report: Report) -> dict[str, str]:
    paths = sorted({*checkpoint.files, checkpoint.config.path})
    total, done, hashes = sum(path.stat().st_size for path in paths), 0, {}
    for path in paths:

        def advance(n: int, path: Path = path) -> None:
            nonlocal done
            done += n
            report("hash source", path.name, done, total)

        hashes[path.name] = hash_file(path, advance).sha256
    return hashes


def _licence(folder: Path) -> str:
    """The model card's own word for it; released Ministral 3 checkpoints say apache-2.0."""
    card = folder / "README.md"
    if card.is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:60]:
            if line.startswith("license:"):
                return line.split(":", 1)[1].strip()
    return "unknown"
