"""One reader of recordings: each frame at its own stamp, whatever the header claims, and damage is found."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_agent.camera.recording import MAX_GAP_NS, Playback, Recording
from edge_agent.camera.source import SourceError
from tests.harness.camera import counting_video, number_of
from tests.harness.pictures import counting_mkv, encoded, mkv, scene

VARIED_MS = [100 * k for k in range(10)] + [1000 + 500 * k for k in range(10)]


def times_ms(path: Path) -> list[float]:
    with Recording(path) as recording, Playback(recording) as playback:
        return [time_ns / 1e6 for time_ns in iter(playback.grab, None)]


@pytest.mark.parametrize("header_fps", [0, 0.001, 30, 1000, 1e9], ids=lambda fps: f"{fps:g}-fps")
@pytest.mark.parametrize(
    "stamps_ms",
    [VARIED_MS, [100 * k for k in range(30)], [0, 1, 2, 2000, 2001], [3_600_000 + 40 * k for k in range(5)]],
    ids=["variable", "ten a second", "bursts", "an hour after zero"],
)
def test_each_frame_has_its_own_stamp_whatever_the_header_claims(tmp_path, stamps_ms, header_fps):
    path = counting_mkv(tmp_path / "v.mkv", stamps_ms, header_fps)
    expected = [stamp_ms - stamps_ms[0] for stamp_ms in stamps_ms]
    assert times_ms(path) == pytest.approx(expected, abs=0.001)
    with Recording(path) as recording:
        assert recording.n_packets() == len(stamps_ms)
        assert recording.fps() == pytest.approx(1000 * (len(stamps_ms) - 1) / expected[-1], rel=0.01)


@pytest.mark.parametrize(
    ("stamps_ms", "expected_ms"),
    [
        ([0, 0, 0, 0], [0, 1000 / 30, 2000 / 30, 100]),
        ([0, 40, 80, 40, 80], [0, 40, 80, 80 + 1000 / 30, 120 + 1000 / 30]),
        ([5000, 5040, 0, 40], [0, 40, 40 + 1000 / 30, 80 + 1000 / 30]),
        ([0, 40, 86_400_000, 86_400_040], [0, 40, 5040, 5080]),
    ],
    ids=["all equal", "backwards", "from zero again", "a day"],
)
def test_the_time_of_a_frame_rises_and_is_bounded(tmp_path, stamps_ms, expected_ms):
    path = counting_mkv(tmp_path / "v.mkv", stamps_ms)
    with Recording(path) as recording, Playback(recording, usual_fps=30) as playback:
        found_ms = [time_ns / 1e6 for time_ns in iter(playback.grab, None)]
    # FFmpeg guesses a rate from the stamps where the header has none, so a replaced gap is the usual one or near it.
    gaps_ms = np.diff(found_ms)
    assert (gaps_ms > 0).all() and (gaps_ms <= MAX_GAP_NS / 1e6).all()
    assert found_ms == pytest.approx(expected_ms, abs=60)


def test_equal_stamps_give_no_rate(tmp_path):
    with Recording(counting_mkv(tmp_path / "v.mkv", [0] * 5)) as recording:
        assert recording.fps() is None
    with Recording(counting_mkv(tmp_path / "one.mkv", [0])) as recording:
        assert recording.fps() is None and recording.n_packets() == 1


def test_the_rate_of_an_mp4_is_that_of_its_frames(tmp_path):
    """The table of durations, the header's rate and an edit list of an MP4; the first two frames are edited out."""
    path = tmp_path / "v.mp4"
    out = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for k in range(12):
        out.write(np.full((48, 64, 3), 20 * k, np.uint8))
    out.release()
    data = bytearray(path.read_bytes())
    at = data.index(b"stts")
    (n_entries, n_frames, ticks) = struct.unpack_from(">III", data, at + 8)
    assert (n_entries, n_frames) == (1, 12)
    struct.pack_into(">I", data, at + 16, 5 * ticks)  # half a second each
    path.write_bytes(data)
    assert np.diff(times_ms(path)) == pytest.approx(500)
    at = data.index(b"elst")
    assert struct.unpack_from(">I", data, at + 8)[0] == 1
    struct.pack_into(">I", data, at + 16, 10 * ticks)
    path.write_bytes(data)
    with Recording(path) as recording, Playback(recording) as playback:
        found = [(time_ns, round(float(playback.image().mean()) / 20)) for time_ns in iter(playback.grab, None)]
        assert recording.fps() == 2
    assert found[:2] == [(0, 2), (500_000_000, 3)]


def test_an_avi_without_stamps_has_the_rate_of_its_header(tmp_path):
    path = counting_video(tmp_path / "v.avi", 10, fps=25)
    assert times_ms(path) == pytest.approx([40 * k for k in range(10)], abs=0.001)


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.95])
def test_half_a_frame_is_named_and_the_next_one_is_whole(tmp_path, kept):
    frames = [encoded(".jpg", scene(seed=k)) for k in range(3)]
    whole = cv2.imdecode(np.frombuffer(frames[2], np.uint8), cv2.IMREAD_COLOR)
    frames[1] = frames[1][: int(kept * len(frames[1]))] + b"\xff\xd9"
    (tmp_path / "v.mkv").write_bytes(mkv(zip((0, 40, 80), frames, strict=True), 128, 96))
    with Recording(tmp_path / "v.mkv") as recording, Playback(recording) as playback:
        assert playback.grab() == 0 and playback.image().shape == (96, 128, 3)
        playback.grab()
        with pytest.raises(SourceError, match=r"v\.mkv: frame 2: not one whole JPEG"):
            playback.image()
        playback.grab()
        assert np.array_equal(playback.image(), whole)


def test_a_frame_of_another_size_than_the_recording_is_named(tmp_path):
    frames = [encoded(".jpg"), encoded(".jpg", scene(48, 128))]
    (tmp_path / "v.mkv").write_bytes(mkv(zip((0, 40), frames, strict=True), 128, 96))
    with Recording(tmp_path / "v.mkv") as recording, Playback(recording) as playback:
        playback.grab()
        playback.grab()
        with pytest.raises(SourceError, match="frame 2: expected 128x96, found 128x48"):
            playback.image()


def test_a_file_that_is_cut_ends_at_its_last_whole_frame(tmp_path):
    path = counting_mkv(tmp_path / "v.mkv", [40 * k for k in range(6)])
    path.write_bytes(path.read_bytes()[:-100])
    with Recording(path) as recording, Playback(recording) as playback:
        numbers = []
        while playback.grab() is not None:
            try:
                numbers.append(number_of(playback.image()))
            except SourceError as error:
                assert "not one whole JPEG" in error.detail
    assert numbers == [0, 1, 2, 3, 4]


def test_frames_larger_than_allowed_are_refused(tmp_path):
    path = counting_video(tmp_path / "v.avi", 2)
    with Recording(path, max_pixels=160 * 120 - 1) as recording, Playback(recording) as playback:
        playback.grab()
        with pytest.raises(SourceError, match="160x120") as caught:
            playback.image()
    assert caught.value.reason == "too-large" and not caught.value.retryable


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [b"Fl\xfcg.mkv", b"10:30.mkv", b"clip%03d.mkv", b"file:x.mkv", b"a|b.mkv", b"concat:a.mkv"], ids=repr
)
def test_a_recording_of_any_name_is_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = Path(os.fsdecode(name))
    counting_mkv(path, [0, 40, 80])
    assert len(times_ms(path)) == 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "not a regular file"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to(path), "Too many levels"),
    ],
    ids=["absent", "folder", "pipe", "circle"],
)
def test_what_is_not_a_file_is_refused(tmp_path, make, words):
    make(tmp_path / "x")
    with pytest.raises(SourceError, match=words) as caught:
        Recording(tmp_path / "x")
    assert not caught.value.retryable


def test_a_recording_leaves_no_descriptor_open(tmp_path):
    path = counting_video(tmp_path / "v.avi", 3)
    n_fds = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert len(times_ms(path)) == 3
    with pytest.raises(SourceError):
        Recording(tmp_path)
    assert len(os.listdir("/proc/self/fd")) <= n_fds  # less: the garbage of another test was collected
