"""The vision encoder in other types and at one size: what is stored, what it costs, and that the runtime takes it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edge_agent.bundle.manifest import MMPROJ, REPORT, VISION
from edge_agent.bundle.verify import verify_bundle
from edge_agent.ipc.image_grid import image_grid
from edge_agent.model.onnx_runtime import onnxruntime
from edge_agent.model.preprocess import Preprocessor, image_request
from edge_agent.model.vision_encoder import OnnxEncoder
from quantize.build import build
from quantize.build_folder import BuildError
from quantize.formats.build_plan import VisionFormat
from quantize.progress import SILENT
from quantize.source.checkpoint import read_checkpoint
from quantize.standard_recipes import plan_bundle
from quantize.validate import MIN_COSINE
from tests.harness import toy
from tests.harness.gguf_reading import Reader, values
from tests.harness.quantize_cli import refused


@pytest.fixture(scope="module")
def made(toy_small: Path, tmp_path_factory: pytest.TempPathFactory):
    """made(vision, mmproj, fixed) -> (folder, report.json's figures)."""
    known: dict[VisionFormat, Path] = {}

    def make(*arguments: object) -> tuple[Path, dict]:
        vision = VisionFormat(*arguments)
        if vision not in known:
            known[vision] = tmp_path_factory.mktemp("vision") / "bundle"
            build(plan_bundle(read_checkpoint(toy_small), "Q4_0", vision=vision), known[vision], SILENT)
        return known[vision], json.loads((known[vision] / REPORT).read_text())

    return make


def rows(folder: Path, image: np.ndarray) -> np.ndarray:
    opened = verify_bundle(folder)
    preprocessor = Preprocessor(opened.manifest.vision, 64)
    return OnnxEncoder(folder / VISION, preprocessor, 1).encode(preprocessor.image(image))


@pytest.mark.parametrize(("kind", "least"), [("f32", 0.999999), ("f16", 0.99999), ("int8", 0.995)])
def test_vision_onnx_in_other_types_gives_the_same_embeddings(made, kind: str, least: float):
    plain, _ = made()
    folder, report = made(kind, "bf16")
    assert report["vision"] == {"vision.onnx": kind, "mmproj.gguf": "bf16"}
    assert (
        report["validation"]["vision_min_cosine"] >= least - 1e-4 and report["validation"]["mmproj_min_cosine"] >= 0.999
    )
    image = toy.toy_image(112, 140, 3)
    a, b = rows(plain, image), rows(folder, image)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() >= least
    if kind == "f32":
        np.testing.assert_array_equal(a, b)  # bf16 weights, computed in float32, are no other numbers
    else:
        assert not np.array_equal(a, b)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in plain.iterdir())


def test_bytes_of_types(made):
    size = {kind: (made(kind, "bf16")[0] / VISION).stat().st_size for kind in ("bf16", "f16", "f32", "int8")}
    assert size["f16"] == size["bf16"]
    weights = size["f32"] - size["bf16"]  # two bytes of each
    assert size["int8"] == pytest.approx(size["bf16"] - weights / 2, rel=0.05)
    eight, sixteen = ((made("bf16", kind)[0] / MMPROJ).stat().st_size for kind in ("q8_0", "bf16"))
    assert eight < 0.7 * sixteen


def test_int8_is_symmetric_with_a_scale_for_each_channel(made, toy_small: Path):
    folder, _ = made("int8", "bf16")
    graph = onnx.load(folder / VISION).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    names = {
        f"vision.{name}": f"vision_tower.{name}"
        for name in ("transformer.layers.0.attention.q_proj.weight", "patch_conv.weight")
    }
    for name, theirs in names.items():
        weight = values(toy_small, theirs)
        scale = np.abs(weight.reshape(len(weight), -1)).max(1) / 127
        assert stored[name].dtype == np.int8 and stored[name].shape == weight.shape
        np.testing.assert_allclose(stored[name + ".scale"], scale, rtol=1e-6)
        back = stored[name] * stored[name + ".scale"].reshape(-1, *[1] * (weight.ndim - 1))
        assert np.abs(back - weight).max() <= 0.5001 * scale.max()
        assert np.abs(stored[name]).max() == 127
    assert stored["vision.ln_pre.weight"].dtype == np.float32  # norms are exact


@pytest.mark.parametrize("kind", ["f16", "q8_0", "f32"])
def test_mmproj_in_other_types_gives_the_same_embeddings(made, kind: str):
    folder, report = made("bf16", kind)
    assert report["validation"]["mmproj_min_cosine"] >= MIN_COSINE[kind]
    types = {tensor.name: tensor.tensor_type.name for tensor in Reader(folder / MMPROJ).tensors}
    assert types["v.blk.0.ffn_up.weight"] == kind.upper()
    assert types["v.patch_embd.weight"] == ("F32" if kind == "f32" else "F16")
    assert types["v.pre_ln.weight"] == "F32"


def test_a_fixed_size_is_the_only_one(made):
    folder, report = made("bf16", "bf16", (84, 140))
    session = onnxruntime.InferenceSession(folder / VISION, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, 3, 84, 140] and session.get_outputs()[0].shape == [3 * 6 - 1, 256]
    opened = verify_bundle(folder)
    assert opened.manifest.vision.fixed == (84, 140)
    for height, width in ((84, 140), (480, 640), (1080, 1920), (64, 64)):
        assert image_grid(height, width, image_request(opened.manifest.vision, 1024)) == (3, 5)
    image = toy.toy_image(84, 140, 3)
    np.testing.assert_allclose(rows(folder, image), rows(made()[0], image), atol=1e-4)
    assert report["validation"]["mmproj_min_cosine"] >= 0.999
    with pytest.raises(Exception, match="84"):
        session.run(None, {"pixel_values": np.zeros((1, 3, 112, 140), np.float32)})


@pytest.mark.parametrize(
    ("sides", "status", "words"),
    [
        ("100x140", 1, ("--fixed: expected sides that are multiples of 28", "found 100x140")),
        ("2800x140", 1, ("up to 1540", "found 2800x140")),
    ],
)
def test_an_impossible_frame_size_is_one_line(run, toy_small: Path, tmp_path: Path, sides, status, words):
    refused(run("build", toy_small, tmp_path / "out", "--fixed", sides), words, status)
    assert not any(tmp_path.iterdir())


def test_an_encoder_with_too_low_a_cosine_is_refused(toy_small: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("quantize.formats.vision_onnx._scales", lambda rows: np.abs(rows).max(1) / np.float32(3))
    with pytest.raises(BuildError, match=r"vision at int8: cosine 0\.\d+ with the reference, expected 0\.98"):
        plan = plan_bundle(read_checkpoint(toy_small), "Q4_0", vision=VisionFormat("int8"))
        build(plan, tmp_path / "out", SILENT)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--vision", "int4"], ["--mmproj", "int8"], ["--fixed", "448"]])
def test_wrong_kinds_end_with_2(run, toy_small: Path, tmp_path: Path, arguments: list[str]):
    status, _, lines = run("build", toy_small, tmp_path / "out", *arguments)
    assert status == 2 and arguments[0] in lines[-1]
