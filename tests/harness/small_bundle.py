"""A small bundle: its files have valid headers and no weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.bundle import signing
from edge_agent.bundle.manifest import LANGUAGE, MANIFEST, MMPROJ, REPORT, SPECIAL_TOKENS, THINK_TOKENS, VISION
from edge_agent.bundle.store import StoreError, list_bundles
from edge_agent.bundle.verify import verify_bundle
from edge_agent.errors import BundleError
from tests.harness.native_files import CLIP_FILE, HIDDEN, LANGUAGE_FILE, TABLE_BYTES, TOKENS
from tests.harness.native_files import model as onnx_model

NAMES = (LANGUAGE, VISION, MMPROJ, REPORT)
ENCODER = onnx_model(sides=(1, 3, "height", "width")).SerializeToString()
CONTENT = dict(zip(NAMES, (LANGUAGE_FILE, ENCODER, CLIP_FILE, b"content " * 50), strict=True))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest_fields() -> dict:
    """A manifest as JSON, written by hand."""
    return {
        "format": 1,
        "created_by": "a test",
        "files": {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in CONTENT.items()},
        "model": {
            "family": "ministral3",
            "size": "3B",
            "variant": "instruct",
            "parameters": 5000,
            "layers": 3,
            "hidden": HIDDEN,
            "vocab": len(TOKENS),
            "context": 4096,
            "kv_bytes_per_token": 2 * 2 * 3 * 2 * 16,
            "special": {name: TOKENS.index(text) for name, text in (SPECIAL_TOKENS | THINK_TOKENS).items()},
            "embedding": {
                "offset": len(LANGUAGE_FILE) - TABLE_BYTES,
                "ggml_type": "F32",
                "row_bytes": 4 * HIDDEN,
            },
        },
        "vision": {
            "patch": 14,
            "merge": 2,
            "image_size": 1540,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "fixed": None,
            "projector": "pixtral",
            "breaks": True,
            "causal": True,
        },
        "layout": None,
        "recipe": "Q4_K_M",
        "bytes_by_type": {"F32": TABLE_BYTES},
        "source_dtype": "BF16",
        "source_sha256": {"model.safetensors": "0" * 64},
        "licence": "apache-2.0",
    }


def make(folder: Path, counter: int | None = None, key: Path | None = None, report: bytes = b"{}") -> Path:
    """Write a small bundle. Its maker is the name of its folder. key: the private key that signs it."""
    folder.mkdir(parents=True)
    content = CONTENT | {REPORT: report}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    files = {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in content.items()}
    fields = manifest_fields() | {"created_by": folder.name, "files": files}
    (folder / MANIFEST).write_text(json.dumps(fields if counter is None else fields | {"counter": counter}))
    if key is not None:
        (folder / signing.SIGNATURE).write_bytes(signing.sign((folder / MANIFEST).read_bytes(), key))
    return folder


def maker(folder: Path) -> str:
    """Of a bundle, which is verified."""
    return verify_bundle(folder).manifest.created_by


def states(bundles: Path) -> dict[str, str]:
    """Maker of each bundle -> its state."""
    return {entry.bundle.manifest.created_by: entry.state for entry in list_bundles(bundles) if entry.bundle}


def refused(call: Callable[[], object], *words: str) -> None:
    """By the store, in one line with these words."""
    with pytest.raises((StoreError, BundleError)) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
