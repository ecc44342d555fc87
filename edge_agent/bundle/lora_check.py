"""Check the configured adapters before native code reads them: made for this model, and signed if that is required.

llama.cpp checks whether every matrix has the model's shape, when it loads the adapter.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from edge_agent.bundle import signing
from edge_agent.bundle.file_check import UnsafeFileError, check_gguf
from edge_agent.bundle.files import BundleFile, hash_file, open_plain
from edge_agent.bundle.manifest import LANGUAGE_ARCHITECTURES, Bundle
from edge_agent.bundle.model_facts import ARCHITECTURES
from edge_agent.errors import BundleError, ConfigError, FaultName, fault_of


def verify_adapters(adapters: dict[str, str], bundle: Bundle, trusted_keys: tuple[str, ...]) -> Bundle:
    """Check every adapter (name -> path of its GGUF file). Returns the bundle with their hashes. Raises ConfigError.

    trusted_keys: paths of public keys; if there are any, one of them must have signed each adapter.
    """
    verified: dict[str, BundleFile] = {}
    for name, path in adapters.items():
        try:
            verified[name] = _verify_adapter(Path(path), bundle, trusted_keys)
        except (UnsafeFileError, BundleError, signing.SigningError) as error:
            fault: FaultName | None = "machine" if error.fault == "machine" else None
            raise ConfigError(f"language.adapters: {name}: {path}: {error}", fault) from None
        except OSError as error:
            fault = fault_of(error, "configuration")
            raise ConfigError(f"language.adapters: {name}: {error.filename or path}: {error.strerror}", fault) from None
    return msgspec.structs.replace(bundle, adapters=verified)


def _verify_adapter(path: Path, bundle: Bundle, trusted_keys: tuple[str, ...]) -> BundleFile:
    os.close(open_plain(path))
    hashed = hash_file(path)
    if trusted_keys:
        statement = signing.adapter_statement(hashed.sha256)
        with os.fdopen(open_plain(path.with_name(path.name + signing.ADAPTER_SUFFIX)), "rb") as file:
            signing.find_signer(statement, file.read(signing.MAX_SIGNATURE_BYTES), trusted_keys)
    wrapped = bundle.manifest.layout is not None
    values, tensors = check_gguf(path, ARCHITECTURES if wrapped else LANGUAGE_ARCHITECTURES)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        found = values.get(key)
        if found != expected:
            raise UnsafeFileError(f"{key}: expected {expected!r}, found {found!r}; make it with edge-quantize lora")
    if "adapter.alora.invocation_tokens" in values:
        raise UnsafeFileError("an activated LoRA, which one token switches on; expected a LoRA that is always on")
    model = bundle.manifest.model
    bundle_model, adapter_model = f"{model.family} {model.size}", values.get("general.base_model.0.name", "")
    # The names inside published GGUF files follow no rule; llama.cpp compares the shapes.
    if adapter_model and adapter_model != bundle_model and not wrapped:
        raise UnsafeFileError(f"made for {adapter_model}, the bundle is {bundle_model}")
    for name, shape in shapes.items():
        stem, _, kind = name.rpartition(".")
        if kind not in ("lora_a", "lora_b") or stem.startswith("token_embd"):
            raise UnsafeFileError(f"{name}: expected low-rank matrices of the layers only")
        if kind == "lora_a" and (len(shape) != 2 or shapes.get(f"{stem}.lora_b", [0])[0] != shape[1]):
            raise UnsafeFileError(f"{name}: {stem}.lora_b of the same rank is missing")
    return hashed
