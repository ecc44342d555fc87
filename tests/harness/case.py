"""A toy checkpoint, what transformers computed for it, and what edge-quantize made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.harness import toy


class Case(NamedTuple):
    """What transformers computed for one toy checkpoint, and what edge-quantize made of the same checkpoint."""

    arrays: dict[str, np.ndarray]  # tests/reference/NAME.npz; its keys are explained in make_reference.py
    checkpoint: Path
    converted: Path  # at bf16

    def image(self, height: int, width: int) -> np.ndarray:
        return toy.toy_image(height, width, int(self.arrays["image_seed"]))

    def language(self) -> Any:
        """language.gguf in the runtime's own hands; close it."""
        from edge_agent.bundle.manifest import LANGUAGE, EmbeddingInfo
        from edge_agent.model.llama import LlamaContext, LlamaOptions
        from tests.harness.gguf_reading import reader

        path = self.converted / LANGUAGE
        table = next(tensor for tensor in reader(path).tensors if tensor.name == "token_embd.weight")
        embedding = EmbeddingInfo(
            offset=table.data_offset, ggml_type=table.tensor_type.name, row_bytes=table.n_bytes // int(table.shape[1])
        )
        return LlamaContext(path, LlamaOptions(context=512, threads=1, gpu_layers=0), embedding)
