"""Where the sockets are: the daemon and a client on the same machine choose the same folder."""

from __future__ import annotations

import os
from pathlib import Path

from edge_agent.wire import endpoints
from edge_agent.wire.endpoints import endpoint, runtime_dir


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
