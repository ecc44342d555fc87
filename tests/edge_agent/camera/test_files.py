"""Videos and folders of images. Pacing is tested on a clock that the test moves, so it is exact."""

from __future__ import annotations

import itertools
import os
import socket
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_agent.camera.files import Pacer
from edge_agent.camera.process import open_source, run
from edge_agent.camera.recording import Playback
from edge_agent.camera.source import CapturedFrame
from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraEnded, CameraFault, CameraOpened
from edge_agent.wire.codec import encode
from tests.harness.camera import FakeClock, counting_video, number_of, photograph
from tests.harness.pictures import counting_mkv, encoded, mkv, scene


def frames_of(path: Path, slot, clock, **config) -> list[CapturedFrame]:
    """Every frame of a source that ends, published, with a copy of its image."""
    frames = []
    for item in open_source(CameraConfig(source=str(path), **config), slot, clock):
        if isinstance(item, CapturedFrame):
            frames.append(CapturedFrame(item.image.copy(), item.t_capture_ns, item.capture_clock, item.fps))
            slot.publish(len(frames), item.t_capture_ns, item.capture_clock)
    return frames


def write_grey(path: Path, grey: int, width: int = 30) -> None:
    cv2.imwrite(str(path), np.full((20, width, 3), grey, np.uint8))


# -- videos -----------------------------------------------------------------------------------------------------------


def test_every_frame_of_a_video_arrives_once(camera_process, tmp_path):
    camera = camera_process(counting_video(tmp_path / "v.avi", 30), realtime=False, loop=False)
    frames = [camera.frame() for _ in range(30)]
    assert [number_of(frame.image) for frame in frames] == list(range(30))
    assert [frame.seq for frame in frames] == [frame.frame_id for frame in frames] == list(range(1, 31))
    assert camera.event() == CameraOpened(160, 120, 30.0, f"video {camera.config.source}")
    assert camera.slot.take_newest(camera.seq) is None  # tells the camera that the last frame was taken
    assert camera.event() == CameraEnded() and camera.process.wait(30) == 0
    assert all(a.t_capture_ns < b.t_capture_ns for a, b in itertools.pairwise(frames))
    assert {frame.capture_clock for frame in frames} == {"arrival"}


def test_a_video_does_not_end_before_its_last_frame_was_taken(slot, tmp_path):
    """The reader asks for a frame at every 50th poll of the camera. That it asks again means that it took the last."""
    events, taken = [], []

    def reader() -> None:
        if len(clock.pauses_s) % 50 == 0:
            assert CameraEnded() not in events
            frame = slot.take_newest(max(taken, default=0))
            taken.append(frame.seq if frame else 0)

    clock = FakeClock(on_sleep=reader)
    config = CameraConfig(source=str(counting_video(tmp_path / "v.avi", 2)), realtime=False, loop=False)
    assert run(config, slot, events.append, clock) == 0
    assert taken == [1, 0, 2, 0]
    assert [type(event) for event in events] == [CameraOpened, CameraEnded]


def test_a_video_in_real_time_keeps_its_rate_and_the_newest_frame_wins(slot, tmp_path):
    """A model at 5 Hz takes every third frame of a video at 15 Hz."""
    taken, next_ns = [], 0

    def model() -> None:
        nonlocal next_ns
        if clock.time_ns >= next_ns and (frame := slot.take_newest(taken[-1].seq if taken else 0)):
            taken.append(frame._replace(image=frame.image.copy()))
            next_ns += 200_000_000

    clock = FakeClock(on_sleep=model)
    start_ns = clock.time_ns
    next_ns = start_ns + 200_000_000
    config = CameraConfig(source=str(counting_video(tmp_path / "v.avi", 30, fps=15)), loop=False)
    assert run(config, slot, lambda event: None, clock) == 0
    assert [number_of(frame.image) for frame in taken] == list(range(2, 30, 3))
    assert [frame.seq for frame in taken] == list(range(3, 31, 3))
    for frame in [*taken, slot.peek(0)]:
        assert abs(frame.t_capture_ns - start_ns - (frame.seq - 1) * 66_666_667) < 100
    assert slot.latest_seq == 30


def test_a_video_that_is_late_skips_to_the_frame_that_is_due(slot, clock, tmp_path):
    config = CameraConfig(source=str(counting_video(tmp_path / "v.avi", 64)), loop=False)
    with closing(open_source(config, slot, clock)) as items:
        assert isinstance(next(items), CameraOpened)
        first = next(items)
        assert number_of(first.image) == 0
        slot.publish(1, first.t_capture_ns, first.capture_clock)
        clock.advance(0.8)  # as if the process had been stopped
        late = next(items)
        assert number_of(late.image) == 24 and late.t_capture_ns - first.t_capture_ns == 800_000_000
        slot.publish(2, late.t_capture_ns, late.capture_clock)
        assert number_of(next(items).image) == 25


def test_skipping_ends_where_decoding_is_slower_than_the_video(clock):
    """After the frames of one second were skipped, the next frame is shown, and the later ones are due after it."""

    class SlowPlayback:
        n_grabbed, usual_gap_ns = 0, 20_000_000

        def grab(self) -> int:
            clock.advance(0.03)
            self.n_grabbed += 1
            return 20_000_000 * (self.n_grabbed - 1)

    playback = SlowPlayback()
    pacer = Pacer(playback, clock.time_ns, clock)
    assert [pacer.next() and playback.n_grabbed for _ in range(3)] == [1, 2, 53]  # the second one's time is not over
    assert pacer.end_ns == clock.time_ns + 20_000_000


STAMPS_MS = [100 * k for k in range(10)] + [1000 + 500 * k for k in range(6)]


@pytest.mark.parametrize("header_fps", [0, 5, 1000])
def test_a_recording_of_variable_rate_is_played_at_its_own_pace(slot, clock, tmp_path, header_fps):
    path = counting_mkv(tmp_path / "v.mkv", STAMPS_MS, header_fps)
    frames = frames_of(path, slot, clock, loop=False)
    start_ns = frames[0].t_capture_ns
    assert [number_of(frame.image) for frame in frames] == list(range(16))
    assert [(frame.t_capture_ns - start_ns) / 1e6 for frame in frames] == pytest.approx(STAMPS_MS, abs=0.001)
    assert {frame.fps for frame in frames} == {round(15 / 3.5, 2)}


@pytest.mark.parametrize("late_s", [0, 1, 60])
def test_the_first_frame_is_always_shown(slot, tmp_path, monkeypatch, late_s):
    """Opening may take longer than the whole recording lasts. The time of the recording begins at its first frame."""
    clock = FakeClock()
    grab = Playback.grab
    path = counting_mkv(tmp_path / "v.mkv", [0, 1, 2, 3, 40, 80], 1000)

    def slow_first_grab(self: Playback) -> int | None:
        clock.advance(late_s if self.n_grabbed == 0 else 0)
        return grab(self)

    monkeypatch.setattr(Playback, "grab", slow_first_grab)
    frames = frames_of(path, slot, clock, loop=False)
    assert [number_of(frame.image) for frame in frames] == list(range(6))


def test_a_loop_begins_when_the_last_frame_has_been_shown(slot, clock, tmp_path):
    config = CameraConfig(source=str(counting_mkv(tmp_path / "v.mkv", [0, 100, 600])))
    with closing(open_source(config, slot, clock)) as items:
        frames = [item for item in itertools.islice(items, 8) if isinstance(item, CapturedFrame)]
    gaps_s = np.diff([frame.t_capture_ns for frame in frames]) / 1e9
    assert gaps_s == pytest.approx([0.1, 0.5, 0.5, 0.1, 0.5, 0.5])


def test_a_recording_of_one_frame_loops_at_the_usual_rate(slot, clock, tmp_path):
    config = CameraConfig(source=str(counting_mkv(tmp_path / "v.mkv", [700])), fps=4)
    with closing(open_source(config, slot, clock)) as items:
        frames = [item for item in itertools.islice(items, 4) if isinstance(item, CapturedFrame)]
    assert (np.diff([frame.t_capture_ns for frame in frames]) >= 20_000_000).all()  # no loop without a pause


@pytest.mark.parametrize("realtime", [True, False])
def test_a_damaged_frame_of_a_recording_is_named_and_not_shown(slot, tmp_path, realtime):
    """One fault a second, with the number of frames."""
    whole, cut = encoded(".jpg"), encoded(".jpg")[:2000]
    frames = [whole, cut, cut, whole]
    (tmp_path / "v.mkv").write_bytes(mkv(zip((0, 40, 80, 120), frames, strict=True), 128, 96))
    config = CameraConfig(source=str(tmp_path / "v.mkv"), loop=False, realtime=realtime)
    items = []
    with closing(open_source(config, slot, FakeClock(on_sleep=lambda: slot.take_newest(slot.latest_seq)))) as source:
        for item in source:
            items.append(item)
            if isinstance(item, CapturedFrame):
                slot.publish(1, item.t_capture_ns, "arrival")
    assert [type(item) for item in items] == [CameraOpened, CapturedFrame, CameraFault, CapturedFrame]
    assert items[2].reason == "unreadable" and "v.mkv: frame 2: not one whole JPEG" in items[2].detail


def test_a_recording_without_a_whole_frame_is_an_error(slot, clock, tmp_path):
    (tmp_path / "v.mkv").write_bytes(mkv([(0, encoded(".jpg")[:2000])], 128, 96))
    events = []
    assert run(CameraConfig(source=str(tmp_path / "v.mkv")), slot, events.append, clock) == os.EX_CONFIG
    assert "contains no frame that can be decoded" in events[-1].detail


@pytest.mark.parametrize("make", [counting_video, lambda path, n: counting_mkv(path, range(0, 40 * n, 40))])
def test_frames_larger_than_the_configuration_allows_end_a_video(slot, clock, tmp_path, make):
    events = []
    config = CameraConfig(source=str(make(tmp_path / "v.avi", 3)), max_megapixels=0.003)
    assert run(config, slot, events.append, clock) == os.EX_CONFIG
    assert [event.reason for event in events] == ["too-large"] and "camera.max_megapixels" in events[0].detail


def test_a_video_loops(slot, clock, tmp_path):
    config = CameraConfig(source=str(counting_video(tmp_path / "v.avi", 3)))
    with closing(open_source(config, slot, clock)) as items:
        images = [number_of(item.image) for item in itertools.islice(items, 9) if isinstance(item, CapturedFrame)]
    assert images == [0, 1, 2, 0, 1, 2, 0, 1]


def test_a_playlist_in_a_file_reaches_no_network(camera_process, tmp_path):
    """FFmpeg follows a playlist in a file to other files only, unless somebody sets its protocol_whitelist."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        (tmp_path / "v.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n")
        camera = camera_process(tmp_path / "v.m3u8")
        assert camera.event().reason == "unreadable"
        camera.process.wait(30)  # whatever it tried, it tried before
        with pytest.raises(BlockingIOError):
            server.accept()


# -- folders ----------------------------------------------------------------------------------------------------------


def test_the_colours_of_a_photograph_are_right(camera_process, tmp_path):
    """PNG is lossless: what scikit-image reads and the image in the slot are equal, byte for byte."""
    rgb = photograph()
    cv2.imwrite(str(tmp_path / "a.png"), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    frame = camera_process(tmp_path).frame()
    assert frame.image.flags.c_contiguous and np.array_equal(frame.image, rgb)


def test_a_folder_is_played_in_the_order_of_its_names(camera_process, tmp_path):
    for name, grey in (("c.bmp", 30), ("a.png", 10), ("B.PNG", 5), ("b.webp", 20), ("d.jpg", 40)):
        write_grey(tmp_path / name, grey)
    (tmp_path / "notes.txt").write_text("not an image")
    camera = camera_process(tmp_path, realtime=False, loop=False)
    assert [round(float(camera.frame().image.mean())) for _ in range(5)] == [5, 10, 20, 30, 40]
    assert camera.frame_or_none() is None
    assert camera.event() == CameraOpened(30, 20, None, f"folder {tmp_path}") and camera.event() == CameraEnded()
    assert camera.process.wait(30) == 0 and camera.slot.latest_seq == 5


@pytest.mark.parametrize(("config", "period_s"), [({"fps": 20}, 0.05), ({}, 0.2)])
def test_a_folder_in_real_time_has_the_configured_rate(slot, clock, tmp_path, config, period_s):
    for k in range(5):
        write_grey(tmp_path / f"{k}.png", k)
    frames = frames_of(tmp_path, slot, clock, loop=False, **config)
    stamps_s = [(frame.t_capture_ns - frames[0].t_capture_ns) / 1e9 for frame in frames]
    assert stamps_s == pytest.approx([k * period_s for k in range(5)])
    assert {frame.fps for frame in frames} == {1 / period_s}


def test_a_corrupt_image_is_reported_once_and_skipped(slot, clock, tmp_path):
    write_grey(tmp_path / "a.png", 10)
    write_grey(tmp_path / "c.png", 30)
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    with closing(open_source(CameraConfig(source=str(tmp_path)), slot, clock)) as items:
        played = list(itertools.islice(items, 8))
    faults = [item for item in played if isinstance(item, CameraFault)]
    assert [type(item) for item in played].count(CapturedFrame) == 6  # three rounds
    assert [fault.reason for fault in faults] == ["unreadable"]
    assert str(tmp_path / "b.png") in faults[0].detail and faults[0].detail.endswith("; skipped")


def test_images_of_a_new_size_are_announced(slot, clock, tmp_path):
    for name, width in (("a.png", 30), ("b.png", 50), ("c.png", 50)):
        write_grey(tmp_path / name, 0, width)
    items = list(open_source(CameraConfig(source=str(tmp_path), loop=False), slot, clock))
    opened = [(k, item.width, item.height) for k, item in enumerate(items) if isinstance(item, CameraOpened)]
    assert opened == [(0, 30, 20), (2, 50, 20)] and len(items) == 5


THERMAL = encoded(".png", np.full((20, 30), 7800, np.uint16))


def test_every_bad_picture_is_named_once_in_a_long_run(slot, clock, tmp_path):
    """Cut, of 16 bits, too large, of another kind, with a name in another encoding; ten rounds."""
    bad = {"b.jpg": encoded(".jpg")[:3000], "c.png": THERMAL, "d.bmp": encoded(".bmp", scene(300, 400)), "e.jpg": b"x"}
    bad[os.fsdecode(b"Fl\xfcgel.jpg")] = encoded(".jpg")[:-2]
    for name, data in (bad | {"a.jpg": encoded(".jpg"), "._a.jpg": bytes(200), "z.webp": encoded(".webp")}).items():
        (tmp_path / name).write_bytes(data)
    with closing(open_source(CameraConfig(source=str(tmp_path), max_megapixels=0.1), slot, clock)) as items:
        played = list(itertools.islice(items, 1 + len(bad) + 20))
    assert [type(item) for item in played].count(CapturedFrame) == 20
    faults = [item for item in played if isinstance(item, CameraFault)]
    assert len(faults) == len(bad) and all(encode(fault) for fault in faults)
    assert {fault.reason for fault in faults} == {"unreadable", "too-large"}


@pytest.mark.parametrize("name", [b"Fl\xfcgel.jpg", b"a.jpg"])
def test_a_folder_of_bad_pictures_names_the_first(slot, clock, tmp_path, name):
    Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(THERMAL)
    events = []
    assert run(CameraConfig(source=str(tmp_path)), slot, events.append, clock) == os.EX_CONFIG
    assert "none of its 1 images can be used" in events[-1].detail and "16 bits" in events[-1].detail
