"""Collect an importance matrix: the real model, at source precision, reads text and answers frames, and every product's
input is added up.

Text is cut into chunks as llama-imatrix cuts it, and gives its numbers. Frames go through the runtime's own engine: the
prompt it will really see, the answer it gives under the grammar, and a question in words.
"""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from edge_agent.actions.space import load_action_space
from edge_agent.bundle.manifest import LANGUAGE, Bundle
from edge_agent.config import AdvancedConfig, CameraConfig, Config, LanguageConfig, TaskConfig
from edge_agent.model.events import NULL_EVENTS
from edge_agent.model.llama import ACTION_SEQ, LLAMA_CPP_PYTHON, LlamaContext, LlamaOptions, observe_graph
from edge_agent.model.load import NO_DEADLINE_NS, load_model
from edge_agent.tools.stills import read_stills
from quantize.build import convert, unverified_bundle
from quantize.build_folder import temporary_folder
from quantize.formats import ggml_kernels
from quantize.formats.imatrix import Imatrix, ImatrixError, write_imatrix
from quantize.source.checkpoint import Checkpoint

Report = Callable[[str, str, int, int], None]  # (stage, what, done, in all)
CHUNK = 512  # tokens: one context, read from an empty cache
TEXT = Path(__file__).with_name("calibration.txt")
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm")
INSTRUCTIONS = (
    "Hold position.",
    "Go to the nearest open door and wait there.",
    "Lande, wo es sicher ist, und halte Abstand zu Menschen.",
    "Suis le chemin et arrête-toi devant tout obstacle.",
    "Busca a la persona y mantén cinco metros de distancia.",
    "빨간 표시로 천천히 가서 멈추세요.",
)
QUESTIONS = ("What do you see?", "Ist der Weg frei?", "Combien de personnes sont visibles ?", "무엇이 보이나요?")
EVERY_CHUNKS = 16  # so often the work so far is written down
HEADS = ("output.weight", "token_embd.weight")  # the second where the head is the embedding table


class CalibrationData(msgspec.Struct, frozen=True):
    """What the model is shown."""

    text: Path = TEXT
    frames: Path | None = None  # a folder of pictures, or a video (a flight's recording)
    instructions: tuple[str, ...] = INSTRUCTIONS
    action_space: str = "velocity_body"
    max_chunks: int = 0  # of text; 0: all of it
    max_frames: int = 64


class Collector:
    """Watches the graph: every product of a weight with activations."""

    def __init__(self, into: Imatrix) -> None:
        self.into = into
        self.error: ImatrixError | None = None  # native code calls us: raising there would be lost

    def __call__(self, node: int, ask: bool) -> bool:
        tensor = ggml_kernels.GgmlTensor.from_address(node)
        if tensor.op != ggml_kernels.MUL_MAT:
            return not ask
        name = ggml_kernels.GgmlTensor.from_address(tensor.src[0]).name.decode()
        name = name.split("#")[1] if "#" in name else name  # CUDA0#blk.0.attn_k.weight#0
        inputs = ggml_kernels.GgmlTensor.from_address(tensor.src[1])
        if not (name in HEADS or (name.startswith("blk.") and name.endswith(".weight"))) or inputs.type:
            return not ask  # type 0 is float32
        if not ask and self.error is None:
            try:
                self.into.add(name, ggml_kernels.read_float32(inputs))
            except ImatrixError as error:
                self.error = error
        return True

    def check(self) -> None:
        if self.error is not None:
            raise self.error


def collect_imatrix(checkpoint: Checkpoint, out: Path, sources: CalibrationData, report: Report) -> Imatrix:
    """Convert at bf16 beside `out`, read and answer, write `out`. Killed, the same again goes on where it was.

    Raises ImportanceError, BuildError, LanguageError, VisionError.
    """
    text = read_text(sources.text)
    frames = list(read_stills(sources.frames, sources.max_frames)) if sources.frames else []
    if frames and checkpoint.vision is None:
        raise ImatrixError(f"{checkpoint.folder}: a text-only model; leave --frames out")
    if not out.parent.is_dir():
        raise ImatrixError(f"{out.parent}: no such folder; make it first")
    state = _State(out.with_name(f".{out.name}.part.npz"), _key(checkpoint, sources, text))
    found = state.load()
    with temporary_folder(out) as folder:
        work = folder / "bf16"
        convert(checkpoint, work, "bf16", False, report)
        observe_graph(collector := Collector(found))
        try:
            _read(unverified_bundle(checkpoint, work), text, sources, collector, state, report)
            if frames:
                _answer(unverified_bundle(checkpoint, work), frames, sources, collector, report)
        finally:
            observe_graph(None)
    found.datasets = [sources.text.name, *([sources.frames.name] if sources.frames else [])]
    write_imatrix(found, out)
    state.path.unlink(missing_ok=True)
    return found


def _read(
    made: Bundle, text: str, sources: CalibrationData, collector: Collector, state: _State, report: Report
) -> None:
    """The text in chunks, each from an empty cache and begun by <s>; every position is asked for an answer, or the
    last layer would be computed for the last one only."""
    model, found = made.manifest.model, collector.into
    config = LlamaOptions(  # as llama-imatrix
        context=CHUNK, flash_attention=True, reproducible=False, repack=False, mmap=True
    )
    with LlamaContext(made.path(LANGUAGE), config, model.embedding) as llm:
        bos = model.special["bos"]
        tokens = [bos, *llm.tokens(text)]
        n = len(tokens) // CHUNK
        if n == 0:
            raise ImatrixError(f"{sources.text}: {len(tokens)} tokens; expected {CHUNK} or more")
        n = min(n, sources.max_chunks or n)
        for i in range(found.n_chunks, n):
            report("text", f"chunk {i + 1} of {n}", i, n)
            llm.truncate(ACTION_SEQ, 0)
            llm.logits_at([bos, *tokens[i * CHUNK + 1 : (i + 1) * CHUNK]], 0, list(range(CHUNK)))
            collector.check()
            found.n_chunks = i + 1
            if found.n_chunks % EVERY_CHUNKS == 0:
                state.save(found)
        report("text", "", n, n)
    state.save(found)


def _answer(
    made: Bundle, frames: list[np.ndarray], sources: CalibrationData, collector: Collector, report: Report
) -> None:
    config = Config(
        bundle="",
        camera=CameraConfig(source=""),
        task=TaskConfig(action_space=sources.action_space, deadline_ms=10**9),
        # Padding and drafts would be counted as inputs of the model.
        language=LanguageConfig(stream_action_text=False, max_text_tokens=32),
        advanced=AdvancedConfig(reproducible=False, speculative=False),
    )
    loaded = load_model(config, made, load_action_space(sources.action_space))
    engine = loaded.engine
    try:
        for i, frame in enumerate(frames):
            report("frames", f"frame {i + 1} of {len(frames)}", i, len(frames))
            engine.instruct(sources.instructions[i % len(sources.instructions)])
            engine.actions.decide(loaded.images.embed(frame), i, NO_DEADLINE_NS)
            engine.text.start("answer", "", QUESTIONS[i % len(QUESTIONS)], NULL_EVENTS)
            while not engine.text.idle:
                engine.text.step()
            collector.check()
        report("frames", "", len(frames), len(frames))
    finally:
        loaded.close()


def read_text(path: Path) -> str:
    """Raises ImportanceError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ImatrixError(f"{path}: not readable as UTF-8 text: {error}") from None


# -- what a killed run leaves ------------------------------------------------------------------------------------------


class _State:
    """The sums so far, exactly, under a key of everything they depend on."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def save(self, found: Imatrix) -> None:
        partial = self.path.with_suffix(".new")
        arrays = {f"sum {name}": value for name, value in found.sums.items()}
        counts = np.array([found.counts[name] for name in found.sums])
        with partial.open("wb") as file:
            np.savez(file, key=np.array(self.key), n_chunks=np.array(found.n_chunks), counts=counts, **arrays)
        partial.replace(self.path)

    def load(self) -> Imatrix:
        """What an earlier run of the same work left, or nothing."""
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(self.path) as file:
            if str(file["key"]) == self.key:
                sums = {name.removeprefix("sum "): file[name] for name in file.files if name.startswith("sum ")}
                counts = dict(zip(sums, map(int, file["counts"]), strict=True))
                return Imatrix(sums=sums, counts=counts, n_chunks=int(file["n_chunks"]), chunk_size=CHUNK)
        return Imatrix(chunk_size=CHUNK)


def _key(checkpoint: Checkpoint, sources: CalibrationData, text: str) -> str:
    """Of the checkpoint the headers only: names, places, sizes and times of its files."""
    digest = hashlib.sha256()
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files]
    digest.update(repr((LLAMA_CPP_PYTHON, stamps, text, sources.max_chunks)).encode())
    return digest.hexdigest()
