"""Compare bundles with the model at full precision: on text, in the vision encoder, and in the actions.

Text: perplexity and KL divergence, as llama-perplexity counts them (perplexity.py). Vision: the cosine of each
embedding row. Actions: the same frames and instructions through the runtime's own engine, action against action.
Weights: the relative error of every tensor. One model is in memory at a time. html_report.py makes a page of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from edge_agent.actions.envelope import Rejection, parse_answer
from edge_agent.actions.space import load_action_space
from edge_agent.bundle.gguf_package import gguf
from edge_agent.bundle.manifest import LANGUAGE, MANIFEST, Bundle, read_manifest
from edge_agent.config import CameraConfig, Config, LanguageConfig, TaskConfig, VisionConfig
from edge_agent.errors import UserError
from edge_agent.model.llama import LlamaContext, LlamaOptions
from edge_agent.model.load import NO_DEADLINE_NS, load_model
from edge_agent.tools.stills import Stills
from quantize.build import convert, unverified_bundle
from quantize.build_folder import temporary_folder
from quantize.formats import ggml_kernels
from quantize.formats.build_plan import plan_conversion
from quantize.measure import perplexity
from quantize.measure.collect_imatrix import CalibrationData, read_text
from quantize.progress import Progress
from quantize.source.checkpoint import read_checkpoint

MAX_TOKENS = 256  # of an image
N_WORST = 6  # frames that the report shows
NOT_QUANTISED = ("BF16", "F16", "F32")  # recipes of a reference
WITHIN = 0.05  # the largest difference of a field that counts as the same value


class EvaluateError(UserError):
    """One line."""


class EvaluatedAnswer(msgspec.Struct, frozen=True):
    """The checked answer of one model to one frame."""

    action: str  # type of the action; empty: the answer was refused
    values: dict[str, float | int | str | bool]


class EvaluatedFrame(msgspec.Struct, frozen=True):
    """One frame under one instruction."""

    number: int
    instruction: str
    reference: EvaluatedAnswer
    found: EvaluatedAnswer
    cosine: float  # least of its embedding rows


class Agreement(msgspec.Struct, frozen=True):
    """Answers and embeddings of a bundle against those of the reference."""

    n: int  # frames
    same_action: float  # share of the frames with the same type of action
    fields_within: float  # share of the fields of these actions that differ by WITHIN or less
    mean_difference: dict[str, float]  # by field
    max_difference: dict[str, float]
    vision_cosine_mean: float
    vision_cosine_min: float
    worst: list[EvaluatedFrame]


class TensorDifference(msgspec.Struct, frozen=True):
    """The error of one quantised tensor."""

    name: str
    type: str
    n_bytes: int
    error: float  # relative: square root of (sum of squared errors / sum of squared weights)


class Evaluation(msgspec.Struct, frozen=True):
    """One bundle against the reference."""

    bundle: str
    recipe: str
    language_bytes: int
    text: perplexity.Divergence
    actions: Agreement | None  # None: no frames were given
    tensors: list[TensorDifference]


class FrameResult(NamedTuple):
    """What one model computes for one frame."""

    answer: EvaluatedAnswer
    rows: np.ndarray  # (n, hidden) float32, of the vision encoder


def evaluate(folders: list[Path], reference: Path, data: CalibrationData, progress: Progress) -> list[Evaluation]:
    """reference: a checkpoint, or a bundle made with --recipe BF16.

    Raises EvaluateError, MeasureError, and what opening bundles, checkpoints and images raises.
    """
    bundles = [read_manifest(folder) for folder in folders]
    text = read_text(data.text)
    frames = Stills(data.frames, data.max_frames, progress.remark) if data.frames else None
    # Gigabytes: beside the bundle, because /tmp may be in memory.
    with temporary_folder(folders[0].absolute()) as folder:
        full = _reference(reference, folder, progress)
        for bundle in bundles:
            _check_pair(bundle, full)
        path = folder / "reference.kld"
        with _language(full) as llm:
            chunks = perplexity.divide(llm, text, data.max_chunks)
            perplexity.write_reference(llm, chunks, path, progress)
        expected = _frame_results(full, frames, data, progress, "reference frames") if frames else []
        evaluations = []
        for bundle in bundles:
            divergence = _divergence(bundle, path, progress)
            agreement = None
            if frames:
                found = _frame_results(bundle, frames, data, progress, f"{bundle.folder.name} frames")
                agreement = agree(expected, found, data)
            evaluations.append(_evaluation(bundle, full, divergence, agreement))
        return evaluations


def _divergence(bundle: Bundle, reference: Path, progress: Progress) -> perplexity.Divergence:
    with _language(bundle) as llm:
        return perplexity.compare(llm, perplexity.Reference(reference), progress, stage=f"{bundle.folder.name} text")


def _evaluation(
    bundle: Bundle, full: Bundle, divergence: perplexity.Divergence, agreement: Agreement | None
) -> Evaluation:
    return Evaluation(
        bundle=str(bundle.folder),
        recipe=bundle.manifest.recipe,
        language_bytes=bundle.path(LANGUAGE).stat().st_size,
        text=divergence,
        actions=agreement,
        tensors=list(_tensors(bundle.path(LANGUAGE), full.path(LANGUAGE))),
    )


def _reference(folder: Path, work: Path, progress: Progress) -> Bundle:
    """The model before quantisation: such a bundle as it is, or a checkpoint converted into `work`."""
    if (folder / MANIFEST).is_file():
        bundle = read_manifest(folder)
        if bundle.manifest.recipe not in NOT_QUANTISED:
            raise EvaluateError(
                f"{folder}: recipe: expected {', '.join(NOT_QUANTISED)}, found {bundle.manifest.recipe}; give the "
                "checkpoint, a bundle of it made with --recipe BF16, or its wrapped F16 file"
            )
        return bundle
    plan = plan_conversion(read_checkpoint(folder), "bf16")
    convert(plan, work / "bf16", progress)
    return unverified_bundle(plan, work / "bf16")


def _check_pair(bundle: Bundle, full: Bundle) -> None:
    for key in ("family", "parameters", "layers", "hidden", "vocab"):
        found, expected = (getattr(either.manifest.model, key) for either in (bundle, full))
        if found != expected:
            raise EvaluateError(
                f"{bundle.folder}: {key}: {found}, but the reference {full.folder} has {expected}; they are not of "
                "one model"
            )


def _language(bundle: Bundle) -> LlamaContext:
    """The language model as the runtime and llama-perplexity load it: repacked weights use kernels that round
    differently."""
    config = LlamaOptions(context=perplexity.CHUNK, flash_attention=True, reproducible=False)  # as llama-perplexity
    return LlamaContext(bundle.path(LANGUAGE), config, bundle.manifest.model.embedding)


# -- frames ------------------------------------------------------------------------------------------------------------


def _frame_results(
    bundle: Bundle, frames: Stills, material: CalibrationData, progress: Progress, stage: str
) -> list[FrameResult]:
    """The answer of the runtime's engine to each frame. Raises EvaluateError, ImageError."""
    if bundle.manifest.vision is None:
        raise EvaluateError(f"{bundle.folder}: a text-only model; leave --frames out")
    config = Config(
        bundle="",
        camera=CameraConfig(source=""),
        vision=VisionConfig(max_image_tokens=MAX_TOKENS),
        task=TaskConfig(action_space=material.action_space, deadline_ms=10**9),
        language=LanguageConfig(stream_action_text=False),
    )
    space, results = load_action_space(material.action_space), []
    loaded = load_model(config, bundle, space)
    try:
        for i, frame in enumerate(frames):
            progress.step(stage, f"frame {i + 1} of {len(frames)}", i, len(frames))
            loaded.engine.instruct(material.instructions[i % len(material.instructions)])
            embeddings = loaded.images.embed(frame)
            decision = loaded.engine.actions.decide(embeddings, i, NO_DEADLINE_NS)
            result = parse_answer(decision.text, space)
            if isinstance(result, Rejection):
                answer = EvaluatedAnswer("", {})
            else:
                answer = EvaluatedAnswer(result.type, result.values)
            results.append(FrameResult(answer, np.array(embeddings.image_rows)))
        progress.step(stage, "", len(frames), len(frames))
    finally:
        loaded.close()
    return results


def agree(expected: list[FrameResult], found: list[FrameResult], data: CalibrationData) -> Agreement:
    """Answers and embeddings of two models for the same frames."""
    frames: list[EvaluatedFrame] = []
    differences: dict[str, list[float]] = {}
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        lengths = np.linalg.norm(a.rows, axis=1) * np.linalg.norm(b.rows, axis=1)
        cosine = float(((a.rows * b.rows).sum(1) / np.maximum(lengths, 1e-12)).min())
        instruction = data.instructions[i % len(data.instructions)]
        frames.append(EvaluatedFrame(i, instruction, a.answer, b.answer, cosine))
        if a.answer.action and a.answer.action == b.answer.action:
            for key, difference in _field_differences(a.answer, b.answer).items():
                differences.setdefault(key, []).append(difference)
    every = [value for values in differences.values() for value in values]
    return Agreement(
        n=len(frames),
        same_action=float(np.mean([frame.reference.action == frame.found.action for frame in frames])),
        fields_within=float(np.mean([value <= WITHIN + 1e-9 for value in every])) if every else 1.0,
        mean_difference={key: float(np.mean(values)) for key, values in differences.items()},
        max_difference={key: float(np.max(values)) for key, values in differences.items()},
        vision_cosine_mean=float(np.mean([frame.cosine for frame in frames])),
        vision_cosine_min=min(frame.cosine for frame in frames),
        worst=sorted(frames, key=_badness, reverse=True)[:N_WORST],
    )


def _field_differences(a: EvaluatedAnswer, b: EvaluatedAnswer) -> dict[str, float]:
    """Field -> absolute difference, of the numbers that both answers have."""
    differences = {}
    for key, value in a.values.items():
        other = b.values.get(key)
        if isinstance(value, int | float) and isinstance(other, int | float):
            differences[key] = float(abs(value - other))
    return differences


def _badness(frame: EvaluatedFrame) -> tuple[bool, float, float]:
    """Key to sort frames by: another action first, then the largest difference of a field, then the least cosine."""
    largest = max(_field_differences(frame.reference, frame.found).values(), default=0.0)
    return frame.reference.action != frame.found.action, largest, -frame.cosine


# -- weights -----------------------------------------------------------------------------------------------------------


def _tensors(found: Path, reference: Path) -> Iterator[TensorDifference]:
    """The error of every tensor of a GGUF file against the same tensor of another file."""
    full = {tensor.name: tensor for tensor in gguf.GGUFReader(reference).tensors}
    for tensor in gguf.GGUFReader(found).tensors:
        squared_error = squared = 0.0
        for a, b in zip(_rows(full[tensor.name]), _rows(tensor), strict=True):
            squared_error += float(np.square(a - b).sum(dtype=np.float64))
            squared += float(np.square(a).sum(dtype=np.float64))
        error = (squared_error / max(squared, 1e-30)) ** 0.5
        yield TensorDifference(tensor.name, tensor.tensor_type.name, int(tensor.n_bytes), error)


def _rows(tensor: gguf.ReaderTensor, block_rows: int = 4096) -> Iterator[np.ndarray]:
    """The tensor in blocks of rows, (up to block_rows, width) float32."""
    width, kind = int(tensor.shape[0]), tensor.tensor_type
    raw = np.asarray(tensor.data).view(np.uint8).reshape(-1, ggml_kernels.row_bytes(kind, width))
    for start in range(0, len(raw), block_rows):
        block = raw[start : start + block_rows]
        if kind == gguf.GGMLQuantizationType.F32:
            yield np.ascontiguousarray(block).view(np.float32)
        elif kind in (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16):
            yield gguf.quants.dequantize(np.ascontiguousarray(block), kind).reshape(len(block), width)
        else:
            yield ggml_kernels.dequantise_rows(block, kind, width)
