"""Validate the files of a new bundle: load and use them with the runtime's own code, before the manifest is written.

    python -m quantize.validate < request.json > figures.json

A separate process, because llama.cpp aborts on some damaged numbers and must not end the build with it. A failure is
one line on stderr and a non-zero status.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np

from edge_agent.bundle.manifest import LANGUAGE, MMPROJ, VISION, ModelInfo, VisionInfo
from edge_agent.errors import UserError
from edge_agent.model.llama import ACTION_SEQ, LlamaContext, LlamaError, LlamaOptions
from edge_agent.model.preprocess import Preprocessor
from edge_agent.model.vision_encoder import MtmdEncoder, OnnxEncoder, VisionError

# How the weights are stored -> least cosine of each row of a test image with the row of the reference encoder.
MIN_COSINE = {"f32": 0.9999, "bf16": 0.999, "f16": 0.999, "q8_0": 0.99, "int8": 0.98}
REFERENCE = "reference.onnx"  # in the folder when vision.onnx itself loses precision
MAX_DIFFERENCE = 1e-3  # of the logits, relative to the largest one: embeddings read by us against libllama's own lookup


class ValidationRequest(msgspec.Struct, kw_only=True):
    folder: str
    model: ModelInfo
    vision: VisionInfo | None  # None: a text-only model
    vision_kind: str  # how vision.onnx is stored, a key of MIN_COSINE
    mmproj_kind: str  # how mmproj.gguf is stored
    break_row: list[float]  # the [IMG_BREAK] embedding, (hidden,)


class ValidationFailed(UserError):
    """One line."""


def validate_in_subprocess(request: ValidationRequest) -> dict[str, float]:
    """validate_files in a process of its own. Raises ValidationFailed."""
    completed = subprocess.run(
        [sys.executable, "-m", "quantize.validate"],
        input=msgspec.json.encode(request),
        capture_output=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},  # the current folder may hold a module named quantize
        check=False,
    )
    if completed.returncode:
        lines = completed.stderr.decode(errors="replace").strip().splitlines() or ["the process gave no reason"]
        raise ValidationFailed(lines[-1][:300])
    return msgspec.json.decode(completed.stdout)


def validate_files(request: ValidationRequest) -> dict[str, float]:
    """Load the files, the larger ones one after the other. Embeddings read by us must give the logits of tokens, and
    the two vision encoders must agree on an image. Returns the figures.

    Raises ValidationFailed, LlamaError, VisionError.
    """
    folder, model, vision = Path(request.folder), request.model, request.vision
    config = LlamaOptions(context=256, gpu_layers=0, repack=False, mmap=True)
    with LlamaContext(folder / LANGUAGE, config, model.embedding) as llm:
        tokens = [model.special["bos"], model.special["inst"], *llm.tokens("Hold position."), model.special["inst_end"]]
        by_token = llm.logits_after_last(tokens, 0).copy()
        llm.truncate(ACTION_SEQ, 0)
        by_row = llm.logits_after_last(llm.embed(tokens), 0).copy()
        if vision is not None:
            unit = vision.patch * vision.merge
            lines, columns = (side // unit for side in vision.fixed) if vision.fixed else (4, 5)
            noise = np.random.default_rng(0).integers(0, 256, (lines, columns, 3), dtype=np.uint8)
            image = np.ascontiguousarray(np.kron(noise, np.ones((unit, unit, 1), np.uint8)))
            break_row = np.asarray(request.break_row, np.float32)
            encoder = MtmdEncoder(folder / MMPROJ, llm.model, break_row, unit, 0, gpu=False)
            by_mtmd = np.array(encoder.encode(image))
            encoder.close()
    if not np.isfinite(by_token).all():
        raise ValidationFailed("the quantised model computes NaN or infinity")
    difference = float(np.abs(by_token - by_row).max() / max(np.abs(by_token).max(), 1e-9))
    if not difference <= MAX_DIFFERENCE:
        raise ValidationFailed(f"embeddings read from language.gguf differ from libllama's own by {difference:.2g}")
    # Rounded, because the last digits depend on the machine and a bundle must be the same on every machine.
    figures = {"embedding_rows_relative_difference": round(difference, 6)}
    if vision is not None:
        by_onnx = _onnx_rows(folder / VISION, vision, image)
        reference = _onnx_rows(folder / REFERENCE, vision, image) if (folder / REFERENCE).exists() else by_onnx
        for name, rows, kind in (("vision", by_onnx, request.vision_kind), ("mmproj", by_mtmd, request.mmproj_kind)):
            figures[f"{name}_min_cosine"] = round(_agreement(name, rows, reference, kind), 4)
    return figures


def _onnx_rows(path: Path, vision: VisionInfo, image: np.ndarray) -> np.ndarray:
    encoder = OnnxEncoder(path, Preprocessor(vision, 64), 0)
    try:
        return encoder.encode(image)
    finally:
        encoder.close()


def _agreement(name: str, a: np.ndarray, b: np.ndarray, kind: str) -> float:
    """Least cosine of an encoder's rows with the reference's, (n, hidden) each. Raises ValidationFailed."""
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
