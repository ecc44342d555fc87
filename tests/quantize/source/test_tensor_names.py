"""The tensor tables, held against the `gguf` package's own tables and against the names toy checkpoints carry."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edge_agent.bundle.gguf_package import gguf
from quantize.source.tensor_names import TensorSpec, canonical, tensor_specs
from tests.harness import toy

TEXT_ROWS, VISION_ROWS = tensor_specs(layers=3, vision_layers=2, tied=False)


@pytest.mark.parametrize(
    ("written", "ours"),
    [
        ("language_model.model.layers.7.mlp.up_proj.weight", "text.layers.7.mlp.up_proj.weight"),
        ("model.language_model.layers.7.mlp.up_proj.weight", "text.layers.7.mlp.up_proj.weight"),
        ("language_model.model.embed_tokens.weight", "text.embed_tokens.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("vision_tower.ln_pre.weight", "vision.ln_pre.weight"),
        ("model.vision_tower.ln_pre.weight", "vision.ln_pre.weight"),
        ("multi_modal_projector.linear_1.weight", "projector.linear_1.weight"),
        ("model.multi_modal_projector.linear_1.weight", "projector.linear_1.weight"),
        ("language_model.model.layers.0.mlp.up_proj.weight_scale_inv", "text.layers.0.mlp.up_proj.weight_scale_inv"),
        ("audio_tower.conv.weight", "audio_tower.conv.weight"),
    ],
)
def test_one_tensor_has_one_name_whichever_release_wrote_it(written: str, ours: str):
    assert canonical(written) == ours


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_the_tables_name_every_tensor_of_a_checkpoint_and_no_other(tmp_path: Path, tied: bool, prefix: str):
    folder = toy.write_checkpoint(tmp_path, tied=tied, prefix=prefix, layers=3, vision_layers=2, vocab=2048)
    raw = (folder / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    written = [canonical(name) for name in header if name != "__metadata__"]
    text, vision = tensor_specs(3, 2, tied)
    assert sorted(written) == sorted(row.hf for row in [*text, *vision])


@pytest.mark.parametrize("column", ["hf", "consolidated", "gguf"])
def test_tensor_names_are_unique(column: str):
    for rows in (TEXT_ROWS, VISION_ROWS):
        written = [getattr(row, column) for row in rows]
        assert len(set(written)) == len(written) and not any("{" in name for name in written)


def _gguf_name(arch: gguf.MODEL_ARCH, blocks: int, name: str) -> str | None:
    return gguf.get_tensor_name_map(arch, blocks).get_name(name, try_suffixes=(".weight",))


@pytest.mark.parametrize("row", TEXT_ROWS, ids=lambda row: row.gguf)
def test_text_names_are_those_of_llama_cpps_converter(row: TensorSpec):
    transformers = re.sub(r"^text\.", "model.", row.hf)
    assert _gguf_name(gguf.MODEL_ARCH.MISTRAL3, 3, transformers) == row.gguf
    assert _gguf_name(gguf.MODEL_ARCH.MISTRAL3, 3, row.consolidated) == row.gguf


@pytest.mark.parametrize("row", VISION_ROWS, ids=lambda row: row.gguf)
def test_vision_names_are_those_of_llama_cpps_converter(row: TensorSpec):
    transformers = re.sub(r"^projector\.", "multi_modal_projector.", re.sub(r"^vision\.", "vision_tower.", row.hf))
    assert _gguf_name(gguf.MODEL_ARCH.MMPROJ, 24, transformers) == row.gguf
    # The package has no entry for the adapter's two matrices: the converter renames them itself.
    adapter = {
        "vision_language_adapter.w_in.weight": "mm.1.weight",
        "vision_language_adapter.w_out.weight": "mm.2.weight",
    }
    consolidated = adapter.get(row.consolidated) or _gguf_name(gguf.MODEL_ARCH.MMPROJ, 24, row.consolidated)
    assert consolidated == row.gguf


def test_only_queries_and_keys_are_permuted():
    text = {row.gguf: row.rope for row in TEXT_ROWS if row.rope}
    vision = {row.gguf: row.rope for row in VISION_ROWS if row.rope}
    assert text == {f"blk.{n}.attn_{w}.weight": h for n in range(3) for w, h in (("q", "heads"), ("k", "kv_heads"))}
    assert vision == {f"v.blk.{n}.attn_{w}.weight": "v_heads" for n in range(2) for w in "qk"}
