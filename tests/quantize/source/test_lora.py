"""PEFT adapters: merged while building, or as a GGUF adapter that is switched at run time. Held against arithmetic."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_agent.bundle import signing
from edge_agent.bundle.lora_check import verify_adapters
from edge_agent.bundle.manifest import LANGUAGE, MMPROJ, REPORT, VISION, EmbeddingInfo, read_manifest
from edge_agent.config import load_config_text
from edge_agent.errors import ConfigError
from edge_agent.model.llama import ACTION_SEQ, LlamaContext, LlamaOptions
from quantize.build import convert
from quantize.build_folder import BuildError
from quantize.formats.build_plan import plan_conversion
from quantize.progress import SILENT
from quantize.source.checkpoint import read_checkpoint
from quantize.source.hf_config import CheckpointError
from quantize.source.lora import merged, read_adapter, write_adapter
from tests.harness import toy, toy_layout
from tests.harness.gguf_reading import Reader, interleaved, tensors_of, values
from tests.harness.quantize_cli import refused

HIDDEN, FFN = 256, 512  # of toy_bf16
TEXT = "model.language_model.layers.{n}."
GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEADS = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}
Matrices = dict[str, tuple[np.ndarray, np.ndarray]]  # module -> (A, B)


def sums(made: Matrices, scale: float | dict[str, float]) -> dict[str, np.ndarray]:
    """What is added to each matrix, by GGUF name and in its order of rows."""
    found = {}
    for module, (a, b) in made.items():
        n, _, part = module.partition("layers.")[2].partition(".")
        delta = (scale if isinstance(scale, float) else scale[module]) * (b.astype(np.float64) @ a)
        if part in HEADS:
            delta = interleaved(delta, HEADS[part])
        found[f"blk.{n}.{GGUF[part]}.weight"] = delta
    return found


def assert_merged(base: Path, merged: Path, added: dict[str, np.ndarray]) -> None:
    before, after = tensors_of(base / LANGUAGE), tensors_of(merged / LANGUAGE)
    assert before.keys() == after.keys() and added.keys() <= before.keys()
    for name, matrix in after.items():
        if name not in added:
            np.testing.assert_array_equal(matrix, before[name])
            continue
        assert np.abs(added[name]).max() > 0.02
        np.testing.assert_allclose(matrix, before[name] + added[name], rtol=2**-8, atol=1e-6, err_msg=name)


def merge(folder: Path, adapter: Path, out: Path, kind: str = "bf16") -> Path:
    found = read_checkpoint(folder)
    convert(plan_conversion(merged(found, read_adapter(adapter, found)), kind), out, SILENT)
    return out


@pytest.mark.parametrize("layout", ["hf", "consolidated"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_merging_adds_scaled_products(tmp_path: Path, plain, convert, dtype: str, layout: str):
    folder = toy.write_checkpoint(tmp_path / "base", dtype=dtype, layout=layout)
    assert_merged(convert(folder, "f32"), merge(folder, plain[0], tmp_path / "merged"), sums(plain[1], 2.0))


def test_ranks_and_scales_may_differ_by_module(tmp_path: Path, toy_bf16: Path, convert):
    q, down = TEXT.format(n=0) + "self_attn.q_proj", TEXT.format(n=1) + "mlp.down_proj"
    made = toy.write_adapter(
        tmp_path / "adapter", rank={q: 9}, use_rslora=True, rank_pattern={r"layers\.0\.self_attn\.q_proj": 9},
        alpha_pattern={"down_proj": 3},
    )  # fmt: skip
    scale = dict.fromkeys(made, 8 / 2) | {q: 8 / 3}
    scale |= {module: 3 / 2 for module in made if "down_proj" in module}
    assert scale[down] == 1.5
    assert_merged(
        convert(toy_bf16, "f32"), merge(toy_bf16, tmp_path / "adapter", tmp_path / "merged"), sums(made, scale)
    )
    found = read_checkpoint(toy_bf16)
    adapter = read_adapter(tmp_path / "adapter", found)
    assert adapter.ranks == (4, 9)
    write_adapter(adapter, found, tmp_path / "a.gguf", SILENT)
    file = Reader(tmp_path / "a.gguf")
    assert file.fields["adapter.lora.alpha"].contents() == 0  # llama.cpp would divide by the rank; ours are inside
    b = next(tensor.data for tensor in file.tensors if tensor.name == "blk.0.attn_q.weight.lora_b")
    np.testing.assert_allclose(b, interleaved(made[q][1], 4) * 8 / 3, rtol=1e-6)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model."])
def test_names_of_any_transformers_release(tmp_path: Path, toy_bf16: Path, prefix: str):
    toy.write_adapter(tmp_path / "adapter", {f"{prefix}layers.1.mlp.up_proj": (FFN, HIDDEN)})
    assert list(read_adapter(tmp_path / "adapter", read_checkpoint(toy_bf16)).deltas) == [
        "text.layers.1.mlp.up_proj.weight"
    ]


def test_vision_and_embedding_adapters_are_merged_and_cannot_be_switched(tmp_path: Path, convert):
    folder = toy.write_checkpoint(tmp_path / "base", tied=False)
    vision = "model.vision_tower.transformer.layers.1.attention.k_proj"
    made = toy.write_adapter(tmp_path / "eyes", {vision: (128, 128)})
    merged, base = merge(folder, tmp_path / "eyes", tmp_path / "merged"), convert(folder)
    a, b = made[vision]
    before, after = (tensors_of(out / MMPROJ)["v.blk.1.attn_k.weight"] for out in (base, merged))
    np.testing.assert_allclose(after, before + interleaved(2 * b @ a, 2), rtol=2**-8, atol=1e-6)
    assert (merged / VISION).read_bytes() != (base / VISION).read_bytes()

    # PEFT's embedding: A (rank, vocabulary), B (hidden, rank)
    names = ("lora_embedding_A", "lora_embedding_B")
    module = "model.language_model.embed_tokens"
    a, b = toy.write_adapter(tmp_path / "words", {module: (HIDDEN, 4096)}, names=names)[module]
    merged = merge(folder, tmp_path / "words", tmp_path / "words merged")
    expected = values(folder, "language_model.model.embed_tokens.weight") + 2 * (b @ a).T
    np.testing.assert_allclose(tensors_of(merged / LANGUAGE)["token_embd.weight"], expected, rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(
        tensors_of(merged / MMPROJ)["v.token_embd.img_break"], expected[toy_layout.IMG_BREAK], rtol=1e-6
    )
    found = read_checkpoint(folder)
    for name, part in (("eyes", "the vision encoder"), ("words", "the embedding table")):
        with pytest.raises(CheckpointError, match=f"changes {part}, which cannot be switched"):
            write_adapter(read_adapter(tmp_path / name, found), found, tmp_path / "out.gguf", SILENT)
    assert not (tmp_path / "out.gguf").exists()


# -- at run time -------------------------------------------------------------------------------------------------------


def opened(folder: Path, **adapter_files: str) -> LlamaContext:
    path = folder / LANGUAGE
    table = next(tensor for tensor in Reader(path).tensors if tensor.name == "token_embd.weight")
    embedding = EmbeddingInfo(
        offset=table.data_offset, ggml_type=table.tensor_type.name, row_bytes=table.n_bytes // int(table.shape[1])
    )
    config = LlamaOptions(context=512, threads=1, gpu_layers=0, adapters=adapter_files)
    return LlamaContext(path, config, embedding)


def say(llm: LlamaContext, tokens: list[int]) -> np.ndarray:
    llm.truncate(ACTION_SEQ, 0)
    return llm.logits_after_last(tokens, 0).copy()


def test_the_file_is_what_llama_cpp_expects(plain, switchable: Path):
    file = Reader(switchable)
    metadata = {key: field.contents() for key, field in file.fields.items()}
    assert (metadata["general.type"], metadata["adapter.type"]) == ("adapter", "lora")
    assert metadata["adapter.lora.alpha"] == 8.0
    tensors = {tensor.name: tensor.data for tensor in file.tensors}
    assert len(tensors) == 2 * len(plain[1]) and all(matrix.dtype == np.float32 for matrix in tensors.values())
    for module, (a, b) in plain[1].items():
        n, _, part = module.partition("layers.")[2].partition(".")
        at = f"blk.{n}.{GGUF[part]}.weight"
        np.testing.assert_array_equal(tensors[at + ".lora_a"], a)
        np.testing.assert_array_equal(tensors[at + ".lora_b"], interleaved(b, HEADS[part]) if part in HEADS else b)


def test_switched_on_it_answers_as_the_merged_model_and_off_as_the_base(
    plain, switchable: Path, toy_bf16: Path, convert, tmp_path: Path
):
    tokens = [1, *range(1100, 1140)]
    with opened(merge(toy_bf16, plain[0], tmp_path / "merged", "f32")) as llm:
        merged = say(llm, tokens)
    with opened(convert(toy_bf16, "f32")) as llm:
        base = say(llm, tokens)
    with opened(convert(toy_bf16, "f32"), plain=str(switchable)) as llm:
        off = say(llm, tokens)
        llm.set_adapter("plain")
        on = say(llm, tokens)
        llm.set_adapter("")
        off_again = say(llm, tokens)
    np.testing.assert_array_equal(off, base)
    np.testing.assert_array_equal(off_again, base)
    far, near = np.abs(merged - base).max(), np.abs(on - merged).max()
    assert far > 5 and near < 0.005 * far, (
        near,
        far,
    )  # the cache holds float16: sums in another order, other roundings


# -- what is refused ---------------------------------------------------------------------------------------------------

UP = TEXT.format(n=1) + "mlp.up_proj"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"peft_type": "LOHA"}, r"adapter_config\.json: peft_type: expected 'LORA', found 'LOHA'"),
        ({"use_dora": True}, "use_dora: expected it not to be set, found 'True'"),
        ({"bias": "all"}, "bias: expected 'none', found 'all'"),
        ({"r": 8}, r"expected rank 8 by .*adapter_config\.json, found lora_A \(4, 256\) and lora_B \(512, 4\)"),
        ({"r": 0}, "r: expected a number above 0, found 0"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a number above 0, found '8'"),
        ({"rank_pattern": [3]}, r"rank_pattern: expected module -> number, found \[3\]"),
        ({"modules": {UP: (FFN, 512)}}, r"made for a matrix of shape \(512, 512\), but .* has \(512, 256\) there"),
        ({"modules": {TEXT.format(n=7) + "mlp.up_proj": (FFN, HIDDEN)}}, "it has 2 layers; give its own base"),
        ({"modules": {"model.language_model.layers.0.mlp.experts": (8, 8)}}, "has no place for it: no such matrix"),
        ({"modules": {"lm_head": (4096, HIDDEN)}}, "its output head is the embedding table"),
        ({"modules": {"model.vision_tower.patch_conv": (128, 588)}}, "expected a matrix, .* has shape"),
        ({"extra": ("base_model.model.lm_head.weight",)}, r"lm_head\.weight: expected only low-rank matrices"),
        ({"extra": (f"base_model.model.{UP}.lora_magnitude_vector",)}, "expected only low-rank matrices"),
        ({"names": ("lora_A.weight", "lora_A.default.weight")}, "expected lora_A and lora_B"),
        ({"names": ("lora_embedding_A", "lora_embedding_B")}, "only embeddings have lora_embedding matrices"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_model_is_refused(tmp_path: Path, toy_bf16: Path, arguments: dict, words: str):
    toy.write_adapter(tmp_path / "adapter", **({"modules": {UP: (FFN, HIDDEN)}} | arguments))
    with pytest.raises(CheckpointError, match=words):
        read_adapter(tmp_path / "adapter", read_checkpoint(toy_bf16))


@pytest.mark.parametrize(
    "init", ["pissa", "PiSSA", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "newer", 1, ["pissa"]]
)
def test_an_adapter_whose_training_changed_the_base_is_refused(tmp_path: Path, toy_bf16: Path, init: object):
    toy.write_adapter(tmp_path, {UP: (FFN, HIDDEN)}, init_lora_weights=init)
    with pytest.raises(CheckpointError, match=r"init_lora_weights: expected true, .*path_initial_model_for_weight"):
        read_adapter(tmp_path, read_checkpoint(toy_bf16))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "Gaussian", "orthogonal", "eva", "EVA", "true"])
def test_an_adapter_whose_training_kept_the_base_is_taken(tmp_path: Path, toy_bf16: Path, init: object):
    unset = {"use_dora": False, "layer_replication": None, "loftq_config": {}, "target_parameters": [], "future": ""}
    toy.write_adapter(tmp_path, {UP: (FFN, HIDDEN)}, init_lora_weights=init, eva_config={"rho": 2}, **unset)
    assert len(read_adapter(tmp_path, read_checkpoint(toy_bf16)).deltas) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("alora_invocation_tokens", [1]),
        ("layer_replication", [[0, 2]]),
        ("use_qalora", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [7]),
        ("target_parameters", ["experts"]),
        ("loftq_config", {"loftq_bits": 4}),
        ("corda_config", {"a": 1}),
        ("arrow_config", {"a": 1}),
        ("ensure_weight_tying", True),
        ("a_key_of_next_year", 3),
    ],
)
def test_a_key_that_is_not_known_and_set_is_named(tmp_path: Path, toy_bf16: Path, key: str, value: object):
    toy.write_adapter(tmp_path, {UP: (FFN, HIDDEN)}, **{key: value})
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {key}: expected it not to be set, found "):
        read_adapter(tmp_path, read_checkpoint(toy_bf16))


@pytest.mark.parametrize(("key", "value"), [("bias", "all"), ("use_rslora", "false"), ("use_rslora", 1)])
def test_a_value_that_is_not_known_is_named(tmp_path: Path, toy_bf16: Path, key: str, value: object):
    toy.write_adapter(tmp_path, {UP: (FFN, HIDDEN)}, **{key: value})
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {key}: expected "):
        read_adapter(tmp_path, read_checkpoint(toy_bf16))


def test_what_is_not_an_adapter_is_refused(tmp_path: Path, toy_bf16: Path):
    found = read_checkpoint(toy_bf16)
    with pytest.raises(CheckpointError, match=r"a checkpoint; make a bundle .*expected the folder that PEFT saved"):
        read_adapter(toy_bf16, found)
    toy.write_adapter(tmp_path, {UP: (FFN, HIDDEN)})
    weights = tmp_path / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-2:] = b"\xff\x7f"  # a NaN
    weights.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"lora_B\.weight: holds NaN or infinity"):
        read_adapter(tmp_path, found)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"missing \(a pickle is not read\)"):
        read_adapter(tmp_path, found)


def test_the_command(tmp_path: Path, plain, toy_bf16: Path, run: Callable):
    adapter, out = shutil.copytree(plain[0], tmp_path / "adapter"), tmp_path / "out.gguf"
    refused(run("lora", adapter, out), ("which is not a folder here",), 2)
    table = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(table | {"base_model_name_or_path": str(toy_bf16)}))
    status, made, lines = run("lora", adapter, out)
    assert status == 0 and "14 matrices of rank 4 for ministral3" in made, lines
    before = out.read_bytes()
    refused(run("lora", adapter, out), ("exists",))
    assert run("lora", adapter, out, "--base", toy_bf16, "--force")[0] == 0
    assert out.read_bytes() == before and not list(tmp_path.glob("*.part"))
    status, _, lines = run("build", toy_bf16, tmp_path / "bundle", "--merge", adapter, "--recipe", "Q8_0")
    assert status == 0, lines
    report = json.loads((tmp_path / "bundle" / REPORT).read_text())
    assert report["merged"] == {"adapter": "adapter", "matrices": 14, "ranks": [4]}
    manifest = read_manifest(tmp_path / "bundle").manifest
    assert {"adapter_model.safetensors", "adapter_config.json"} <= manifest.source_sha256.keys()


# -- on the device -----------------------------------------------------------------------------------------------------


def test_an_adapter_is_checked_before_native_code_loads_it(
    tmp_path: Path, switchable: Path, toy_bundle: Path, toy_bf16: Path, plain
):
    served = read_manifest(toy_bundle)
    verify_adapters({"plain": str(switchable)}, served, ())
    language_file = shutil.copy(toy_bundle / LANGUAGE, tmp_path / "model.gguf")
    found = read_checkpoint(toy_bf16)
    wide = toy.write_checkpoint(tmp_path / "wide", ffn=1024)
    toy.write_adapter(tmp_path / "other", {UP: (1024, HIDDEN)})
    other = read_checkpoint(wide)
    write_adapter(read_adapter(tmp_path / "other", other), other, tmp_path / "other.gguf", SILENT)
    assert other.size != found.size
    (tmp_path / "cut.gguf").write_bytes(switchable.read_bytes()[:-4096])
    (tmp_path / "link.gguf").symlink_to(switchable)
    for file, words in (
        (language_file, "general.type: expected 'adapter', found 'model'"),
        (tmp_path / "other.gguf", f"made for ministral3 {other.size}, the bundle is ministral3 {found.size}"),
        (tmp_path / "cut.gguf", "ends after the end of the file"),
        (tmp_path / "link.gguf", "plain file"),
        (tmp_path / "none.gguf", "No such file"),
    ):
        with pytest.raises(ConfigError, match=rf"language\.adapters: x: .*{words}"):
            verify_adapters({"x": str(file)}, served, ())


def test_with_trusted_keys_an_adapter_must_be_signed(tmp_path: Path, plain, toy_bf16: Path, toy_bundle: Path):
    served, found = read_manifest(toy_bundle), read_checkpoint(toy_bf16)
    adapter, out = read_adapter(plain[0], found), tmp_path / "a.gguf"
    public = str(signing.keygen(tmp_path / "key"))
    write_adapter(adapter, found, out, SILENT, tmp_path / "key")
    verify_adapters({"a": str(out)}, served, (public,))
    raw = bytearray(out.read_bytes())
    raw[-5] ^= 1
    out.write_bytes(raw)
    with pytest.raises(ConfigError, match="not signed by any key"):
        verify_adapters({"a": str(out)}, served, (public,))
    write_adapter(adapter, found, out, SILENT)  # unsigned: the old signature goes too
    with pytest.raises(ConfigError, match=r"a\.gguf\.sig: No such file"):
        verify_adapters({"a": str(out)}, served, (public,))
    verify_adapters({"a": str(out)}, served, ())


def test_an_adapter_that_llama_cpp_refuses_is_a_line(tmp_path: Path, switchable: Path, convert, toy_bf16: Path):
    wide = toy.write_checkpoint(tmp_path / "wide", ffn=1024)
    with pytest.raises(ConfigError, match=r"language\.adapters: x: .* llama\.cpp cannot load it: .*incorrect shape"):
        opened(convert(wide), x=str(switchable))


def test_the_first_adapter_has_to_be_one_of_them():
    text = "bundle: /b\ncamera: {source: a.mp4}\nlanguage: {adapters: {night: /n.gguf}, adapter: %s}"
    assert load_config_text(text % "night", "<c>").language.adapter == "night"
    with pytest.raises(ConfigError, match=r"<c>: language: adapter: expected one of the adapters \(night\)"):
        load_config_text(text % "nihgt", "<c>")
    with pytest.raises(ConfigError, match=r"language\.adapters"):
        load_config_text("bundle: /b\ncamera: {source: a.mp4}\nlanguage: {adapters: {'no name': /n.gguf}}", "<c>")


def test_a_full_disk_leaves_no_adapter(tmp_path: Path, plain, toy_bf16: Path, monkeypatch: pytest.MonkeyPatch):
    found = read_checkpoint(toy_bf16)

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BuildError, match="No space left"):
        write_adapter(read_adapter(plain[0], found), found, tmp_path / "a.gguf", SILENT)
    assert list(tmp_path.iterdir()) == []
