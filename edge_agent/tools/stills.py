"""Images from a folder or a video, for measurements and calibration: not in real time, and no more than needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from edge_agent.camera.picture import picture_paths, read_picture
from edge_agent.camera.recording import Playback, Recording
from edge_agent.camera.source import SourceError
from edge_agent.errors import UserError


class ImageError(UserError):
    """One line: the file, and what is wrong with it."""


def report_on_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class Stills:
    """At most `at_most` images at equal distances in a folder (by name) or a video, (H, W, 3) uint8 RGB.

    Each iteration decodes them anew, so that one image is in memory and not all of them. They are chosen, and decoded
    once, when the object is made: an image that cannot be used is reported then, before any long work, and the next one
    takes its place.
    """

    def __init__(self, source: Path, at_most: int, report: Callable[[str], object] = report_on_stderr) -> None:
        """Raises ImageError if there is no image that can be used."""
        self.source = source
        self._problems: list[str] = []
        self._paths: list[Path] = []  # of a folder
        self._numbers: list[int] = []  # of the frames of a video, counted from 1
        is_folder = source.is_dir()
        try:
            (self._choose_paths if is_folder else self._choose_frames)(at_most)
        except SourceError as error:
            expected = "" if is_folder else "; expected a folder of images or a video"
            raise ImageError(error.detail + expected) from None
        for problem in self._problems:
            report(f"{problem}; skipped")

    def __len__(self) -> int:
        return len(self._paths) or len(self._numbers)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Raises ImageError if an image has changed and cannot be used any more."""
        try:
            for bgr in map(read_picture, self._paths) if self._paths else self._frames():
                yield cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
        except SourceError as error:
            raise ImageError(f"{error.detail}; it could be decoded before") from None

    def _choose_paths(self, at_most: int) -> None:
        paths = picture_paths(self.source)
        step = -(-len(paths) // at_most)
        for i in range(0, len(paths), step):
            for path in paths[i : i + step]:
                try:
                    read_picture(path)
                except SourceError as error:
                    self._problems.append(error.detail)
                else:
                    self._paths.append(path)
                    break
        if not self._paths:
            detail = f"{self.source}: none of its {len(paths)} images can be used; the first: {self._problems[0]}"
            raise SourceError("unreadable", detail)

    def _choose_frames(self, at_most: int) -> None:
        with Recording(self.source) as recording:
            step = max(1, -(-recording.n_packets() // at_most))
            with Playback(recording) as playback:
                while len(self._numbers) < at_most and playback.grab() is not None:
                    if (playback.n_grabbed - 1) // step < len(self._numbers):
                        continue  # this part of the video has its image
                    try:
                        playback.image()
                    except SourceError as error:
                        self._problems.append(error.detail)
                    else:
                        self._numbers.append(playback.n_grabbed)
            if not self._numbers:
                raise recording.no_frame()

    def _frames(self) -> Iterator[np.ndarray]:
        with Recording(self.source) as recording, Playback(recording) as playback:
            for number in self._numbers:
                while playback.n_grabbed < number:
                    if playback.grab() is None:
                        raise SourceError("unreadable", f"{self.source}: ends before frame {number}")
                yield playback.image()
