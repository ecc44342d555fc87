"""language.gguf: what llama.cpp computes from it against transformers, and what stands in it against other readers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from quantize.source.checkpoint import interleave
from tests.harness import toy, toy_layout, toy_numbers
from tests.harness.case import Case
from tests.harness.gguf_reading import interleaved, reader, stored, tensors_of, values

CASES = ("bf16_tied", "bf16_untied", "fp8_tied", "fp8_untied", "short_context", "mistral_untied")
IMAGES = ("112x112", "140x196", "224x84")
MAX_ERROR = 0.02  # of logits, relative, as a whole (L2)
CLEAR_LEAD = 0.02  # of the range of logits: where the reference's best leads by less, rounding may choose another


def last_logits(llm, rows: np.ndarray, count: int) -> np.ndarray:
    """Logits of the last `count` positions: (count, vocab) float32."""
    llm.truncate(0, 0)
    start = len(rows) - count
    llm.logits_after_last(np.ascontiguousarray(rows[:start]), 0)
    return np.array(
        [llm.logits_after_last(np.ascontiguousarray(rows[n : n + 1]), n).copy() for n in range(start, len(rows))]
    )


def agree(ours: np.ndarray, reference: np.ndarray) -> None:
    error = np.linalg.norm(ours - reference) / np.linalg.norm(reference)
    assert error <= MAX_ERROR
    assert ours[-1].argmax() == reference[-1].argmax()
    ordered = np.sort(reference, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > CLEAR_LEAD * (ordered[:, -1] - ordered[:, 0])
    assert clear[-1]  # or the line above says nothing
    assert (ours.argmax(1) == reference.argmax(1))[clear].all()


@pytest.mark.parametrize("name", CASES)
def test_text_gives_the_logits_of_transformers(case: Callable[[str], Case], name: str):
    arrays = case(name).arrays
    with case(name).language() as llm:
        ids, reference = arrays["text_ids"].tolist(), arrays["text_logits"]
        agree(last_logits(llm, llm.embed(ids), len(reference)), reference)
        by_token = llm.logits_after_last(ids, 0, sequence=1)  # and the same without rows looked up by us
        assert by_token.argmax() == reference[-1].argmax()
        assert np.linalg.norm(by_token - reference[-1]) <= MAX_ERROR * np.linalg.norm(reference[-1])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", IMAGES)
def test_an_image_and_text_give_the_logits_of_transformers(case: Callable[[str], Case], name: str, size: str):
    from edge_agent.bundle.manifest import VISION, VisionInfo
    from edge_agent.model.preprocess import Preprocessor
    from edge_agent.model.vision_encoder import OnnxEncoder

    arrays = case(name).arrays
    height, width = map(int, size.split("x"))
    preprocessor = Preprocessor(
        VisionInfo(patch=14, merge=2, image_size=1540, mean=toy_layout.PIXEL_MEAN, std=toy_layout.PIXEL_STD),
        max_tokens=256,
    )
    encoder = OnnxEncoder(case(name).converted / VISION, preprocessor, threads=1)
    with case(name).language() as llm:
        ids, reference = arrays[f"{size}_ids"].tolist(), arrays[f"{size}_logits"]
        rows = llm.embed(ids)
        image = encoder.encode(case(name).image(height, width))
        at = ids.index(toy_layout.IMG)
        assert ids[at + len(image)] == toy_layout.IMG_END  # the encoder gives all rows between, breaks included
        rows[at : at + len(image)] = image
        agree(last_logits(llm, rows, len(reference)), reference)


def expected_tensors(folder: Path, tied: bool) -> dict[str, np.ndarray]:
    """What language.gguf must hold for a default toy checkpoint, before any rounding."""
    text = "language_model.model."
    out = {
        "token_embd.weight": values(folder, text + "embed_tokens.weight"),
        "output_norm.weight": values(folder, text + "norm.weight"),
    }
    if not tied:
        out["output.weight"] = values(folder, "language_model.lm_head.weight")
    for n in range(2):
        at = f"{text}layers.{n}."
        out |= {
            f"blk.{n}.attn_norm.weight": values(folder, at + "input_layernorm.weight"),
            f"blk.{n}.attn_q.weight": interleaved(values(folder, at + "self_attn.q_proj.weight"), 4),
            f"blk.{n}.attn_k.weight": interleaved(values(folder, at + "self_attn.k_proj.weight"), 2),
            f"blk.{n}.attn_v.weight": values(folder, at + "self_attn.v_proj.weight"),
            f"blk.{n}.attn_output.weight": values(folder, at + "self_attn.o_proj.weight"),
            f"blk.{n}.ffn_norm.weight": values(folder, at + "post_attention_layernorm.weight"),
            f"blk.{n}.ffn_gate.weight": values(folder, at + "mlp.gate_proj.weight"),
            f"blk.{n}.ffn_up.weight": values(folder, at + "mlp.up_proj.weight"),
            f"blk.{n}.ffn_down.weight": values(folder, at + "mlp.down_proj.weight"),
        }
    return out


ROUND = {  # --type -> float32 to the nearest number of that type, back in float32
    "bf16": lambda x: toy_numbers.from_bf16_bits(toy_numbers.bf16_bits(x)),
    "f16": lambda x: x.astype(np.float16).astype(np.float32),
    "f32": lambda x: x,
}


@pytest.mark.parametrize("kind", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("source", ["toy_bf16", "toy_fp8"])
def test_every_tensor_has_its_name_type_shape_and_values(source: str, kind: str, convert, request):
    folder = request.getfixturevalue(source)
    path = convert(folder, kind) / "language.gguf"
    expected = expected_tensors(folder, tied=source == "toy_bf16")
    found = tensors_of(path)
    assert found.keys() == expected.keys()
    types = {tensor.name: tensor.tensor_type.name for tensor in reader(path).tensors}
    for name, value in expected.items():
        assert types[name] == ("F32" if value.ndim == 1 else kind.upper()), name
        np.testing.assert_array_equal(found[name], ROUND[kind](value) if value.ndim > 1 else value, err_msg=name)


def test_metadata_is_what_llama_cpps_architecture_reads(tmp_path: Path):
    from quantize import build
    from quantize.formats.build_plan import plan_conversion
    from quantize.progress import SILENT
    from quantize.source import checkpoint

    # Every number is different, so that none can take the place of another.
    shape = {"hidden": 512, "layers": 3, "heads": 6, "kv_heads": 2, "head_dim": 128, "ffn": 768, "vocab": 2304}
    folder = toy.write_checkpoint(tmp_path / "odd", original_context=4096, rope_theta=1e9, **shape)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 2e-5
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }} é", encoding="utf-8")
    build.convert(plan_conversion(checkpoint.read_checkpoint(folder), "bf16"), tmp_path / "out", SILENT)
    fields = reader(tmp_path / "out" / "language.gguf").fields
    found = {key: field.contents() for key, field in fields.items()}
    expected = {
        "general.architecture": "mistral3",
        "general.type": "model",
        "general.file_type": 32,  # LLAMA_FTYPE_MOSTLY_BF16
        "mistral3.vocab_size": 2304,
        "mistral3.context_length": 16 * 4096,
        "mistral3.embedding_length": 512,
        "mistral3.block_count": 3,
        "mistral3.feed_forward_length": 768,
        "mistral3.attention.head_count": 6,
        "mistral3.attention.head_count_kv": 2,
        "mistral3.attention.key_length": 128,
        "mistral3.attention.value_length": 128,
        "mistral3.attention.layer_norm_rms_epsilon": 2e-5,
        "mistral3.attention.temperature_scale": 0.1,
        "mistral3.rope.dimension_count": 128,
        "mistral3.rope.freq_base": 1e9,
        "mistral3.rope.scaling.type": "yarn",
        "mistral3.rope.scaling.factor": 16.0,
        "mistral3.rope.scaling.original_context_length": 4096,
        "mistral3.rope.scaling.yarn_beta_fast": 32.0,
        "mistral3.rope.scaling.yarn_beta_slow": 1.0,
        "mistral3.rope.scaling.yarn_log_multiplier": 1.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tekken",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 11,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ messages }} é",
    }
    for key, value in expected.items():
        assert found.get(key) == (pytest.approx(value, rel=1e-7) if isinstance(value, float) else value), key
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == 2304


def test_rotary_rows_worked_out_by_hand():
    """Two heads of six rows: a0 a1 a2 b0 b1 b2 -> a0 b0 a1 b1 a2 b2, in each head."""
    rows = np.arange(12)[:, None] * np.ones((1, 2), int)
    turned = interleave(rows, rows_per_head=6)
    assert turned[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert (turned[:, 0] == turned[:, 1]).all()


def test_the_size_of_blocks_does_not_change_a_file(toy_fp8: Path, convert, tmp_path: Path, monkeypatch):
    from quantize import build
    from quantize.formats.build_plan import plan_conversion
    from quantize.progress import SILENT
    from quantize.source import checkpoint

    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 5000)  # five rows of 256, fewer than one head has
    build.convert(plan_conversion(checkpoint.read_checkpoint(toy_fp8), "bf16"), tmp_path / "out", SILENT)
    for name in ("language.gguf", "mmproj.gguf", "vision.onnx"):
        assert (tmp_path / "out" / name).read_bytes() == (convert(toy_fp8) / name).read_bytes()


# -- the same weights in another layout -------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["both", "tokenizer"])
def test_the_form_of_the_tokenizer_does_not_change_the_files(tokenizer: str, toy_bf16: Path, convert, tmp_path: Path):
    other, plain = convert(toy.write_checkpoint(tmp_path / "toy", tokenizer=tokenizer)), convert(toy_bf16)
    for name in ("language.gguf", "mmproj.gguf", "vision.onnx"):
        assert (other / name).read_bytes() == (plain / name).read_bytes(), name


def test_an_untied_head_changes_no_other_tensor(toy_bf16: Path, convert, tmp_path: Path):
    tied = tensors_of(convert(toy_bf16) / "language.gguf")
    untied = tensors_of(convert(toy.write_checkpoint(tmp_path / "untied", tied=False)) / "language.gguf")
    assert untied.keys() - tied.keys() == {"output.weight"}
    for name, value in tied.items():
        np.testing.assert_array_equal(untied[name], value, err_msg=name)


def test_a_head_is_ignored_with_a_reason_when_the_configuration_ties_it(toy_bf16: Path, convert, tmp_path: Path):
    from quantize.source import checkpoint

    folder = toy.write_checkpoint(tmp_path / "both", tied=False)
    shutil.copy(toy_bf16 / "config.json", folder / "config.json")  # says tied, the file has a head all the same
    assert "language_model.lm_head.weight" in checkpoint.read_checkpoint(folder).ignored
    assert (convert(folder) / "language.gguf").read_bytes() == (convert(toy_bf16) / "language.gguf").read_bytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_checkpoints_saved_in_other_float_types(dtype: type, toy_bf16: Path, convert, tmp_path: Path):
    folder = tmp_path / "again"
    shutil.copytree(toy_bf16, folder)
    entries, data, at = {}, [], 0
    for name, (_, shape, _raw) in stored(toy_bf16).items():
        raw = values(toy_bf16, name).astype(dtype).tobytes()
        word = {np.float32: "F32", np.float16: "F16"}.get(dtype, "BF16")
        entries[name] = {"dtype": word, "shape": shape, "data_offsets": [at, at + len(raw)]}
        data.append(raw)
        at += len(raw)
    head = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + b"".join(data))
    ours, plain = (tensors_of(convert(f) / "language.gguf") for f in (folder, toy_bf16))
    for name, value in plain.items():
        np.testing.assert_allclose(
            ours[name], value, rtol=2**-8, atol=1e-6, err_msg=name
        )  # float16 has no small numbers
