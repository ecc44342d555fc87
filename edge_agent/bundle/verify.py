"""Verification of a bundle before any native parser reads it: signature, hashes, file headers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_agent.bundle import signing
from edge_agent.bundle.file_check import GgufHeader, Token, UnsafeFileError, check_gguf, read_tokens
from edge_agent.bundle.files import BLOCK_BYTES, BundleFile, file_stamp, open_plain
from edge_agent.bundle.manifest import (
    LANGUAGE,
    LANGUAGE_ARCHITECTURES,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MMPROJ,
    SPECIAL_TOKENS,
    THINK_TOKENS,
    VISION,
    Bundle,
    Manifest,
    read_manifest,
)
from edge_agent.bundle.manifest_check import Headers, wrong_fact
from edge_agent.bundle.model_facts import ARCHITECTURES, check_family
from edge_agent.bundle.onnx_check import check_onnx
from edge_agent.errors import BundleError


def verify_bundle(
    folder: str | Path,
    trusted_keys: tuple[str, ...] = (),
    report: Callable[[int, int], None] = lambda n_done, n_total: None,
) -> Bundle:
    """Verify a bundle: manifest, signature, every hash, file headers. Raises BundleError.

    trusted_keys: paths of public keys; if there are any, one of them must have signed the bundle.
    report: called with the bytes done and the bytes in total, after each block that was hashed.
    """
    bundle = read_manifest(folder)
    if trusted_keys:
        check_signature(bundle, trusted_keys)
    n_before = 0

    def advance(n_done: int) -> None:
        report(n_before + n_done, bundle.file_bytes)

    headers: dict[str, Any] = {}
    for name, expected in sorted(bundle.manifest.files.items()):
        path = bundle.path(name)
        try:
            descriptor = open_plain(path, expected.linked)
        except FileNotFoundError:
            raise BundleError(f"{path}: missing; copy the bundle again") from None
        try:
            stamp = file_stamp(descriptor)
            check_hash(descriptor, path, expected, advance)
            if name in HEADER_CHECKS:
                headers[name] = HEADER_CHECKS[name](Path(f"/proc/self/fd/{descriptor}"), bundle.manifest)
            if file_stamp(descriptor) != stamp:
                raise BundleError(f"{path}: changed while it was verified; try again")
        except UnsafeFileError as error:
            raise BundleError(f"{path}: {error}; build the bundle again") from None
        finally:
            os.close(descriptor)
        n_before += expected.bytes
    language, tokens = headers[LANGUAGE]
    if wrong := wrong_fact(bundle.manifest, Headers(language, tokens, headers.get(MMPROJ), headers.get(VISION))):
        raise BundleError(f"{bundle.path(MANIFEST)}: {wrong}; build the bundle again")
    return bundle


def _check_language(path: Path, manifest: Manifest) -> tuple[GgufHeader, list[Token]]:
    if manifest.layout is None:
        return check_gguf(path, LANGUAGE_ARCHITECTURES), []
    header = check_gguf(path, ARCHITECTURES)
    check_family(header)
    texts = {*manifest.layout.special, *(SPECIAL_TOKENS | THINK_TOKENS).values()}
    return header, read_tokens(path, texts | manifest.model.special.keys())


# The files that native code parses.
HEADER_CHECKS: dict[str, Callable[[Path, Manifest], object]] = {
    LANGUAGE: _check_language,
    MMPROJ: lambda path, manifest: check_gguf(path, ("clip",)),
    VISION: lambda path, manifest: check_onnx(path),
}


def check_hash(descriptor: int, path: Path, expected: BundleFile, report: Callable[[int], None]) -> None:
    """Compare size and sha256 of an open file, from its start. report: called with the bytes hashed, after each block.
    Raises BundleError."""
    size = os.fstat(descriptor).st_size
    if size != expected.bytes:
        raise BundleError(f"{path}: expected {expected.bytes} bytes, found {size}; copy it again")
    digest, n_done = hashlib.sha256(), 0
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            n_done += len(block)
            report(n_done)
    if digest.hexdigest() != expected.sha256:
        raise BundleError(
            f"{path}: sha256: expected {expected.sha256[:16]}…, found {digest.hexdigest()[:16]}…: the file was "
            "changed or damaged; copy it again"
        )


def check_signature(bundle: Bundle, trusted_keys: tuple[str, ...]) -> None:
    """One of the keys must have signed the manifest. Raises BundleError."""
    path = bundle.path(signing.SIGNATURE)
    try:
        with os.fdopen(open_plain(path), "rb") as file:
            signature = file.read(signing.MAX_SIGNATURE_BYTES)
    except FileNotFoundError:
        detail = "missing, but trusted_keys requires a signature; build with --sign KEY"
        raise BundleError(f"{path}: {detail}") from None
    with os.fdopen(open_plain(bundle.path(MANIFEST)), "rb") as file:
        manifest = file.read(MAX_MANIFEST_BYTES)
    if hashlib.sha256(manifest).hexdigest()[:16] != bundle.id:
        raise BundleError(f"{bundle.path(MANIFEST)}: changed while it was read; try again")
    try:
        signing.find_signer(manifest, signature, trusted_keys)
    except signing.SigningError as error:
        raise BundleError(f"{path}: {error}", error.fault) from None
