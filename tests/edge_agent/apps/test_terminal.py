"""edge-agent listen: correct figures, and no message from the wire controls the terminal."""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections.abc import Iterator
from typing import get_args

import msgspec
import numpy as np
import pytest
from rich.console import Console

from edge_agent.apps import screen, terminal
from edge_agent.apps.wire_log import WireLog, percentile
from edge_agent.client import Client
from edge_agent.wire.messages import Action, GovernorStatus, Lane, Refusal, StageTimes, Status, TextMessage
from tests.harness.fake_daemon import FakeDaemon, make_status

HEADER = {"v": 1, "session": 1, "seq": 0, "t_pub_ns": 10**9, "bundle_id": "ab"}
FRAME = {"camera": "c", "frame_id": 7, "t_capture_ns": 10**9, "capture_clock": "arrival", "dropped_frames": 0}
EVIL = ["\x1b[2J\x1b]0;owned\x07", "[/INST] [bold", "\x9b31m", "a\rb\x00"]


def action(age_ms: float, instruction: str = "go", **more: object) -> Action:
    return Action(
        **HEADER, **FRAME, age_ms=age_ms, instruction=instruction, action_space="s", type="move", clamped={},
        stages_ms=StageTimes(queue=1, encode=2, prefill=3, decode=age_ms, check=5),
        valid_for_ms=500, valid_until_ns=2 * 10**9, values={"forward_m_s": 1.5, "pace": "slow"} | more,
    )  # fmt: skip


def refusal(detail: str) -> Refusal:
    return Refusal(**HEADER, **FRAME, age_ms=1, reason="invalid", detail=detail, instruction="go")


def text(content: str, lane: str = "describe", final: bool = False) -> TextMessage:
    return TextMessage(**HEADER, lane=lane, frame_id=7, text=content, final=final)


def ticks(step_ns: int) -> Iterator[int]:
    return itertools.count(10**12, step_ns)


def rendered(log: WireLog, note: str = "") -> str:
    out = io.StringIO()
    Console(file=out, width=120, force_terminal=True, color_system=None).print(screen.render(log, note))
    return out.getvalue()


# -- figures ----------------------------------------------------------------------------------------------------------


def test_summary_is_counted_by_hand():
    clock = ticks(50_000_000)
    log = WireLog(clock=lambda: next(clock))
    for age in (10.0, 20.0, 30.0):
        log.record(action(age))
    log.record(refusal("x"))
    log.record(text("a"))
    figures = log.summary()
    assert figures["actions"] == 3 and figures["refusals"] == {"invalid": 1} and figures["text_messages"] == 1
    assert figures["age_ms_p50"] == 20.0 and figures["age_ms_p99"] == 29.8
    assert figures["decode_ms_p50"] == 20.0 and figures["queue_ms_p50"] == 1.0
    assert figures["actions_per_s"] == pytest.approx(2 / 0.15, abs=0.01)  # three actions within 150 ms
    assert log.answers_per_s == pytest.approx(20.0)  # four answers, 50 ms apart


def test_the_rate_is_that_of_the_last_thirty_answers():
    times_ns = iter([*range(0, 30 * 10**9, 10**9), *range(30 * 10**9, 35 * 10**9, 10**8)])
    log = WireLog(clock=lambda: next(times_ns))
    for n in range(80):
        log.record(action(10.0))
        if n == 29:
            assert log.answers_per_s == pytest.approx(1.0)
    assert log.answers_per_s == pytest.approx(10.0)


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 9.0], [float(n**2) for n in range(250)]])
@pytest.mark.parametrize("percent", [1, 50, 99])
def test_percentiles_are_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=0.0051)


def test_figures_without_messages_are_unknown_not_zero():
    log = WireLog()
    figures = log.summary()
    assert figures["actions"] == 0 and figures["age_ms_p50"] is None and figures["actions_per_s"] is None
    assert log.answers_per_s is None
    log.record(refusal("x"))
    assert log.summary()["actions_per_s"] is None and log.answers_per_s is None


# -- the live screen --------------------------------------------------------------------------------------------------


def test_screen_shows_action_text_status_and_note():
    log = WireLog()
    log.record(action(12.0))
    log.record(text("a red disc"))
    log.record(make_status("too hot"))
    shown = rendered(log, "UNTRAINED")
    for part in ("move", "forward_m_s +1.50", "pace slow", "age 12 ms", "a red disc", "UNTRAINED"):
        assert part in shown
    for part in ("running", "too hot", "mtmd", "80 MiB, restarts 2"):
        assert part in shown
    log.record(refusal("no such type"))
    log.record(make_status(rss_mib=None))
    shown = rendered(log)
    assert "none: invalid  no such type" in shown and "unknown, restarts 2" in shown


def test_the_screen_says_what_the_governor_limits():
    log = WireLog()
    log.record(make_status())
    assert "governor" not in rendered(log)
    limited = GovernorStatus(level=1, max_image_tokens=64, reason="at most 64 image tokens: 3 °C below the limit")
    log.record(msgspec.structs.replace(make_status(), governor=limited))
    assert "at most 64 image tokens: 3 °C below" in rendered(log)


def test_screen_without_messages_is_empty():
    assert "edge-agent" in rendered(WireLog())


def test_every_lane_is_kept_and_only_two_are_printed(capsys):
    log = WireLog()
    for lane in get_args(Lane):
        message = text(f"<{lane}>", lane, final=True)
        log.record(message)
        terminal.print_message(message)
    assert capsys.readouterr().out == "<describe>\n<answer>\n"
    assert log.text == {lane: f"<{lane}>\n" for lane in get_args(Lane)}
    reasoning = WireLog()
    reasoning.record(text("let me count", "reasoning"))
    assert "let me count" in rendered(reasoning)


@pytest.mark.parametrize("evil", EVIL)
def test_no_message_controls_the_terminal(evil, capsys):
    log = WireLog()
    forbidden = set("\x1b\x07\x9b\x00\r")
    messages = [action(1.0, instruction=evil, **{evil: evil}), text(evil), make_status(evil), refusal(evil)]
    messages.append(msgspec.structs.replace(make_status(), governor=GovernorStatus(level=1, reason=evil)))
    for message in messages:
        log.record(message)
        assert not set(rendered(log)) & forbidden
        terminal.print_message(message)
    printed = capsys.readouterr().out
    assert printed.count("\N{REPLACEMENT CHARACTER}") >= (evil != EVIL[1]) and not set(printed) & forbidden


# -- run --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path):
    with FakeDaemon(tmp_path) as opened:
        yield opened


def listen(daemon: FakeDaemon, folder: str, **options) -> WireLog:
    """Run until a status and a text have arrived; both are published again at every turn."""

    received: set[str] = set()

    class RecordingClient(Client):
        def status(self, timeout_s: float = 2.0) -> Status | None:
            message = super().status(timeout_s)
            received.update({"status"} if message else ())
            return message

        def next_text(self, timeout_s: float) -> TextMessage | None:
            message = super().next_text(timeout_s)
            received.update({"text"} if message else ())
            return message

    def ended() -> bool:
        daemon.publish("status", make_status())
        daemon.publish("text", text("a pad", final=True))
        return received == {"status", "text"}

    with RecordingClient(folder) as client:
        return terminal.run(client, ended=ended, **options)


def test_without_a_terminal_there_is_a_line_per_message(daemon, tmp_path, capsys):
    log = listen(daemon, str(tmp_path), note="UNTRAINED")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "UNTRAINED" and set(lines[1:]) == {"a pad"}
    assert log.status is not None and log.text["describe"].startswith("a pad\n")


def test_json_is_one_line_per_message_of_every_kind(daemon, tmp_path, capsys):
    listen(daemon, str(tmp_path), as_json=True, note="UNTRAINED")
    terminal.print_message(action(1.0), as_json=True)
    kinds = [json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()]
    assert set(kinds) == {"action", "status", "text"}


def test_on_a_terminal_there_is_a_screen_and_without_rich_there_are_lines(daemon, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stdout for a terminal
    listen(daemon, str(tmp_path))
    assert "╭─ edge-agent" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)  # an import raises ModuleNotFoundError
    listen(daemon, str(tmp_path))
    assert set(capsys.readouterr().out.splitlines()) == {"a pad"}


def test_it_ends_after_the_given_seconds(tmp_path):
    clock = ticks(400_000_000)
    with Client(str(tmp_path)) as client:
        assert terminal.run(client, seconds=2.0, clock=lambda: next(clock)).summary()["actions"] == 0
    assert next(clock) == 10**12 + 6 * 400_000_000  # the start, and five readings until two seconds have passed
