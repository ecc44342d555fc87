"""Checkpoint -> a folder: the three files at source precision, or a whole bundle, checked and with its manifest last.

Atomic: everything is made in a hidden folder beside the target and renamed at the end. Interrupted or failed, nothing
of it stays. The bundle is tried before it gets its manifest: it is loaded by the runtime's own code.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import llama_cpp
import msgspec
import numpy as np

import edge_agent
from edge_agent import bundle, language, vision
from edge_agent.config import LanguageConfig
from quantize import recipe as recipes
from quantize import tokenizer
from quantize.checkpoint import DTYPES, Checkpoint
from quantize.language import img_break, write_language, write_mmproj
from quantize.vision import write_vision

Report = Callable[[str, str, int, int], None]  # (stage, what, done, in all)
OURS = {bundle.LANGUAGE, bundle.VISION, bundle.MMPROJ, bundle.REPORT, bundle.MANIFEST, "bundle.sig"}
MIN_COSINE = 0.999  # between the two encoders, on a test picture


class BuildError(Exception):
    """One line: what failed, what was expected, what to do."""


@contextlib.contextmanager
def fresh_folder(out: Path, force: bool) -> Iterator[Path]:
    """A hidden folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not."""
    out = Path(os.path.abspath(out))
    if out.is_symlink() or out.exists():
        if not force:
            raise BuildError(f"{out}: exists; give another folder, or --force to replace it")
        strange = [] if out.is_dir() and not out.is_symlink() else [out.name]
        strange = strange or sorted(set(os.listdir(out)) - OURS)
        if strange:
            raise BuildError(f"{out}: --force replaces only folders made by edge-quantize; found {strange[0]!r} in it")
    if not out.parent.is_dir():
        raise BuildError(f"{out.parent}: no such folder; make it first")
    work = out.parent / f".{out.name}.{os.getpid()}.part"
    work.mkdir()
    try:
        yield work
        for file in work.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        bundle.sync_folder(work)
        old = out.parent / f".{out.name}.{os.getpid()}.old"
        if out.exists():
            os.rename(out, old)
        os.rename(work, out)
        bundle.sync_folder(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def convert(checkpoint: Checkpoint, out: Path, kind: str, force: bool, report: Report) -> None:
    """language.gguf, mmproj.gguf and vision.onnx at source precision (or as `kind` says)."""
    _need_space(out, _elements(checkpoint) * {"bf16": 2, "f16": 2, "f32": 4}[kind])
    with fresh_folder(out, force) as work:
        _convert(checkpoint, work, kind, report)


def build(checkpoint: Checkpoint, out: Path, recipe: str, force: bool, report: Report) -> bundle.Manifest:
    """The same, then quantised, tried and described: a bundle."""
    weight = recipes.weigh(checkpoint, recipe)
    _need_space(out, _elements(checkpoint) * 2 + sum(weight.values()))
    with fresh_folder(out, force) as work:
        full = work / "full.gguf"
        _convert(checkpoint, work, "bf16", report, language_name=full.name)
        recipes.quantise(full, work / bundle.LANGUAGE, recipe, _stage(report, f"quantise {recipe}"))
        full.unlink()
        manifest = _describe(checkpoint, work, recipe, report)
        bundle.write_manifest(work, manifest)
        return manifest


def _convert(
    checkpoint: Checkpoint, work: Path, kind: str, report: Report, language_name: str = bundle.LANGUAGE
) -> None:
    write_language(checkpoint, work / language_name, kind, _stage(report, "language"))
    write_mmproj(checkpoint, work / bundle.MMPROJ, kind, _stage(report, "mmproj"))
    write_vision(checkpoint, work / bundle.VISION, kind, _stage(report, "vision"))


def _stage(report: Report, stage: str) -> Callable[[str, int, int], None]:
    return lambda what, done, total: report(stage, what, done, total)


def _elements(checkpoint: Checkpoint) -> int:
    """Numbers written at source precision: the vision encoder twice, as GGUF and as ONNX."""
    vision_elements = sum(math.prod(checkpoint.shape(row)) for row in checkpoint.vision_rows)
    return sum(math.prod(checkpoint.shape(row)) for row in checkpoint.text_rows) + 2 * vision_elements


def _need_space(out: Path, n_bytes: int) -> None:
    folder = Path(os.path.abspath(out)).parent
    if not folder.is_dir():
        raise BuildError(f"{folder}: no such folder; make it first")
    free = shutil.disk_usage(folder).free
    needed = n_bytes + (32 << 20)
    if free < needed:
        raise BuildError(f"{folder}: {needed / 1e9:.2f} GB needed while building, {free / 1e9:.2f} GB free; make room")


def _describe(checkpoint: Checkpoint, work: Path, recipe: str, report: Report) -> bundle.Manifest:
    """Try the files as the runtime will use them, then hash everything."""
    table = recipes.tensor_table(work / bundle.LANGUAGE)
    by_type: Counter[str] = Counter()
    for tensor in table:
        by_type[tensor.ggml_type] += tensor.n_bytes
    embedding = next(tensor for tensor in table if tensor.name == "token_embd.weight")
    t, v = checkpoint.text, checkpoint.vision
    words = tokenizer.read(checkpoint.folder, t.vocab)
    model = bundle.Model(
        family=checkpoint.family,
        size=checkpoint.size,
        variant=checkpoint.variant(),
        parameters=checkpoint.parameters,
        layers=t.layers,
        hidden=t.hidden,
        vocab=t.vocab,
        context=t.context,
        kv_bytes_per_token=recipes.kv_bytes_per_token(checkpoint),
        special=words.special,
        embedding=bundle.Embedding(
            offset=embedding.offset, ggml_type=embedding.ggml_type, row_bytes=embedding.n_bytes // t.vocab
        ),
    )
    seen = bundle.Vision(patch=v.patch, merge=v.merge, image_size=v.image_size, mean=v.mean, std=v.std)
    report("try", "language and vision", 0, 1)
    tried = _try(work, model, seen, img_break(checkpoint, words.special["img_break"]))
    report("try", "language and vision", 1, 1)
    facts = {"recipe": recipe, "bytes_by_type": dict(by_type), "tried": tried}
    bundle.write_durably(work / bundle.REPORT, msgspec.json.format(msgspec.json.encode(facts), indent=2) + b"\n")
    files = {
        name: bundle.hash_file(work / name) for name in (bundle.LANGUAGE, bundle.VISION, bundle.MMPROJ, bundle.REPORT)
    }
    return bundle.Manifest(
        format=bundle.FORMAT,
        created_by=f"edge-quantize {edge_agent.__version__}, llama-cpp-python {llama_cpp.__version__}",
        files=files,
        model=model,
        vision=seen,
        recipe=recipe,
        bytes_by_type=dict(by_type),
        source_dtype="FP8" if checkpoint.fp8 else "BF16",
        source_sha256=_hash_sources(checkpoint, report),
        licence=_licence(checkpoint.folder),
    )


def _try(work: Path, model: bundle.Model, seen: bundle.Vision, break_row: np.ndarray) -> dict[str, float]:
    """Load both halves; the two encoders must agree, and rows looked up by us must do what tokens do."""
    config = LanguageConfig(context=256, gpu_layers=0)
    with language.Language(work / bundle.LANGUAGE, config, model.embedding) as llm:
        tokens = [model.special["bos"], model.special["inst"], *llm.tokens("Hold position."), model.special["inst_end"]]
        by_token = llm.decode_tokens(tokens, 0).copy()
        llm.forget(language.ACT, 0)
        by_row = llm.decode_rows(llm.embed(tokens), 0).copy()
        if not np.isfinite(by_token).all():
            raise BuildError("the quantised model gives numbers that are not finite; the checkpoint is damaged")
        difference = float(np.abs(by_token - by_row).max() / max(np.abs(by_token).max(), 1e-9))
        if difference > 1e-3:
            raise BuildError(f"embedding rows looked up differ from the model's own by {difference:.2g}; report this")
        preprocessor = vision.Preprocessor(seen, 64)
        unit = seen.patch * seen.merge
        noise = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = np.ascontiguousarray(np.kron(noise, np.ones((unit, unit, 1), np.uint8)))
        rows = []
        for encoder in (
            vision.OnnxEncoder(work / bundle.VISION, preprocessor, 0),
            vision.MtmdEncoder(work / bundle.MMPROJ, llm.model, break_row, unit, 0, gpu=False),
        ):
            rows.append(np.array(encoder.encode(image)))
            encoder.close()
    a, b = rows
    if a.shape != b.shape:
        raise BuildError(f"vision.onnx gives {a.shape} rows, mmproj.gguf {b.shape}; report this")
    cosine = float(((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())
    if not cosine >= MIN_COSINE:
        raise BuildError(f"vision.onnx and mmproj.gguf disagree: cosine {cosine:.5f}, expected {MIN_COSINE} or more")
    return {"embedding_rows_relative_difference": difference, "onnx_mtmd_min_cosine": cosine}


def _hash_sources(checkpoint: Checkpoint, report: Report) -> dict[str, str]:
    paths = sorted({source.file for source in checkpoint.sources.values()} | {checkpoint.folder / "config.json"})
    total, done, hashes = sum(path.stat().st_size for path in paths), 0, {}
    for path in paths:

        def advance(n: int, path: Path = path) -> None:
            nonlocal done
            done += n
            report("hash source", path.name, done, total)

        hashes[path.name] = bundle.hash_file(path, advance).sha256
    return hashes


def _licence(folder: Path) -> str:
    """The model card's own word for it; released Ministral 3 checkpoints say apache-2.0."""
    card = folder / "README.md"
    if card.is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:60]:
            if line.startswith("license:"):
                return line.split(":", 1)[1].strip()
    return "unknown"


def source_bytes(checkpoint: Checkpoint) -> int:
    return sum(math.prod(s.shape) * DTYPES[s.dtype].itemsize for s in checkpoint.sources.values())
