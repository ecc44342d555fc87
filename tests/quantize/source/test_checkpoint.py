"""Reading a checkpoint: every value and every tensor once. Damaged ones are in test_refused_checkpoints.py."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from quantize.source import checkpoint
from quantize.source.hf_config import TextConfig, VisionTowerConfig
from quantize.source.tensor_names import Yarn
from tests.harness import toy, toy_layout
from tests.harness.gguf_reading import stored, values


def test_every_number_of_the_configuration_is_read(tmp_path: Path):
    folder = toy.write_checkpoint(
        tmp_path, hidden=512, layers=3, heads=6, kv_heads=2, ffn=768, vocab=2304, vision_hidden=192, vision_layers=4,
        vision_heads=3, vision_ffn=320, original_context=4096, rope_theta=1e9, tied=False,
    )  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 2e-5
    config["vision_config"] |= {"image_size": 1120, "rope_parameters": {"rope_theta": 5000, "rope_type": "default"}}
    (folder / "config.json").write_text(json.dumps(config))
    found = checkpoint.read_checkpoint(folder)
    assert found.config.family.name == "ministral3"
    assert found.text == TextConfig(
        hidden=512, layers=3, ffn=768, heads=6, kv_heads=2, head_dim=128, vocab=2304, context=65536, rms_eps=2e-5,
        tied=False, rope_theta=1e9, yarn=Yarn(16.0, 4096, 32.0, 1.0, 1.0, 0.1),
    )  # fmt: skip
    assert found.vision == VisionTowerConfig(
        hidden=192, layers=4, ffn=320, heads=3, channels=3, patch=14, merge=2, image_size=1120, rope_theta=5000.0,
        eps=1e-5, mean=toy_layout.PIXEL_MEAN, std=toy_layout.PIXEL_STD,
    )  # fmt: skip


def test_older_spellings_of_the_configuration_are_read_the_same(toy_bf16: Path, tmp_path: Path):
    folder = shutil.copytree(toy_bf16, tmp_path / "older")
    config = json.loads((folder / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    del rope["rope_type"]  # `type` was its name
    del config["vision_config"]["rope_parameters"], config["text_config"]["tie_word_embeddings"]
    config["vision_config"]["rope_theta"] = 10000.0
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").unlink()
    found, plain = checkpoint.read_checkpoint(folder), checkpoint.read_checkpoint(toy_bf16)
    assert (found.text, found.vision) == (plain.text, plain.vision)
    (folder / "preprocessor_config.json").unlink()  # then the family's own values stand
    assert checkpoint.read_checkpoint(folder).vision == plain.vision


def test_a_processor_may_write_whole_numbers(toy_bf16: Path, tmp_path: Path):
    folder = shutil.copytree(toy_bf16, tmp_path / "toy")
    data = json.loads((folder / "processor_config.json").read_text())
    data["image_processor"] |= {"image_mean": [0, 0.5, 0], "image_std": [1, 1, 1]}
    (folder / "processor_config.json").write_text(json.dumps(data))
    found = checkpoint.read_checkpoint(folder).vision
    assert (found.mean, found.std) == ((0.0, 0.5, 0.0), (1.0, 1.0, 1.0))
    assert {type(number) for number in (*found.mean, *found.std)} == {float}  # or GGUF gets whole numbers as well


@pytest.mark.parametrize("source", ["toy_bf16", "toy_fp8"])
def test_every_tensor_is_used_once_or_named_as_ignored(source: str, request):
    folder = request.getfixturevalue(source)
    found, names = checkpoint.read_checkpoint(folder), stored(folder).keys()
    used = [source.name for source in found.sources.values()]
    assert sorted([*used, *found.ignored]) == sorted(names)
    assert set(found.ignored) == {name for name in names if name.endswith(".activation_scale")}
    assert all("activation" in why for why in found.ignored.values())
    weights = [shape for name, (_, shape, _) in stored(folder).items() if name.endswith(".weight")]
    assert found.parameters == sum(map(math.prod, weights))
    assert found.fp8 == (source == "toy_fp8")


@pytest.mark.parametrize("block_bytes", [1 << 26, 300_000, 5000, 1])
@pytest.mark.parametrize("source", ["toy_bf16", "toy_fp8"])
def test_values_are_scaled_and_blocks_hold_whole_heads(source: str, block_bytes: int, request, monkeypatch):
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", block_bytes)
    folder = request.getfixturevalue(source)
    found = checkpoint.read_checkpoint(folder)
    rows = [
        row for row in [*found.text_tensors, *found.vision_tensors] if "embed" not in row.hf and "lm_head" not in row.hf
    ]
    for row in rows if block_bytes > 5000 else rows[:12]:
        unit = found.shape(row)[0] // found.dims[row.rope] if row.rope else 1
        blocks = list(found.dequantised_blocks(row, unit))
        assert all(block.dtype == np.float32 and len(block) % unit == 0 for block in blocks)
        largest = max(block.nbytes for block in blocks)
        assert largest <= max(block_bytes, 4 * unit * math.prod(found.shape(row)[1:]))
        np.testing.assert_array_equal(
            np.concatenate(blocks), values(folder, found.sources[row.hf].name), err_msg=row.hf
        )


def test_a_folder_of_links_as_in_a_download_cache(toy_bf16: Path, tmp_path: Path):
    for file in toy_bf16.iterdir():
        (tmp_path / file.name).symlink_to(file)
    plain, linked = checkpoint.read_checkpoint(toy_bf16), checkpoint.read_checkpoint(tmp_path)
    row = plain.text_tensors[0]
    np.testing.assert_array_equal(linked.read_rows(row, 5, 9), plain.read_rows(row, 5, 9))


@pytest.mark.parametrize(
    ("outer", "inner", "has_head", "tied"),
    [
        (True, True, False, True),
        (False, False, True, False),
        (None, True, False, True),
        (None, False, True, False),
        (None, None, False, True),  # no word on it: the file decides
        (None, None, True, False),
        (True, False, True, False),  # an outer `true` that nobody set
        (True, None, True, True),
    ],
)
def test_whether_embeddings_are_tied(tmp_path: Path, outer, inner, has_head: bool, tied: bool):
    folder = toy.write_checkpoint(tmp_path, tied=not has_head, vocab=2048, layers=1, vision_layers=1)
    config = json.loads((folder / "config.json").read_text())
    for table, stored_value in ((config, outer), (config["text_config"], inner)):
        del table["tie_word_embeddings"]
        if stored_value is not None:
            table["tie_word_embeddings"] = stored_value
    (folder / "config.json").write_text(json.dumps(config))
    found = checkpoint.read_checkpoint(folder)
    assert found.text.tied == tied
    assert ("lm_head.weight" in found.sources) == (not tied)


@pytest.mark.parametrize(
    ("file", "template", "variant"),
    [
        (None, "", "base"),
        ("chat_template.jinja", "{{ bos_token }}[INST]{{ messages }}[/INST]", "instruct"),
        ("tokenizer_config.json", "{{ bos_token }}[INST]{{ messages }}[/INST]", "instruct"),
        ("chat_template.jinja", "# HOW YOU SHOULD THINK: draft your reasoning in [THINK]…[/THINK]", "reasoning"),
    ],
)
def test_the_variant_comes_from_the_chat_template(toy_bf16: Path, tmp_path: Path, file, template: str, variant: str):
    folder = shutil.copytree(toy_bf16, tmp_path / "toy")
    if file == "tokenizer_config.json":
        template = json.dumps({"chat_template": template})
    if file:
        (folder / file).write_text(template, encoding="utf-8")
    assert checkpoint.read_checkpoint(folder).variant() == variant
