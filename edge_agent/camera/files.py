"""A video file or a folder of images as a camera."""

from __future__ import annotations

import os
import time
from pathlib import Path

import cv2
import numpy as np

from edge_agent.camera.source import (
    NS_PER_S,
    CapturedFrame,
    SourceError,
    SourceItems,
    into_slot,
    sleep_until,
    wait_for_reader,
)
from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraFault
from edge_agent.ipc.frame_slot import Slot

FOLDER_FPS, VIDEO_FPS = 5.0, 30.0  # where neither the source nor the configuration says
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def read_video(config: CameraConfig, slot: Slot) -> SourceItems:
    path = config.source
    if not os.path.isfile(path):
        found = "not a regular file" if os.path.exists(path) else "no such file or folder"
        raise SourceError("absent", f"{path}: {found}", heals=False)
    due_ns = time.monotonic_ns()
    while True:
        capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
        try:
            fps = capture.get(cv2.CAP_PROP_FPS)
            fps = fps if 0 < fps <= 1000 else config.fps or VIDEO_FPS  # a broken header may claim anything
            period_ns, n_read, bgr = round(NS_PER_S / fps), 0, None
            while True:
                if config.realtime:
                    sleep_until(due_ns)
                    due_ns = catch_up(capture, due_ns, period_ns)
                if not capture.grab():
                    break
                captured_ns = time.monotonic_ns()
                ok, bgr = capture.retrieve(bgr)
                due_ns += period_ns
                if not ok:
                    continue
                n_read += 1
                image = into_slot(bgr, slot)
                if not config.realtime:
                    captured_ns = wait_for_reader(slot)
                yield CapturedFrame(image, captured_ns, "arrival", fps)
        finally:
            capture.release()
        if n_read == 0:
            raise SourceError("unreadable", f"{path}: no frame in it that OpenCV can decode", heals=False)
        if not config.loop:
            return


def catch_up(capture: cv2.VideoCapture, due_ns: int, period_ns: int) -> int:
    """Pass over the frames whose time is gone, without converting them; returns when the next one was due.

    At most a second's worth: where decoding is slower than the video, some frame has to be shown all the same.
    """
    for _ in range(max(1, NS_PER_S // period_ns)):
        if time.monotonic_ns() < due_ns + period_ns or not capture.grab():
            return due_ns
        due_ns += period_ns
    return time.monotonic_ns()


def read_folder(config: CameraConfig, slot: Slot) -> SourceItems:
    fps = config.fps or FOLDER_FPS
    due_ns = time.monotonic_ns()
    named: set[Path] = set()  # unreadable images are named once, not once per round
    while True:
        try:
            files = sorted(path for path in Path(config.source).iterdir() if path.is_file())
        except OSError as error:
            raise SourceError("absent", f"{config.source}: {error.strerror}", heals=False) from None
        paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        if not paths:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise SourceError("absent", f"{config.source}: no image in this folder ({kinds})", heals=False)
        n_read = 0
        for path in paths:
            if config.realtime:
                sleep_until(due_ns)
            try:
                image = into_slot(read_image(path), slot)
            except SourceError as bad:
                if path not in named:
                    named.add(path)
                    yield CameraFault(bad.reason, f"{bad.detail}; passed over")
                continue
            n_read += 1
            captured_ns = time.monotonic_ns() if config.realtime else wait_for_reader(slot)
            due_ns = max(due_ns + round(NS_PER_S / fps), captured_ns)
            yield CapturedFrame(image, captured_ns, "arrival", fps if config.realtime else None)
        if n_read == 0:
            raise SourceError(
                "unreadable", f"{config.source}: none of the {len(paths)} images can be read", heals=False
            )
        if not config.loop:
            return


def read_image(path: Path) -> np.ndarray:
    try:
        bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise SourceError("unreadable", f"{path}: {error.err}") from None
    if bgr is None:
        raise SourceError("unreadable", f"{path}: not an image that OpenCV can decode")
    return bgr
