"""What a controller gets: actions that stand, each at most once, and answers to what it asked; over real sockets."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import msgspec
import pytest
import zmq
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from edge_agent.client.client import Client, RequestRefused, is_valid
from edge_agent.supervisor.publisher import Publisher
from edge_agent.wire.codec import encode
from edge_agent.wire.control import Reply, Request, decode_request
from edge_agent.wire.messages import Action, Header, Refusal, StageTimes, TextMessage
from edge_agent.wire.streams import STREAMS, pack
from tests.harness import ROOT

MS = 1_000_000
S = 1000 * MS


@pytest.fixture
def link(tmp_path):
    with contextlib.closing(Publisher(tmp_path)) as opened:
        yield opened


@pytest.fixture
def client(tmp_path):
    with Client(str(tmp_path)) as connected:
        yield connected


def action(seq: int = 0, age_ms: float = 20, valid_ms: int = 500, **changes) -> Action:
    """As the daemon would make it now."""
    now_ns = time.monotonic_ns()
    return msgspec.structs.replace(
        Action(
            v=1,
            session=1,
            seq=seq,
            t_pub_ns=now_ns,
            bundle_id="ab",
            camera="front",
            frame_id=seq,
            t_capture_ns=now_ns - round(age_ms * MS),
            capture_clock="driver",
            age_ms=age_ms,
            stages_ms=StageTimes(queue=1.0, encode=1.0, prefill=1.0, decode=1.0, check=0.1),
            valid_for_ms=valid_ms,
            valid_until_ns=now_ns + valid_ms * MS,
            action_space="velocity_body",
            type="hold",
            values={},
            clamped={},
            instruction="Hold position.",
            dropped_frames=0,
        ),
        **changes,
    )


def refusal(seq: int, **changes) -> Refusal:
    fields = {name: getattr(action(seq), name) for name in Refusal.__struct_fields__ if hasattr(Action, name)}
    return Refusal(**fields | {"reason": "late", "detail": "2100 ms old"} | changes)


def words(seq: int, text: str, request: str = "", final: bool = False) -> TextMessage:
    header = {"v": 1, "session": 1, "seq": seq, "t_pub_ns": time.monotonic_ns(), "bundle_id": "ab"}
    return TextMessage(lane="answer", frame_id=1, text=text, request=request, final=final, **header)


def join(link: Publisher, client: Client) -> None:
    """Until the subscription to actions has arrived; what was heard meanwhile does not count."""
    until_s = time.monotonic() + 5
    while client.next_answer(0.02) is None:
        assert time.monotonic() < until_s, "never joined"
        link.publish("actions", refusal(0, session=0))
    while client.next_answer(0.05) is not None:
        pass
    client.expired = client.missed = 0


def exchange(link: Publisher, client: Client, message: Header, wait_s: float = 0.2) -> Action | Refusal | None:
    link.publish("actions", message)
    return client.next_answer(wait_s)


# -- actions ----------------------------------------------------------------------------------------------------------


def test_an_action_that_stands_is_handed_out_as_it_was_published(link, client):
    join(link, client)
    sent = action(1)
    assert exchange(link, client, sent) == sent
    assert (client.expired, client.missed) == (0, 0)


def test_a_refusal_is_handed_out_by_next_answer_and_skipped_by_actions(link, client):
    join(link, client)
    sent = refusal(1)
    assert exchange(link, client, sent) == sent
    link.publish("actions", refusal(2))
    assert next(client.actions(silence_s=0.2)) is None
    assert client.expired == 0


@pytest.mark.parametrize(
    ("changes", "ok"),
    [
        ({}, True),
        ({"t_pub_ns": -2 * S}, False),  # everything two seconds ago
        ({"t_pub_ns": 3 * S}, False),  # everything in the future
        ({"t_pub_ns": 100 * MS}, False),
        ({"t_capture_ns": 10 * MS}, False),  # captured after it was published
        ({"t_capture_ns": 0}, True),
        ({"t_capture_ns": -60 * S}, True),  # old, but so it was published: the daemon has judged its age
        ({"valid_until_ns": 1 * S}, True),
        ({"valid_until_ns": 1 * S + 1}, False),  # stands longer than any action may
        ({"valid_until_ns": 3600 * S}, False),
        ({"valid_until_ns": -1}, False),
        ({"valid_until_ns": 0}, False),
    ],
)
def test_what_stands(changes, ok):
    """Offsets from now; what hangs on t_pub_ns moves along."""
    now_ns = 10**15
    pub_ns = now_ns + changes.get("t_pub_ns", 0)
    capture_ns = pub_ns + changes.get("t_capture_ns", -20 * MS)
    until_ns = pub_ns + changes.get("valid_until_ns", 500 * MS)
    tested = action(t_pub_ns=pub_ns, t_capture_ns=capture_ns, valid_until_ns=until_ns)
    assert is_valid(tested, now_ns) is ok


offset = st.integers(-4 * S, 4 * S) | st.integers(-20 * MS, 20 * MS) | st.integers(-(2**62), 2**62)


@settings(deadline=None, max_examples=1000)
@given(published=offset, captured=offset, until=offset)
@example(published=0, captured=0, until=1)
@example(published=0, captured=0, until=S)
@example(published=-S, captured=-S, until=0)
def test_no_stamps_make_an_action_stand_that_is_expired_unborn_or_immortal(published, captured, until):
    now_ns = 2**62 + 10**15
    tested = action(t_pub_ns=now_ns + published, t_capture_ns=now_ns + captured, valid_until_ns=now_ns + until)
    fresh = captured <= published <= 5 * MS  # two reads of one clock on two cores may differ by that
    assert is_valid(tested, now_ns) == (fresh and 0 < until <= published + S)


def test_over_the_wire_only_what_stands_comes_out(link, client):
    join(link, client)

    @settings(deadline=None, max_examples=40)
    @given(
        published=st.integers(-2000, -200) | st.integers(200, 2000),
        captured=st.integers(-500, -200) | st.integers(200, 300),
        valid=st.integers(-500, -200) | st.integers(200, 800) | st.integers(1200, 1500),
    )
    def check(published: int, captured: int, valid: int) -> None:
        """Milliseconds, none of them close to an edge: there it depends on when the message arrives."""
        assume(abs(published + valid) >= 200)
        now_ns, seq, expired = time.monotonic_ns(), link.next_seq("actions") + 1, client.expired
        sent = action(
            seq,
            t_pub_ns=now_ns + published * MS,
            t_capture_ns=now_ns + (published + captured) * MS,
            valid_until_ns=now_ns + (published + valid) * MS,
        )
        got = exchange(link, client, sent, wait_s=0.03)
        if published < 0 and captured < 0 and published + valid > 0 and valid <= 1000:
            assert got == sent
        else:
            assert got is None and client.expired == expired + 1

    check()


def test_an_action_expires_while_it_waits_to_be_read(link, client):
    join(link, client)
    link.publish("actions", action(1, valid_ms=100))
    time.sleep(0.15)
    assert client.next_answer(0.05) is None
    assert client.expired == 1
    sent = action(2, valid_ms=100)
    assert exchange(link, client, sent) == sent


def test_nothing_is_handed_out_twice_or_after_a_newer_one(link, client):
    join(link, client)
    sent = action(5)
    assert exchange(link, client, sent) == sent
    for again in (sent, action(5), action(4), action(0), refusal(5), refusal(3)):
        assert exchange(link, client, again, wait_s=0.05) is None
    assert client.missed == 0
    sent = action(6)
    assert exchange(link, client, sent) == sent


def test_what_is_missed_is_counted(link, client):
    join(link, client)
    for seq, missed in ((1, 0), (2, 0), (5, 2), (6, 2), (106, 101)):
        assert exchange(link, client, action(seq)).seq == seq
        assert client.missed == missed


def test_a_slow_controller_gets_the_newest_and_knows_what_it_missed(link, client):
    join(link, client)
    assert exchange(link, client, action(1)).seq == 1
    for seq in range(2, 200):
        link.publish("actions", action(seq))
        time.sleep(0.002)
    time.sleep(0.1)
    assert client.next_answer(0.2).seq == 199
    assert client.missed == 197 and client.next_answer(0.05) is None


def test_a_daemon_that_starts_again_counts_from_the_beginning(link, client):
    join(link, client)
    assert exchange(link, client, action(900)).seq == 900
    assert exchange(link, client, action(0, session=77)).seq == 0
    assert client.missed == 0
    assert exchange(link, client, action(3, session=77)).seq == 3
    assert client.missed == 2


def test_silence_is_told_again_and_again_and_ends(link, client):
    join(link, client)
    actions = client.actions(silence_s=0.15)
    for _ in range(3):
        start_s = time.monotonic()
        assert next(actions) is None
        assert 0.14 <= time.monotonic() - start_s < 0.5
    link.publish("actions", action(1))
    assert next(actions).seq == 1
    assert next(actions) is None


def test_while_actions_come_there_is_no_silence(link, client):
    join(link, client)
    actions = client.actions(silence_s=0.25)
    for seq in range(1, 8):
        link.publish("actions", action(seq))
        assert next(actions).seq == seq
        time.sleep(0.08)


def test_silence_is_counted_from_the_last_action_and_not_from_the_last_message(link, client):
    """Refusals and expired actions are no reason to go on."""
    join(link, client)
    stop = threading.Event()

    def noise() -> None:
        seq = 1
        while not stop.wait(0.03):
            link.publish("actions", refusal(seq) if seq % 2 else action(seq, t_pub_ns=0))
            seq += 1

    thread = threading.Thread(target=noise)
    thread.start()
    try:
        start_s = time.monotonic()
        assert next(client.actions(silence_s=0.3)) is None
        assert 0.29 <= time.monotonic() - start_s < 0.6
    finally:
        stop.set()
        thread.join()


def test_without_a_daemon_there_is_silence_and_no_error(client):
    assert client.next_answer(0.05) is None and client.next_text(0.05) is None and client.status(0.05) is None
    assert next(client.actions(silence_s=0.1)) is None


@pytest.mark.parametrize("stream", ["actions", "text", "status"])
def test_garbage_on_a_stream_is_skipped(tmp_path, client, stream):
    topic = STREAMS[stream].topic
    make_good = {"actions": lambda: action(1), "text": lambda: words(1, "good"), "status": lambda: None}[stream]
    hear = {"actions": client.next_answer, "text": client.next_text, "status": client.status}[stream]
    with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
        publisher.setsockopt(zmq.LINGER, 0)
        publisher.bind(f"ipc://{tmp_path}/{stream}")
        hear(0.05)
        time.sleep(0.2)
        deep, no_text = b"\x81\xa1x" + b"\x91" * 50_000 + b"\xc0", b"\x81\xa9bundle_id\xa2\xff\xff"
        for garbage in (b"", b"\x80", b"garbage", b"\x00" * 1000, b"\x82\xa4kind\xa6action", no_text, deep):
            publisher.send(topic + garbage)
            assert hear(0.05) is None
        if (good := make_good()) is not None:
            publisher.send(pack(stream, good))
            assert hear(1.0) == good


# -- words ------------------------------------------------------------------------------------------------------------


def test_words_come_all_and_in_their_order(link, client):
    until_s = time.monotonic() + 5
    while client.next_text(0.02) is None:
        assert time.monotonic() < until_s
        link.publish("text", words(0, "join"))
    while client.next_text(0.05) is not None:
        pass
    for seq in range(300):
        link.publish("text", words(seq, f"word {seq} "))
    stream = client.text()
    assert [next(stream).text for _ in range(300)] == [f"word {seq} " for seq in range(300)]


# -- control ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def answering(link: Publisher, answer: Callable[[Request], list[bytes]]):
    """A daemon's control side, in a thread: answer(request) -> the payloads to send back."""
    seen, stop = [], threading.Event()

    def serve() -> None:
        while not stop.is_set():
            link.control.poll(10)
            for sender, payload in link.requests():
                seen.append(decode_request(payload))
                for reply in answer(seen[-1]):
                    link.reply(sender, reply)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def reply(request: Request, error: str = "", **result) -> bytes:
    return encode(Reply(v=1, id=request.id, ok=not error, error=error, result=result))


def test_every_operation_is_one_request(link, client):
    with answering(link, lambda request: [reply(request, text="An answer.", frames=3)]) as seen:
        assert client.instruct("Land.") is None
        assert client.ask("What is it?") == "An answer."
        client.pause()
        client.resume()
        assert client.stats() == {"text": "An answer.", "frames": 3}
    assert [(request.v, request.op, request.text) for request in seen] == [
        (1, "instruct", "Land."),
        (1, "ask", "What is it?"),
        (1, "pause", ""),
        (1, "resume", ""),
        (1, "stats", ""),
    ]
    ids = [request.id for request in seen]
    assert len(set(ids)) == 5 and all(0 < len(request_id) <= 64 for request_id in ids)


def test_a_no_is_refused_with_its_reason(link, client):
    with (
        answering(link, lambda request: [reply(request, error="the model is not ready")]),
        pytest.raises(RequestRefused, match=r"^the model is not ready$"),
    ):
        client.instruct("Land.")


def test_no_answer_is_a_timeout_that_names_the_endpoint(link, client, tmp_path):
    start_s = time.monotonic()
    with answering(link, lambda request: []), pytest.raises(TimeoutError) as caught:
        client.request("stats", "", 0.2)
    assert 0.2 <= time.monotonic() - start_s < 1
    assert f"ipc://{tmp_path}/control" in str(caught.value) and "running?" in str(caught.value)


def test_without_a_daemon_a_request_is_a_timeout(client):
    with pytest.raises(TimeoutError):
        client.pause(timeout_s=0.1)
    with pytest.raises(TimeoutError):
        list(client.ask_stream("What?", timeout_s=0.1))


def test_a_request_that_was_given_up_is_not_carried_out_later(tmp_path, client):
    """No daemon yet: the caller is told that nothing happened, and nothing may happen minutes later."""
    with pytest.raises(TimeoutError):
        client.instruct("Take off.", timeout_s=0.2)
    with contextlib.closing(Publisher(tmp_path)) as link, answering(link, lambda request: [reply(request)]) as seen:
        time.sleep(0.5)
        client.pause()
    assert [request.op for request in seen] == ["pause"]


def test_a_late_answer_is_not_taken_for_the_answer_to_the_next(link, client):
    first: list[Request] = []

    def answer(request: Request) -> list[bytes]:
        if not first:
            first.append(request)
            return []
        return [reply(first[0], text="late"), reply(request, text="right")]

    with answering(link, answer):
        with pytest.raises(TimeoutError):
            client.ask("First?", timeout_s=0.1)
        assert client.ask("Second?", timeout_s=2) == "right"


def test_an_answer_that_is_garbage_is_not_an_answer(link, client):
    garbage = [b"", b"garbage", b"\x81\xa2id\xa2\xff\xff", encode({"v": 1, "id": 3})]
    with answering(link, lambda request: [*garbage, reply(request, n=1)]):
        assert client.stats(timeout_s=2) == {"n": 1}


def test_the_same_id_is_sent_as_it_is(link, client):
    with answering(link, lambda request: [reply(request)]) as seen:
        for _ in range(2):
            client.request("instruct", "Land.", 2.0, request_id="mine")
    assert [request.id for request in seen] == ["mine", "mine"]


# -- answers in pieces ------------------------------------------------------------------------------------------------


def pieces_of(link: Publisher, client: Client, published: list[str], whole: str, wait_s: float = 0.1) -> list[str]:
    """Ask; the daemon publishes these pieces, then replies with the whole answer."""

    def answer(request: Request) -> list[bytes]:
        time.sleep(0.2)  # the subscription to words is as new as the question
        link.publish("text", words(0, "of somebody else", request="other"))
        for n, text in enumerate(published, 1):
            link.publish("text", words(n, text, request=request.id, final=n == len(published)))
        time.sleep(wait_s)
        return [reply(request, text=whole)]

    with answering(link, answer):
        return list(client.ask_stream("What?", timeout_s=5))


def test_pieces_together_are_the_answer(link, client):
    found = pieces_of(link, client, ["A red", " box", " on grass."], "A red box on grass.")
    assert "".join(found) == "A red box on grass." and found[:3] == ["A red", " box", " on grass."]


def test_pieces_still_on_their_way_come_with_the_reply(link, client):
    assert "".join(pieces_of(link, client, ["A red"], "A red box.")) == "A red box."
    assert "".join(pieces_of(link, client, [], "A red box.", wait_s=0)) == "A red box."


def test_when_a_piece_was_lost_the_whole_answer_follows(link, client):
    assert pieces_of(link, client, ["A red", " grass."], "A red box on grass.")[-1] == "\nA red box on grass."


def test_a_question_that_is_refused_is_refused_in_pieces_too(link, client):
    with (
        answering(link, lambda request: [reply(request, error="not ready")]),
        pytest.raises(RequestRefused, match="not ready"),
    ):
        list(client.ask_stream("What?", timeout_s=2))


# -- what it costs to import ------------------------------------------------------------------------------------------


def test_importing_the_client_loads_nothing_heavy():
    code = (
        "import sys, edge_agent.client\n"
        "heavy = {'numpy', 'cv2', 'onnxruntime', 'llama_cpp', 'llguidance', 'gguf', 'rich', 'onnx', 'ml_dtypes'}\n"
        "sys.exit(f'loaded {sorted(heavy & set(sys.modules))}' if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_closing_twice_is_closing_once_and_soon(link, tmp_path):
    client = Client(str(tmp_path))
    client.next_answer(0.01)
    with pytest.raises(TimeoutError):
        client.stats(0.05)
    start_s = time.monotonic()
    client.close()
    client.close()
    assert time.monotonic() - start_s < 1
