"""The model process. This file is imported before every other file of the room, and before native code is loaded."""

from __future__ import annotations

import os

# ggml's threads wait for each other with libgomp, which by default keeps a core busy for milliseconds after the last
# thread is done. On a small board that is the core which should publish the answer. Inside a graph no thread waits so
# long. libgomp reads the variable while it is loaded, with llama.cpp.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
