"""The daemon's side of the wire for tests of its readers: a test publishes what it likes and answers as it likes."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq

from edge_agent.time_units import NS_PER_MS
from edge_agent.wire.codec import encode
from edge_agent.wire.control import Reply, Request, read_request
from edge_agent.wire.endpoints import endpoint
from edge_agent.wire.messages import Action, Header, Refusal, StageTimes, Status, TextMessage, WorkerStatus
from edge_agent.wire.streams import STREAMS, pack

HANG_S = 60.0  # bounds a hang, not a duration


class FakeDaemon:
    """Sockets in a folder, as the daemon's. Published streams are XPUB, so that a test can wait for a subscriber."""

    def __init__(self, folder: Path) -> None:
        self._context = zmq.Context()
        self.sockets: dict[str, zmq.Socket[bytes]] = {}
        self._subscribed: set[str] = set()
        self._senders: dict[str, bytes] = {}  # operation -> routing id of its newest sender
        for stream in STREAMS:
            socket = self._context.socket(zmq.ROUTER if stream == "control" else zmq.XPUB)
            socket.setsockopt(zmq.LINGER, 0)
            if stream == "control":
                socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
            socket.bind(endpoint(folder, stream))
            self.sockets[stream] = socket

    def __enter__(self) -> FakeDaemon:
        return self

    def __exit__(self, *_error: object) -> None:
        for socket in self.sockets.values():
            socket.close()
        self._context.term()

    def wait_for_subscriber(self, stream: str) -> None:
        while stream not in self._subscribed:
            assert self.sockets[stream].poll(round(HANG_S * 1000)), f"{stream}: no subscriber"
            if self.sockets[stream].recv()[:1] == b"\x01":
                self._subscribed.add(stream)

    def publish(self, stream: str, message: Header) -> None:
        self.send(stream, pack(stream, message))

    def send(self, stream: str, payload: bytes) -> None:
        self.sockets[stream].send(payload)

    def reply_to(self, op: str, payload: bytes) -> None:
        """Send a reply to the sender of the newest request of this operation. Only in `answer` of answering()."""
        self.sockets["control"].send_multipart([self._senders[op], payload])

    @contextlib.contextmanager
    def answering(self, answer: Callable[[Request], list[bytes]]) -> Iterator[list[Request]]:
        """Answer requests in a thread: answer(request) -> the payloads to send back. Yields the requests so far."""
        requests: list[Request] = []
        stop = threading.Event()
        control = self.sockets["control"]

        def serve() -> None:
            while not stop.is_set():
                if control.poll(10):
                    sender, payload = control.recv_multipart()
                    requests.append(read_request(payload))
                    self._senders[requests[-1].op] = sender
                    for reply in answer(requests[-1]):
                        control.send_multipart([sender, reply])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield requests
        finally:
            stop.set()
            thread.join()

    @contextlib.contextmanager
    def publishing(self, make: Callable[[int], Header], first_seq: int = 0) -> Iterator[None]:
        """Publish make(seq) on the actions stream every 10 ms, in a thread: on a busy machine an action may expire
        before it is read."""
        stop = threading.Event()

        def publish() -> None:
            for seq in itertools.count(first_seq):
                if stop.wait(0.01):
                    return
                self.publish("actions", make(seq))

        thread = threading.Thread(target=publish)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def make_reply(request: Request, error: str = "", **result: Any) -> bytes:
    return encode(Reply(v=1, id=request.id, ok=not error, error=error, result=result))


def make_action(
    seq: int = 0, *, now_ns: int | None = None, age_ms: float = 20, valid_ms: int = 500, **changes: Any
) -> Action:
    """An action as the daemon publishes it at now_ns; None: now."""
    now_ns = time.monotonic_ns() if now_ns is None else now_ns
    action = Action(
        v=1,
        session=1,
        seq=seq,
        t_pub_ns=now_ns,
        bundle_id="ab",
        camera="front",
        frame_id=seq,
        t_capture_ns=now_ns - round(age_ms * NS_PER_MS),
        capture_clock="driver",
        age_ms=age_ms,
        stages_ms=StageTimes(queue=1.0, encode=1.0, prefill=1.0, decode=1.0, check=0.1),
        valid_for_ms=valid_ms,
        valid_until_ns=now_ns + valid_ms * NS_PER_MS,
        action_space="velocity_body",
        type="hold",
        values={},
        clamped={},
        instruction="Hold position.",
        dropped_frames=0,
    )
    return msgspec.structs.replace(action, **changes)


def make_refusal(seq: int, **changes: Any) -> Refusal:
    action = make_action(seq, now_ns=10**15)
    fields = {name: getattr(action, name) for name in Refusal.__struct_fields__ if hasattr(Action, name)}
    return Refusal(**fields | {"reason": "late", "detail": "2100 ms old"} | changes)


def make_text(seq: int, text: str, request: str = "", final: bool = False) -> TextMessage:
    header: dict[str, Any] = {"v": 1, "session": 1, "seq": seq, "t_pub_ns": 10**15, "bundle_id": "ab"}
    return TextMessage(lane="answer", frame_id=1, text=text, request=request, final=final, **header)


def make_status(reason: str = "", rss_mib: float | None = 80.0) -> Status:
    worker = WorkerStatus(alive=True, pid=3, restarts=2, rss_mib=rss_mib)
    return Status(
        v=1,
        session=1,
        seq=0,
        t_pub_ns=10**15,
        bundle_id="ab",
        state="running",
        reason=reason,
        uptime_s=1.0,
        camera="front",
        camera_worker=worker,
        model_worker=worker,
        frames=1,
        frames_dropped=0,
        actions=1,
        refusals={},
        faults={},
        last_frame_age_ms=None,
        last_action_age_ms=None,
        inference_count=1,
        instruction="Hold position.",
        vision_backend="mtmd",
        mem_available_mib=None,
        temperature_c=None,
    )
