"""Requests to a rehearsal: answered as by a daemon, and our own client discards what is from before a reply."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from edge_agent.client import ChunkPlayer, Client, RequestRefused
from edge_agent.rehearsal import SCENARIOS, Command, judge, play
from edge_agent.rehearsal.control import ANSWER
from edge_agent.rehearsal.player import Player
from edge_agent.rehearsal.records import Note

HANG_S = 60.0


@pytest.fixture
def player(tmp_path: Path) -> Iterator[Player]:
    opened = Player(tmp_path, [])
    yield opened
    opened.close()


def while_served(player: Player, work: Callable[[], Any]) -> Any:
    """What a controller gets that works in another thread while the player serves its endpoints."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert player.wait(HANG_S, lambda: bool(found)), "no answer"
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def test_the_requests_of_a_client_are_answered(player, tmp_path):
    with Client(str(tmp_path)) as agent:
        while_served(player, lambda: agent.instruct("  Find the road. "))
        assert player.action()["instruction"] == player.control.instruction == "Find the road."
        assert while_served(player, lambda: agent.ask("What is ahead?")) == ANSWER
        assert while_served(player, lambda: "".join(agent.ask_stream("What is ahead?"))) == ANSWER
        assert while_served(player, lambda: agent.vehicle_state(altitude_m=2.0)) == {}
        while_served(player, lambda: agent.adapter(""))
        assert while_served(player, agent.stats)["instruction"] == "Find the road."
        assert while_served(player, lambda: agent.request("cancel", "7", 5.0)) == {"cancelled": False}
        for refused, said in (
            (lambda: agent.adapter("night"), "adapter: expected '', found 'night'"),
            (lambda: agent.instruct(" "), "expected 1 to 2000 characters"),
            (lambda: agent.request("vehicle_state", "", 5.0), "expected at least one value"),
        ):
            with pytest.raises(RequestRefused, match=said):
                while_served(player, refused)


def test_while_paused_no_action_is_published_and_the_status_says_so(player, tmp_path):
    with Client(str(tmp_path)) as agent:
        while_served(player, agent.pause)
        assert player.follow() == () and not player.events
        status = while_served(player, agent.status)
        while not status.paused:
            status = while_served(player, agent.status)
        assert status.state == "paused"
        while_served(player, agent.resume)
        assert player.follow() != ()


def test_a_request_that_is_late_or_unreadable_is_refused(player, tmp_path):
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(f"ipc://{tmp_path}/control")

        def exchange(request: Any) -> Any:
            socket.send(msgspec.msgpack.encode(request))
            return msgspec.msgpack.decode(socket.recv())

        past_ns = time.monotonic_ns() - 10**9
        for op, is_carried_out in (("resume", False), ("pause", True), ("cancel", True), ("stats", False)):
            request = {"v": 1, "id": op, "op": op, "expires_ns": past_ns}
            reply = while_served(player, lambda request=request: exchange(request))
            assert (reply["id"], reply["ok"]) == (op, is_carried_out)
        reply = while_served(player, lambda: exchange({"v": 1, "id": "x", "op": "fly"}))
        assert not reply["ok"] and reply["id"] == "x" and "op: expected one of" in reply["error"]


REQUESTS: dict[str, Callable[[Client], None]] = {
    "pause": lambda agent: agent.pause(),
    "instruct": lambda agent: agent.instruct("Find the road."),
    "adapter": lambda agent: agent.adapter(""),
}


@pytest.mark.parametrize("op", REQUESTS)
def test_our_client_discards_what_was_published_before_a_reply(tmp_path, op):
    commands: list[Command] = []
    stop = threading.Event()

    def control() -> None:
        requests = [REQUESTS[op]] + ([lambda agent: agent.resume()] if op == "pause" else [])
        resume_ns = 0
        with Client(str(tmp_path)) as agent:
            chunks = ChunkPlayer(agent)
            while not stop.is_set():
                chunks.take(agent.next_answer(0.02))
                t_ns = time.monotonic_ns()
                step = chunks.step()
                commands.append(Command(t_ns, step.type if step else "hold", step.values if step else {}))
                if (len(requests) == 2 - (op != "pause") and step is not None) or (resume_ns and t_ns > resume_ns):
                    requests.pop(0)(agent)
                    resume_ns = time.monotonic_ns() + 700_000_000 if requests else 0

    thread = threading.Thread(target=control)
    thread.start()
    events = play(SCENARIOS["old-actions"], tmp_path, commands)
    stop.set()
    thread.join()
    assert judge(events, commands) == []
    assert not [event for event in events if isinstance(event, Note)]
    assert any(getattr(event, "rule", "") == "discard" for event in events)
