"""edge-quantize in this process, for every test of the toolchain."""

from tests.harness.quantize_cli import run

__all__ = ["run"]
