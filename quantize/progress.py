"""How long work tells its caller how far it is: one protocol for the whole toolchain."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one command. The command line shows it; tests pass SILENT."""

    def step(self, stage: str, what: str, done: int, total: int) -> None:
        """`done` of `total` units of a stage are complete; `what` is the item in work. done == total ends the stage."""

    def remark(self, text: str) -> None:
        """One line that is worth showing once, for example that an earlier run is continued."""


class Silent:
    """Shows nothing."""

    def step(self, stage: str, what: str, done: int, total: int) -> None:
        pass

    def remark(self, text: str) -> None:
        pass


SILENT = Silent()
