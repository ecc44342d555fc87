"""The types of the standard recipes in a form that people can compare: role -> runs of layers.

    python -m tests.harness.recipe_types        writes tests/reference/recipe_types.json

Run it with a new release of llama-cpp-python, and read the difference before it is committed.
"""

from __future__ import annotations

import json
import re
import tempfile
from itertools import groupby
from pathlib import Path

import numpy as np

from edge_agent.bundle.gguf_package import gguf
from tests.harness import ROOT, releases

Type = gguf.GGMLQuantizationType

PATH = ROOT / "tests" / "reference" / "recipe_types.json"


def runs_by_role(types: dict[str, Type]) -> dict[str, str]:
    """{"blk.0.attn_v.weight": Q6_K, ...} -> {"attn_v": "Q6_K x 3, Q4_K x 10, ..."}, layers in ascending order."""
    by_role: dict[str, dict[int, str]] = {}
    for name, kind in types.items():
        layer = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", name)
        role, number = (layer[2], int(layer[1])) if layer else (name.removesuffix(".weight"), 0)
        by_role.setdefault(role, {})[number] = kind.name
    return {
        role: ", ".join(f"{kind} x {len(list(run))}" for kind, run in groupby(kinds[n] for n in sorted(kinds)))
        for role, kinds in sorted(by_role.items())
    }


def types_by_recipe(folder: Path) -> dict[str, dict[str, Type]]:
    """Recipe -> GGUF name -> type, for a checkpoint; with "+imatrix" after the recipe's name, for one with an
    imatrix."""
    from quantize.formats.imatrix import Imatrix
    from quantize.source.checkpoint import read_checkpoint
    from quantize.standard_recipes import RECIPES, recipe_types

    checkpoint = read_checkpoint(folder)
    matrices = {spec.gguf: checkpoint.shape(spec)[1] for spec in checkpoint.text_tensors if len(spec.shape) == 2}
    imatrix = Imatrix(
        sums={name: np.ones(width) for name, width in matrices.items()}, counts=dict.fromkeys(matrices, 1)
    )
    return {
        recipe + suffix: recipe_types(checkpoint, recipe, weights)
        for recipe in RECIPES
        for suffix, weights in (("", None), ("+imatrix", imatrix))
    }


def main() -> None:
    import llama_cpp

    pinned: dict[str, object] = {"llama_cpp_python": llama_cpp.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for name in releases.RELEASES:
            types = types_by_recipe(releases.write_release(Path(folder) / name, name))
            pinned[name] = {recipe: runs_by_role(found) for recipe, found in types.items()}
    PATH.write_text(json.dumps(pinned, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
