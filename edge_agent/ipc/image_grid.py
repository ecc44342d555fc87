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
# A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, which is an average too, in less than half of the time. It is
# done where so many pixels of the smaller frame remain. Smallest cosine of a row of the encoder: 0.99994 with 9.6
# pixels, 0.9994 with 4.8.
PIXELS_LEFT = 9.0  # for each side of a pixel
JPEG_REDUCTIONS = (8, 4, 2)

Side = Annotated[int, msgspec.Meta(ge=1, le=8192)]


class ImageRequest(msgspec.Struct, frozen=True):
    """The images that the model process wants."""

    unit: Annotated[int, msgspec.Meta(ge=1, le=128)]  # side of an image token, pixels
    longest_side: Side  # pixels
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    fixed: tuple[Side, Side] | None = None  # height and width, if the encoder takes no other size

    def __post_init__(self) -> None:
        if self.fixed is None and next(self.grids(1.0), None) is None:
            raise ValueError(f"no grid of at least {MIN_TOKENS} tokens fits")
        if self.fixed is not None and min(self.fixed) < self.unit:
            raise ValueError("fixed: smaller than an image token")

    def grids(self, columns: float) -> Iterator[tuple[int, int]]:
        """For each number of lines, the grids within the limits whose columns are nearest to `columns`."""
        longest = self.longest_side // self.unit
        for lines in range(1, min(longest, self.max_tokens) + 1):
            least, most = -(-MIN_TOKENS // lines), min(longest, self.max_tokens // lines)
            if least <= most:
                for n in (math.floor(columns), math.ceil(columns)):
                    yield lines, min(max(n, least), most)


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

    return min(request.grids(columns), key=distance)


def image_size(height: int, width: int, request: ImageRequest) -> tuple[int, int]:
    """Height and width in pixels of the image that is made of a frame of height x width pixels."""
    lines, columns = image_grid(height, width, request)
    return lines * request.unit, columns * request.unit


def resize(frame: np.ndarray, image: np.ndarray) -> None:
    """Resize frame, (H, W) or (H, W, 3) uint8, to the size of `image`, which is contiguous, and write it there: an
    average over exact areas where it shrinks, bicubic where it grows."""
    height, width = image.shape[:2]
    if frame.shape[:2] == (height, width):
        np.copyto(image, frame)
    elif frame.shape[0] < height or frame.shape[1] < width:
        shrinks = frame.shape[0] > height or frame.shape[1] > width
        cv2.resize(frame, (width, height), dst=image, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    else:
        _average(frame, image)


def _average(frame: np.ndarray, image: np.ndarray) -> None:
    """Each pixel of the image becomes the mean over its area of the frame; pixels at the edge of it count in part.

    Rows first, then columns: OpenCV's own INTER_AREA averages the columns of all rows, and takes three times as long.
    The rows of a frame repeat in `n_bands` bands: 480 rows become 112 in 16 bands of 30 rows, which become 7. So one
    call works on the same row of every band.
    """
    n_bands = math.gcd(len(frame), len(image))
    bands, targets = (pixels.reshape(n_bands, -1, *pixels.shape[1:]) for pixels in (frame, image))
    means = np.zeros((n_bands, *frame.shape[1:]), np.float32)  # of rows
    for target, shares in enumerate(_shares(bands.shape[1], targets.shape[1])):
        for row, share in shares:
            cv2.accumulateWeighted(bands[:, row], means, share)  # means = (1 - share) * means + share * row
        columns = cv2.resize(means, (image.shape[1], n_bands), interpolation=cv2.INTER_AREA)
        cv2.convertScaleAbs(columns, dst=targets[:, target])  # rounds


@functools.lru_cache(8)
def _shares(n_rows: int, n_targets: int) -> list[list[tuple[int, float]]]:
    """For each target, its rows: (row, its share in the mean of this row and the target's rows before it)."""
    shares: list[list[tuple[int, float]]] = []
    for target in range(n_targets):
        start, stop, weight = target * n_rows, (target + 1) * n_rows, 0  # a whole row has weight n_targets
        shares.append([])
        for row in range(start // n_targets, -(-stop // n_targets)):
            row_weight = min(stop, (row + 1) * n_targets) - max(start, row * n_targets)
            weight += row_weight
            shares[-1].append((row, row_weight / weight))
    return shares


def jpeg_reduction(height: int, width: int, size: tuple[int, int]) -> int:
    """1, 2, 4 or 8: decoding a JPEG of height x width pixels at 1/n of its size leaves enough pixels for an image of
    this size."""
    return next((n for n in JPEG_REDUCTIONS if _has_enough_pixels(height, width, n, size)), 1)


def _has_enough_pixels(height: int, width: int, n: int, size: tuple[int, int]) -> bool:
    """Whether a frame of height x width pixels can be reduced to 1/n before it is resized."""
    is_whole = height % n == 0 and width % n == 0  # otherwise all pixels would move by a part of one
    return is_whole and min(height / n / size[0], width / n / size[1]) >= PIXELS_LEFT
