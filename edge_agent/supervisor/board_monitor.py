"""Once a second: what the board's sensors and the GPU say, the energy of an action, and what the governor makes of it.

Sensors are read in a thread: one behind a slow bus may take its time, and nothing may delay an answer. A value that is
older than STALE_S is unknown. The GPU's own values come from the model process, which may crash in the driver.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from edge_agent.board.sensors import Board, read_board
from edge_agent.config import GovernorConfig
from edge_agent.ipc.events import GpuReading, LimitLoad
from edge_agent.supervisor.governor import Governor, Heat, LoadLimit
from edge_agent.supervisor.log import log_line
from edge_agent.supervisor.managed_worker import Clock
from edge_agent.supervisor.model_worker import ModelWorker
from edge_agent.time_units import NS_PER_S
from edge_agent.wire.codec import encode
from edge_agent.wire.messages import BoardStatus, GovernorStatus

INTERVAL_NS = NS_PER_S
STALE_NS = 5 * NS_PER_S
WINDOW_S = 30  # of the energy per action and of the rate; a slow model answers every few seconds
MIN_ANSWERS = 2  # one says nothing about a rate
NO_LIMIT = LimitLoad()
OWN_LIMIT = "power limit"  # how a card keeps its own limit: no sign that the board throttles


class Reader(Protocol):
    """Where readings of the board come from."""

    def start(self) -> None: ...

    def newest(self, now_ns: int) -> Board | None:
        """None: there is none, or it is too old."""


class BoardReader:
    """Reads the sensors once a second, in a thread that ends with the process."""

    def __init__(self, clock: Clock = time.monotonic_ns, read: Callable[[], Board] = read_board) -> None:
        self._clock, self._read = clock, read
        self._newest: tuple[int, Board] | None = None
        self._has_failed = False
        self._pause = threading.Event()

    def start(self) -> None:
        try:
            threading.Thread(target=self._loop, name="board", daemon=True).start()
        except RuntimeError as error:  # no processes left: the board stays unknown
            log_line(f"board: no sensor is read: {error}")

    def newest(self, now_ns: int) -> Board | None:
        newest = self._newest
        return newest[1] if newest is not None and now_ns - newest[0] <= STALE_NS else None

    def _loop(self) -> None:
        while True:
            self.read_once()
            self._pause.wait(INTERVAL_NS / NS_PER_S)

    def read_once(self) -> None:
        try:
            board = self._read()
        except Exception as error:  # whatever one sensor does: without this thread the governor would never act again
            if not self._has_failed:
                log_line(f"board: the sensors cannot be read: {type(error).__name__}: {error}")
            self._has_failed = True
            return
        self._newest = (self._clock(), board)


class _Sample(NamedTuple):
    """Sums since the start."""

    time_s: float
    answers: int
    actions: int
    joules: float | None  # None: the power was unknown at this moment


class BoardMonitor:
    """Owns the reader and the governor. The supervisor calls it once per turn; it works once a second."""

    def __init__(
        self,
        config: GovernorConfig,
        max_image_tokens: int,
        clock: Clock = time.monotonic_ns,
        reader: Reader | None = None,
    ) -> None:
        self.config, self.clock = config, clock
        self.reader: Reader = reader or BoardReader(clock)
        self.governor = Governor.of(max_image_tokens)
        self.board = Board()
        self._gpu: tuple[int, GpuReading] | None = None
        self._updated_ns = 0
        self._samples: deque[_Sample] = deque(maxlen=WINDOW_S + 1)
        self._sent = NO_LIMIT  # what the model process has taken

    # -- once per turn ------------------------------------------------------------------------------------------------

    def update(self, answers: int, actions: int) -> None:
        """answers, actions: counted since the start."""
        now_ns = self.clock()
        if self._updated_ns and now_ns - self._updated_ns < INTERVAL_NS:
            return
        self._updated_ns = now_ns
        self.board = self.reader.newest(now_ns) or Board()
        self._add_sample(now_ns / NS_PER_S, answers, actions)
        if self.config.enabled:
            before = self.governor
            self.governor = before.update(self.heat(), self.answers_per_s, now_ns / NS_PER_S)
            if self.governor.level != before.level:
                log_line(f"governor: {_in_words(self.governor)}")

    def note_gpu(self, reading: GpuReading) -> None:
        self._gpu = (self.clock(), reading)

    def note_fixed_images(self) -> None:
        """The model takes images of one size, or none: fewer image tokens would save nothing."""
        self.governor = Governor.of(None)

    def model_is_new(self) -> None:
        """A model process has loaded: it knows of no limit."""
        self._sent = NO_LIMIT

    def sync_model(self, model: ModelWorker) -> None:
        """Send the limit in force, until the process has taken it."""
        wanted = load_command(self.governor.limit)
        if model.is_loaded and wanted != self._sent and model.send(encode(wanted)):
            self._sent = wanted

    # -- what is known ------------------------------------------------------------------------------------------------

    @property
    def gpu(self) -> GpuReading | None:
        return self._gpu[1] if self._gpu is not None and self.clock() - self._gpu[0] <= STALE_NS else None

    @property
    def temperature_c(self) -> float | None:
        """Of the hottest part."""
        gpu = self.gpu
        known = (self.board.temperature_c, gpu.temperature_c if gpu is not None else None)
        return max((value for value in known if value is not None), default=None)

    @property
    def power_w(self) -> float | None:
        """Of the whole board; where no sensor measures that, of the cards."""
        gpu = self.gpu
        return self.board.power_w if self.board.power_w is not None or gpu is None else gpu.power_w

    @property
    def throttle_reasons(self) -> tuple[str, ...] | None:
        gpu = self.gpu
        known = [self.board.throttle_reasons, gpu.throttle_reasons if gpu is not None else None]
        found = [reasons for reasons in known if reasons is not None]
        return tuple(reason for reasons in found for reason in reasons) if found else None

    def heat(self) -> Heat:
        """For the governor."""
        gpu, limit_c, temperature_c = self.gpu, self.config.max_temperature_c, self.temperature_c
        headrooms = [self.board.headroom_c]
        if gpu is not None and gpu.temperature_c is not None and gpu.throttle_at_c is not None:
            headrooms.append(gpu.throttle_at_c - gpu.temperature_c)
        if limit_c is not None and temperature_c is not None:
            headrooms.append(limit_c - temperature_c)
        limit_w = self.config.max_power_w or self.board.power_limit_w
        return Heat(
            headroom_c=min((value for value in headrooms if value is not None), default=None),
            power_share=self.power_w / limit_w if self.power_w is not None and limit_w else None,
            throttle_reasons=tuple(reason for reason in self.throttle_reasons or () if reason != OWN_LIMIT),
        )

    @property
    def answers_per_s(self) -> float | None:
        """Of the last seconds, from the moment at which the first answer came: before, a model may have been loading.
        None: too few answers to tell."""
        if not self._samples:
            return None
        idle = [sample for sample in self._samples if sample.answers == self._samples[0].answers]
        first, last = idle[-1], self._samples[-1]
        if last.answers - first.answers < MIN_ANSWERS:
            return None
        return (last.answers - first.answers) / (last.time_s - first.time_s)

    @property
    def energy_j_per_action(self) -> float | None:
        """Of the last seconds: everything that was drawn, for each action. None: no action, or the power is unknown."""
        known: list[_Sample] = []
        for sample in reversed(self._samples):
            if sample.joules is None:  # the power was unknown: only what came later counts
                break
            known.append(sample)
        if len(known) < 2 or known[0].actions == known[-1].actions:
            return None
        return ((known[0].joules or 0.0) - (known[-1].joules or 0.0)) / (known[0].actions - known[-1].actions)

    def _add_sample(self, now_s: float, answers: int, actions: int) -> None:
        before, joules = self._samples[-1] if self._samples else None, None
        if self.power_w is not None:
            joules = 0.0
            if before is not None and before.joules is not None:
                joules = before.joules + self.power_w * (now_s - before.time_s)
        self._samples.append(_Sample(now_s, answers, actions, joules))

    # -- for the status -----------------------------------------------------------------------------------------------

    def board_status(self) -> BoardStatus:
        gpu, reasons = self.gpu, self.throttle_reasons
        return BoardStatus(
            power_w=self.power_w,
            energy_j_per_action=self.energy_j_per_action,
            throttle_reasons=None if reasons is None else list(reasons),
            cpu_mhz=self.board.cpu_mhz,
            gpu_mhz=gpu.clock_mhz if gpu is not None and gpu.clock_mhz is not None else self.board.gpu_mhz,
            gpu_temperature_c=gpu.temperature_c if gpu is not None else None,
        )

    def governor_status(self) -> GovernorStatus:
        limit = self.governor.limit
        return GovernorStatus(
            level=self.governor.level,
            max_image_tokens=limit.max_image_tokens,
            max_rate_hz=limit.answers_per_s,
            reason=_in_words(self.governor) if self.governor.level else "",
        )


def load_command(limit: LoadLimit) -> LimitLoad:
    """For the model process. While there is a limit, it writes no descriptions: they would use what is saved."""
    if limit == LoadLimit():
        return NO_LIMIT
    interval_ms = 1000 / limit.answers_per_s if limit.answers_per_s else 0.0
    return LimitLoad(max_image_tokens=limit.max_image_tokens or 0, min_interval_ms=interval_ms, describe=False)


def _in_words(governor: Governor) -> str:
    limit = governor.limit
    if not governor.level:
        return "no limit"
    parts = []
    if limit.max_image_tokens is not None:
        parts.append(f"at most {limit.max_image_tokens} image tokens")
    if limit.answers_per_s is not None:
        parts.append(f"at most {limit.answers_per_s:.3g} answers/s")
    return f"{', '.join(parts) or 'no rate is known yet'}: {governor.reason}"
