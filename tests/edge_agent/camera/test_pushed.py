"""Pushed frames, through a real socket. Their stamps are from a clock that the test moves, so no frame is ever late."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import cv2
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.camera.clock import MONOTONIC
from edge_agent.camera.process import open_source, run
from edge_agent.camera.pushed import (
    FaultReport,
    bind_receiver,
    check_pushed_frame,
    pushed_pixels,
    read_pushed_frames,
    receive_newest,
)
from edge_agent.camera.source import SourceError
from edge_agent.config import CameraConfig
from edge_agent.ipc.events import CameraFault
from edge_agent.wire.codec import encode
from edge_agent.wire.pushed_frame import PushedFrame, pack_pushed_frame
from edge_agent.zmtp.endpoint import Endpoint
from edge_agent.zmtp.frames import Message, pack_message
from tests.harness.camera import HANG_S, FakeClock, Pusher, photograph
from tests.harness.pictures import encoded, exif, scene, with_segment
from tests.harness.zmtp_peer import RawPeer


@pytest.fixture
def config(tmp_path: Path) -> CameraConfig:
    return CameraConfig(source=f"zmq:ipc://{tmp_path}/frames")


@pytest.fixture
def new_pusher(tmp_path: Path, clock: FakeClock) -> Iterator[Callable[[], Pusher]]:
    """new_pusher(): a socket that is not connected yet keeps its messages; one whose camera went away may lose some."""
    pushers: list[Pusher] = []

    def make() -> Pusher:
        pushers.append(Pusher(tmp_path / "frames", clock))
        return pushers[-1]

    yield make
    for pusher in pushers:
        pusher.socket.close()


@pytest.fixture
def pusher(new_pusher: Callable[[], Pusher]) -> Pusher:
    return new_pusher()


@pytest.fixture
def source(config, slot, clock):
    with closing(read_pushed_frames(config, slot, clock)) as items:
        yield items


def test_number_and_stamp_are_those_of_the_pusher(source, pusher, clock):
    for frame_id in (1000, 1001, 17):  # a pusher that starts again may count anew
        clock.advance(0.02)
        stamp_ns = pusher.send(frame_id)
        frame = next(source)
        assert (frame.frame_id, frame.t_capture_ns, frame.capture_clock) == (frame_id, stamp_ns, "sender")
        assert (frame.image == frame_id % 256).all() and frame.fps is None


def test_formats(source, pusher, clock):
    rgb = np.random.default_rng(1).integers(0, 256, (33, 47, 3), np.uint8)
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)

    def sent(frame_id: int, **fields) -> np.ndarray:
        clock.advance(0.02)
        pusher.send(frame_id, **({"width": 47, "height": 33} | fields))
        return next(source).image

    assert np.array_equal(sent(1, format="rgb8", data=rgb.tobytes()), rgb)
    assert np.array_equal(sent(2, format="bgr8", data=bgr.tobytes()), rgb)
    assert np.array_equal(sent(3, format="gray8", data=rgb[:, :, 0].tobytes()), np.repeat(rgb[:, :, :1], 3, axis=2))
    photo = photograph()
    jpeg = cv2.imencode(".jpg", cv2.cvtColor(photo, cv2.COLOR_RGB2BGR))[1].tobytes()
    image = sent(4, width=photo.shape[1], height=photo.shape[0], format="jpeg", data=jpeg)
    assert np.abs(image.astype(int) - photo).mean() < 4


def test_a_camera_process_publishes_pushed_frames(camera_process, tmp_path):
    """A frame that is older than a second when it arrives is refused, so the test pushes until one is not."""
    camera = camera_process(f"zmq:ipc://{tmp_path}/frames")
    pusher, frame = Pusher(tmp_path / "frames", MONOTONIC), None
    with closing(pusher.socket):
        end_s = time.monotonic() + HANG_S
        while frame is None and time.monotonic() < end_s:
            pusher.send(7)
            camera.slot.wait(0.05)
            frame = camera.frame_or_none()
    assert (frame.frame_id, frame.capture_clock) == (7, "sender") and (frame.image == 7).all()


# -- the newest frame -------------------------------------------------------------------------------------------------


def test_the_newest_of_the_messages_that_have_arrived_is_taken(tmp_path):
    with bind_receiver(f"ipc://{tmp_path}/frames", 10**6) as receiver, RawPeer(tmp_path / "frames", b"PUSH") as peer:
        receiver.serve()
        peer.send(*(pack_message(word) for word in (b"1", b"2", b"3")))
        assert receive_newest(receiver) == [b"3"]
        assert receive_newest(receiver) is None
        large = b"4" * 1_000_000
        sender = threading.Thread(target=peer.send, args=(pack_message(large),))
        sender.start()  # more than the socket holds: it arrives in portions
        newest = None
        while newest is None:
            newest = receive_newest(receiver)
        sender.join()
        assert newest == [large]


def test_a_pusher_without_a_pause_does_not_keep_the_camera(tmp_path):
    endless = itertools.count()
    served = SimpleNamespace(fileno=lambda: readable.fileno(), serve=lambda: [(None, [b"%d" % next(endless)])])
    readable, other_end = socket.socketpair()
    with readable, other_end:
        other_end.send(b"x")
        assert receive_newest(served) == [b"2"]


def test_after_a_pause_of_the_camera_the_last_pushed_frame_arrives(source, pusher, clock):
    pusher.send(1)
    assert next(source).frame_id == 1
    for frame_id in range(2, 30):
        clock.advance(0.002)
        pusher.send(frame_id)
    arrived = []
    while not arrived or arrived[-1] != 29:
        arrived.append(next(source).frame_id)
    assert arrived == sorted(arrived)


# -- refused messages -------------------------------------------------------------------------------------------------

PNG = cv2.imencode(".png", np.zeros((12, 20, 3), np.uint8))[1].tobytes()
JPEG = cv2.imencode(".jpg", np.zeros((12, 20, 3), np.uint8))[1].tobytes()


@pytest.mark.parametrize(
    ("stamp_ms", "changed", "reason", "words"),
    [
        (50, {}, "clock", "stamped -"),
        (-1500, {}, "clock", "ms ago"),
        (-29000, {}, "clock", "ms ago"),
        (-300, {}, "clock", "before the previous frame"),
        (0, {"width": 21}, "unreadable", "21x12 rgb8 is 756 bytes, found 720"),
        (0, {"data": b""}, "unreadable", "found 0"),
        (0, {"width": 0}, "unreadable", "width"),
        (0, {"format": "rgba8"}, "unreadable", "format"),
        (0, {"width": 60000, "height": 60000}, "too-large", "60000x60000"),
        (0, {"format": "jpeg", "data": PNG + JPEG[-2:]}, "unreadable", "not one whole JPEG"),
        (0, {"format": "jpeg", "data": JPEG[:-20]}, "unreadable", "not one whole JPEG"),
        (0, {"format": "jpeg", "data": JPEG[: len(JPEG) * 2 // 3] + JPEG[-2:]}, "unreadable", "not one whole JPEG"),
        (0, {"format": "jpeg", "data": JPEG[:4] + JPEG[-2:]}, "unreadable", "not one whole JPEG"),
        (0, {"format": "jpeg", "data": JPEG, "width": 40}, "unreadable", "expected 40x12, found 20x12"),
        (0, {"format": "jpeg", "data": JPEG, "width": 10}, "unreadable", "frames of 20x12"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_refused_message_is_reported_and_the_next_one_is_taken(
    source, pusher, clock, stamp_ms, changed, reason, words
):
    pusher.send(1)
    assert next(source).frame_id == 1
    clock.advance(0.02)
    pusher.send(2, clock.time_ns + stamp_ms * 1_000_000, **changed)
    fault = next(source)
    assert isinstance(fault, CameraFault) and fault.reason == reason and words in fault.detail, fault
    pusher.send(3)
    assert next(source).frame_id == 3


def test_refused_messages_are_counted_and_reported_once_a_second():
    report, error = FaultReport("ipc:///frames"), SourceError("unreadable", "garbage")
    assert report.add(error, 0) == CameraFault("unreadable", "ipc:///frames: 1 refused, the last one: garbage")
    assert [report.add(error, k * 10_000_000) for k in range(1, 100)] == [None] * 99
    late = SourceError("clock", "late")
    assert report.add(late, 1_000_000_000) == CameraFault("clock", "ipc:///frames: 100 refused, the last one: late")
    assert report.add(late, 1_999_999_999) is None
    assert report.add(late, 2_000_000_000).detail == "ipc:///frames: 2 refused, the last one: late"


def test_invalid_messages_do_not_stop_the_frames_after_them(source, pusher, clock):
    """One fault for the first message; within the same second only good frames come out."""
    pusher.socket.send(b"F\xc1 garbage")
    assert next(source).reason == "unreadable"
    for frame_id in range(1, 6):
        pusher.socket.send(b"F\xc1 garbage")
        pusher.socket.send(b"A" + pack_pushed_frame(9, clock.time_ns, 2, 1, "rgb8", b"abcdef")[1:])
        pusher.socket.send_multipart([b"F", b"two parts"])
        clock.advance(0.02)
        pusher.send(frame_id)
        assert next(source).frame_id == frame_id


GOOD = pack_pushed_frame(1, 10**9, 2, 1, "rgb8", b"abcdef")


def verdict(message: bytes, max_pixels: int = 10**6) -> str:
    """The reason of the refusal, or "" for a frame whose pixels are there. Anything else is a defect."""
    try:
        frame = check_pushed_frame([message], 0, 10**9 + 5, max_pixels)
        pixels = pushed_pixels(frame)
    except SourceError as error:
        assert msgspec.msgpack.encode(error.detail)  # it can be sent to the supervisor
        return error.reason
    assert pixels.shape[:2] == (frame.height, frame.width) and pixels.dtype == np.uint8
    return ""


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def test_any_message_is_a_frame_or_a_refusal():
    """Any bytes; a frame with some bytes changed; a frame with any values under any keys."""
    outcomes: set[str] = set()

    @given(st.binary(max_size=200), st.integers(1, len(GOOD)))
    @settings(derandomize=True)
    def changed(data: bytes, at: int) -> None:
        outcomes.add(verdict(b"F" + data))
        outcomes.add(verdict(GOOD[:at] + data + GOOD[at + len(data) :]))

    @given(st.dictionaries(st.sampled_from([*PushedFrame.__struct_fields__, "more"]), VALUES, max_size=2))
    @settings(derandomize=True, max_examples=50)
    def replaced(fields: dict) -> None:
        outcomes.add(verdict(b"F" + msgspec.msgpack.encode(msgspec.msgpack.decode(GOOD[1:]) | fields)))

    changed()
    replaced()
    assert {"", "unreadable"} <= outcomes <= {"", "unreadable", "clock", "too-large"}


def with_format(text: bytes) -> bytes:
    return GOOD.replace(b"\xa4rgb8", bytes((0xA0 | len(text),)) + text)


def with_another_key(key_and_value: bytes) -> bytes:
    assert GOOD[1] == 0x87  # a map of seven
    return b"F\x88" + GOOD[2:] + key_and_value


HOSTILE = {
    "format is not UTF-8": with_format(b"\xff\xfe\xff\xfeA"),
    "format has a lone surrogate": with_format("\ud800".encode(errors="surrogatepass")),
    "format ends within a character": with_format(b"rgb\xe2"),
    "format is overlong": with_format(b"\xc0\xaf"),
    "a key is not UTF-8": GOOD.replace(b"\xa6format", b"\xa6f\xffrmat"),
    "100 000 arrays": with_another_key(b"\xa1x" + b"\x91" * 100_000 + b"\x00"),
    "100 000 maps": with_another_key(b"\xa1x" + b"\x81\xa1y" * 100_000 + b"\x00"),
    "a length of 4 GiB": b"F\x87" + b"\xdb\xff\xff\xff\xff",
    "an extension type": b"F\xc7\x01\x05a",
    "no message": b"",
    "no map": b"F",
    "another topic": b"A" + GOOD[1:],
}


@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_message_is_refused_and_counted(source, pusher, message):
    """The frames after it are taken: the process does not end."""
    pusher.socket.send(message)
    fault = next(source)
    assert fault.reason == "unreadable" and "1 refused" in fault.detail and encode(fault)
    pusher.send(3)
    assert next(source).frame_id == 3


def test_a_long_text_in_a_message_does_not_make_a_long_event(slot, clock, config, pusher):
    """An event to the supervisor is one datagram of a limited size."""
    pusher.send(1, format="x" * 10_000_000)
    events = []

    def send(event: object) -> None:
        events.append(event)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, slot, send, clock)
    assert events[0].reason == "unreadable" and len(encode(events[0])) < 10_000


# -- JPEGs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [b"\0\0\0", b"\xff", bytes(600), b"\xff\xd9", b"stray"])
def test_a_jpeg_that_hardware_padded_is_taken(source, pusher, tail):
    data = encoded(".jpg", scene(12, 20))
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    for padded in (data + tail, data[:-2] + tail[:1] + data[-2:]):
        pusher.clock.advance(0.02)
        pusher.send(1, format="jpeg", data=padded)
        assert np.array_equal(next(source).image, expected)


def test_the_exif_orientation_of_a_frame_is_ignored(source, pusher):
    pusher.send(1, format="jpeg", data=with_segment(encoded(".jpg", scene(12, 20)), exif(6)))
    assert next(source).image.shape == (12, 20, 3)


# -- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["rgb8", "jpeg", "gray8"])
def test_a_frame_larger_than_the_configuration_allows_is_refused_and_counted(config, slot, pusher, clock, format):
    data = {"rgb8": bytes(720), "jpeg": JPEG, "gray8": bytes(240)}[format]
    small = msgspec.structs.replace(config, max_megapixels=0.0002)
    with closing(read_pushed_frames(small, slot, clock)) as source:
        pusher.send(1, format=format, data=data)
        fault = next(source)
        assert fault.reason == "too-large" and "20x12; camera.max_megapixels allows 0.0002" in fault.detail
        pusher.send(2, width=10, height=12, data=bytes(360))
        assert next(source).frame_id == 2


def test_a_message_longer_than_the_largest_frame_is_not_received(config, slot, pusher):
    """The memory plan counts the messages. Who waits for the frames learns why there are none."""
    fast = FakeClock()
    small = msgspec.structs.replace(config, max_megapixels=0.0002)
    with closing(read_pushed_frames(small, slot, fast)) as source:
        pusher.clock = fast
        pusher.send(1, width=2, height=1, data=b"abcdef")
        assert next(source).frame_id == 1
        pusher.send(2, width=100, height=100, data=bytes(30_000))
        fast.step_ns = 1_900_000_000  # a stall is reported at each second look at this clock
        words = "a message of more than 4696 bytes (from camera.max_megapixels) ends it"
        assert any(words in next(source).detail for _ in range(100))


# -- silence, a second process, a restart -----------------------------------------------------------------------------


def test_a_silent_pusher_has_stalled_and_may_come_back(config, slot, pusher):
    fast = FakeClock(step_ns=1_900_000_000)  # each look at this clock takes almost two seconds
    pusher.clock = fast
    with closing(read_pushed_frames(config, slot, fast)) as source:
        for _ in range(2):
            assert next(source) == CameraFault("stalled", f"{config.source[4:]}: no frame was pushed for 2 s")
        fast.step_ns = 0
        pusher.send(1)
        assert next(source).frame_id == 1


def test_a_pause_of_less_than_two_seconds_is_not_a_stall(config, slot, pusher, clock, monkeypatch):
    """The socket is empty for 19 polls of 100 ms, then a frame comes."""
    polls = []

    def receive(receiver: Endpoint) -> Message | None:
        polls.append(clock.time_ns)
        clock.advance(0.1)
        if len(polls) < 20:
            return None
        pusher.send(1)
        while (message := receive_newest(receiver)) is None:
            pass
        return message

    monkeypatch.setattr("edge_agent.camera.pushed.receive_newest", receive)
    with closing(read_pushed_frames(config, slot, clock)) as source:
        assert next(source).frame_id == 1
    assert len(polls) == 20


def test_a_second_process_does_not_take_the_frames(config, slot, clock, source, pusher, new_pusher):
    pusher.send(1)
    assert next(source).frame_id == 1
    with pytest.raises(SourceError) as caught:
        next(read_pushed_frames(config, slot, clock))
    assert caught.value.reason == "busy" and caught.value.retryable
    clock.advance(0.02)
    pusher.send(2)
    assert next(source).frame_id == 2
    source.close()  # now a second one may have it
    with closing(read_pushed_frames(config, slot, clock)) as second:
        clock.advance(0.02)
        new_pusher().send(3)
        assert next(second).frame_id == 3


def test_an_old_frame_is_not_new_again_after_a_restart(config, slot, clock, new_pusher):
    stamp_ns = new_pusher().send(5)
    with closing(read_pushed_frames(config, slot, clock)) as source:
        frame = next(source)
        slot.publish(frame.frame_id, frame.t_capture_ns, frame.capture_clock)
    new_pusher().send(5, stamp_ns)
    with closing(read_pushed_frames(config, slot, clock)) as source:
        fault = next(source)
    assert fault.reason == "clock" and "before the previous frame" in fault.detail


@pytest.mark.parametrize("endpoint", ["tcp://*:5555", "ipc://relative", "ipc:///no/such/folder/frames"])
def test_an_endpoint_that_cannot_be_bound_is_refused(slot, clock, endpoint):
    with pytest.raises(SourceError) as caught:
        next(open_source(CameraConfig(source=f"zmq:{endpoint}"), slot, clock))
    assert endpoint.removeprefix("ipc://") in caught.value.detail
    assert caught.value.retryable == ("no/such" in endpoint)


@pytest.mark.parametrize("kind", ["file", "fifo", "folder", "link"])
def test_what_is_no_socket_is_never_replaced(slot, clock, tmp_path, kind):
    """zmq:ipc:///…/precious.mp4 by mistake."""
    path = tmp_path / "precious.mp4"
    {
        "file": lambda: path.write_text("an hour of flight"),
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "link": lambda: path.symlink_to(tmp_path),
    }[kind]()
    before = os.lstat(path)
    with pytest.raises(SourceError, match="expected a socket or nothing") as caught:
        next(read_pushed_frames(CameraConfig(source=f"zmq:ipc://{path}"), slot, clock))
    assert not caught.value.retryable and os.path.samestat(os.lstat(path), before)


def test_a_path_that_was_removed_is_bound_again(config, slot, clock, tmp_path, source, pusher, new_pusher):
    pusher.send(1)
    assert next(source).frame_id == 1
    (tmp_path / "frames").unlink()
    clock.advance(1.1)
    pusher.send(2)
    assert next(source).frame_id == 2, "connections stay"
    assert (tmp_path / "frames").is_socket()
    clock.advance(0.02)
    new_pusher().send(3)
    assert next(source).frame_id == 3
    source.close()
    assert os.listdir(tmp_path) == []


def test_a_path_that_is_lost_ends_the_source_which_is_opened_again(config, slot, clock, tmp_path, source, pusher):
    pusher.send(1)
    assert next(source).frame_id == 1
    (tmp_path / "frames").unlink()
    (tmp_path / "frames").write_text("precious")
    clock.advance(1.1)
    pusher.send(2)
    with pytest.raises(SourceError, match=r"absent: .*frames: cannot be bound") as caught:
        next(source)
    assert caught.value.retryable and (tmp_path / "frames").read_text() == "precious"


def test_a_path_that_is_too_long_for_a_socket_is_named(tmp_path):
    with pytest.raises(SourceError, match="absent"), bind_receiver(f"ipc://{tmp_path}/{'x' * 120}", 10**6):
        pass
