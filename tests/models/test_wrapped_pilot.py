"""The demo model as published GGUF files, wrapped, answers as our own build of the same checkpoint does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_agent.bundle.gguf_package import gguf
from edge_agent.bundle.manifest import LANGUAGE, MMPROJ
from edge_agent.bundle.wrap import wrap
from edge_agent.config import LanguageConfig, VisionConfig
from models.pad_pilot.lessons import Grounds, lesson, training_photographs
from tests.harness import ROOT
from tests.harness.engine import engine_of

CHECKPOINT = ROOT / "models" / "pad_pilot" / "checkpoint"
# As an mmproj or a model of llama.cpp's converter and of its followers: more keys, another order, no vocab_size.
PUBLISHED = {"general.basename": "Pad-Pilot", "general.quantized_by": "somebody", "quantize.imatrix.file": "x.dat"}


def published(source: Path, target: Path) -> Path:
    """The same tensors under a header that another tool wrote."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for key, text in PUBLISHED.items():
        writer.add_string(key, text)
    for key, field in reversed(reader.fields.items()):
        if key.startswith("GGUF.") or key in ("general.architecture", f"{architecture}.vocab_size"):
            continue
        kind = field.types[0]
        if kind == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), kind)
    for tensor in reversed(reader.tensors):
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def different_answers(build: Callable[..., Path], folder: Path, n: int) -> list[tuple[str, str]]:
    """Answers to n frames that differ: (of our build, of the wrapped files)."""
    built = build(CHECKPOINT, "Q4_K_M")
    files = [published(built / name, folder / name) for name in (LANGUAGE, MMPROJ)]
    wrap(files[0], files[1], folder / "bundle")
    grounds, rng, found = Grounds(training_photographs()[:2], seed=3), np.random.default_rng(5), []
    options = {"vision": VisionConfig(backend="mtmd", max_image_tokens=25),
               "language": LanguageConfig(context=768, gpu_layers=0)}  # fmt: skip
    with (
        engine_of(built, "velocity_body", **options) as ours,
        engine_of(folder / "bundle", "velocity_body", **options) as theirs,
    ):
        for i in range(n):
            example = lesson(rng, grounds)
            if i % 10 == 0:
                for rig in (ours, theirs):
                    rig.engine.instruct(example.exercises[0].instruction)
            answers = tuple(rig.answer(np.array(rig.images.resize(example.picture))) for rig in (ours, theirs))
            if answers[0] != answers[1]:
                found.append(answers)
    return found


def test_published_files_answer_as_our_build_does(build: Callable[..., Path], tmp_path: Path):
    assert different_answers(build, tmp_path, 8) == []


@pytest.mark.soak
def test_a_thousand_frames_of_published_files_are_answered_as_by_our_build(build: Callable[..., Path], tmp_path: Path):
    assert different_answers(build, tmp_path, 1000) == []
