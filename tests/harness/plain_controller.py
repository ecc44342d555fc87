"""A controller written from PROTOCOL.md alone, with msgpack as plain maps and without edge_agent.client.

Each of its rules can be taken out by name, and then it does wrong in the scenario that is about this rule.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq

from edge_agent.rehearsal import Command
from edge_agent.time_units import NS_PER_MS, NS_PER_S

PERIOD_S = 0.02
RESUME_NS = 700 * NS_PER_MS  # from the reply to pause
NUMBERS = ("forward_m_s", "right_m_s", "down_m_s", "yaw_rate_rad_s")
FIELDS: dict[str, type] = {
    **dict.fromkeys(("kind", "bundle_id", "camera", "capture_clock", "action_space", "type", "instruction"), str),
    **dict.fromkeys(("v", "session", "seq", "t_pub_ns", "frame_id", "t_capture_ns", "valid_for_ms"), int),
    **dict.fromkeys(("valid_until_ns", "dropped_frames"), int),
    **dict.fromkeys(("stages_ms", "values", "clamped"), dict),
    "age_ms": float,
}
STAGES = ("queue", "encode", "prefill", "decode", "check")
OPTIONAL: dict[str, type] = {"adapter": str, "chunk": list, "chunk_step_ms": int}


class PlainController(threading.Thread):
    """Runs until close(). commands: what the vehicle was told, at every turn."""

    def __init__(self, folder: Path, without: str = "", requests: tuple[str, ...] = ()) -> None:
        """without: the rule that is taken out. requests: sent one after the other once it flies."""
        super().__init__(daemon=True)
        self.folder, self.without, self.requests = folder, without, list(requests)
        self.commands: list[Command] = []
        self.error: BaseException | None = None
        self._closed = threading.Event()
        self._action: dict[str, Any] | None = None
        self._later: list[dict[str, Any]] = []  # actions with future stamps, kept by who should not
        self._session, self._seq = 0, -1
        self._ended: set[int] = set()
        self._valid_from_ns = 0
        self._waits_for = ""  # id of a request
        self._send_ns = 0  # when the next request is sent, if it is a resume

    def __enter__(self) -> PlainController:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._closed.set()
        self.join()
        if self.error is not None:
            raise self.error

    def run(self) -> None:
        try:
            with zmq.Context() as context, contextlib.ExitStack() as stack:
                self._sub = stack.enter_context(context.socket(zmq.SUB))
                self._sub.setsockopt(zmq.SUBSCRIBE, b"" if self.without == "topic" else b"A")
                self._sub.connect(f"ipc://{self.folder}/actions")
                self._text = stack.enter_context(context.socket(zmq.SUB))
                self._text.setsockopt(zmq.SUBSCRIBE, b"T")
                self._text.connect(f"ipc://{self.folder}/text")
                self._dealer = stack.enter_context(context.socket(zmq.DEALER))
                self._dealer.setsockopt(zmq.LINGER, 0)
                self._dealer.setsockopt(zmq.IMMEDIATE, 1)
                self._dealer.connect(f"ipc://{self.folder}/control")
                while not self._closed.is_set():
                    self._turn()
        except BaseException as error:
            self.error = error

    def _turn(self) -> None:
        self._sub.poll(PERIOD_S * 1000)
        if self.without == "newest only":
            time.sleep(PERIOD_S)
        self._serve_control()
        for frames in self._received():
            self._take(frames)
        if self.without == "text is no command" and self._text.poll(0):
            text = msgspec.json.decode(msgspec.msgpack.decode(self._text.recv()[1:])["text"])
            self._command("move", dict.fromkeys(NUMBERS, 0.0) | {"forward_m_s": text["forward_m_s"]})
        t_ns = time.monotonic_ns()
        self._fly(t_ns)

    # -- what arrives -------------------------------------------------------------------------------------------------

    def _received(self) -> Iterator[list[bytes]]:
        messages = []
        with contextlib.suppress(zmq.Again):
            while self.without != "newest only" or not messages:
                messages.append(self._sub.recv_multipart(zmq.NOBLOCK))
        yield from messages[-1:] if self.without != "order" else messages

    def _take(self, frames: list[bytes]) -> None:
        if len(frames) != 1 and self.without != "one frame":
            return
        for frame in frames:
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError):
                message = msgspec.msgpack.decode(frame[1:])
                if len(frame) > 65536 and self.without != "size":
                    continue
                if isinstance(message, dict) and (frame[:1] == b"A" or self.without == "topic"):
                    self._take_message(message)

    def _take_message(self, message: dict[str, Any]) -> None:
        now_ns = time.monotonic_ns()
        if message.get("kind") == "refusal" and self._is_new(message):
            self._action = self._action if self.without == "refusals" else None
            return
        if self.without == "required fields":
            empty = {name: kind() for name, kind in FIELDS.items()}
            message = empty | {"kind": "action", "v": 1, "type": "move", "valid_until_ns": now_ns + 10**8} | message
            message["values"] = dict.fromkeys(NUMBERS, 0.0) | message["values"]
            message["stages_ms"] = dict.fromkeys(STAGES, 0.0) | (message["stages_ms"] or {})
            message |= {name: now_ns for name in ("t_pub_ns", "t_capture_ns") if not message[name]}
            message["seq"] = message["seq"] or self._seq + 1
            message["session"] = message["session"] or self._session
            message["capture_clock"] = message["capture_clock"] or "driver"
        if self.without == "unknown keys" and set(message) - set(FIELDS) - set(OPTIONAL):
            return
        if not self._is_action(message) or not self._is_new(message):
            return
        if self.without == "future, kept" and message["t_pub_ns"] > now_ns:
            self._later.append(message)
        elif self.without == "expired on arrival" and now_ns >= message["valid_until_ns"]:
            return
        elif self._is_timely(message, now_ns):
            self._action = dict(message)
            if self.without == "expiry by its own stamp":
                self._action["valid_until_ns"] = now_ns + message["valid_for_ms"] * NS_PER_MS

    def _is_action(self, message: dict[str, Any]) -> bool:
        types = {name: _is_a(message.get(name), kind) for name, kind in FIELDS.items()}
        types |= {name: name not in message or _is_a(message[name], kind) for name, kind in OPTIONAL.items()}
        if not all(types.values()) and self.without not in ("types", "version"):
            return False
        if not all(_is_a(message.get("stages_ms", {}).get(name), float) for name in STAGES if types["stages_ms"]):
            return False
        if message["v"] != 1 and self.without != "version":
            return False
        if message["kind"] != "action" and self.without != "kind":
            return False
        if message["capture_clock"] not in ("driver", "arrival", "sender") and self.without != "kind":
            return False
        values = message.get("values")
        if message["type"] in ("search", "hold", "land"):
            return self.without != "types without values"
        if message["type"] != "move" and self.without != "action type":
            return False
        return isinstance(values, dict) and all(self._is_number(values.get(name)) for name in NUMBERS)

    def _is_number(self, value: object) -> bool:
        if self.without == "types":
            with contextlib.suppress(ValueError, TypeError):
                value = float(value)  # type: ignore[arg-type]
        return _is_a(value, float) and (math.isfinite(value) or self.without == "finite")  # type: ignore[arg-type]

    def _is_new(self, message: dict[str, Any]) -> bool:
        session, seq = message["session"], message["seq"]
        if self.without == "seq":
            return True
        if self.without == "sessions":
            is_new, self._seq = seq > self._seq, max(seq, self._seq)
            return is_new
        if session in self._ended:
            return False
        if session != self._session:
            if self.without != "ended sessions":
                self._ended.add(self._session)
            self._session, self._seq = session, -1
        is_new = seq > self._seq and (self.without != "gaps" or seq < self._seq + 100)
        self._seq = max(seq, self._seq) if is_new else self._seq
        return is_new

    def _is_timely(self, message: dict[str, Any], now_ns: int) -> bool:
        without, t_pub_ns, until_ns = self.without, message["t_pub_ns"], message["valid_until_ns"]
        if t_pub_ns > now_ns + 5 * NS_PER_MS and without != "future":
            return False
        if message["t_capture_ns"] > t_pub_ns and without != "capture before publication":
            return False
        if until_ns - t_pub_ns > NS_PER_S and without not in ("validity of 1 s", "future", "types"):
            return False
        return bool(t_pub_ns > self._valid_from_ns)

    # -- what the vehicle is told -------------------------------------------------------------------------------------

    def _fly(self, t_ns: int) -> None:
        now_ns = time.monotonic_ns()
        for message in [kept for kept in self._later if kept["t_pub_ns"] <= now_ns]:
            self._later.remove(message)
            self._action = message
        action = self._action
        if self.without == "moving" or action is None:
            return self._command("hold", {}, t_ns)
        if self.without != "expiry" and now_ns >= int(action["valid_until_ns"]):
            self._action = None
            return self._command("hold", {}, t_ns)
        if action["type"] in ("search", "hold", "land"):
            return self._command(action["type"], {}, t_ns)
        values = {name: action["values"][name] for name in NUMBERS}
        if self.without == "values, not clamped":
            values |= action["clamped"]
        steps = [values, *action.get("chunk", [])]
        if self.without == "times of a chunk":
            for step in steps:
                self._command("move", step, t_ns)
            return None
        if action.get("chunk"):
            index = (now_ns - action["t_pub_ns"]) // (action["chunk_step_ms"] * NS_PER_MS)
            values = steps[min(index, len(steps) - 1)]
        return self._command("move", values, t_ns)

    def _command(self, kind: str, values: dict[str, Any], t_ns: int = 0) -> None:
        now_ns = time.monotonic_ns()
        self.commands.append(Command(t_ns or now_ns, kind, values, now_ns))

    # -- requests -----------------------------------------------------------------------------------------------------

    def _serve_control(self) -> None:
        if self._waits_for and self._dealer.poll(3000 if self.without == "requests beside the flight" else 0):
            reply = msgspec.msgpack.decode(self._dealer.recv())
            assert reply["ok"] and reply["id"] == self._waits_for
            self._waits_for = ""
            self._send_ns = time.monotonic_ns() + RESUME_NS
            if self.without != "actions before a reply":
                self._valid_from_ns = time.monotonic_ns()
        is_due = self._action is not None or (self.requests[:1] == ["resume"] and time.monotonic_ns() > self._send_ns)
        if self.requests and not self._waits_for and is_due:
            op = self.requests.pop(0)
            self._waits_for = f"{op}-{len(self.requests)}"
            request = {"v": 1, "id": self._waits_for, "op": op, "text": "Land." if op == "instruct" else ""}
            self._dealer.send(msgspec.msgpack.encode(request))


def _is_a(value: object, kind: type) -> bool:
    """Whether a value has the type of PROTOCOL.md: an integer is also a float, and a bool is neither."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) or (kind is float and isinstance(value, int))
