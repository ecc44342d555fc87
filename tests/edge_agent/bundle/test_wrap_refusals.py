"""GGUF files that cannot be served are refused with one line each, and nothing is left half-written."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from edge_agent.bundle.verify import verify_bundle
from edge_agent.bundle.wrap import wrap
from edge_agent.errors import BundleError, UserError
from tests.harness import gguf_toys as toys

ARCHITECTURE = "general.architecture"
# What is wrong -> (architecture, arguments of write_language, words of the line).
REFUSED: dict[str, tuple[str, dict, str]] = {
    "a LoRA adapter": ("llama", {"keys": {"general.type": "adapter"}}, "expected 'model', found 'adapter': give it in"),
    "an old LoRA adapter": ("llama", {"keys": {"adapter.type": "lora"}}, "adapter.type: a LoRA adapter"),
    "an embedding model": ("bert", {}, "general.architecture: 'bert': an embedding model"),
    "a decoder that was made an embedding model": ("llama", {"keys": {"llama.pooling_type": 3}}, "llama.pooling_type"),
    "attention in both directions": ("gemma3", {"keys": {"gemma3.attention.causal": False}}, "an embedding model"),
    "a model with M-RoPE": ("qwen2vl", {}, "general.architecture: 'qwen2vl': its positions have three dimensions"),
    "M-RoPE in its keys": (
        "glm4", {"keys": {"glm4.rope.dimension_sections": [8, 4, 4, 0]}}, "glm4.rope.dimension_sections: its positions",
    ),
    "a recurrent model": ("mamba", {}, "its state cannot be cut back"),
    "recurrent layers in its keys": ("llama", {"keys": {"llama.ssm.state_size": 16}}, "llama.ssm.state_size: its"),
    "a diffusion model": ("llada", {}, "a diffusion model"),
    "an mmproj in place of the model": ("clip", {}, "'clip': an mmproj; give it second"),
    "an architecture of the future": ("llama9", {}, "'llama9': unknown to this version"),
    "one part of several": ("llama", {"keys": {"split.count": 3, "split.no": 0}}, "part 1 of 3 of a split file"),
    "no number of layers": ("llama", {"drop": ("llama.block_count",)}, "llama.block_count: expected a number"),
    "another number of layers": ("llama", {"keys": {"llama.block_count": 3}}, "block_count: 3, but the file has"),
    "no context": ("llama", {"drop": ("llama.context_length",)}, "llama.context_length: expected a number"),
    "another width": ("llama", {"keys": {"llama.embedding_length": 128}}, "embedding_length: 128, but token_embd"),
    "another vocabulary size": ("llama", {"keys": {"llama.vocab_size": 7}}, "llama.vocab_size: 7, but token_embd"),
    "no heads": ("llama", {"drop": ("llama.attention.head_count",)}, "llama.attention.head_count: expected a number"),
    "heads of some layers": (
        "llama", {"keys": {"llama.attention.head_count_kv": [2, 2, 2]}}, "expected a number for each of 2 layers",
    ),
    "no embeddings": ("llama", {"drop": ("token_embd.weight",)}, "token_embd.weight: expected the matrix"),
    "no vocabulary": ("llama", {"drop": ("tokenizer.ggml.tokens",)}, "tokenizer.ggml.tokens: missing"),
    "a vocabulary of another size": (
        "llama", {"keys": {"tokenizer.ggml.tokens": ["a"]}}, "token_type: expected 1 numbers of type int32",
    ),
    "numbers as tokens": ("llama", {"keys": {"tokenizer.ggml.tokens": [1, 2]}}, "ggml.tokens: expected texts"),
    "types that are texts": (
        "llama", {"keys": {"tokenizer.ggml.token_type": ["x"]}}, "tokenizer.ggml.token_type: expected ",
    ),
    "a number that llama.cpp takes in another type only": (
        "llama", {"keys": {"llama.context_length": np.uint64(4096)}}, "llama.context_length: expected a uint32",
    ),
    "an alignment in another type": (
        "llama", {"keys": {"general.alignment": np.uint64(32)}}, "general.alignment: expected a uint32",
    ),
    "scores of another number of tokens": (
        "llama", {"keys": {"tokenizer.ggml.scores": [0.5]}}, "tokenizer.ggml.scores: expected ",
    ),
    "a key length that is a fraction": (
        "llama", {"keys": {"llama.attention.key_length": 16.0}}, "llama.attention.key_length: expected a uint32",
    ),
    "a scaling of positions that llama.cpp ends the process for": (
        "llama", {"keys": {"llama.rope.scaling.type": "bogus"}}, "expected one of none, linear, yarn, longrope",
    ),
    "more experts in use than there are": (
        "llama", {"keys": {"llama.expert_count": 8, "llama.expert_used_count": 20}}, "expert_used_count: expected at",
    ),
    "an epsilon that is no number": (
        "llama",
        {"keys": {"llama.attention.layer_norm_rms_epsilon": float("nan")}},
        "llama.attention.layer_norm_rms_epsilon: expected a number from 0 to 1, found nan",
    ),
    "a first token of 100 letters": (
        "llama",
        {
            "special": {"x" * 100: toys.CONTROL, **toys.CHATML},
            "keys": {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": True},
        },
        "no bundle can be made of it: Expected `str` of length <= 63",
    ),
    "a text of thousands of letters in place of a number": (
        "llama", {"keys": {"llama.block_count": "x" * 4000}}, "llama.block_count: expected a ",
    ),
    "no types of tokens": ("llama", {"drop": ("tokenizer.ggml.token_type",)}, "no prompt layout of"),
    "special tokens that text can write": (
        "llama", {"special": {"<|im_start|>": toys.USER_DEFINED, "<|im_end|>": toys.CONTROL}}, "no prompt layout of",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_not_a_model_to_serve_is_one_line(
    architecture: str, arguments: dict, words: str, tmp_path: Path
):
    path = toys.write_language(tmp_path / "x.gguf", architecture, **arguments)
    with pytest.raises(UserError) as caught:
        wrap(path, None, tmp_path / "out")
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and words in line and "\n" not in line and len(line) < 1000
    assert os.listdir(tmp_path) == ["x.gguf"]


def test_an_architecture_that_is_a_list_is_one_line(tmp_path: Path):
    def text(words: bytes) -> bytes:
        return struct.pack("<Q", len(words)) + words

    value = struct.pack("<IIQ", 9, 8, 1) + text(b"llama")
    raw = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text(b"general.architecture") + value
    path = tmp_path / "x.gguf"
    path.write_bytes(raw + bytes(100))
    with pytest.raises(BundleError, match=r"general\.architecture: .None.: unknown to this version"):
        wrap(path, None, tmp_path / "out")


def test_a_token_that_text_can_write_is_named_where_the_layout_is_given(tmp_path: Path):
    special = {"<|im_start|>": toys.USER_DEFINED, "<|im_end|>": toys.CONTROL}
    path = toys.write_language(tmp_path / "x.gguf", special=special)
    with pytest.raises(UserError, match=r"'<\|im_start\|>': expected a control token .*, found type 4"):
        wrap(path, None, tmp_path / "out", layout="chatml")


def damaged(raw: bytes) -> dict[str, tuple[bytes, str]]:
    """What is wrong -> (the file, words of the line)."""
    big_endian = raw[:4] + struct.pack(">I", 3) + raw[8:]
    return {
        "empty": (b"", "an empty file; download or copy it again; expected a GGUF file"),
        "not a GGUF file": (b"hello", "not a GGUF file; expected a GGUF file"),
        "a zip archive": (b"PK\3\4" + raw, "a zip archive; unpack it; expected a GGUF file"),
        "cut in its header": (raw[:200], "inside its header"),
        "cut in its data": (raw[:-100], "ends after the end of the file"),
        "big-endian": (big_endian, "big-endian; convert it"),
        "of a version of the future": (raw[:4] + struct.pack("<I", 9) + raw[8:], "GGUF version 9: expected version 3"),
        "of a tensor type of the future": (
            raw.replace(b"output_norm.weight" + struct.pack("<IQI", 1, toys.HIDDEN, 0),
                        b"output_norm.weight" + struct.pack("<IQI", 1, toys.HIDDEN, 99)),
            "output_norm.weight: type 99 is unknown",
        ),
        "of a value type of the future": (
            raw.replace(b"general.name" + struct.pack("<I", 8), b"general.name" + struct.pack("<I", 77)),
            "general.name: value type 77 is unknown",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("what", damaged(b"GGUF" + bytes(300)))
def test_a_damaged_file_is_one_line(chatml: Path, gemma: tuple[Path, Path], what: str, tmp_path: Path):
    raw, words = damaged(chatml.read_bytes())[what]
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    for arguments in ((path, None), (gemma[0], path)):
        if arguments[1] is not None and what in ("cut in its data", "of a tensor type of the future"):
            continue  # it is not an mmproj either
        with pytest.raises(BundleError) as caught:
            wrap(*arguments, tmp_path / "out")
        line = str(caught.value)
        assert line.startswith(f"{path}: ") and words in line and "\n" not in line
    assert os.listdir(tmp_path) == ["x.gguf"]


def test_unknown_keys_are_accepted(tmp_path: Path):
    keys = {"llama.attention.of_the_future": 3, "quantize.imatrix.file": "unsloth.dat", "future.flags": [1, 2, 3]}
    wrap(toys.write_language(tmp_path / "x.gguf", keys=keys), None, tmp_path / "out")
    verify_bundle(tmp_path / "out")


def test_a_folder_and_a_missing_file(chatml: Path, tmp_path: Path):
    with pytest.raises(BundleError, match=r"nowhere\.gguf: No such file or directory"):
        wrap(tmp_path / "nowhere.gguf", None, tmp_path / "out")
    with pytest.raises(BundleError, match="an empty folder; expected a GGUF file"):
        wrap(tmp_path, None, tmp_path / "out")


# What is wrong -> (keys of the mmproj, words of the line).
NO_PAIR: dict[str, tuple[dict, str]] = {
    "another width": ({"clip.vision.projection_dim": 128}, "128 numbers for each row, but the language model takes 64"),
    "no width": ({"clip.vision.projection_dim": "wide"}, "clip.vision.projection_dim: expected a number"),
    "a projector with M-RoPE": ({"clip.projector_type": "qwen2vl_merger"}, "its positions have three dimensions"),
    "an unknown projector": (
        {"clip.projector_type": "resampler"},
        "expected one of pixtral, gemma3, found 'resampler'",
    ),
    "no projector": ({"clip.projector_type": 3}, "clip.projector_type: expected one of pixtral, gemma3, found 3"),
    "a projector of another family": ({"clip.projector_type": "pixtral"}, "pixtral is made for mistral3 or llama"),
    "sound only": ({"clip.has_vision_encoder": False}, "clip.has_vision_encoder: expected true"),
    "a size that does not divide": ({"clip.vision.image_size": 60}, "expected a multiple of 28"),
    "two means": ({"clip.vision.image_mean": [0.5, 0.5]}, "clip.vision.image_mean: expected three numbers"),
    "a language model": ({"general.architecture": "llama"}, "general.architecture: expected clip, found 'gemma3'"),
}


@pytest.mark.parametrize(("keys", "words"), NO_PAIR.values(), ids=NO_PAIR)
def test_a_pair_that_does_not_belong_together(gemma: tuple[Path, Path], keys: dict, words: str, tmp_path: Path):
    path = toys.write_gemma_mmproj(tmp_path / "mmproj.gguf", keys=keys)
    if "general.architecture" in keys:
        path.write_bytes(gemma[0].read_bytes())
    with pytest.raises(BundleError) as caught:
        wrap(gemma[0], path, tmp_path / "out")
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and words in line and "\n" not in line
    assert os.listdir(tmp_path) == ["mmproj.gguf"]


def test_a_layout_without_a_place_for_images(gemma: tuple[Path, Path], tmp_path: Path):
    path = toys.write_language(tmp_path / "x.gguf", "gemma3", toys.CHATML)
    with pytest.raises(BundleError, match="prompt layout chatml: has no place for the rows of a projector gemma3"):
        wrap(path, gemma[1], tmp_path / "out")


def test_a_model_without_the_tokens_around_an_image(gemma: tuple[Path, Path], tmp_path: Path):
    special = {name: kind for name, kind in toys.GEMMA.items() if "image" not in name}
    path = toys.write_language(tmp_path / "x.gguf", "gemma3", special)
    with pytest.raises(
        BundleError, match="'<start_of_image>': expected a control token for the layout gemma, found no"
    ):
        wrap(path, gemma[1], tmp_path / "out")
    wrap(path, None, tmp_path / "out")
