"""The command line `edge-quantize`."""

from quantize.cli.entry import main

__all__ = ["main"]
