"""The validation of every bundle before its manifest is written: what passes, and what does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_agent.bundle.manifest import read_manifest
from quantize.validate import ValidationFailed, ValidationRequest, validate_files
from tests.harness import ROOT
from tests.harness.gguf_reading import Reader


@pytest.fixture
def validation_request(toy_bundle, tmp_path):
    work = shutil.copytree(toy_bundle, tmp_path / "work")
    manifest = read_manifest(work).manifest
    tensors = {tensor.name: tensor for tensor in Reader(work / "mmproj.gguf").tensors}
    row = np.array(tensors["v.token_embd.img_break"].data, np.float32)
    return ValidationRequest(
        folder=str(work),
        model=manifest.model,
        vision=manifest.vision,
        vision_kind="bf16",
        mmproj_kind="bf16",
        break_row=row.tolist(),
    )


def validated(validation_request: ValidationRequest) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "quantize.validate"],
        input=msgspec.json.encode(validation_request),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )


def test_a_valid_bundle_passes_with_figures(validation_request):
    done = validated(validation_request)
    assert done.returncode == 0, done.stderr
    figures = msgspec.json.decode(done.stdout)
    assert figures["mmproj_min_cosine"] >= 0.999 and figures["vision_min_cosine"] == 1.0
    assert figures["embedding_rows_relative_difference"] <= 1e-3


def test_encoders_that_disagree_fail_validation(validation_request):
    validation_request.break_row = [-x for x in validation_request.break_row]
    with pytest.raises(ValidationFailed, match=r"^mmproj at bf16: cosine"):
        validate_files(validation_request)


def test_a_wrong_embedding_offset_fails_validation(validation_request):
    embedding = msgspec.structs.replace(
        validation_request.model.embedding, offset=validation_request.model.embedding.offset + 210
    )
    validation_request.model = msgspec.structs.replace(validation_request.model, embedding=embedding)
    with pytest.raises(ValidationFailed, match=r"^embeddings read"):
        validate_files(validation_request)


def test_a_truncated_file_fails_validation(validation_request):
    path = Path(validation_request.folder) / "language.gguf"
    os.truncate(path, path.stat().st_size // 2)
    done = validated(validation_request)
    assert done.returncode == 1 and b"language.gguf" in done.stderr and done.stdout == b""
    assert done.stderr.count(b"\n") == 1
