"""The scripts of the scenarios: what is sent, and what the controller has to do before the script goes on.

`follow` and `fly`: the action may be followed while it stands. `discard`: the message must not be followed. `hold`: the
controller has to hold. Each message has values that no other one of the script has.
"""

from __future__ import annotations

import functools
import time
from typing import Any, get_args

from edge_agent.rehearsal.player import LONG_MS, SETTLE_S, TRIES, VALID_MS, Fields, Player
from edge_agent.rehearsal.records import Due, key_of, keys_of
from edge_agent.time_units import NS_PER_MS, NS_PER_S
from edge_agent.wire.codec import encode
from edge_agent.wire.messages import MAX_MESSAGE_BYTES, RefusalReason
from edge_agent.zmtp.frames import pack_message

KEPT_MS = 1500  # further in the future than a slow machine needs to read a message
LONG_SESSION = 5000  # messages before: the next session does not get there
NAN, INFINITY = float("nan"), float("inf")

# -- the daemon works -------------------------------------------------------------------------------------------------


def normal_flight(p: Player) -> None:
    p.fly(8)


def slow_rate(p: Player) -> None:
    for _ in range(2):
        p.fly(period_s=0.5, valid_for_ms=200)
        p.hold("the action has expired, the next one has not come")


def burst(p: Player) -> None:
    """The newest of 100 actions is followed while it stands, which who reads one after the other never manages."""
    for i in range(TRIES if p.sees_commands else 1):
        begin, since_ns = len(p.commands), time.monotonic_ns()
        for n in range(100):
            newest = p.follow("100 actions per second", valid_for_ms=LONG_MS)
            p.wait(max(0, since_ns + (n + 1) * 10 * NS_PER_MS - time.monotonic_ns()) / NS_PER_S)
        if p.control.is_paused:
            return
        due = Due(since_ns, "follow", "the newest of 100 actions", begin, begin, keys=keys_of(newest))
        left_s = (p.valid_until_ns - time.monotonic_ns()) / NS_PER_S
        if p.wait_for(due, left_s) or i == TRIES - 1:
            p.demand(due._replace(end=len(p.commands)))
            return


def clamped(p: Player) -> None:
    p.fly(3, "an action with `clamped`", clamped={p.forward: 9.5, next(iter(p.other_values)): -9.5})


def chunk(p: Player) -> None:
    flight = {"n_chunk": 4, "chunk_step_ms": 150, "valid_for_ms": LONG_MS}
    p.fly(1, "an action with a chunk of four steps", period_s=1.1, **flight)
    p.hold("the chunk has expired")
    p.fly(2, "an action with a chunk, which the next one replaces", period_s=0.2, **flight)
    p.hold("the chunk has expired")


def action_types(p: Player) -> None:
    for name in ("search", "hold"):
        text = f"the action type {name}"
        publish = functools.partial(p.follow, text, type=name, values={})
        p.stop_in_flight(text, publish, ends=("hold", name))
        p.hold(f"{text} has expired")
    p.fly()


# -- no valid action --------------------------------------------------------------------------------------------------


def silence(p: Player) -> None:
    p.fly()
    p.hold("no more actions; status goes on")
    p.wait(0.5)
    p.fly()


def hanging_daemon(p: Player) -> None:
    p.fly()
    p.hangs = True
    p.hold("the daemon hangs: no actions, no status, and the connections stay")
    p.hangs = False
    p.fly()


def refusals(p: Player) -> None:
    for reason in get_args(RefusalReason):
        p.refuse_in_flight(reason)


def paused(p: Player) -> None:
    p.fly()
    paused_ns = time.monotonic_ns()
    p.control.is_paused = True
    p.publish_status()
    p.publish_refusal("paused")
    p.hold("paused by somebody else", paused_ns)
    p.wait(0.5)
    p.control.is_paused = False
    p.publish_status()
    p.fly()


def silent_control(p: Player) -> None:
    """Who has sent `instruct` or `adapter` need not follow anything before the reply."""
    p.answers_requests = False
    for _ in range(2):
        p.fly(3)
        p.hold("the action has expired, and no request gets a reply")


def old_actions(p: Player) -> None:
    """Judged only if the controller sends a request: `pause`, `instruct` or `adapter`."""
    for _ in range(20):
        p.fly()
        if p.wait(0.1, lambda: p.control.replied_ns > 0):
            break
    replied_ns = p.control.replied_ns
    if not replied_ns:
        p.note("not judged: the controller sent no `pause`, `instruct` or `adapter`")
        return
    p.wait(0.3)
    stamps: dict[str, Any] = {"t_pub_ns": replied_ns - NS_PER_MS, "t_capture_ns": replied_ns - 40 * NS_PER_MS}
    p.discard("published before the reply to a request", valid_for_ms=LONG_MS, **stamps)
    p.hold("no action is newer than the reply")
    p.wait(2.0, lambda: not p.control.is_paused)
    p.fly()


# -- the daemon ends --------------------------------------------------------------------------------------------------


def stopped_daemon(p: Player) -> None:
    p.seq["actions"] = LONG_SESSION
    p.fly()
    p.stop()
    p.hold("the daemon was stopped")
    p.start_again()
    p.fly()


def killed_daemon(p: Player) -> None:
    p.seq["actions"] = LONG_SESSION
    p.fly()
    old_session, old_seq = p.session, p.seq["actions"]
    p.die("the daemon is killed")
    p.hold("the daemon was killed")
    p.start_again()
    p.fly()
    p.hold("the action has expired")
    p.discard("a message of the session that has ended", session=old_session, seq=old_seq - 1)
    p.discard("a message of the session that has ended", session=old_session, seq=old_seq + 1)
    p.fly()


def half_message(p: Player) -> None:
    p.seq["actions"] = LONG_SESSION
    p.fly()
    data = pack_message(b"A" + encode(p.action()))
    p.die("half a message, then the daemon is killed", data[: len(data) // 2])
    p.hold("the daemon was killed in the middle of a message")
    p.start_again()
    p.fly()


# -- time stamps and numbers ------------------------------------------------------------------------------------------


def expired(p: Player) -> None:
    p.fly()
    p.hold("the action has expired")
    for late_ms in (0, 1, 400, 2_500, 3_600_000):
        p.discard(f"expired {late_ms} ms before it was sent", **_late_by(late_ms))
    p.fly()


def expired_after_valid(p: Player) -> None:
    text = "an action that had expired when it was sent"

    def late_action() -> None:
        p.send("discard", text, p.action(**_late_by(50)))

    def refusal_and_late_action() -> None:
        p.publish_refusal("late")
        late_action()

    p.stop_in_flight(text, late_action)
    p.stop_in_flight(f"a refusal and, at once, {text}", refusal_and_late_action)
    p.fly()


def _late_by(late_ms: int) -> dict[str, Any]:
    """The stamps of an action that expired late_ms before now."""
    t_pub_ns = time.monotonic_ns() - (VALID_MS + late_ms) * NS_PER_MS
    return {"t_pub_ns": t_pub_ns, "t_capture_ns": t_pub_ns - 40 * NS_PER_MS, "valid_for_ms": VALID_MS}


def future_stamps(p: Player) -> None:
    p.fly()
    p.hold("the action has expired")
    for ahead_ms in (3_600_000, 60_000, KEPT_MS):
        p.discard(f"published {ahead_ms} ms in the future", t_pub_ns=time.monotonic_ns() + ahead_ms * NS_PER_MS)
    p.wait(KEPT_MS / 1000)  # an action that was kept would look valid now
    p.fly()


def wrong_times(p: Player) -> None:
    p.fly()
    p.hold("the action has expired")
    now_ns = time.monotonic_ns()
    p.discard("valid for 10 s", valid_until_ns=now_ns + 10 * NS_PER_S)
    old: dict[str, Any] = {"t_pub_ns": now_ns - 10 * NS_PER_S, "t_capture_ns": now_ns - 11 * NS_PER_S}
    p.discard("published 10 s ago, and still valid", valid_until_ns=now_ns + NS_PER_S, **old)
    p.discard("captured after its publication", t_capture_ns=time.monotonic_ns() + NS_PER_S)
    p.discard("valid for no time", valid_for_ms=0)
    p.fly()


def replayed(p: Player) -> None:
    p.fly(3)
    p.fly(period_s=LONG_MS / 1000, valid_for_ms=LONG_MS)  # the controller has read the newest message
    last = p.seq["actions"] - 1
    for seq in (last, last - 1, 0):
        p.discard(f"seq {seq} again, with stamps of now and other values", seq=seq)
    p.hold("the action has expired")
    for seq in (last, 0):
        p.discard(f"seq {seq} again, with stamps of now and other values", seq=seq)
    older = p.action(valid_for_ms=LONG_MS)
    p.send("follow", "a valid action", older)
    p.fly()
    p.replay(older, "the bytes of an older action, which has not expired")
    p.hold("the action has expired")
    p.refuse_in_flight("late")
    p.replay(older, "the bytes of an action from before the refusal")
    p.fly()


def gaps(p: Player) -> None:
    for n_lost in (1, 1000, 10**9):
        p.fly(2, f"an action after {n_lost} lost messages")
        p.seq["actions"] += n_lost
    p.fly()


# -- messages of other kinds and forms --------------------------------------------------------------------------------


def unknown_keys(p: Player) -> None:
    p.fly(3, "an action with unknown keys, in another order, with integers for floats", alter=_of_a_later_release)


def _of_a_later_release(fields: Fields) -> Fields:
    fields |= {"wind_m_s": [1.0, None], "note": "a later release", "nested": {"values": {}}, "age_ms": 40}
    fields["stages_ms"] |= {"queue": 1, "network": 2.5}
    fields["values"] |= {name: 0 for name in ("down_m_s", "down_m") if name in fields["values"]}
    return dict(reversed(fields.items()))


def unknown_kinds(p: Player) -> None:
    p.fly()
    p.hold("the action has expired")
    for text, changes in {
        "another `kind`": {"kind": "advice"},
        "a `capture_clock` that is in no list": {"capture_clock": "sundial"},
    }.items():
        p.discard(text, p.action() | changes)
    p.discard("a type that the action space does not have", type="drive")
    p.discard("an action space of another robot", action_space="rover", type="drive")
    p.fly(valid_for_ms=LONG_MS)
    refusal = p.action(values=None) | {"kind": "refusal", "reason": "solar-flare", "detail": ""}
    p.send("none", "a refusal with a reason that is in no list", refusal)


def wrong_version(p: Player) -> None:
    p.fly()
    p.hold("the action has expired")
    for version in (2, 0, -1, "1", None, True):
        p.discard(f"`v` is {version!r}", p.action() | {"v": version})
    p.fly()


REQUIRED = (
    "kind", "v", "session", "seq", "t_pub_ns", "bundle_id", "camera", "frame_id", "t_capture_ns", "capture_clock",
    "age_ms", "stages_ms", "valid_for_ms", "valid_until_ns", "action_space", "type", "clamped", "instruction",
    "dropped_frames",
)  # fmt: skip


def missing_fields(p: Player) -> None:
    p.fly()
    p.hold("the action has expired")
    for name in REQUIRED:
        fields = p.action()
        del fields[name]
        p.send("discard", f"without `{name}`", fields)
        p.wait(SETTLE_S / 3)
    fields = p.action()
    del fields["stages_ms"]["decode"]
    p.discard("without `stages_ms.decode`", fields)
    fields = p.action()
    del fields["values"][list(p.other_values)[-1]]
    p.discard("without one of the values that the action type has", fields)
    p.fly()


def wrong_types(p: Player) -> None:
    p.fly()
    p.hold("the action has expired")
    fields = p.action()
    changes = {
        "seq": str(fields["seq"]),
        "t_pub_ns": float(fields["t_pub_ns"]),
        "valid_until_ns": None,
        "valid_for_ms": "300",
        "t_capture_ns": [],
        "type": 1,
        "session": 1.5,
        "clamped": [],
        "stages_ms": 3.0,
        "chunk": {},
        "instruction": b"Land.",
    }
    for name, value in changes.items():
        p.send("discard", f"`{name}` is {type(value).__name__}", p.action() | {name: value})
        p.wait(SETTLE_S / 3)
    for value in ("0.1", None, True, [0.1]):
        fields = p.action()
        fields["values"][next(iter(p.other_values))] = value
        p.discard(f"one of the values is {value!r}", fields)
    p.fly()


def not_finite(p: Player) -> None:
    p.fly()
    p.hold("the action has expired")
    for value in (NAN, INFINITY, -INFINITY):
        fields = p.action()
        fields["values"][next(iter(p.other_values))] = value
        p.discard(f"one of the values is {value}", fields)
        fields = p.action()
        fields["values"][p.forward] = value
        p.discard(f"one of the values is {value}", fields)
    p.fly()


def not_messages(p: Player) -> None:
    p.fly()
    p.hold("the action has expired")
    for topic in (b"AA", b"", b"a", b"S", b"T"):
        p.send("discard", f"topic {topic!r}", p.action(), topic)
        p.wait(SETTLE_S / 3)
    p.wait(SETTLE_S)
    p.send("discard", "two ZeroMQ frames, of which each is an action", p.action(), more=(b"A" + encode(p.action()),))
    p.wait(SETTLE_S)
    for body in (b"", b"\xc1", b"\x80", bytes(1000), b"\x91" * 40_000, b"\xff" * 60_000):
        p.send_bytes("actions", b"A" + body)
    p.send_bytes("actions", b"")
    p.discard("a message of more than 65 536 bytes", p.action() | {"note": "x" * MAX_MESSAGE_BYTES})
    p.fly()


def text_lane(p: Player) -> None:
    p.fly()
    p.hold("the action has expired")
    for lane in ("action", "describe", "answer"):
        key = key_of(p.values()) or 0
        p.publish_text(lane, f'{{"action":"{p.type}","{p.forward}":{key / 1000},"vx":{key / 1000},"x":{key / 1000}}}')
        p.wait(SETTLE_S)
    p.fly()
