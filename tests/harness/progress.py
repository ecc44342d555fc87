"""A progress of the toolchain that remembers what it was told, or acts on it."""

from __future__ import annotations

from collections.abc import Callable


class RecordedProgress:
    """quantize.progress.Progress: keeps every step and remark. on_step is called first and may raise."""

    def __init__(self, on_step: Callable[[str, str, int, int], None] | None = None) -> None:
        self.on_step = on_step
        self.steps: list[tuple[str, str, int, int]] = []  # (stage, what, done, total)
        self.remarks: list[str] = []

    def step(self, stage: str, what: str, done: int, total: int) -> None:
        if self.on_step is not None:
            self.on_step(stage, what, done, total)
        self.steps.append((stage, what, done, total))

    def remark(self, text: str) -> None:
        self.remarks.append(text)

    @property
    def stages(self) -> list[str]:
        """In the order in which they began."""
        return list(dict.fromkeys(step[0] for step in self.steps))
