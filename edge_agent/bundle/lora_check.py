"""The configured adapters, looked over before native code reads them: of this model, and signed where `trust` asks.

Whether every matrix has the model's shape is llama.cpp's to say, when it loads them.
"""

from __future__ import annotations

import os
from pathlib import Path

from edge_agent.bundle import signing
from edge_agent.bundle.file_check import UnsafeFileError, check_gguf
from edge_agent.bundle.files import hash_file, open_plain
from edge_agent.bundle.manifest import LANGUAGE_ARCHITECTURES, Bundle
from edge_agent.errors import BundleError, ConfigError


def verify_adapters(adapters: dict[str, str], bundle: Bundle, trusted: tuple[str, ...]) -> None:
    """adapters: name -> path. trusted: paths of public keys. Raises ConfigError."""
    for name, path in adapters.items():
        try:
            _verify_adapter(Path(path), bundle, trusted)
        except (UnsafeFileError, BundleError, signing.SigningError) as error:
            raise ConfigError(f"language.adapters: {name}: {path}: {error}") from None
        except OSError as error:
            raise ConfigError(f"language.adapters: {name}: {error.filename or path}: {error.strerror}") from None


def _verify_adapter(path: Path, bundle: Bundle, trusted: tuple[str, ...]) -> None:
    os.close(open_plain(path))
    if trusted:
        statement = signing.adapter_statement(hash_file(path).sha256)
        with os.fdopen(open_plain(path.with_name(path.name + signing.ADAPTER_SUFFIX)), "rb") as file:
            signing.find_signer(statement, file.read(65), trusted)
    keys, shapes = check_gguf(path, LANGUAGE_ARCHITECTURES)
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if keys.get(key) != expected:
            raise UnsafeFileError(f"{key}: expected {expected!r}, found {keys.get(key)!r}; make it: edge-quantize lora")
    if "adapter.alora.invocation_tokens" in keys:
        raise UnsafeFileError("an adapter that some token switches on; expected one that is always on")
    model = bundle.manifest.model
    ours, theirs = f"{model.family} {model.size}", keys.get("general.base_model.0.name", "")
    if theirs and theirs != ours:
        raise UnsafeFileError(f"made for {theirs}, the bundle is {ours}")
    for name, shape in shapes.items():
        stem, _, kind = name.rpartition(".")
        if kind not in ("lora_a", "lora_b") or stem.startswith("token_embd"):
            raise UnsafeFileError(f"{name}: expected low-rank matrices of the layers only")
        if kind == "lora_a" and (len(shape) != 2 or shapes.get(f"{stem}.lora_b", [0])[0] != shape[1]):
            raise UnsafeFileError(f"{name}: no lora_b of the same rank beside it")
