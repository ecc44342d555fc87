"""One model, many layouts: HF and consolidated, one file and shards, with and without vision, both families."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import msgspec
import pytest

from edge_agent.bundle.manifest import LANGUAGE, MANIFEST, MMPROJ, REPORT, VISION, read_manifest
from edge_agent.bundle.verify import verify_bundle
from quantize.build import build, convert
from quantize.formats.build_plan import plan_conversion
from quantize.progress import SILENT
from quantize.source.checkpoint import read_checkpoint
from quantize.source.hf_config import PIXEL_MEAN, PIXEL_STD
from quantize.source.tensor_names import FAMILIES, Yarn
from quantize.standard_recipes import plan_bundle
from tests.harness import toy, toy_layout
from tests.harness.quantize_cli import configure, refused, remove

LAYOUTS = {
    "hf": {},
    "hf, three files, transformers' names": {"shards": 3, "prefix": "model."},
    "consolidated": {"layout": "consolidated"},
    "consolidated, three files": {"layout": "consolidated", "shards": 3},
}
SMALL = {"vocab": 2048, "layers": 1, "vision_layers": 1, "seed": 5}


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("family", ["ministral3", "mistral"])
def test_every_layout_of_a_model_makes_the_same_files(tmp_path: Path, family: str, dtype: str):
    made = {}
    for name, arguments in LAYOUTS.items():
        model = {"family": family, "dtype": dtype, "tied": dtype == "bf16"}
        folder = toy.write_checkpoint(tmp_path / name, **SMALL, **model, **arguments)
        out = tmp_path / f"{name} out"
        convert(plan_conversion(read_checkpoint(folder), "bf16"), out, SILENT)
        made[name] = hashes(out)
    assert set(made["hf"]) == {LANGUAGE, MMPROJ, VISION}
    assert all(files == made["hf"] for files in made.values()), made


def test_the_two_layouts_differ_where_rotary_rows_stand(tmp_path: Path):
    """Or the test above would also pass a reader that permutes nothing and a toy that forgot to."""
    read = {}
    for layout in ("hf", "consolidated"):
        found = read_checkpoint(toy.write_checkpoint(tmp_path / layout, **SMALL, layout=layout))
        read[layout] = {
            row.gguf: found.read_rows(row, 0, 4).tobytes() for row in [*found.text_tensors, *found.vision_tensors]
        }
        assert found.layout == {"hf": "HF", "consolidated": "consolidated"}[layout]
    differ = {name for name in read["hf"] if read["hf"][name] != read["consolidated"][name]}
    assert differ == {f"{blk}.0.attn_{side}.weight" for blk in ("blk", "v.blk") for side in "qk"}


@pytest.mark.parametrize("layout", ["hf", "consolidated"])
@pytest.mark.parametrize("family", ["ministral3", "mistral"])
def test_a_text_only_model_makes_a_bundle_that_the_agent_takes(tmp_path: Path, family: str, layout: str):
    folder = toy.write_checkpoint(
        tmp_path / "toy", **SMALL, family=family, vision=False, layout=layout, prefix="text" if layout == "hf" else ""
    )
    manifest = build(plan_bundle(read_checkpoint(folder), "Q4_K_M"), tmp_path / "out", SILENT)
    assert manifest.vision is None and manifest.model.family == family
    assert set(os.listdir(tmp_path / "out")) == {LANGUAGE, REPORT, MANIFEST}
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert set(report["validation"]) == {"embedding_rows_relative_difference"}
    assert read_manifest(tmp_path / "out").manifest == manifest
    assert verify_bundle(tmp_path / "out").manifest == manifest


def test_the_released_sizes_have_their_names(tmp_path: Path):
    found = {(family.name, size): shape for family in FAMILIES for shape, size in family.sizes.items()}
    assert found == {
        ("ministral3", "3B"): (3072, 26),
        ("ministral3", "8B"): (4096, 34),
        ("ministral3", "14B"): (5120, 40),
        ("mistral", "24B"): (5120, 40),
    }


def test_of_two_layouts_in_a_folder_hf_is_read_unless_its_tensors_are_missing(tmp_path: Path):
    folder = toy.write_checkpoint(tmp_path / "both", **SMALL)
    toy.write_checkpoint(folder, **SMALL, layout="consolidated")
    assert read_checkpoint(folder).layout == "HF"
    (folder / "model.safetensors").unlink()
    assert read_checkpoint(folder).layout == "consolidated"


# -- more than one model in a folder -----------------------------------------------------------------------------------


def shards_beside_a_single_file(folder: Path) -> None:
    toy.write_checkpoint(folder, **SMALL, shards=2)
    toy.write_checkpoint(folder, **SMALL | {"seed": 6}, shards=1)


def shards_without_an_index(folder: Path) -> None:
    shards_beside_a_single_file(folder)
    (folder / "model.safetensors.index.json").unlink()


def shards_of_an_older_model(folder: Path) -> None:
    toy.write_checkpoint(folder, **SMALL, shards=3)
    toy.write_checkpoint(folder, **SMALL | {"seed": 6}, shards=2)


def another_consolidated_model(folder: Path) -> None:
    toy.write_checkpoint(folder, **SMALL)
    toy.write_checkpoint(folder, **SMALL | {"seed": 6}, layout="consolidated")


def a_smaller_consolidated_model(folder: Path) -> None:
    toy.write_checkpoint(folder, **SMALL)
    toy.write_checkpoint(folder, **SMALL | {"vision": False}, layout="consolidated")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (shards_beside_a_single_file, ("model-00001-of-00002.safetensors …", "index.json, and model.safetensors;")),
        (shards_without_an_index, ("model.safetensors, and model-00001-of-00002.safetensors …",)),
        (shards_of_an_older_model, ("model-00001-of-00002.safetensors …", "and model-00001-of-00003.safetensors …")),
        (another_consolidated_model, ("model.safetensors and consolidated*.safetensors differ in language_model",)),
        (a_smaller_consolidated_model, ("model.safetensors and consolidated*.safetensors differ in vision_tower",)),
    ],
)
def test_two_models_in_a_folder_are_refused_and_both_named(run, tmp_path: Path, make, words: tuple[str, ...]):
    make(tmp_path / "toy")
    refused(run("inspect", tmp_path / "toy"), ("two sets of weights: ", *words, "remove the set that is not meant"))


def test_inspect_says_what_is_used_and_what_is_not(run, tmp_path: Path):
    folder = toy.write_checkpoint(tmp_path / "toy", **SMALL)
    toy.write_checkpoint(folder, **SMALL, layout="consolidated")
    toy.write_adapter(folder)
    for name in ("pytorch_model.bin", "optimizer.pt", "x.gguf", "model.safetensors.part", "._model.safetensors",
                 ".DS_Store", "README.md"):  # fmt: skip
        (folder / name).write_bytes(b"x")
    (folder / ".cache").mkdir()
    status, out, _ = run("inspect", folder, "--json")
    facts = json.loads(out)
    assert (status, facts["files"]) == (0, ["model.safetensors"])
    assert facts["unused"].keys() == {
        "adapter_config.json", "adapter_model.safetensors", "consolidated.safetensors", "model.safetensors.part",
        "optimizer.pt", "pytorch_model.bin", "x.gguf",
    }  # fmt: skip
    out = run("inspect", folder)[1]
    assert "files       config.json, model.safetensors\n" in out
    assert "not used    adapter_model.safetensors: an adapter, which is not merged: give its folder with --merge" in out


def test_shards_without_an_index_must_be_complete(run, tmp_path: Path):
    folder = toy.write_checkpoint(tmp_path / "toy", **SMALL, layout="consolidated", shards=3)
    (folder / "consolidated.safetensors.index.json").unlink()
    assert run("inspect", folder)[0] == 0
    (folder / "consolidated-00002-of-00003.safetensors").unlink()
    refused(run("inspect", folder), ("consolidated-00002-of-00003.safetensors: missing", "download"))


def test_both_configurations_of_a_model_say_the_same(tmp_path: Path):
    sizes = {"hidden": 512, "layers": 3, "heads": 6, "ffn": 768, "vocab": 2304, "original_context": 4096}
    vision_sizes = {"vision_hidden": 192, "vision_layers": 4, "vision_heads": 3, "vision_ffn": 320}
    for family in ("ministral3", "mistral"):
        hf, consolidated = (
            read_checkpoint(
                toy.write_checkpoint(
                    tmp_path / f"{family}-{layout}",
                    family=family,
                    layout=layout,
                    tied=False,
                    rope_theta=1e9,
                    **sizes,
                    **vision_sizes,
                )
            )
            for layout in ("hf", "consolidated")
        )
        assert hf.text == consolidated.text and hf.vision == consolidated.vision
        assert hf.config.family is consolidated.config.family


def params(**values: object):
    def change(folder: Path) -> None:
        path = folder / "params.json"
        table = json.loads(path.read_text())
        for key, value in values.items():
            *where, last = key.split("__")
            inner = table
            for part in where:
                inner = inner[part]
            inner[last] = value
            if value is None:
                del inner[last]
        path.write_text(json.dumps(table))

    return change


REFUSED = {
    "experts": (params(moe={"num_experts": 8}), ("params.json: moe: expected none", "num_experts")),
    "a window": (params(sliding_window=4096), ("sliding_window: expected null", "found 4096")),
    "another factor": (params(yarn__factor=8.0), ("params.json: yarn: factor: expected 16", "found 8")),
    "another slope": (params(yarn__alpha=2.0), ("yarn: alpha: expected 1", "found 2")),
    "a rescaled attention": (params(yarn__apply_scale=True), ("apply_scale", "expected 1", "found 0")),
    "no query scaling": (params(llama_4_scaling=None), ("llama_4_scaling: expected a table", "found None")),
    "another query scaling": (params(llama_4_scaling__beta=0.3), ("llama_4_scaling.beta: expected 0.1", "found 0.3")),
    "twice the context": (params(max_position_embeddings=524288), ("16 make 262144", "context is 524288")),
    "biases": (params(use_biases=True), ("params.json: use_biases: unknown, and set to 'True'", "remove the key")),
    "another scaling": (params(llama_4_scaling__original_max_position_embeddings=8192), ("expected 16384", "8192")),
    "more of YaRN": (params(yarn__truncate=True), ("yarn: truncate: unknown",)),
    "more of the vision encoder": (params(vision_encoder__rope_2d="x"), ("vision_encoder: rope_2d: unknown",)),
    "another projector": (params(vision_encoder__mm_projector_id="mlp"), ("mm_projector_id: expected 'patch_merge'",)),
    "a biased projector": (params(vision_encoder__adapter_bias=True), ("adapter_bias: expected False", "found True")),
    "no width": (params(dim=None), ("params.json: dim: missing", "expected int")),
    "text for a table": (params(vision_encoder="pixtral"), ("vision_encoder: expected a table", "found 'pixtral'")),
    "more layers": (params(n_layers=2), ("layers.1.attention_norm.weight: missing", "params.json calls for")),
    "other numbers": (params(quantization__qformat_weight="int8"), ("qformat_weight 'fp8_e4m3'", "int8", "BF16")),
    "not announced": (params(quantization=None), ("params.json: quantization: missing", "FP8")),
    "no tokenizer": (remove("tekken.json"), ("no tokenizer", "expected tekken.json")),
}


@pytest.fixture(scope="module")
def consolidated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("consolidated") / "toy"
    return toy.write_checkpoint(folder, **SMALL, layout="consolidated", dtype="fp8", tied=False)


@pytest.mark.parametrize(("damage", "words"), REFUSED.values(), ids=REFUSED)
def test_a_damaged_consolidated_checkpoint_is_one_line(consolidated: Path, run, damage, words, tmp_path: Path):
    folder = shutil.copytree(consolidated, tmp_path / "checkpoint")
    damage(folder)
    refused(run("build", folder, tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["hf", "consolidated"])
@pytest.mark.parametrize("family", ["ministral3", "mistral"])
def test_a_smaller_context_is_taken(tmp_path: Path, layout: str, family: str):
    """YaRN's numbers come from the factor and the original context, which are unchanged."""
    folder = toy.write_checkpoint(tmp_path / "toy", **SMALL, layout=layout, family=family)
    before = read_checkpoint(folder).text
    for context in (32768, 1000, before.context):
        if layout == "hf":
            configure("text_config", max_position_embeddings=context)(folder)
        else:
            params(max_position_embeddings=context)(folder)
        assert read_checkpoint(folder).text == msgspec.structs.replace(before, context=context)


# What fine-tuning programs and transformers write into config.json, and what has no effect.
HARMLESS = [
    {"_name_or_path": "/home/me/base", "_attn_implementation_autoset": True, "unsloth_version": "2025.11"},
    {"torch_dtype": "bfloat16", "use_cache": False, "temperature": 0.7, "id2label": {"0": "a"}, "max_length": 20},
    {"attention_bias": False, "mlp_bias": False, "num_experts": None, "moe": {}, "logit_scale": 0},
    {"layer_types": ["full_attention"]},
    {"sliding_window": 262144},
    {"rope_scaling": {"rope_type": "yarn", "factor": 16.0}, "rope_theta": 1e6},
]


@pytest.mark.parametrize("values", HARMLESS, ids=lambda values: next(iter(values)))
def test_keys_without_an_effect_are_taken(tmp_path: Path, values: dict):
    folder = toy.write_checkpoint(tmp_path / "toy", **SMALL)
    before = read_checkpoint(folder).config
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))
    assert read_checkpoint(folder).config == before


def test_plain_rotary_positions_take_no_scaling(run, tmp_path: Path):
    folder = toy.write_checkpoint(tmp_path / "toy", **SMALL, family="mistral")
    configure("text_config", "rope_parameters", rope_type="yarn", factor=4.0)(folder)
    refused(run("inspect", folder), ("rope_type: expected none", "found 'yarn'"))


@pytest.mark.parametrize(
    ("file", "text", "folder", "variant"),
    [
        ("SYSTEM_PROMPT.txt", "You are a helpful drone.", "x", "instruct"),
        ("SYSTEM_PROMPT.txt", "First think: [THINK]…[/THINK].", "x", "reasoning"),
        (None, "", "Ministral-3-3B-Reasoning-2512", "reasoning"),
        (None, "", "Ministral-3-3B-Instruct-2512", "instruct"),
        (None, "", "Ministral-3-3B-Base-2512", "base"),
    ],
)
def test_the_variant_of_a_consolidated_checkpoint(consolidated: Path, tmp_path: Path, file, text, folder, variant):
    copy = shutil.copytree(consolidated, tmp_path / folder)
    if file:
        (copy / file).write_text(text)
    assert read_checkpoint(copy).variant() == variant


def test_the_yarn_values_are_those_of_the_releases():
    assert FAMILIES[0].yarn == Yarn(16.0, 16384, 32.0, 1.0, 1.0, 0.1)
    assert [family.gguf for family in FAMILIES] == ["mistral3", "llama"]
    assert PIXEL_MEAN == toy_layout.PIXEL_MEAN and PIXEL_STD == toy_layout.PIXEL_STD
