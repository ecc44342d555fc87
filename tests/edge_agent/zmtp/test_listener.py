"""What bind may replace, whether the path is still ours, and what is removed at the end."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.zmtp.listener import Listener, PathError, is_killed


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


def test_a_dead_socket_that_cannot_be_removed_is_one_line(path, monkeypatch):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    def refuse(_path: Path, missing_ok: bool) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(PathError, match=f"^{path}: cannot be bound: Permission denied$"):
        Listener(path, 0o600)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_a_socket_with_a_living_owner_is_not_replaced(path, kind):
    with socket.socket(socket.AF_UNIX, kind) as owner:
        owner.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            owner.listen(0)
        with pytest.raises(PathError, match=r"process.* listens there; stop it") as caught:
            Listener(path)
        assert caught.value.is_busy and path.is_socket()
        assert kind != socket.SOCK_STREAM or f"process {os.getpid()} listens there" in str(caught.value)


def test_an_owner_whose_queue_is_full_is_alive(path):
    with socket.socket(socket.AF_UNIX) as owner, socket.socket(socket.AF_UNIX) as peer:
        owner.bind(str(path))
        owner.listen(0)
        peer.connect(str(path))  # the queue has room for this one alone
        for _ in range(2):
            with pytest.raises(PathError, match=r"process.* listens there"):
                Listener(path)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAFNOSUPPORT])
def test_without_a_socket_it_is_one_line(path, monkeypatch, number):
    def no_socket(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("edge_agent.zmtp.listener.socket.socket", no_socket)
    with pytest.raises(PathError, match=f"cannot be bound: {os.strerror(number)}"):
        Listener(path)
    assert not path.exists()


# -- a process that SIGKILL does not end ------------------------------------------------------------------------------

FREEZERS = Path("/sys/fs/cgroup/freezer")  # cgroup v1: a SIGKILL stays pending in a frozen process
STATUS = "Name:\tpython3\nState:\tD (disk sleep)\nSigQ:\t1/95000\nSigPnd:\t{}\nShdPnd:\t{}\nSigBlk:\t0\n"
NO, KILL, TERM, SEVERAL = "0" * 16, "0000000000000100", "0000000000004000", "0000000000004100"


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (STATUS.format(NO, NO), False),
        (STATUS.format(KILL, KILL), True),
        (STATUS.format(NO, KILL), True),
        (STATUS.format(SEVERAL, NO), True),
        (STATUS.format(TERM, TERM), False),
        ("Name:\tx\n", False),
        (None, False),
    ],
    ids=["runs", "killed", "killed as a process", "killed and terminated", "terminated", "old kernel", "gone"],
)
def test_a_process_with_a_pending_sigkill_is_killed(tmp_path, status, expected):
    if status is not None:
        (tmp_path / "77").mkdir()
        (tmp_path / "77" / "status").write_text(status)
    assert is_killed(77, tmp_path) is expected
    assert not is_killed(os.getpid())


@pytest.mark.skipif(not os.access(FREEZERS, os.W_OK), reason="needs root and a cgroup v1 freezer")
def test_the_path_of_a_process_that_was_killed_and_hangs_is_taken_over(path):
    """As a camera process inside a driver: its socket listens for ever, and nobody will accept."""
    frozen = FREEZERS / f"edge-agent-listener-{os.getpid()}"
    frozen.mkdir()
    code = f"import socket; s = socket.socket(1); s.bind({str(path)!r}); s.listen(); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as hung:
        try:
            assert hung.stdout is not None and hung.stdout.readline() == b"\n"
            (frozen / "cgroup.procs").write_text(str(hung.pid))
            (frozen / "freezer.state").write_text("FROZEN")
            with pytest.raises(PathError, match=f"process {hung.pid} listens there; stop it"):
                Listener(path)  # it hangs, and may go on
            hung.kill()
            listener = Listener(path)
            assert hung.poll() is None and listener.is_ours()
            listener.close()
        finally:
            (frozen / "freezer.state").write_text("THAWED")
            hung.kill()
            hung.wait()
            while frozen.exists():  # the kernel needs a moment
                with contextlib.suppress(OSError):
                    frozen.rmdir()


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
