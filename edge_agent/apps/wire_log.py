"""What was received from the wire so far, and the figures made from it: rates, percentiles, counts.

Example:

    log = WireLog()
    log.record(client.next_answer(1.0))
    print(log.summary()["age_ms_p50"])
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import get_args

from edge_agent.time_units import NS_PER_S
from edge_agent.wire.messages import Action, Lane, Refusal, StageTimes, Status, TextMessage

Message = Action | Refusal | TextMessage | Status
MAX_TEXT_CHARACTERS = 600  # kept per lane
RATE_ANSWERS = 30  # answers that the current rate is measured over
# Text of a model may contain escape sequences, and a terminal would execute them.
_CONTROL_CHARACTERS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], "\N{REPLACEMENT CHARACTER}") | {
    0x0A: "\n",
    0x09: " ",
}


def printable(text: str) -> str:
    """The text with every control character replaced, except the line feed."""
    return text.translate(_CONTROL_CHARACTERS)


class WireLog:
    """Keeps the newest answer, status and text, and the times of every answer."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.answer: Action | Refusal | None = None
        self.status: Status | None = None
        self.text: dict[str, str] = dict.fromkeys(get_args(Lane), "")  # lane -> its newest text
        self.ages_ms: list[float] = []  # of every action
        self.stages: list[StageTimes] = []  # of every action
        self.refusals: dict[str, int] = {}  # reason -> count
        self.n_text_messages = 0
        self._clock = clock
        self._first_answer_ns: int | None = None
        self._answer_times_ns: deque[int] = deque(maxlen=RATE_ANSWERS)

    def record(self, message: Message) -> None:
        if isinstance(message, Status):
            self.status = message
        elif isinstance(message, TextMessage):
            self.n_text_messages += 1
            end = "\n" if message.final else ""
            text = self.text[message.lane] + printable(message.text) + end
            self.text[message.lane] = text[-MAX_TEXT_CHARACTERS:]
        else:
            self._record_answer(message)

    def _record_answer(self, answer: Action | Refusal) -> None:
        self.answer = answer
        now_ns = self._clock()
        self._answer_times_ns.append(now_ns)
        if self._first_answer_ns is None:
            self._first_answer_ns = now_ns
        if isinstance(answer, Action):
            self.ages_ms.append(answer.age_ms)
            self.stages.append(answer.stages_ms)
        else:
            self.refusals[answer.reason] = self.refusals.get(answer.reason, 0) + 1

    @property
    def answers_per_s(self) -> float | None:
        """The rate over the last RATE_ANSWERS answers; None: unknown."""
        times_ns = self._answer_times_ns
        return _rate(len(times_ns), times_ns[-1] - times_ns[0]) if times_ns else None

    def summary(self) -> dict[str, float | int | dict[str, int] | None]:
        """Figures since the start. None means unknown."""
        actions_per_s = None
        if self._first_answer_ns is not None:
            actions_per_s = _rate(len(self.ages_ms), self._answer_times_ns[-1] - self._first_answer_ns)
        figures: dict[str, float | int | dict[str, int] | None] = {
            "actions": len(self.ages_ms),
            "refusals": self.refusals,
            "text_messages": self.n_text_messages,
            "actions_per_s": None if actions_per_s is None else round(actions_per_s, 2),
            "age_ms_p50": percentile(self.ages_ms, 50),
            "age_ms_p99": percentile(self.ages_ms, 99),
        }
        for name in StageTimes.__struct_fields__:
            figures[f"{name}_ms_p50"] = percentile([getattr(stages, name) for stages in self.stages], 50)
        return figures


def percentile(values: list[float], percent: int) -> float | None:
    """The percentile, 1 to 99, interpolated as numpy.percentile does; rounded to 0.01. None: no values."""
    if len(values) < 2:
        return round(values[0], 2) if values else None
    return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1], 2)


def _rate(n: int, span_ns: int) -> float | None:
    """Events per second: n events, and the time from the first to the last one."""
    return (n - 1) * NS_PER_S / span_ns if n > 0 and span_ns > 0 else None
