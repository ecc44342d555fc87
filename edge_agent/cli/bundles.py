"""edge-agent keygen: the keys that sign bundles."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_agent.bundle import signing


def keygen(arguments: argparse.Namespace) -> int:
    public = signing.keygen(Path(arguments.file))
    print(f"{arguments.file}: private key, for edge-quantize build --sign")
    print(f"{public}: public key, for `trusted_keys` in the configuration")
    return 0


HANDLERS = {"keygen": keygen}
