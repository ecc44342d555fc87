"""The sockets: one daemon per folder, publishing never waits, losses are visible, garbage and floods cost nothing."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import zmq

from edge_agent.supervisor.publisher import EndpointError, Publisher
from edge_agent.wire.messages import TextMessage
from edge_agent.wire.streams import STREAMS, unpack
from tests.harness import ROOT

HEADER = {"v": 1, "session": 1, "t_pub_ns": 0, "bundle_id": ""}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def link(folder):
    with contextlib.closing(Publisher(folder)) as opened:
        yield opened


@pytest.fixture
def connect(folder):
    """connect(stream, kind, **options): a socket of somebody else's."""
    with zmq.Context() as context:
        made = []

        def connect(stream: str, kind: int, **options: int) -> zmq.Socket:
            socket = context.socket(kind)
            made.append(socket)
            for name, value in ({"LINGER": 0, "RCVTIMEO": 2000, "SNDTIMEO": 2000} | options).items():
                socket.setsockopt(getattr(zmq, name), value)
            if kind == zmq.SUB:
                socket.setsockopt(zmq.SUBSCRIBE, b"")
            socket.connect(f"ipc://{folder}/{stream}")
            return socket

        yield connect
        for socket in made:
            socket.close()


def words(link: Publisher, text: str = "", stream: str = "text") -> TextMessage:
    return TextMessage(lane="describe", frame_id=1, text=text, seq=link.next_seq(stream), **HEADER)


def received(socket: zmq.Socket, wait_ms: int = 200) -> list[TextMessage]:
    """Everything that comes until nothing came for so long."""
    found = []
    while socket.poll(wait_ms):
        found.append(unpack("text", socket.recv()))
    return found


def joined(link: Publisher, socket: zmq.Socket) -> None:
    """Publish until the subscriber has heard one, and take that."""
    until_s = time.monotonic() + 5
    while not socket.poll(20):
        assert time.monotonic() < until_s, "the subscriber never joined"
        link.publish("text", words(link))
    received(socket, 50)


# -- one per folder ---------------------------------------------------------------------------------------------------


def test_a_second_daemon_on_the_same_folder_is_refused_and_the_first_goes_on(link, folder, connect):
    subscriber = connect("text", zmq.SUB)
    joined(link, subscriber)
    with pytest.raises(EndpointError, match=r"another edge-agent runs there; stop it") as caught:
        Publisher(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    other = (
        "from pathlib import Path; from edge_agent.supervisor.publisher import Publisher\n"
        f"Publisher(Path({str(folder)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", other], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "another edge-agent runs there" in done.stderr.splitlines()[-1]
    link.publish("text", words(link, "still here"))
    assert subscriber.recv() and not received(subscriber)


def test_after_close_everything_can_be_bound_again_and_nothing_is_left(folder, connect):
    fds = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        link = Publisher(folder)
        assert sorted(os.listdir(folder)) == ["actions", "control", "lock", "status", "text"]
        start_s = time.monotonic()
        link.close()
        assert time.monotonic() - start_s < 1
        assert os.listdir(folder) == ["lock"]
    assert len(os.listdir("/proc/self/fd")) == fds


def test_sockets_that_a_killed_daemon_left_are_taken_over(folder, connect):
    code = (
        "import os, signal; from pathlib import Path; from edge_agent.supervisor.publisher import Publisher\n"
        f"Publisher(Path({str(folder)!r})); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    assert (folder / "actions").is_socket()
    with contextlib.closing(Publisher(folder)) as link:
        joined(link, connect("text", zmq.SUB))


def test_an_endpoint_that_cannot_be_bound_is_one_line_and_soon(folder):
    """In a process of its own, which must not hang either."""
    (folder / "text").mkdir(parents=True)
    code = (
        "from pathlib import Path; from edge_agent.supervisor.publisher import Publisher, EndpointError\n"
        f"try: Publisher(Path({str(folder)!r}))\n"
        "except EndpointError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=10)
    assert f"ipc://{folder}/text: cannot be bound" in done.stdout and done.stdout.count("\n") == 1
    (folder / "text").rmdir()
    Publisher(folder).close()


# -- private ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_folder_and_sockets_are_for_owner_and_group_alone(folder, umask):
    before = os.umask(umask)
    try:
        with contextlib.closing(Publisher(folder)):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o750 & ~umask
            for stream in STREAMS:
                assert (folder / stream).is_socket()
                assert stat.S_IMODE((folder / stream).stat().st_mode) == 0o660
            assert stat.S_IMODE((folder / "lock").stat().st_mode) & 0o007 == 0
            assert os.umask(umask) == umask  # and ours is as it was
    finally:
        os.umask(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(folder):
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with pytest.raises(EndpointError, match=f"belongs to uid 12345, we are {os.geteuid()}") as caught:
        Publisher(folder)
    assert "\n" not in str(caught.value) and os.listdir(folder) == []


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "lock").symlink_to(tmp_path / "file")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/edge-agent"), tmp_path / "linked"):
        with pytest.raises(EndpointError) as caught:
            Publisher(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_too_long_for_a_socket_is_refused_by_its_length(tmp_path):
    room = 107 - len(f"{tmp_path}/") - len("/actions")
    Publisher(tmp_path / ("x" * room)).close()
    with pytest.raises(EndpointError, match=r"may have 107 bytes, found 108; use a shorter folder"):
        Publisher(tmp_path / ("x" * (room + 1)))
    with pytest.raises(EndpointError, match="shorter"):
        Publisher(tmp_path / ("ä" * (room // 2 + 1)))  # bytes, not letters
    assert os.listdir(tmp_path) == ["x" * room]


# -- publishing -------------------------------------------------------------------------------------------------------


def test_a_message_arrives_as_one_frame_with_its_topic(link, connect):
    subscriber = connect("text", zmq.SUB)
    joined(link, subscriber)
    link.publish("text", words(link, "hello"))
    frames = subscriber.recv_multipart()
    assert len(frames) == 1 and frames[0][:1] == b"T"
    assert msgspec.msgpack.decode(frames[0][1:])["text"] == "hello"


def test_every_stream_counts_for_itself(link):
    assert [link.next_seq(stream) for stream in STREAMS] == [0, 0, 0, 0]
    for _ in range(3):
        link.publish("text", words(link))
    assert (link.next_seq("text"), link.next_seq("actions")) == (3, 0)


def test_a_message_that_may_not_leave_is_not_counted(link):
    with pytest.raises(ValueError, match="the limit is 65536"):
        link.publish("text", words(link, "x" * 70_000))
    assert link.next_seq("text") == 0


def test_a_stalled_subscriber_never_makes_us_wait_and_sees_what_it_lost(link, connect):
    n = 100_000
    stalled, healthy = connect("text", zmq.SUB, RCVHWM=100), connect("text", zmq.SUB, CONFLATE=1)
    for subscriber in (stalled, healthy):
        joined(link, subscriber)
    received(stalled)
    first, slowest_s, start_s = link.next_seq("text"), 0.0, time.monotonic()
    for _ in range(n):
        message = words(link, "a word")
        before_s = time.monotonic()
        link.publish("text", message)
        slowest_s = max(slowest_s, time.monotonic() - before_s)
    assert time.monotonic() - start_s < 20 and slowest_s < 0.5
    assert link.next_seq("text") == first + n

    kept = [message.seq for message in received(stalled)]
    assert 0 < len(kept) < n / 2 and kept == sorted(set(kept))
    link.publish("text", words(link, "the last"))
    last = received(stalled)[-1].seq
    assert last == first + n  # so the reader sees: of what was sent since, it has len(kept) and lost the rest
    assert received(healthy)[-1].seq == first + n


def test_a_subscriber_that_is_gone_is_no_error(link, connect):
    subscriber = connect("text", zmq.SUB)
    joined(link, subscriber)
    subscriber.close()
    for _ in range(1000):
        link.publish("text", words(link))


# -- the last status --------------------------------------------------------------------------------------------------


def wait_for(true, seconds: float = 5.0) -> None:
    until_s = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until_s, "never happened"
        time.sleep(0.005)


def test_every_new_subscriber_to_status_is_told_of_once(link, connect):
    assert not link.new_subscriber()
    first = connect("status", zmq.SUB)
    wait_for(link.new_subscriber)
    assert not link.new_subscriber()
    second = connect("status", zmq.SUB)  # the same topic again: without XPUB_VERBOSE nobody would say
    wait_for(link.new_subscriber)
    for subscriber in (first, second):
        subscriber.setsockopt(zmq.UNSUBSCRIBE, b"")
    time.sleep(0.1)
    assert not link.new_subscriber()  # leaving is not joining


def test_of_a_flood_of_subscriptions_some_wait_for_the_next_call(link, connect):
    flood = connect("status", zmq.XSUB, SNDHWM=0)
    for _ in range(1000):
        flood.send(b"\x01S")
    wait_for(lambda: link.status.poll(0))
    time.sleep(0.2)
    calls = 0
    while link.new_subscriber():
        calls += 1
    assert calls >= 1000 // 100


# -- control ----------------------------------------------------------------------------------------------------------


def requests(link: Publisher, n: int, seconds: float = 5.0) -> list:
    found, until_s = [], time.monotonic() + seconds
    while len(found) < n and time.monotonic() < until_s:
        found += link.requests()
        time.sleep(0.005)
    return found


def test_a_request_is_answered_to_who_asked(link, connect):
    dealer, req = connect("control", zmq.DEALER), connect("control", zmq.REQ)
    dealer.send(b"from the dealer")
    req.send(b"from the requester")
    found = requests(link, 2)
    assert sorted(payload for _, payload in found) == [b"from the dealer", b"from the requester"]
    for sender, payload in found:
        link.reply(sender, b"to" + payload[4:])
    assert dealer.recv() == b"to the dealer" and req.recv() == b"to the requester"


def test_nothing_waiting_is_nothing(link):
    start_s = time.monotonic()
    assert link.requests() == []
    assert time.monotonic() - start_s < 0.1


def test_a_flood_of_requests_is_taken_in_portions(link, connect):
    dealer = connect("control", zmq.DEALER, SNDHWM=0)
    for n in range(5000):
        dealer.send(b"%d" % n)
    wait_for(lambda: link.control.poll(0))
    time.sleep(0.2)
    portion = link.requests()
    assert len(portion) == 64 and [payload for _, payload in portion] == [b"%d" % n for n in range(64)]
    assert len(requests(link, 5000 - 64)) == 5000 - 64


def test_odd_multipart_requests_are_only_odd_requests(link, connect):
    dealer = connect("control", zmq.DEALER)
    for parts in ([b""], [b"", b""], [b"a", b"b", b"c"], [b"\xff" * 1000] * 50, [b"", b"payload"]):
        dealer.send_multipart(parts)
        ((sender, payload),) = requests(link, 1)
        assert payload == parts[-1] and sender[1:] == parts[:-1]
        link.reply(sender, b"ok")
        assert dealer.recv_multipart() == [*parts[:-1], b"ok"]


def test_a_request_over_64_kib_is_dropped_and_the_others_are_not(link, connect):
    honest, greedy = connect("control", zmq.DEALER), connect("control", zmq.DEALER)
    honest.send(b"1")
    assert requests(link, 1)[0][1] == b"1"
    greedy.send(b"x" * 65_537)
    greedy.send_multipart([b"", b"x" * 1_000_000])
    assert requests(link, 1, seconds=0.5) == []
    honest.send(b"x" * 65_536)
    honest.send(b"2")
    assert [payload for _, payload in requests(link, 2)] == [b"x" * 65_536, b"2"]


def test_a_reply_to_somebody_who_left_is_no_error(link, connect):
    dealer = connect("control", zmq.DEALER)
    dealer.send(b"bye")
    ((sender, _),) = requests(link, 1)
    dealer.close()
    time.sleep(0.1)
    for to in (sender, [b"nobody"], [b"\x00\x00\x00\x00\x00"]):
        link.reply(to, b"late")


def test_a_reader_that_takes_no_replies_never_makes_us_wait(link, connect):
    dealer = connect("control", zmq.DEALER, RCVHWM=1)
    dealer.send(b"hello")
    ((sender, _),) = requests(link, 1)
    start_s = time.monotonic()
    for _ in range(5000):
        link.reply(sender, b"x" * 1000)
    assert time.monotonic() - start_s < 2


def test_garbage_on_a_socket_is_not_heard(link, folder, connect):
    """Bytes that are no ZMTP, half a greeting, and one that hangs."""
    import socket

    hanging = []
    for stream in STREAMS:
        for data in (b"\x00" * 64, b"GET / HTTP/1.1\r\n\r\n", b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f", b""):
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(str(folder / stream))
            peer.sendall(data)
            hanging.append(peer)
    time.sleep(0.1)
    assert link.requests() == [] and not link.new_subscriber()
    dealer = connect("control", zmq.DEALER)
    dealer.send(b"hello")
    assert requests(link, 1)[0][1] == b"hello"
    joined(link, connect("text", zmq.SUB))
    for peer in hanging:
        peer.close()
