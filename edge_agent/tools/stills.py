"""Images from a folder or a video, for measurements and calibration: not in real time, and no more than needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from edge_agent.camera.files import image_paths, read_image
from edge_agent.camera.source import SourceError
from edge_agent.errors import UserError


class ImageError(UserError):
    """One line: the file, and what is wrong with it."""


def read_stills(source: Path, at_most: int) -> Iterator[np.ndarray]:
    """At most `at_most` images, (H, W, 3) uint8 RGB, at equal distances in a folder (by name) or a video.

    Raises ImageError, also for a single image that cannot be read.
    """
    images = _folder_images(source, at_most) if source.is_dir() else _video_images(source, at_most)
    for bgr in images:
        yield cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def _folder_images(folder: Path, at_most: int) -> Iterator[np.ndarray]:
    try:
        paths = image_paths(folder)
        for path in paths[:: _step(len(paths), at_most)]:
            yield read_image(path)
    except SourceError as error:
        raise ImageError(error.detail) from None


def _video_images(path: Path, at_most: int) -> Iterator[np.ndarray]:
    video = cv2.VideoCapture(str(path)) if path.is_file() else None
    if video is None or not video.isOpened():
        raise ImageError(f"{path}: expected a folder of images or a video that OpenCV can read")
    try:
        step = _step(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), at_most)
        for i in itertools.count():
            ok, bgr = video.read()
            if not ok:
                return
            if i % step == 0:
                yield bgr
    finally:
        video.release()


def _step(n_images: int, at_most: int) -> int:
    """Take every n-th image: n, at least 1."""
    return max(1, -(-n_images // at_most))
