"""A video file or a folder of images as a camera."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np

from edge_agent.camera.clock import Clock
from edge_agent.camera.source import CapturedFrame, SourceError, SourceItems, into_slot, wait_for_reader
from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraFault
from edge_agent.ipc.frame_slot import Slot
from edge_agent.time_units import NS_PER_S

FOLDER_FPS, VIDEO_FPS = 5.0, 30.0  # Hz, where neither the source nor the configuration has a rate
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def read_video(config: CameraConfig, slot: Slot, clock: Clock) -> SourceItems:
    path = config.source
    if not os.path.isfile(path):
        problem = "not a regular file" if os.path.exists(path) else "no such file or folder"
        raise SourceError("absent", f"{path}: {problem}", retryable=False)
    due_ns = clock.now_ns()
    while True:
        capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
        try:
            fps = capture.get(cv2.CAP_PROP_FPS)
            fps = fps if 0 < fps <= 1000 else config.fps or VIDEO_FPS  # a broken header may claim anything
            period_ns, n_frames, bgr = round(NS_PER_S / fps), 0, None
            while True:
                if config.realtime:
                    clock.sleep_until(due_ns)
                    due_ns = skip_late_frames(capture, due_ns, period_ns, clock)
                if not capture.grab():
                    break
                captured_ns = clock.now_ns()
                ok, bgr = capture.retrieve(bgr)
                due_ns += period_ns
                if not ok:
                    continue
                n_frames += 1
                image = into_slot(bgr, slot)
                if not config.realtime:
                    captured_ns = wait_for_reader(slot, clock)
                yield CapturedFrame(image, captured_ns, "arrival", fps)
        finally:
            capture.release()
        if n_frames == 0:
            raise SourceError("unreadable", f"{path}: contains no frame that OpenCV can decode", retryable=False)
        if not config.loop:
            return


def skip_late_frames(capture: cv2.VideoCapture, due_ns: int, period_ns: int, clock: Clock) -> int:
    """Skip the frames whose time is over, without converting them. Returns the time at which the next frame was due.

    Skips the frames of one second at most. Where decoding is slower than the video, the frame after that is shown late.
    """
    for _ in range(max(1, NS_PER_S // period_ns)):
        if clock.now_ns() < due_ns + period_ns or not capture.grab():
            return due_ns
        due_ns += period_ns
    return clock.now_ns()


def read_folder(config: CameraConfig, slot: Slot, clock: Clock) -> SourceItems:
    folder, fps = Path(config.source), config.fps or FOLDER_FPS
    period_ns, due_ns = round(NS_PER_S / fps), clock.now_ns()
    reported: set[Path] = set()  # an unreadable image is reported once, not in every round
    while True:
        n_frames = 0
        for path in (paths := image_paths(folder)):
            if config.realtime:
                clock.sleep_until(due_ns)
            try:
                image = into_slot(read_image(path), slot)
            except SourceError as error:
                if path not in reported:
                    reported.add(path)
                    yield CameraFault(error.reason, f"{error.detail}; skipped")
                continue
            n_frames += 1
            captured_ns = clock.now_ns() if config.realtime else wait_for_reader(slot, clock)
            due_ns = max(due_ns + period_ns, captured_ns)
            yield CapturedFrame(image, captured_ns, "arrival", fps if config.realtime else None)
        if n_frames == 0:
            detail = f"{folder}: OpenCV can read none of its {len(paths)} images"
            raise SourceError("unreadable", detail, retryable=False)
        if not config.loop:
            return


def image_paths(folder: Path) -> list[Path]:
    """The images of a folder in the order of their names. Raises SourceError if there are none."""
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise SourceError("absent", f"{folder}: {error.strerror}", retryable=False) from None
    paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise SourceError("absent", f"{folder}: no image in this folder; expected {kinds}", retryable=False)
    return paths


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8, BGR. Raises SourceError."""
    try:
        bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise SourceError("unreadable", f"{path}: {error.err}") from None
    if bgr is None:
        raise SourceError("unreadable", f"{path}: not an image that OpenCV can decode")
    return bgr
