"""run and bench name the missing package before they start a process that needs it."""

from __future__ import annotations

import importlib.util

import msgspec
import pytest

from edge_agent.cli.commands import CommandFailed
from edge_agent.cli.daemon import require_onnxruntime
from edge_agent.config import CameraConfig, Config, VisionConfig

CONFIG = Config(bundle="b", camera=CameraConfig(source="none"))


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, True),
        ({"profile": "fast"}, True),
        ({"profile": "small"}, False),
        ({"vision": VisionConfig(backend="mtmd")}, False),
        ({"profile": "small", "vision": VisionConfig(backend="onnxruntime")}, True),
    ],
)
def test_onnxruntime_is_required_where_the_profile_or_the_backend_needs_it(monkeypatch, changes, needed):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = msgspec.structs.replace(CONFIG, **changes)
    if not needed:
        require_onnxruntime(config)
        return
    with pytest.raises(CommandFailed, match="onnxruntime is not installed"):
        require_onnxruntime(config)
