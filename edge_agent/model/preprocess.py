"""Frame -> image on the 28-pixel grid -> normalised pixels. Pure but for reused buffers."""

from __future__ import annotations

import functools
import itertools
import math

import cv2
import numpy as np

from edge_agent.bundle.manifest import VisionInfo

MIN_TOKENS = 8  # mtmd enlarges a smaller image by itself; we do the same, so that both encoders get the same image


@functools.lru_cache(64)
def image_grid(height: int, width: int, max_tokens: int, vision: VisionInfo) -> tuple[int, int]:
    """Lines and columns of image tokens for a frame of height x width pixels. The grid covers the frame. It has at most
    max_tokens tokens, and each side is at most vision.image_size pixels.

    Sides are rounded up, as the reference processor (transformers' Pixtral) does. Where that is more than max_tokens,
    the result is the grid within max_tokens that is nearest to the frame's shape.
    """
    unit = vision.patch * vision.merge
    if vision.fixed is not None:
        return vision.fixed[0] // unit, vision.fixed[1] // unit
    longest = vision.image_size // unit
    scale = min(1.0, vision.image_size / max(height, width))
    lines, columns = height * scale / unit, width * scale / unit
    up = min(longest, math.ceil(lines)), min(longest, math.ceil(columns))
    if MIN_TOKENS <= up[0] * up[1] <= max_tokens:
        return up
    if up[0] * up[1] > max_tokens:
        fit = min(1.0, math.sqrt(max_tokens / (lines * columns)))
    else:
        fit = max(1.0, math.sqrt(MIN_TOKENS / (lines * columns)))
    lines, columns = lines * fit, columns * fit

    def distance(sides: tuple[int, int]) -> tuple[bool, float]:
        apart = [(n, side) for n, side in zip(sides, (lines, columns), strict=True)]
        return any(abs(n - side) >= 1 for n, side in apart), sum(abs(math.log(n / side)) for n, side in apart)

    sides = itertools.product(range(1, longest + 1), range(1, longest + 1))
    return min((n for n in sides if MIN_TOKENS <= n[0] * n[1] <= max_tokens), key=distance)


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

    def image(self, frame: np.ndarray, max_tokens: int | None = None) -> np.ndarray:
        """frame: (H, W, 3) uint8 RGB -> (28 * lines, 28 * columns, 3) uint8 RGB, a buffer that is valid until the next
        call. max_tokens: for this frame; None: the configured number."""
        lines, columns = image_grid(*frame.shape[:2], max_tokens or self.max_tokens, self.vision)
        size = (lines * self.unit, columns * self.unit)
        if self._image.shape[:2] != size:
            self._image = np.empty((*size, 3), np.uint8)
        shrinking = frame.shape[0] > size[0] or frame.shape[1] > size[1]
        cv2.resize(frame, size[::-1], dst=self._image, interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)
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
