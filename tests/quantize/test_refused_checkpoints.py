"""Damaged or foreign checkpoints: each is one line that names file, key, expected and found, and no file is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness import native_files, toy, toy_tokenizer
from tests.harness.quantize_cli import UP, configure, refused, remove, rewrite


def reheader(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """Change the header of model.safetensors and not its data; what `change` returns, if anything, is the header."""

    def apply(folder: Path) -> None:
        raw = (folder / "model.safetensors").read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        head = json.dumps(change(header) or header).encode()
        (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + raw[start:])

    return apply


def overwrite(name: str, data: bytes | Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(data(path.read_bytes()) if callable(data) else data)

    return apply


def one_folder_down(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("copy"))
    [path.unlink() for path in folder.iterdir()]
    folder.with_name("copy").rename(folder / "Ministral-3-3B")


def as_in_a_cache(folder: Path) -> None:
    one_folder_down(folder)
    (folder / "snapshots").mkdir()
    (folder / "Ministral-3-3B").rename(folder / "snapshots" / "0123abcd")


def dangling(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/0123")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4967215360\n"
GGUF = native_files.file([native_files.ARCHITECTURE, native_files.number(b"general.file_type", 15)],
                         [native_files.tensor()])  # fmt: skip


def together(*changes: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda folder: [change(folder) for change in changes]


def tokenizer_of(vocab: int, without: int = -1) -> Callable[[Path], None]:
    """Another tekken.json, with one rank left out."""

    def apply(folder: Path) -> None:
        toy_tokenizer.write_tekken(folder, vocab)
        data = json.loads((folder / "tekken.json").read_text())
        data["vocab"] = [entry for entry in data["vocab"] if entry["rank"] != without]
        (folder / "tekken.json").write_text(json.dumps(data))

    return apply


def hf_tokenizer_with_a_gap(folder: Path) -> None:
    (folder / "tekken.json").unlink()
    toy_tokenizer.write_tokenizer(folder, 4096)
    data = json.loads((folder / "tokenizer.json").read_text())
    words = data["model"]["vocab"]
    words[max(words, key=words.get)] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(data))


def without_special(name: str) -> Callable[[bytes], bytes]:
    return lambda raw: raw.replace(f'"{name}"'.encode(), b'"<SPECIAL_X>"')


def processor(**values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for name in ("processor_config.json", "preprocessor_config.json"):
            data = json.loads((folder / name).read_text())
            data.get("image_processor", data).update(values)
            (folder / name).write_text(json.dumps(data))

    return apply


def shift(header: dict) -> None:
    """Every tensor begins where the file's data begins: all ranges have the right length, and overlap."""
    for entry in header.values():
        if "data_offsets" in entry and entry is not last(header):
            start, end = entry["data_offsets"]
            entry["data_offsets"] = [0, end - start]


def last(header: dict) -> dict:
    return max((entry for entry in header.values() if "data_offsets" in entry), key=lambda e: e["data_offsets"][1])


NORM = "language_model.model.norm.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
TEXT, ROPE = ("text_config",), ("text_config", "rope_parameters")

# what is done to a toy -> words of the one line that must come out
BF16: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "nothing in the folder": (lambda f: [path.unlink() for path in f.iterdir()], ("an empty folder", "safetensors")),
    "a folder of other things": (remove("config.json"), ("no config.json or params.json: not a checkpoint",)),
    "one folder too high": (one_folder_down, ("the folder above: give Ministral-3-3B/ (a checkpoint)",)),
    "two folders too high": (as_in_a_cache, ("the folder above: give snapshots/0123abcd/ (a checkpoint)",)),
    "a download that is not complete": (dangling, ("model.safetensors: a link to a file that is missing", "repeat it")),
    "weights in a git-lfs pointer": (overwrite("model.safetensors", LFS), ("model.safetensors: a git-lfs", "lfs pull")),
    "tokenizer in a git-lfs pointer": (overwrite("tekken.json", LFS), ("tekken.json: a git-lfs pointer", "lfs pull")),
    "configuration in a git-lfs pointer": (overwrite("config.json", LFS), ("config.json: a git-lfs pointer",)),
    "weights in a web page": (overwrite("model.safetensors", b" <!DOCTYPE html><p>Sign in"), ("a web page and not",)),
    "weights in a pickle": (
        together(remove("model.safetensors"), overwrite("pytorch_model.bin", b"PK\3\4 archive/data.pkl")),
        ("model.safetensors: missing", "pytorch_model.bin is a PyTorch pickle", "save the model as safetensors"),
    ),
    "quantised by MLX": (configure(quantization={"bits": 4}), ("quantization: quantised already, by MLX",)),
    "quantised by GPTQ": (
        together(configure(quantization_config={"quant_method": "gptq"}), overwrite("model.safetensors", b"x" * 99)),
        ("quantization_config: expected quant_method 'fp8'", "'gptq'", "quantised already; start from the BF16"),
    ),
    "a GGUF file beside nothing": (
        together(lambda f: [path.unlink() for path in f.iterdir()], overwrite("model-Q4_K_M.gguf", GGUF)),
        ("model-Q4_K_M.gguf in it is a GGUF file (llama, Q4_K_M)", "from the 16-bit checkpoint"),
    ),
    "a bundle": (
        together(lambda f: [path.unlink() for path in f.iterdir()], overwrite("bundle.json", b"{}")),
        ("a bundle; give it to edge-agent, and a checkpoint to edge-quantize",),
    ),
    "an adapter": (
        together(lambda f: [path.unlink() for path in f.iterdir()], overwrite("adapter_config.json", b"{}")),
        ("a LoRA adapter; give it to edge-quantize lora, or with --merge",),
    ),
    "no weights": (remove("model.safetensors"), ("model.safetensors", "missing", "download")),
    "consolidated, without its weights": (
        together(remove("config.json"), overwrite("params.json", b"{}")),
        ("consolidated.safetensors: missing", "download"),
    ),
    # config.json
    "another architecture": (
        configure(architectures=["LlamaForCausalLM"]),
        ("config.json: architectures", "expected Mistral3ForConditionalGeneration", "found LlamaForCausalLM"),
    ),
    "an older text model": (
        configure(*TEXT, model_type="mistral"),
        ("rope_type: expected none", "found 'yarn'", "mistral has plain rotary positions"),
    ),
    "an unknown text model": (
        configure(*TEXT, model_type="llama"),
        ("text_config: model_type: expected ministral3 or mistral", "found 'llama'"),
    ),
    "no architecture": (configure(architectures=None, model_type=None), ("architectures: expected", "found none")),
    "config cut": (overwrite("config.json", lambda raw: raw[: len(raw) // 2]), ("config.json", "JSON")),
    "config not UTF-8": (overwrite("config.json", b'{"architectures": "\xff"}'), ("config.json", "JSON")),
    "config a list": (overwrite("config.json", b"[]"), ("config.json", "expected")),
    "text_config a list": (configure(text_config=[1]), ("config.json: text_config", "expected", "found [1]")),
    "no vision": (configure(vision_config=None), ("vision_config", "missing")),
    "no width": (configure(*TEXT, hidden_size=None), ("text_config: hidden_size: missing", "expected int")),
    "width a word": (configure(*TEXT, hidden_size="256"), ("hidden_size: expected int", "found '256'")),
    "width true": (configure(*TEXT, hidden_size=True), ("hidden_size: expected int", "found True")),
    "no layers": (configure(*TEXT, num_hidden_layers=0), ("num_hidden_layers: expected a number above 0", "found 0")),
    "no rotary table": (configure(*TEXT, rope_parameters=None), ("rope_parameters", "missing", "YaRN")),
    "rotary not YaRN": (
        configure(*ROPE, rope_type="linear", type="linear"),
        ("rope_type: expected 'yarn'", "found 'linear'"),
    ),
    "rotary theta gone": (configure(*ROPE, rope_theta=None), ("rope_theta: missing", "expected float")),
    "rotary theta zero": (configure(*ROPE, rope_theta=0), ("rope_theta: expected a number above 0", "found 0")),
    "epsilon not a number": (configure(*TEXT, rms_norm_eps=float("nan")), ("rms_norm_eps: expected", "found nan")),
    "another YaRN factor": (configure(*ROPE, factor=8), ("factor: expected 16", "found 8", "take the released one")),
    "another YaRN slope": (configure(*ROPE, beta_fast=16), ("beta_fast: expected 32", "found 16")),
    "another query scaling": (
        configure(*ROPE, llama_4_scaling_beta=0.2),
        ("llama_4_scaling_beta: expected 0.1", "found 0.2"),
    ),
    "two kinds of rotary values": (configure(*ROPE, type="linear"), ("type: expected 'yarn' as rope_type", "'linear'")),
    "two rotary tables": (
        configure(*TEXT, rope_scaling={"rope_type": "yarn", "factor": 8.0}),
        ("factor: rope_parameters says 16.0, an older key 8.0", "remove the wrong one"),
    ),
    "two thetas": (configure(*TEXT, rope_theta=1e4), ("rope_theta: rope_parameters says 1000000.0", "10000.0")),
    "rotary table a word": (configure(*TEXT, rope_scaling="yarn"), ("rope_scaling: expected a table", "'yarn'")),
    "attention rescaled": (configure(*ROPE, attention_factor=1.2), ("rope_parameters: attention_factor: unknown",)),
    "half of each head turned": (configure(*ROPE, partial_rotary_factor=0.5), ("partial_rotary_factor: unknown",)),
    "biases": (configure(*TEXT, attention_bias=True), ("text_config: attention_bias: unknown, and set to 'True'",)),
    "experts": (configure(*TEXT, num_local_experts=8), ("text_config: num_local_experts: unknown",)),
    "an unknown key outside": (configure(vision_dropout="x"), ("config.json: vision_dropout: unknown",)),
    "an unknown key of the vision encoder": (configure("vision_config", use_2d=True), ("vision_config: use_2d",)),
    "a vision encoder with YaRN": (
        configure("vision_config", "rope_parameters", rope_type="yarn"),
        ("vision_config.rope_parameters.rope_type: expected 'default'", "'yarn'"),
    ),
    "local attention": (configure(*TEXT, layer_types=["full_attention", "sliding_attention"]), ("layer_types",)),
    "another YaRN context": (
        configure(*ROPE, original_max_position_embeddings=8192),
        ("original_max_position_embeddings: 8192 x factor 16 make 131072", "the context is 262144"),
    ),
    "no query scaling": (configure(*ROPE, llama_4_scaling_beta=None), ("llama_4_scaling_beta: missing",)),
    "unlike mscales": (configure(*ROPE, mscale=0.5), ("mscale: expected", "mscale_all_dim (1.0)", "found 0.5")),
    "sliding window": (configure(*TEXT, sliding_window=4096), ("sliding_window: expected null", "found 4096")),
    "another activation": (configure(*TEXT, hidden_act="gelu"), ("hidden_act: expected 'silu'", "found 'gelu'")),
    "another projector": (
        configure(projector_hidden_act="relu"),
        ("projector_hidden_act: expected 'gelu'", "found 'relu'"),
    ),
    "heads that do not fit": (configure("vision_config", num_attention_heads=3), ("hidden_size", "multiple of 4 x 3")),
    "a mean of two numbers": (processor(image_mean=[0.5, 0.5]), ("image_mean", "expected", "found [0.5, 0.5]")),
    "a deviation of zero": (processor(image_std=[0.5, 0.5, 0]), ("image_std", "expected", "found")),
    # model.safetensors
    "data cut": (overwrite("model.safetensors", lambda raw: raw[:-1000]), ("model.safetensors: expected", "found")),
    "data too long": (overwrite("model.safetensors", lambda raw: raw + b"x"), ("model.safetensors: expected", "found")),
    "header cut": (overwrite("model.safetensors", lambda raw: raw[:1000]), ("model.safetensors", "header", "1000")),
    "no bytes": (overwrite("model.safetensors", b""), ("model.safetensors: an empty file", "again")),
    "garbage": (overwrite("model.safetensors", np.random.default_rng(0).bytes(5000)), ("model.safetensors", "not a")),
    "header garbage": (
        overwrite("model.safetensors", lambda raw: raw[:8] + b"\xfe" * 200 + raw[208:]),
        ("model.safetensors", "header is not JSON"),
    ),
    "header a list": (reheader(lambda header: [1]), ("model.safetensors", "header")),
    "entry a number": (reheader(lambda h: h.update({UP: 3})), ("model.safetensors", UP, "damaged")),
    "entry without offsets": (reheader(lambda h: h[UP].pop("data_offsets") and None), (UP, "damaged")),
    "shape of words": (reheader(lambda h: h[UP].update(shape=["a", 2])), (UP, "damaged")),
    "type a list": (reheader(lambda h: h[UP].update(dtype=["BF16"])), (UP, "dtype")),
    "offsets too short": (reheader(lambda h: h[UP].update(data_offsets=[0, 10])), (UP, "expected 262144 bytes", "10")),
    "offsets negative": (reheader(lambda h: h[UP].update(data_offsets=[-262144, 0])), (UP, "damaged")),
    "offsets behind the end": (
        reheader(lambda h: h[UP].update(data_offsets=[10**12, 10**12 + 262144])),
        ("model.safetensors", "expected", "found"),
    ),
    "offsets that overlap": (reheader(shift), ("model.safetensors", "overlap")),
    "numbers we do not know": (
        rewrite(lambda t: t.update({UP: ["I8", [512, 256], bytes(512 * 256)]})),
        (UP, "dtype: expected one of", "found I8"),
    ),
    "a tensor missing": (rewrite(lambda t: t.pop(UP)), ("layers.1.mlp.up_proj.weight", "missing", "(512, 256)")),
    "a tensor too many": (
        rewrite(lambda t: t.update({"language_model.model.layers.2.mlp.up_proj.weight": t[UP]})),
        ("1 tensor(s)", "layers.2.mlp.up_proj.weight", "no place"),
    ),
    "another model's tensor": (rewrite(lambda t: t.update({"audio_tower.x": t[NORM]})), ("audio_tower.x", "no place")),
    "a tensor misshapen": (
        rewrite(lambda t: t.update({UP: ["BF16", [256, 512], t[UP][2]]})),
        ("model.safetensors", UP, "expected shape (512, 256)", "found (256, 512)"),
    ),
    "a tensor twice": (
        rewrite(lambda t: t.update({"model.language_model.norm.weight": t[NORM]})),
        ("model.language_model.norm.weight", "the same tensor as", NORM),
    ),
    "more layers promised": (configure(*TEXT, num_hidden_layers=3), ("layers.2.", "missing", "config.json calls for")),
    "a head promised": (
        together(configure(tie_word_embeddings=False), configure(*TEXT, tie_word_embeddings=False)),
        ("lm_head.weight", "missing"),
    ),
    # tokenizer
    "no tokenizer": (remove("tekken.json"), ("no tokenizer", "expected tekken.json or tokenizer.json")),
    "tokenizer too small": (tokenizer_of(2048), ("tekken.json", "2048 tokens", "4096 rows")),
    "a rank missing": (tokenizer_of(4200, without=300), ("tekken.json", "damaged", "ranks")),
    "an id missing": (hf_tokenizer_with_a_gap, ("tokenizer.json", "damaged", "ids")),
    "tokenizer cut": (overwrite("tekken.json", lambda raw: raw[:5000]), ("tekken.json", "JSON")),
    "tokenizer of another kind": (overwrite("tekken.json", b'{"model": {}}'), ("tekken.json", "damaged", "config")),
    "tokenizer a list": (overwrite("tekken.json", b"[]"), ("tekken.json", "damaged")),
    "tokenizer.json of another kind": (
        together(remove("tekken.json"), overwrite("tokenizer.json", b'{"model": {"vocab": []}, "added_tokens": []}')),
        ("tokenizer.json", "damaged"),
    ),
    "no [IMG_BREAK]": (overwrite("tekken.json", without_special("[IMG_BREAK]")), ("tekken.json", "[IMG_BREAK]")),
    "chat template not UTF-8": (overwrite("chat_template.jinja", b"\xff\xfe"), ("chat_template.jinja",)),
    "tokenizer_config cut": (overwrite("tokenizer_config.json", b'{"chat'), ("tokenizer_config.json", "JSON")),
    "tokenizer_config a list": (overwrite("tokenizer_config.json", b"[]"), ("tokenizer_config.json",)),
    # found only while it is built
    "a weight that is not a number": (
        rewrite(lambda t: t.update({UP: ["BF16", [512, 256], b"\xc0\x7f" + t[UP][2][2:]]})),
        (UP, "NaN"),
    ),
}  # fmt: skip

FP8: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "a scale missing": (rewrite(lambda t: t.pop(UP + "_scale_inv")), ("up_proj.weight_scale_inv", "missing")),
    "a scale NaN": (
        rewrite(lambda t: t.update({UP + "_scale_inv": ["BF16", [], b"\xc0\x7f"]})),
        ("model.safetensors", UP + "_scale_inv", "expected a finite scale above 0", "found nan"),
    ),
    "a scale zero": (
        rewrite(lambda t: t.update({UP + "_scale_inv": ["F32", [], bytes(4)]})),
        (UP + "_scale_inv", "expected a finite scale above 0", "found 0.0"),
    ),
    "a scale negative": (
        rewrite(lambda t: t.update({UP + "_scale_inv": ["F32", [1], np.float32(-1).tobytes()]})),
        (UP + "_scale_inv", "found -1.0"),
    ),
    "a scale per block": (
        rewrite(lambda t: t.update({UP + "_scale_inv": ["F32", [4, 2], np.ones(8, np.float32).tobytes()]})),
        ("up_proj.weight_scale_inv", "expected one scale per tensor", "found shape (4, 2)"),
    ),
    "a scale for nothing": (
        rewrite(lambda t: t.update({NORM + "_scale_inv": t[UP + "_scale_inv"]})),
        ("norm.weight_scale_inv", "no place"),
    ),
    "block-scaled": (
        configure("quantization_config", weight_block_size=[128, 128]),
        ("quantization_config", "expected quant_method 'fp8' with weight_block_size null", "[128, 128]", "BF16"),
    ),
    "another quantisation": (
        configure("quantization_config", quant_method="awq"),
        ("quantization_config", "expected quant_method 'fp8'", "'awq'"),
    ),
    "quantisation a word": (configure(quantization_config="fp8"), ("quantization_config", "expected", "found 'fp8'")),
    "not announced": (configure(quantization_config=None), ("quantization_config: missing", "FP8")),
    "embedding in FP8": (
        rewrite(
            lambda t: t.update(
                {EMBEDDING: ["F8_E4M3", [4096, 256], bytes(1 << 20)], EMBEDDING + "_scale_inv": t[UP + "_scale_inv"]}
            )
        ),
        ("embed_tokens.weight", "FP8 is known only for the linear layers"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("source", "damage", "words"),
    [(source, *case) for source, cases in (("toy_bf16", BF16), ("toy_fp8", FP8)) for case in cases.values()],
    ids=[*BF16, *FP8],
)
def test_a_damaged_checkpoint_is_one_line_and_no_file(source: str, damage, words, run, request, tmp_path: Path):
    folder, out = shutil.copytree(request.getfixturevalue(source), tmp_path / "checkpoint"), tmp_path / "out"
    out.mkdir()
    damage(folder)
    refused(run("build", folder, out / "bundle"), words)
    assert not any(out.iterdir())


def test_a_checkpoint_with_a_missing_shard_is_refused(run, tmp_path: Path):
    folder = toy.write_checkpoint(tmp_path / "toy", shards=3, vocab=2048)
    index, second = folder / "model.safetensors.index.json", "model-00002-of-00003.safetensors"
    sound = index.read_text()
    (folder / second).rename(tmp_path / "aside")
    refused(run("inspect", folder), (second, "missing", "download"))
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / second)
    refused(run("inspect", folder), ("model-0000",))
    (tmp_path / "aside").rename(folder / second)
    index.write_text(sound.replace(f'{NORM}": "model-00003', f'{NORM}": "model-00001'))
    refused(run("inspect", folder), (index.name, NORM, "expected in model-00001", "found in model-00003"))
    index.write_text(json.dumps({"weight_map": []}))
    refused(run("inspect", folder), (index.name, "weight_map", "missing"))
    index.write_text(sound.replace(second, "../" + second))
    refused(run("inspect", folder), ("../" + second, "two sets of weights"))
    index.write_text(sound)
    assert run("inspect", folder)[0] == 0


def test_float16_that_cannot_hold_a_weight_is_one_line(toy_bf16: Path, run, tmp_path: Path):
    folder, out = shutil.copytree(toy_bf16, tmp_path / "checkpoint"), tmp_path / "out"
    out.mkdir()
    large = np.full(512 * 256, 0x4980, np.uint16).tobytes()  # 2**20 in bfloat16
    rewrite(lambda tensors: tensors.update({UP: ["BF16", [512, 256], large]}))(folder)
    refused(run("convert", folder, out / "full", "--type", "f16"), (UP, "float16", "--type bf16"))
    assert not any(out.iterdir())


@pytest.mark.parametrize("command", ["inspect", "convert", "build"])
def test_a_missing_checkpoint_folder_is_one_line(run, tmp_path: Path, command: str):
    out = () if command == "inspect" else (tmp_path / "out",)
    refused(run(command, tmp_path / "nothing", *out), ("nothing: no such folder", "expected a checkpoint"))
    assert not any(tmp_path.iterdir())
