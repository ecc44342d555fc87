"""Pictures from a folder or a video, for benchmarks and calibration. The camera process has readers of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from edge_agent.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class ImageError(UserError):
    """A picture or a video cannot be read. One line."""


def read_stills(source: Path, at_most: int) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 RGB: up to at_most pictures, evenly chosen from a folder in the order of their names, or from a
    video. Raises ImageError."""
    return _read_folder(source, at_most) if source.is_dir() else _read_video(source, at_most)


def _read_folder(folder: Path, at_most: int) -> Iterator[np.ndarray]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ImageError(f"{folder}: no pictures; expected {', '.join(IMAGE_SUFFIXES)}")
    for path in paths[:: -(-len(paths) // at_most)]:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image is None:
            raise ImageError(f"{path}: not a picture OpenCV can read; remove it")
        yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _read_video(path: Path, at_most: int) -> Iterator[np.ndarray]:
    video = cv2.VideoCapture(str(path)) if path.is_file() else None
    if video is None or not video.isOpened():
        raise ImageError(f"{path}: expected a folder of pictures or a video")
    try:
        step = max(1, -(-int(video.get(cv2.CAP_PROP_FRAME_COUNT)) // at_most))
        for i in itertools.count():
            success, image = video.read()
            if not success:
                return
            if i % step == 0:
                yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    finally:
        video.release()
