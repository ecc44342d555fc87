"""What a controller hears, on a terminal: the newest action, words as they stream, ages, stage times, rates.

It sees only the wire, through the client, like any controller. Without a terminal it prints a line per message.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import get_args

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from edge_agent.client import Client
from edge_agent.wire.messages import Action, Lane, Refusal, StageTimes, Status, TextMessage

TEXT_SHOWN_CHARS = 600
# What a model says may hold escape sequences; a terminal would obey them.
_CONTROL_CHARACTERS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], "\N{REPLACEMENT CHARACTER}") | {
    0x0A: "\n",
    0x09: " ",
}


def printable(text: str) -> str:
    """Text without control characters but the line feed."""
    return text.translate(_CONTROL_CHARACTERS)


class WireLog:
    """What was heard so far; `summary` makes figures of it."""

    def __init__(self) -> None:
        self.answer: Action | Refusal | None = None
        self.status: Status | None = None
        self.words: dict[str, str] = dict.fromkeys(get_args(Lane), "")
        self.ages_ms: list[float] = []
        self.stages: list[StageTimes] = []
        self.refusals: dict[str, int] = {}
        self.times_s: deque[float] = deque(maxlen=30)
        self.first_s = self.last_s = 0.0
        self.n_words = 0

    def take(self, message: Action | Refusal | TextMessage | Status) -> None:
        if isinstance(message, Status):
            self.status = message
        elif isinstance(message, TextMessage):
            self.n_words += 1
            ended = "\n" if message.final else ""
            self.words[message.lane] = (self.words[message.lane] + printable(message.text) + ended)[-TEXT_SHOWN_CHARS:]
        else:
            self.answer = message
            now_s = time.monotonic()
            self.first_s, self.last_s = self.first_s or now_s, now_s
            self.times_s.append(now_s)
            if isinstance(message, Action):
                self.ages_ms.append(message.age_ms)
                self.stages.append(message.stages_ms)
            else:
                self.refusals[message.reason] = self.refusals.get(message.reason, 0) + 1

    @property
    def rate_hz(self) -> float:
        """Answers per second over the last thirty."""
        span_s = self.times_s[-1] - self.times_s[0] if len(self.times_s) > 1 else 0.0
        return (len(self.times_s) - 1) / span_s if span_s else 0.0

    def summary(self) -> dict[str, float | int | dict | None]:
        span_s = self.last_s - self.first_s
        return {
            "actions": len(self.ages_ms),
            "refusals": self.refusals,
            "text": self.n_words,
            "actions_per_s": round((len(self.ages_ms) - 1) / span_s, 2) if span_s and self.ages_ms else None,
            "age_ms_p50": _percentile(self.ages_ms, 0.5),
            "age_ms_p99": _percentile(self.ages_ms, 0.99),
        } | {
            f"{name}_ms_p50": _percentile([getattr(stages, name) for stages in self.stages], 0.5)
            for name in StageTimes.__struct_fields__
        }


def _percentile(values: list[float], part: float) -> float | None:
    return round(sorted(values)[min(len(values) - 1, int(part * len(values)))], 2) if values else None


def show(
    client: Client,
    seconds: float | None,
    as_json: bool = False,
    note: str = "",
    ended: Callable[[], bool] = lambda: False,
) -> WireLog:
    """Listen for so many seconds (None: until Ctrl-C), or until `ended()`, and show it. `note` stands above all."""
    heard, console = WireLog(), Console()
    until_s = time.monotonic() + seconds if seconds is not None else float("inf")
    live = None
    if console.is_terminal and not as_json:
        live = Live(console=console, refresh_per_second=10, transient=False)
        live.start()
    elif note and not as_json:
        print(note, flush=True)
    try:
        while time.monotonic() < until_s and not ended():
            for message in _receive(client):
                heard.take(message)
                if live is None:
                    _print_line(message, as_json)
            if live is not None:
                live.update(_screen(heard, note))
    finally:
        if live is not None:
            live.stop()
    return heard


def _receive(client: Client) -> list[Action | Refusal | TextMessage | Status]:
    found: list = []
    if (answer := client.next_answer(0.02)) is not None:
        found.append(answer)
    for _ in range(200):
        if (words := client.next_text(0.0)) is None:
            break
        found.append(words)
    if (status := client.status(0.0)) is not None:
        found.append(status)
    return found


def _print_line(message: Action | Refusal | TextMessage | Status, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(message).decode(), flush=True)
    elif isinstance(message, Action):
        values = " ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in message.values.items()
        )
        print(f"frame {message.frame_id}: {message.type} {values} (age {message.age_ms:.0f} ms)", flush=True)
    elif isinstance(message, Refusal):
        print(f"frame {message.frame_id}: no action: {message.reason} {printable(message.detail)}", flush=True)
    elif isinstance(message, TextMessage) and message.lane in ("describe", "answer"):
        print(printable(message.text), end="\n" if message.final else "", flush=True)
    sys.stdout.flush()


def _screen(heard: WireLog, note: str) -> Group:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", width=10)
    table.add_column()
    answer, status = heard.answer, heard.status
    if isinstance(answer, Action):
        values = "  ".join(
            f"{name} {value:+.2f}" if isinstance(value, float) else f"{name} {value}"
            for name, value in answer.values.items()
        )
        table.add_row("action", Text(f"{answer.type}  {values}", style="bold green"))
        s = answer.stages_ms
        table.add_row(
            "stages",
            f"queue {s.queue:.1f}  encode {s.encode:.1f}  prefill {s.prefill:.1f}  "
            f"decode {s.decode:.1f}  check {s.check:.2f} ms",
        )
    elif answer is not None:
        table.add_row("action", Text(printable(f"none: {answer.reason}  {answer.detail}"), style="bold yellow"))
    if answer is not None:
        table.add_row(
            "frame",
            f"{answer.frame_id}   age {answer.age_ms:.0f} ms   {heard.rate_hz:.1f} answers/s   "
            f"dropped {answer.dropped_frames}",
        )
        table.add_row("instruction", Text(printable(answer.instruction)))  # Text: brackets in a string would be markup
    if status is not None:
        table.add_row("state", Text(printable(f"{status.state}  {status.reason}")))
        table.add_row("vision", status.vision_backend)
        memory = f"{status.model_worker.rss_mib:.0f} MiB" if status.model_worker.rss_mib is not None else "unknown"
        table.add_row("model", f"{memory}, restarts {status.model_worker.restarts}")
    newest = heard.words["describe"] or heard.words["reasoning"] or heard.words["action"]
    words = Text(newest[-300:], style="cyan")
    parts = [Panel(table, title="edge-agent", title_align="left"), Panel(words, title="text", title_align="left")]
    return Group(*([Text(note, style="bold red")] if note else []), *parts)
