"""A type for every tensor, so that the model says what it said, in a given number of bytes.

Three things are measured, none is guessed. For each matrix and candidate type, the error of the quantised weights,
weighted by what they are multiplied with (the importance matrix). For each group of matrices (one role in neighbouring
layers), how far the whole model's answers move (mean KL divergence on a text) when only this group is quantised: that
gives the price of its error. And at the end the whole plan, against the best standard recipe of no more bytes.

In between the divergence is taken to be the sum over matrices of price times error. The least sum under a budget is
found along the lower convex hulls, steepest step first (Shoham and Gersho, Efficient bit allocation for an arbitrary
set of quantizers, IEEE Trans. ASSP 36, 1988); what is left of the budget is filled with the steps that still fit.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import msgspec
import numpy as np

from edge_agent.bundle.files import write_durably
from edge_agent.bundle.manifest import LANGUAGE, Bundle
from edge_agent.config import LanguageConfig
from edge_agent.errors import UserError
from edge_agent.model.llama import LLAMA_CPP_PYTHON, LlamaContext, observe_graph
from quantize.build import convert, unverified_bundle
from quantize.build_folder import temporary_folder
from quantize.formats import ggml_kernels
from quantize.formats.gguf_files import BFLOAT16, tensor_blocks
from quantize.formats.imatrix import Imatrix
from quantize.measure import perplexity
from quantize.source.checkpoint import Checkpoint
from quantize.source.tensor_names import TensorSpec
from quantize.standard_recipes import RECIPES, bytes_by_type, plan_recipe

Type = gguf.GGMLQuantizationType
Report = Callable[[str, str, int, int], None]  # (stage, what, done, in all)
Types = dict[str, Type]  # GGUF name -> type
CANDIDATES = (Type.Q2_K, Type.Q3_K, Type.IQ4_XS, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q8_0)
PROBE = Type.Q4_K  # what a group is moved to when its price is measured: coarse enough to show, fine enough to be small
MAX_PROBES = 64
SAMPLE_ROWS = 1024  # of a matrix, evenly taken, for the errors


class FitError(UserError):
    """One line."""


class Sensitivity(msgspec.Struct):
    """What was measured. Independent of any budget: one file serves many."""

    key: str  # of everything it depends on
    quantisation_errors: dict[str, dict[str, float]] = {}  # tensor -> type -> sum of importance times squared error
    kl: dict[str, float] = {}  # group -> mean KL divergence when it alone is quantised to PROBE

    def price(self, groups: dict[str, list[str]]) -> dict[str, float]:
        """Tensor -> KL divergence by unit of its error."""
        prices = {}
        for group, members in groups.items():
            error = sum(self.errors[name][PROBE.name] for name in members)
            prices |= dict.fromkeys(members, max(self.kl[group], 1e-12) / max(error, 1e-30))
        return prices


class Choice(msgspec.Struct, frozen=True):
    """One row of the table of what was chosen, and why."""

    tensor: str
    type: str
    n_bytes: int
    kl: float  # its part of the divergence that was reckoned with
    next_type: str  # the next better one that was not taken, and what a megabyte of it would have brought
    next_kl_per_mb: float


class Allocation(msgspec.Struct, frozen=True):
    types: Types
    n_bytes: int
    reckoned_kl: float
    measured_kl: float
    standard: str  # the best standard recipe of no more bytes, and its divergence on the same text; "": none fits
    standard_kl: float
    choices: list[Choice]


# -- what there is to choose from --------------------------------------------------------------------------------------


def matrices(checkpoint: Checkpoint) -> list[TensorSpec]:
    return [row for row in checkpoint.text_rows if len(row.shape) == 2]


def candidates(width: int) -> list[Type]:
    """Types whose blocks fit rows of this width."""
    fitting = [kind for kind in CANDIDATES if width % gguf.GGML_QUANT_SIZES[kind][0] == 0]
    if Type.Q4_K not in fitting:
        raise FitError(f"rows of {width} numbers cannot become K-quants; use a standard recipe")
    return fitting


def groups(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """One role in neighbouring layers; so many layers together that there are at most MOST_PROBES groups."""
    rows = matrices(checkpoint)
    roles = len({re.sub(r"\d+", "", row.gguf) for row in rows if row.gguf.startswith("blk.")})
    together = math.ceil(checkpoint.text.layers * roles / (MAX_PROBES - 2))
    found: dict[str, list[str]] = {}
    for row in rows:
        name = row.gguf
        if inside := re.fullmatch(r"blk\.(\d+)\.(.*)\.weight", name):
            first = int(inside[1]) // together * together
            last = min(first + together, checkpoint.text.layers) - 1
            group = f"{inside[2]} {first}" + (f" to {last}" if last > first else "")
        else:
            group = name.removesuffix(".weight")
        found.setdefault(group, []).append(name)
    return found


def n_bytes(checkpoint: Checkpoint, row: TensorSpec, kind: Type) -> int:
    shape = checkpoint.shape(row)
    return math.prod(shape[:-1]) * ggml_kernels.row_bytes(kind, shape[-1])


# -- measuring ---------------------------------------------------------------------------------------------------------


class SensitivityProbe:
    """The model at bf16 in memory of its own, where weights can be exchanged for what a type leaves of them."""

    def __init__(self, checkpoint: Checkpoint, made: Bundle, weighed: Imatrix, text: str, chunks: int) -> None:
        """made: bf16. Writes the reference's log-probabilities beside it. Raises LanguageError, MeasureError."""
        self.checkpoint, self.weighed = checkpoint, weighed
        self._places: dict[str, set[int]] = {}  # name -> addresses: a tied table may be there twice
        model = made.manifest.model
        self.bos = model.special["bos"]
        self._rows = {row.gguf: row for row in matrices(checkpoint)}
        self._quantised: Types = {}
        path = made.path("reference.kld")
        observe_graph(self._see)
        try:
            self.llm = LlamaContext(
                made.path(LANGUAGE),
                LanguageConfig(
                    context=perplexity.CHUNK,
                    gpu_layers=0,
                    flash_attention=True,
                    reproducible=False,
                    repack=False,
                    mmap=False,
                ),  # copied: its weights are written to
                model.embedding,
            )
            cut = perplexity.chunks(self.llm, self.bos, text, chunks)
            perplexity.write_reference(self.llm, self.bos, cut, path, lambda *_: None)
        finally:
            observe_graph(None)
        self.reference = perplexity.Reference(path)
        missing = self._rows.keys() - self._places.keys()
        if missing:
            raise FitError(f"{sorted(missing)[0]}: not found in llama.cpp's graph; report this")

    def close(self) -> None:
        self.llm.close()

    def kl(self, types: Types) -> float:
        """Mean KL divergence of the model with these matrices quantised and all others as they were."""
        for name in self._quantised.keys() | types.keys():
            if self._quantised.get(name) != types.get(name):
                self._put(name, types.get(name))
        self._quantised = dict(types)
        return perplexity.compare(self.llm, self.bos, self.reference, lambda *_: None).kl_mean

    def _see(self, node: int, ask: bool) -> bool:
        tensor = ggml_kernels.GgmlTensor.from_address(node)
        if tensor.op in (ggml_kernels.MUL_MAT, ggml_kernels.GET_ROWS):
            name = ggml_kernels.GgmlTensor.from_address(tensor.src[0]).name.decode()
            if name in self._rows:
                self._places.setdefault(name, set()).add(tensor.src[0])
        return not ask

    def _put(self, name: str, kind: Type | None) -> None:
        row = self._rows[name]
        width = self.checkpoint.shape(row)[1]
        blocks = []
        for block in tensor_blocks(self.checkpoint, row, BFLOAT16):
            if kind is not None:
                values = block.astype(np.float32).reshape(-1, width)
                raw = ggml_kernels.quantise_rows(values, kind, self.weighed.of(name))
                block = ggml_kernels.dequantise_rows(raw, kind, width).astype(BFLOAT16)
            blocks.append(block.reshape(-1).view(np.uint16))
        data = np.concatenate(blocks)
        for address in self._places[name]:
            ggml_kernels.write_tensor_data(address, data)


def quantisation_errors(checkpoint: Checkpoint, row: TensorSpec, weighed: Imatrix) -> dict[str, float]:
    """Type -> sum over the matrix of importance times squared error, from an even sample of its rows."""
    n, width = checkpoint.shape(row)
    columns = weighed.of(row.gguf)
    step, found, seen = max(1, n // SAMPLE_ROWS), {kind.name: 0.0 for kind in candidates(width)}, 0
    for block in tensor_blocks(checkpoint, row, BFLOAT16):
        rows = block.reshape(-1, width)[::step].astype(np.float32)
        seen += len(rows)
        for kind in candidates(width):
            off = ggml_kernels.dequantise_rows(ggml_kernels.quantise_rows(rows, kind, columns), kind, width) - rows
            squares = np.square(off).sum(0, dtype=np.float64)
            found[kind.name] += float(squares @ (columns if columns is not None else np.ones(width)))
    return {kind: value * n / seen for kind, value in found.items()}


def sensitivity(prober: SensitivityProbe, path: Path, key: str, report: Report) -> Sensitivity:
    """Measure, writing down every step: killed, the same again goes on where it was."""
    checkpoint, found = prober.checkpoint, Sensitivity(key)
    with contextlib.suppress(OSError, msgspec.DecodeError):
        left = msgspec.json.decode(path.read_bytes(), type=Sensitivity)
        found = left if left.key == key else found
    rows, grouped = matrices(checkpoint), groups(checkpoint)
    for i, row in enumerate(rows):
        report("errors", row.gguf, i, len(rows))
        if row.gguf not in found.errors:
            found.errors[row.gguf] = quantisation_errors(checkpoint, row, prober.weighed)
            write_durably(path, msgspec.json.encode(found))
    report("errors", "", len(rows), len(rows))
    for i, (group, members) in enumerate(grouped.items()):
        report("prices", group, i, len(grouped))
        if group not in found.kl:
            found.kl[group] = prober.kl(dict.fromkeys(members, PROBE))
            write_durably(path, msgspec.json.encode(found))
    report("prices", "", len(grouped), len(grouped))
    return found


def key(checkpoint: Checkpoint, weighed: Imatrix, text: str, chunks: int) -> str:
    """Of everything a sensitivity depends on; of the checkpoint its files' names, sizes and times."""
    digest = hashlib.sha256(repr((LLAMA_CPP_PYTHON, text, chunks, PROBE, CANDIDATES, SAMPLE_ROWS)).encode())
    for path in checkpoint.files:
        status = path.stat()
        digest.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
    for name in sorted(weighed.sums):
        digest.update(name.encode() + weighed.of(name).tobytes())
    return digest.hexdigest()


# -- choosing ----------------------------------------------------------------------------------------------------------


class Step(msgspec.Struct, frozen=True):
    """From one point of a matrix's hull to the next."""

    gain: float  # divergence saved by byte
    name: str
    to: Type
    n_bytes: int  # more
    kl: float  # less


def hull(points: list[tuple[int, float, Type]]) -> list[tuple[int, float, Type]]:
    """The lower convex hull of (bytes, loss, type): each point on it costs more and loses less than the one before."""
    best: list[tuple[int, float, Type]] = []
    for point in sorted(points, key=lambda point: (point[0], point[1])):
        if best and point[1] >= best[-1][1]:
            continue
        while len(best) > 1:
            (b0, l0, _), (b1, l1, _) = best[-2:]
            if (l0 - l1) * (point[0] - b1) > (l1 - point[1]) * (b1 - b0):
                break
            best.pop()
        best.append(point)
    return best


def allocate(checkpoint: Checkpoint, found: Sensitivity, budget_bytes: int) -> tuple[Types, list[Choice]]:
    """The least reckoned divergence in budget_bytes of tensors. Raises FitError naming the floor."""
    prices = found.price(groups(checkpoint))
    hulls = {}
    for row in matrices(checkpoint):
        options = [(n_bytes(checkpoint, row, Type[kind]), prices[row.gguf] * error, Type[kind])
                   for kind, error in found.errors[row.gguf].items()]  # fmt: skip
        hulls[row.gguf] = hull(options)
    exact = {row.gguf: Type.F32 for row in checkpoint.text_rows if len(row.shape) != 2}
    total = sum(n_bytes(checkpoint, row, Type.F32) for row in checkpoint.text_rows if row.gguf in exact)
    total += sum(points[0][0] for points in hulls.values())
    if total > budget_bytes:
        raise FitError(
            f"--budget: {budget_bytes / 1e6:.3f} MB is below the floor of {total / 1e6:.3f} MB (every matrix at "
            f"{CANDIDATES[0].name}); give more, or take a smaller model"
        )
    at = dict.fromkeys(hulls, 0)
    waiting = sorted(
        (_step(name, points, 0) for name, points in hulls.items() if len(points) > 1),
        key=_by_gain,
    )
    while waiting:
        step = waiting.pop(0)
        if total + step.n_bytes > budget_bytes:
            continue  # neither this one nor what lies behind it; others may still fit
        total += step.n_bytes
        at[step.name] += 1
        if at[step.name] + 1 < len(hulls[step.name]):
            bisect.insort(waiting, _step(step.name, hulls[step.name], at[step.name]), key=_by_gain)
    types = exact | {name: hulls[name][at[name]][2] for name in hulls}
    return types, [_choice(name, hulls[name], at[name]) for name in hulls]


def _by_gain(step: Step) -> tuple[float, str]:
    return -step.gain, step.name


def _step(name: str, points: list[tuple[int, float, Type]], i: int) -> Step:
    (bytes_0, loss_0, _), (bytes_1, loss_1, kind) = points[i : i + 2]
    return Step((loss_0 - loss_1) / (bytes_1 - bytes_0), name, kind, bytes_1 - bytes_0, loss_0 - loss_1)


def _choice(name: str, points: list[tuple[int, float, Type]], i: int) -> Choice:
    more = _step(name, points, i) if i + 1 < len(points) else None
    return Choice(name, points[i][2].name, points[i][0], points[i][1], more.to.name if more else "",
                  more.gain * 1e6 if more else 0.0)  # fmt: skip


def plan_allocation(prober: SensitivityProbe, found: Sensitivity, budget_bytes: int, report: Report) -> Allocation:
    """Choose, then measure the whole: against the best standard recipe of no more bytes, which wins if it is better."""
    checkpoint = prober.checkpoint
    types, choices = allocate(checkpoint, found, budget_bytes)
    standard = {}
    for name in RECIPES:
        if name != "BF16":
            theirs = plan_recipe(checkpoint, name, prober.weighed)
            if (size := sum(bytes_by_type(checkpoint, theirs).values())) <= budget_bytes:
                standard[name] = size, theirs
    best = max(standard, key=lambda name: standard[name][0], default="")
    report("check", "the plan", 0, 2)
    measured = prober.kl(_matrices_of(types))
    report("check", best, 1, 2)
    standard_kl = prober.kl(_matrices_of(standard[best][1])) if best else math.inf
    report("check", "", 2, 2)
    if standard_kl < measured:
        types, measured = standard[best][1], standard_kl
        choices = [_taken_over(checkpoint, found, name, kind) for name, kind in _matrices_of(types).items()]
    size = sum(bytes_by_type(checkpoint, types).values())
    return Allocation(types, size, sum(choice.kl for choice in choices), measured, best, standard_kl, choices)


def _taken_over(checkpoint: Checkpoint, found: Sensitivity, name: str, kind: Type) -> Choice:
    row = next(row for row in matrices(checkpoint) if row.gguf == name)
    price = found.price(groups(checkpoint))[name]
    return Choice(
        name, kind.name, n_bytes(checkpoint, row, kind), price * found.errors[name].get(kind.name, 0.0), "", 0.0
    )


def _matrices_of(types: Types) -> Types:
    return {name: kind for name, kind in types.items() if kind != Type.F32}


def fitted(
    checkpoint: Checkpoint, weighed: Imatrix, budget_bytes: int, text: str, chunks: int, path: Path, report: Report
) -> Allocation:
    """The whole of it. path: the sensitivities, read if they are of this very work, and written.

    Raises FitError, MeasureError, LanguageError, BuildError.
    """
    for row in matrices(checkpoint):
        candidates(checkpoint.shape(row)[1])
    if not path.parent.is_dir():
        raise FitError(f"{path.parent}: no such folder; make it first")
    with temporary_folder(path) as folder:
        work = folder / "bf16"
        convert(checkpoint, work, "bf16", False, report)
        prober = SensitivityProbe(checkpoint, unverified_bundle(checkpoint, work), weighed, text, chunks)
        try:
            found = sensitivity(prober, path, key(checkpoint, weighed, text, chunks), report)
            return plan_allocation(prober, found, budget_bytes, report)
        finally:
            prober.close()
