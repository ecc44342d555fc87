"""The size that the vision encoder takes, and the resize to it. The camera process and the model process share it.

An image token covers a square of `unit` pixels. The model process writes an ImageRequest into the frame slot, and the
camera process resizes each frame to its grid before publication: the resize takes its time while the model answers the
frame before. The result is the same as if the model process resized the frame.

    >>> image_size(480, 640, ImageRequest(unit=28, longest_side=1540, max_tokens=144))
    (280, 392)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Annotated

import cv2
import msgspec
import numpy as np

MIN_TOKENS = 8  # mtmd enlarges a smaller image by itself; we do the same, so that both encoders get the same image
# OpenCV averages 2x2 pixels many times faster than other areas. It is done first where so many pixels of the smaller
# frame remain for each pixel of the image: then the rows of the encoder stay the same (cosine 0.99999 on average,
# at least 0.9998; with 4.5 pixels, one answer in 150 was another one). A JPEG decoded at 1/2, 1/4 or 1/8 of its size is
# such an average too.
PIXELS_LEFT = 6.0  # for each side of a pixel
JPEG_REDUCTIONS = (8, 4, 2)

Side = Annotated[int, msgspec.Meta(ge=1, le=8192)]


class ImageRequest(msgspec.Struct, frozen=True):
    """The images that the model process wants."""

    unit: Annotated[int, msgspec.Meta(ge=1, le=128)]  # side of an image token, pixels
    longest_side: Side  # pixels
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    fixed: tuple[Side, Side] | None = None  # height and width, if the encoder takes no other size

    def __post_init__(self) -> None:
        if self.fixed is None and next(self.grids(), None) is None:
            raise ValueError(f"no grid of at least {MIN_TOKENS} tokens fits")
        if self.fixed is not None and min(self.fixed) < self.unit:
            raise ValueError("fixed: smaller than an image token")

    def grids(self) -> Iterator[tuple[int, int]]:
        """Every (lines, columns) within the limits."""
        longest, most = self.longest_side // self.unit, self.max_tokens
        for lines in range(1, min(longest, most) + 1):
            for columns in range(-(-MIN_TOKENS // lines), min(longest, most // lines) + 1):
                yield lines, columns


@functools.lru_cache(64)
def image_grid(height: int, width: int, request: ImageRequest) -> tuple[int, int]:
    """Lines and columns of image tokens for a frame of height x width pixels. The grid covers the frame. It has at most
    max_tokens tokens, and each side is at most longest_side pixels. A frame that is on a grid keeps its size.

    Sides are rounded up, as the reference processor (transformers' Pixtral) does. Where that is more than max_tokens,
    the result is the grid within max_tokens that is nearest to the frame's shape.
    """
    unit = request.unit
    if request.fixed is not None:
        return request.fixed[0] // unit, request.fixed[1] // unit
    longest = request.longest_side // unit
    scale = min(1.0, request.longest_side / max(height, width))
    lines, columns = height * scale / unit, width * scale / unit
    up = min(longest, math.ceil(lines)), min(longest, math.ceil(columns))
    if MIN_TOKENS <= up[0] * up[1] <= request.max_tokens:
        return up
    if up[0] * up[1] > request.max_tokens:
        fit = min(1.0, math.sqrt(request.max_tokens / (lines * columns)))
    else:
        fit = max(1.0, math.sqrt(MIN_TOKENS / (lines * columns)))
    lines, columns = lines * fit, columns * fit

    def distance(sides: tuple[int, int]) -> tuple[bool, float]:
        apart = [(n, side) for n, side in zip(sides, (lines, columns), strict=True)]
        return any(abs(n - side) >= 1 for n, side in apart), sum(abs(math.log(n / side)) for n, side in apart)

    return min(request.grids(), key=distance)


def image_size(height: int, width: int, request: ImageRequest) -> tuple[int, int]:
    """Height and width in pixels of the image that is made of a frame of height x width pixels."""
    lines, columns = image_grid(height, width, request)
    return lines * request.unit, columns * request.unit


def resize(frame: np.ndarray, image: np.ndarray) -> None:
    """Resize frame, (H, W) or (H, W, 3) uint8, to the size of `image` and write it there: an average where it shrinks,
    bicubic where it grows."""
    size = image.shape[:2]
    if frame.shape[:2] == size:
        np.copyto(image, frame)
        return
    while _has_enough_pixels(frame.shape[0], frame.shape[1], 2, size):
        frame = cv2.resize(frame, (frame.shape[1] // 2, frame.shape[0] // 2), interpolation=cv2.INTER_AREA)
    shrinks = frame.shape[0] > size[0] or frame.shape[1] > size[1]
    cv2.resize(frame, size[::-1], dst=image, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def jpeg_reduction(height: int, width: int, size: tuple[int, int]) -> int:
    """1, 2, 4 or 8: decoding a JPEG of height x width pixels at 1/n of its size leaves enough pixels for an image of
    this size."""
    return next((n for n in JPEG_REDUCTIONS if _has_enough_pixels(height, width, n, size)), 1)


def _has_enough_pixels(height: int, width: int, n: int, size: tuple[int, int]) -> bool:
    """Whether a frame of height x width pixels can be reduced to 1/n before it is resized."""
    is_whole = height % n == 0 and width % n == 0  # otherwise all pixels would move by a part of one
    return is_whole and min(height / n / size[0], width / n / size[1]) >= PIXELS_LEFT
