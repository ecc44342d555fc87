"""A bundle that is changed after its verification is never served, also not after a restart in flight."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.bundle.manifest import LANGUAGE, MANIFEST, MMPROJ, VISION, read_manifest
from edge_agent.config import LanguageConfig, VisionConfig
from edge_agent.errors import BundleError
from edge_agent.ipc.events import Heartbeat, ModelReady, StartupFailed, decode_model_event
from edge_agent.ipc.frame_slot import Slot
from edge_agent.model import __main__ as entry
from edge_agent.model.llama import LlamaContext, LlamaError, LlamaOptions
from tests.harness.rig import config_of, model_start

ADAPTER = "night.gguf"


class Loaded(Exception):
    """The model process got ready."""


class Events:
    """The socket to the supervisor."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, payload: bytes) -> None:
        self.sent.append(decode_model_event(payload))
        if isinstance(self.sent[-1], ModelReady):
            raise Loaded


@pytest.fixture
def start(monkeypatch, toy_bundle: Path, switchable: Path, tmp_path: Path):
    """start(backend, change) -> the events of a model process, whose bundle is changed after it was verified."""
    folder, adapter = shutil.copytree(toy_bundle, tmp_path / "bundle"), shutil.copy(switchable, tmp_path / ADAPTER)

    def start(backend: str, change: Callable[[Path], None]) -> list[Any]:
        language = LanguageConfig(context=1024, gpu_layers=0, max_text_tokens=8, adapters={"night": str(adapter)})
        message = model_start(config_of(folder, vision=VisionConfig(max_image_tokens=16, backend=backend),
                                        language=language))  # fmt: skip
        change(folder)
        events = Events()
        slot = Slot.create()
        monkeypatch.setattr(entry, "attach_to_supervisor", lambda: (slot, events, message, False))
        with contextlib.closing(slot):
            assert entry.main() == 1
        return events.sent

    return start


def replace(name: str) -> Callable[[Path], None]:
    """Another file of the same size under the name: one byte of its weights differs."""

    def change(folder: Path) -> None:
        path = folder.parent / name if name == ADAPTER else folder / name
        raw = bytearray(path.read_bytes())
        raw[-5] ^= 1
        path.with_name("new").write_bytes(raw)
        os.replace(path.with_name("new"), path)

    return change


@pytest.mark.parametrize(
    ("backend", "name"), [("onnxruntime", LANGUAGE), ("onnxruntime", VISION), ("mtmd", MMPROJ), ("mtmd", ADAPTER)]
)
def test_a_file_that_was_replaced_is_refused_by_name(start, backend: str, name: str):
    *before, failed = start(backend, replace(name))
    assert isinstance(failed, StartupFailed) and failed.fault == "bundle"
    assert f"{name}: sha256: expected " in failed.reason and "\n" not in failed.reason
    assert any(isinstance(event, Heartbeat) and event.what.startswith(f"verify {name}") for event in before)


@pytest.mark.parametrize("backend", ["onnxruntime", "mtmd"])
def test_what_is_not_loaded_and_a_new_manifest_change_nothing(start, backend: str):
    """The manifest comes from the supervisor: one that is copied over it later has no effect."""

    def change(folder: Path) -> None:
        replace(MMPROJ if backend == "onnxruntime" else VISION)(folder)
        (folder / MANIFEST).write_text("{}")

    with pytest.raises(Loaded):
        start(backend, change)


def test_a_file_that_is_overwritten_while_it_is_loaded_is_refused(start, monkeypatch):
    """After the hash, before the last byte was loaded."""
    real = entry.load_model

    def load(*arguments: Any) -> Any:
        loaded = real(*arguments)
        path = arguments[1].path(VISION)
        path.write_bytes(path.read_bytes())
        return loaded

    monkeypatch.setattr(entry, "load_model", load)
    failed = start("onnxruntime", lambda folder: None)[-1]
    assert isinstance(failed, StartupFailed) and "vision.onnx: changed while it was loaded" in failed.reason


def test_an_error_of_native_code_names_the_file_and_not_its_descriptor(start, monkeypatch):
    def refuse(path: Path, *_arguments: object, **_keywords: object) -> None:
        raise BundleError(f"{path}: cannot be loaded")

    monkeypatch.setattr("edge_agent.model.load.open_encoder", refuse)
    failed = start("mtmd", lambda folder: None)[-1]
    assert failed.reason.endswith(f"/bundle/{MMPROJ}: cannot be loaded")


@pytest.mark.parametrize("mmap", [False, True])
def test_a_model_whose_file_is_overwritten_in_use_answers_nothing_more(toy_bundle: Path, tmp_path: Path, mmap: bool):
    """Mapped weights and the embedding table would change under the running model."""
    path = Path(shutil.copy(toy_bundle / LANGUAGE, tmp_path))
    options = LlamaOptions(context=256, threads=1, gpu_layers=0, mmap=mmap)
    with LlamaContext(path, options, read_manifest(toy_bundle).manifest.model.embedding) as llama:
        llama.logits_after_last([1, 2, 3], 0)
        raw = path.read_bytes()
        with path.open("r+b") as file:
            file.write(raw)
        with pytest.raises(LlamaError, match=r"language\.gguf: changed while it is in use"):
            llama.logits_after_last([4, 5], 3)
