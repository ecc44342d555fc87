"""Loaded models that the tests of this room share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.engine import EngineRig, engine_of, full_precision_bundle
from tests.harness.rig import TASK
from tests.harness.shared import SharedFolders


@pytest.fixture(scope="session")
def exact_bundle(toy_bundle: Path, convert: Callable[..., Path], shared: SharedFolders) -> Path:
    return shared.folder("exact", lambda folder: full_precision_bundle(toy_bundle, convert, folder)) / "bundle"


@pytest.fixture(scope="module")
def shared_rig(toy_bundle: Path) -> Iterator[EngineRig]:
    with engine_of(toy_bundle, "velocity_body") as rig:
        yield rig


@pytest.fixture
def rig(shared_rig: EngineRig) -> EngineRig:
    """The shared model under TASK, without a text and with no events yet."""
    if not shared_rig.engine.text.idle:
        shared_rig.engine.text.stop("")
    shared_rig.engine.instruct(TASK)
    shared_rig.events.clear()
    return shared_rig
