"""Finds the fastest configuration of this board by measurement: `edge-agent tune`.

Each candidate runs in the real daemon for a few seconds. The measure is the mean age of information: how old the
picture behind the newest action is, on average over time. A higher rate alone is not better: with overlap, actions are
published more often, and each is older.

Image tokens are quality and not only time, so they are lowered only where the deadline is missed otherwise, and no
further than needed. The type of the KV cache changes answers a little, so the smaller one must be faster by more than
chance. Threads, overlap and the draft give the same answers, but for ties. Another vision encoder gives the same
answers as far as its precision is the same.

The search goes along one axis after the other from the configuration as it is, and keeps what is better. At the end,
the start and the best are measured again in turn; the best must be better there too.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec

from edge_agent.board.control_groups import available_cores
from edge_agent.board.health import mem_available_mib
from edge_agent.bundle.gpu_memory import probe_gpu
from edge_agent.bundle.manifest import Manifest
from edge_agent.bundle.memory_plan import Gpu, NotEnoughMemoryError, adapters_mib, plan_memory
from edge_agent.config import Config
from edge_agent.errors import ConfigError
from edge_agent.ipc.token_sizes import token_sizes
from edge_agent.model.vision_encoder import TENSORRT
from edge_agent.profile import resolve
from edge_agent.strict_yaml import convert
from edge_agent.tools.encoder_choices import BACKEND, TENSORRT_KEY, Encoder
from edge_agent.tools.measure_daemon import Measured, interrupts_at_safe_points, measure

Values = dict[str, Any]  # "key" or "section.key" of the configuration -> value
Measure = Callable[[Values], Measured]
# Gets the candidate, its result (None: it begins), its number, and about how many there are.
Report = Callable[[str, Measured | None, int, int], None]

KV = "advanced.kv_cache_type"
TENSORRT_LOAD_S = 1800.0  # of watchdog.model_load_s: the first start makes an engine
MEASURE_S = 4.0
# Of many measurements the lowest is a lucky one. So the best few are measured again, if they are near the very best.
FINALISTS, FINALIST_WITHIN, CONFIRM_TIMES = 3, 1.25, 2
MIN_GAIN = 0.02  # of the mean age; less is noise of this measurement


class Tried(NamedTuple):
    name: str
    values: Values
    result: Measured


class Tuned(NamedTuple):
    """start: the configuration as it is. best: what to set; the start itself if nothing is better.

    start_ms, best_ms: mean age of information of both, medians of all their measurements; None: no valid actions.
    """

    tried: list[Tried]
    start: Values
    best: Values
    start_ms: float | None
    best_ms: float | None


class Board(NamedTuple):
    """What there is to choose from."""

    encoders: tuple[Encoder, ...]
    threads: tuple[int, ...]
    kv_cache_types: tuple[str, ...]
    overlap: bool  # whether to try with overlap
    has_image_sizes: bool = True  # as of a manifest


def tune(
    config: Config,
    manifest: Manifest,
    encoders: tuple[Encoder, ...],
    report: Report,
    measure_s: float = MEASURE_S,
) -> Tuned:
    """Measure on this machine. Nothing is written. Raises ConfigError if no candidate gives valid actions."""
    with tempfile.TemporaryDirectory(prefix="edge-tune-") as scratch, interrupts_at_safe_points():
        n_runs, gpu = 0, probe_gpu(config)

        def run(values: Values) -> Measured:
            nonlocal n_runs
            n_runs += 1
            candidate = with_values(config, values)
            if problem := _memory_problem(candidate, manifest, gpu):
                return Measured(problem=problem)
            folder = Path(scratch, str(n_runs))
            folder.mkdir()
            return _with_tensorrt(candidate, lambda patient: measure(patient, folder, measure_s))

        return search(config, lambda gpu: find_choices(config, manifest, encoders, gpu), run, report)


def _with_tensorrt(config: Config, run: Callable[[Config], Measured]) -> Measured:
    """Give a candidate with TensorRT the time to make its engine. One that falls back is no measurement of it."""
    if not config.vision.tensorrt:
        return run(config)
    load_s = max(config.watchdog.model_load_s, TENSORRT_LOAD_S)
    watchdog = msgspec.structs.replace(config.watchdog, model_load_s=load_s)
    result = run(msgspec.structs.replace(config, watchdog=watchdog))
    if result.problem or TENSORRT in result.vision_backend:
        return result
    return Measured(problem=f"TensorRT did not start; {result.vision_backend} ran in its place")


def _memory_problem(config: Config, manifest: Manifest, gpu: Gpu | None) -> str:
    """Why the daemon would not run this configuration as it is; "" if it would."""
    try:
        plan = plan_memory(config, manifest, mem_available_mib(), adapters_mib(config), gpu)
    except NotEnoughMemoryError as error:
        return str(error)
    return f"not enough memory: the daemon would reduce {', '.join(plan.reductions)}" if plan.reductions else ""


def find_choices(config: Config, manifest: Manifest, encoders: tuple[Encoder, ...], gpu: bool) -> Board:
    """gpu: whether layers of the language model run on a GPU."""
    n_cores = available_cores()
    threads = {n_cores, max(1, n_cores - 1), max(1, n_cores // 2), 1 if n_cores <= 4 else n_cores // 4}
    is_exact = config.profile == "reproducible" or bool(config.advanced.reproducible)
    return Board(
        encoders=encoders,
        threads=tuple(sorted(threads, reverse=True)),
        kv_cache_types=("f16",) if is_exact else ("f16", "q8_0"),
        overlap=gpu or n_cores > 1,
        has_image_sizes=manifest.has_image_sizes,
    )


def with_values(config: Config, values: Values) -> Config:
    """Raises ConfigError."""
    plain = msgspec.to_builtins(config)
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (plain[section] if section else plain)[name] = value
    return convert(plain, Config, "tune")


def values_in_force(config: Config, gpu: bool) -> Values:
    """What the configuration means, for every key that tune may set."""
    switches = resolve(config, gpu)
    return {
        BACKEND: switches.vision_backend,
        TENSORRT_KEY: config.vision.tensorrt and switches.vision_backend == "onnxruntime",
        "vision.max_image_tokens": config.vision.max_image_tokens,
        "cpu_threads": config.cpu_threads or available_cores(),
        "advanced.overlap": switches.overlap,
        "advanced.speculative": switches.speculative,
        KV: switches.kv_cache_type,
    }


def usable_age_ms(result: Measured) -> float | None:
    """Mean age of information; None: too few answers, or too many came after the deadline."""
    return None if result.is_late else result.mean_age_ms


class _Search:
    """The candidates so far, and the best of them."""

    def __init__(self, config: Config, run: Measure, report: Report) -> None:
        self.config, self._run, self._report = config, run, report
        self.tried: list[Tried] = []
        self.best: Tried | None = None
        self.best_ms = math.inf
        self.encoders: tuple[Encoder, ...] = ()
        self.about = 1  # how many candidates there will be

    def measure(self, name: str, values: Values) -> Measured:
        self._report(name, None, len(self.tried) + 1, max(self.about, len(self.tried) + 1))
        result = self._run(values)
        encoder = self._encoder(values)
        if encoder is not None and encoder.provider not in result.vision_backend and result.vision_backend:
            name += f" (it fell back: {result.vision_backend})"
        return self._add(name, values, result)

    def name(self, values: Values) -> str:
        """One line, for the table."""
        encoder = self._encoder(values)
        return describe(values, values[BACKEND] if encoder is None else encoder.name)

    def _encoder(self, values: Values) -> Encoder | None:
        """None: a configuration that nobody chose here, such as the first one."""
        return next((each for each in self.encoders if each.values.items() <= values.items()), None)

    def skip(self, encoder: Encoder) -> None:
        """A row of the table, without a measurement."""
        self._add(encoder.name, {}, Measured(problem=encoder.skip))

    def _add(self, name: str, values: Values, result: Measured) -> Measured:
        self.tried.append(Tried(name, values, result))
        self._report(name, result, len(self.tried), max(self.about, len(self.tried)))
        return result

    def try_one(self, values: Values) -> None:
        """Measure unless it was measured, and keep it if it is the best so far; if it changes answers, by MIN_GAIN."""
        if any(tried.values == values for tried in self.tried):
            return
        try:
            with_values(self.config, values)
        except ConfigError:  # switches that exclude each other
            return
        result = self.measure(self.name(values), values)
        age_ms = usable_age_ms(result)
        is_other = self.best is not None and values[KV] != self.best.values[KV]
        min_gain = MIN_GAIN if is_other else 0.0
        if age_ms is not None and age_ms < self.best_ms * (1 - min_gain):
            self.best, self.best_ms = self.tried[-1], age_ms


def search(config: Config, choices: Callable[[bool], Board], run: Measure, report: Report) -> Tuned:
    """choices: whether a GPU is in use -> what to try. Raises ConfigError."""
    found = _Search(config, run, report)
    first = found.measure("as configured", {})
    gpu = first.language_backend.startswith("llama.cpp GPU")
    start, board = values_in_force(config, gpu), choices(gpu)
    found.encoders = tuple(encoder for encoder in board.encoders if not encoder.skip)
    found.about = 2 + len(board.encoders) + len(board.threads) * (1 + board.overlap) + (1 + FINALISTS) * CONFIRM_TIMES
    found.tried[0] = Tried("as configured", start, first)
    if (first_ms := usable_age_ms(first)) is not None:
        found.best, found.best_ms = found.tried[0], first_ms
    for encoder in board.encoders:
        if encoder.skip:
            found.skip(encoder)
    for candidate in _fewer_tokens(start) if board.has_image_sizes else [start]:
        if found.best is not None:
            break
        for encoder in found.encoders:
            found.try_one(candidate | encoder.values)
    if found.best is None:
        raise ConfigError(_why_none(found.tried))
    for axis in _axes(board, found.encoders):
        base = found.best.values
        for change in axis(base):
            found.try_one(base | change)
    return _confirm(found, start)


def _fewer_tokens(start: Values) -> Iterable[Values]:
    """The start, then ever fewer image tokens, until the deadline is met."""
    for tokens in token_sizes(start["vision.max_image_tokens"]):
        yield start | {"vision.max_image_tokens": tokens}


def _axes(board: Board, encoders: tuple[Encoder, ...]) -> list[Callable[[Values], list[Values]]]:
    """Each: values so far -> the changes to try from there."""

    def encoder(base: Values) -> list[Values]:
        return [each.values for each in encoders]

    def threads(base: Values) -> list[Values]:
        """With overlap, the encoder shares the cores, so another number of threads is best."""
        overlaps = (False, True) if board.overlap else (False,)
        return [{"advanced.overlap": on, "cpu_threads": n} for on in overlaps for n in board.threads]

    def draft(base: Values) -> list[Values]:
        return [{"advanced.speculative": on} for on in (True, False)]

    def kv_cache(base: Values) -> list[Values]:
        return [{KV: name} for name in board.kv_cache_types]

    return [encoder, draft, kv_cache, threads, encoder, kv_cache]  # what is best depends on the threads


def _confirm(found: _Search, start: Values) -> Tuned:
    """Measure the start and the best few again, in turn; the medians decide."""
    ages_ms = [(tried.values, [usable_age_ms(tried.result)]) for tried in (found.tried[0], *_finalists(found, start))]
    for _ in range(CONFIRM_TIMES if len(ages_ms) > 1 else 0):
        for values, ages in ages_ms:
            ages.append(usable_age_ms(found.measure(f"again: {found.name(values)}", values)))
    start_ms, *others_ms = [median_ms(ages) for _, ages in ages_ms]
    best, best_ms, limit_ms = start, start_ms, math.inf if start_ms is None else start_ms * (1 - MIN_GAIN)
    for (values, _), age_ms in zip(ages_ms[1:], others_ms, strict=True):
        if age_ms is not None and age_ms * _handicap(values, start) < limit_ms:
            best, best_ms, limit_ms = values, age_ms, age_ms * _handicap(values, start)
    return Tuned(found.tried, start, best, start_ms, best_ms)


def _finalists(found: _Search, start: Values) -> list[Tried]:
    """The best few beside the start, the best first."""
    usable = [
        (age_ms * _handicap(tried.values, start), n, tried)
        for n, tried in enumerate(found.tried)
        if tried.values != start and (age_ms := usable_age_ms(tried.result)) is not None
    ]
    return [tried for age_ms, _, tried in sorted(usable)[:FINALISTS] if age_ms <= FINALIST_WITHIN * found.best_ms]


def _handicap(values: Values, start: Values) -> float:
    """What changes answers must be faster by more than chance."""
    return 1.0 if values[KV] == start[KV] else 1 / (1 - MIN_GAIN)


def median_ms(ages_ms: list[float | None]) -> float | None:
    """None if one is None: a candidate that sometimes misses the deadline is not usable."""
    known = [age_ms for age_ms in ages_ms if age_ms is not None]
    return round(median(known), 2) if known and len(known) == len(ages_ms) else None


def _why_none(tried: list[Tried]) -> str:
    last = tried[-1].result
    why = last.problem or f"answers are later than task.deadline_ms: {last.refused}"
    return f"no configuration gives valid actions here; the last one tried: {why}"


def describe(values: Values, encoder: str) -> str:
    return ", ".join((
        encoder,
        f"{values['vision.max_image_tokens']} image tokens",
        f"{values['cpu_threads']} threads",
        "overlap" if values["advanced.overlap"] else "no overlap",
        "draft" if values["advanced.speculative"] else "no draft",
        f"KV {values['advanced.kv_cache_type']}",
    ))  # fmt: skip
