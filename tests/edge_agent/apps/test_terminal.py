"""What a person sees: figures right, and nothing that a message says takes over the terminal."""

from __future__ import annotations

import io
from typing import get_args

import pytest
from rich.console import Console

from edge_agent.apps import terminal
from edge_agent.wire.messages import Action, Lane, Refusal, StageTimes, TextMessage

HEADER = {"v": 1, "session": 1, "seq": 0, "t_pub_ns": 10**9, "bundle_id": "ab"}
SEEN = {"camera": "c", "frame_id": 7, "t_capture_ns": 10**9, "capture_clock": "arrival", "dropped_frames": 0}


def action(age_ms: float, instruction: str = "go", **more: object) -> Action:
    return Action(
        **HEADER, **SEEN, age_ms=age_ms, instruction=instruction, action_space="s", type="move", clamped={},
        stages_ms=StageTimes(queue=1, encode=2, prefill=3, decode=age_ms, check=5),
        valid_for_ms=500, valid_until_ns=2 * 10**9, values={"forward_m_s": 1.5, "pace": "slow"} | more,
    )  # fmt: skip


def refusal(detail: str) -> Refusal:
    return Refusal(**HEADER, **SEEN, age_ms=1, reason="invalid", detail=detail, instruction="go")


def shown(heard: terminal.WireLog, note: str = "") -> str:
    out = io.StringIO()
    Console(file=out, width=120, force_terminal=True, color_system=None).print(terminal._screen(heard, note))
    return out.getvalue()


def test_summary_is_counted_by_hand():
    heard = terminal.WireLog()
    for age in (10.0, 20.0, 30.0):
        heard.take(action(age))
    heard.take(refusal("x"))
    figures = heard.summary()
    assert figures["actions"] == 3 and figures["refusals"] == {"invalid": 1}
    assert figures["age_ms_p50"] == 20.0 and figures["age_ms_p99"] == 30.0
    assert figures["decode_ms_p50"] == 20.0 and figures["queue_ms_p50"] == 1.0


def test_summary_of_nothing_says_unknown_not_zero():
    figures = terminal.WireLog().summary()
    assert figures["actions"] == 0 and figures["age_ms_p50"] is None and figures["actions_per_s"] is None


def test_screen_shows_action_words_and_note():
    heard = terminal.WireLog()
    heard.take(action(12.0))
    heard.take(TextMessage(**HEADER, lane="describe", frame_id=7, text="a red disc"))
    text = shown(heard, "UNTRAINED")
    for word in ("move", "forward_m_s +1.50", "pace slow", "age 12 ms", "a red disc", "UNTRAINED"):
        assert word in text


def test_every_lane_is_heard_and_answers_come_before_thoughts(capsys):
    heard = terminal.WireLog()
    for lane in get_args(Lane):
        message = TextMessage(**HEADER, lane=lane, frame_id=7, text=f"<{lane}>", final=True)
        heard.take(message)
        terminal._print_line(message, as_json=False)
    assert capsys.readouterr().out == "<describe>\n<answer>\n"
    assert heard.words == {lane: f"<{lane}>\n" for lane in get_args(Lane)}
    thinking = terminal.WireLog()
    thinking.take(TextMessage(**HEADER, lane="reasoning", frame_id=7, text="let me see"))
    assert "let me see" in shown(thinking)


@pytest.mark.parametrize("evil", ["\x1b[2J\x1b]0;owned\x07", "[/INST] [bold", "\x9b31m", "a\rb\x00"])
def test_no_message_takes_over_the_terminal(evil, capsys):
    heard = terminal.WireLog()
    messages = [
        action(1.0, instruction=evil),
        TextMessage(**HEADER, lane="describe", frame_id=7, text=evil),
        refusal(evil),
    ]
    for message in messages:
        heard.take(message)
        assert not set(shown(heard)) & set("\x1b\x07\x9b\x00\r")
        terminal._print_line(message, as_json=False)
    assert not set(capsys.readouterr().out) & set("\x1b\x07\x9b\x00\r")


def test_json_lines(capsys):
    import json

    terminal._print_line(action(1.0), as_json=True)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and json.loads(line)["kind"] == "action"
