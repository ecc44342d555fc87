"""Pushed frames: what arrives at the daemon's socket is what was pushed, and push never waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from edge_agent.client import FramePusher
from edge_agent.wire.pushed_frame import PushedFrame, decode_pushed_frame
from tests.harness.fake_daemon import HANG_S

RGB = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/frames"


@pytest.fixture
def pusher(endpoint: str) -> Iterator[FramePusher]:
    with FramePusher(endpoint) as opened:
        yield opened


@pytest.fixture
def receiver(endpoint: str) -> Iterator[zmq.Socket[bytes]]:
    """The daemon's end."""
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.setsockopt(zmq.RCVHWM, 1)
        socket.bind(endpoint)
        yield socket


def push_until_sent(pusher: FramePusher, *arguments, **options) -> None:
    """The connection takes a moment: until then, push drops."""
    while not pusher.push(*arguments, **options):
        assert pusher._socket.poll(round(HANG_S * 1000), zmq.POLLOUT), "not connected"


def received(receiver: zmq.Socket[bytes]) -> PushedFrame:
    assert receiver.poll(round(HANG_S * 1000)), "nothing arrived"
    payload = receiver.recv()
    assert payload[:1] == b"F"
    return decode_pushed_frame(payload[1:])


@pytest.mark.parametrize(
    ("frame", "options", "expected"),
    [
        (RGB, {}, (6, 4, "rgb8", RGB.tobytes())),
        (RGB.data, {"format": "bgr8"}, (6, 4, "bgr8", RGB.tobytes())),
        (RGB[::-1, ::2], {}, (3, 4, "rgb8", RGB[::-1, ::2].tobytes())),  # not contiguous
        (RGB[..., 0], {"format": "gray8"}, (6, 4, "gray8", RGB[..., 0].tobytes())),
        (RGB.tobytes(), {"width": 6, "height": 4}, (6, 4, "rgb8", RGB.tobytes())),
        (bytearray(range(8)), {"width": 4, "height": 2, "format": "gray8"}, (4, 2, "gray8", bytes(range(8)))),
        (b"\xff\xd8jpeg", {"width": 640, "height": 480, "format": "jpeg"}, (640, 480, "jpeg", b"\xff\xd8jpeg")),
    ],
)
def test_a_frame_arrives_as_it_was_pushed(pusher, receiver, frame, options, expected):
    push_until_sent(pusher, frame, frame_id=7, t_capture_ns=123, **options)
    sent = received(receiver)
    assert (sent.v, sent.frame_id, sent.t_capture_ns) == (1, 7, 123)
    assert (sent.width, sent.height, sent.format, sent.data) == expected


@pytest.mark.parametrize(
    ("frame", "options", "words"),
    [
        (RGB.astype(np.float32), {}, "uint8"),
        (RGB[..., 0], {}, r"\(H, W, 3\).*\(4, 6\)"),
        (RGB[..., :2], {}, r"\(H, W, 3\)"),
        (RGB, {"format": "gray8"}, r"\(H, W\)"),
        (RGB.tobytes(), {}, "width and height"),
        (b"\xff\xd8", {"format": "jpeg"}, "width and height"),
        (np.zeros((), np.uint8), {}, r"shape \(\)"),
        (RGB.tobytes(), {"width": 6, "height": 5}, "expected 90 bytes for 6x5 rgb8, found 72"),
        (RGB.tobytes(), {"width": 6}, "both width and height"),
        (RGB, {"width": 6}, "both width and height"),
        (RGB, {"height": 4}, "both width and height"),
        (RGB, {"format": "rgba8"}, "rgb8, bgr8, gray8, jpeg; found 'rgba8'"),
        (RGB.tobytes(), {"format": "RGB8", "width": 6, "height": 4}, "found 'RGB8'"),
    ],
)
def test_a_frame_that_does_not_match_its_format_is_an_error(pusher, frame, options, words):
    with pytest.raises(ValueError, match=words):
        pusher.push(frame, frame_id=1, t_capture_ns=1, **options)


def test_without_a_daemon_a_frame_is_dropped_and_not_kept(pusher, request):
    assert not pusher.push(RGB, frame_id=1, t_capture_ns=1)
    receiver = request.getfixturevalue("receiver")
    push_until_sent(pusher, RGB, frame_id=2, t_capture_ns=2)
    assert received(receiver).frame_id == 2


def test_when_the_daemon_takes_no_frames_new_frames_are_dropped(pusher, receiver):
    big = np.zeros((1000, 1000, 3), np.uint8)  # larger than the kernel's buffers
    push_until_sent(pusher, big, frame_id=0, t_capture_ns=1)
    sent = [pusher.push(big, frame_id=n, t_capture_ns=n) for n in range(1, 50)]
    assert not sent[-1] and sum(sent) < 10
    assert received(receiver).frame_id == 0


@pytest.mark.parametrize("daemon_is_first", [True, False])
def test_a_slow_daemon_does_not_lose_the_frames_that_wait_for_it(endpoint, request, daemon_is_first):
    """Full queues alone are no reason to connect anew, which would drop what they hold."""
    receiver = request.getfixturevalue("receiver") if daemon_is_first else None
    with FramePusher(endpoint) as pusher:
        receiver = receiver or request.getfixturevalue("receiver")
        assert pusher._socket.poll(round(HANG_S * 1000), zmq.POLLOUT), "not connected"
        big = np.zeros((1000, 1000, 3), np.uint8)
        sent = [n for n in range(50) if pusher.push(big, frame_id=n, t_capture_ns=n)]
        assert len(sent) < 10
        assert [received(receiver).frame_id for _ in sent] == sent


def test_closing_does_not_wait_for_frames_that_were_not_sent(endpoint, receiver):
    pusher = FramePusher(endpoint)
    big = np.zeros((1000, 1000, 3), np.uint8)
    push_until_sent(pusher, big, frame_id=0, t_capture_ns=1)
    for n in range(1, 10):
        pusher.push(big, frame_id=n, t_capture_ns=n)
    pusher.close()
    assert pusher._socket.closed


def test_a_pusher_leaves_a_process_that_hangs_for_the_one_at_its_path(pusher, receiver, endpoint):
    """A killed camera process that hangs in a driver keeps its connections, and reads nothing."""
    frame = np.zeros((400, 600, 3), np.uint8)
    push_until_sent(pusher, frame, frame_id=1, t_capture_ns=1)
    Path(endpoint.removeprefix("ipc://")).unlink()
    with zmq.Context() as context, context.socket(zmq.PULL) as successor:
        successor.bind(endpoint)
        for frame_id in range(2, 10_000):
            pusher.push(frame, frame_id=frame_id, t_capture_ns=frame_id)
            if successor.poll(1):
                break
        assert received(successor).frame_id > 1
