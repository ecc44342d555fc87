"""What people have in place of what was expected, by first bytes and names, and the next step.

Every reader of a checkpoint, an adapter or a bundle asks here before it reports that it cannot read something.
"""

from __future__ import annotations

from pathlib import Path

from edge_agent.bundle.file_check import UnsafeFileError, read_gguf_keys

BUNDLE, ADAPTER, CHECKPOINT = "bundle.json", "adapter_config.json", ("config.json", "params.json")
MAX_FOLDERS = 200  # that are searched below a folder
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
GGUF_USES = (
    "edge-agent bundle wrap makes a bundle of it; edge-quantize builds from the 16-bit checkpoint (config.json and "
    "*.safetensors)"
)
# First bytes -> what it is, and the next step.
BEGINNINGS = (
    (
        b"version https://git-lfs.github.com/",
        "a git-lfs pointer and not the file itself; run git lfs pull there",
    ),
    (b"PK\3\4", "a zip archive; unpack it"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"\xfd7zXZ\0", "an xz archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"\x80", "a Python pickle, which is not read; save the model as safetensors"),
)
HTML = (b"<!doctype", b"<html", b"<?xml", b"<error")
TAR_AT, TAR = 257, b"ustar"


def describe(path: Path) -> str:
    """What a file or a folder is, and what to do next, as the end of an error line; "": nothing that is known."""
    try:
        return _describe_folder(path) if path.is_dir() else _describe_file(path)
    except OSError:
        return ""


def _describe_file(path: Path) -> str:
    if not path.exists():
        is_link = path.is_symlink()
        return "a link to a file that is missing; the download is not complete, repeat it" if is_link else ""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "an empty file; download or copy it again"
    if start.startswith(b"GGUF"):
        return f"a GGUF file{_gguf_facts(path)}; {GGUF_USES}"
    if path.suffix in PICKLES and start.startswith((b"PK\3\4", b"\x80")):
        return "a PyTorch pickle, which is not read; save the model as safetensors"
    if start.lstrip().lower().startswith(HTML):
        return "a web page and not the file itself: an error or a login; download it again"
    if start[TAR_AT:].startswith(TAR):
        return "a tar archive; unpack it"
    return next((what for beginning, what in BEGINNINGS if start.startswith(beginning)), "")


def _gguf_facts(path: Path) -> str:
    """Architecture and type, as far as the header tells them."""
    from edge_agent.bundle.gguf_package import gguf  # not needed where nothing is wrong

    try:
        keys = read_gguf_keys(path)
    except UnsafeFileError:
        return ""
    facts = [str(keys[key]) for key in ("general.architecture",) if keys.get(key)]
    file_types = {each.value: each.name.removeprefix("MOSTLY_").removeprefix("ALL_") for each in gguf.LlamaFileType}
    if isinstance(keys.get("general.file_type"), int) and keys["general.file_type"] in file_types:
        facts.append(file_types[keys["general.file_type"]])
    return f" ({', '.join(facts)})" if facts else ""


def _describe_folder(folder: Path) -> str:
    if kind := _kind(folder):
        return kind
    inside = _visible(folder)
    for path in inside:
        if path.suffix in (".gguf", *PICKLES) and (what := _describe_file(path)):
            return f"{path.name} in it is {what}"
    found: list[str] = []
    folders = [path for path in inside if path.is_dir()]
    for below in [*folders, *(path for each in folders for path in _visible(each) if path.is_dir())][:MAX_FOLDERS]:
        if kind := _kind(below):
            found.append(f"{below.relative_to(folder)}/ ({kind.partition(';')[0]})")
    if found:
        return f"the folder above: give {' or '.join(found[:3])}"
    for path in inside:
        if what := _describe_file(path):
            return f"{path.name} in it is {what}"
    return "" if inside else "an empty folder"


def _kind(folder: Path) -> str:
    """What a folder itself is, and what it is for."""
    names = {path.name for path in _visible(folder)}
    if BUNDLE in names:
        return "a bundle; give it to edge-agent, and a checkpoint to edge-quantize"
    if ADAPTER in names and not names & set(CHECKPOINT):
        return "a LoRA adapter; give it to edge-quantize lora, or with --merge to edge-quantize build"
    if names & set(CHECKPOINT):
        return "a checkpoint; make a bundle of it with edge-quantize build"
    return ""


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
