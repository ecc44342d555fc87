"""edge-agent keygen: the keys that sign bundles."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_agent.bundle import signing
from edge_agent.cli.commands import CommandFailed


def keygen(arguments: argparse.Namespace) -> int:
    try:
        public = signing.keygen(Path(arguments.file))
    except signing.SigningError as error:
        raise CommandFailed(str(error)) from None
    print(f"{arguments.file}: the private key, for edge-quantize build --sign")
    print(f"{public}: the public key, for `trusted_keys` in the configuration")
    return 0


HANDLERS = {"keygen": keygen}
