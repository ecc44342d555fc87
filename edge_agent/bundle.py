"""The model folder: `bundle.json` and the files it names. Verified before any native parser sees a byte.

The reader owns the format; quantize writes it through `write_manifest`. A bundle is complete when bundle.json is there:
it is written last. Nothing here parses GGUF or ONNX.

    bundle/  language.gguf  vision.onnx  mmproj.gguf  report.json  bundle.json
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_agent import precheck, trust

FORMAT = 1
MANIFEST = "bundle.json"
MAX_MANIFEST_BYTES = 1 << 20
LANGUAGE_ARCHITECTURES = ("mistral3", "llama")
LANGUAGE, VISION, MMPROJ, REPORT = "language.gguf", "vision.onnx", "mmproj.gguf", "report.json"
_BLOCK = 4 << 20

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]


class BundleError(Exception):
    """One line: file, key, expected, found, what to do."""


class File(msgspec.Struct, frozen=True, kw_only=True):
    bytes: Count
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """Where language.gguf holds token_embd.weight: the runtime looks rows up itself to mix text and image rows."""

    offset: Count
    ggml_type: str  # gguf.GGMLQuantizationType name
    row_bytes: Positive


class Model(msgspec.Struct, frozen=True, kw_only=True):
    family: str
    size: str
    variant: str
    parameters: Positive
    layers: Positive
    hidden: Positive
    vocab: Positive
    context: Positive
    kv_bytes_per_token: Positive  # keys and values at 16 bit
    special: dict[str, int]  # bos, eos, inst, inst_end, system, system_end, img, img_break, img_end, …
    embedding: Embedding


class Vision(msgspec.Struct, frozen=True, kw_only=True):
    patch: Positive
    merge: Positive
    image_size: Positive  # longest edge, pixels
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fixed: tuple[Positive, Positive] | None = None  # height and width, pixels: the only size that vision.onnx takes


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Unknown keys are accepted: a newer writer may say more. A newer `format` is not."""

    format: int
    created_by: str
    files: dict[str, File]
    model: Model
    vision: Vision | None  # None: a text-only model
    recipe: str
    bytes_by_type: dict[str, int]
    source_dtype: str
    source_sha256: dict[str, str]
    licence: str


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """A verified bundle. `id` is what the wire calls bundle_id."""

    folder: Path
    manifest: Manifest
    id: str

    def path(self, name: str) -> Path:
        return self.folder / name

    @property
    def file_bytes(self) -> int:
        return sum(file.bytes for file in self.manifest.files.values())


def read_manifest(folder: str | Path) -> Bundle:
    """Read bundle.json and check what can be checked without reading the files. Raises BundleError."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such folder; expected a bundle made by edge-quantize build")
    try:
        descriptor = open_plain(path)
    except FileNotFoundError:
        raise BundleError(
            f"{path}: missing; an unfinished or foreign folder; make one with edge-quantize build"
        ) from None
    with os.fdopen(descriptor, "rb") as file:
        raw = file.read(MAX_MANIFEST_BYTES + 1)
    if len(raw) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path}: over {MAX_MANIFEST_BYTES} bytes; not a manifest")
    try:
        version = msgspec.json.decode(raw, type=_Version).format
        if version != FORMAT:
            raise BundleError(f"{path}: format: expected {FORMAT}, found {version}; use the edge-agent it was made for")
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path}: damaged: {error}; build or copy the bundle again") from None
    for name in (LANGUAGE, *([VISION, MMPROJ] if manifest.vision else []), *manifest.files):
        if name not in manifest.files:
            raise BundleError(f"{path}: files: {name} missing; build the bundle again")
        if Path(name).name != name or "\0" in name or name in (MANIFEST, ".", ".."):
            raise BundleError(f"{path}: files: expected plain names inside the bundle, found {name!r}")
    extra = sorted(set(os.listdir(folder)) - manifest.files.keys() - {MANIFEST, trust.SIGNATURE})
    if extra:
        raise BundleError(f"{folder}: {extra[0]}: not listed in {MANIFEST}; remove it or copy the bundle again")
    return Bundle(folder=folder, manifest=manifest, id=hashlib.sha256(raw).hexdigest()[:16])


class _Version(msgspec.Struct):
    format: int


def verify(
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
            while block := file.read(_BLOCK):
                digest.update(block)
                done += len(block)
                report(done, bundle.file_bytes)
        if digest.hexdigest() != expected.sha256:
            raise BundleError(
                f"{path}: sha256: expected {expected.sha256[:16]}…, found {digest.hexdigest()[:16]}…: the file was "
                "changed or damaged; copy the bundle again"
            )
    for name, look in (
        (LANGUAGE, lambda path: precheck.gguf(path, LANGUAGE_ARCHITECTURES)),
        (MMPROJ, lambda path: precheck.gguf(path, ("clip",))),
        (VISION, precheck.onnx),
    ):
        try:
            look(bundle.path(name))
        except precheck.Suspect as error:
            raise BundleError(f"{bundle.path(name)}: {error}; build the bundle again") from None
    return bundle


def _check_signature(bundle: Bundle, trusted: tuple[str, ...]) -> None:
    path = bundle.path(trust.SIGNATURE)
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
        trust.signer(manifest, signature, trusted)
    except trust.TrustError as error:
        raise BundleError(f"{path}: {error}") from None


def open_plain(path: Path) -> int:
    """A regular file, not through a link and with no second name, so that what is hashed is what is loaded."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BundleError(f"{path}: cannot be opened as a plain file: {error.strerror}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise BundleError(f"{path}: expected a plain file with one name; found a special or hard-linked file")
    return descriptor


def hash_file(path: Path, report: Callable[[int], None] = lambda n: None) -> File:
    """Size and sha256 of a file. report(bytes just read)."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
            report(len(block))
    return File(bytes=size, sha256=digest.hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """bundle.json, last and durably: temporary name, fsync, rename, fsync of the folder."""
    write_durably(folder / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file so that a power cut leaves the old or the new one, never a torn one."""
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
