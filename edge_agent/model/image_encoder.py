"""Frame -> image embeddings in a staging buffer. Knows no slot, no time and no prompt.

There are two buffers, so that one frame can be encoded while the other is answered.
"""

from __future__ import annotations

import numpy as np

from edge_agent.ipc.image_grid import ImageRequest
from edge_agent.model.constrained import NonFiniteError
from edge_agent.model.frame_buffer import FrameBuffer
from edge_agent.model.preprocess import Preprocessor, n_embedding_rows
from edge_agent.model.vision_encoder import MtmdEncoder, OnnxEncoder


class ImageEncoder:
    """Owns the vision encoder; close() frees it. For one thread at a time."""

    def __init__(self, preprocessor: Preprocessor, encoder: OnnxEncoder | MtmdEncoder, buffer_rows: int) -> None:
        """buffer_rows: rows of a frame's batch with its text, see Prompt.buffer_rows."""
        self._preprocessor, self.encoder = preprocessor, encoder
        self._buffers = [FrameBuffer(buffer_rows, encoder.n_embd) for _ in range(2)]
        self._next = 0

    @property
    def backend(self) -> str:
        """Which library and which device encode, for the status."""
        return self.encoder.provider

    @property
    def max_tokens(self) -> int:
        """Image tokens of a frame, as configured."""
        return self._preprocessor.max_tokens

    def request(self, max_tokens: int) -> ImageRequest:
        """What resize() makes of a frame: the camera process can do it before."""
        return self._preprocessor.request(max_tokens)

    def resize(self, frame: np.ndarray, max_tokens: int | None = None) -> np.ndarray:
        """frame: (H, W, 3) uint8 RGB -> an image on the grid, (28 * lines, 28 * columns, 3) uint8 RGB, a buffer that
        is valid until the next call. max_tokens: for this frame; None: the configured number."""
        return self._preprocessor.image(frame, max_tokens)

    def n_tokens(self, image: np.ndarray) -> int:
        """Image tokens of an image on the grid."""
        unit = self._preprocessor.unit
        return (image.shape[0] // unit) * (image.shape[1] // unit)

    def encode(self, image: np.ndarray) -> FrameBuffer:
        """image: of resize() -> its embeddings, in a buffer that is valid until the call after the next.

        Raises NonFiniteError: llama.cpp's 4-bit kernels take NaN for a number, and its logits would look valid.
        """
        buffer, self._next = self._buffers[self._next], 1 - self._next
        unit = self._preprocessor.unit
        breaks = self._preprocessor.vision.breaks
        rows = buffer.embeddings(n_embedding_rows(image.shape[0] // unit, image.shape[1] // unit, breaks))
        self.encoder.encode(image, rows)
        if not np.isfinite(rows.sum()):  # one element that is not finite makes the sum so: one pass checks all
            raise NonFiniteError("the vision encoder gave NaN or infinity")
        return buffer

    def embed(self, frame: np.ndarray, max_tokens: int | None = None) -> FrameBuffer:
        """resize() and encode()."""
        return self.encode(self.resize(frame, max_tokens))

    def close(self) -> None:
        self.encoder.close()


class NoImages:
    """In place of an ImageEncoder for a text-only model: a frame says when to answer, and its pixels are not read."""

    asked = runs = ""  # execution providers are onnxruntime's
    backend = "none: a text-only model"
    max_tokens = 1

    def __init__(self, buffer_rows: int, n_embd: int) -> None:
        self._buffers = [FrameBuffer(buffer_rows, n_embd) for _ in range(2)]
        self._next = 0

    @property
    def encoder(self) -> NoImages:
        return self

    def request(self, max_tokens: int) -> ImageRequest:
        """The smallest image there is: the camera process need not copy more."""
        return ImageRequest(unit=1, longest_side=1, max_tokens=1, fixed=(1, 1))

    def resize(self, frame: np.ndarray, max_tokens: int | None = None) -> np.ndarray:
        return np.empty((0, 0, 3), np.uint8)

    def n_tokens(self, image: np.ndarray) -> int:
        """At least 1: the token budget divides by it."""
        return 1

    def encode(self, image: np.ndarray) -> FrameBuffer:
        """A buffer without rows, as for ImageEncoder.encode."""
        buffer, self._next = self._buffers[self._next], 1 - self._next
        buffer.embeddings(0)
        return buffer

    def embed(self, frame: np.ndarray, max_tokens: int | None = None) -> FrameBuffer:
        return self.encode(self.resize(frame, max_tokens))

    def close(self) -> None:
        pass
