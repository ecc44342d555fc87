"""A bundle of a released model's true shape with random weights: true sizes, memory and speed; answers mean nothing.

.venv/bin/python benchmarks/shape.py 3b OUT [--recipe Q4_K_M] [--work DIR]          or 8b, 14b
.venv/bin/python benchmarks/bench.py --bundle OUT --max-image-tokens 144
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import convert


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=convert.SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", default="Q4_K_M")
    parser.add_argument("--work", type=Path, default=convert.ROOT / "build" / "bench", help="where the checkpoint goes")
    options = parser.parse_args()
    checkpoint = convert.make(options.work, options.shape, "bf16")
    command = [convert.BIN / "edge-quantize", "build", checkpoint, options.out, "--recipe", options.recipe]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
