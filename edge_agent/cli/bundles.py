"""edge-agent keygen: the keys that sign bundles. edge-agent bundle wrap: a bundle of published GGUF files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edge_agent.bundle import signing
from edge_agent.bundle.wrap import wrap
from edge_agent.cli.commands import EX_USAGE, CommandFailed
from edge_agent.errors import one_line


def keygen(arguments: argparse.Namespace) -> int:
    public = signing.keygen(Path(arguments.file))
    print(f"{arguments.file}: private key, for edge-quantize build --sign")
    print(f"{public}: public key, for `trusted_keys` in the configuration")
    return 0


def wrap_files(arguments: argparse.Namespace) -> int:
    """Print one line about the new bundle. Raises CommandFailed, BundleError, ConfigError."""
    files: list[Path] = arguments.files
    if len(files) not in (2, 3):
        raise CommandFailed(f"expected LANGUAGE.gguf [MMPROJ.gguf] OUT, found {len(files)} names", EX_USAGE)
    language, *mmproj, out = files
    manifest = wrap(
        language,
        mmproj[0] if mmproj else None,
        out,
        layout=arguments.layout,
        link=arguments.link,
        signing_key=arguments.sign,
        report=_show_progress if sys.stderr.isatty() else lambda n_done, n_total: None,
    )
    layout = manifest.prompt_layout.name
    sees = "frames and text" if manifest.vision is not None else "text only: it answers from the vehicle's state"
    n_bytes = sum(file.bytes for file in manifest.files.values())
    model = f"{manifest.model.family} {manifest.model.size} {manifest.recipe}"
    print(one_line(f"{out}: {model}, {n_bytes / 1e6:.1f} MB, prompt layout {layout}, {sees}"))
    return 0


def _show_progress(n_done: int, n_total: int) -> None:
    end = "\n" if n_done == n_total else ""
    print(f"\r{n_done / 1e6:.0f} of {n_total / 1e6:.0f} MB", end=end, file=sys.stderr, flush=True)


HANDLERS = {"keygen": keygen, "bundle wrap": wrap_files}
