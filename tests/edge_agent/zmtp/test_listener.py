"""What bind may replace, whether the path is still ours, and what is removed at the end."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from edge_agent.zmtp.listener import Listener, PathError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


def make_file(path: Path) -> None:
    path.write_text("a recording of an hour")


def make_link(path: Path) -> None:
    target = path.with_name("target")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(target))  # a link to a socket that may be replaced is no such socket
    path.symlink_to(target)


OTHERS = {
    "a file": make_file,
    "a folder": Path.mkdir,
    "a FIFO": os.mkfifo,
    "a symbolic link": make_link,
}


def inode(path: Path) -> int:
    return os.lstat(path).st_ino


@pytest.mark.parametrize("kind", OTHERS)
def test_only_a_socket_is_replaced(path, kind):
    OTHERS[kind](path)
    before = inode(path)
    with pytest.raises(PathError, match=f"{path}: .* found {kind}; remove it") as caught:
        Listener(path)
    assert caught.value.is_taken and not caught.value.is_busy
    assert inode(path) == before and "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a device")
def test_a_device_is_not_replaced(path):
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with pytest.raises(PathError, match="found a device"):
        Listener(path)
    assert path.exists()


def test_a_socket_that_a_killed_process_left_is_replaced(path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listener = Listener(path, mode=0o660)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
    listener.close()
    assert not path.exists()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_a_socket_with_a_living_owner_is_not_replaced(path, kind):
    with socket.socket(socket.AF_UNIX, kind) as owner:
        owner.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            owner.listen(0)
        with pytest.raises(PathError, match="another process listens there; stop it") as caught:
            Listener(path)
        assert caught.value.is_busy and path.is_socket()


def test_an_owner_whose_queue_is_full_is_alive(path):
    with socket.socket(socket.AF_UNIX) as owner, socket.socket(socket.AF_UNIX) as peer:
        owner.bind(str(path))
        owner.listen(0)
        peer.connect(str(path))  # the queue has room for this one alone
        for _ in range(2):
            with pytest.raises(PathError, match="another process listens there"):
                Listener(path)


def test_what_is_not_ours_any_more_is_not_removed(path):
    first = Listener(path)
    path.unlink()
    assert not first.is_ours()
    second = Listener(path)
    assert second.is_ours() and not first.is_ours()
    first.close()
    assert second.is_ours()
    path.rename(path.with_name("elsewhere"))
    make_file(path)
    assert not second.is_ours()
    second.close()
    assert path.read_text().startswith("a recording")


@pytest.mark.parametrize(
    "wrong",
    ["no/such/folder/socket", "x" * 120, "\0x", "\ud800", "file/below"],
    ids=["absent", "long", "nul", "surrogate", "below-a-file"],
)
def test_a_path_that_cannot_be_bound_is_one_line(tmp_path, wrong):
    (tmp_path / "file").touch()
    with pytest.raises(PathError, match="cannot be bound: ") as caught:
        Listener(tmp_path / wrong)
    assert "\n" not in str(caught.value)
