"""How fast a bundle answers on this machine, offline: the engine of the model process, frame after frame, and what it
could reach: `edge-agent bench` and benchmarks/bench.py.

Measured: frame to first word, frame to action, where the time goes, tokens a second, llama_decode calls and rows,
drafts, peak memory, energy where the board has rails; and the share of what memory and arithmetic could give, which are
measured beside it. Not here: camera, sockets and supervisor (a few milliseconds; the daemon's own `stages_ms` say).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import msgspec
import numpy as np

from edge_agent.actions.space import load_action_space
from edge_agent.board import health
from edge_agent.board.power import power_w
from edge_agent.bundle.manifest import LANGUAGE, MMPROJ, VISION, read_manifest
from edge_agent.config import Config
from edge_agent.ipc.events import TextDelta
from edge_agent.model.engine import Engine, InstructionRefused
from edge_agent.model.llama import ACTION_SEQ, LlamaError
from edge_agent.model.loop import warm_up
from edge_agent.model.vision_encoder import VisionError
from edge_agent.tools.stills import ImageError, read_stills

TEXT_TOKENS = 48  # tokens of a sentence, to see how fast words come
QUESTION = "Describe what you see."
PERCENTILES = (50, 95, 99)
REPEATS = 9
STAGES = ("encode", "prefill", "decode")
Progress = Callable[[int, int], None]  # (frames done, of)
BENCH_ERRORS = (LlamaError, VisionError, ImageError, InstructionRefused)  # one line each


class FrameTiming(msgspec.Struct):
    """One frame and what it took, milliseconds."""

    ms: float  # all of it
    first_word_ms: float  # until the answer's first letter that was not forced is known
    encode: float
    prefill: float
    decode: float
    calls: int
    rows: int
    text: str


class Ceilings(msgspec.Struct):
    copy_gb_s: float  # bytes read and bytes written, all cores
    gflops: float  # float32 matrix product, all cores


class Bench:
    """An engine that is asked frame by frame. close() frees it."""

    def __init__(self, config: Config, instruction: str) -> None:
        """Load and warm up. Raises what Engine raises."""
        self.opened = read_manifest(config.bundle)
        self._pieces = self._first_ns = 0
        self.engine = Engine(config, self.opened, load_action_space(config.task.action_space), self._hear)
        warm_up(self.engine)
        self.engine.emit = self._hear
        self.engine.instruct(instruction)

    def _hear(self, event: object) -> None:
        if isinstance(event, TextDelta):
            self._pieces += 1
            if self._pieces == 2:  # the first is what every answer begins with
                self._first_ns = time.monotonic_ns()

    def shoot(self, frame: np.ndarray) -> FrameTiming:
        """frame: (H, W, 3) uint8 RGB."""
        engine = self.engine
        calls, rows, self._pieces = engine.language.n_calls, engine.language.n_rows, 0
        start_ns = time.monotonic_ns()
        text, stop_reason, stages = engine.act(engine.preprocessor.image(frame), 1, start_ns + 10**13)
        ms = (time.monotonic_ns() - start_ns) / 1e6
        return FrameTiming(
            ms=ms,
            first_word_ms=(self._first_ns - start_ns) / 1e6,
            calls=engine.language.n_calls - calls,
            rows=engine.language.n_rows - rows,
            text=text if not stop_reason else f"{stop_reason}: {text}",
            **stages,
        )

    def words(self) -> tuple[int, float]:
        """A sentence about the last frame: (steps, milliseconds of them)."""
        engine, n = self.engine, 0
        engine.begin("answer", "", QUESTION)
        start_ns = time.monotonic_ns()
        while engine.sentence is not None and n < TEXT_TOKENS:
            engine.step()
            n += 1
        ms = (time.monotonic_ns() - start_ns) / 1e6
        if engine.sentence is not None:
            engine.end("length")
        return n, ms

    def repeat(self, frame: np.ndarray) -> tuple[float, float]:
        """Milliseconds of a frame whose answer is that of the frame before, and of nothing but encoding it and one
        llama_decode of as many rows: medians of REPEATS, in turn."""
        engine, took, floor = self.engine, [], []
        self.shoot(frame)
        for _ in range(REPEATS):
            shot = self.shoot(frame)
            took.append(shot.ms)
            image = engine.preprocessor.image(frame)
            start_ns = time.monotonic_ns()
            rows = engine.encoder.encode(image, next(engine.buffers)).base[: shot.rows]
            engine.language.forget(ACTION_SEQ, len(engine.prefix))
            engine.language.decode_rows(rows, len(engine.prefix), spare=True)
            floor.append((time.monotonic_ns() - start_ns) / 1e6)
        return float(np.median(took)), float(np.median(floor))

    def close(self) -> None:
        self.engine.close()


def run(config: Config, frames_from: Path | None, n: int, report: Progress = lambda done, total: None) -> dict:
    """The whole measurement, as plain values. Raises ConfigError, and what TROUBLE names."""
    frames = list(read_stills(frames_from, n)) if frames_from is not None else synthetic_frames(min(n, 16))
    limits = measure_ceilings()
    bench = Bench(config, config.task.instruction)
    try:
        shots, word_steps, word_ms, joules = [], 0, 0.0, []
        for i in range(n):
            before_w = power_w()
            shots.append(bench.shoot(frames[i % len(frames)]))
            if before_w is not None and (after_w := power_w()) is not None:
                joules.append((before_w + after_w) / 2 * shots[-1].ms / 1000)
            if i % 8 == 0:
                steps, ms = bench.words()
                word_steps, word_ms = word_steps + steps, word_ms + ms
            report(i + 1, n)
        figures = _figures(bench, shots, word_steps, word_ms, joules, limits)
        took_ms, floor_ms = bench.repeat(frames[0])
        return figures | {"repeat_ms": round(took_ms, 2), "repeat_floor_ms": round(floor_ms, 2)}
    finally:
        bench.close()


def _figures(
    bench: Bench, shots: list[FrameTiming], word_steps: int, word_ms: float, joules: list[float], limits: Ceilings
) -> dict:
    engine, manifest = bench.engine, bench.opened.manifest
    language_bytes = manifest.files[LANGUAGE].bytes

    def of(name: str) -> dict[str, float]:
        values = [getattr(shot, name) for shot in shots]
        return {f"p{p}": round(float(np.percentile(values, p)), 2) for p in PERCENTILES}

    step_s = word_ms / 1000 / word_steps if word_steps else 0.0
    prefill_s = float(np.median([shot.prefill for shot in shots])) / 1000
    first_rows = float(np.median([shot.rows for shot in shots]))  # most of them in the frame's own batch
    vision = 0 if manifest.vision is None else manifest.files[MMPROJ].bytes // 2
    flops = 2 * (manifest.model.parameters - vision) * first_rows
    return {
        "benchmark": "bench",
        "bundle": bench.opened.folder.name,
        "model": f"{manifest.model.family} {manifest.model.size} {manifest.recipe}",
        "vision": engine.encoder.provider,
        "frames": len(shots),
        "frame_to_action_ms": of("ms"),
        "frame_to_first_word_ms": of("first_word_ms"),
        "stages_ms": {name: of(name) for name in STAGES},
        "actions_per_s": round(1000 * len(shots) / sum(shot.ms for shot in shots), 3),
        "words_tok_per_s": round(1 / step_s, 2) if step_s else None,
        "decode_calls": of("calls"),
        "rows": of("rows"),
        "draft_accepted": round(engine.n_taken / engine.n_drafted, 3) if engine.n_drafted else None,
        "peak_rss_mib": health.peak_rss_mib(os.getpid()),
        "file_mib": round((language_bytes + manifest.files[VISION].bytes) / 2**20, 1),
        "energy_j_per_frame": round(float(np.median(joules)), 3) if joules else None,
        "copy_gb_s": limits.copy_gb_s,
        "gflops": limits.gflops,
        "decode_share_of_bandwidth": round(language_bytes / step_s / 1e9 / limits.copy_gb_s, 3) if step_s else None,
        "prefill_share_of_arithmetic": round(flops / prefill_s / 1e9 / limits.gflops, 3) if prefill_s else None,
        "different_answers": len({shot.text for shot in shots}),
        "example": shots[-1].text,
    }


def synthetic_frames(n: int) -> list[np.ndarray]:
    """Frames without a camera: (480, 640, 3) uint8, coloured discs on a ground that drifts."""
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


def measure_ceilings() -> Ceilings:
    """Best of a few tries each: a copy by all cores at once, and numpy's float32 product."""
    cores = len(os.sched_getaffinity(0))
    source = np.ones(64 << 20, np.uint8)
    pairs = [(source, np.empty_like(source)) for _ in range(cores)]

    def everywhere() -> float:
        threads = [threading.Thread(target=lambda a=a, b=b: [np.copyto(b, a) for _ in range(4)]) for a, b in pairs]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.monotonic() - start

    copy_s = min(everywhere() for _ in range(4))
    a = np.ones((1024, 1024), np.float32)
    product_s = min(_timed(lambda: a @ a) for _ in range(8))
    return Ceilings(
        copy_gb_s=round(2 * 4 * cores * source.nbytes / copy_s / 1e9, 2), gflops=round(2 * 1024**3 / product_s / 1e9, 1)
    )


def _timed(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def table(figures: dict) -> list[tuple[str, str]]:
    """(what, how much), in the order to read them in."""

    def spread(values: dict[str, float], unit: str = " ms") -> str:
        return f"{values['p50']:g}{unit}  (95 % {values['p95']:g}, 99 % {values['p99']:g})"

    def share(key: str) -> str:
        return "unknown" if figures[key] is None else f"{figures[key]:.0%}"

    return [
        ("bundle", f"{figures['bundle']}: {figures['model']}, {figures['vision']}"),
        ("frame to action", spread(figures["frame_to_action_ms"])),
        ("frame to first word", spread(figures["frame_to_first_word_ms"])),
        *((f"  {name}", spread(values)) for name, values in figures["stages_ms"].items()),
        ("the same answer again", f"{figures['repeat_ms']:g} ms; encoding and one decode of its rows "
                                  f"{figures['repeat_floor_ms']:g} ms"),
        ("actions", f"{figures['actions_per_s']:g} a second"),
        ("text", f"{figures['words_tok_per_s'] or 0:g} tokens a second"),
        ("  of the bandwidth", f"{share('decode_share_of_bandwidth')} of a copy's, {figures['copy_gb_s']:g} GB/s"),
        ("  of the arithmetic", f"{share('prefill_share_of_arithmetic')} of a float32 product's, {figures['gflops']:g} "
                                "Gflop/s, in prefill"),
        ("llama_decode calls", spread(figures["decode_calls"], "")),
        ("rows", spread(figures["rows"], "")),
        ("draft taken", share("draft_accepted")),
        ("peak resident", f"{figures['peak_rss_mib']:.0f} MiB; files {figures['file_mib']:.0f} MiB"),
        ("energy", "no power rails" if figures["energy_j_per_frame"] is None
         else f"{figures['energy_j_per_frame']:g} J a frame"),
        ("answers", f"{figures['different_answers']} different ones, the last {figures['example']}"),
    ]  # fmt: skip
