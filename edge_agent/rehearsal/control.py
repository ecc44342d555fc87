"""Answers requests as the daemon does, without a model: what it is asked to be, it is at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from edge_agent.time_units import NS_PER_MS
from edge_agent.wire.codec import encode
from edge_agent.wire.control import BadRequest, Reply, Request, read_request
from edge_agent.wire.messages import PROTOCOL_VERSION

MAX_TEXT_CHARS = 2000
ANSWER = "This is a rehearsal. There is no camera and no model."
CARRIED_OUT_LATE = ("pause", "cancel")  # a late stop is on the safe side
ENDS_OLDER_ACTIONS = ("pause", "instruct", "adapter")


class Refused(Exception):
    """The request is refused. One line: why."""


class ControlState:
    """What controllers have set by requests."""

    def __init__(self) -> None:
        self.is_paused = False
        self.instruction = "Land on the red disc."
        self.replied_ns = 0  # when a request that ends older actions was answered; 0: never
        self.unanswered: set[str] = set()  # operations of requests that get no reply

    def answer(self, payload: bytes, now_ns: int, counters: dict[str, Any], ask: Callable[[Request], None]) -> bytes:
        """The reply to a request. counters: the result of `stats`. ask: publishes an answer to a question as text."""
        try:
            request = read_request(payload)
            result = self._carry_out(request, now_ns, counters)
        except BadRequest as bad:
            return encode(Reply(v=PROTOCOL_VERSION, id=bad.id, ok=False, error=str(bad)))
        except Refused as refused:
            return encode(Reply(v=PROTOCOL_VERSION, id=request.id, ok=False, error=str(refused)))
        if request.op == "ask":
            ask(request)
        if request.op in ENDS_OLDER_ACTIONS:
            self.replied_ns = now_ns
        return encode(Reply(v=PROTOCOL_VERSION, id=request.id, ok=True, result=result))

    def leave_unanswered(self, payload: bytes) -> None:
        with contextlib.suppress(BadRequest):
            self.unanswered.add(read_request(payload).op)

    @property
    def may_stay_still(self) -> bool:
        """Whether a right controller need not follow: paused, or it waits for a reply without which it must not."""
        return self.is_paused or not self.unanswered.isdisjoint(ENDS_OLDER_ACTIONS)

    def _carry_out(self, request: Request, now_ns: int, counters: dict[str, Any]) -> dict[str, Any]:
        """The result. Raises Refused."""
        text = request.text.strip()
        late_ns = now_ns - request.expires_ns
        if request.expires_ns and late_ns > 0 and request.op not in CARRIED_OUT_LATE:
            raise Refused(f"expired {late_ns / NS_PER_MS:.0f} ms ago, when its sender stopped waiting; send it again")
        if request.op in ("instruct", "ask") and not 0 < len(text) <= MAX_TEXT_CHARS:
            raise Refused(f"text: expected 1 to {MAX_TEXT_CHARS} characters, found {len(text)}")
        if request.op == "adapter" and text:
            raise Refused(f"adapter: expected '', found {text[:64]!r}")
        if request.op == "vehicle_state" and not request.values:
            raise Refused("values: expected at least one value")
        if request.op in ("pause", "resume"):
            self.is_paused = request.op == "pause"
        if request.op == "instruct":
            self.instruction = text
        results: dict[str, dict[str, Any]] = {
            "pause": {"paused": True},
            "resume": {"paused": False},
            "instruct": {"instruction": self.instruction, "adapter": ""},
            "adapter": {"instruction": self.instruction, "adapter": ""},
            "ask": {"text": ANSWER, "frame_id": 0, "stop_reason": ""},
            "cancel": {"cancelled": False},
            "vehicle_state": {"refused": {}},
            "stats": counters,
        }
        return results[request.op]
