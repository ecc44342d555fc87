"""Ed25519 signatures over bundle.json and over adapters: who made a file, and that nothing was changed since.

The manifest holds the hash of every file, so the 64 bytes of bundle.sig sign the whole folder. Keys are PEM files: the
private key where bundles are built, the public key on the device (configuration: `trusted_keys`).

`cryptography` is imported inside the functions: a daemon without trusted keys does not need it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.errors import UserError, fault_of
from edge_agent.small_file import read_small_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = "bundle.sig"
ADAPTER_SUFFIX = ".sig"  # of the signature's file beside an adapter
PUBLIC_SUFFIX = ".pub"
MAX_SIGNATURE_BYTES = 65  # one more than a signature has, so that a longer file does not match


class SigningError(UserError):
    """One line: which key or signature, and what is wrong with it."""


def keygen(path: Path) -> Path:
    """Write a new private key to `path` (mode 0600) and its public key beside it. Never overwrites a file.

    Returns the public key's path. Raises SigningError.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, public_path = Ed25519PrivateKey.generate(), path.with_name(path.name + PUBLIC_SUFFIX)
    private_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public_pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for target, data, mode in ((path, private_pem, 0o600), (public_path, public_pem, 0o644)):
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except FileExistsError:
            raise SigningError(f"{target}: exists; a key is never overwritten, choose another name") from None
        except OSError as error:
            raise SigningError(f"{target}: {error.strerror}") from None
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    return public_path


def adapter_statement(sha256: str) -> bytes:
    """The bytes that are signed for an adapter's file. They cannot be mistaken for a manifest."""
    return f"edge-agent adapter sha256 {sha256}\n".encode()


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Raises SigningError if the file is not an Ed25519 private key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = None
    with contextlib.suppress(ValueError, TypeError):
        key = load_pem_private_key(_read(path), None)
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningError(f"{path}: expected an Ed25519 private key (PEM, no passphrase); make one: edge-agent keygen")
    return key


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Raises SigningError if the file is not an Ed25519 public key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = None
    with contextlib.suppress(ValueError, TypeError):
        key = load_pem_public_key(_read(path))
    if not isinstance(key, Ed25519PublicKey):
        raise SigningError(
            f"trusted_keys: {path}: expected an Ed25519 public key (PEM), as edge-agent keygen writes it"
        )
    return key


def sign(data: bytes, private_key: Path) -> bytes:
    """The signature of `data`, 64 bytes. Raises SigningError."""
    return load_private_key(private_key).sign(data)


def find_signer(data: bytes, signature: bytes, trusted_keys: tuple[str, ...]) -> str:
    """The path of the first trusted public key that signed `data`. Raises SigningError if there is none.

    Reads every key: a malformed key file is an error even if another key matches.
    """
    from cryptography.exceptions import InvalidSignature

    signers = []
    for path in trusted_keys:
        key = load_public_key(Path(path))
        with contextlib.suppress(InvalidSignature):
            key.verify(signature, data)
            signers.append(path)
    if not signers:
        raise SigningError(f"not signed by any key in trusted_keys: {', '.join(trusted_keys)}")
    return signers[0]


def _read(path: Path) -> bytes:
    try:
        return read_small_file(path)
    except OSError as error:
        raise SigningError(f"{path}: {error.strerror}", fault_of(error, "configuration")) from None
