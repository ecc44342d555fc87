"""The commands of edge-quantize as a table, and the parser that is made from it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from quantize.cli import commands

DESCRIPTION = "Converts a released Ministral 3 or Mistral Small checkpoint to a 4-bit bundle for edge-agent."
EPILOG = """examples:
  edge-quantize inspect  Ministral-3-3B-Instruct-2512
  edge-quantize build    Ministral-3-3B-Instruct-2512  bundles/3b --recipe Q4_K_M
  edge-quantize imatrix  Ministral-3-3B-Instruct-2512  3b.imatrix.gguf --frames images/
  edge-quantize build    Ministral-3-3B-Instruct-2512  bundles/3b --imatrix 3b.imatrix.gguf
  edge-quantize build    Ministral-3-3B-Instruct-2512  bundles/3b --imatrix 3b.imatrix.gguf --budget 2.0GB
  edge-quantize evaluate bundles/3b --reference Ministral-3-3B-Instruct-2512 --frames images/ --html 3b.html
  edge-quantize lora     my-adapter/  my-adapter.gguf --base Ministral-3-3B-Instruct-2512
  edge-quantize convert  Ministral-3-3B-Instruct-2512  full/3b --type bf16

A checkpoint is the folder as downloaded: config.json with model*.safetensors, or params.json with
consolidated*.safetensors; and tekken.json or tokenizer.json. BF16 and FP8.
"""


class Argument(NamedTuple):
    name: str  # "--flag", or a positional argument
    options: dict[str, Any]  # of argparse's add_argument
    group: str = ""  # a key of GROUPS
    exclusive: str = ""  # arguments with the same word exclude each other


class Command(NamedTuple):
    run: Callable[[argparse.Namespace], None]
    help: str
    arguments: list[Argument]


def argument(name: str, help: str = "", *, group: str = "", exclusive: str = "", **options: Any) -> Argument:
    return Argument(name, options | ({"help": help} if help else {}), group, exclusive)


def flag(name: str, help: str) -> Argument:
    return Argument(name, {"action": "store_true", "help": help})


def path(name: str, metavar: str, help: str = "", **options: Any) -> Argument:
    return argument(name, help, type=Path, metavar=metavar, **options)


def height_x_width(text: str) -> tuple[int, int]:
    """448x448 -> (448, 448), height and width in pixels."""
    sides = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if not sides:
        raise argparse.ArgumentTypeError(f"expected height x width in pixels such as 448x448, found {text!r}")
    return int(sides[1]), int(sides[2])


def whole_number(text: str) -> int:
    """The counter of a bundle: 0 to 2**31."""
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > 1 << 31:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {1 << 31}, found {text!r}")
    return int(text)


def size_bytes(text: str) -> int:
    """2.0GB -> 2000000000; KiB, MiB and GiB are powers of 1024."""
    parts = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(B|[KMG]i?B)", text.strip(), re.IGNORECASE)
    if not parts:
        raise argparse.ArgumentTypeError(f"expected a size such as 2.0GB or 900MB, found {text!r}")
    unit = parts[2].lower()
    return round(float(parts[1]) * (1024 if "i" in unit else 1000) ** " kmg".index(unit[0] if len(unit) > 1 else " "))


CHECKPOINT = path("checkpoint", "CHECKPOINT", "folder of a released checkpoint")
JSON = flag("--json", "print one JSON line instead of text")
SIGN = path("--sign", "KEY", "sign with this private key (edge-agent keygen makes one)")
CONFIG = path("--config", "FILE", "the daemon's configuration that will serve the bundle (default: the defaults)")
TEXT = path("--calibration", "TEXT", "a UTF-8 text file (default: a small one that is included)")
# What `imatrix` and `evaluate` give to a model.
CALIBRATION = [
    TEXT,
    argument("--chunks", "chunks of 512 tokens of the text (default: all)", type=int, default=0, metavar="N"),
    path("--frames", "DIR|VIDEO", "images to act on: a folder of them, or a video"),
    path("--instructions", "FILE", "instructions for the frames, one per line, used in turn"),
    argument("--action-space", "action space for the frames (default velocity_body)", default="velocity_body"),
    argument("--max-frames", "frames, at even distances (default 64)", type=int, default=64, metavar="N"),
]
ALLOCATION = "a type for each tensor, under a size budget"
GROUPS = {
    ALLOCATION: "Chooses the type of every tensor so that the model's outputs change as little as possible. Needs "
    "--imatrix. The measurements are kept in a file: another budget for the same model takes seconds.",
}
COMMANDS = {
    "inspect": Command(
        commands.inspect,
        "show what a checkpoint is, how large its bundles are, and which boards can serve it",
        [CHECKPOINT, CONFIG, JSON],
    ),
    "convert": Command(
        commands.convert,
        "write language.gguf, mmproj.gguf and vision.onnx without quantisation",
        [
            CHECKPOINT,
            path("out", "OUT_DIR", "folder to make, with the three files"),
            argument("--type", "type of the matrices (default bf16)", choices=("bf16", "f16", "f32"), default="bf16"),
            flag("--force", "replace OUT_DIR if edge-quantize made it"),
        ],
    ),
    "imatrix": Command(
        commands.imatrix,
        "measure how important each column of each weight is, on text and frames",
        [CHECKPOINT, path("out", "OUT.gguf", "a file in llama.cpp's imatrix format"), *CALIBRATION],
    ),
    "build": Command(
        commands.build,
        "make a complete 4-bit bundle: validated, hashed, with its manifest",
        [
            CHECKPOINT,
            path("out", "BUNDLE_DIR", "folder to make"),
            argument(
                "--recipe",
                "Q4_K_M (default), Q4_K_S, Q4_0, IQ4_XS, Q5_K_M, Q6_K, Q8_0; BF16 is lossless",
                default="Q4_K_M",
                metavar="RECIPE",
            ),
            path("--imatrix", "FILE", "an importance matrix of the same model"),
            argument(
                "--budget",
                "size of the language model, such as 2.0GB or 900MB",
                type=size_bytes,
                metavar="SIZE",
                group=ALLOCATION,
                exclusive="size",
            ),
            argument(
                "--fit",
                "the largest size that the board's memory can serve, such as orin-nano-8gb",
                metavar="BOARD",
                group=ALLOCATION,
                exclusive="size",
            ),
            path("--config", "FILE", "for --fit: the daemon's configuration (default: the defaults)", group=ALLOCATION),
            path(
                "--calibration", "TEXT", "the text on which outputs are compared (default: included)", group=ALLOCATION
            ),
            argument(
                "--chunks", "chunks of 512 tokens of it (default 2)", type=int, default=2, metavar="N", group=ALLOCATION
            ),
            path("--sensitivity", "FILE", "the measurements (default: BUNDLE_DIR.sensitivity.json)", group=ALLOCATION),
            flag("--force", "replace BUNDLE_DIR if edge-quantize made it"),
            argument(
                "--vision",
                "format of vision.onnx (default bf16)",
                choices=("bf16", "f16", "f32", "int8"),
                default="bf16",
            ),
            argument(
                "--mmproj",
                "format of mmproj.gguf (default bf16)",
                choices=("bf16", "f16", "f32", "q8_0"),
                default="bf16",
            ),
            argument(
                "--fixed",
                "the only frame size that vision.onnx takes, for TensorRT, such as 448x448",
                type=height_x_width,
                metavar="HxW",
            ),
            path("--merge", "ADAPTER_DIR", "merge a PEFT LoRA adapter"),
            SIGN,
            argument(
                "--counter",
                "a whole number; a device that has installed a bundle with a higher one refuses this one (edge-agent "
                "bundle install)",
                type=whole_number,
                metavar="N",
            ),
            flag("--json", "print the manifest as one JSON line"),
        ],
    ),
    "evaluate": Command(
        commands.evaluate,
        "measure what quantisation changed: on text, in actions, in the vision encoder",
        [
            path("bundles", "BUNDLE", "bundles of one model", nargs="+"),
            path("--reference", "DIR", "the checkpoint, or a bundle of it at BF16", required=True),
            *CALIBRATION,
            path("--html", "FILE", "write a page with plots and the frames that differ most"),
            JSON,
        ],
    ),
    "lora": Command(
        commands.lora,
        "convert a PEFT LoRA adapter to a GGUF adapter that can be switched on and off at run time",
        [
            path("adapter", "ADAPTER_DIR", "folder with adapter_config.json and adapter_model.safetensors"),
            path("out", "OUT.gguf", "file to write"),
            path("--base", "CHECKPOINT", "the model it was trained on (default: the one that the adapter names)"),
            SIGN,
            flag("--force", "replace OUT.gguf"),
        ],
    ),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-quantize",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=command.help, description=f"{command.help[0].upper()}{command.help[1:]}."
        )
        subparser.set_defaults(run=command.run)
        _add_arguments(subparser, command.arguments)
    return parser


def _add_arguments(parser: argparse.ArgumentParser, arguments: list[Argument]) -> None:
    groups: dict[str, Any] = {"": parser}
    exclusive: dict[str, Any] = {}
    for each in arguments:
        if each.group not in groups:
            groups[each.group] = parser.add_argument_group(each.group, GROUPS[each.group])
        target = groups[each.group]
        if each.exclusive:
            if each.exclusive not in exclusive:
                exclusive[each.exclusive] = target.add_mutually_exclusive_group()
            target = exclusive[each.exclusive]
        target.add_argument(each.name, **each.options)
