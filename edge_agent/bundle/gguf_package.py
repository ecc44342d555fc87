"""The package gguf without its tokenizers. Every other file imports gguf from here.

gguf imports mistral_common where that is installed. mistral_common imports urllib3, which makes an internet socket
while it is imported. All of it takes a second.

    from edge_agent.bundle.gguf_package import gguf
"""

from __future__ import annotations

import sys
from typing import Any, cast

_loaded = {name: module for name, module in sys.modules.items() if name == "mistral_common"}
sys.modules["mistral_common"] = cast(Any, None)  # Python then says that it is not installed; gguf goes on without it

import gguf  # noqa: E402
from gguf import GGMLQuantizationType  # noqa: E402

del sys.modules["mistral_common"]
sys.modules.update(_loaded)

__all__ = ["GGMLQuantizationType", "gguf"]
