"""How fast a bundle answers on this machine, without camera and sockets: `edge-agent bench` and benchmarks/bench.py.

Measured: frame to first text, frame to action, time of each stage, tokens per second, llama_decode calls and rows,
accepted draft tokens, peak memory, memory of the GPU, and energy where a card or the board tells its power. Beside
them, the ceilings of the device that runs the language model (memory bandwidth, arithmetic) and the share of each that
is reached. Not measured: camera, sockets and supervisor, a few milliseconds; the `stages_ms` of a running daemon show
those.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np

from edge_agent.actions.space import load_action_space
from edge_agent.board import health
from edge_agent.board.control_groups import available_cores
from edge_agent.bundle.manifest import LANGUAGE, MMPROJ, VISION, read_manifest
from edge_agent.config import Config
from edge_agent.ipc.events import ModelEvent, TextDelta
from edge_agent.model.ceilings import GPU, INTEGRATED_GPU, CeilingsError, measure_device
from edge_agent.model.events import NULL_EVENTS, Events
from edge_agent.model.fallbacks import LanguageFacts
from edge_agent.model.llama import ACTION_SEQ
from edge_agent.model.load import NO_DEADLINE_NS, load_model, warm_up
from edge_agent.time_units import NS_PER_MS
from edge_agent.tools.power_meter import PowerMeter
from edge_agent.tools.stills import Stills
from edge_agent.wire.information_age import PublishedAction, mean_information_age_ms

MAX_TEXT_TOKENS = 48  # of a text, to measure tokens per second
QUESTION = "Describe what you see."
TEXT_EVERY = 8  # frames
PERCENTILES = (50, 95, 99)
REPEATS = 9
ENERGY_OF = {"card": "card", "board": "whole board", "tegrastats": "whole board, by tegrastats"}
STAGES = ("encode", "prefill", "decode")
MAX_SYNTHETIC_FRAMES = 16
Report = Callable[[int, int], None]  # (frames done, all frames)


class FrameTiming(msgspec.Struct):
    """One frame; times in milliseconds."""

    ms: float  # frame to complete answer
    first_text_ms: float  # frame to the first text that was not forced
    encode: float
    prefill: float
    decode: float
    calls: int  # of llama_decode
    rows: int  # given to llama_decode
    text: str


class TextTiming(msgspec.Struct):
    """Texts of the text lane, added up."""

    steps: int = 0
    ms: float = 0.0


class Ceilings(msgspec.Struct):
    """What the device that runs the language model can do at most. None: it was not measured."""

    copy_gb_s: float | None = None  # bytes read plus bytes written
    gflops: float | None = None  # matrix product: float32 on the processor's cores, float16 on a GPU
    device: str = "the processor"


class Bench:
    """A loaded model that answers one frame at a time. close() frees it."""

    def __init__(self, config: Config, instruction: str) -> None:
        """Load and warm up. Raises what load_model raises, and InstructionRefused."""
        self.bundle = read_manifest(config.bundle)
        self.model = load_model(config, self.bundle, load_action_space(config.task.action_space))
        self._deltas = self._first_text_ns = 0
        self._events = Events(self._note_first_text)
        warm_up(self.model, config.camera)
        self.model.engine.instruct(instruction)

    def _note_first_text(self, event: ModelEvent) -> None:
        if isinstance(event, TextDelta):
            self._deltas += 1
            if self._deltas == 2:  # the first delta is the forced prefix of every answer
                self._first_text_ns = time.monotonic_ns()

    def time_frame(self, frame: np.ndarray) -> FrameTiming:
        """frame: (H, W, 3) uint8 RGB."""
        engine, images = self.model.engine, self.model.images
        n_calls, n_rows = engine.llama.n_calls, engine.llama.n_rows
        self._deltas = 0
        start_ns = time.monotonic_ns()
        embeddings = images.embed(frame)
        encoded_ns = time.monotonic_ns()
        decision = engine.actions.decide(embeddings, 1, NO_DEADLINE_NS, events=self._events)
        stop_ns = time.monotonic_ns()
        return FrameTiming(
            ms=(stop_ns - start_ns) / NS_PER_MS,
            first_text_ms=(self._first_text_ns - start_ns) / NS_PER_MS,
            encode=(encoded_ns - start_ns) / NS_PER_MS,
            prefill=decision.prefill_ms,
            decode=decision.decode_ms,
            calls=engine.llama.n_calls - n_calls,
            rows=engine.llama.n_rows - n_rows,
            text=f"{decision.stop_reason}: {decision.text}" if decision.stop_reason else decision.text,
        )

    def time_text(self) -> TextTiming:
        """A text about the last frame."""
        text, timing = self.model.engine.text, TextTiming()
        text.start("answer", "", QUESTION, NULL_EVENTS)
        start_ns = time.monotonic_ns()
        while not text.idle and timing.steps < MAX_TEXT_TOKENS:
            text.step()
            timing.steps += 1
        timing.ms = (time.monotonic_ns() - start_ns) / NS_PER_MS
        if not text.idle:
            text.stop("length")
        return timing

    def repeat_floor(self, frame: np.ndarray) -> tuple[float, float]:
        """Medians of REPEATS, milliseconds: (a frame whose answer is the previous one; encoding it and one llama_decode
        of the same number of rows)."""
        engine, repeated_ms, floor_ms = self.model.engine, [], []
        prefix = len(engine.cache.prefix_tokens)
        self.time_frame(frame)
        for _ in range(REPEATS):
            timing = self.time_frame(frame)
            repeated_ms.append(timing.ms)
            image = self.model.images.resize(frame)
            start_ns = time.monotonic_ns()
            buffer = self.model.images.encode(image)
            buffer.embeddings(timing.rows)  # the same number of rows, whatever they hold
            engine.llama.truncate(ACTION_SEQ, prefix)
            engine.llama.logits_after_last(buffer, prefix)
            floor_ms.append((time.monotonic_ns() - start_ns) / NS_PER_MS)
        return float(np.median(repeated_ms)), float(np.median(floor_ms))

    def close(self) -> None:
        self.model.close()


def run(config: Config, frames_from: Path | None, n: int, report: Report = lambda done, total: None) -> dict[str, Any]:
    """The whole measurement, as plain values. frames_from: a folder or a video; None: synthetic frames. Raises what
    Bench raises, and ImageError."""
    frames: Stills | list[np.ndarray] = (
        synthetic_frames(min(n, MAX_SYNTHETIC_FRAMES)) if frames_from is None else Stills(frames_from, n)
    )
    meter = PowerMeter()
    try:
        idle_gpu_mib = meter.gpu_memory_used_mib()
        bench = Bench(config, config.task.instruction)
    except BaseException:
        meter.close()
        raise
    try:
        timings, joules, text = [], [], TextTiming()
        for i, frame in enumerate(itertools.islice(endless(frames), n)):
            before_w = meter.power_w()
            timings.append(bench.time_frame(frame))
            if before_w is not None and (after_w := meter.power_w()) is not None:
                joules.append((before_w + after_w) / 2 * timings[-1].ms / 1000)
            if i % TEXT_EVERY == 0:
                timing = bench.time_text()
                text = TextTiming(text.steps + timing.steps, text.ms + timing.ms)
            report(i + 1, n)
        ceilings = ceilings_of(bench.model.engine.llama.facts)
        repeat_ms, floor_ms = bench.repeat_floor(next(iter(frames)))
        figures = _speed(bench, timings) | _resources(bench, joules, meter, idle_gpu_mib)
        return (
            figures
            | _shares(bench, timings, text, ceilings)
            | {
                "repeat_ms": round(repeat_ms, 2),
                "repeat_floor_ms": round(floor_ms, 2),
                "different_answers": len({timing.text for timing in timings}),
                "example": timings[-1].text,
            }
        )
    finally:
        bench.close()
        meter.close()


def endless(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames again and again; itertools.cycle would keep all of them in memory."""
    while True:
        yield from frames


def _speed(bench: Bench, timings: list[FrameTiming]) -> dict[str, Any]:
    manifest, actions = bench.bundle.manifest, bench.model.engine.actions

    def percentiles(field: str) -> dict[str, float]:
        values = [getattr(timing, field) for timing in timings]
        return {f"p{p}": round(float(np.percentile(values, p)), 2) for p in PERCENTILES}

    return {
        "benchmark": "bench",
        "bundle": bench.bundle.folder.name,
        "model": f"{manifest.model.family} {manifest.model.size} {manifest.recipe}",
        "vision": bench.model.images.backend,
        "frames": len(timings),
        "frame_to_action_ms": percentiles("ms"),
        "frame_to_first_text_ms": percentiles("first_text_ms"),
        "stages_ms": {stage: percentiles(stage) for stage in STAGES},
        "actions_per_s": round(1000 * len(timings) / sum(timing.ms for timing in timings), 3),
        "information_age_ms": _information_age_ms(timings),
        "decode_calls": percentiles("calls"),
        "rows": percentiles("rows"),
        "draft_accepted": round(actions.n_accepted_tokens / actions.n_draft_tokens, 3)
        if actions.n_draft_tokens
        else None,
        "draft_margin": actions.draft_margin,
        "row_alignment": bench.model.engine.llama.row_alignment,
        "steps_alone": actions.n_steps_alone,
    }


def _information_age_ms(timings: list[FrameTiming]) -> float | None:
    """The mean age of information if a camera always had a new frame: each frame is captured when the answer to the one
    before it is published. None: a single frame."""
    published_ns = itertools.accumulate((round(timing.ms * NS_PER_MS) for timing in timings), initial=0)
    mean_ms = mean_information_age_ms(itertools.starmap(PublishedAction, itertools.pairwise(published_ns)))
    return None if mean_ms is None else round(mean_ms, 2)


def _resources(bench: Bench, joules: list[float], meter: PowerMeter, idle_gpu_mib: float | None) -> dict[str, Any]:
    """idle_gpu_mib: memory of the cards in use before the model was loaded."""
    files, gpu_mib = bench.bundle.manifest.files, meter.gpu_memory_used_mib()
    used = (LANGUAGE, VISION if VISION in files else MMPROJ)
    is_known = gpu_mib is not None and idle_gpu_mib is not None
    return {
        "peak_rss_mib": health.peak_rss_mib(os.getpid()),
        "file_mib": round(sum(files[name].bytes for name in used if name in files) / 2**20, 1),
        "language": bench.model.engine.llama.facts.backend,
        "gpu_memory_mib": round(max(0.0, (gpu_mib or 0.0) - (idle_gpu_mib or 0.0)), 1) if is_known else None,
        "energy_j_per_frame": round(float(np.median(joules)), 3) if joules else None,
        "energy_of": meter.source if joules else None,
    }


def _shares(bench: Bench, timings: list[FrameTiming], text: TextTiming, ceilings: Ceilings) -> dict[str, Any]:
    """Text speed, and the shares of the ceilings. A decode step reads all weights once; prefill costs two operations
    per weight and row."""
    manifest = bench.bundle.manifest
    step_s = text.ms / 1000 / text.steps if text.steps else 0.0
    prefill_s = float(np.median([timing.prefill for timing in timings])) / 1000
    n_rows = float(np.median([timing.rows for timing in timings]))  # most of them are in the frame's own batch
    n_vision_weights = 0 if manifest.vision is None else manifest.files[MMPROJ].bytes // 2  # stored in 16 bit
    prefill_flops = 2 * (manifest.model.parameters - n_vision_weights) * n_rows
    bandwidth_gb_s = manifest.files[LANGUAGE].bytes / step_s / 1e9 if step_s else None
    return {
        "text_tok_per_s": round(1 / step_s, 2) if step_s else None,
        "copy_gb_s": ceilings.copy_gb_s,
        "gflops": ceilings.gflops,
        "ceilings_of": ceilings.device,
        "decode_share_of_bandwidth": round(bandwidth_gb_s / ceilings.copy_gb_s, 3)
        if bandwidth_gb_s and ceilings.copy_gb_s
        else None,
        "prefill_share_of_arithmetic": round(prefill_flops / prefill_s / 1e9 / ceilings.gflops, 3)
        if prefill_s and ceilings.gflops
        else None,
    }


def synthetic_frames(n: int) -> list[np.ndarray]:
    """n frames without a camera: (480, 640, 3) uint8 RGB, coloured discs on a drifting ground, equal in every run."""
    rng, frames = np.random.default_rng(7), []
    ground = cv2.GaussianBlur(rng.integers(40, 200, (600, 800, 3), np.uint8), (0, 0), 9)
    discs = [(rng.uniform(0, 1, 2) * (640, 480), int(rng.integers(20, 90)), rng.integers(0, 255, 3)) for _ in range(4)]
    for i in range(n):
        frame = np.ascontiguousarray(ground[4 * i % 120 :, 5 * i % 160 :][:480, :640])
        for place, radius, colour in discs:
            x, y = (place + np.array([6, 3]) * i) % (640, 480)
            cv2.circle(frame, (int(x), int(y)), radius, colour.tolist(), -1)
        frames.append(frame)
    return frames


def ceilings_of(facts: LanguageFacts) -> Ceilings:
    """Of the device that runs the language model. Unknown if a GPU and the processor share its layers."""
    if not facts.gpu_layers:
        return measure_ceilings()
    if facts.gpu_layers < facts.layers:
        return Ceilings(device=facts.backend)
    try:
        return Ceilings(*measure_device(GPU, INTEGRATED_GPU))
    except CeilingsError as error:
        return Ceilings(device=str(error))


def measure_ceilings() -> Ceilings:
    """The processor's. The best of a few runs each: a copy by all cores at once, and numpy's float32 matrix product."""
    n_cores = available_cores()
    source = np.ones(64 << 20, np.uint8)
    targets = [np.empty_like(source) for _ in range(n_cores)]

    def copy_often(target: np.ndarray) -> None:
        for _ in range(4):
            np.copyto(target, source)

    def copy_on_all_cores() -> None:
        threads = [threading.Thread(target=copy_often, args=(target,)) for target in targets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    copy_s = min(_seconds(copy_on_all_cores) for _ in range(4))
    matrix = np.ones((1024, 1024), np.float32)
    product_s = min(_seconds(lambda: matrix @ matrix) for _ in range(8))
    return Ceilings(
        copy_gb_s=round(2 * 4 * n_cores * source.nbytes / copy_s / 1e9, 2),
        gflops=round(2 * 1024**3 / product_s / 1e9, 1),
    )


def _describe_ties(figures: dict[str, Any]) -> str:
    """How drafts and plain decoding come to the same answer here."""
    margin, alone = figures["draft_margin"], figures["steps_alone"]
    if margin is None:
        return "no drafts: the shapes of batches were not compared"
    if not margin:
        return f"none: batches of a multiple of {figures['row_alignment']} rows give the same bits"
    return f"{alone} steps evaluated alone; a drafted token needs a lead of {margin:.2g} logits"


def _seconds(work: Callable[[], object]) -> float:
    start_s = time.monotonic()
    work()
    return time.monotonic() - start_s


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0%}"


def _ceiling_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    copy_gb_s, gflops, device = figures["copy_gb_s"], figures["gflops"], figures["ceilings_of"]
    if copy_gb_s is None or gflops is None:
        return [("  of the ceilings", f"unknown: {device}")]
    bandwidth, arithmetic = (_share(figures[name]) for name in (
        "decode_share_of_bandwidth", "prefill_share_of_arithmetic"))  # fmt: skip
    return [
        ("  of the bandwidth", f"{bandwidth} of a copy's {copy_gb_s:g} GB/s, {device}"),
        ("  of the arithmetic", f"{arithmetic} of a matrix product's {gflops:g} Gflop/s, in prefill"),
    ]


def table(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of run() as (name, value), for a terminal."""

    def spread(values: dict[str, float], unit: str = " ms") -> str:
        return f"{values['p50']:g}{unit}  (95 % {values['p95']:g}, 99 % {values['p99']:g})"

    energy_j, gpu_mib = figures["energy_j_per_frame"], figures["gpu_memory_mib"]
    return [
        ("bundle", f"{figures['bundle']}: {figures['model']}, {figures['vision']}"),
        ("frame to action", spread(figures["frame_to_action_ms"])),
        ("frame to first text", spread(figures["frame_to_first_text_ms"])),
        *((f"  {stage}", spread(values)) for stage, values in figures["stages_ms"].items()),
        ("repeated answer", f"{figures['repeat_ms']:g} ms; encoding and one decode of the same rows "
                            f"{figures['repeat_floor_ms']:g} ms"),
        ("actions", f"{figures['actions_per_s']:g} per second"),
        ("mean age of information", "unknown" if figures["information_age_ms"] is None
                                    else f"{figures['information_age_ms']:g} ms"),
        ("text", f"{figures['text_tok_per_s'] or 0:g} tokens per second"),
        *_ceiling_rows(figures),
        ("llama_decode calls", spread(figures["decode_calls"], "")),
        ("rows", spread(figures["rows"], "")),
        ("draft accepted", _share(figures["draft_accepted"])),
        ("ties", _describe_ties(figures)),
        ("peak resident", f"{figures['peak_rss_mib']:.0f} MiB; files {figures['file_mib']:.0f} MiB"),
        ("memory of the GPU", "unknown" if gpu_mib is None else f"{gpu_mib:.0f} MiB"),
        ("energy", f"{energy_j:g} J per frame, of the {ENERGY_OF[figures['energy_of']]}" if energy_j else "unknown"),
        ("answers", f"{figures['different_answers']} different; the last: {figures['example']}"),
    ]  # fmt: skip
