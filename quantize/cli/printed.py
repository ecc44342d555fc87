"""What the commands print on stdout: facts about a checkpoint, a bundle, an allocation, an evaluation."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # these load native code
    from edge_agent.bundle.manifest import Manifest
    from edge_agent.config import Config
    from quantize.measure.bit_allocation import Allocation
    from quantize.measure.evaluate import Evaluation
    from quantize.source.checkpoint import Checkpoint
    from quantize.source.tokenizer import Tokenizer


class Inspection(NamedTuple):
    """What `inspect` finds out."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    manifests: dict[str, Manifest]  # recipe -> the manifest that a build would write
    config: Config  # of the daemon
    serving_mib: float  # of a Q4_K_M bundle
    boards: list[str]  # that can serve it


def to_json(value: Any) -> str:
    """One line."""
    import msgspec

    return msgspec.json.encode(value).decode()


def inspection_json(inspection: Inspection) -> str:
    from edge_agent.bundle.manifest import VISION

    checkpoint, manifests = inspection.checkpoint, inspection.manifests
    vision = manifests["Q4_K_M"].files.get(VISION)
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
        "files": [file.name for file in checkpoint.files],
        "unused": checkpoint.unused,
        "source_bytes": sum(source.n_bytes for source in checkpoint.sources.values()),
        "tied_embeddings": checkpoint.text.tied,
        "tokenizer": inspection.tokenizer.file.name,
        "tokenizer_beside": inspection.tokenizer.beside,
        "vocab": checkpoint.text.vocab,
        "language_bytes": {name: sum(manifest.bytes_by_type.values()) for name, manifest in manifests.items()},
        "vision_bytes": vision.bytes if vision else 0,
        "serving_mib_q4_k_m": round(inspection.serving_mib),
        "fits": inspection.boards,
    }
    return json.dumps(facts)


def print_inspection(inspection: Inspection) -> None:
    checkpoint, tokenizer = inspection.checkpoint, inspection.tokenizer
    t, v = checkpoint.text, checkpoint.vision
    print(f"{checkpoint.folder}")
    name = f"{checkpoint.family} {checkpoint.size} {checkpoint.variant()}"
    print(f"  model       {name}, {checkpoint.parameters / 1e9:.3f} B parameters")
    heads = f"{t.heads} heads x {t.head_dim}, {t.kv_heads} kv heads"
    print(f"  text        {t.layers} layers, hidden {t.hidden}, {heads}, ffn {t.ffn}")
    print(f"  embeddings  {t.vocab} tokens, {'tied to' if t.tied else 'separate from'} the output head")
    if v is None:
        print("  vision      none: a text-only model, which edge-agent cannot serve")
    else:
        print(f"  vision      {v.layers} layers, hidden {v.hidden}, patch {v.patch}, merge {v.merge}")
    layout = f"{checkpoint.layout} layout, {'FP8' if checkpoint.fp8 else 'BF16'}"
    source_bytes = sum(source.n_bytes for source in checkpoint.sources.values())
    print(f"  tensors     {len(checkpoint.sources)} used, {layout}, {source_bytes / 1e9:.2f} GB")
    names = [file.name for file in checkpoint.files]
    print(f"  files       {checkpoint.config.path.name}, {names[0]}{f' … {names[-1]}' if len(names) > 1 else ''}")
    for name, why in checkpoint.unused.items():
        print(f"  not used    {name}: {why}")
    for why, count in Counter(checkpoint.ignored.values()).items():
        print(f"  ignored     {count}: {why}")
    print(f"  tokenizer   {tokenizer.file.name}, {len(tokenizer.tokens)} tokens, {len(tokenizer.merges)} merges")
    if tokenizer.beside:
        print(f"              {tokenizer.beside}")
    print("  size of a bundle, GB: language.gguf + vision.onnx + mmproj.gguf")
    for recipe, manifest in inspection.manifests.items():
        sizes_gb = [file.bytes / 1e9 for file in manifest.files.values()]
        print(f"    {recipe:8} {' + '.join(f'{size_gb:.3f}' for size_gb in sizes_gb)} = {sum(sizes_gb):.3f}")
    context, image_tokens = inspection.config.language.context, inspection.config.vision.max_image_tokens
    boards = ", ".join(inspection.boards) or "none of the known boards"
    print(
        f"  serving     Q4_K_M needs about {inspection.serving_mib / 1024:.1f} GiB with a context of {context} tokens "
        f"and {image_tokens} image tokens; fits: {boards}"
    )


def print_bundle(out: Path, manifest: Manifest) -> None:
    model, n_bytes = manifest.model, sum(file.bytes for file in manifest.files.values())
    print(f"{out}: {model.family} {model.size} {manifest.recipe}, {n_bytes / 1e6:.1f} MB, validated and hashed")


def print_allocation(allocation: Allocation) -> None:
    table = Table(box=None)
    for title in ("tensor", "type", "MB", "KL divergence", "next type", "KL reduction per MB"):
        table.add_column(title, no_wrap=True)
    for choice in allocation.choices:
        following = (choice.next_type, f"{choice.next_kl_per_mb:.2g}") if choice.next_type else ("", "")
        table.add_row(choice.tensor, choice.type, f"{choice.n_bytes / 1e6:.3f}", f"{choice.kl:.2g}", *following)
    Console(highlight=False).print(table)
    line = f"{allocation.n_bytes / 1e6:.3f} MB: mean KL divergence {allocation.measured_kl:.4g}"
    line += f" (predicted {allocation.predicted_kl:.4g})"
    if allocation.standard:
        line += f"; {allocation.standard}, the largest standard recipe of this size: {allocation.standard_kl:.4g}"
    print(line)


def print_evaluation(evaluation: Evaluation) -> None:
    t, a = evaluation.text, evaluation.actions
    print(f"{evaluation.bundle}: {evaluation.recipe}, {evaluation.language_bytes / 1e6:.1f} MB")
    print(f"  perplexity      {t.perplexity:.6g} ± {t.perplexity_sd:.4g}, reference {t.reference_perplexity:.6g}")
    kl = f"mean {t.kl_mean:.5f} ± {t.kl_sd:.5f}, median {t.kl_median:.5f}, 99 % {t.kl_p99:.5f}, maximum {t.kl_max:.5f}"
    print(f"  KL divergence   {kl}")
    print(f"  same top token  {t.same_top:.2%} of {t.n}")
    if a is not None:
        differences = ", ".join(f"{key} {value:.4f}" for key, value in a.mean_difference.items())
        print(f"  same action     {a.same_action:.1%} of {a.n} frames; fields within 0.05: {a.fields_within:.1%}")
        print(f"  mean difference {differences or 'no fields to compare'}")
        print(f"  vision cosine   least {a.vision_cosine_min:.5f}")
