"""Checkpoint -> a folder: the three files at source precision, or a complete bundle with its manifest.

The files are written to a hidden folder that a second run can continue (build_folder.py). A bundle is loaded and used
by the runtime's own code before it gets its manifest (validate.py).
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import llama_cpp
import msgspec

import edge_agent
from edge_agent.bundle import signing
from edge_agent.bundle.files import BundleFile, hash_file, write_durably
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
from quantize.build_folder import BuildError, BuildFolder, atomic_folder, check_file_size, resumable_bytes
from quantize.formats.build_plan import BYTES_PER_WEIGHT, BuildPlan, uniform_types
from quantize.formats.ggml_kernels import row_bytes, tensor_bytes, tensor_table
from quantize.formats.gguf_files import write_language, write_mmproj
from quantize.formats.tensor_blocks import img_break_row
from quantize.formats.vision_onnx import write_vision
from quantize.progress import Progress
from quantize.source.checkpoint import Checkpoint
from quantize.standard_recipes import bytes_by_type
from quantize.validate import REFERENCE, ValidationFailed, ValidationRequest, validate_in_subprocess

SPARE_BYTES = 32 << 20  # free space beyond the computed size: headers, tokenizer, journal


def convert(plan: BuildPlan, out: Path, progress: Progress, *, force: bool = False) -> None:
    """language.gguf, mmproj.gguf and vision.onnx, not validated, no manifest. Raises BuildError, CheckpointError."""
    _check_space(plan, out)
    with atomic_folder(out, plan.fingerprint(), force) as folder:
        _write_files(plan, folder, progress)


def build(
    plan: BuildPlan,
    out: Path,
    progress: Progress,
    *,
    force: bool = False,
    signing_key: Path | None = None,
    counter: int | None = None,
) -> Manifest:
    """A bundle: the three files, validated and hashed, report.json, and the manifest last.

    signing_key: a private key; bundle.sig is written with it. counter: of the manifest. Raises BuildError,
    CheckpointError, SigningError.
    """
    if signing_key is not None:
        signing.load_private_key(signing_key)  # an invalid key is reported before any work
    _check_space(plan, out)
    with atomic_folder(out, plan.fingerprint(), force) as folder:
        _write_files(plan, folder, progress)
        figures = _validate(plan, folder.folder, progress)
        manifest = _describe(plan, folder.folder, figures, progress)
        manifest = msgspec.structs.replace(manifest, counter=counter)
        _publish(manifest, folder.folder, signing_key)
        return manifest


# -- refuse ------------------------------------------------------------------------------------------------------------


def _check_space(plan: BuildPlan, out: Path) -> None:
    """Raises BuildError when the disk has too little room for everything that is written, or cannot hold a file."""
    folder = Path(os.path.abspath(out)).parent
    if not folder.is_dir():
        raise BuildError(f"{folder}: no such folder; make it first")
    checkpoint = plan.checkpoint
    n_vision = checkpoint.n_elements(checkpoint.vision_tensors)
    language = sum(bytes_by_type(checkpoint, plan.types).values())
    vision = n_vision * max(BYTES_PER_WEIGHT[plan.vision.onnx], BYTES_PER_WEIGHT[plan.vision.mmproj])
    check_file_size(folder, language, LANGUAGE)
    check_file_size(folder, round(vision), f"{VISION} or {MMPROJ}")
    written = language + round(n_vision * plan.vision.bytes_per_weight_while_building)
    free, needed = shutil.disk_usage(folder).free, written + SPARE_BYTES - resumable_bytes(out)
    if free < needed:
        raise BuildError(f"{folder}: {needed / 1e9:.2f} GB needed while building, {free / 1e9:.2f} GB free; make room")


# -- write -------------------------------------------------------------------------------------------------------------


def _write_files(plan: BuildPlan, folder: BuildFolder, progress: Progress) -> None:
    """Write what an earlier run has not written yet."""
    for missing in folder.missing:
        progress.remark(f"this file system has {missing}")
    if left := folder.left_by_earlier_run():
        progress.remark(f"continuing: an earlier run left {left}")
    if not folder.is_complete(LANGUAGE):
        write_language(plan, folder, LANGUAGE, progress)
        folder.mark_complete(LANGUAGE)
    if plan.checkpoint.vision is None:
        return
    if not folder.is_complete(MMPROJ):
        write_mmproj(plan, folder / MMPROJ, progress)
        folder.mark_complete(MMPROJ)
    if not folder.is_complete(VISION):
        write_vision(plan, folder / VISION, progress)
        folder.mark_complete(VISION)


# -- validate ----------------------------------------------------------------------------------------------------------


def _validate(plan: BuildPlan, folder: Path, progress: Progress) -> dict[str, float]:
    """The figures of validate.py. Raises BuildError."""
    manifest = unverified_bundle(plan, folder).manifest
    if manifest.vision is not None and plan.vision.needs_reference:
        lossless = msgspec.structs.replace(plan, vision=msgspec.structs.replace(plan.vision, onnx="bf16"))
        write_vision(lossless, folder / REFERENCE, progress, stage="reference")
    progress.step("validate", "language and vision", 0, 1)
    request = ValidationRequest(
        folder=str(folder),
        model=manifest.model,
        vision=manifest.vision,
        vision_kind=plan.vision.onnx,
        mmproj_kind=plan.vision.mmproj,
        break_row=img_break_row(plan).tolist(),
    )
    try:
        figures = validate_in_subprocess(request)
    except ValidationFailed as error:
        raise BuildError(f"validation of the new bundle failed; the checkpoint may be damaged: {error}") from None
    (folder / REFERENCE).unlink(missing_ok=True)
    progress.step("validate", "language and vision", 1, 1)
    return figures


# -- describe ----------------------------------------------------------------------------------------------------------


def _describe(plan: BuildPlan, folder: Path, figures: dict[str, float], progress: Progress) -> Manifest:
    """Write report.json, hash every file, and return the manifest. figures: of the validation."""
    manifest = unverified_bundle(plan, folder).manifest
    report: dict[str, Any] = {"recipe": plan.name, "bytes_by_type": manifest.bytes_by_type, "validation": figures}
    report |= plan.facts
    if manifest.vision is not None:
        report["vision"] = {VISION: plan.vision.onnx, MMPROJ: plan.vision.mmproj}
    if plan.imatrix is not None:
        report["imatrix"] = {"chunks": plan.imatrix.n_chunks, "datasets": plan.imatrix.datasets}
    write_durably(folder / REPORT, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    names = [LANGUAGE, *([VISION, MMPROJ] if manifest.vision else []), REPORT]
    files = {name: hash_file(folder / name) for name in names}
    return msgspec.structs.replace(manifest, files=files, source_sha256=_hash_sources(plan.checkpoint, progress))


def unverified_bundle(plan: BuildPlan, folder: Path) -> Bundle:
    """A folder of new files as the runtime's parts take it: facts about the model, nothing hashed or checked."""
    table = tensor_table(folder / LANGUAGE)
    by_type: Counter[str] = Counter()
    for tensor in table:
        by_type[tensor.ggml_type] += tensor.n_bytes
    embedding = next(tensor for tensor in table if tensor.name == "token_embd.weight")
    sizes = {name: (folder / name).stat().st_size for name in (LANGUAGE, VISION, MMPROJ) if (folder / name).is_file()}
    files = {name: BundleFile(bytes=n_bytes, sha256="0" * 64) for name, n_bytes in sizes.items()}
    return Bundle(folder=folder, manifest=_manifest(plan, embedding.offset, dict(by_type), files), id="")


def expected_manifest(plan: BuildPlan) -> Manifest:
    """The manifest that `build` would write, before anything is written: sizes are estimates, hashes are empty."""
    checkpoint = plan.checkpoint
    by_type = bytes_by_type(checkpoint, plan.types)
    sizes = {LANGUAGE: sum(by_type.values()) + plan.tokenizer.gguf_bytes}
    if checkpoint.vision is not None:
        specs = checkpoint.vision_tensors
        sizes[VISION] = round(checkpoint.n_elements(specs) * BYTES_PER_WEIGHT[plan.vision.onnx])
        types = uniform_types(checkpoint, specs, plan.vision.mmproj)
        sizes[MMPROJ] = sum(tensor_bytes(checkpoint.shape(spec), types[spec.gguf]) for spec in specs)
    files = {name: BundleFile(bytes=n_bytes, sha256="0" * 64) for name, n_bytes in sizes.items()}
    return _manifest(plan, 0, by_type, files)


def _manifest(
    plan: BuildPlan, embedding_offset: int, types_bytes: dict[str, int], files: dict[str, BundleFile]
) -> Manifest:
    """embedding_offset: of token_embd.weight in language.gguf, bytes."""
    checkpoint = plan.checkpoint
    t, v = checkpoint.text, checkpoint.vision
    embedding_type = plan.types["token_embd.weight"]
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
        special=plan.tokenizer.special,
        embedding=EmbeddingInfo(
            offset=embedding_offset, ggml_type=embedding_type.name, row_bytes=row_bytes(embedding_type, t.hidden)
        ),
    )
    vision = None
    if v is not None:
        vision = VisionInfo(
            patch=v.patch, merge=v.merge, image_size=v.image_size, mean=v.mean, std=v.std, fixed=plan.vision.fixed
        )
    return Manifest(
        format=FORMAT,
        created_by=f"edge-quantize {edge_agent.__version__}, llama-cpp-python {llama_cpp.__version__}",
        files=files,
        model=model,
        vision=vision,
        recipe=plan.name,
        bytes_by_type=types_bytes,
        source_dtype="FP8" if checkpoint.fp8 else "BF16",
        source_sha256={},
        licence=_licence(checkpoint.folder),
    )


def kv_bytes_per_token(checkpoint: Checkpoint) -> int:
    """Bytes of the KV cache for one token: keys and values of all layers, 16 bit each."""
    t = checkpoint.text
    return 2 * 2 * t.layers * t.kv_heads * t.head_dim


def _hash_sources(checkpoint: Checkpoint, progress: Progress) -> dict[str, str]:
    """File name -> sha256, of the weights and the configuration."""
    paths = sorted({*checkpoint.files, checkpoint.config.path})
    total, done = sum(path.stat().st_size for path in paths), 0
    hashes: dict[str, str] = {}
    for path in paths:

        def advance(n_bytes: int, path: Path = path) -> None:
            nonlocal done
            done += n_bytes
            progress.step("hash source", path.name, done, total)

        hashes[path.name] = hash_file(path, advance).sha256
    return hashes


def _licence(folder: Path) -> str:
    """The licence that the model card names; released Ministral 3 checkpoints have apache-2.0."""
    card = folder / "README.md"
    if card.is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:60]:
            if line.startswith("license:"):
                return line.split(":", 1)[1].strip()
    return "unknown"


# -- publish -----------------------------------------------------------------------------------------------------------


def _publish(manifest: Manifest, folder: Path, signing_key: Path | None) -> None:
    """Write bundle.json and, with a key, bundle.sig: a folder that holds them is a complete bundle."""
    write_manifest(folder, manifest)
    if signing_key is not None:
        write_durably(folder / signing.SIGNATURE, signing.sign((folder / MANIFEST).read_bytes(), signing_key))
