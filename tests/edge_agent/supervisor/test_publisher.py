"""The sockets: one daemon per folder, publishing never waits, losses are visible, garbage and floods do no harm."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import time

import msgspec
import pytest
import zmq

from edge_agent.supervisor.publisher import Publisher
from edge_agent.supervisor.runtime_folder import EndpointError
from edge_agent.wire.messages import TextMessage
from edge_agent.wire.streams import STREAMS, unpack
from tests.harness import ROOT
from tests.harness.clock import FakeClock

NO_WAIT_S = 30.0  # bounds a hang


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def publisher(folder):
    with contextlib.closing(Publisher(folder)) as opened:
        yield opened


@pytest.fixture
def connect(folder):
    """connect(stream, socket type, **options): a socket of a controller."""
    with zmq.Context() as context:
        sockets = []

        def connect(stream: str, kind: int, **options: int | bytes) -> zmq.Socket:
            connected = context.socket(kind)
            sockets.append(connected)
            for name, value in ({"LINGER": 0, "RCVTIMEO": 30_000, "SNDTIMEO": 30_000} | options).items():
                connected.setsockopt(getattr(zmq, name), value)
            if kind == zmq.SUB:
                connected.setsockopt(zmq.SUBSCRIBE, b"")
            connected.connect(f"ipc://{folder}/{stream}")
            return connected

        yield connect
        for connected in sockets:
            connected.close()


def send(publisher: Publisher, text: str = "") -> TextMessage:
    return publisher.send("text", TextMessage, lane="describe", frame_id=1, text=text)


def received_until(publisher: Publisher, socket: zmq.Socket, text: str) -> list[TextMessage]:
    """Every message up to the one with this text, which must come."""
    messages: list[TextMessage] = []
    until_s = time.monotonic() + NO_WAIT_S
    while not messages or messages[-1].text != text:
        assert time.monotonic() < until_s, f"{text!r} never came"
        publisher.serve()
        if socket.poll(5):
            messages.append(unpack("text", socket.recv()))
    return messages


def join(publisher: Publisher, socket: zmq.Socket) -> None:
    """Publish until the subscriber has joined, and take what it got."""
    until_s = time.monotonic() + NO_WAIT_S
    while not socket.poll(20):
        assert time.monotonic() < until_s, "the subscriber never joined"
        publisher.serve()
        send(publisher)
    send(publisher, "joined")
    received_until(publisher, socket, "joined")


# -- one per folder ---------------------------------------------------------------------------------------------------


def test_a_second_daemon_on_the_same_folder_is_refused_and_the_first_goes_on(publisher, folder, connect):
    subscriber = connect("text", zmq.SUB)
    join(publisher, subscriber)
    with pytest.raises(
        EndpointError, match=r"another edge-agent \(process \d+\) runs in this folder; stop it"
    ) as caught:
        Publisher(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    other = (
        "from pathlib import Path; from edge_agent.supervisor.publisher import Publisher\n"
        f"Publisher(Path({str(folder)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", other], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "runs in this folder; stop it" in done.stderr.splitlines()[-1]
    send(publisher, "still here")
    assert [message.text for message in received_until(publisher, subscriber, "still here")] == ["still here"]


def test_after_close_everything_can_be_bound_again_and_nothing_is_left(folder, connect):
    fds = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        publisher = Publisher(folder)
        assert sorted(os.listdir(folder)) == ["actions", "control", "status", "text"]
        publisher.close()
        assert os.listdir(folder) == []
    assert len(os.listdir("/proc/self/fd")) == fds


def test_sockets_that_a_killed_daemon_left_are_taken_over(folder, connect):
    code = (
        "import os, signal; from pathlib import Path; from edge_agent.supervisor.publisher import Publisher\n"
        f"Publisher(Path({str(folder)!r})); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    assert (folder / "actions").is_socket()
    with contextlib.closing(Publisher(folder)) as publisher:
        join(publisher, connect("text", zmq.SUB))


def test_an_endpoint_that_cannot_be_bound_is_one_line(folder):
    """In a process of its own, which must not hang at its end."""
    (folder / "text").mkdir(parents=True)
    code = (
        "from pathlib import Path; from edge_agent.supervisor.publisher import Publisher\n"
        "from edge_agent.supervisor.runtime_folder import EndpointError\n"
        f"try: Publisher(Path({str(folder)!r}))\n"
        "except EndpointError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (
        f"{folder}/text: cannot be bound: expected a socket or nothing, found a folder" in done.stdout
        and done.stdout.count("\n") == 1
    )
    with pytest.raises(EndpointError, match="cannot be bound"):
        Publisher(folder)
    (folder / "text").rmdir()
    Publisher(folder).close()  # the lock was released


def test_nothing_in_the_folder_holds_the_lock(publisher, folder):
    """A cleaner takes away old files, and leaves sockets in use. Older versions had a lock file, which may be there."""
    for name in os.listdir(folder):
        assert (folder / name).is_socket()
    (folder / "lock").touch()
    (folder / "lock").unlink()
    with pytest.raises(EndpointError, match=rf"another edge-agent \(process {os.getpid()}\) runs in this folder"):
        Publisher(folder)


@pytest.mark.parametrize("stream", STREAMS)
def test_endpoints_of_a_daemon_whose_folder_was_moved_away_are_its_own(folder, stream):
    """The lock of the second is of another folder. Sockets that live are not bound over, and only ours are removed."""
    with contextlib.closing(Publisher(folder)):
        elsewhere = folder.rename(folder.with_name("elsewhere"))
        folder.mkdir()
        (elsewhere / stream).rename(folder / stream)
        with pytest.raises(EndpointError, match=f"{folder}/{stream}: cannot be bound: process [0-9]+ listens there"):
            Publisher(folder)
        assert os.listdir(folder) == [stream]


# -- lost in flight ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", STREAMS)
def test_an_endpoint_that_was_removed_is_bound_again(folder, stream, connect):
    clock = FakeClock()
    with contextlib.closing(Publisher(folder, clock)) as publisher:
        before = connect("text", zmq.SUB)
        join(publisher, before)
        (folder / stream).unlink()
        clock.advance(0.9)
        assert publisher.lost_endpoint() == "" and not (folder / stream).exists(), "about once a second"
        clock.advance(0.2)
        assert publisher.lost_endpoint() == "" and (folder / stream).is_socket()
        assert stat.S_IMODE((folder / stream).stat().st_mode) == 0o660
        send(publisher, "still here")
        received_until(publisher, before, "still here")
        after = connect("control", zmq.DEALER)
        after.send(b"pause")
        assert [payload for _, payload in requests(publisher, 1)] == [b"pause"]
    assert os.listdir(folder) == []


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("what", ["file", "socket", "folder", "another folder", "another daemon"])
def test_an_endpoint_that_cannot_be_bound_again_is_named(folder, what, stream):
    clock = FakeClock()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.closing(Publisher(folder, clock)))
        if what in ("file", "socket"):
            (folder / stream).unlink()
        else:
            folder.rename(folder.with_name("away"))
        if what == "file":
            (folder / stream).write_text("precious")
        elif what == "socket":
            thief = stack.enter_context(socket.socket(socket.AF_UNIX))
            thief.bind(str(folder / stream))
            thief.listen()
        elif what == "another folder":
            folder.mkdir()
        elif what == "another daemon":
            second = stack.enter_context(contextlib.closing(Publisher(folder, clock)))
        clock.advance(1.1)
        assert str(folder) in first.lost_endpoint()
        first._checked_ns -= 2_000_000_000
        if what == "another daemon":
            first.close()
            assert second.lost_endpoint() == "" and (folder / stream).is_socket(), "ours alone is removed"
            stack.pop_all()
            second.close()


# -- publishing -------------------------------------------------------------------------------------------------------


def test_a_message_arrives_as_one_frame_with_its_topic(publisher, connect):
    subscriber = connect("text", zmq.SUB)
    join(publisher, subscriber)
    send(publisher, "hello")
    frames = subscriber.recv_multipart()
    assert len(frames) == 1 and frames[0][:1] == b"T"
    assert msgspec.msgpack.decode(frames[0][1:])["text"] == "hello"


def test_the_header_is_written_in_one_place(folder):
    clock = FakeClock()
    with contextlib.closing(Publisher(folder, clock)) as publisher:
        publisher.bundle_id = "0123456789abcdef"
        first, second = send(publisher), send(publisher)
        at = publisher.send("text", TextMessage, t_pub_ns=5, lane="describe", frame_id=1, text="")
        assert (first.v, first.session, first.bundle_id) == (1, publisher.session, "0123456789abcdef")
        assert (first.t_pub_ns, at.t_pub_ns) == (clock(), 5)
        assert [first.seq, second.seq, at.seq] == [0, 1, 2]


def test_every_start_is_another_session(folder):
    sessions = set()
    for _ in range(3):
        publisher = Publisher(folder)
        sessions.add(publisher.session)
        publisher.close()
    assert len(sessions) == 3


def test_every_stream_counts_for_itself(publisher):
    assert [publisher.next_seq(stream) for stream in STREAMS] == [0, 0, 0, 0]
    for _ in range(3):
        send(publisher)
    assert (publisher.next_seq("text"), publisher.next_seq("actions")) == (3, 0)


def test_a_message_that_may_not_leave_is_not_counted(publisher):
    with pytest.raises(ValueError, match="the limit is 65536"):
        send(publisher, "x" * 70_000)
    assert publisher.next_seq("text") == 0


def test_a_stalled_subscriber_loses_messages_and_another_one_gets_the_newest(publisher, connect):
    """How long publishing takes meanwhile: tests/promises/test_latency.py."""
    n = 20_000
    stalled, healthy = connect("text", zmq.SUB, RCVHWM=100), connect("text", zmq.SUB, CONFLATE=1)
    for subscriber in (stalled, healthy):
        join(publisher, subscriber)
    first = publisher.next_seq("text")
    for _ in range(n):
        send(publisher, "a word")
    assert publisher.next_seq("text") == first + n
    until_s = time.monotonic() + NO_WAIT_S
    messages: list[TextMessage] = []
    while not messages or messages[-1].text != "the last":  # it may be lost as well, until the queue has room
        assert time.monotonic() < until_s
        publisher.serve()
        send(publisher, "the last")
        while stalled.poll(20):
            messages.append(unpack("text", stalled.recv()))
    kept = [message.seq for message in messages if message.seq >= first]
    assert kept == sorted(set(kept))
    n_lost = publisher.next_seq("text") - first - len(kept)
    assert n_lost > n / 2, "the gaps in seq tell how many messages are lost"
    newest = healthy.recv()
    while healthy.poll(100):
        newest = healthy.recv()
    assert unpack("text", newest).seq >= first + n - 1


def test_a_subscriber_that_is_gone_costs_the_others_nothing(publisher, connect):
    gone, other = connect("text", zmq.SUB), connect("text", zmq.SUB)
    join(publisher, gone)
    join(publisher, other)
    gone.close()
    first = publisher.next_seq("text")
    for _ in range(500):
        send(publisher)
    send(publisher, "the last")
    received = [message.seq for message in received_until(publisher, other, "the last")]
    assert received[-501:] == list(range(first, first + 501))


# -- the last status --------------------------------------------------------------------------------------------------


def wait_for(condition) -> None:
    until_s = time.monotonic() + NO_WAIT_S
    while not condition():
        assert time.monotonic() < until_s, "never happened"
        time.sleep(0.005)


def test_every_new_subscriber_to_status_is_reported_once(publisher, connect):
    def joined() -> bool:
        publisher.serve()
        return publisher.has_new_subscriber()

    assert not joined()
    first = connect("status", zmq.SUB)
    wait_for(joined)
    assert not joined()
    second = connect("status", zmq.SUB)  # the same topic again
    wait_for(joined)
    for subscriber in (first, second):
        subscriber.setsockopt(zmq.UNSUBSCRIBE, b"")
        subscriber.setsockopt(zmq.SUBSCRIBE, b"S")
    wait_for(joined)


# -- control ----------------------------------------------------------------------------------------------------------


def requests(publisher: Publisher, n: int) -> list:
    """The next n requests."""
    arrived: list = []

    def serve() -> bool:
        publisher.serve()
        arrived.extend(publisher.requests())
        return len(arrived) >= n

    wait_for(serve)
    return arrived


def test_a_reply_goes_to_the_sender_of_the_request(publisher, connect):
    dealer, req = connect("control", zmq.DEALER), connect("control", zmq.REQ)
    dealer.send(b"from the dealer")
    req.send(b"from the requester")
    both = requests(publisher, 2)
    assert sorted(payload for _, payload in both) == [b"from the dealer", b"from the requester"]
    for sender, payload in both:
        publisher.reply(sender, b"to" + payload[4:])
    assert dealer.recv() == b"to the dealer" and req.recv() == b"to the requester"


def test_without_requests_there_is_an_empty_list(publisher):
    assert publisher.requests() == []


def test_a_flood_of_requests_is_taken_in_portions(publisher, connect):
    dealer = connect("control", zmq.DEALER, SNDHWM=0)
    for n in range(5000):
        dealer.send(b"%d" % n)
    portions: list[list] = []
    wait_for(lambda: publisher.serve() or portions.append(publisher.requests()) or sum(map(len, portions)) == 5000)
    assert max(map(len, portions)) == 64
    assert [payload for portion in portions for _, payload in portion] == [b"%d" % n for n in range(5000)]


def test_odd_multipart_requests_are_only_odd_requests(publisher, connect):
    dealer = connect("control", zmq.DEALER)
    for parts in ([b""], [b"", b""], [b"a", b"b", b"c"], [b"\xff" * 1000] * 4, [b"", b"payload"]):
        dealer.send_multipart(parts)
        ((sender, payload),) = requests(publisher, 1)
        assert payload == parts[-1] and list(sender.envelope) == parts[:-1]
        publisher.reply(sender, b"ok")
        assert dealer.recv_multipart() == [*parts[:-1], b"ok"]


def test_a_request_over_64_kib_is_dropped_and_the_others_are_not(publisher, connect):
    honest, greedy = connect("control", zmq.DEALER), connect("control", zmq.DEALER)
    honest.send(b"1")
    assert requests(publisher, 1)[0][1] == b"1"
    greedy.send(b"x" * 65_537)
    greedy.send_multipart([b"", b"x" * 1_000_000])
    honest.send(b"x" * 65_536)
    honest.send(b"2")
    assert [payload for _, payload in requests(publisher, 2)] == [b"x" * 65_536, b"2"]
    greedy_too = connect("control", zmq.DEALER)
    greedy_too.send(b"small")  # what comes next is this: the large requests never did
    assert [payload for _, payload in requests(publisher, 1)] == [b"small"]


def test_a_sender_is_connected_until_its_connection_ends(publisher, connect):
    dealer = connect("control", zmq.DEALER)
    dealer.send(b"hello")
    ((sender, _),) = requests(publisher, 1)
    assert publisher.is_connected(sender)
    dealer.close()
    while publisher.is_connected(sender):
        publisher.serve()


def test_the_newest_connection_with_a_routing_id_takes_over(publisher, connect):
    """The old process of a controller hangs, and still holds its connection."""
    for n in range(3):
        dealer = connect("control", zmq.DEALER, ROUTING_ID=b"controller")
        dealer.send(str(n).encode())
        ((sender, payload),) = requests(publisher, 1)
        assert (sender.connection.identity, payload) == (b"controller", str(n).encode())
        publisher.reply(sender, b"ok")
        assert dealer.recv() == b"ok"


def test_a_reply_to_a_request_of_the_old_connection_does_not_go_to_the_new_one(publisher, connect):
    """A controller that was restarted counts its ids from 1 again: it would take the reply for its own pause."""
    dealer = connect("control", zmq.DEALER, ROUTING_ID=b"controller")
    dealer.send(b"instruct")
    ((old, _),) = requests(publisher, 1)
    dealer = connect("control", zmq.DEALER, ROUTING_ID=b"controller")
    dealer.send(b"pause")
    ((new, _),) = requests(publisher, 1)
    assert old.connection.identity == new.connection.identity and not publisher.is_connected(old)
    publisher.reply(old, b"instruct: ok")
    publisher.reply(new, b"pause: ok")
    assert dealer.recv() == b"pause: ok"


def test_a_reply_to_a_sender_that_is_gone_is_dropped(publisher, connect):
    dealer, other = connect("control", zmq.DEALER), connect("control", zmq.DEALER)
    dealer.send(b"bye")
    ((sender, _),) = requests(publisher, 1)
    dealer.close()
    publisher.reply(sender, b"late")
    other.send(b"hello")
    ((sender, _),) = requests(publisher, 1)
    publisher.reply(sender, b"still here")
    assert other.recv() == b"still here"


def test_a_sender_that_reads_no_replies_costs_the_others_nothing(publisher, connect):
    dealer, other = connect("control", zmq.DEALER, RCVHWM=1), connect("control", zmq.DEALER)
    dealer.send(b"hello")
    ((sender, _),) = requests(publisher, 1)
    for _ in range(5000):
        publisher.reply(sender, b"x" * 1000)
    other.send(b"hello")
    ((sender, _),) = requests(publisher, 1)
    publisher.reply(sender, b"still here")
    assert other.recv() == b"still here"


def test_an_invalid_message_on_a_socket_is_ignored(publisher, folder, connect):
    """Bytes that are not ZMTP, half a greeting, and a peer that hangs."""

    hanging = []
    for stream in STREAMS:
        for data in (b"\x00" * 64, b"GET / HTTP/1.1\r\n\r\n", b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f", b""):
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(str(folder / stream))
            peer.sendall(data)
            hanging.append(peer)
    dealer = connect("control", zmq.DEALER)
    dealer.send(b"hello")
    assert [payload for _, payload in requests(publisher, 1)] == [b"hello"]
    assert not publisher.has_new_subscriber()
    join(publisher, connect("text", zmq.SUB))
    for peer in hanging:
        peer.close()
