"""A configuration that was tuned on another camera or bundle is said at the start, once."""

from __future__ import annotations

import pytest

from edge_agent.config import TunedConfig
from tests.harness.in_process import InProcess, fake_config


@pytest.mark.parametrize(
    ("tuned", "says"),
    [
        (TunedConfig(), ""),
        (TunedConfig(date="2026-11-27", frames="6x4", bundle="0" * 16), ""),
        (TunedConfig(date="2026-11-27", frames="1920x1080", bundle="0" * 16), "frames of 1920x1080, found 6x4"),
        (TunedConfig(date="2026-11-27", frames="6x4", bundle="1" * 16), "bundle of 1111111111111111, found 0000"),
        (TunedConfig(date="2026-11-27", frames="1x1", bundle="1" * 16), "frames of 1x1, found 6x4 and bundle of"),
    ],
)
def test_what_was_tuned_for_another_camera_or_bundle_is_one_line(capfd, tuned, says):
    with InProcess(config=fake_config(tuned=tuned)) as running:
        running.make_ready()
        running.turn(seconds=1.0)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tuned")]
    assert len(lines) == bool(says) and says in "".join(lines)
