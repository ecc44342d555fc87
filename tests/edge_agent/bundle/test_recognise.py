"""What people have in place of what was expected is named, with the next step."""

from __future__ import annotations

import io
import os
import pickle  # only to make a file that is not read
import tarfile
import zipfile
from pathlib import Path

import pytest

from edge_agent.bundle.manifest import read_manifest
from edge_agent.bundle.recognise import describe
from edge_agent.errors import BundleError
from tests.harness.native_files import ARCHITECTURE, GOOD, file, key, number, string, tensor


def archive(kind: str) -> bytes:
    raw = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(raw, "w") as made:
            made.writestr("data.pkl", b"x")
    else:
        with tarfile.open(fileobj=raw, mode="w:gz" if kind == "gz" else "w") as made:
            made.addfile(tarfile.TarInfo("a"), io.BytesIO())
    return raw.getvalue()


Q4 = file([ARCHITECTURE, number(b"general.file_type", 15)], [tensor()])
NO_FACTS = file([key(b"general.name", 8, string(b"x")), number(b"general.file_type", 9999)], [tensor()])
FILES = {
    "git-lfs": ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "empty": ("a.gguf", b"", "an empty file; download or copy it again"),
    "web page": ("a.json", b"\n<!DOCTYPE HTML><title>Login</title>", "a web page and not the file itself"),
    "error of a store": ("a.json", b"<?xml version='1.0'?><Error>", "a web page and not the file itself"),
    "zip": ("a.safetensors", archive("zip"), "a zip archive; unpack it"),
    "tar": ("a.safetensors", archive("tar"), "a tar archive; unpack it"),
    "tar.gz": ("a", archive("gz"), "a gzip archive; unpack it"),
    "xz": ("a", b"\xfd7zXZ\0", "an xz archive"),
    "zstd": ("a", b"\x28\xb5\x2f\xfd", "a zstd archive"),
    "7z": ("a", b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    "new pickle": ("pytorch_model.bin", archive("zip"), "a PyTorch pickle, which is not read; save the model as"),
    "old pickle": ("model.pt", pickle.dumps([1]), "a PyTorch pickle"),
    "any pickle": ("model", pickle.dumps([1]), "a Python pickle, which is not read"),
    "GGUF": ("a.gguf", Q4, "a GGUF file (llama, Q4_K_M); edge-agent bundle wrap makes a bundle of it"),
    "GGUF without a type": ("a.gguf", GOOD, "a GGUF file (llama);"),
    "GGUF without an architecture": ("a.gguf", NO_FACTS, "a GGUF file; edge"),
    "GGUF, cut": ("a.gguf", Q4[:30], "a GGUF file; edge"),
}


@pytest.mark.parametrize(("name", "raw", "words"), FILES.values(), ids=FILES)
def test_a_file_is_known_by_its_first_bytes(tmp_path: Path, name: str, raw: bytes, words: str):
    (tmp_path / name).write_bytes(raw)
    line = describe(tmp_path / name)
    assert words in line and "\n" not in line
    assert line in describe(tmp_path)  # a folder with nothing but this file


def test_what_is_not_known_gets_no_words(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"anything else")
    os.mkfifo(tmp_path / "pipe")
    assert [describe(tmp_path / name) for name in ("a", "pipe", "nothing")] == ["", "", ""]
    assert describe(tmp_path) == ""
    assert describe(tmp_path / "a" / "below a file") == ""


def test_what_cannot_be_read_gets_no_words(tmp_path: Path, monkeypatch):
    def denied(*_arguments: object) -> None:
        raise PermissionError

    (tmp_path / "a").write_bytes(b"GGUF")
    monkeypatch.setattr(Path, "open", denied)
    assert describe(tmp_path / "a") == ""


FOLDERS = {
    "a bundle": (("bundle.json",), "a bundle; give it to edge-agent"),
    "an adapter": (("adapter_config.json",), "a LoRA adapter; give it to edge-quantize lora"),
    "a checkpoint": (("config.json", "adapter_config.json"), "a checkpoint; make a bundle of it"),
    "a consolidated checkpoint": (("params.json",), "a checkpoint; make a bundle of it"),
    "one below": (("Ministral-3-3B/config.json",), "the folder above: give Ministral-3-3B/ (a checkpoint)"),
    "two below": (("snapshots/0a1b/config.json", ".locks/x"), "the folder above: give snapshots/0a1b/ (a checkpoint)"),
    "several below": (
        ("a/bundle.json", "b/config.json", "c/adapter_config.json"),
        "the folder above: give a/ (a bundle) or b/ (a checkpoint) or c/ (a LoRA adapter)",
    ),
    "a hidden one": ((".cache/config.json",), "an empty folder"),
    "nothing": ((), "an empty folder"),
}


@pytest.mark.parametrize(("names", "words"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_is_known_by_its_files(tmp_path: Path, names: tuple[str, ...], words: str):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert describe(tmp_path).startswith(words)


def test_a_link_into_a_cache_that_is_not_complete(tmp_path: Path):
    (tmp_path / "model.safetensors").symlink_to("../blobs/0a1b")
    assert describe(tmp_path / "model.safetensors").startswith("a link to a file that is missing; the download is not")


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("config.json", b"{}", "bundle.json: missing: a checkpoint; make a bundle of it with edge-quantize build"),
        ("adapter_config.json", b"{}", "bundle.json: missing: a LoRA adapter"),
        ("model-Q4_K_M.gguf", Q4, "bundle.json: missing: model-Q4_K_M.gguf in it is a GGUF file (llama, Q4_K_M)"),
        ("3b/bundle.json", b"{}", "bundle.json: missing: the folder above: give 3b/ (a bundle)"),
        ("bundle.json", FILES["git-lfs"][1], "bundle.json: a git-lfs pointer"),
        ("bundle.json", b"", "bundle.json: an empty file"),
    ],
)
def test_in_place_of_a_bundle(tmp_path: Path, name: str, raw: bytes, words: str):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(BundleError) as caught:
        read_manifest(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
