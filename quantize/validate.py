"""Try a bundle's files as the runtime will use them, before they get their manifest.

    python -m quantize.validate < question.json > figures.json

A process of its own: llama.cpp aborts on some damaged numbers, and that must not take the builder along. It fails with
one line on stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import numpy as np

from edge_agent.bundle.manifest import LANGUAGE, MMPROJ, VISION, ModelInfo, VisionInfo
from edge_agent.config import LanguageConfig
from edge_agent.errors import UserError
from edge_agent.model.llama import ACTION_SEQ, LlamaContext, LlamaError
from edge_agent.model.preprocess import Preprocessor
from edge_agent.model.vision_encoder import MtmdEncoder, OnnxEncoder, VisionError

# Of each row of a test picture with the reference's, by how the weights are stored.
MIN_COSINE = {"f32": 0.9999, "bf16": 0.999, "f16": 0.999, "q8_0": 0.99, "int8": 0.98}
REFERENCE = "reference.onnx"  # in the folder when vision.onnx itself is not lossless
MAX_DIFFERENCE = 1e-3  # of the logits, relative to the largest: rows looked up by us against the model's own


class ValidationRequest(msgspec.Struct):
    work: str
    model: ModelInfo
    vision: VisionInfo | None  # None: a text-only model
    vision_kind: str
    mmproj_kind: str
    break_row: list[float]  # the [IMG_BREAK] embedding


class ValidationFailed(UserError):
    """One line."""


def validate_files(question: ValidationRequest) -> dict[str, float]:
    """Load the parts, the larger ones one after the other: rows looked up must do what tokens do, and the two encoders
    must agree on a picture. Raises Failed, LanguageError, VisionError."""
    work, model, seen = Path(question.work), question.model, question.vision
    config = LanguageConfig(context=256, gpu_layers=0, repack=False)
    with LlamaContext(work / LANGUAGE, config, model.embedding) as llm:
        tokens = [model.special["bos"], model.special["inst"], *llm.tokens("Hold position."), model.special["inst_end"]]
        by_token = llm.decode_tokens(tokens, 0).copy()
        llm.forget(ACTION_SEQ, 0)
        by_row = llm.decode_rows(llm.embed(tokens), 0).copy()
        if seen is not None:
            unit = seen.patch * seen.merge
            lines, columns = (side // unit for side in seen.fixed) if seen.fixed else (4, 5)
            noise = np.random.default_rng(0).integers(0, 256, (lines, columns, 3), dtype=np.uint8)
            image = np.ascontiguousarray(np.kron(noise, np.ones((unit, unit, 1), np.uint8)))
            break_row = np.asarray(question.break_row, np.float32)
            encoder = MtmdEncoder(work / MMPROJ, llm.model, break_row, unit, 0, gpu=False)
            by_mtmd = np.array(encoder.encode(image))
            encoder.close()
    if not np.isfinite(by_token).all():
        raise ValidationFailed("the quantised model gives numbers that are not finite")
    difference = float(np.abs(by_token - by_row).max() / max(np.abs(by_token).max(), 1e-9))
    if not difference <= MAX_DIFFERENCE:
        raise ValidationFailed(f"embedding rows looked up differ from the model's own by {difference:.2g}")
    # Rounded: the last digits depend on the machine, and a bundle is to be the same on each.
    figures = {"embedding_rows_relative_difference": round(difference, 6)}
    if seen is not None:
        by_onnx = _reference_rows(work / VISION, seen, image)
        reference = _reference_rows(work / REFERENCE, seen, image) if (work / REFERENCE).exists() else by_onnx
        for name, rows, kind in (("vision", by_onnx, question.vision_kind), ("mmproj", by_mtmd, question.mmproj_kind)):
            figures[f"{name}_min_cosine"] = round(_agreement(name, rows, reference, kind), 4)
    return figures


def _reference_rows(path: Path, seen: VisionInfo, image: np.ndarray) -> np.ndarray:
    encoder = OnnxEncoder(path, Preprocessor(seen, 64), 0)
    try:
        return encoder.encode(image)
    finally:
        encoder.close()


def _agreement(name: str, a: np.ndarray, b: np.ndarray, kind: str) -> float:
    """Least cosine of an encoder's rows with the reference's. Raises Failed when they are too far apart."""
    if a.shape != b.shape:
        raise ValidationFailed(f"{name} gives {a.shape} rows, the reference {b.shape}")
    cosine = float(((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())
    if not cosine >= MIN_COSINE[kind]:
        raise ValidationFailed(
            f"{name} at {kind}: cosine {cosine:.5f} with the reference, expected {MIN_COSINE[kind]} or more"
        )
    return cosine


def main() -> None:
    try:
        figures = validate_files(msgspec.json.decode(sys.stdin.buffer.read(), type=ValidationRequest))
    except (ValidationFailed, LlamaError, VisionError) as error:
        sys.exit(str(error))
    sys.stdout.buffer.write(msgspec.json.encode(figures))


if __name__ == "__main__":
    main()
