"""Checkpoint -> a folder: the three files at source precision, or a whole bundle, checked and with its manifest last.

Atomic: everything is made in a hidden folder beside the target and renamed at the end. Interrupted or failed, nothing
of it stays. The bundle is tried before it gets its manifest: it is loaded by the runtime's own code.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import llama_cpp
import msgspec
import numpy as np

import edge_agent
from edge_agent import bundle, trust
from quantize import ggml, names, tokenizer, trial
from quantize import recipe as recipes
from quantize.checkpoint import Checkpoint
from quantize.importance import Importance
from quantize.language import TYPES, img_break, uniform, write_language, write_mmproj
from quantize.vision import INT8, write_vision

Report = Callable[[str, str, int, int], None]  # (stage, what, done, in all)
OURS = {bundle.LANGUAGE, bundle.VISION, bundle.MMPROJ, bundle.REPORT, bundle.MANIFEST, trust.SIGNATURE}


class BuildError(Exception):
    """One line: what failed, what was expected, what to do."""


def check_target(out: Path, force: bool) -> Path:
    """The absolute path of a folder that may be made there. Raises BuildError."""
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
    return out


@contextlib.contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, locked while in use, gone afterwards; what a killed run left is cleared first."""
    _clear_leftovers(out)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def fresh_folder(out: Path, force: bool) -> Iterator[Path]:
    """A hidden folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not."""
    out = check_target(out, force)
    try:
        with work_folder(out) as work:
            yield work
            for file in work.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            work.chmod(0o755)
            bundle.sync_folder(work)
            _replace(work, out)
            bundle.sync_folder(out.parent)
    except OSError as error:
        if error.filename is not None:
            raise
        raise BuildError(f"{out}: {error.strerror} while writing it; make room and start again") from None


def _replace(work: Path, out: Path) -> None:
    """`work` becomes `out`. An `out` that was there is exchanged for it in one step and goes with `work`'s name."""
    if not out.exists():
        os.rename(work, out)
    elif _libc.renameat2(_AT_FDCWD, os.fsencode(work), _AT_FDCWD, os.fsencode(out), _RENAME_EXCHANGE):
        old = work.with_suffix(".old")  # a file system that cannot exchange: killed in between, the old one is here
        os.rename(out, old)
        os.rename(work, out)
        shutil.rmtree(old)


_libc = ctypes.CDLL(None)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _clear_leftovers(out: Path) -> None:
    """What a killed run left beside `out`; a folder that is locked is being worked in."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.part"):
        lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        os.close(lock)


def convert(checkpoint: Checkpoint, out: Path, kind: str, force: bool, report: Report) -> None:
    """language.gguf, mmproj.gguf and vision.onnx at source precision (or as `kind` says)."""
    rows = [*checkpoint.text_rows, *checkpoint.vision_rows, *checkpoint.vision_rows]  # vision is written twice
    _need_space(out, _elements(rows, checkpoint) * {"bf16": 2, "f16": 2, "f32": 4}[kind])
    types = uniform(checkpoint, checkpoint.text_rows, kind)
    with fresh_folder(out, force) as work:
        write_language(checkpoint, work / bundle.LANGUAGE, types, TYPES[kind][1], _stage(report, "language"))
        _write_vision(checkpoint, work, Eyes(kind, kind), report)


class Eyes(NamedTuple):
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
    importance: Importance | None = None,
    types: dict[str, gguf.GGMLQuantizationType] | None = None,
    facts: dict | None = None,
    key: Path | None = None,
    eyes: Eyes | None = None,
) -> bundle.Manifest:
    """The same with a quantised language model, tried and described: a bundle.

    types: a plan of one's own, by GGUF name; then `recipe` is only what it is called. facts: more for report.json.
    key: a private key to sign with. Raises BuildError, RecipeError, CheckpointError, TrustError.
    """
    eyes = eyes or Eyes()
    if key is not None:
        trust.sign(b"", key)  # a key that is none shows now
    if eyes.fixed is not None:
        _check_fixed(checkpoint, eyes.fixed)
    if types is None:
        types = recipes.plan(checkpoint, recipe, importance)
    vision_bytes = _elements(checkpoint.vision_rows, checkpoint) * eyes.bytes_per_weight
    _need_space(out, sum(recipes.bytes_by_type(checkpoint, types).values()) + vision_bytes)
    with fresh_folder(out, force) as work:
        write_language(
            checkpoint,
            work / bundle.LANGUAGE,
            types,
            recipes.file_type(recipe, recipes.bytes_by_type(checkpoint, types)),
            _stage(report, f"language {recipe}"),
            importance,
        )
        _write_vision(checkpoint, work, eyes, report)
        manifest = _describe(checkpoint, work, recipe, importance, eyes, facts or {}, report)
        bundle.write_manifest(work, manifest)
        if key is not None:
            signature = trust.sign((work / bundle.MANIFEST).read_bytes(), key)
            bundle.write_durably(work / trust.SIGNATURE, signature)
        return manifest


def _write_vision(checkpoint: Checkpoint, work: Path, eyes: Eyes, report: Report) -> None:
    if checkpoint.vision is None:
        return
    write_mmproj(checkpoint, work / bundle.MMPROJ, eyes.mmproj, _stage(report, "mmproj"))
    write_vision(checkpoint, work / bundle.VISION, eyes.vision, _stage(report, "vision"), eyes.fixed)


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


def _elements(rows: list[names.Row], checkpoint: Checkpoint) -> int:
    return sum(math.prod(checkpoint.shape(row)) for row in rows)


def _need_space(out: Path, n_bytes: int) -> None:
    folder = Path(os.path.abspath(out)).parent
    if not folder.is_dir():
        raise BuildError(f"{folder}: no such folder; make it first")
    free = shutil.disk_usage(folder).free
    needed = n_bytes + (32 << 20)
    if free < needed:
        raise BuildError(f"{folder}: {needed / 1e9:.2f} GB needed while building, {free / 1e9:.2f} GB free; make room")


def as_bundle(checkpoint: Checkpoint, work: Path) -> bundle.Bundle:
    """A folder of files as the runtime's parts want it: facts about the model, nothing checked or hashed."""
    t, v, table = checkpoint.text, checkpoint.vision, ggml.tensor_table(work / bundle.LANGUAGE)
    by_type: Counter[str] = Counter()
    for tensor in table:
        by_type[tensor.ggml_type] += tensor.n_bytes
    embedding = next(tensor for tensor in table if tensor.name == "token_embd.weight")
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
        special=tokenizer.read(checkpoint.folder, t.vocab).special,
        embedding=bundle.Embedding(
            offset=embedding.offset, ggml_type=embedding.ggml_type, row_bytes=embedding.n_bytes // t.vocab
        ),
    )
    seen = None
    if v is not None:
        seen = bundle.Vision(patch=v.patch, merge=v.merge, image_size=v.image_size, mean=v.mean, std=v.std)
    manifest = bundle.Manifest(
        format=bundle.FORMAT,
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
    return bundle.Bundle(folder=work, manifest=manifest, id="")


def _describe(
    checkpoint: Checkpoint,
    work: Path,
    recipe: str,
    importance: Importance | None,
    eyes: Eyes,
    facts: dict,
    report: Report,
) -> bundle.Manifest:
    """Try the files as the runtime will use them, then hash everything."""
    manifest = as_bundle(checkpoint, work).manifest
    model, seen = manifest.model, manifest.vision
    if seen is not None:
        seen = msgspec.structs.replace(seen, fixed=eyes.fixed)
        if eyes.lossy:
            write_vision(checkpoint, work / trial.REFERENCE, "bf16", _stage(report, "reference"), eyes.fixed)
    report("try", "language and vision", 0, 1)
    tried = _try(work, model, seen, eyes, img_break(checkpoint, model.special["img_break"]))
    (work / trial.REFERENCE).unlink(missing_ok=True)
    report("try", "language and vision", 1, 1)
    facts = {"recipe": recipe, "bytes_by_type": manifest.bytes_by_type, "tried": tried} | facts
    if seen is not None:
        facts["vision"] = {"vision.onnx": eyes.vision, "mmproj.gguf": eyes.mmproj}
    if importance is not None:
        facts["importance"] = {"chunks": importance.n_chunks, "datasets": importance.datasets}
    bundle.write_durably(work / bundle.REPORT, msgspec.json.format(msgspec.json.encode(facts), indent=2) + b"\n")
    names = [bundle.LANGUAGE, *([bundle.VISION, bundle.MMPROJ] if seen else []), bundle.REPORT]
    files = {name: bundle.hash_file(work / name) for name in names}
    sources = _hash_sources(checkpoint, report)
    return msgspec.structs.replace(manifest, vision=seen, files=files, recipe=recipe, source_sha256=sources)


def _try(
    work: Path, model: bundle.Model, seen: bundle.Vision | None, eyes: Eyes, break_row: np.ndarray
) -> dict[str, float]:
    """Load and use the files in a process of its own: native code may abort on what a checkpoint holds."""
    question = trial.Question(str(work), model, seen, eyes.vision, eyes.mmproj, break_row.tolist())
    done = subprocess.run(
        [sys.executable, "-m", "quantize.trial"],
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
    paths = sorted({source.file for source in checkpoint.sources.values()} | {checkpoint.config.path})
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
