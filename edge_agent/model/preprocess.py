"""Frame -> image on the grid of image tokens -> normalised pixels. Pure but for reused buffers.

The camera process has resized a frame already, if it knew the request (edge_agent/ipc/image_grid.py): then image() is a
copy.
"""

from __future__ import annotations

import numpy as np

from edge_agent.bundle.manifest import VisionInfo
from edge_agent.ipc.image_grid import ImageRequest, image_size, resize


def image_request(vision: VisionInfo, max_tokens: int) -> ImageRequest:
    """The images that this encoder takes, of at most max_tokens image tokens."""
    return ImageRequest(
        unit=vision.patch * vision.merge, longest_side=vision.image_size, max_tokens=max_tokens, fixed=vision.fixed
    )


def n_embedding_rows(lines: int, columns: int, breaks: bool = True) -> int:
    """Rows of the encoder's output: the image tokens, and the breaks between lines of an encoder that has them."""
    return lines * columns + (lines - 1 if breaks else 0)


def max_embedding_rows(vision: VisionInfo, max_tokens: int) -> int:
    """An upper bound for n_embedding_rows of a frame."""
    unit = vision.patch * vision.merge
    if vision.fixed is not None:
        return n_embedding_rows(vision.fixed[0] // unit, vision.fixed[1] // unit, vision.breaks)
    return max_tokens + (vision.image_size // unit if vision.breaks else 0)


class Preprocessor:
    """Frames -> the encoder's input, in buffers that are reused while the size stays the same."""

    def __init__(self, vision: VisionInfo, max_tokens: int) -> None:
        self.vision, self.max_tokens = vision, max_tokens
        self.unit = vision.patch * vision.merge  # side of an image token, pixels
        mean, std = np.asarray(vision.mean, np.float32), np.asarray(vision.std, np.float32)
        self._scale = (1 / (255 * std)).reshape(3, 1, 1)
        self._shift = (-mean / std).reshape(3, 1, 1)
        self._image = np.empty((0, 0, 3), np.uint8)
        self._pixels = np.empty((1, 3, 0, 0), np.float32)

    def request(self, max_tokens: int | None = None) -> ImageRequest:
        """What image() makes of a frame. max_tokens: as for image()."""
        return image_request(self.vision, max_tokens or self.max_tokens)

    def image(self, frame: np.ndarray, max_tokens: int | None = None) -> np.ndarray:
        """frame: (H, W, 3) uint8 RGB -> (28 * lines, 28 * columns, 3) uint8 RGB, a buffer that is valid until the next
        call. max_tokens: for this frame; None: the configured number."""
        size = image_size(frame.shape[0], frame.shape[1], self.request(max_tokens))
        if self._image.shape[:2] != size:
            self._image = np.empty((*size, 3), np.uint8)
        resize(frame, self._image)
        return self._image

    def pixels(self, image: np.ndarray) -> np.ndarray:
        """image on the grid -> (1, 3, H, W) float32, (RGB / 255 - mean) / std, a buffer that is valid until the
        next call."""
        shape = (1, 3, *image.shape[:2])
        if self._pixels.shape != shape:
            self._pixels = np.empty(shape, np.float32)
        np.multiply(image.transpose(2, 0, 1), self._scale, out=self._pixels[0])
        self._pixels[0] += self._shift
        return self._pixels
