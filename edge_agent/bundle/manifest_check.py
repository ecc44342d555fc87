"""The manifest against the headers of the files that it describes: every fact that stands in both must be the same.

The runtime computes with the manifest's numbers. A wrong number in a manifest without a signature would end the model
process with a traceback, or give it other rows than those of the model.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

from edge_agent.bundle.file_check import GgufHeader, Token, UnsafeFileError
from edge_agent.bundle.layout import CONTROL
from edge_agent.bundle.manifest import (
    LANGUAGE,
    MMPROJ,
    SPECIAL_NAMES,
    SPECIAL_TOKENS,
    THINK_TOKENS,
    VISION,
    Manifest,
    VisionInfo,
)
from edge_agent.bundle.model_facts import (
    EMBEDDING,
    bytes_by_type,
    kv_bytes_per_token,
    usable_context,
    vision_info,
)

MAX_MEAN, MIN_STD, MAX_STD = 100.0, 1e-3, 100.0  # of pixels, in units of the full range


class Fact(NamedTuple):
    """A value of the manifest, and what it must be."""

    key: str
    found: object
    file: str
    expected: object


class Headers(NamedTuple):
    """What the files of a bundle say."""

    language: GgufHeader
    tokens: list[Token]  # of the prompt layout; empty for a bundle without one
    mmproj: GgufHeader | None
    vision_input: list[int] | None  # input shape of vision.onnx, (1, 3, height, width); 0 is a side that can vary


def wrong_fact(manifest: Manifest, headers: Headers) -> str:
    """The first value of the manifest that the files contradict, as "key: expected ..., found ..."; "": none."""
    language = headers.language
    try:
        facts = [*_language_facts(manifest, language), *_token_facts(manifest, headers)]
        if manifest.vision is not None and headers.mmproj is not None:
            if wrong := _wrong_pixels(manifest.vision):
                return wrong
            facts += _vision_facts(manifest, headers.language, headers.mmproj)
            if headers.vision_input is not None:
                sides = [1, 3, *(manifest.vision.fixed or (0, 0))]
                facts.append(Fact("vision.fixed", sides, VISION, headers.vision_input))
    except UnsafeFileError as error:
        return str(error)
    for fact in facts:
        if fact.found != fact.expected:
            return f"{fact.key}: expected {fact.expected!r} by {fact.file}, found {fact.found!r}"
    n_elements = sum(tensor.n_elements for tensor in language.tensors.values())
    if manifest.model.parameters < n_elements:
        return f"model.parameters: expected {n_elements} or more by {LANGUAGE}, found {manifest.model.parameters}"
    return ""


def _language_facts(manifest: Manifest, header: GgufHeader) -> Iterator[Fact]:
    model, embedding, values = manifest.model, manifest.model.embedding, header.values
    prefix = values["general.architecture"]
    table = header.tensors.get(EMBEDDING)
    if table is None or len(table.shape) != 2:
        yield Fact("model.embedding", "an embedding table", LANGUAGE, f"no matrix {EMBEDDING}")
        return
    yield Fact("model.layers", model.layers, LANGUAGE, values.get(f"{prefix}.block_count"))
    yield Fact("model.hidden", model.hidden, LANGUAGE, table.shape[0])
    yield Fact("model.vocab", model.vocab, LANGUAGE, table.shape[1])
    yield Fact("model.context", model.context, LANGUAGE, usable_context(values.get(f"{prefix}.context_length")))
    yield Fact("model.embedding.offset", embedding.offset, LANGUAGE, table.offset)
    yield Fact("model.embedding.ggml_type", embedding.ggml_type, LANGUAGE, table.type_name)
    yield Fact("model.embedding.row_bytes", embedding.row_bytes, LANGUAGE, table.n_bytes // table.shape[1])
    n_bytes = kv_bytes_per_token(header, model.layers)
    yield Fact("model.kv_bytes_per_token", model.kv_bytes_per_token, LANGUAGE, n_bytes)
    yield Fact("bytes_by_type", manifest.bytes_by_type, LANGUAGE, bytes_by_type(header))


def _token_facts(manifest: Manifest, headers: Headers) -> Iterator[Fact]:
    if manifest.layout is None:
        return _special_facts(manifest, headers.language)
    return _layout_facts(manifest, headers.tokens)


def _special_facts(manifest: Manifest, header: GgufHeader) -> Iterator[Fact]:
    """The name of a token with a higher number than those that the header check keeps is not compared."""
    kept = header.values.get("tokenizer.ggml.tokens")
    names = dict(enumerate(kept)) if isinstance(kept, list) else {}
    special = manifest.model.special
    needed = SPECIAL_TOKENS | (THINK_TOKENS if special.keys() & THINK_TOKENS.keys() else {})
    for name, text in needed.items():
        token = special.get(name, manifest.model.vocab)
        found = names.get(token, text) if token < manifest.model.vocab else f"no token {special.get(name)}"
        yield Fact(f"model.special.{name}", found, LANGUAGE, text)


def _layout_facts(manifest: Manifest, tokens: list[Token]) -> Iterator[Fact]:
    """Each special token of the layout is that token of the vocabulary, and text from outside cannot be it."""
    by_text = {token.text: token for token in reversed(tokens)}
    by_text |= {token.text: token for token in reversed(tokens) if token.type == CONTROL}  # as wrap chooses it
    names = {SPECIAL_NAMES.get(text, text): text for text in manifest.prompt_layout.special}
    for name, text in names.items():
        token = by_text.get(text, Token(-1, text, None))
        yield Fact(f"model.special.{name}", manifest.model.special.get(name), LANGUAGE, token.id)
        yield Fact(f"layout.special: {text}", CONTROL, LANGUAGE, token.type)
    for name, token_id in manifest.model.special.items():
        if name not in names:  # of a reasoning model, or the row between two lines of an image
            text = (SPECIAL_TOKENS | THINK_TOKENS).get(name, name)
            yield Fact(f"model.special.{name}", token_id, LANGUAGE, by_text.get(text, Token(-1, text, None)).id)


def _vision_facts(manifest: Manifest, language: GgufHeader, mmproj: GgufHeader) -> Iterator[Fact]:
    vision, values = manifest.vision, mmproj.values
    assert vision is not None
    if manifest.layout is not None:
        yield Fact("vision", vision, MMPROJ, vision_info(language, mmproj))
        return
    yield Fact("vision.patch", vision.patch, MMPROJ, values.get("clip.vision.patch_size"))
    yield Fact("vision.merge", vision.merge, MMPROJ, values.get("clip.vision.spatial_merge_size"))
    yield Fact("vision.image_size", vision.image_size, MMPROJ, values.get("clip.vision.image_size"))
    yield Fact("model.hidden", manifest.model.hidden, MMPROJ, values.get("clip.vision.projection_dim"))
    yield Fact("vision.mean", _float32(vision.mean), MMPROJ, values.get("clip.vision.image_mean"))
    yield Fact("vision.std", _float32(vision.std), MMPROJ, values.get("clip.vision.image_std"))
    defaults = (vision.projector, vision.breaks, vision.causal)
    yield Fact("vision.projector, vision.breaks, vision.causal", defaults, MMPROJ, ("pixtral", True, True))


def _wrong_pixels(vision: VisionInfo) -> str:
    if not all(math.isfinite(mean) and abs(mean) <= MAX_MEAN for mean in vision.mean):
        return f"vision.mean: expected numbers of at most {MAX_MEAN:g}, found {vision.mean}"
    if not all(MIN_STD <= std <= MAX_STD for std in vision.std):
        return f"vision.std: expected numbers from {MIN_STD:g} to {MAX_STD:g}, found {vision.std}"
    return ""


def _float32(numbers: tuple[float, ...]) -> list[float]:
    """As a GGUF file stores them."""
    return list(struct.unpack(f"<{len(numbers)}f", struct.pack(f"<{len(numbers)}f", *numbers)))
