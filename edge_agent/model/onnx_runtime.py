"""onnxruntime with its telemetry switched off. Every other file imports onnxruntime from here.

From version 1.29 on, onnxruntime for Linux reports to its maker by default. The import starts the upload and writes
files below the home folder. The variable is read during the import, and never again.

    from edge_agent.model.onnx_runtime import onnxruntime
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # in place of any value of the user's

import onnxruntime

__all__ = ["onnxruntime"]
