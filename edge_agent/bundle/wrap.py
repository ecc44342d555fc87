"""GGUF files that another tool made -> a bundle: `edge-agent bundle wrap`.

The files are copied, or linked, as they are; nothing is converted. The parts of a split file become one file. Every
fact of the manifest comes from the files' own headers. No native code reads the files here; no chat template is run.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec

import edge_agent
from edge_agent.bundle import signing
from edge_agent.bundle.file_check import GgufHeader, Token, UnsafeFileError, check_gguf, read_gguf_keys, read_tokens
from edge_agent.bundle.files import BundleFile, sync_folder, write_durably
from edge_agent.bundle.gguf_source import Block, OpenFile, Source, open_source
from edge_agent.bundle.layout import CONTROL, LAYOUTS, SPECIAL_TEXTS, PromptLayout, read_layout
from edge_agent.bundle.layout import recognise as recognise_layout
from edge_agent.bundle.manifest import (
    FORMAT,
    LANGUAGE,
    MANIFEST,
    MMPROJ,
    SPECIAL_NAMES,
    THINK_TOKENS,
    Manifest,
    VisionInfo,
    write_manifest,
)
from edge_agent.bundle.manifest_check import Headers, wrong_fact
from edge_agent.bundle.model_facts import (
    ARCHITECTURES,
    EMBEDDING,
    adds_bos,
    bytes_by_type,
    check_family,
    embedding_table,
    model_info,
    quantisation,
    refused_architecture,
    vision_info,
)
from edge_agent.errors import BundleError, ConfigError, encodable

IMG_BREAK = "[IMG_BREAK]"
FICLONE = 0x40049409  # ioctl: a copy that shares its blocks, on btrfs and XFS
SPARE_BYTES = 1 << 20  # of free space: the manifest and the folder

Report = Callable[[int, int], None]  # bytes done, bytes in total


def wrap(
    language: Path,
    mmproj: Path | None,
    out: Path,
    *,
    layout: str = "",
    link: bool = False,
    signing_key: Path | None = None,
    report: Report = lambda n_done, n_total: None,
) -> Manifest:
    """Make the bundle `out`, a new folder: complete, or absent. Raises BundleError, ConfigError.

    layout: a name of LAYOUTS, or the path of a YAML file; "": found by the vocabulary. link: the bundle shares the
    files' bytes, on the same file system. signing_key: a private key; bundle.sig is written with it.
    """
    if signing_key is not None:
        signing.load_private_key(signing_key)  # an invalid key is reported before any work
    out = Path(os.path.abspath(out))
    if out.is_symlink() or out.exists():
        raise BundleError(f"{out}: exists; give the name of a new folder")
    if not out.parent.is_dir():
        raise BundleError(f"{out.parent}: no such folder; make it first")
    with contextlib.ExitStack() as opened:
        sources = {LANGUAGE: opened.enter_context(open_source(language))}
        if mmproj is not None:
            sources[MMPROJ] = opened.enter_context(open_source(mmproj))
        for source in sources.values():
            if link and source.is_split:
                n_parts = len(source.pieces)
                raise BundleError(f"{source.path}: {n_parts} parts are merged, not linked; leave out --link")
        manifest = describe(sources[LANGUAGE], sources.get(MMPROJ), layout)
        _check_space(sources, out, link)
        _check_hidden_folder(out)
        try:
            with _new_folder(out) as folder:
                files, source_sha256 = _fill(sources, folder, link, report)
                manifest = msgspec.structs.replace(manifest, files=files, source_sha256=source_sha256)
                write_manifest(folder, manifest)
                if signing_key is not None:
                    signature = signing.sign((folder / MANIFEST).read_bytes(), signing_key)
                    write_durably(folder / signing.SIGNATURE, signature)
        except OSError as error:
            raise BundleError(f"{out}: {error.strerror} while writing it; nothing is left of it") from None
    return manifest


# -- describe ----------------------------------------------------------------------------------------------------------


def describe(language_source: Source, mmproj_source: Source | None, layout: str) -> Manifest:
    """The manifest without hashes. Raises BundleError, ConfigError."""
    language = _check_language(language_source)
    vision, mmproj_header = None, None
    if mmproj_source is not None:
        mmproj_header = _check_mmproj(mmproj_source)
        try:
            vision = vision_info(language, mmproj_header)
        except UnsafeFileError as error:
            raise BundleError(f"{mmproj_source.path}: {error}") from None
    try:
        chosen, special, tokens = _choose_layout(language_source, language, vision, layout)
        n_vision = sum(tensor.n_elements for tensor in mmproj_header.tensors.values()) if mmproj_header else 0
        model = model_info(language, special, n_vision)
    except (UnsafeFileError, BundleError) as error:
        raise BundleError(f"{language_source.path}: {error}") from None
    manifest = Manifest(
        format=FORMAT,
        created_by=f"edge-agent bundle wrap {edge_agent.__version__}",
        files={},
        model=model,
        vision=vision,
        layout=chosen,
        recipe=quantisation(language),
        bytes_by_type=bytes_by_type(language),
        source_dtype="GGUF",
        source_sha256={},
        licence=str(language.values.get("general.license") or "unknown")[:200],
    )
    if wrong := _wrong_manifest(manifest, Headers(language, tokens, mmproj_header, None)):
        raise BundleError(f"{language_source.path}: no bundle can be made of it: {wrong}")
    return manifest


def _wrong_manifest(manifest: Manifest, headers: Headers) -> str:
    """What `verify` would say of the bundle, before gigabytes are copied; "": nothing."""
    try:
        msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest)
    except msgspec.DecodeError as error:
        return str(error)
    return wrong_fact(manifest, headers)


def _check_language(source: Source) -> GgufHeader:
    try:
        try:
            header = check_gguf(source.opened, ARCHITECTURES)
        except UnsafeFileError:
            if refused := refused_architecture(read_gguf_keys(source.opened).get("general.architecture")):
                raise UnsafeFileError(refused) from None
            raise
        check_family(header)
    except UnsafeFileError as error:
        raise BundleError(f"{source.path}: {error}") from None
    return header


def _check_mmproj(source: Source) -> GgufHeader:
    try:
        return check_gguf(source.opened, ("clip",))
    except UnsafeFileError as error:
        raise BundleError(f"{source.path}: {error}; expected an mmproj of the language model") from None


def _choose_layout(
    source: Source, header: GgufHeader, vision: VisionInfo | None, layout: str
) -> tuple[PromptLayout, dict[str, int], list[Token]]:
    """The layout, its special tokens by their names in the manifest, and all tokens that were looked at. Raises
    UnsafeFileError, BundleError, ConfigError."""
    written = read_layout(layout) if layout and layout not in LAYOUTS else None
    texts = {*SPECIAL_TEXTS, *SPECIAL_NAMES, *(written.special if written is not None else ())}
    bos, n_embeddings = header.values.get("tokenizer.ggml.bos_token_id"), embedding_table(header).shape[1]
    tokens = read_tokens(source.opened, texts, [bos if isinstance(bos, int) else -1, n_embeddings - 1, n_embeddings])
    if {token.id for token in tokens} & {n_embeddings - 1, n_embeddings} != {n_embeddings - 1}:
        raise UnsafeFileError(
            f"{EMBEDDING}: {n_embeddings} rows, but tokenizer.ggml.tokens has another number of tokens"
        )
    chosen = written or _ready_layout(layout or recognise_layout(tokens), vision)
    if vision is not None and vision.projector not in chosen.projectors:
        raise BundleError(f"prompt layout {chosen.name}: has no place for the rows of a projector {vision.projector}")
    bos_text = next((token.text for token in tokens if token.id == bos), "")
    if written is None and bos_text and adds_bos(header.values) and not chosen.before_system.startswith(bos_text):
        special = (bos_text, *(text for text in chosen.special if text != bos_text))
        chosen = msgspec.structs.replace(chosen, special=special, before_system=bos_text + chosen.before_system)
    control = {token.text: token.id for token in reversed(tokens) if token.type == CONTROL}
    needed = [*chosen.special, *([IMG_BREAK] if vision is not None and vision.breaks else [])]
    for text in needed:
        if text not in control:
            found = next((f"type {token.type}" for token in tokens if token.text == text), "no such token")
            raise UnsafeFileError(
                f"tokenizer.ggml.tokens: {text!r}: expected a control token for the layout {chosen.name}, found {found}"
            )
    _check_plain_texts(source, chosen)
    if chosen.name == "mistral" and all(text in control for text in THINK_TOKENS.values()):
        needed += THINK_TOKENS.values()
    return chosen, {SPECIAL_NAMES.get(text, text): control[text] for text in needed}, tokens


def _ready_layout(name: str, vision: VisionInfo | None) -> PromptLayout:
    """The layout of the table with this name that can hold frames of this encoder; the one of text if none can."""
    variants = LAYOUTS[name]
    if vision is None:
        return variants[0]
    return next((each for each in variants if vision.projector in each.projectors), variants[0])


class _Inside:
    """A set of all texts that are inside one of these."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and len(text) > 1 and any(text in each for each in self.texts)


def _check_plain_texts(source: Source, layout: PromptLayout) -> None:
    """Raises ConfigError: a special token of the vocabulary stands in the layout and would be read as letters."""
    keys = ("before_system", "before_user", "before_image", "after_image", "before_answer")
    plain = [part for key in keys for part in layout.parts(getattr(layout, key)) if part not in layout.special]
    for token in read_tokens(source.opened, _Inside(plain)):
        if token.type == CONTROL:
            raise ConfigError(
                f"layout {layout.name}: {token.text!r} is a special token of this model; add it to `special`"
            )


# -- write -------------------------------------------------------------------------------------------------------------


def _check_space(sources: dict[str, Source], out: Path, link: bool) -> None:
    needed = SPARE_BYTES + (0 if link else sum(source.n_bytes for source in sources.values()))
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise BundleError(f"{out.parent}: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free; make room")


def _hidden_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.wrap")


def _check_hidden_folder(out: Path) -> None:
    """What is under the hidden name is removed: it must be what a killed run has left. Raises BundleError."""
    folder = _hidden_folder(out)
    if not os.path.lexists(folder):
        return
    remedy = "expected what an interrupted run has left; remove it"
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise BundleError(f"{folder}: a link, a file or a folder of another user; {remedy}")
    ours = {f"{name}{end}" for name in (LANGUAGE, MMPROJ, MANIFEST, signing.SIGNATURE) for end in ("", ".new")}
    for path in folder.iterdir():
        if path.name not in ours or not stat.S_ISREG(path.lstat().st_mode):
            raise BundleError(f"{path}: {remedy}")


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that becomes `out` at the end. What a killed run has left is removed first."""
    folder = _hidden_folder(out)
    folder.mkdir(mode=0o700, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # anything else: a server without a lock service
            if isinstance(error, BlockingIOError):
                raise BundleError(f"{out}: another edge-agent bundle wrap is writing it; wait for it") from None
        for left in folder.iterdir():
            left.unlink()
        try:
            yield folder
            folder.chmod(0o755)
            sync_folder(folder)
            os.rename(folder, out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        sync_folder(out.parent)
    finally:
        os.close(lock)


def _fill(
    sources: dict[str, Source], folder: Path, link: bool, report: Report
) -> tuple[dict[str, BundleFile], dict[str, str]]:
    """Copy or link the files, and hash them; (the files by their names in the bundle, sha256 of each source file by its
    name). Raises BundleError, OSError."""
    n_total, n_before = sum(source.n_bytes for source in sources.values()), 0
    files: dict[str, BundleFile] = {}
    source_sha256: dict[str, str] = {}
    for name, source in sources.items():
        target = folder / name
        is_linked = link and _link(source.pieces[0].file, target)

        def advance(n_done: int, n_before: int = n_before) -> None:
            report(n_before + n_done, n_total)

        files[name], of_parts = _copy(source, None if link else target, advance)
        key = encodable(source.path.name)
        key = f"{key} ({name})" if key in source_sha256 else key
        source_sha256 |= of_parts or {key: files[name].sha256}
        if is_linked:
            files[name] = msgspec.structs.replace(files[name], linked=True)
        else:
            source.check_unchanged()
        n_before += source.n_bytes
    return files, source_sha256


def _link(source: OpenFile, target: Path) -> bool:
    """Make `target` share the source's bytes. Returns whether it is a second name of the same file (a hard link); else
    only the blocks on the disk are shared. Raises BundleError, OSError."""
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with contextlib.suppress(OSError):
            fcntl.ioctl(descriptor, FICLONE, source.descriptor)
            os.fsync(descriptor)
            return False
    finally:
        os.close(descriptor)
    target.unlink()
    try:
        os.link(source.path, target, follow_symlinks=True)
    except OSError as error:
        raise BundleError(
            f"{source.path}: cannot be linked to {target.parent.parent}: {error.strerror}; leave out --link"
        ) from None
    if os.stat(target).st_ino != source.stamp[1]:
        raise BundleError(f"{source.path}: changed while it was read; try again")
    return True


def _copy(source: Source, target: Path | None, report: Callable[[int], None]) -> tuple[BundleFile, dict[str, str]]:
    """Copy durably, and hash at the same time; also the sha256 of each part of a split file. target: None: hash only.
    Raises OSError."""
    whole, n_done = hashlib.sha256(), 0
    parts = {piece.file.path.name: hashlib.sha256() for piece in source.pieces if source.is_split}

    def update(block: Block) -> None:
        whole.update(block.kept)
        if block.part:
            parts[block.part].update(block.read)

    out = open(target, "xb", buffering=0) if target is not None else None  # noqa: SIM115
    hashed: Future[None] = Future()
    hashed.set_result(None)
    synced = hashed
    # A processor hashes as fast as it copies, and the disk is slower than both: all three at the same time.
    with out or contextlib.nullcontext(), ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as disk:
        for block in source.blocks():
            hashed.result()
            hashed = hasher.submit(update, block)
            if out is not None:
                _write_all(out.fileno(), block.kept)
                if synced.done():
                    synced.result()
                    synced = disk.submit(os.fdatasync, out.fileno())
            n_done += len(block.kept)
            report(n_done)
        hashed.result()
        synced.result()
        if out is not None:
            os.fsync(out.fileno())
    file = BundleFile(bytes=n_done, sha256=whole.hexdigest())
    return file, {encodable(name): digest.hexdigest() for name, digest in parts.items()}


def _write_all(descriptor: int, block: bytes | memoryview) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]
