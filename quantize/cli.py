"""edge-quantize: inspect, convert, imatrix, build, evaluate, lora. Parses arguments, shows progress, says errors in a
line.

Exit status: 0 done; 1 the work failed (input, disk); 2 wrong arguments; 130 interrupted. Nothing half-written stays.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from edge_agent.errors import UserError
from quantize.source.checkpoint import ADAPTER, Checkpoint, read_checkpoint
from quantize.source.hf_config import read_table

if TYPE_CHECKING:  # they load native code
    from quantize.formats.imatrix import Imatrix
    from quantize.measure.bit_allocation import Allocation
    from quantize.measure.collect_imatrix import CalibrationData

EPILOG = """examples:
  edge-quantize inspect  Ministral-3-3B-Instruct-2512
  edge-quantize build    Ministral-3-3B-Instruct-2512  bundles/3b --recipe Q4_K_M
  edge-quantize imatrix  Ministral-3-3B-Instruct-2512  3b.imatrix.gguf --frames pictures/
  edge-quantize build    Ministral-3-3B-Instruct-2512  bundles/3b --imatrix 3b.imatrix.gguf
  edge-quantize build    Ministral-3-3B-Instruct-2512  bundles/3b --imatrix 3b.imatrix.gguf --budget 2.0GB
  edge-quantize evaluate bundles/3b --reference Ministral-3-3B-Instruct-2512 --frames pictures/ --html 3b.html
  edge-quantize lora     my-adapter/  my-adapter.gguf --base Ministral-3-3B-Instruct-2512
  edge-quantize convert  Ministral-3-3B-Instruct-2512  full/3b --type bf16

A checkpoint is the folder as downloaded: config.json with model*.safetensors, or params.json with
consolidated*.safetensors; and tekken.json or tokenizer.json. BF16 and FP8.
"""


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _interrupt)
    sys.unraisablehook = _swallow_interrupt
    arguments = _parser().parse_args()
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        _fail(f"interrupted; {_resume_hint(getattr(arguments, 'out', None))}", 130)
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror or error}")


def _swallow_interrupt(lost: sys.UnraisableHookArgs) -> None:
    if lost.exc_type is not KeyboardInterrupt:  # that one is raised again, see below
        sys.__unraisablehook__(lost)


_interrupted = False


def _interrupt(_signal: int, _frame: object) -> None:
    """In a callback that native code called, the exception would be lost: the next report raises it again."""
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def _resume_hint(out: Path | None) -> str:
    from quantize.build_folder import resumable_bytes

    if out is not None and (resumable_bytes(out) or out.with_name(f".{out.name}.part.npz").exists()):
        return "the same command again goes on from here"
    return "nothing was left behind"


def _fail(line: str, status: int = 1) -> None:
    print(f"edge-quantize: {line}", file=sys.stderr)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-quantize",
        description="A released Ministral 3 or Mistral Small checkpoint becomes a 4-bit bundle for edge-agent.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="what a checkpoint is, what a bundle of it will weigh, where it fits")
    inspect.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    inspect.add_argument("--json", action="store_true", help="one JSON line instead of text")
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser("convert", help="language.gguf, mmproj.gguf and vision.onnx at source precision")
    convert.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    convert.add_argument("out", type=Path, metavar="OUT_DIR")
    convert.add_argument(
        "--type", choices=("bf16", "f16", "f32"), default="bf16", help="of the matrices (default bf16)"
    )
    convert.add_argument("--force", action="store_true", help="replace OUT_DIR if this tool made it")
    convert.set_defaults(run=_convert)

    imatrix = commands.add_parser("imatrix", help="how much each column of each weight counts, from text and frames")
    imatrix.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    imatrix.add_argument("out", type=Path, metavar="OUT.gguf", help="llama.cpp's own imatrix format")
    imatrix.add_argument("--calibration", type=Path, metavar="TEXT", help="a text file (default: a small one of ours)")
    imatrix.add_argument("--frames", type=Path, metavar="DIR|VIDEO", help="pictures to act on, or a flight's recording")
    imatrix.add_argument("--instructions", type=Path, metavar="FILE", help="one a line, taken in turn for the frames")
    imatrix.add_argument(
        "--action-space", default="velocity_body", help="action space for the frames (default velocity_body)"
    )
    imatrix.add_argument("--chunks", type=int, default=0, metavar="N", help="of 512 tokens of text (default: all)")
    imatrix.add_argument("--max-frames", type=int, default=64, metavar="N", help="of all, evenly taken (default 64)")
    imatrix.set_defaults(run=_imatrix)

    build = commands.add_parser("build", help="a whole 4-bit bundle, tried and with its manifest")
    build.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    build.add_argument("out", type=Path, metavar="BUNDLE_DIR")
    build.add_argument(
        "--recipe",
        default="Q4_K_M",
        metavar="RECIPE",
        help="Q4_K_M (default), Q4_K_S, Q4_0, IQ4_XS, Q5_K_M, Q6_K, Q8_0; BF16 loses nothing",
    )
    build.add_argument("--imatrix", type=Path, metavar="FILE", help="an importance matrix of this very model")
    fit = build.add_argument_group(
        "a recipe of the model's own",
        "A type for every tensor, so that the answers move least in so many bytes. Needs --imatrix. What is measured "
        "is kept in a file: another budget for the same model takes seconds.",
    )
    size = fit.add_mutually_exclusive_group()
    size.add_argument("--budget", type=_size, metavar="SIZE", help="of the language model, such as 2.0GB or 900MB")
    size.add_argument("--fit", metavar="BOARD", help="what the board's memory leaves for it, such as orin-nano-8gb")
    fit.add_argument("--calibration", type=Path, metavar="TEXT", help="what answers are compared on (default: ours)")
    fit.add_argument("--chunks", type=int, default=2, metavar="N", help="of 512 tokens of it (default 2)")
    fit.add_argument(
        "--sensitivity", type=Path, metavar="FILE", help="where it is kept (default: BUNDLE_DIR.sensitivity.json)"
    )
    build.add_argument("--force", action="store_true", help="replace BUNDLE_DIR if this tool made it")
    build.add_argument(
        "--vision", choices=("bf16", "f16", "f32", "int8"), default="bf16", help="how vision.onnx is stored (bf16)"
    )
    build.add_argument(
        "--mmproj", choices=("bf16", "f16", "f32", "q8_0"), default="bf16", help="how mmproj.gguf is stored (bf16)"
    )
    build.add_argument(
        "--fixed",
        type=_height_x_width,
        metavar="HxW",
        help="the only frame size vision.onnx takes, for TensorRT: 448x448",
    )
    build.add_argument("--merge", type=Path, metavar="ADAPTER_DIR", help="a PEFT LoRA adapter, merged on the way")
    build.add_argument("--sign", type=Path, metavar="KEY", help="a private key, made by edge-agent keygen")
    build.add_argument("--json", action="store_true", help="the manifest as one JSON line at the end")
    build.set_defaults(run=_build)
    evaluate = commands.add_parser("evaluate", help="what quantising cost: on text, in actions, in what is seen")
    evaluate.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="of one and the same model")
    evaluate.add_argument(
        "--reference", type=Path, required=True, metavar="DIR", help="the checkpoint, or a bundle of it at BF16"
    )
    evaluate.add_argument("--calibration", type=Path, metavar="TEXT", help="a text file (default: a small one of ours)")
    evaluate.add_argument("--chunks", type=int, default=0, metavar="N", help="of 512 tokens of it (default: all)")
    evaluate.add_argument(
        "--frames", type=Path, metavar="DIR|VIDEO", help="pictures to act on, or a flight's recording"
    )
    evaluate.add_argument("--instructions", type=Path, metavar="FILE", help="one a line, taken in turn for the frames")
    evaluate.add_argument("--action-space", default="velocity_body", help="action space for the frames")
    evaluate.add_argument("--max-frames", type=int, default=64, metavar="N", help="of all, evenly taken (default 64)")
    evaluate.add_argument("--html", type=Path, metavar="FILE", help="a page with plots and the worst frames")
    evaluate.add_argument("--json", action="store_true", help="everything as one JSON line")
    evaluate.set_defaults(run=_evaluate)
    lora = commands.add_parser(
        "lora", help="a PEFT LoRA adapter becomes a GGUF adapter, to be switched on and off at run time"
    )
    lora.add_argument(
        "adapter", type=Path, metavar="ADAPTER_DIR", help="adapter_config.json, adapter_model.safetensors"
    )
    lora.add_argument("out", type=Path, metavar="OUT.gguf")
    lora.add_argument(
        "--base", type=Path, metavar="CHECKPOINT", help="the model it was trained on (default: as the adapter says)"
    )
    lora.add_argument("--sign", type=Path, metavar="KEY", help="a private key, made by edge-agent keygen")
    lora.add_argument("--force", action="store_true", help="replace OUT.gguf")
    lora.set_defaults(run=_lora)
    return parser


def _inspect(arguments: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(arguments.checkpoint)
    from quantize.source.tokenizer import read_tokenizer
    from quantize.standard_recipes import (  # llama.cpp loads only once the checkpoint is known to be one
        BOARDS,
        CONTEXT,
        RECIPES,
        memory_bytes,
        weigh_recipes,
    )

    words = read_tokenizer(checkpoint.folder, checkpoint.text.vocab)
    weights = {name: sum(weigh_recipes(checkpoint, name).values()) for name in RECIPES}
    memory = memory_bytes(checkpoint, weights["Q4_K_M"])
    vision_bytes = 2 * sum(math.prod(checkpoint.shape(row)) for row in checkpoint.vision_rows)
    facts = {
        "checkpoint": str(checkpoint.folder),
        "family": checkpoint.family,
        "size": checkpoint.size,
        "variant": checkpoint.variant(),
        "layout": checkpoint.layout,
        "dtype": "FP8" if checkpoint.fp8 else "BF16",
        "parameters": checkpoint.parameters,
        "tensors": len(checkpoint.sources),
        "ignored": checkpoint.ignored,
        "source_bytes": sum(source.n_bytes for source in checkpoint.sources.values()),
        "tied_embeddings": checkpoint.text.tied,
        "tokenizer": words.file.name,
        "vocab": checkpoint.text.vocab,
        "language_bytes": weights,
        "vision_bytes": vision_bytes,
        "memory_bytes_q4_k_m": memory,
        "fits": [board for board, gib in BOARDS.items() if memory <= gib * 2**30],
    }
    if arguments.json:
        print(json.dumps(facts))
        return
    t, v = checkpoint.text, checkpoint.vision
    print(f"{checkpoint.folder}")
    name = f"{facts['family']} {facts['size']} {facts['variant']}"
    print(f"  model       {name}, {facts['parameters'] / 1e9:.3f} B parameters")
    heads = f"{t.heads} heads x {t.head_dim}, {t.kv_heads} kv heads"
    print(f"  text        {t.layers} layers, hidden {t.hidden}, {heads}, ffn {t.ffn}")
    print(f"  embeddings  {t.vocab} rows, {'tied to' if t.tied else 'apart from'} the output head")
    if v is None:
        print("  vision      none: a text-only model, which edge-agent cannot serve")
    else:
        print(f"  vision      {v.layers} layers, hidden {v.hidden}, patch {v.patch}, merge {v.merge}")
    layout = f"{facts['layout']} layout, {facts['dtype']}"
    print(f"  tensors     {facts['tensors']} used, {layout}, {facts['source_bytes'] / 1e9:.2f} GB")
    for why, count in Counter(checkpoint.ignored.values()).items():
        print(f"  ignored     {count}: {why}")
    print(f"  tokenizer   {words.file.name}, {len(words.tokens)} tokens, {len(words.merges)} merges")
    print("  a bundle of it, GB: language + vision.onnx + mmproj.gguf")
    for name, n_bytes in weights.items():
        parts, total = (n_bytes / 1e9, vision_bytes / 1e9), (n_bytes + 2 * vision_bytes) / 1e9
        print(f"    {name:8} {parts[0]:7.3f} + {parts[1]:.3f} + {parts[1]:.3f} = {total:.3f}")
    fits = ", ".join(facts["fits"]) or "none of the known boards"
    print(f"  serving Q4_K_M with {CONTEXT} tokens of context: {memory / 2**30:.1f} GiB, estimated; fits: {fits}")


def _convert(arguments: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(arguments.checkpoint)
    from quantize.build import convert

    with _ProgressDisplay() as report:
        convert(checkpoint, arguments.out, arguments.type, arguments.force, report)
    print(f"{arguments.out}: {checkpoint.family} {checkpoint.size} at {arguments.type}")


def _imatrix(arguments: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(arguments.checkpoint)
    from quantize.measure.collect_imatrix import collect_imatrix

    sources = _sources(arguments)
    with _ProgressDisplay() as report:
        found = collect_imatrix(checkpoint, arguments.out, sources, report)
    print(f"{arguments.out}: {len(found.sums)} weights, {found.n_chunks} chunks of text, {found.datasets}")


def _sources(arguments: argparse.Namespace) -> CalibrationData:
    """What imatrix and evaluate show a model."""
    from quantize.measure.collect_imatrix import INSTRUCTIONS, TEXT, CalibrationData, read_text

    for key, least in (("chunks", 0), ("max_frames", 1)):
        if getattr(arguments, key) < least:
            _fail(f"--{key.replace('_', '-')}: expected {least} or more, found {getattr(arguments, key)}", 2)
    lines = INSTRUCTIONS
    if arguments.instructions is not None:
        lines = tuple(filter(None, map(str.strip, read_text(arguments.instructions).splitlines())))
        if not lines:
            _fail(f"{arguments.instructions}: no instructions; expected one a line")
    return CalibrationData(
        text=arguments.calibration or TEXT,
        frames=arguments.frames,
        instructions=lines,
        action_space=arguments.action_space,
        max_chunks=arguments.chunks,
        max_frames=arguments.max_frames,
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    from edge_agent.tools.stills import read_stills
    from quantize.measure.evaluate import evaluate
    from quantize.measure.html_report import html_report

    material = _sources(arguments)
    with _ProgressDisplay() as report:
        found = evaluate(arguments.bundles, arguments.reference, material, report)
    if arguments.html is not None:
        frames = list(read_stills(material.frames, material.max_frames)) if material.frames else []
        arguments.html.write_text(html_report(found, frames), encoding="utf-8")
    if arguments.json:
        import msgspec

        print(msgspec.json.encode(found).decode())
        return
    for one in found:
        t = one.text
        print(f"{one.bundle}: {one.recipe}, {one.language_bytes / 1e6:.1f} MB")
        print(f"  perplexity      {t.perplexity:.6g} ± {t.perplexity_sd:.4g}, reference {t.reference_perplexity:.6g}")
        print(f"  KL divergence   mean {t.kl_mean:.5f} ± {t.kl_sd:.5f}, median {t.kl_median:.5f}, "
              f"99 % {t.kl_p99:.5f}, most {t.kl_max:.5f}")  # fmt: skip
        print(f"  same top token  {t.same_top:.2%} of {t.n}")
        if (a := one.actions) is not None:
            differ = ", ".join(f"{key} {value:.4f}" for key, value in a.mean_difference.items())
            print(f"  same action     {a.same_action:.1%} of {a.n} frames; numbers within 0.05: {a.fields_within:.1%}")
            print(f"  mean difference {differ or 'no numbers to compare'}")
            print(f"  vision cosine   least {a.vision_cosine_min:.5f}")


def _lora(arguments: argparse.Namespace) -> None:
    from quantize.source.lora import read_adapter, write_adapter

    base = arguments.base
    if base is None:
        base = Path(str(read_table(arguments.adapter / ADAPTER).get("base_model_name_or_path")))
        if not base.is_dir():
            _fail(f"--base: {arguments.adapter} says {str(base)!r}, which is no folder here; give the checkpoint's", 2)
    checkpoint = read_checkpoint(base)
    if arguments.out.is_dir() or (arguments.out.exists() and not arguments.force):
        _fail(f"{arguments.out}: exists; give another name, or --force to replace a file")
    if not arguments.out.absolute().parent.is_dir():
        _fail(f"{arguments.out.absolute().parent}: no such folder; make it first")
    adapter = read_adapter(arguments.adapter, checkpoint)
    with _ProgressDisplay() as report:
        write_adapter(adapter, checkpoint, arguments.out, lambda *done: report("adapter", *done), arguments.sign)
    ranks = ", ".join(map(str, adapter.ranks))
    print(
        f"{arguments.out}: {len(adapter.added)} matrices of rank {ranks} for {checkpoint.family} {checkpoint.size}, "
        f"{arguments.out.stat().st_size / 1e6:.1f} MB"
    )


def _build(arguments: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(arguments.checkpoint)
    from quantize.build import VisionFormat, build
    from quantize.formats.imatrix import check_imatrix, read_imatrix
    from quantize.source.lora import merged, read_adapter
    from quantize.standard_recipes import RECIPES

    if arguments.recipe not in RECIPES:
        _fail(f"--recipe: expected one of {', '.join(RECIPES)}, found {arguments.recipe!r}", 2)
    weighed = None
    if arguments.imatrix is not None:
        weighed = read_imatrix(arguments.imatrix)
        check_imatrix(weighed, arguments.imatrix, checkpoint)
    name, types, facts = arguments.recipe, None, {}
    if arguments.merge is not None:
        adapter = read_adapter(arguments.merge, checkpoint)
        checkpoint = merged(checkpoint, adapter)
        facts["merged"] = {"adapter": arguments.merge.name, "matrices": len(adapter.added), "ranks": adapter.ranks}
    with _ProgressDisplay() as report:
        if arguments.budget is not None or arguments.fit is not None:
            plan = _plan(arguments, checkpoint, weighed, report)
            name, types = f"fit {plan.n_bytes / 1e6:.1f} MB", plan.types
            facts["fit"] = {key: getattr(plan, key) for key in plan.__struct_fields__ if key != "types"}
        manifest = build(
            checkpoint, arguments.out, name, arguments.force, report, importance=weighed, types=types, facts=facts,
            key=arguments.sign, eyes=VisionFormat(arguments.vision, arguments.mmproj, arguments.fixed),
        )  # fmt: skip
    if types is not None and not arguments.json:
        _show_plan(plan)
    n_bytes = sum(file.bytes for file in manifest.files.values())
    if arguments.json:
        import msgspec

        print(msgspec.json.encode(manifest).decode())
    else:
        model = manifest.model
        print(
            f"{arguments.out}: {model.family} {model.size} {manifest.recipe}, {n_bytes / 1e6:.1f} MB, tried and hashed"
        )


def _plan(
    arguments: argparse.Namespace, checkpoint: Checkpoint, weighed: Imatrix | None, report: Callable
) -> Allocation:
    from quantize.build_folder import check_target
    from quantize.measure import bit_allocation
    from quantize.measure.collect_imatrix import TEXT, read_text
    from quantize.standard_recipes import BOARDS, budget_bytes

    if weighed is None:
        _fail("--budget and --fit need --imatrix FILE; make one with edge-quantize imatrix", 2)
    budget = arguments.budget
    if arguments.fit is not None:
        boards = {board.lower().replace(" ", "-"): board for board in BOARDS}
        if arguments.fit not in boards:
            _fail(f"--fit: expected one of {', '.join(boards)}, found {arguments.fit!r}", 2)
        budget = budget_bytes(checkpoint, boards[arguments.fit])
        if budget <= 0:
            _fail(f"--fit {arguments.fit}: vision, cache and buffers alone need more than this board has")
    check_target(arguments.out, arguments.force)
    path = arguments.sensitivity or arguments.out.with_name(arguments.out.name + ".sensitivity.json")
    text = read_text(arguments.calibration or TEXT)
    return bit_allocation.fitted(checkpoint, weighed, budget, text, arguments.chunks, path, report)


def _show_plan(plan: Allocation) -> None:
    table = Table(box=None)
    for title in ("tensor", "type", "MB", "divergence", "next", "saved by an MB of it"):
        table.add_column(title, no_wrap=True)
    for row in plan.choices:
        more = (row.next_type, f"{row.next_kl_per_mb:.2g}") if row.next_type else ("", "")
        table.add_row(row.tensor, row.type, f"{row.n_bytes / 1e6:.3f}", f"{row.kl:.2g}", *more)
    Console(highlight=False).print(table)
    line = f"{plan.n_bytes / 1e6:.3f} MB: mean KL divergence {plan.measured_kl:.4g} (reckoned {plan.reckoned_kl:.4g})"
    if plan.standard:
        line += f"; {plan.standard}, the best standard recipe of no more bytes: {plan.standard_kl:.4g}"
    print(line)


def _height_x_width(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected height x width in pixels such as 448x448, found {text!r}")
    return int(found[1]), int(found[2])


def _size(text: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(B|[KMG]i?B)", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"expected a size such as 2.0GB or 900MB, found {text!r}")
    unit = found[2].lower()
    return round(float(found[1]) * (1024 if "i" in unit else 1000) ** " kmg".index(unit[0] if len(unit) > 1 else " "))


class _ProgressDisplay:
    """Progress: a bar on a terminal, a line per stage and ten seconds otherwise. On stderr, stdout is for results."""

    def __enter__(self):
        console = Console(stderr=True)
        self._stage, self._last = "", 0.0
        self._bar = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<18}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[what]}"),
                console=console,
            )
            self._bar.start()
        return self._report

    def __exit__(self, *_error: object) -> None:
        if self._bar:
            self._bar.stop()

    def _report(self, stage: str, what: str, done: int, total: int) -> None:
        if _interrupted:
            raise KeyboardInterrupt
        if not total:  # a remark
            (self._bar.console.print if self._bar else lambda line: print(line, file=sys.stderr, flush=True))(stage)
            return
        new, ended = stage != self._stage, done >= total
        self._stage = stage
        if self._bar:
            if new:
                self._task = self._bar.add_task(stage, total=total, what="")
            self._bar.update(self._task, completed=done, what="" if ended else what)
        elif new or ended or time.monotonic() - self._last > 10:
            self._last = time.monotonic()
            print(f"{stage}: {'done' if ended else f'{100 * done // total} %'}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
