"""python -m quantize.cli is edge-quantize."""

from quantize.cli.entry import main

main()
