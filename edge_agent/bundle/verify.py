"""A bundle verified before any native parser reads it: signature, hashes, file headers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from edge_agent.bundle import signing
from edge_agent.bundle.file_check import UnsafeFileError, check_gguf, check_onnx
from edge_agent.bundle.files import BLOCK_BYTES, open_plain
from edge_agent.bundle.manifest import (
    LANGUAGE,
    LANGUAGE_ARCHITECTURES,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MMPROJ,
    VISION,
    Bundle,
    read_manifest,
)
from edge_agent.errors import BundleError


def verify_bundle(
    folder: str | Path, trusted: tuple[str, ...] = (), report: Callable[[int, int], None] = lambda done, total: None
) -> Bundle:
    """Read the manifest of a bundle that can see, hash every file, look over what native parsers will read.

    trusted: paths of public keys; with any, the bundle has to be signed by one. report(bytes done, bytes in all).
    Raises BundleError.
    """
    bundle = read_manifest(folder)
    if trusted:
        _check_signature(bundle, trusted)
    if bundle.manifest.vision is None:
        raise BundleError(f"{folder}: a text-only model, nothing in it can see; use a bundle of a model with vision")
    done = 0
    for name, expected in sorted(bundle.manifest.files.items()):
        path = bundle.path(name)
        try:
            descriptor = open_plain(path)
        except FileNotFoundError:
            raise BundleError(f"{path}: missing; copy the bundle again") from None
        with os.fdopen(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            if size != expected.bytes:
                raise BundleError(f"{path}: expected {expected.bytes} bytes, found {size}; copy the bundle again")
            digest = hashlib.sha256()
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                done += len(block)
                report(done, bundle.file_bytes)
        if digest.hexdigest() != expected.sha256:
            raise BundleError(
                f"{path}: sha256: expected {expected.sha256[:16]}…, found {digest.hexdigest()[:16]}…: the file was "
                "changed or damaged; copy the bundle again"
            )
    for name, look in (
        (LANGUAGE, lambda path: check_gguf(path, LANGUAGE_ARCHITECTURES)),
        (MMPROJ, lambda path: check_gguf(path, ("clip",))),
        (VISION, check_onnx),
    ):
        try:
            look(bundle.path(name))
        except UnsafeFileError as error:
            raise BundleError(f"{bundle.path(name)}: {error}; build the bundle again") from None
    return bundle


def _check_signature(bundle: Bundle, trusted: tuple[str, ...]) -> None:
    path = bundle.path(signing.SIGNATURE)
    try:
        with os.fdopen(open_plain(path), "rb") as file:
            signature = file.read(65)
    except FileNotFoundError:
        raise BundleError(f"{path}: missing, but `trust` asks for a signature; build with --sign KEY") from None
    with os.fdopen(open_plain(bundle.path(MANIFEST)), "rb") as file:
        manifest = file.read(MAX_MANIFEST_BYTES)
    if hashlib.sha256(manifest).hexdigest()[:16] != bundle.id:
        raise BundleError(f"{bundle.path(MANIFEST)}: changed while it was read; try again")
    try:
        signing.find_signer(manifest, signature, trusted)
    except signing.SigningError as error:
        raise BundleError(f"{path}: {error}") from None
