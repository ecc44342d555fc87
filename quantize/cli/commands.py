"""The commands of edge-quantize, one function each. Native code is imported when a command runs, after its checkpoint
is known to be valid.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.errors import UserError
from quantize.cli import printed
from quantize.cli.progress_display import ProgressDisplay
from quantize.progress import SILENT
from quantize.source.checkpoint import ADAPTER, Checkpoint, read_checkpoint
from quantize.source.hf_config import read_table

if TYPE_CHECKING:  # these load native code
    from edge_agent.config import Config
    from quantize.formats.build_plan import BuildPlan
    from quantize.measure.bit_allocation import Allocation
    from quantize.measure.collect_imatrix import CalibrationData
    from quantize.progress import Progress


class UsageError(UserError):
    """Wrong arguments that argparse cannot find. One line."""

    exit_status = 2


class CommandError(UserError):
    """A file that a command names is wrong. One line."""


def inspect(arguments: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(arguments.checkpoint)
    from quantize.boards import boards_that_fit, serving_mib
    from quantize.build import expected_manifest
    from quantize.source.tokenizer import read_tokenizer
    from quantize.standard_recipes import RECIPES, plan_bundle

    tokenizer = read_tokenizer(checkpoint.folder, checkpoint.text.vocab)
    config = _serving_config(arguments.config)
    manifests = {name: expected_manifest(plan_bundle(checkpoint, name, tokenizer=tokenizer)) for name in RECIPES}
    inspection = printed.Inspection(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        manifests=manifests,
        config=config,
        serving_mib=serving_mib(manifests["Q4_K_M"], config),
        boards=boards_that_fit(manifests["Q4_K_M"], config),
    )
    if arguments.json:
        print(printed.inspection_json(inspection))
    else:
        printed.print_inspection(inspection)


def convert(arguments: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(arguments.checkpoint)
    from quantize import build
    from quantize.formats.build_plan import plan_conversion

    plan = plan_conversion(checkpoint, arguments.type)
    with ProgressDisplay() as progress:
        build.convert(plan, arguments.out, progress, force=arguments.force)
    print(f"{arguments.out}: {checkpoint.family} {checkpoint.size} at {arguments.type}")


def imatrix(arguments: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(arguments.checkpoint)
    from quantize.measure.collect_imatrix import collect_imatrix

    data = _calibration_data(arguments)
    with ProgressDisplay() as progress:
        collected = collect_imatrix(checkpoint, arguments.out, data, progress)
    print(f"{arguments.out}: {len(collected.sums)} weights, {collected.n_chunks} chunks of text, {collected.datasets}")


def build(arguments: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(arguments.checkpoint)
    from quantize import build as work
    from quantize.standard_recipes import RECIPES

    if arguments.recipe not in RECIPES:
        raise UsageError(f"--recipe: expected one of {', '.join(RECIPES)}, found {arguments.recipe!r}")
    with ProgressDisplay() as progress:
        plan, allocation = _plan(arguments, checkpoint, progress)
        manifest = work.build(
            plan,
            arguments.out,
            progress,
            force=arguments.force,
            signing_key=arguments.sign,
            counter=arguments.counter,
        )
    if arguments.json:
        print(printed.to_json(manifest))
        return
    if allocation is not None:
        printed.print_allocation(allocation)
    printed.print_bundle(arguments.out, manifest)


def evaluate(arguments: argparse.Namespace) -> None:
    from edge_agent.tools.stills import Stills
    from quantize.measure import evaluate as work
    from quantize.measure.html_report import frame_numbers, html_report

    data = _calibration_data(arguments)
    with ProgressDisplay() as progress:
        evaluations = work.evaluate(arguments.bundles, arguments.reference, data, progress)
    if arguments.html is not None:
        shown = frame_numbers(evaluations)
        stills = Stills(data.frames, data.max_frames, SILENT.remark) if data.frames and shown else ()
        frames = {number: image for number, image in enumerate(stills) if number in shown}
        arguments.html.write_text(html_report(evaluations, frames), encoding="utf-8")
    if arguments.json:
        print(printed.to_json(evaluations))
        return
    for evaluation in evaluations:
        printed.print_evaluation(evaluation)


def lora(arguments: argparse.Namespace) -> None:
    from quantize.source.lora import read_adapter, write_adapter

    base, out = arguments.base, arguments.out
    if base is None:
        base = Path(str(read_table(arguments.adapter / ADAPTER).get("base_model_name_or_path")))
        if not base.is_dir():
            raise UsageError(
                f"--base: {arguments.adapter} names {str(base)!r}, which is not a folder here; give the checkpoint's"
            )
    checkpoint = read_checkpoint(base)
    if out.is_dir() or (out.exists() and not arguments.force):
        raise CommandError(f"{out}: exists; give another name, or --force to replace a file")
    if not out.absolute().parent.is_dir():
        raise CommandError(f"{out.absolute().parent}: no such folder; make it first")
    adapter = read_adapter(arguments.adapter, checkpoint)
    with ProgressDisplay() as progress:
        write_adapter(adapter, checkpoint, out, progress, arguments.sign)
    ranks = ", ".join(map(str, adapter.ranks))
    print(
        f"{out}: {len(adapter.deltas)} matrices of rank {ranks} for {checkpoint.family} {checkpoint.size}, "
        f"{out.stat().st_size / 1e6:.1f} MB"
    )


# ---------------------------------------------------------------------------------------------------------------------


def _calibration_data(arguments: argparse.Namespace) -> CalibrationData:
    """What imatrix and evaluate give to a model. Raises UsageError, CommandError, ImatrixError."""
    from quantize.measure.collect_imatrix import INSTRUCTIONS, TEXT, CalibrationData, read_text

    for key, least in (("chunks", 0), ("max_frames", 1)):
        if getattr(arguments, key) < least:
            option = key.replace("_", "-")
            raise UsageError(f"--{option}: expected {least} or more, found {getattr(arguments, key)}")
    instructions: tuple[str, ...] = INSTRUCTIONS
    if arguments.instructions is not None:
        lines = map(str.strip, read_text(arguments.instructions).splitlines())
        instructions = tuple(filter(None, lines))
        if not instructions:
            raise CommandError(f"{arguments.instructions}: no instructions; expected one per line")
    return CalibrationData(
        text=arguments.calibration or TEXT,
        frames=arguments.frames,
        instructions=instructions,
        action_space=arguments.action_space,
        max_chunks=arguments.chunks,
        max_frames=arguments.max_frames,
    )


def _serving_config(path: Path | None) -> Config:
    """The daemon's configuration for the memory plan. Raises ConfigError."""
    from edge_agent.config import load_config
    from quantize.boards import DEFAULT_CONFIG

    return load_config(path) if path is not None else DEFAULT_CONFIG


def _plan(
    arguments: argparse.Namespace, checkpoint: Checkpoint, progress: Progress
) -> tuple[BuildPlan, Allocation | None]:
    """What `build` writes, and how the types were chosen for --budget or --fit. The tokenizer is read here, once."""
    import msgspec

    from edge_agent.bundle import signing
    from quantize.formats.build_plan import VisionFormat
    from quantize.formats.imatrix import check_imatrix, read_imatrix
    from quantize.source.lora import merged, read_adapter
    from quantize.source.tokenizer import read_tokenizer
    from quantize.standard_recipes import bytes_by_type, file_type_of, plan_bundle

    if arguments.sign is not None:
        signing.sign(b"", arguments.sign)  # an invalid key is reported before hours of measurements
    weights = None
    if arguments.imatrix is not None:
        weights = read_imatrix(arguments.imatrix)
        check_imatrix(weights, arguments.imatrix, checkpoint)
    facts = {}
    if arguments.merge is not None:
        adapter = read_adapter(arguments.merge, checkpoint)
        checkpoint = merged(checkpoint, adapter)
        facts["merged"] = {"adapter": arguments.merge.name, "matrices": len(adapter.deltas), "ranks": adapter.ranks}
    tokenizer = read_tokenizer(checkpoint.folder, checkpoint.text.vocab)
    vision = VisionFormat(arguments.vision, arguments.mmproj, arguments.fixed)
    plan = plan_bundle(checkpoint, arguments.recipe, tokenizer=tokenizer, imatrix=weights, vision=vision)
    plan = msgspec.structs.replace(plan, facts=facts)
    if arguments.budget is None and arguments.fit is None:
        return plan, None
    allocation = _allocation(arguments, plan, progress)
    facts["allocation"] = {key: value for key, value in msgspec.structs.asdict(allocation).items() if key != "types"}
    plan = msgspec.structs.replace(
        plan,
        name=f"fit {allocation.n_bytes / 1e6:.1f} MB",
        types=allocation.types,
        file_type=file_type_of(bytes_by_type(checkpoint, allocation.types)),
        facts=facts,
    )
    return plan, allocation


def _allocation(arguments: argparse.Namespace, plan: BuildPlan, progress: Progress) -> Allocation:
    """Choose the types for --budget or --fit. Raises UsageError, CommandError and what the measurement raises."""
    from quantize.build_folder import check_target
    from quantize.measure.bit_allocation import AllocationRequest, allocate_types
    from quantize.measure.collect_imatrix import TEXT, read_text

    if plan.imatrix is None:
        raise UsageError("--budget and --fit need --imatrix FILE; make one with edge-quantize imatrix")
    budget_bytes = arguments.budget if arguments.budget is not None else _board_budget_bytes(arguments, plan)
    check_target(arguments.out, arguments.force)
    request = AllocationRequest(
        imatrix=plan.imatrix,
        budget_bytes=budget_bytes,
        text=read_text(arguments.calibration or TEXT),
        max_chunks=arguments.chunks,
        path=arguments.sensitivity or arguments.out.with_name(arguments.out.name + ".sensitivity.json"),
    )
    return allocate_types(plan.checkpoint, plan.tokenizer, request, progress)


def _board_budget_bytes(arguments: argparse.Namespace, plan: BuildPlan) -> int:
    """Bytes of tensors that --fit BOARD leaves for the language model. Raises UsageError, CommandError, ConfigError."""
    from edge_agent.bundle.manifest import LANGUAGE
    from quantize.boards import BOARDS, language_budget_bytes
    from quantize.build import expected_manifest

    boards = {board.lower().replace(" ", "-"): board for board in BOARDS}
    if arguments.fit not in boards:
        raise UsageError(f"--fit: expected one of {', '.join(boards)}, found {arguments.fit!r}")
    manifest = expected_manifest(plan)
    header_bytes = manifest.files[LANGUAGE].bytes - sum(manifest.bytes_by_type.values())
    config = _serving_config(arguments.config)
    budget_bytes = language_budget_bytes(manifest, boards[arguments.fit], config) - header_bytes
    if budget_bytes <= 0:
        raise CommandError(
            f"--fit {arguments.fit}: the vision encoder, the KV cache and buffers alone need more than this board has"
        )
    return budget_bytes
