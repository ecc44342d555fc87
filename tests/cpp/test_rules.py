"""The rules for a controller in PROTOCOL.md, one row each, with times that the test chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from edge_agent.time_units import NS_PER_MS
from edge_agent.wire.messages import Action, Refusal
from edge_agent.wire.streams import pack
from tests.harness.fake_daemon import make_action, make_refusal

START_NS = 10**15
NONE_YET = "hold: no action yet"
SUSPENDED = "hold: the machine was suspended"


class Script:
    """Messages and looks at their times, for one Follower; what it said at each look."""

    def __init__(self) -> None:
        self.records: list[tuple[str, int, int, bytes]] = [("n", 0, 0, b"")]

    def action(self, at_ms: float, seq: int, *, published_ms: float | None = None, **changes: Any) -> Script:
        """An action that is valid for 500 ms, published when it arrives."""
        published_ns = ns(at_ms if published_ms is None else published_ms)
        return self.message(at_ms, make_action(seq, now_ns=published_ns, **{"type": "move"} | changes))

    def refusal(self, at_ms: float, seq: int, **changes: Any) -> Script:
        return self.message(at_ms, msgspec.structs.replace(make_refusal(seq), **{"t_pub_ns": ns(at_ms)} | changes))

    def message(self, at_ms: float, message: Action | Refusal, **fields: Any) -> Script:
        payload = pack("actions", message)
        if fields:
            payload = b"A" + msgspec.msgpack.encode(msgspec.msgpack.decode(payload[1:]) | fields)
        self.records.append(("r", ns(at_ms), 0, payload))
        return self

    def look(self, at_ms: float, suspended_ms: float = 0) -> Script:
        self.records.append(("a", ns(at_ms), round(suspended_ms * NS_PER_MS), b""))
        return self

    def discard_before(self, at_ms: float) -> Script:
        self.records.append(("d", ns(at_ms), 0, b""))
        return self


def ns(ms: float) -> int:
    return START_NS + round(ms * NS_PER_MS)


def started() -> Script:
    """After the first hold, which comes before any action."""
    return Script().look(0)


def other(seq: int, **changes: Any) -> dict:
    return {"seq": seq, "session": 2} | changes


# What happens -> what the follower says at each look, but for the counters.
ROWS: dict[str, tuple[Script, list[str]]] = {
    "holds before the first action": (
        Script().look(0).look(1),
        [f"change {NONE_YET}", f"same {NONE_YET}"],
    ),
    "an action, as long as it is valid": (
        started().action(1, 0).look(1).look(500.999).look(501).look(502),
        ["change move 0", "same move 0", "change hold: expired", "same hold: expired"],
    ),
    "expired on arrival": (started().action(700, 0, published_ms=0).look(700), ["change hold: expired"]),
    "an expired action ends an older one that is valid": (
        started().action(0, 0, valid_ms=900).look(0).action(200, 1, published_ms=1, valid_ms=100).look(200),
        ["change move 0", "change hold: expired"],
    ),
    "a newer action replaces the older one": (
        started().action(1, 0).look(1).action(2, 1).look(2).look(501.5),
        ["change move 0", "change move 1", "same move 1"],
    ),
    "newest only": (started().action(1, 0).action(2, 1).action(3, 2).look(3), ["change move 2"]),
    "a refusal": (
        started().action(1, 0).look(1).refusal(2, 1).look(2).look(3),
        ["change move 0", "change hold: refusal: late", "same hold: refusal: late"],
    ),
    "a refusal between two actions that are read together": (
        started().action(1, 0).look(1).refusal(2, 1).action(3, 2).look(3).look(3),
        ["change move 0", "change hold: refusal: late", "change move 2"],
    ),
    "an expiry that nobody looked at, before a newer action": (
        started().action(1, 0).look(1).action(600, 1).look(600).look(600),
        ["change move 0", "change hold: expired", "change move 1"],
    ),
    "the time of capture of a refusal may be in the future": (
        started()
        .action(1, 0)
        .look(1)
        .refusal(2, 1, reason="future-timestamp", t_capture_ns=ns(5000))
        .look(2)
        .action(3, 1)
        .look(3),
        ["change move 0", "change hold: refusal: future-timestamp", "same hold: refusal: future-timestamp"],
    ),
    "5 ms in the future": (started().action(0, 0, published_ms=5).look(0), ["change move 0"]),
    "more than 5 ms in the future": (started().action(0, 0, published_ms=5.001).look(0), [f"same {NONE_YET}"]),
    "captured after its publication": (started().action(0, 0, age_ms=-0.001).look(0), [f"same {NONE_YET}"]),
    "valid for 1 s": (started().action(0, 0, valid_ms=1000).look(0), ["change move 0"]),
    "valid for more than 1 s": (
        started().action(0, 0, valid_until_ns=ns(1000) + 1).look(0),
        [f"same {NONE_YET}"],
    ),
    "times that would overflow": (
        started()
        .action(0, 0, t_pub_ns=-(2**63), t_capture_ns=-(2**63), valid_until_ns=2**63 - 1)
        .action(0, 1, t_pub_ns=2**63 - 1, valid_until_ns=-(2**63))
        .action(0, -(2**63))
        .look(0),
        [f"same {NONE_YET}"],
    ),
    "another clock changes nothing": (
        started().action(0, 0).action(0, 900, published_ms=60_000, session=2).look(0).action(1, 1).look(1),
        ["change move 0", "change move 1"],
    ),
    "the same message again": (
        started().action(0, 0).look(0).action(0, 0).look(1).look(500).action(500, 0).look(501),
        ["change move 0", "same move 0", "change hold: expired", "same hold: expired"],
    ),
    "an older message": (
        started().action(0, 7).look(0).refusal(1, 6).action(1, 5).look(1),
        ["change move 7", "same move 7"],
    ),
    "a new session": (
        started().action(0, 7).look(0).action(1, **other(0)).look(1).look(1),
        ["change move 7", "change hold: new session", "change move 0"],
    ),
    "the old session after the new one": (
        started().action(0, 7).action(5, **other(0)).look(5).look(5).action(6, 8).action(6, 8, published_ms=4).look(6),
        ["change hold: new session", "change move 0", "same move 0"],
    ),
    "before a suspend": (
        started().action(0, 0).look(0).look(1, 10).look(1, 10.001).action(2, 1, published_ms=0.5).look(2, 10.001),
        [
            "change move 0",
            "same move 0",
            f"change {SUSPENDED}",
            f"same {SUSPENDED}",
        ],
    ),
    "after a suspend": (
        started().look(1, 5000).action(2, 1).look(2, 5000).look(3, 5000).look(4, 5009).look(5, 5011),
        [
            f"same {NONE_YET}",
            "change move 1",
            "same move 1",
            "same move 1",
            f"change {SUSPENDED}",
        ],
    ),
    "a first reading that was too large": (
        Script().look(0, 3000).look(0, 0).action(1, 0).look(1, 0).look(2, 20),
        [
            f"change {NONE_YET}",
            f"same {NONE_YET}",
            "change move 0",
            f"change {SUSPENDED}",
        ],
    ),
    "before the reply to a request": (
        started().action(0, 0).look(0).discard_before(2).action(3, 1, published_ms=1.9).look(3).action(4, 2).look(4),
        ["change move 0", "change hold: told to", "change move 2"],
    ),
    "an unknown kind": (
        started().action(0, 0).look(0).message(1, make_action(1, now_ns=ns(1)), kind="plan").look(1),
        ["change move 0", "same move 0"],
    ),
    "a refusal of an unknown reason": (
        started().action(0, 0).look(0).message(1, make_refusal(1, t_pub_ns=ns(1)), reason="tired").look(1),
        ["change move 0", "same move 0"],
    ),
    "another version": (started().message(0, make_action(0, now_ns=ns(0)), v=2).look(0), [f"same {NONE_YET}"]),
    "a field of a later release": (
        started().message(0, make_action(0, now_ns=ns(0), type="land"), wind={"from": [1, None]}).look(0),
        ["change land 0"],
    ),
}


def said(probe: Callable[[list], list[str]], script: Script) -> list[str]:
    lines = probe(script.records)
    return [line for record, line in zip(script.records, lines, strict=True) if record[0] == "a"]


@pytest.mark.parametrize("name", ROWS)
def test_rule(probe, name):
    script, expected = ROWS[name]
    found = [line.split(" lost=")[0].removesuffix(" new") for line in said(probe, script)]
    assert found[len(found) - len(expected) :] == expected


def test_gaps_are_counted_and_what_is_discarded(probe):
    script = (
        started().action(0, 3).action(1, 4).action(2, 9).action(2, 9).action(3, **other(100)).action(4, **other(102))
    )
    assert said(probe, script.look(4))[-1].endswith("lost=5 discarded=1")
    assert said(probe, started().action(0, 0, published_ms=900).look(0))[-1].endswith("lost=0 discarded=1")


def test_the_first_message_of_each_session_is_told(probe):
    lines = said(probe, Script().look(0).action(1, 0).look(1))
    assert ["new" in line.split() for line in lines] == [False, True]
