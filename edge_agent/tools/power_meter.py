"""Power while a benchmark runs, from the first source that tells: the card that computes, the board's sensors in sysfs,
or NVIDIA's tegrastats. Nothing here is guessed: without a source the power is None.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable

from edge_agent.board.control_groups import Read, read_text
from edge_agent.board.nvml import Card, Nvml
from edge_agent.board.sensors import Names, board_power, list_names, parse_tegrastats, rails

TEGRASTATS = ("tegrastats", "--interval", "100")


class PowerMeter:
    """Owns NVML and, where it is needed, a tegrastats; close() ends both. `source` names what is measured."""

    def __init__(
        self,
        nvml: Nvml | None = None,
        read: Read = read_text,
        names: Names = list_names,
        tegrastats: tuple[str, ...] = TEGRASTATS,
    ) -> None:
        self._nvml, self._read, self._names = nvml or Nvml(), read, names
        self._child: subprocess.Popen[bytes] | None = None
        self._line = ""
        self.source, self._power_w = self._find_source(tegrastats)

    def power_w(self) -> float | None:
        return self._power_w()

    def gpu_memory_used_mib(self) -> float | None:
        """Of all cards that this process sees, by every program; None: unknown, as on a Jetson, which has no own."""
        used = [
            card.memory_total_mib - card.memory_free_mib
            for card in self._nvml.cards()
            if card.memory_total_mib is not None and card.memory_free_mib is not None
        ]
        return sum(used) if used else None

    def close(self) -> None:
        self._nvml.close()
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._reader.join()
            self._child = None

    def _find_source(self, tegrastats: tuple[str, ...]) -> tuple[str, Callable[[], float | None]]:
        if _sum_w(self._nvml.cards()) is not None:
            return "card", lambda: _sum_w(self._nvml.cards())
        if self._board_w() is not None:
            return "board", self._board_w
        with contextlib.suppress(OSError):  # not installed
            self._child = subprocess.Popen(tegrastats, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            self._reader = threading.Thread(target=self._read_lines, args=(self._child,), daemon=True)
            self._reader.start()
            return "tegrastats", lambda: parse_tegrastats(self._line).power_w
        return "", lambda: None

    def _board_w(self) -> float | None:
        return board_power(rails(self._read, self._names))[0]

    def _read_lines(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        with child.stdout as lines:
            for line in lines:
                self._line = line.decode(errors="replace")


def _sum_w(cards: list[Card]) -> float | None:
    known = [card.power_w for card in cards if card.power_w is not None]
    return sum(known) if known else None
