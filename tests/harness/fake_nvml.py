"""In place of NVML's library, which is tested in tests/edge_agent/board."""

from __future__ import annotations

from edge_agent.board.nvml import Card


class FakeNvml:
    def __init__(self, *cards: Card) -> None:
        self.found, self.closed = list(cards), False

    def cards(self) -> list[Card]:
        return self.found

    def close(self) -> None:
        self.closed = True
