"""The live screen of edge-agent listen. Needs the package rich (extra `terminal`)."""

from __future__ import annotations

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from edge_agent.apps.wire_log import WireLog, printable
from edge_agent.wire.messages import Action, Refusal, Status

REFRESHES_PER_S = 10
TEXT_CHARACTERS = 300  # of the newest text


class Screen:
    """Owns the terminal until close()."""

    def __init__(self, console: Console, note: str = "") -> None:
        """note: a warning that stays above everything else."""
        self._note = note
        self._live = Live(console=console, refresh_per_second=REFRESHES_PER_S, transient=False)
        self._live.start()

    def show(self, log: WireLog) -> None:
        self._live.update(render(log, self._note))

    def close(self) -> None:
        self._live.stop()


def render(log: WireLog, note: str = "") -> Group:
    """Everything as one picture. Strings from the wire are Text objects: brackets in a plain string are markup."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", width=11)
    table.add_column()
    for name, value in _answer_rows(log) + _status_rows(log.status):
        table.add_row(name, value)
    newest = log.text["describe"] or log.text["reasoning"] or log.text["action"]
    text = Text(newest[-TEXT_CHARACTERS:], style="cyan")
    parts = [Panel(table, title="edge-agent", title_align="left"), Panel(text, title="text", title_align="left")]
    return Group(*([Text(note, style="bold red")] if note else []), *parts)


def _answer_rows(log: WireLog) -> list[tuple[str, Text]]:
    answer = log.answer
    if answer is None:
        return []
    rate = "unknown" if log.answers_per_s is None else f"{log.answers_per_s:.1f}"
    frame = f"{answer.frame_id}   age {answer.age_ms:.0f} ms   {rate} answers/s   dropped {answer.dropped_frames}"
    return [
        *(_action_rows(answer) if isinstance(answer, Action) else _refusal_rows(answer)),
        ("frame", Text(frame)),
        ("instruction", Text(printable(answer.instruction))),
    ]


def _action_rows(action: Action) -> list[tuple[str, Text]]:
    values = "  ".join(
        f"{name} {value:+.2f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in action.values.items()
    )
    stages = action.stages_ms
    times = (
        f"queue {stages.queue:.1f}  encode {stages.encode:.1f}  prefill {stages.prefill:.1f}  "
        f"decode {stages.decode:.1f}  check {stages.check:.2f} ms"
    )
    return [("action", Text(printable(f"{action.type}  {values}"), style="bold green")), ("stages", Text(times))]


def _refusal_rows(refusal: Refusal) -> list[tuple[str, Text]]:
    return [("action", Text(printable(f"none: {refusal.reason}  {refusal.detail}"), style="bold yellow"))]


def _status_rows(status: Status | None) -> list[tuple[str, Text]]:
    if status is None:
        return []
    model = status.model_worker
    mean_ms = status.information_age_ms
    age = "unknown" if mean_ms is None else f"mean age {mean_ms:.0f} ms"
    memory = "unknown" if model.rss_mib is None else f"{model.rss_mib:.0f} MiB"
    governor = status.governor.reason if status.governor is not None else ""
    return [
        ("state", Text(printable(f"{status.state}  {status.reason}"))),
        *([("governor", Text(printable(governor), style="yellow"))] if governor else []),
        ("vision", Text(printable(status.vision_backend))),
        ("language", Text(printable(status.language_backend))),
        ("information", Text(age)),
        ("model", Text(f"{memory}, restarts {model.restarts}")),
    ]
