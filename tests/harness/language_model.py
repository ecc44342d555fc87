"""A bundle opened as a language model alone."""

from __future__ import annotations

from pathlib import Path

from edge_agent.bundle.manifest import LANGUAGE, read_manifest
from edge_agent.model.llama import LlamaContext, LlamaOptions
from quantize.measure import perplexity


def opened(folder: Path) -> LlamaContext:
    made = read_manifest(folder)
    config = LlamaOptions(context=perplexity.CHUNK, threads=1, gpu_layers=0, flash_attention=True, reproducible=False)
    return LlamaContext(made.path(LANGUAGE), config, made.manifest.model.embedding)
