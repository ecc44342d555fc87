"""Conversion at the shape of a released model: peak memory as the kernel counts it, speed against a plain copy.

Makes a checkpoint with random weights (once, in --work), converts it, builds a bundle of it, and prints one JSON line
at the end. Needs about 25 GB of disk for the 3B, 45 GB for the 8B in FP8.

    .venv/bin/python benchmarks/convert.py [--shape 3b] [--dtype bf16] [--only-convert]
    … --peer llama.cpp/convert_hf_to_gguf.py --peer-python PYTHON     llama.cpp's converter, in turn with ours

The peer needs a Python with torch. It writes language.gguf and mmproj.gguf in two runs; its figures are of both runs
together. edge-quantize writes vision.onnx as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VISION = {"vision_hidden": 1024, "vision_layers": 24, "vision_heads": 16, "vision_ffn": 4096}
TEXT = {"heads": 32, "kv_heads": 8, "head_dim": 128, "vocab": 131072}
SHAPES = {
    "3b": {"hidden": 3072, "layers": 26, "ffn": 9216, "tied": True, "rope_theta": 1e6},
    "8b": {"hidden": 4096, "layers": 34, "ffn": 14336, "tied": False, "rope_theta": 1e6},
    "14b": {"hidden": 5120, "layers": 40, "ffn": 16384, "tied": False, "rope_theta": 1e9},
}
BIN = Path(sys.executable).parent
MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--dtype", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="folder for the files")
    parser.add_argument("--only-convert", action="store_true", help="do not build a bundle")
    parser.add_argument("--repeat", type=int, default=1, help="conversions; the figures are medians (default 1)")
    parser.add_argument("--peer", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that runs it")
    arguments = parser.parse_args()
    checkpoint = make(arguments.work, arguments.shape, arguments.dtype)
    source_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    figures: dict[str, Any] = {"shape": arguments.shape, "dtype": arguments.dtype, "source_gb": source_bytes / 1e9}
    out = arguments.work / "out"
    runs: dict[str, list[tuple[float, float]]] = {"copy": [], "convert": [], "peer": [], "build": []}
    for _ in range(arguments.repeat):
        runs["copy"].append((copy(checkpoint, arguments.work), 0.0))
        shutil.rmtree(out, ignore_errors=True)
        runs["convert"].append(measure([BIN / "edge-quantize", "convert", checkpoint, out]))
        figures["convert_bytes"] = written(out)
        if arguments.peer is not None:
            shutil.rmtree(out)
            runs["peer"].append(peer(arguments.peer_python, arguments.peer, checkpoint, out))
            figures["peer_bytes"] = written(out)
    if not arguments.only_convert:
        shutil.rmtree(out)
        runs["build"].append(measure([BIN / "edge-quantize", "build", checkpoint, out, "--recipe", "Q4_K_M"]))
        figures |= {"build_bytes": written(out), "language_q4_k_m_bytes": (out / "language.gguf").stat().st_size}
    shutil.rmtree(out)
    for name, results in runs.items():
        if results:
            figures[f"{name}_s"] = round(statistics.median(wall_s for wall_s, _ in results), 1)
            figures[f"{name}_peak_mib"] = round(max(peak_mib for _, peak_mib in results))
    del figures["copy_peak_mib"]
    figures["copy_mb_per_s"] = round(source_bytes / 1e6 / figures["copy_s"], 1)
    for name in ("convert", "peer"):
        if runs[name]:
            figures[f"{name}_written_mb_per_s"] = round(figures[f"{name}_bytes"] / 1e6 / figures[f"{name}_s"], 1)
    print(json.dumps(figures))
    return 0


def make(work: Path, shape: str, dtype: str) -> Path:
    """A checkpoint of this shape, kept for the next run. The file `complete` is written last."""
    folder = work / f"{shape}-{dtype}"
    if not (folder / "complete").is_file():
        print(f"making {folder}: random weights, a few minutes", file=sys.stderr)
        sys.path.insert(0, str(ROOT))
        from tests.harness import toy

        shutil.rmtree(folder, ignore_errors=True)
        toy.write_checkpoint(folder, dtype=dtype, shards=4, tokenizer="both", **TEXT, **VISION, **SHAPES[shape])
        (folder / "tokenizer.json").rename(beside(folder))
        (folder / "complete").touch()
    return folder


def beside(checkpoint: Path) -> Path:
    """tokenizer.json. llama.cpp's converter needs it for the vision encoder (to find [IMG_BREAK]) and fails with it for
    the language model, because transformers then expects mistral-common's tokenizer."""
    return checkpoint.with_name(checkpoint.name + "-tokenizer.json")


def copy(checkpoint: Path, work: Path) -> float:
    """Seconds to copy the same bytes durably, in this run: no conversion can be faster."""
    start = time.monotonic()
    for path in checkpoint.glob("*.safetensors"):
        target = work / "copy"
        with path.open("rb") as source, target.open("wb") as out:
            while block := source.read(16 * MIB):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        target.unlink()
    return time.monotonic() - start


def written(out: Path) -> int:
    return sum(path.stat().st_size for path in out.iterdir())


def peer(python: str, script: Path, checkpoint: Path, out: Path) -> tuple[float, float]:
    """(wall seconds, peak MiB) of llama.cpp's converter, with its files synced to disk as ours are."""
    out.mkdir()
    command = [python, script, checkpoint, "--outtype", "bf16", "--outfile"]
    language = measure([*command, out / "language.gguf"])
    os.link(beside(checkpoint), checkpoint / "tokenizer.json")
    vision = measure([*command, out / "mmproj.gguf", "--mmproj"])
    (checkpoint / "tokenizer.json").unlink()
    start = time.monotonic()
    os.sync()
    return language[0] + vision[0] + time.monotonic() - start, max(language[1], vision[1])


def measure(command: list[str | Path]) -> tuple[float, float]:
    """(wall seconds, peak resident MiB of the largest process) of a command."""
    start = time.monotonic()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, command))}: exit status {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - start, usage.ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
