"""The manifest of a model folder: `bundle.json`, which lists the other files with size and hash.

This module owns the format; edge-quantize and `edge-agent bundle wrap` write it with `write_manifest`. bundle.json is
written last, so a folder that has it is complete. Nothing here parses GGUF or ONNX.

    bundle/  language.gguf  vision.onnx  mmproj.gguf  report.json  bundle.json     edge-quantize build
    bundle/  language.gguf  [mmproj.gguf]  bundle.json                             edge-agent bundle wrap
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_agent.bundle import recognise, signing
from edge_agent.bundle.files import BundleFile, open_plain, write_durably
from edge_agent.bundle.layout import MISTRAL, MISTRAL_VISION, PromptLayout
from edge_agent.errors import BundleError

FORMAT = 1
MANIFEST = "bundle.json"
CURRENT = "current"  # the link to the bundle that is served, where bundles are installed (store.py)
MAX_MANIFEST_BYTES = 1 << 20
LANGUAGE_ARCHITECTURES = ("mistral3", "llama")
LANGUAGE, VISION, MMPROJ, REPORT = "language.gguf", "vision.onnx", "mmproj.gguf", "report.json"

# name in the manifest -> the token's text: the special tokens that the prompt needs
SPECIAL_TOKENS = {
    "unk": "<unk>",
    "bos": "<s>",
    "eos": "</s>",
    "pad": "<pad>",
    "inst": "[INST]",
    "inst_end": "[/INST]",
    "system": "[SYSTEM_PROMPT]",
    "system_end": "[/SYSTEM_PROMPT]",
    "img": "[IMG]",
    "img_break": "[IMG_BREAK]",
    "img_end": "[IMG_END]",
}
THINK_TOKENS = {"think": "[THINK]", "think_end": "[/THINK]"}  # around the reasoning of a reasoning model
SPECIAL_NAMES = {text: name for name, text in (SPECIAL_TOKENS | THINK_TOKENS).items()}

# Bounds far above any model, so that no sum overflows a fixed-size integer. The values are compared with the files.
Size = Annotated[int, Meta(ge=1, le=1 << 20)]
Bytes = Annotated[int, Meta(ge=0, le=1 << 48)]
Text = Annotated[str, Meta(max_length=200)]


class EmbeddingInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Where language.gguf stores token_embd.weight. The model process reads text embeddings there itself."""

    offset: Bytes
    ggml_type: Text  # gguf.GGMLQuantizationType name
    row_bytes: Size


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The language model."""

    family: Text
    size: Text
    variant: Text
    parameters: Annotated[int, Meta(ge=1, le=1 << 48)]
    layers: Size
    hidden: Size
    vocab: Size
    context: Size
    kv_bytes_per_token: Annotated[int, Meta(ge=1, le=1 << 40)]  # keys and values in 16 bit
    # Names of SPECIAL_TOKENS and THINK_TOKENS -> token. A token without a name there has its text as its name.
    special: dict[Text, Annotated[int, Meta(ge=0, le=1 << 20)]]
    embedding: EmbeddingInfo


class VisionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The vision encoder, and the images that it takes."""

    patch: Size  # pixels
    merge: Size  # patches per side of one image token
    image_size: Size  # longest edge, pixels
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fixed: tuple[Size, Size] | None = None  # height and width in pixels, if the encoder takes no other size
    projector: Text = "pixtral"  # clip.projector_type, a name of model_facts.PROJECTORS
    breaks: bool = True  # a row between two lines of image tokens
    causal: bool = True  # false: every row of an image attends to all others, in a batch of their own


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """bundle.json. Unknown keys are accepted, because a newer writer may add some. A newer `format` is refused."""

    format: int
    created_by: Text
    files: dict[str, BundleFile]
    model: ModelInfo
    vision: VisionInfo | None  # None: a text-only model
    layout: PromptLayout | None = None  # None: Mistral's, of a bundle that edge-quantize made
    recipe: Text
    bytes_by_type: dict[Text, Bytes]  # of the language model: ggml type -> bytes
    source_dtype: Text
    source_sha256: dict[str, str]
    licence: Text
    counter: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None  # a device that had a higher one refuses this bundle

    @property
    def prompt_layout(self) -> PromptLayout:
        return self.layout or (MISTRAL if self.vision is None else MISTRAL_VISION)

    @property
    def has_image_sizes(self) -> bool:
        """Whether frames can have fewer image tokens: not with an encoder of one size, and not in a text-only model."""
        return self.vision is not None and self.vision.fixed is None

    def token_id(self, text: str) -> int:
        """Of a special token of the layout. Raises KeyError."""
        return self.model.special[SPECIAL_NAMES.get(text, text)]


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle whose manifest was read. `id` is the bundle_id of the messages."""

    folder: Path
    manifest: Manifest
    id: str
    adapters: dict[str, BundleFile] = {}  # the configured LoRA adapters, once verify_adapters has checked them

    def path(self, name: str) -> Path:
        return self.folder / name

    @property
    def file_bytes(self) -> int:
        return sum(file.bytes for file in self.manifest.files.values())


def read_manifest(folder: str | Path) -> Bundle:
    """Read bundle.json, and check everything that needs no reading of the other files. Raises BundleError."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        what = recognise.describe(folder) or "no such folder"
        action = "install one: edge-agent bundle install BUNDLE"
        if folder.name != CURRENT:
            action = "expected a bundle made by edge-quantize build or edge-agent bundle wrap"
        raise BundleError(f"{folder}: {what}; {action}")
    try:
        descriptor = open_plain(path)
    except FileNotFoundError:
        what = recognise.describe(folder) or "the folder is not a finished bundle"
        raise BundleError(f"{path}: missing: {what}; make a bundle with edge-quantize build") from None
    with os.fdopen(descriptor, "rb") as file:
        raw = file.read(MAX_MANIFEST_BYTES + 1)
    if len(raw) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path}: not a manifest: more than {MAX_MANIFEST_BYTES} bytes")
    try:
        found = msgspec.json.decode(raw, type=_FormatOnly).format
        if found != FORMAT:
            raise BundleError(f"{path}: format: expected {FORMAT}, found {found}; use the edge-agent of that format")
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = recognise.describe(path) or f"damaged: {error}"
        raise BundleError(f"{path}: {what}; build or copy the bundle again") from None
    encoders = [] if manifest.vision is None else [MMPROJ] if manifest.layout is not None else [VISION, MMPROJ]
    for name in (LANGUAGE, *encoders, *manifest.files):
        if name not in manifest.files:
            raise BundleError(f"{path}: files: {name} missing; build the bundle again")
        if Path(name).name != name or "\0" in name or name in (MANIFEST, ".", ".."):
            raise BundleError(f"{path}: files: expected plain names inside the bundle, found {name!r}")
    extra = sorted(set(os.listdir(folder)) - manifest.files.keys() - {MANIFEST, signing.SIGNATURE})
    if extra:
        raise BundleError(f"{folder}: {extra[0]}: not listed in {MANIFEST}; remove it or copy the bundle again")
    return Bundle(folder=folder, manifest=manifest, id=hashlib.sha256(raw).hexdigest()[:16])


class _FormatOnly(msgspec.Struct):
    format: int


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write bundle.json durably. Write every other file of the bundle before. Raises OSError."""
    write_durably(folder / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
