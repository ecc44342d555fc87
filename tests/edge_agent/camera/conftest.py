"""Fixtures for the camera: a slot, a clock, camera processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from edge_agent.ipc.frame_slot import Slot
from tests.harness.camera import CameraProcess, FakeClock


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
    """camera_process(source, **config) starts a camera process; all of them end with the test."""
    processes: list[CameraProcess] = []

    def start(source: object, **config: object) -> CameraProcess:
        processes.append(CameraProcess(source, **config))
        return processes[-1]

    yield start
    for process in processes:
        process.close()
