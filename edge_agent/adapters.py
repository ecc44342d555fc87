"""The configured adapters, looked over before native code reads them: of this model, and signed where `trust` asks.

Whether every matrix has the model's shape is llama.cpp's to say, when it loads them.
"""

from __future__ import annotations

import os
from pathlib import Path

from edge_agent import precheck, trust
from edge_agent.bundle import LANGUAGE_ARCHITECTURES, Bundle, BundleError, hash_file, open_plain
from edge_agent.config import ConfigError


def verify(adapters: dict[str, str], bundle: Bundle, trusted: tuple[str, ...]) -> None:
    """adapters: name -> path. trusted: paths of public keys. Raises ConfigError."""
    for name, path in adapters.items():
        try:
            _verify(Path(path), bundle, trusted)
        except (precheck.Suspect, BundleError, trust.TrustError) as error:
            raise ConfigError(f"language.adapters: {name}: {path}: {error}") from None
        except OSError as error:
            raise ConfigError(f"language.adapters: {name}: {error.filename or path}: {error.strerror}") from None


def _verify(path: Path, bundle: Bundle, trusted: tuple[str, ...]) -> None:
    os.close(open_plain(path))
    if trusted:
        statement = trust.adapter_statement(hash_file(path).sha256)
        with os.fdopen(open_plain(path.with_name(path.name + trust.ADAPTER_SUFFIX)), "rb") as file:
            trust.signer(statement, file.read(65), trusted)
    keys, shapes = precheck.gguf(path, LANGUAGE_ARCHITECTURES)
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if keys.get(key) != expected:
            raise precheck.Suspect(
                f"{key}: expected {expected!r}, found {keys.get(key)!r}; make it: edge-quantize lora"
            )
    if "adapter.alora.invocation_tokens" in keys:
        raise precheck.Suspect("an adapter that some token switches on; expected one that is always on")
    model = bundle.manifest.model
    ours, theirs = f"{model.family} {model.size}", keys.get("general.base_model.0.name", "")
    if theirs and theirs != ours:
        raise precheck.Suspect(f"made for {theirs}, the bundle is {ours}")
    for name, shape in shapes.items():
        stem, _, kind = name.rpartition(".")
        if kind not in ("lora_a", "lora_b") or stem.startswith("token_embd"):
            raise precheck.Suspect(f"{name}: expected low-rank matrices of the layers only")
        if kind == "lora_a" and (len(shape) != 2 or shapes.get(f"{stem}.lora_b", [0])[0] != shape[1]):
            raise precheck.Suspect(f"{name}: no lora_b of the same rank beside it")
