"""vision.onnx and mmproj.gguf: their rows against transformers and each other, and the files against other readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_agent.bundle.manifest import MMPROJ, VISION, VisionInfo
from edge_agent.model.onnx_runtime import onnxruntime
from edge_agent.model.preprocess import Preprocessor
from edge_agent.model.vision_encoder import MtmdEncoder, OnnxEncoder
from tests.harness import toy, toy_layout
from tests.harness.case import Case
from tests.harness.gguf_reading import interleaved, reader, stored, tensors_of, values

CASES = ("bf16_tied", "bf16_untied", "fp8_tied", "fp8_untied", "short_context")
IMAGES = ("112x112", "140x196", "224x84")
MIN_COSINE = 0.999


def preprocessor() -> Preprocessor:
    return Preprocessor(
        VisionInfo(patch=14, merge=2, image_size=1540, mean=toy_layout.PIXEL_MEAN, std=toy_layout.PIXEL_STD),
        max_tokens=256,
    )


def onnx_rows(case: Case, image: np.ndarray) -> np.ndarray:
    return OnnxEncoder(case.converted / VISION, preprocessor(), threads=1).encode(image)


def mtmd_rows(case: Case, image: np.ndarray) -> np.ndarray:
    """Through llama.cpp; the break rows come from the embedding table, as in the runtime."""
    with case.language() as llm:
        breaks = llm.embed([toy_layout.IMG_BREAK])[0]
        encoder = MtmdEncoder(case.converted / MMPROJ, llm.model, breaks, 28, threads=1, gpu=False)
        rows = encoder.encode(image).copy()
        encoder.close()
        return rows


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", IMAGES)
def test_rows_are_those_of_transformers_in_both_encoders(case: Callable[[str], Case], name: str, size: str):
    height, width = map(int, size.split("x"))
    lines, columns = height // 28, width // 28
    image, features = case(name).image(height, width), case(name).arrays[f"{size}_features"]
    by_onnx, by_mtmd = onnx_rows(case(name), image), mtmd_rows(case(name), image)
    assert by_onnx.shape == by_mtmd.shape == (lines * columns + lines - 1, 256)
    assert len(features) == lines * columns
    breaks = np.arange(len(by_onnx)) % (columns + 1) == columns
    assert cosines(by_onnx[~breaks], features).min() >= MIN_COSINE
    assert cosines(by_mtmd[~breaks], features).min() >= MIN_COSINE
    assert cosines(by_onnx, by_mtmd).min() >= MIN_COSINE
    # Cosines do not see lengths, and the language model does.
    for rows in (by_onnx, by_mtmd):
        assert np.linalg.norm(rows[~breaks] - features) <= 0.02 * np.linalg.norm(features)


@pytest.mark.parametrize(("lines", "columns"), [(1, 9), (9, 1), (2, 4), (13, 7)])
def test_both_encoders_agree_on_strips_and_odd_grids(case: Callable[[str], Case], lines: int, columns: int):
    image = case("bf16_tied").image(28 * lines, 28 * columns)
    by_onnx, by_mtmd = onnx_rows(case("bf16_tied"), image), mtmd_rows(case("bf16_tied"), image)
    assert by_onnx.shape == by_mtmd.shape == (lines * columns + lines - 1, 256)
    assert cosines(by_onnx, by_mtmd).min() >= MIN_COSINE


@pytest.mark.parametrize("name", CASES)
def test_break_rows_are_the_embedding_of_img_break_to_the_bit(case: Callable[[str], Case], name: str):
    folder = case(name).checkpoint
    embedding = values(folder, "language_model.model.embed_tokens.weight")[toy_layout.IMG_BREAK]
    rows = onnx_rows(case(name), case(name).image(140, 196))
    assert (rows == embedding).all(1).nonzero()[0].tolist() == [7, 15, 23, 31]
    np.testing.assert_array_equal(tensors_of(case(name).converted / MMPROJ)["v.token_embd.img_break"], embedding)


# -- vision.onnx ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(toy_bf16: Path, convert: Callable[..., Path]) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(convert(toy_bf16) / VISION, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("kind", ["bf16", "f16", "f32"])
def test_onnx_is_valid_and_old_enough_for_onnxruntime_1_20(toy_bf16: Path, convert: Callable[..., Path], kind: str):
    path = convert(toy_bf16, kind) / VISION
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert [(opset.domain, opset.version <= 21) for opset in model.opset_import] == [("", True)]
    assert model.ir_version <= 10
    (pixels,), (rows,) = model.graph.input, model.graph.output
    shape = [dim.dim_param or dim.dim_value for dim in pixels.type.tensor_type.shape.dim]
    assert (pixels.name, shape) == ("pixel_values", [1, 3, "H", "W"])
    assert pixels.type.tensor_type.elem_type == rows.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert rows.name == "rows" and rows.type.tensor_type.shape.dim[1].dim_value == 256
    assert not any(tensor.external_data for tensor in model.graph.initializer)


@pytest.mark.parametrize(
    ("lines", "columns"), [(1, 1), (1, 2), (2, 1), (1, 9), (9, 1), (3, 3), (2, 5), (5, 2), (16, 16), (11, 23)]
)
def test_rows_of_any_size(session: onnxruntime.InferenceSession, toy_bf16: Path, lines: int, columns: int):
    pixels = np.random.default_rng(0).standard_normal((1, 3, 28 * lines, 28 * columns), dtype=np.float32)
    (rows,) = session.run(None, {"pixel_values": pixels})
    assert rows.shape == (lines * columns + lines - 1, 256) and np.isfinite(rows).all()
    embedding = values(toy_bf16, "language_model.model.embed_tokens.weight")[toy_layout.IMG_BREAK]
    where = (rows == embedding).all(1).nonzero()[0].tolist()
    assert where == [(columns + 1) * (line + 1) - 1 for line in range(lines - 1)]


def test_the_same_weights_at_f16_and_f32_give_the_same_rows(toy_bf16: Path, convert: Callable[..., Path]):
    pixels = np.random.default_rng(1).standard_normal((1, 3, 84, 112), dtype=np.float32)
    rows = {}
    for kind in ("bf16", "f16", "f32"):
        path = convert(toy_bf16, kind) / VISION
        loaded = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (rows[kind],) = loaded.run(None, {"pixel_values": pixels})
    np.testing.assert_allclose(rows["bf16"], rows["f32"], rtol=1e-4, atol=1e-5)  # the source is bf16: nothing is lost
    np.testing.assert_allclose(rows["f16"], rows["f32"], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("source", ["toy_bf16", "toy_fp8"])
def test_initializers_are_the_bytes_of_the_checkpoint(source: str, convert: Callable[..., Path], request):
    folder = request.getfixturevalue(source)
    expected = {
        name.replace("vision_tower.", "vision.").replace("multi_modal_projector.", "projector."): tensor
        for name, tensor in stored(folder).items()
        if name.startswith(("vision_tower.", "multi_modal_projector."))
    }
    model = onnx.load(convert(folder) / VISION)
    found = {tensor.name: tensor for tensor in model.graph.initializer if not tensor.name.startswith("c_")}
    assert found.keys() == expected.keys()
    for name, (kind, shape, raw) in expected.items():
        assert (kind, found[name].data_type) == ("BF16", onnx.TensorProto.BFLOAT16)
        assert (tuple(found[name].dims), found[name].raw_data) == (shape, raw), name


def test_the_file_has_the_description_of_a_row(toy_bf16: Path, convert: Callable[..., Path]):
    model = onnx.load(convert(toy_bf16) / VISION)
    assert {entry.key: entry.value for entry in model.metadata_props} == {"patch": "14", "merge": "2"}


# -- mmproj.gguf ------------------------------------------------------------------------------------------------------


def expected_mmproj(folder: Path, heads: int) -> dict[str, np.ndarray]:
    """What mmproj.gguf must hold for a toy of two vision layers, before any rounding."""
    out = {
        "v.patch_embd.weight": values(folder, "vision_tower.patch_conv.weight"),
        "v.pre_ln.weight": values(folder, "vision_tower.ln_pre.weight"),
        "mm.input_norm.weight": values(folder, "multi_modal_projector.norm.weight"),
        "mm.patch_merger.weight": values(folder, "multi_modal_projector.patch_merger.merging_layer.weight"),
        "mm.1.weight": values(folder, "multi_modal_projector.linear_1.weight"),
        "mm.2.weight": values(folder, "multi_modal_projector.linear_2.weight"),
        "v.token_embd.img_break": values(folder, "language_model.model.embed_tokens.weight")[toy_layout.IMG_BREAK],
    }
    for n in range(2):
        at, to = f"vision_tower.transformer.layers.{n}.", f"v.blk.{n}."
        out |= {
            to + "ln1.weight": values(folder, at + "attention_norm.weight"),
            to + "attn_q.weight": interleaved(values(folder, at + "attention.q_proj.weight"), heads),
            to + "attn_k.weight": interleaved(values(folder, at + "attention.k_proj.weight"), heads),
            to + "attn_v.weight": values(folder, at + "attention.v_proj.weight"),
            to + "attn_out.weight": values(folder, at + "attention.o_proj.weight"),
            to + "ln2.weight": values(folder, at + "ffn_norm.weight"),
            to + "ffn_gate.weight": values(folder, at + "feed_forward.gate_proj.weight"),
            to + "ffn_up.weight": values(folder, at + "feed_forward.up_proj.weight"),
            to + "ffn_down.weight": values(folder, at + "feed_forward.down_proj.weight"),
        }
    return out


@pytest.mark.parametrize("kind", ["bf16", "f16", "f32"])
def test_mmproj_tensors_have_their_names_types_and_values(toy_fp8: Path, convert: Callable[..., Path], kind: str):
    expected = expected_mmproj(toy_fp8, heads=2)
    path = convert(toy_fp8, kind) / MMPROJ
    types = {tensor.name: tensor.tensor_type.name for tensor in reader(path).tensors}
    found = tensors_of(path)
    assert found.keys() == expected.keys()
    # llama.cpp's convolution takes no bfloat16.
    wide = ("v.patch_embd.weight", "mm.patch_merger.weight") if kind == "bf16" else ()
    for name, value in expected.items():
        assert types[name] == ("F32" if value.ndim == 1 or name in wide else kind.upper()), name
        rounded = value.astype(np.float16) if kind == "f16" and value.ndim > 1 else value
        np.testing.assert_array_equal(found[name], rounded.astype(np.float32), err_msg=name)


def test_sizes_that_need_padding(convert: Callable[..., Path], tmp_path: Path):
    """GGUF begins every tensor at a multiple of 32 bytes; here a vector is 176 long."""
    folder = toy.write_checkpoint(tmp_path / "odd", vocab=2048, vision_hidden=44, vision_heads=1, vision_ffn=52)
    expected, found = expected_mmproj(folder, heads=1), tensors_of(convert(folder) / MMPROJ)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_mmproj_metadata_is_what_llama_cpps_clip_reads(tmp_path: Path):
    from quantize import build
    from quantize.formats.build_plan import plan_conversion
    from quantize.progress import SILENT
    from quantize.source.checkpoint import read_checkpoint

    folder = toy.write_checkpoint(
        tmp_path / "odd", vocab=2048, hidden=512, vision_hidden=192, vision_layers=3, vision_heads=6, vision_ffn=320
    )
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["image_size"] = 1120
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("processor_config.json", "preprocessor_config.json"):
        processor = json.loads((folder / name).read_text())
        values = processor.get("image_processor", processor)
        values |= {"image_mean": [0.5, 0.25, 0.125], "image_std": [0.75, 0.625, 0.375]}
        (folder / name).write_text(json.dumps(processor))
    build.convert(plan_conversion(read_checkpoint(folder), "bf16"), tmp_path / "out", SILENT)
    fields = reader(tmp_path / "out" / MMPROJ).fields
    expected = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "pixtral",
        "clip.use_silu": True,
        "clip.vision.projection_dim": 512,
        "clip.vision.image_size": 1120,
        "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": 192,
        "clip.vision.feed_forward_length": 320,
        "clip.vision.block_count": 3,
        "clip.vision.attention.head_count": 6,
        "clip.vision.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "clip.vision.spatial_merge_size": 2,
        "clip.vision.image_mean": [0.5, 0.25, 0.125],
        "clip.vision.image_std": [0.75, 0.625, 0.375],
    }
    found = {key: field.contents() for key, field in fields.items()}
    for key, value in expected.items():
        assert found.get(key) == value, key
