"""Images for measurements: how many, in which order and colour, and what is refused."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_agent.tools.stills import ImageError, read_stills
from tests.harness.camera import counting_video, number_of


def folder_of(path: Path, n_images: int) -> Path:
    path.mkdir()
    for k in range(n_images):
        cv2.imwrite(str(path / f"{k}.png"), np.full((20, 30, 3), (4 * k, 0, 255), np.uint8))  # BGR
    return path


@pytest.mark.parametrize(
    ("at_most", "expected"), [(1, [0]), (3, [0, 3, 6]), (5, [0, 2, 4, 6, 8]), (9, [*range(9)]), (64, [*range(9)])]
)
def test_at_most_so_many_images_at_equal_distances(tmp_path, at_most, expected):
    images = list(read_stills(folder_of(tmp_path / "images", 9), at_most))
    assert [tuple(image[0, 0]) for image in images] == [(255, 0, 4 * k) for k in expected]
    video = counting_video(tmp_path / "v.avi", 9)
    assert [number_of(image) for image in read_stills(video, at_most)] == expected


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("not a video")
    (folder_of(tmp_path / "bad", 2) / "1.png").write_text("not an image")
    for name, words in (
        ("none", "expected a folder of images or a video"),
        ("text.mp4", "expected a folder of images or a video"),
        ("empty", r"no image in this folder; expected \.bmp"),
        ("bad", "1.png: not an image that OpenCV can decode"),
    ):
        with pytest.raises(ImageError, match=rf"{name}.*{words}"):
            list(read_stills(tmp_path / name, 8))
