"""Adapters are checked before native code reads them. The files are small, written byte by byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.bundle import signing
from edge_agent.bundle.files import hash_file
from edge_agent.bundle.lora_check import verify_adapters
from edge_agent.bundle.manifest import Bundle, EmbeddingInfo, Manifest, ModelInfo
from edge_agent.errors import ConfigError
from tests.harness.native_files import ARCHITECTURE, file, key, string, tensor


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    model = ModelInfo(
        family="ministral3", size="3B", variant="instruct", parameters=1, layers=1, hidden=1, vocab=1, context=1,
        kv_bytes_per_token=1, special={}, embedding=EmbeddingInfo(offset=0, ggml_type="F32", row_bytes=4),
    )  # fmt: skip
    manifest = Manifest(
        format=1, created_by="", files={}, model=model, vision=None, recipe="", bytes_by_type={}, source_dtype="",
        source_sha256={}, licence="",
    )  # fmt: skip
    return Bundle(folder=tmp_path, manifest=manifest, id="")


def text(name: bytes, value: bytes) -> bytes:
    return key(name, 8, string(value))


LORA = [ARCHITECTURE, text(b"general.type", b"adapter"), text(b"adapter.type", b"lora")]
A = tensor(b"blk.0.ffn_up.weight.lora_a", (32, 4))
B = tensor(b"blk.0.ffn_up.weight.lora_b", (4, 16), offset=512)
GOOD = file([*LORA, text(b"general.base_model.0.name", b"ministral3 3B")], [A, B])


def test_an_adapter_of_this_model_passes(bundle, tmp_path):
    (tmp_path / "good.gguf").write_bytes(GOOD)
    (tmp_path / "nameless.gguf").write_bytes(file(LORA, [A, B]))  # not every tool writes the model's name
    adapters = {name: str(tmp_path / f"{name}.gguf") for name in ("good", "nameless")}
    verify_adapters(adapters, bundle, ())
    with pytest.raises(ConfigError, match=r"other: .*No such file"):
        verify_adapters(adapters | {"other": str(tmp_path / "other.gguf")}, bundle, ())


WRONG = {
    "another type": (file([ARCHITECTURE, text(b"general.type", b"model")], [A, B]), "found 'model'; make it with"),
    "not a LoRA": (
        file([*LORA[:2], text(b"adapter.type", b"x")], [A, B]),
        "adapter.type: expected 'lora'",
    ),
    "an activated LoRA": (
        file([*LORA, key(b"adapter.alora.invocation_tokens", 4, bytes(4))], [A, B]),
        "activated LoRA",
    ),
    "another model": (
        file([*LORA, text(b"general.base_model.0.name", b"x 8B")], [A, B]),
        "made for x 8B, the",
    ),
    "a whole matrix": (file(LORA, [tensor(b"blk.0.ffn_up.weight")]), "expected low-rank matrices of the layers only"),
    "embeddings": (file(LORA, [tensor(b"token_embd.weight.lora_a")]), "expected low-rank matrices of the layers only"),
    "no lora_b": (file(LORA, [A]), "blk.0.ffn_up.weight.lora_b of the same rank is missing"),
    "another rank": (file(LORA, [A, tensor(b"blk.0.ffn_up.weight.lora_b", (8, 16), offset=512)]), "of the same rank"),
    "one dimension": (file(LORA, [tensor(b"x.lora_a", (32,)), tensor(b"x.lora_b", offset=512)]), "of the same rank"),
    "not GGUF": (b"PK\3\4", "expected GGUF version 3"),
}


@pytest.mark.parametrize(("raw", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_adapter_is_named(bundle, tmp_path, raw, words):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        verify_adapters({"night": str(path)}, bundle, ())
    line = str(caught.value)
    assert line.startswith(f"language.adapters: night: {path}: ") and words in line and "\n" not in line


def test_a_link_is_refused(bundle, tmp_path):
    (tmp_path / "good.gguf").write_bytes(GOOD)
    (tmp_path / "link.gguf").symlink_to(tmp_path / "good.gguf")
    with pytest.raises(ConfigError, match="plain file"):
        verify_adapters({"night": str(tmp_path / "link.gguf")}, bundle, ())


def test_with_trusted_keys_an_adapter_must_be_signed(bundle, tmp_path):
    path, signature = tmp_path / "x.gguf", tmp_path / "x.gguf.sig"
    path.write_bytes(GOOD)
    trusted = (str(signing.keygen(tmp_path / "key")),)
    with pytest.raises(ConfigError, match=r"x\.gguf\.sig: No such file"):
        verify_adapters({"night": str(path)}, bundle, trusted)
    statement = signing.adapter_statement(hash_file(path).sha256)
    signature.write_bytes(signing.sign(statement, tmp_path / "key"))
    verify_adapters({"night": str(path)}, bundle, trusted)
    path.write_bytes(GOOD + b"\0")
    with pytest.raises(ConfigError, match="not signed by any key"):
        verify_adapters({"night": str(path)}, bundle, trusted)


def test_the_signed_bytes_of_an_adapter_never_change():
    """Signatures that exist must stay valid. The words in front keep them apart from the bytes of a manifest."""
    assert signing.adapter_statement("ab" * 32) == b"edge-agent adapter sha256 " + b"ab" * 32 + b"\n"
