"""A board that gets hot: a chip on a heat sink, and clocks that the board lowers by itself at its limit.

board = HotBoard(sink_s=60.0)
board.run_for(1.0, image_tokens=256, wanted_per_s=20.0)     # one second of work
board.chip_c, board.answers, board.throttled_s
"""

from __future__ import annotations

from dataclasses import dataclass

THROTTLED_SPEED = 0.5
RECOVERED_C = 3.0  # below the limit, the clocks come back


@dataclass
class HotBoard:
    """Power follows the work: idle, and joules for each answer, which grow with its image tokens."""

    limit_c: float = 95.0
    ambient_c: float = 35.0
    idle_w: float = 5.0
    answer_j: float = 0.5  # of an answer, whatever its tokens
    token_j: float = 0.005  # of each image token
    answer_ms: float = 25.0  # at full clocks, whatever the tokens
    token_ms: float = 0.1
    sink_c_w: float = 2.4  # from ambient to heat sink, °C per watt
    chip_c_w: float = 0.5  # from heat sink to chip
    sink_s: float = 80.0  # time constants
    chip_s: float = 3.0
    sink_c: float = 40.0
    chip_c: float = 42.0
    power_w: float = 0.0
    answers: float = 0.0
    throttled_s: float = 0.0
    is_throttled: bool = False

    def run_for(self, seconds: float, image_tokens: int, wanted_per_s: float, step_s: float = 0.1) -> float:
        """Work for a time. Returns the answers per second."""
        done = 0.0
        for _ in range(round(seconds / step_s)):
            speed = THROTTLED_SPEED if self.is_throttled else 1.0
            possible_per_s = speed * 1000 / (self.answer_ms + self.token_ms * image_tokens)
            rate = min(wanted_per_s, possible_per_s)
            self.power_w = self.idle_w + rate * (self.answer_j + self.token_j * image_tokens) * (0.7 + 0.3 * speed)
            self.sink_c += step_s / self.sink_s * (self.ambient_c + self.sink_c_w * self.power_w - self.sink_c)
            self.chip_c += step_s / self.chip_s * (self.sink_c + self.chip_c_w * self.power_w - self.chip_c)
            limit_c = self.limit_c - (RECOVERED_C if self.is_throttled else 0.0)
            self.is_throttled = self.chip_c >= limit_c
            self.throttled_s += step_s * self.is_throttled
            done += rate * step_s
        self.answers += done
        return done / seconds
