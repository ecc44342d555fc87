"""A fake daemon, and a client with a fake clock that is connected to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.client.client import Client
from tests.harness.clock import FakeClock
from tests.harness.fake_daemon import FakeDaemon


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as opened:
        yield opened


@pytest.fixture
def client(tmp_path: Path, clock: FakeClock) -> Iterator[Client]:
    with Client(str(tmp_path), clock) as connected:
        yield connected


@pytest.fixture
def subscribed(daemon: FakeDaemon, client: Client) -> Client:
    """The client, subscribed to actions."""
    client.next_answer(0.0)
    daemon.wait_for_subscriber("actions")
    return client
