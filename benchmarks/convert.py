"""Conversion at a true shape: peak memory by the operating system's account, speed against a plain copy of the file.

Makes a checkpoint with the shape of a released model and random weights (once, in --work), converts it, builds a bundle
of it, and ends with one JSON line. Needs about 25 GB of disk for the 3B.

    .venv/bin/python benchmarks/convert.py [--shape 3b] [--dtype bf16]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VISION = {"vision_hidden": 1024, "vision_layers": 24, "vision_heads": 16, "vision_ffn": 4096}
TEXT = {"heads": 32, "kv_heads": 8, "head_dim": 128, "vocab": 131072}
SHAPES = {
    "3b": {"hidden": 3072, "layers": 26, "ffn": 9216, "tied": True, "rope_theta": 1e6},
    "8b": {"hidden": 4096, "layers": 34, "ffn": 14336, "tied": False, "rope_theta": 1e6},
    "14b": {"hidden": 5120, "layers": 40, "ffn": 16384, "tied": False, "rope_theta": 1e9},
}
MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--dtype", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="where the files go")
    arguments = parser.parse_args()
    checkpoint = make(arguments.work, arguments.shape, arguments.dtype)
    source_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    copy_s = copy(checkpoint, arguments.work)
    figures: dict[str, object] = {"shape": arguments.shape, "dtype": arguments.dtype, "source_gb": source_bytes / 1e9}
    figures["copy_mb_per_s"] = round(source_bytes / 1e6 / copy_s, 1)
    out = arguments.work / "out"
    for name, command in (("convert", ["convert"]), ("build", ["build", "--recipe", "Q4_K_M"])):
        shutil.rmtree(out, ignore_errors=True)
        wall_s, peak_mib = measure(["edge-quantize", command[0], str(checkpoint), str(out), *command[1:]])
        written = sum(path.stat().st_size for path in out.iterdir())
        figures |= {f"{name}_s": round(wall_s, 1), f"{name}_peak_mib": round(peak_mib), f"{name}_bytes": written}
    figures["convert_mb_per_s"] = round(figures["convert_bytes"] / 1e6 / figures["convert_s"], 1)
    figures["language_q4_k_m_bytes"] = (out / "language.gguf").stat().st_size
    shutil.rmtree(out)
    print(json.dumps(figures))
    return 0


def make(work: Path, shape: str, dtype: str) -> Path:
    """A checkpoint of this shape; kept for the next run. The last file written marks it complete."""
    folder = work / f"{shape}-{dtype}"
    if not (folder / "tekken.json").is_file():
        print(f"making {folder}: random weights, a few minutes", file=sys.stderr)
        sys.path.insert(0, str(ROOT / "tests"))
        import toy

        shutil.rmtree(folder, ignore_errors=True)
        toy.write_checkpoint(folder, dtype=dtype, shards=4, **TEXT, **VISION, **SHAPES[shape])
    return folder


def copy(checkpoint: Path, work: Path) -> float:
    """Seconds to read and write the same bytes durably, in this run: the floor for any conversion."""
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


def measure(command: list[str]) -> tuple[float, float]:
    """(wall seconds, peak resident MiB of the largest process) of a command."""
    start = time.monotonic()
    process = subprocess.Popen([str(Path(sys.executable).parent / command[0]), *command[1:]])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)}: exit status {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - start, usage.ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
