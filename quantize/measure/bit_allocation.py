"""Choose a quantisation type for each matrix that minimises the change of the model's outputs under a byte budget.

Three things are measured:
1. For each matrix and each candidate type: the squared error of the weights, weighted by the importance matrix.
2. For each group of matrices (one role in neighbouring layers): the mean KL divergence of the model's outputs on a text
   when only this group is quantised. Divided by the group's error, this is the KL divergence per unit of error.
3. At the end: the KL divergence of the whole choice, and of the best standard recipe that is not larger.

The KL divergence of a choice is predicted as the sum over matrices of (KL per error) times error. The least sum under a
budget is found along the lower convex hulls, largest gain per byte first (Shoham and Gersho, Efficient bit allocation
for an arbitrary set of quantizers, IEEE Trans. ASSP 36, 1988). The rest of the budget is filled with the steps that
still fit.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import re
from collections.abc import Collection, Container
from pathlib import Path

import msgspec
import numpy as np

from edge_agent.bundle.files import write_durably
from edge_agent.bundle.gguf_package import gguf
from edge_agent.bundle.manifest import LANGUAGE, Bundle
from edge_agent.errors import UserError
from edge_agent.model.llama import LLAMA_CPP_PYTHON, LlamaContext, LlamaOptions, observe_graph
from quantize.build import convert, unverified_bundle
from quantize.build_folder import temporary_folder
from quantize.formats import ggml_kernels
from quantize.formats.build_plan import BuildPlan, plan_conversion
from quantize.formats.ggml_kernels import Type, tensor_bytes
from quantize.formats.imatrix import Imatrix
from quantize.formats.tensor_blocks import BFLOAT16, tensor_blocks
from quantize.measure import perplexity
from quantize.progress import SILENT, Progress
from quantize.source.checkpoint import Checkpoint, fingerprint
from quantize.source.tensor_names import TensorSpec
from quantize.source.tokenizer import Tokenizer
from quantize.standard_recipes import RECIPES, bytes_by_type, recipe_types

Types = dict[str, Type]  # GGUF name -> type
CANDIDATES = (Type.Q2_K, Type.Q3_K, Type.IQ4_XS, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q8_0)
PROBE = Type.Q4_K  # of a group while its KL divergence is measured: a clear effect, small enough to be about linear
MAX_PROBES = 64
SAMPLE_ROWS = 1024  # of a matrix, at even distances, for its errors


class FitError(UserError):
    """One line."""


class Sensitivity(msgspec.Struct):
    """Measurements. They do not depend on the budget, so one file serves every budget."""

    key: str  # fingerprint of everything that they depend on
    errors: dict[str, dict[str, float]] = {}  # tensor -> type -> sum of importance times squared error
    kl: dict[str, float] = {}  # group -> mean KL divergence when it alone is quantised to PROBE

    def kl_per_error(self, grouped: dict[str, list[str]]) -> dict[str, float]:
        """Tensor -> KL divergence per unit of its error. grouped: of `groups`."""
        ratios: dict[str, float] = {}
        for group, members in grouped.items():
            error = sum(self.errors[name][PROBE.name] for name in members)
            ratios |= dict.fromkeys(members, max(self.kl[group], 1e-12) / max(error, 1e-30))
        return ratios


class Choice(msgspec.Struct, frozen=True):
    """The type of one tensor, and the next better type that was not chosen."""

    tensor: str
    type: str
    n_bytes: int
    kl: float  # its part of the predicted KL divergence
    next_type: str  # "": there is no better one
    next_kl_per_mb: float  # reduction of the KL divergence per MB, if the next type was taken


class Allocation(msgspec.Struct, frozen=True):
    """The chosen types, with the figures that justify them."""

    types: Types
    n_bytes: int
    predicted_kl: float
    measured_kl: float
    standard: str  # the largest standard recipe within the budget; "": none fits
    standard_kl: float  # its KL divergence on the same text
    choices: list[Choice]


# -- candidates -------------------------------------------------------------------------------------------------------


def matrices(checkpoint: Checkpoint) -> list[TensorSpec]:
    return [spec for spec in checkpoint.text_tensors if len(spec.shape) == 2]


def candidates(width: int) -> list[Type]:
    """Types whose blocks divide a row of this width. Raises FitError when K-quants do not."""
    fitting = [kind for kind in CANDIDATES if width % gguf.GGML_QUANT_SIZES[kind][0] == 0]
    if Type.Q4_K not in fitting:
        raise FitError(f"rows of {width} numbers cannot become K-quants; use a standard recipe")
    return fitting


def groups(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Group -> tensor names. A group is one role in neighbouring layers; there are at most MAX_PROBES groups."""
    specs = matrices(checkpoint)
    roles = len({re.sub(r"\d+", "", spec.gguf) for spec in specs if spec.gguf.startswith("blk.")})
    layers_per_group = math.ceil(checkpoint.text.layers * roles / (MAX_PROBES - 2))
    grouped: dict[str, list[str]] = {}
    for spec in specs:
        name = spec.gguf
        if in_layer := re.fullmatch(r"blk\.(\d+)\.(.*)\.weight", name):
            first = int(in_layer[1]) // layers_per_group * layers_per_group
            last = min(first + layers_per_group, checkpoint.text.layers) - 1
            group = f"{in_layer[2]} {first}" + (f" to {last}" if last > first else "")
        else:
            group = name.removesuffix(".weight")
        grouped.setdefault(group, []).append(name)
    return grouped


# -- measuring ---------------------------------------------------------------------------------------------------------


class WeightAddresses:
    """A callback for every node of llama.cpp's graph: where the graph reads these weights.

    With a GPU, ggml's scheduler can give the graph a copy of a weight, made anew for each batch. Overwriting a copy has
    no effect, so only the weight itself counts.
    """

    def __init__(self, names: Container[str]) -> None:
        self._names = names
        self.found: dict[str, set[int]] = {}  # tensor -> ggml_tensors; two for a tied embedding table
        self.copied: set[str] = set()

    def __call__(self, node: int, ask: bool) -> bool:
        tensor = ggml_kernels.GgmlTensor.from_address(node)
        if tensor.op in (ggml_kernels.MUL_MAT, ggml_kernels.GET_ROWS):
            name = ggml_kernels.GgmlTensor.from_address(tensor.src[0]).name.decode()
            if name in self._names:
                self.found.setdefault(name, set()).add(tensor.src[0])
            elif (original := ggml_kernels.original_name(name)) in self._names:
                self.copied.add(original)
        return not ask

    def check(self, names: Collection[str]) -> None:
        """Raises FitError: one of these cannot be overwritten."""
        if self.copied:
            raise FitError(
                f"{min(self.copied)}: llama.cpp computes with a copy of it on another device; hide the GPU from this "
                "command, for example with CUDA_VISIBLE_DEVICES="
            )
        if missing := set(names) - self.found.keys():
            raise FitError(f"{min(missing)}: not found in llama.cpp's graph; please report this")


class SensitivityProbe:
    """The model at bf16 in memory that can be written: weights are replaced by what a type leaves of them."""

    def __init__(self, checkpoint: Checkpoint, bundle: Bundle, imatrix: Imatrix, text: str, max_chunks: int) -> None:
        """bundle: the checkpoint at bf16; the reference's log-probabilities are written into its folder.

        Raises LlamaError, MeasureError, FitError.
        """
        self.checkpoint, self.imatrix = checkpoint, imatrix
        model = bundle.manifest.model
        self._specs = {spec.gguf: spec for spec in matrices(checkpoint)}
        self._quantised: Types = {}
        path = bundle.path("reference.kld")
        self._addresses = WeightAddresses(self._specs)
        observe_graph(self._addresses)
        try:
            self.llm = LlamaContext(
                bundle.path(LANGUAGE),
                LlamaOptions(
                    context=perplexity.CHUNK,
                    gpu_layers=0,  # no GPU: the graph reads the weights themselves
                    flash_attention=True,
                    reproducible=False,
                    repack=False,
                    mmap=False,
                ),  # not mapped, because its weights are overwritten
                model.embedding,
            )
            chunks = perplexity.divide(self.llm, text, max_chunks)
            perplexity.write_reference(self.llm, chunks, path, SILENT)
        finally:
            observe_graph(None)
        self.reference = perplexity.Reference(path)
        self._addresses.check(self._specs)

    def close(self) -> None:
        self.llm.close()

    def kl(self, types: Types) -> float:
        """Mean KL divergence of the model when these matrices are quantised and all others are at bf16."""
        for name in self._quantised.keys() | types.keys():
            if self._quantised.get(name) != types.get(name):
                self._replace(name, types.get(name))
        self._quantised = dict(types)
        return perplexity.compare(self.llm, self.reference, SILENT).kl_mean

    def _replace(self, name: str, kind: Type | None) -> None:
        """Overwrite a matrix in memory: quantised to `kind` and back, or (None) as in the checkpoint."""
        spec = self._specs[name]
        width = self.checkpoint.shape(spec)[1]
        blocks = []
        for block in tensor_blocks(self.checkpoint, spec, BFLOAT16):
            if kind is not None:
                values = block.astype(np.float32).reshape(-1, width)
                raw = ggml_kernels.quantise_rows(values, kind, self.imatrix.of(name))
                block = ggml_kernels.dequantise_rows(raw, kind, width).astype(BFLOAT16)
            blocks.append(block.reshape(-1).view(np.uint16))
        data = np.concatenate(blocks)
        for address in self._addresses.found[name]:
            ggml_kernels.write_tensor_data(address, data)


def quantisation_errors(checkpoint: Checkpoint, spec: TensorSpec, imatrix: Imatrix) -> dict[str, float]:
    """Type -> sum over the matrix of importance times squared error, from a sample of rows at even distances."""
    n, width = checkpoint.shape(spec)
    columns = imatrix.of(spec.gguf)
    step, n_sampled = max(1, n // SAMPLE_ROWS), 0
    errors = {kind.name: 0.0 for kind in candidates(width)}
    for block in tensor_blocks(checkpoint, spec, BFLOAT16):
        rows = block.reshape(-1, width)[::step].astype(np.float32)
        n_sampled += len(rows)
        for kind in candidates(width):
            quantised = ggml_kernels.quantise_rows(rows, kind, columns)
            squares = np.square(ggml_kernels.dequantise_rows(quantised, kind, width) - rows).sum(0, dtype=np.float64)
            errors[kind.name] += float(squares @ (columns if columns is not None else np.ones(width)))
    return {kind: error * n / n_sampled for kind, error in errors.items()}


def measure_sensitivity(probe: SensitivityProbe, path: Path, key: str, progress: Progress) -> Sensitivity:
    """Measure, and write every result to `path` at once: after a killed run, the same call continues.

    key: fingerprint of everything that the measurements depend on.
    """
    checkpoint, measured = probe.checkpoint, Sensitivity(key)
    with contextlib.suppress(OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        earlier = msgspec.json.decode(path.read_bytes(), type=Sensitivity)
        measured = earlier if earlier.key == key else measured
    specs, grouped = matrices(checkpoint), groups(checkpoint)
    for i, spec in enumerate(specs):
        progress.step("errors", spec.gguf, i, len(specs))
        if spec.gguf not in measured.errors:
            measured.errors[spec.gguf] = quantisation_errors(checkpoint, spec, probe.imatrix)
            write_durably(path, msgspec.json.encode(measured))
    progress.step("errors", "", len(specs), len(specs))
    for i, (group, members) in enumerate(grouped.items()):
        progress.step("sensitivity", group, i, len(grouped))
        if group not in measured.kl:
            measured.kl[group] = probe.kl(dict.fromkeys(members, PROBE))
            write_durably(path, msgspec.json.encode(measured))
    progress.step("sensitivity", "", len(grouped), len(grouped))
    return measured


# -- choosing ----------------------------------------------------------------------------------------------------------


class Step(msgspec.Struct, frozen=True):
    """From one point of a matrix's convex hull to the next larger type."""

    gain: float  # reduction of the KL divergence per byte
    name: str
    to: Type
    n_bytes: int  # additional
    kl: float  # reduction of the KL divergence


def hull(points: list[tuple[int, float, Type]]) -> list[tuple[int, float, Type]]:
    """The lower convex hull of (bytes, loss, type): from point to point, bytes increase and the loss decreases."""
    corners: list[tuple[int, float, Type]] = []
    for point in sorted(points, key=lambda point: (point[0], point[1])):
        if corners and point[1] >= corners[-1][1]:
            continue
        while len(corners) > 1:
            (b0, l0, _), (b1, l1, _) = corners[-2:]
            if (l0 - l1) * (point[0] - b1) > (l1 - point[1]) * (b1 - b0):
                break
            corners.pop()
        corners.append(point)
    return corners


def allocate(checkpoint: Checkpoint, measured: Sensitivity, budget_bytes: int) -> tuple[Types, list[Choice]]:
    """The choice with the least predicted KL divergence whose tensors have at most budget_bytes.

    Raises FitError, which names the smallest possible budget.
    """
    ratios = measured.kl_per_error(groups(checkpoint))
    hulls = {}
    for spec in matrices(checkpoint):
        shape, errors = checkpoint.shape(spec), measured.errors[spec.gguf]
        points = [
            (tensor_bytes(shape, Type[kind]), ratios[spec.gguf] * error, Type[kind]) for kind, error in errors.items()
        ]
        hulls[spec.gguf] = hull(points)
    vectors = [spec for spec in checkpoint.text_tensors if len(spec.shape) != 2]
    total = sum(tensor_bytes(checkpoint.shape(spec), Type.F32) for spec in vectors)
    total += sum(points[0][0] for points in hulls.values())
    if total > budget_bytes:
        raise FitError(
            f"--budget: {budget_bytes / 1e6:.3f} MB is below the floor of {total / 1e6:.3f} MB (every matrix at "
            f"{CANDIDATES[0].name}); give more, or take a smaller model"
        )
    corner = dict.fromkeys(hulls, 0)  # tensor -> index of its current point
    waiting = sorted(
        (_step(name, points, 0) for name, points in hulls.items() if len(points) > 1),
        key=_by_gain,
    )
    while waiting:
        step = waiting.pop(0)
        if total + step.n_bytes > budget_bytes:
            continue  # this tensor stays as it is; steps of other tensors may still fit
        total += step.n_bytes
        corner[step.name] += 1
        if corner[step.name] + 1 < len(hulls[step.name]):
            bisect.insort(waiting, _step(step.name, hulls[step.name], corner[step.name]), key=_by_gain)
    types = {spec.gguf: Type.F32 for spec in vectors} | {name: hulls[name][corner[name]][2] for name in hulls}
    return types, [_choice(name, hulls[name], corner[name]) for name in hulls]


def _by_gain(step: Step) -> tuple[float, str]:
    return -step.gain, step.name


def _step(name: str, points: list[tuple[int, float, Type]], i: int) -> Step:
    (bytes_0, loss_0, _), (bytes_1, loss_1, kind) = points[i : i + 2]
    return Step((loss_0 - loss_1) / (bytes_1 - bytes_0), name, kind, bytes_1 - bytes_0, loss_0 - loss_1)


def _choice(name: str, points: list[tuple[int, float, Type]], i: int) -> Choice:
    n_bytes, kl, kind = points[i]
    if i + 1 == len(points):
        return Choice(name, kind.name, n_bytes, kl, "", 0.0)
    step = _step(name, points, i)
    return Choice(name, kind.name, n_bytes, kl, step.to.name, step.gain * 1e6)


def choose_and_check(
    probe: SensitivityProbe, measured: Sensitivity, budget_bytes: int, progress: Progress
) -> Allocation:
    """Choose types, then measure the whole model. A standard recipe within the budget that measures better wins."""
    checkpoint = probe.checkpoint
    types, choices = allocate(checkpoint, measured, budget_bytes)
    standard: dict[str, tuple[int, Types]] = {}
    for name in RECIPES:
        if name != "BF16":
            of_recipe = recipe_types(checkpoint, name, probe.imatrix)
            if (n_bytes := sum(bytes_by_type(checkpoint, of_recipe).values())) <= budget_bytes:
                standard[name] = n_bytes, of_recipe
    best = max(standard, key=lambda name: standard[name][0], default="")
    progress.step("check", "the chosen types", 0, 2)
    measured_kl = probe.kl(_matrices_of(types))
    progress.step("check", best, 1, 2)
    standard_kl = probe.kl(_matrices_of(standard[best][1])) if best else math.inf
    progress.step("check", "", 2, 2)
    if standard_kl < measured_kl:
        types, measured_kl = standard[best][1], standard_kl
        choices = _choices_of_recipe(checkpoint, measured, types)
    n_bytes = sum(bytes_by_type(checkpoint, types).values())
    predicted_kl = sum(choice.kl for choice in choices)
    return Allocation(types, n_bytes, predicted_kl, measured_kl, best, standard_kl, choices)


def _choices_of_recipe(checkpoint: Checkpoint, measured: Sensitivity, types: Types) -> list[Choice]:
    """The table for a standard recipe. It has no next better types."""
    ratios = measured.kl_per_error(groups(checkpoint))
    choices = []
    for spec in matrices(checkpoint):
        name, kind = spec.gguf, types[spec.gguf]
        kl = ratios[name] * measured.errors[name].get(kind.name, 0.0)
        choices.append(Choice(name, kind.name, tensor_bytes(checkpoint.shape(spec), kind), kl, "", 0.0))
    return choices


def _matrices_of(types: Types) -> Types:
    return {name: kind for name, kind in types.items() if kind != Type.F32}


class AllocationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What an allocation is measured with and where its measurements are kept."""

    imatrix: Imatrix
    budget_bytes: int  # of all text tensors
    text: str
    max_chunks: int  # of the text
    path: Path  # measurements; used if they are of this very work


def allocate_types(
    checkpoint: Checkpoint, tokenizer: Tokenizer, request: AllocationRequest, progress: Progress
) -> Allocation:
    """Convert the checkpoint, measure it, choose the types, and check the choice.

    Raises FitError, MeasureError, LlamaError, BuildError.
    """
    for spec in matrices(checkpoint):
        candidates(checkpoint.shape(spec)[1])
    if not request.path.parent.is_dir():
        raise FitError(f"{request.path.parent}: no such folder; make it first")
    settings = (LLAMA_CPP_PYTHON, request.text, request.max_chunks, PROBE.name, [kind.name for kind in CANDIDATES])
    key = fingerprint(checkpoint, *settings, SAMPLE_ROWS, request.imatrix.digest())
    plan: BuildPlan = plan_conversion(checkpoint, "bf16", tokenizer)
    with temporary_folder(request.path) as folder:
        convert(plan, folder / "bf16", progress)
        bundle = unverified_bundle(plan, folder / "bf16")
        probe = SensitivityProbe(checkpoint, bundle, request.imatrix, request.text, request.max_chunks)
        try:
            measured = measure_sensitivity(probe, request.path, key, progress)
            return choose_and_check(probe, measured, request.budget_bytes, progress)
        finally:
            probe.close()
