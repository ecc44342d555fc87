"""Where the sockets are: the daemon and a client on the same machine choose the same folder."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.wire import endpoints
from edge_agent.wire.endpoints import endpoint, find_listener, is_listening, runtime_dir, why_unreachable


def test_the_folder_is_the_configured_one_then_that_of_systemd_then_that_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setattr(endpoints, "UNIT_FOLDER", tmp_path / "unit")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/one:/run/two")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert runtime_dir("/here") == Path("/here")
    assert runtime_dir() == Path("/run/one")
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    assert runtime_dir() == Path(f"/run/user/7/edge-agent-{os.getuid()}")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime_dir() == Path(f"/tmp/edge-agent-{os.getuid()}")
    (tmp_path / "unit").mkdir()
    assert runtime_dir() == tmp_path / "unit"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the folder belongs to another user
    assert runtime_dir() == Path(f"/tmp/edge-agent-{os.getuid()}")


def test_an_endpoint_is_a_socket_in_the_folder():
    assert endpoint(Path("/run/one"), "actions") == "ipc:///run/one/actions"


# -- not there, not allowed, not the daemon ---------------------------------------------------------------------------


@pytest.fixture
def unit_folder(monkeypatch, tmp_path):
    """There is no unit, and the user's own folder is tmp_path/run/edge-agent-UID."""
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(endpoints, "UNIT_FOLDER", tmp_path / "unit")
    return tmp_path / "unit"


def without_permission(monkeypatch, path: Path) -> None:
    """As for a user who is not root: root may open everything."""
    may = os.access
    monkeypatch.setattr(os, "access", lambda asked, mode: Path(asked) != path and may(asked, mode))


def test_a_folder_that_is_not_there_yet_is_no_fault(unit_folder):
    assert why_unreachable(runtime_dir(), "control") == ""
    assert why_unreachable(Path("/nowhere/at/all"), "control") == ""


def test_an_own_folder_with_or_without_a_socket_can_be_used(tmp_path):
    assert why_unreachable(tmp_path, "control") == ""
    (tmp_path / "control").touch()
    assert why_unreachable(tmp_path, "control") == ""


def test_the_folder_of_the_unit_is_named_where_its_daemon_may_not_be_asked(monkeypatch, unit_folder):
    """Not "is edge-agent running?": it is."""
    unit_folder.mkdir()
    without_permission(monkeypatch, unit_folder)
    assert runtime_dir() != unit_folder
    line = why_unreachable(runtime_dir(), "control")
    assert line.startswith(f"{unit_folder}: permission denied; join the group")
    runtime_dir().mkdir(parents=True)  # a daemon of this user's own
    assert why_unreachable(runtime_dir(), "control") == ""


@pytest.mark.parametrize("closed", ["", "control"])
def test_a_closed_folder_or_socket_is_permission_denied(monkeypatch, tmp_path, closed):
    (tmp_path / "control").touch()
    without_permission(monkeypatch, tmp_path / closed)
    assert "permission denied" in why_unreachable(tmp_path, "control")


def test_a_folder_below_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    assert "Not a directory" in why_unreachable(tmp_path / "file" / "run", "control")


def test_a_folder_that_everybody_may_write_to_is_not_trusted(tmp_path):
    tmp_path.chmod(0o777)
    assert "anybody can pose as the daemon" in why_unreachable(tmp_path, "control")
    tmp_path.chmod(stat.S_ISVTX | 0o777)
    assert "anybody can pose as the daemon" in why_unreachable(tmp_path, "control")


def test_a_folder_of_another_user_in_place_of_the_own_one_is_not_trusted(monkeypatch, unit_folder):
    """/tmp/edge-agent-UID can be made by anybody. A folder that was named is the caller's decision."""
    runtime_dir().mkdir(parents=True)
    os.chown(runtime_dir(), 64002, -1)
    monkeypatch.setattr(os, "getuid", lambda: 64001)
    own = runtime_dir()
    own.mkdir(parents=True)
    os.chown(own, 64002, -1)
    assert "expected a folder of uid 64001, found one of uid 64002" in why_unreachable(own, "control")
    os.chown(own, 64001, -1)
    assert why_unreachable(own, "control") == ""
    os.chown(own, 0, -1)
    assert why_unreachable(own, "control") == ""


def test_a_link_of_another_user_in_place_of_the_own_folder_is_not_trusted(monkeypatch, unit_folder, tmp_path):
    """It can lead to a good folder now, and to another one when the client connects again."""
    monkeypatch.setattr(os, "getuid", lambda: 64001)
    good, own = tmp_path / "good", runtime_dir()
    good.mkdir()
    os.chown(good, 64001, -1)
    own.parent.mkdir(parents=True)
    own.symlink_to(good)
    os.chown(own, 64002, -1, follow_symlinks=False)
    assert "found one of uid 64002: not your daemon" in why_unreachable(own, "control")
    os.chown(own, 64001, -1, follow_symlinks=False)
    assert why_unreachable(own, "control") == ""


def test_a_parent_that_may_not_be_searched_is_named(monkeypatch, unit_folder):
    """XDG_RUNTIME_DIR of the user before su."""

    def denied(path: Path, **_more: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "lstat", denied)
    for folder in (runtime_dir(), Path("/run/other")):
        assert why_unreachable(folder, "control") == f"{folder}: Permission denied"


def test_a_folder_that_is_made_meanwhile_is_no_fault(monkeypatch, tmp_path):
    """A client and a daemon that start together."""
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert why_unreachable(tmp_path / "run", "control") == ""


def test_a_daemon_that_does_not_answer_is_not_one_that_is_gone(tmp_path):
    path = tmp_path / "control"
    assert not is_listening(path)
    with socket.socket(socket.AF_UNIX) as stopped:
        stopped.bind(str(path))
        assert not is_listening(path)
        stopped.listen(0)
        for _ in range(3):
            assert is_listening(path), "also when its queue is full"
            assert find_listener(path) in (os.getpid(), 0)
    assert not is_listening(path)
    assert is_listening(tmp_path / ("x" * 200)), "what cannot be found out"


def test_the_process_that_listens_is_named(tmp_path):
    """Not the one that made the socket: a child took it over."""
    path = tmp_path / "control"
    with socket.socket(socket.AF_UNIX) as inherited:
        inherited.bind(str(path))
        code = f"import socket, sys; socket.socket(fileno={inherited.fileno()}).listen(); print(flush=True); input()"
        with subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[inherited.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as child:
            assert child.stdout is not None and child.stdout.readline() == b"\n"
            assert find_listener(path) == child.pid
            child.communicate(b"\n")
    assert find_listener(path) is None
