"""Progress on stderr, because stdout is for results: a bar on a terminal, else a line per stage and ten seconds."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from quantize.cli import interrupt

LINE_INTERVAL_S = 10.0


class ProgressDisplay:
    """A quantize.progress.Progress, to be used in a `with` statement."""

    def __enter__(self) -> ProgressDisplay:
        console = Console(stderr=True)
        self._stage, self._printed_s = "", 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<18}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[what]}"),
                console=console,
            )
            self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def remark(self, text: str) -> None:
        interrupt.raise_if_interrupted()
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def step(self, stage: str, what: str, done: int, total: int) -> None:
        interrupt.raise_if_interrupted()
        new, ended = stage != self._stage, done >= total
        self._stage = stage
        if self._bar is not None:
            if new:
                self._task = self._bar.add_task(stage, total=total, what="")
            self._bar.update(self._task, completed=done, what="" if ended else what)
        elif new or ended or time.monotonic() - self._printed_s > LINE_INTERVAL_S:
            self._printed_s = time.monotonic()
            print(f"{stage}: {'done' if ended else f'{100 * done // total} %'}", file=sys.stderr, flush=True)
