"""Images for measurements: how many, in which order and colour, and what is refused."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_agent.tools.stills import ImageError, Stills
from tests.harness.camera import counting_video, number_of
from tests.harness.pictures import counting_mkv, encoded, mkv, scene


def folder_of(path: Path, n_images: int) -> Path:
    path.mkdir()
    for k in range(n_images):
        cv2.imwrite(str(path / f"{k}.png"), np.full((20, 30, 3), (4 * k, 0, 255), np.uint8))  # BGR
    return path


@pytest.mark.parametrize(
    ("at_most", "expected"), [(1, [0]), (3, [0, 3, 6]), (5, [0, 2, 4, 6, 8]), (9, [*range(9)]), (64, [*range(9)])]
)
def test_at_most_so_many_images_at_equal_distances(tmp_path, at_most, expected):
    images = list(Stills(folder_of(tmp_path / "images", 9), at_most))
    assert [tuple(image[0, 0]) for image in images] == [(255, 0, 4 * k) for k in expected]
    video = counting_video(tmp_path / "v.avi", 9)
    assert [number_of(image) for image in Stills(video, at_most)] == expected


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("not a video")
    for name, words in (
        ("none", "no such file or folder; expected a folder of images or a video"),
        ("text.mp4", "contains no frame that can be decoded"),
        ("empty", r"no image in this folder; expected \.bmp"),
    ):
        with pytest.raises(ImageError, match=rf"{name}.*{words}"):
            Stills(tmp_path / name, 8)


THERMAL = encoded(".png", np.full((20, 30), 7800, np.uint16))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (b"b.jpg", encoded(".jpg")[:3000]),
        (b"b.png", THERMAL),
        (b"b.webp", b""),
        (b"b\xfc.jpg", encoded(".jpg")[:-2]),
        (b"b.bmp", encoded(".bmp")[:-1]),
    ],
    ids=["cut", "16 bits", "empty", "a name in Latin-1", "cut bmp"],
)
@pytest.mark.parametrize("at_most", [1, 2, 3, 64])
def test_a_bad_picture_is_named_once_and_the_next_one_takes_its_place(tmp_path, name, data, at_most):
    folder, reported = folder_of(tmp_path / "images", 4), []
    for k in range(4):
        (folder / f"{k}.png").rename(folder / f"{k}z.png")
        (folder / f"._{k}z.png").write_bytes(bytes(200))
        Path(os.fsdecode(bytes(folder) + b"/%d" % k + name)).write_bytes(data)
    stills = Stills(folder, at_most, reported.append)
    assert len(stills) == len(list(stills)) == len(list(stills)) == {1: 1, 2: 2, 3: 3, 64: 4}[at_most]
    assert 1 <= len(reported) == len(set(reported)) <= 4
    assert all(line.startswith(str(folder)) and line.endswith("skipped") and line.encode() for line in reported)


def test_a_folder_without_a_usable_picture_is_an_error_that_names_the_first(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(THERMAL)
    reported = []
    with pytest.raises(ImageError, match=r"none of its 2 images can be used; the first: .*a\.png: 16 bits"):
        Stills(tmp_path, 1, reported.append)
    assert reported == []  # the error is one line


def test_without_a_report_a_bad_picture_is_named_on_stderr(tmp_path, capsys):
    (folder_of(tmp_path / "images", 2) / "0.png").write_bytes(THERMAL)
    assert len(Stills(tmp_path / "images", 8)) == 1
    assert capsys.readouterr().err.startswith(f"{tmp_path}/images/0.png: 16 bits")


def test_a_picture_that_changes_after_it_was_chosen_is_an_error(tmp_path):
    stills = Stills(folder_of(tmp_path / "images", 3), 3)
    (tmp_path / "images" / "1.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"1\.png: .*it could be decoded before"):
        list(stills)


def test_a_recording_that_becomes_shorter_is_an_error(tmp_path):
    stills = Stills(counting_mkv(tmp_path / "v.mkv", [40 * k for k in range(6)]), 3)
    counting_mkv(tmp_path / "v.mkv", [0, 40])
    with pytest.raises(ImageError, match="ends before frame 3"):
        list(stills)


def test_damaged_frames_of_a_recording_are_named_and_the_next_one_is_taken(tmp_path):
    frames = [encoded(".jpg", np.full((96, 128, 3), 4 * k, np.uint8)) for k in range(12)]
    for k in (4, 5):
        frames[k] = encoded(".jpg")[:3000]
    (tmp_path / "v.mkv").write_bytes(mkv(zip(range(0, 480, 40), frames, strict=True), 128, 96))
    reported = []
    stills = Stills(tmp_path / "v.mkv", 3, reported.append)
    assert [number_of(image) for image in stills] == [0, 6, 8] and len(stills) == 3
    assert [line.partition(": not")[0] for line in reported] == [f"{tmp_path}/v.mkv: frame {k}" for k in (5, 6)]


@pytest.mark.parametrize("header_fps", [0, 1000])
def test_the_distances_do_not_depend_on_the_header(tmp_path, header_fps):
    """No duration, and a rate that nothing has: the frames themselves are counted."""
    path = counting_mkv(tmp_path / "v.mkv", [500 * k for k in range(30)], header_fps)
    assert [number_of(image) for image in Stills(path, 5)] == [0, 6, 12, 18, 24]


@pytest.mark.parametrize("kind", ["recording", "folder"])
def test_one_image_is_in_memory_and_not_all_of_them(tmp_path, kind):
    """Twenty images of a megapixel; numpy tells tracemalloc what it allocates."""
    big = encoded(".jpg", cv2.resize(scene(), (1280, 960)))
    path = tmp_path / "v.mkv"
    if kind == "folder":
        path = tmp_path
        for k in range(20):
            (tmp_path / f"{k}.jpg").write_bytes(big)
    else:
        path.write_bytes(mkv(((40 * k, big) for k in range(20)), 1280, 960))
    tracemalloc.start()
    try:
        assert sum(1 for _ in Stills(path, 20)) == 20
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 5 * 1280 * 960 * 3
