"""Pictures from a folder or a video, for what is done at leisure: measuring, calibrating. The camera process has
readers of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from edge_agent.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class ImageError(UserError):
    """One line."""


def read_stills(source: Path, at_most: int) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 RGB from a folder of pictures in the order of their names, or evenly from a video."""
    if source.is_dir():
        paths = sorted(path for path in source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise ImageError(f"{source}: no pictures; expected {', '.join(IMAGE_SUFFIXES)}")
        for path in paths[:: -(-len(paths) // at_most)]:
            image = cv2.imread(str(path), cv2.IMREAD_COLOR)
            if image is None:
                raise ImageError(f"{path}: not a picture OpenCV can read; remove it")
            yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        return
    video = cv2.VideoCapture(str(source)) if source.is_file() else None
    if video is None or not video.isOpened():
        raise ImageError(f"{source}: expected a folder of pictures or a video")
    step = max(1, -(-int(video.get(cv2.CAP_PROP_FRAME_COUNT)) // at_most))
    for i in itertools.count():
        there, image = video.read()
        if not there:
            break
        if i % step == 0:
            yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    video.release()
