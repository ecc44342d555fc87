"""Collect an importance matrix: the model, at source precision, evaluates text and answers frames, and the squared
inputs of every matrix product are added up.

Text is divided into chunks as in llama-imatrix, and gives the same numbers. Frames go through the runtime's own engine:
its prompt, the action under the grammar, and a question that is answered in text.
"""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path

import msgspec
import numpy as np

from edge_agent.actions.space import load_action_space
from edge_agent.bundle.manifest import LANGUAGE, Bundle
from edge_agent.config import AdvancedConfig, CameraConfig, Config, LanguageConfig, TaskConfig
from edge_agent.errors import encodable
from edge_agent.model.events import NULL_EVENTS
from edge_agent.model.llama import ACTION_SEQ, LLAMA_CPP_PYTHON, LlamaContext, LlamaOptions, observe_graph
from edge_agent.model.load import NO_DEADLINE_NS, load_model
from edge_agent.tools.stills import Stills
from quantize.build import convert, unverified_bundle
from quantize.build_folder import temporary_folder
from quantize.formats import ggml_kernels
from quantize.formats.build_plan import BuildPlan, plan_conversion
from quantize.formats.imatrix import Imatrix, ImatrixError, write_imatrix
from quantize.progress import Progress
from quantize.source.checkpoint import Checkpoint, fingerprint

CHUNK = 512  # tokens: one context, evaluated with an empty KV cache
TEXT = Path(__file__).with_name("calibration.txt")
INSTRUCTIONS = (
    "Hold position.",
    "Go to the nearest open door and wait there.",
    "Lande, wo es sicher ist, und halte Abstand zu Menschen.",
    "Suis le chemin et arrête-toi devant tout obstacle.",
    "Busca a la persona y mantén cinco metros de distancia.",
    "빨간 표시로 천천히 가서 멈추세요.",
)
QUESTIONS = ("What do you see?", "Ist der Weg frei?", "Combien de personnes sont visibles ?", "무엇이 보이나요?")
SAVE_EVERY_CHUNKS = 16  # the sums are saved, so that a killed run can continue
HEADS = ("output.weight", "token_embd.weight")  # the second one where the head is tied to the embeddings


class CalibrationData(msgspec.Struct, frozen=True):
    """What the model evaluates."""

    text: Path = TEXT
    frames: Path | None = None  # a folder of images, or a video
    instructions: tuple[str, ...] = INSTRUCTIONS
    action_space: str = "velocity_body"
    max_chunks: int = 0  # of text; 0: all of it
    max_frames: int = 64


class Collector:
    """A callback for every node of llama.cpp's graph: adds up the inputs of products of a weight with activations."""

    def __init__(self, into: Imatrix) -> None:
        self.into = into
        self.error: ImatrixError | None = None  # native code calls this object; an exception would be lost there

    def __call__(self, node: int, ask: bool) -> bool:
        tensor = ggml_kernels.GgmlTensor.from_address(node)
        if tensor.op != ggml_kernels.MUL_MAT:
            return not ask
        name = ggml_kernels.original_name(ggml_kernels.GgmlTensor.from_address(tensor.src[0]).name.decode())
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


def collect_imatrix(checkpoint: Checkpoint, out: Path, data: CalibrationData, progress: Progress) -> Imatrix:
    """Convert the checkpoint at bf16 beside `out`, evaluate text and frames, write `out`. After a killed run, the same
    call continues where the run was.

    Raises ImatrixError, BuildError, LlamaError, VisionError.
    """
    text = read_text(data.text)
    frames = Stills(data.frames, data.max_frames, progress.remark) if data.frames else None
    if frames and checkpoint.vision is None:
        raise ImatrixError(f"{checkpoint.folder}: a text-only model; leave --frames out")
    if not out.parent.is_dir():
        raise ImatrixError(f"{out.parent}: no such folder; make it first")
    key = fingerprint(checkpoint, LLAMA_CPP_PYTHON, text, data.max_chunks)
    saved = _SavedSums(out.with_name(f".{out.name}.part.npz"), key)
    imatrix = saved.load()
    plan: BuildPlan = plan_conversion(checkpoint, "bf16")
    with temporary_folder(out) as folder:
        convert(plan, folder / "bf16", progress)
        bundle = unverified_bundle(plan, folder / "bf16")
        observe_graph(collector := Collector(imatrix))
        try:
            _evaluate_text(bundle, text, data, collector, saved, progress)
            if frames:
                _answer_frames(bundle, frames, data, collector, progress)
        finally:
            observe_graph(None)
    imatrix.datasets = [encodable(path.name) for path in (data.text, data.frames) if path is not None]
    write_imatrix(imatrix, out)
    saved.path.unlink(missing_ok=True)
    return imatrix


def _evaluate_text(
    bundle: Bundle, text: str, data: CalibrationData, collector: Collector, saved: _SavedSums, progress: Progress
) -> None:
    """The text in chunks, each with an empty KV cache and <s> first. The logits of every position are requested;
    otherwise llama.cpp would compute the last layer for the last position only."""
    model, imatrix = bundle.manifest.model, collector.into
    # As llama-imatrix does.
    config = LlamaOptions(context=CHUNK, flash_attention=True, reproducible=False, repack=False, mmap=True)
    with LlamaContext(bundle.path(LANGUAGE), config, model.embedding) as llm:
        bos = model.special["bos"]
        tokens = [bos, *llm.tokens(text)]
        n = len(tokens) // CHUNK
        if n == 0:
            raise ImatrixError(f"{data.text}: {len(tokens)} tokens; expected {CHUNK} or more")
        n = min(n, data.max_chunks or n)
        for i in range(imatrix.n_chunks, n):
            progress.step("text", f"chunk {i + 1} of {n}", i, n)
            llm.truncate(ACTION_SEQ, 0)
            llm.logits_at([bos, *tokens[i * CHUNK + 1 : (i + 1) * CHUNK]], 0, list(range(CHUNK)))
            collector.check()
            imatrix.n_chunks = i + 1
            if imatrix.n_chunks % SAVE_EVERY_CHUNKS == 0:
                saved.save(imatrix)
        progress.step("text", "", n, n)
    saved.save(imatrix)


def _answer_frames(
    bundle: Bundle, frames: Stills, data: CalibrationData, collector: Collector, progress: Progress
) -> None:
    """Answer each frame, then one question about it."""
    config = Config(
        bundle="",
        camera=CameraConfig(source=""),
        task=TaskConfig(action_space=data.action_space, deadline_ms=10**9),
        # Padding and drafts would be added up as inputs of the model.
        language=LanguageConfig(stream_action_text=False, max_text_tokens=32),
        advanced=AdvancedConfig(reproducible=False, speculative=False),
    )
    loaded = load_model(config, bundle, load_action_space(data.action_space))
    engine = loaded.engine
    try:
        for i, frame in enumerate(frames):
            progress.step("frames", f"frame {i + 1} of {len(frames)}", i, len(frames))
            engine.instruct(data.instructions[i % len(data.instructions)])
            engine.actions.decide(loaded.images.embed(frame), i, NO_DEADLINE_NS)
            engine.text.start("answer", "", QUESTIONS[i % len(QUESTIONS)], NULL_EVENTS)
            while not engine.text.idle:
                engine.text.step()
            collector.check()
        progress.step("frames", "", len(frames), len(frames))
    finally:
        loaded.close()


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises ImatrixError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ImatrixError(f"{path}: not readable as UTF-8 text: {error}") from None


# -- what a killed run has left ----------------------------------------------------------------------------------------


class _SavedSums:
    """The sums so far, in full precision, in a file with the fingerprint of everything that they depend on."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def save(self, imatrix: Imatrix) -> None:
        partial = self.path.with_suffix(".new")
        arrays = {f"sum {name}": value for name, value in imatrix.sums.items()}
        counts = np.array([imatrix.counts[name] for name in imatrix.sums])
        with partial.open("wb") as file:
            np.savez(file, key=np.array(self.key), n_chunks=np.array(imatrix.n_chunks), counts=counts, **arrays)  # type: ignore[arg-type]
        partial.replace(self.path)

    def load(self) -> Imatrix:
        """The sums of an earlier run of the same work, or an empty matrix."""
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(self.path) as file:
            if str(file["key"]) == self.key:
                sums = {name.removeprefix("sum "): file[name] for name in file.files if name.startswith("sum ")}
                counts = dict(zip(sums, map(int, file["counts"]), strict=True))
                return Imatrix(sums=sums, counts=counts, n_chunks=int(file["n_chunks"]), chunk_size=CHUNK)
        return Imatrix(chunk_size=CHUNK)
