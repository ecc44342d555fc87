"""The runtime folder: who may open it, whose it is, and its lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from edge_agent.supervisor.publisher import Publisher
from edge_agent.supervisor.runtime_folder import EndpointError
from edge_agent.supervisor.shutdown import Shutdown
from edge_agent.wire.streams import STREAMS
from tests.harness.in_process import InProcess


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_folder_and_sockets_are_for_owner_and_group_alone(folder, umask):
    before = os.umask(umask)
    try:
        with contextlib.closing(Publisher(folder)):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o750 & ~umask
            for stream in STREAMS:
                assert (folder / stream).is_socket()
                assert stat.S_IMODE((folder / stream).stat().st_mode) == 0o660
            assert os.umask(umask) == umask  # and ours is as it was
    finally:
        os.umask(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_a_folder_that_everybody_may_write_to_is_refused(folder, mode):
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(EndpointError, match="everybody may write to it"):
        Publisher(folder)


def test_a_folder_of_another_user_is_refused(folder):
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with pytest.raises(
        EndpointError, match=f"expected a folder of uid {os.geteuid()}, found one of uid 12345"
    ) as caught:
        Publisher(folder)
    assert "\n" not in str(caught.value) and os.listdir(folder) == []


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/edge-agent")):
        with pytest.raises(EndpointError) as caught:
            Publisher(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nul\0nul", "half a \ud800 pair"])
def test_a_name_that_no_folder_can_have_is_one_line(tmp_path, name):
    with pytest.raises(EndpointError, match="expected the path of a folder") as caught:
        Publisher(tmp_path / name)
    assert str(caught.value).isprintable()


def test_a_path_too_long_for_a_socket_is_refused_by_its_length(tmp_path):
    room = 107 - len(f"{tmp_path}/") - len("/actions")
    Publisher(tmp_path / ("x" * room)).close()
    with pytest.raises(EndpointError, match=r"may have 107 bytes, found 108; use a shorter folder"):
        Publisher(tmp_path / ("x" * (room + 1)))
    with pytest.raises(EndpointError, match="shorter"):
        Publisher(tmp_path / ("ä" * (room // 2 + 1)))  # bytes are counted, not characters
    assert os.listdir(tmp_path) == ["x" * room]


def test_a_lock_held_for_a_moment_is_waited_for(folder, monkeypatch):
    """A program that cleans up old files locks a folder while it looks through it."""
    folder.mkdir()
    cleaner = os.open(folder, os.O_RDONLY)
    fcntl.flock(cleaner, fcntl.LOCK_EX)
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            os.close(cleaner)

    monkeypatch.setattr("edge_agent.supervisor.runtime_folder.time.sleep", sleep)
    Publisher(folder).close()
    assert len(naps) == 3


def test_a_file_system_without_locks_is_named(folder, monkeypatch):
    def no_locks(*_arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("edge_agent.supervisor.runtime_folder.fcntl.flock", no_locks)
    with pytest.raises(
        EndpointError, match="cannot be locked: No locks available; use a folder of a local file system"
    ):
        Publisher(folder)


def test_a_lost_endpoint_ends_the_daemon_with_1():
    """A daemon that cannot be told to stop may not go on; systemd starts it again."""
    with InProcess() as running:
        running.make_ready()
        running.publisher.lost = "runtime_dir: /run/edge-agent/control: cannot be bound: found a file"
        with pytest.raises(Shutdown, match="found a file") as caught:
            running.turn()
    assert caught.value.status == 1
