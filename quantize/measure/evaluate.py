"""A bundle against the model it was made from, at full precision: on text, in what it sees, in what a robot would do.

Text: perplexity and KL divergence, cut and counted as llama-perplexity does (measure.py). Eyes: the cosine of each row.
Actions: the same frames under the same instructions through the runtime's own engine, answer against answer. Weights:
the relative error of every tensor. One model is in memory at a time. The page made of it is in page.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import msgspec
import numpy as np

from edge_agent.actions.envelope import Rejection, parse_answer
from edge_agent.actions.space import load_action_space
from edge_agent.bundle.manifest import LANGUAGE, MANIFEST, Bundle, read_manifest
from edge_agent.config import CameraConfig, Config, LanguageConfig, TaskConfig, VisionConfig
from edge_agent.errors import UserError
from edge_agent.model.engine import Engine
from edge_agent.model.llama import LlamaContext
from edge_agent.tools.stills import read_stills
from quantize.build import convert, unverified_bundle
from quantize.build_folder import temporary_folder
from quantize.formats import ggml_kernels
from quantize.measure import perplexity
from quantize.measure.collect_imatrix import CalibrationData, read_text
from quantize.source.checkpoint import Checkpoint, read_checkpoint

Report = Callable[[str, str, int, int], None]  # (stage, what, done, in all)
MAX_TOKENS = 256  # of an image
N_WORST = 6
WITHIN = 0.05  # what counts as the same value of a field


class EvaluateError(UserError):
    """One line."""


class EvaluatedAnswer(msgspec.Struct, frozen=True):
    action: str  # empty: refused
    values: dict[str, float | int | str | bool]


class EvaluatedFrame(msgspec.Struct, frozen=True):
    """One frame under one instruction."""

    number: int
    instruction: str
    reference: EvaluatedAnswer
    found: EvaluatedAnswer
    cosine: float  # least of its rows


class Agreement(msgspec.Struct, frozen=True):
    n: int
    same_action: float  # share
    fields_within: float  # share of the numbers of answers of one kind that differ by WITHIN or less
    mean_difference: dict[str, float]  # by field
    max_difference: dict[str, float]
    vision_cosine_mean: float
    vision_cosine_min: float
    worst: list[EvaluatedFrame]


class TensorDifference(msgspec.Struct, frozen=True):
    name: str
    type: str
    n_bytes: int
    error: float  # root of the squared error over the squared weights


class Evaluation(msgspec.Struct, frozen=True):
    bundle: str
    recipe: str
    language_bytes: int
    text: perplexity.Divergence
    actions: Agreement | None  # None: no frames were given
    tensors: list[TensorDifference]


def evaluate(folders: list[Path], reference: Path, material: CalibrationData, report: Report) -> list[Evaluation]:
    """reference: a checkpoint, or a bundle made with --recipe BF16. Raises EvaluateError and what the parts raise."""
    opened = [read_manifest(folder) for folder in folders]
    text = read_text(material.text)
    frames = list(read_stills(material.frames, material.max_frames)) if material.frames else []
    with temporary_folder(
        folders[0].absolute()
    ) as folder:  # gigabytes: beside the bundle, not in a /tmp that may be memory
        full = _reference(reference, folder, report)
        for one in opened:
            _check_pair(one, full)
        path = folder / "reference.kld"
        with _language(full) as llm:
            bos = full.manifest.model.special["bos"]
            chunks = perplexity.chunks(llm, bos, text, material.max_chunks)
            perplexity.write_reference(llm, bos, chunks, path, lambda *step: report("reference text", *step))
        seen = _answers(full, frames, material, lambda *step: report("reference frames", *step)) if frames else []
        return [_against(one, full, path, frames, seen, material, report) for one in opened]


def _against(
    one: Bundle,
    full: Bundle,
    path: Path,
    frames: list[np.ndarray],
    seen: list[tuple[EvaluatedAnswer, np.ndarray]],
    material: CalibrationData,
    report: Report,
) -> Evaluation:
    name = one.folder.name
    with _language(one) as llm:
        reference = perplexity.Reference(path)
        divergence = perplexity.compare(
            llm, one.manifest.model.special["bos"], reference, lambda *step: report(f"{name} text", *step)
        )
    agreement = None
    if frames:
        found = _answers(one, frames, material, lambda *step: report(f"{name} frames", *step))
        agreement = agree(seen, found, material)
    tensors = list(_tensors(one.path(LANGUAGE), full.path(LANGUAGE)))
    return Evaluation(
        bundle=str(one.folder),
        recipe=one.manifest.recipe,
        language_bytes=one.path(LANGUAGE).stat().st_size,
        text=divergence,
        actions=agreement,
        tensors=tensors,
    )


def _reference(folder: Path, work: Path, report: Report) -> Bundle:
    if (folder / MANIFEST).is_file():
        found = read_manifest(folder)
        if found.manifest.recipe != "BF16":
            raise EvaluateError(
                f"{folder}: recipe: expected BF16, found {found.manifest.recipe}; give the checkpoint, or a bundle of "
                "it made with --recipe BF16"
            )
        return found
    checkpoint: Checkpoint = read_checkpoint(folder)
    convert(checkpoint, work / "bf16", "bf16", False, report)
    return unverified_bundle(checkpoint, work / "bf16")


def _check_pair(one: Bundle, full: Bundle) -> None:
    for key in ("family", "parameters", "layers", "hidden", "vocab"):
        found, expected = (getattr(made.manifest.model, key) for made in (one, full))
        if found != expected:
            raise EvaluateError(
                f"{one.folder}: {key}: {found}, but the reference {full.folder} has {expected}; they are not a pair"
            )


def _language(one: Bundle) -> LlamaContext:
    """As the runtime loads it, repacked weights included: their kernels round otherwise, and llama-perplexity's figures
    are theirs too."""
    config = LanguageConfig(context=perplexity.CHUNK, flash_attention=True, reproducible=False)  # as llama-perplexity
    return LlamaContext(one.path(LANGUAGE), config, one.manifest.model.embedding)


# -- frames ------------------------------------------------------------------------------------------------------------


def _answers(
    one: Bundle, frames: list[np.ndarray], material: CalibrationData, report: perplexity.Report
) -> list[tuple[EvaluatedAnswer, np.ndarray]]:
    """What the runtime's engine says to each frame, and the rows it saw."""
    if one.manifest.vision is None:
        raise EvaluateError(f"{one.folder}: a text-only model; leave --frames out")
    config = Config(
        bundle="",
        camera=CameraConfig(source=""),
        vision=VisionConfig(max_image_tokens=MAX_TOKENS),
        task=TaskConfig(action_space=material.action_space, deadline_ms=10**9),
        language=LanguageConfig(stream_action_text=False),
    )
    space, found = load_action_space(material.action_space), []
    engine = Engine(config, one, space, lambda event: None)
    try:
        for i, frame in enumerate(frames):
            report(f"frame {i + 1} of {len(frames)}", i, len(frames))
            engine.instruct(material.instructions[i % len(material.instructions)])
            image = engine.preprocessor.image(frame)
            text, _, _ = engine.act(image, i, 2**62)
            said = parse_answer(text, space)
            answer = EvaluatedAnswer("", {}) if isinstance(said, Rejection) else EvaluatedAnswer(said.type, said.values)
            found.append((answer, np.array(engine.encoder.encode(image))))
        report("", len(frames), len(frames))
    finally:
        engine.close()
    return found


def agree(
    seen: list[tuple[EvaluatedAnswer, np.ndarray]],
    found: list[tuple[EvaluatedAnswer, np.ndarray]],
    material: CalibrationData,
) -> Agreement:
    """Answers and rows of two models on the same frames."""
    frames, off = [], {}
    for i, ((a, rows_a), (b, rows_b)) in enumerate(zip(seen, found, strict=True)):
        lengths = np.linalg.norm(rows_a, axis=1) * np.linalg.norm(rows_b, axis=1)
        cosine = (rows_a * rows_b).sum(1) / np.maximum(lengths, 1e-12)
        frames.append(
            EvaluatedFrame(i, material.instructions[i % len(material.instructions)], a, b, float(cosine.min()))
        )
        if a.action and a.action == b.action:
            for key, value in a.values.items():
                if not isinstance(value, str) and key in b.values:
                    off.setdefault(key, []).append(abs(value - b.values[key]))
    every = [value for values in off.values() for value in values]
    return Agreement(
        n=len(frames),
        same_action=float(np.mean([frame.reference.action == frame.found.action for frame in frames])),
        fields_within=float(np.mean([value <= WITHIN + 1e-9 for value in every])) if every else 1.0,
        mean_difference={key: float(np.mean(values)) for key, values in off.items()},
        max_difference={key: float(np.max(values)) for key, values in off.items()},
        vision_cosine_mean=float(np.mean([frame.cosine for frame in frames])),
        vision_cosine_min=min(frame.cosine for frame in frames),
        worst=sorted(frames, key=_badness, reverse=True)[:N_WORST],
    )


def _badness(frame: EvaluatedFrame) -> tuple[bool, float, float]:
    a, b = frame.reference, frame.found
    off = [abs(value - b.values[key]) for key, value in a.values.items()
           if not isinstance(value, str) and isinstance(b.values.get(key), int | float)]  # fmt: skip
    return a.action != b.action, max(off, default=0.0), -frame.cosine


# -- weights -----------------------------------------------------------------------------------------------------------


def _tensors(found: Path, reference: Path) -> Iterator[TensorDifference]:
    full = {tensor.name: tensor for tensor in gguf.GGUFReader(reference).tensors}
    for tensor in gguf.GGUFReader(found).tensors:
        squared_error = squared = 0.0
        for a, b in zip(_rows(full[tensor.name]), _rows(tensor), strict=True):
            squared_error += float(np.square(a - b).sum(dtype=np.float64))
            squared += float(np.square(a).sum(dtype=np.float64))
        error = (squared_error / max(squared, 1e-30)) ** 0.5
        yield TensorDifference(tensor.name, tensor.tensor_type.name, int(tensor.n_bytes), error)


def _rows(tensor: gguf.ReaderTensor, at_once: int = 4096) -> Iterator[np.ndarray]:
    """The tensor in float32, in blocks of rows."""
    width, kind = int(tensor.shape[0]), tensor.tensor_type
    raw = np.asarray(tensor.data).view(np.uint8).reshape(-1, ggml_kernels.row_bytes(kind, width))
    for start in range(0, len(raw), at_once):
        block = raw[start : start + at_once]
        if kind == gguf.GGMLQuantizationType.F32:
            yield np.ascontiguousarray(block).view(np.float32)
        elif kind in (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16):
            yield gguf.quants.dequantize(np.ascontiguousarray(block), kind).reshape(len(block), width)
        else:
            yield ggml_kernels.dequantise_rows(block, kind, width)
