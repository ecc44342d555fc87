"""Budget: a conversion holds a few blocks of rows in memory, however large the model is."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.bundle.manifest import LANGUAGE
from tests.harness import ROOT


def growth_bytes(folder: Path, out: Path) -> int:
    """Additional resident memory at the peak of a conversion, in a process of its own.

    From /proc, because getrusage also counts what the parent had resident when it forked.
    """
    code = """if True:
        import pathlib, sys
        from quantize import build
        from quantize.formats.build_plan import plan_conversion
        from quantize.progress import SILENT
        from quantize.source import checkpoint
        def peak():
            lines = open("/proc/self/status").read().splitlines()
            return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
        checkpoint.BLOCK_BYTES = 1 << 20
        plan = plan_conversion(checkpoint.read_checkpoint(sys.argv[1]), "bf16")
        before = peak()
        build.convert(plan, pathlib.Path(sys.argv[2]), SILENT)
        print(peak() - before)
    """
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code, folder, out], env=env, capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.promise
@pytest.mark.parametrize("source", ["toy_bf16", "toy_small"])
def test_memory_does_not_grow_with_the_model(source: str, request, tmp_path: Path, capsys):
    """Three matrices of 67 MB in each layer, as holes in the file, converted in blocks of 1 MB."""
    folder = shutil.copytree(request.getfixturevalue(source), tmp_path / "large")
    ffn = 1 << 17
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"intermediate_size": ffn}
    (folder / "config.json").write_text(json.dumps(config))
    raw = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header, at, scales = json.loads(raw[8:start]), 0, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if ".mlp." in name:
            entry["shape"] = [ffn if n == 512 else n for n in entry["shape"]]
        size = math.prod(entry["shape"]) * {"BF16": 2, "F8_E4M3": 1}[entry["dtype"]]
        entry["data_offsets"] = [at, at + size]
        scales += [at] if name.endswith("_scale_inv") else []
        at += size
    head = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + at)
        for offset in scales:
            file.seek(8 + len(head) + offset)
            file.write(b"\x80\x3f")  # 1.0
    growth = growth_bytes(folder, tmp_path / "out")
    written = (tmp_path / "out" / LANGUAGE).stat().st_size
    with capsys.disabled():
        print(f"\nconversion of {source}: {growth / 1e6:.1f} MB more resident for {written / 1e6:.0f} MB written")
    assert written > 200e6 and growth < 30e6
    shutil.rmtree(tmp_path / "out")
