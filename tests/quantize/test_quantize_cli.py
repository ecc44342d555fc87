"""edge-quantize from the outside: what it prints, what it refuses and how, and that nothing half-written stays."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.bundle.manifest import LANGUAGE, MANIFEST, MMPROJ, VISION
from edge_agent.bundle.verify import verify_bundle
from edge_agent.errors import UserError
from tests.harness import ROOT, toy
from tests.harness.quantize_cli import PROGRESS, configure, refused, remove, said


def rewrite(change: Callable[[dict[str, list]], None]) -> Callable[[Path], None]:
    """Change model.safetensors: name -> [dtype, shape, bytes], written back as a sound file."""

    def apply(folder: Path) -> None:
        raw = (folder / "model.safetensors").read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        tensors = {
            name: [entry["dtype"], entry["shape"], raw[slice(*(start + at for at in entry["data_offsets"]))]]
            for name, entry in json.loads(raw[8:start]).items()
            if name != "__metadata__"
        }
        change(tensors)
        header, at = {}, 0
        for name, (dtype, shape, data) in tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        head = json.dumps(header).encode()
        data = b"".join(data for _, _, data in tensors.values())
        (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)

    return apply


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


def together(*changes: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda folder: [change(folder) for change in changes]


def tokenizer_of(vocab: int, without: int = -1) -> Callable[[Path], None]:
    """Another tekken.json, with one rank left out."""

    def apply(folder: Path) -> None:
        toy._write_tekken(folder, vocab)
        data = json.loads((folder / "tekken.json").read_text())
        data["vocab"] = [entry for entry in data["vocab"] if entry["rank"] != without]
        (folder / "tekken.json").write_text(json.dumps(data))

    return apply


def hf_tokenizer_with_a_gap(folder: Path) -> None:
    (folder / "tekken.json").unlink()
    toy._write_tokenizer(folder, 4096)
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


UP = "language_model.model.layers.1.mlp.up_proj.weight"
NORM = "language_model.model.norm.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
TEXT, ROPE = ("text_config",), ("text_config", "rope_parameters")

# what is done to a toy -> words of the one line that must come out
BF16: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "nothing in the folder": (lambda f: [path.unlink() for path in f.iterdir()], ("no config.json", "safetensors")),
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
    "rotary not YaRN": (configure(*ROPE, rope_type="linear"), ("rope_type: expected 'yarn'", "found 'linear'")),
    "rotary theta gone": (configure(*ROPE, rope_theta=None), ("rope_theta: missing", "expected float")),
    "rotary theta zero": (configure(*ROPE, rope_theta=0), ("rope_theta: expected a number above 0", "found 0")),
    "epsilon not a number": (configure(*TEXT, rms_norm_eps=float("nan")), ("rms_norm_eps: expected", "found nan")),
    "another YaRN factor": (configure(*ROPE, factor=8), ("factor: expected 16", "found 8", "take the released one")),
    "another YaRN slope": (configure(*ROPE, beta_fast=16), ("beta_fast: expected 32", "found 16")),
    "another query scaling": (
        configure(*ROPE, llama_4_scaling_beta=0.2),
        ("llama_4_scaling_beta: expected 0.1", "found 0.2"),
    ),
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
    "no bytes": (overwrite("model.safetensors", b""), ("model.safetensors", "not a safetensors file", "0 bytes")),
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


def test_a_checkpoint_in_shards_needs_them_all(run, tmp_path: Path):
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
    refused(run("inspect", folder), (second, "missing"))
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
def test_a_folder_that_is_not_there(run, tmp_path: Path, command: str):
    out = () if command == "inspect" else (tmp_path / "out",)
    refused(run(command, tmp_path / "nothing", *out), ("nothing: no such folder", "expected a checkpoint"))
    assert not any(tmp_path.iterdir())


# -- arguments and places ---------------------------------------------------------------------------------------------


def test_an_unknown_recipe_names_the_known_ones(toy_small: Path, run, tmp_path: Path):
    refused(
        run("build", toy_small, tmp_path / "out", "--recipe", "Q3_K_S"), ("--recipe", "Q4_K_M", "found 'Q3_K_S'"), 2
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["squeeze"], ["convert", "x", "y", "--type", "q4"], ["build", "x"]], ids=str)
def test_wrong_arguments_end_with_2(edge_quantize, arguments: list[str]):
    result = edge_quantize(*arguments)
    assert result.returncode == 2 and "usage: edge-quantize" in result.stderr and not result.stdout


def test_help_shows_the_commands_with_examples(edge_quantize):
    result = edge_quantize("--help")
    assert result.returncode == 0
    for word in ("inspect", "convert", "build", "edge-quantize build", "tekken.json", "FP8"):
        assert word in result.stdout


def test_an_error_is_known_by_its_class_and_not_by_its_name(toy_small: Path, run, tmp_path: Path, monkeypatch):
    """A UserError ends with one line. An error of another library that has the same name keeps its traceback."""
    from quantize import build

    arguments = ("convert", toy_small, tmp_path / "out")

    class NewError(UserError):
        """An error class that the command line has no list of."""

    def fails_with(error: Exception) -> None:
        def convert(*_arguments: object) -> None:
            raise error

        monkeypatch.setattr(build, "convert", convert)

    fails_with(NewError("disk: too small"))
    refused(run(*arguments), ("disk: too small",))
    theirs = type("BuildError", (Exception,), {})
    fails_with(theirs("of another library"))
    with pytest.raises(theirs):
        run(*arguments)


@pytest.mark.parametrize("command", ["convert", "build"])
def test_an_existing_output_stays(toy_small: Path, run, tmp_path: Path, command: str):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    refused(run(command, toy_small, tmp_path / "out"), ("out: exists", "--force"))
    refused(run(command, toy_small, tmp_path / "out", "--force"), ("out: --force replaces only", "'thesis.tex'"))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious" and os.listdir(tmp_path) == ["out"]


def test_force_replaces_what_this_tool_made(toy_small: Path, run, tmp_path: Path):
    assert run("convert", toy_small, tmp_path / "out", "--type", "f16")[0] == 0
    first = (tmp_path / "out" / LANGUAGE).stat().st_size
    assert run("convert", toy_small, tmp_path / "out", "--type", "f32", "--force")[0] == 0
    assert (tmp_path / "out" / LANGUAGE).stat().st_size > first
    assert run("build", toy_small, tmp_path / "out", "--force")[0] == 0
    assert verify_bundle(tmp_path / "out") and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("command", ["convert", "build"])
@pytest.mark.parametrize("parent", ["missing", "a file"])
def test_a_place_that_is_not_there(toy_small: Path, run, tmp_path: Path, command: str, parent: str):
    if parent == "a file":
        (tmp_path / "parent").write_text("x")
    refused(run(command, toy_small, tmp_path / "parent" / "out"), ("parent: no such folder", "make it first"))
    assert os.listdir(tmp_path) == (["parent"] if parent == "a file" else [])


# -- full disks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path):
    """small_disk(bytes) -> a folder on a file system of its own that holds no more."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(n_bytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a small file system")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


@pytest.mark.parametrize("command", ["convert", "build"])
def test_too_little_room_is_said_before_the_work(toy_small: Path, run, small_disk, command: str):
    disk = small_disk(8 << 20)
    refused(run(command, toy_small, disk / "out"), ("~/disk", "GB needed", "0.01 GB free", "make room"))
    assert not any(disk.iterdir())


@pytest.mark.parametrize("name", [LANGUAGE, MMPROJ, VISION])
def test_a_disk_that_fills_up_meanwhile_is_one_line_and_no_file(
    toy_small: Path, build, run, small_disk, name: str, monkeypatch
):
    """Another program writes as well: there was room when the build began."""
    size = {path.name: path.stat().st_size for path in build(toy_small, "Q4_K_M").iterdir()}
    order = (LANGUAGE, MMPROJ, VISION)
    disk = small_disk(sum(size[earlier] for earlier in order[: order.index(name)]) + size[name] // 2)
    usage = shutil.disk_usage(disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10**12))
    result = run("build", toy_small, disk / "out")
    assert not any(disk.iterdir())
    refused(result, ("~/disk", "No space left on device"))


def test_a_limit_on_file_size_is_one_line_and_no_file(toy_small: Path, edge_quantize, tmp_path: Path):
    limit = (300_000, 300_000)
    result = edge_quantize(
        "convert", toy_small, tmp_path / "out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert not any(tmp_path.iterdir())
    refused((result.returncode, result.stdout, said(result.stderr, tmp_path)), ("~/out", "File too large"))


# -- stopped ----------------------------------------------------------------------------------------------------------


def in_the_foreground() -> None:
    """Shells let their background jobs ignore these, and children inherit it."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def stop_at(stage: str, how: int, folder: Path, out: Path) -> subprocess.Popen:
    """A build in a process of its own that is sent a signal as soon as it says it has begun a stage."""
    command = [sys.executable, "-m", "quantize.cli", "build", str(folder), str(out), "--recipe", "IQ4_XS"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=in_the_foreground)
    for line in process.stderr:
        if line.startswith(stage):
            process.send_signal(how)
            break
    process.said = process.stderr.read().splitlines()
    process.stderr.close()
    process.wait(timeout=60)
    return process


@pytest.mark.parametrize(
    ("stage", "how"),
    [("language", signal.SIGINT), ("language", signal.SIGTERM), ("try", signal.SIGTERM)],
)
def test_an_interrupted_build_leaves_nothing_or_what_it_can_go_on_from(
    toy_bf16: Path, tmp_path: Path, edge_quantize, stage: str, how: signal.Signals
):
    process = stop_at(stage, how, toy_bf16, tmp_path / "out")
    assert process.returncode == 130
    left = [path.name for path in tmp_path.iterdir()]
    goes_on = "the same command again goes on from here"
    assert left == ([".out.part"] if goes_on in process.said[-1] else []), process.said
    assert goes_on in process.said[-1] or stage == "language"  # before the first file is whole
    assert process.said[-1] in (
        f"edge-quantize: interrupted; {goes_on}", "edge-quantize: interrupted; nothing was left behind"
    )  # fmt: skip
    assert not any("Traceback" in line for line in process.said)
    again = edge_quantize("build", toy_bf16, tmp_path / "out", "--recipe", "IQ4_XS")
    assert again.returncode == 0
    assert ("going on: an earlier run left language.gguf" in again.stderr) == bool(left)
    assert os.listdir(tmp_path) == ["out"]


def test_a_closed_terminal_ends_a_build_like_an_interrupt(toy_bf16: Path, tmp_path: Path):
    """SSH that goes away sends SIGHUP, which by itself would end the process on the spot."""
    process = stop_at("language", signal.SIGHUP, toy_bf16, tmp_path / "out")
    assert process.returncode == 130 and "interrupted" in process.said[-1]
    assert not (tmp_path / "out").exists()


def test_under_nohup_the_work_goes_on(toy_small: Path, tmp_path: Path):
    command = ["nohup", sys.executable, "-m", "quantize.cli", "convert", str(toy_small), str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("language"):
            process.send_signal(signal.SIGHUP)
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert os.listdir(tmp_path) == ["out"]


def test_an_interrupt_that_arrives_inside_llama_cpp_is_not_lost(toy_small: Path, tmp_path: Path):
    """A signal's handler may run in a callback that llama.cpp calls, and no exception comes out of one."""
    code = """if True:
        import signal
        from edge_agent.model import llama as language
        from quantize import cli
        real, left = language.log_to, [signal.SIGINT]
        def log_to(receiver):
            def noisy(text):
                if left:
                    signal.raise_signal(left.pop())
                receiver(text)
            real(noisy if receiver else None)
        language.log_to = log_to
        cli.main()
    """
    command = [sys.executable, "-c", code, "build", toy_small, tmp_path / "out"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=env, capture_output=True, preexec_fn=in_the_foreground)
    assert result.returncode == 130
    assert not (tmp_path / "out").exists()


def test_a_killed_build_leaves_only_hidden_things_and_the_next_one_works(toy_bf16: Path, tmp_path: Path, edge_quantize):
    out = tmp_path / "out"
    process = stop_at("language", signal.SIGKILL, toy_bf16, out)
    assert process.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name == ".out.part" and not (left / MANIFEST).exists()
    assert edge_quantize("convert", toy_bf16, out).returncode == 0  # other work: nothing of it is used
    assert set(os.listdir(out)) == {LANGUAGE, MMPROJ, VISION}
    assert os.listdir(tmp_path) == ["out"]


# -- when all is well -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "dtype"), [("toy_bf16", "BF16"), ("toy_fp8", "FP8")])
def test_inspect_says_what_a_checkpoint_is(edge_quantize, build, request, source: str, dtype: str):
    folder = request.getfixturevalue(source)
    result = edge_quantize("inspect", folder, "--json")
    assert (result.returncode, result.stderr, result.stdout.count("\n")) == (0, "", 1)
    facts = json.loads(result.stdout)
    layer = 2 * 256 + 256 * (512 + 256 + 256 + 512) + 3 * 256 * 512
    vision_layer = 2 * 128 + 4 * 128 * 128 + 3 * 128 * 256
    vision = 128 * 3 * 14 * 14 + 128 + 2 * vision_layer + 128 + 128 * 512 + 256 * 128 + 256 * 256
    head = 4096 * 256 if source == "toy_fp8" else 0
    assert facts["parameters"] == 4096 * 256 + head + 2 * layer + 256 + vision
    scales = 14 if source == "toy_fp8" else 0
    assert facts["tensors"] == 2 + bool(head) + 2 * 9 + 2 + 2 * 9 + 4 + scales
    assert len(facts["ignored"]) == scales
    assert (facts["family"], facts["variant"], facts["dtype"]) == ("ministral3", "base", dtype)
    assert facts["tied_embeddings"] == (source == "toy_bf16")
    assert (facts["tokenizer"], facts["vocab"]) == ("tekken.json", 4096)
    assert facts["vision_bytes"] == 2 * vision
    manifest = json.loads((build(folder, "Q4_K_M") / MANIFEST).read_text())
    assert facts["language_bytes"]["Q4_K_M"] == sum(manifest["bytes_by_type"].values())
    assert sorted(facts["language_bytes"]) == sorted(
        ["Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_XS", "Q5_K_M", "Q6_K", "Q8_0", "BF16"]
    )
    size = (folder / "model.safetensors").stat().st_size
    ignored = 2 * scales  # bytes of the activation scales, one bfloat16 each
    header = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert facts["source_bytes"] == size - header - ignored
    assert facts["fits"][0] == "Orin Nano 4GB"


def test_inspect_for_people(run, toy_fp8: Path):
    status, out, errors = run("inspect", toy_fp8)
    assert (status, errors) == (0, [])
    for words in (
        "ministral3", "0.004 B parameters", "2 layers, hidden 256, 4 heads x 128, 2 kv heads, ffn 512",
        "4096 rows, apart", "FP8", "14: static FP8 activation scale", "tekken.json, 4096 tokens", "Q4_K_M",
        "Orin Nano 8GB",
    ):  # fmt: skip
        assert words in out


def test_two_builds_are_the_same_to_the_byte_and_the_manifest_comes_out(
    edge_quantize, toy_small: Path, build, tmp_path: Path
):
    result, first = edge_quantize("build", toy_small, tmp_path / "out", "--json"), build(toy_small, "Q4_K_M")
    assert result.returncode == 0 and result.stdout.count("\n") == 1
    for file in first.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    assert json.loads(result.stdout) == json.loads((first / MANIFEST).read_text())
    stages = [line.split(":")[0] for line in result.stderr.splitlines()]
    assert list(dict.fromkeys(stages)) == ["language Q4_K_M", "mmproj", "vision", "try", "hash source"]
    assert all(PROGRESS.fullmatch(line) for line in result.stderr.splitlines())


def test_build_and_convert_say_what_they_made(run, toy_small: Path, tmp_path: Path):
    status, out, errors = run("convert", toy_small, tmp_path / "full")
    assert (status, errors) == (0, [])
    assert re.fullmatch(rf"{tmp_path}/full: ministral3 \d+\.\dM at bf16\n", out)
    status, out, errors = run("build", toy_small, tmp_path / "bundle", "--recipe", "Q6_K")
    assert (status, errors) == (0, [])
    assert re.fullmatch(rf"{tmp_path}/bundle: ministral3 \d+\.\dM Q6_K, \d+\.\d MB, tried and hashed\n", out)


def test_wrong_input_is_found_before_native_code_is_loaded(edge_quantize, toy_bf16: Path, tmp_path: Path):
    """A checkpoint's faults show in the first second also where loading llama.cpp alone takes longer."""
    folder = shutil.copytree(toy_bf16, tmp_path / "checkpoint")
    rewrite(lambda tensors: tensors.pop(UP))(folder)
    code = (
        "import sys; from quantize import cli; sys.argv[1:] = ['inspect', sys.argv[1]]\n"
        "try: cli.main()\nexcept SystemExit: print(*sorted({'llama_cpp', 'onnxruntime', 'onnx'} & set(sys.modules)))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code, folder], env=env, capture_output=True, text=True)
    assert result.stdout == "\n" and "up_proj" in result.stderr


def test_a_reader_that_goes_away_is_no_traceback(toy_bf16: Path):
    command = [sys.executable, "-m", "quantize.cli", "inspect", str(toy_bf16)]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
