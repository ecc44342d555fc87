"""Ed25519 signatures over bundle.json and over adapters: who made them, and that nothing was changed since.

The manifest holds every file's hash, so its 64 bytes of signature (bundle.sig) stand for the whole folder. Keys are PEM
files: the private one where bundles are built, the public one on the device (configuration: `trust`).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from edge_agent.errors import UserError

SIGNATURE = "bundle.sig"
ADAPTER_SUFFIX = ".sig"  # of the file beside an adapter
PUBLIC_SUFFIX = ".pub"


class SigningError(UserError):
    """One line."""


def keygen(path: Path) -> Path:
    """Write a new private key to `path` (0600) and its public half beside it, never over an existing one.

    Returns the public key's path. Raises TrustError.
    """
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, public = Ed25519PrivateKey.generate(), path.with_name(path.name + PUBLIC_SUFFIX)
    private_pem = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    public_pem = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    for target, data, mode in ((path, private_pem, 0o600), (public, public_pem, 0o644)):
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except FileExistsError:
            raise SigningError(f"{target}: exists; a key is never overwritten, choose another name") from None
        except OSError as error:
            raise SigningError(f"{target}: {error.strerror}") from None
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    return public


def adapter_statement(sha256: str) -> bytes:
    """What is signed for an adapter's file: never mistaken for a manifest."""
    return f"edge-agent adapter sha256 {sha256}\n".encode()


def sign(manifest: bytes, key: Path) -> bytes:
    """64 bytes. Raises TrustError."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    found = None
    with contextlib.suppress(ValueError, TypeError):
        found = load_pem_private_key(_read(key), None)
    if not isinstance(found, Ed25519PrivateKey):
        raise SigningError(f"{key}: expected an Ed25519 private key (PEM, no passphrase); make one: edge-agent keygen")
    return found.sign(manifest)


def find_signer(manifest: bytes, signature: bytes, trusted: tuple[str, ...]) -> str:
    """Which of the trusted public keys' files signed it. Raises TrustError when none did."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    by = ""
    for path in trusted:  # each is read: a key that is none is a mistake, also when another one fits
        found = None
        with contextlib.suppress(ValueError, TypeError):
            found = load_pem_public_key(_read(Path(path)))
        if not isinstance(found, Ed25519PublicKey):
            raise SigningError(f"trust: {path}: expected an Ed25519 public key (PEM), as edge-agent keygen writes it")
        with contextlib.suppress(InvalidSignature):
            found.verify(signature, manifest)
            by = by or path
    if not by:
        raise SigningError(f"signed by none of the keys in trust: {', '.join(trusted)}")
    return by


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SigningError(f"{path}: {error.strerror}") from None
