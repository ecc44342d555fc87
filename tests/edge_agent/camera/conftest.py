"""Fixtures for the camera: a slot, a clock, camera processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from edge_agent.ipc.frame_slot import Slot
from tests.harness.camera import CameraProcess, FakeClock, camera_processes


@pytest.fixture
def slot() -> Iterator[Slot]:
    slot = Slot.create()
    yield slot
    slot.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def camera_process() -> Iterator[Callable[..., CameraProcess]]:
    with camera_processes() as start:
        yield start
