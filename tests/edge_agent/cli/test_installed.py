"""edge-agent bundle install, list, verify and rollback, as they are typed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_agent.bundle import signing, store
from edge_agent.bundle.manifest import LANGUAGE, MANIFEST, read_manifest
from edge_agent.bundle.store import hold_folder, list_bundles
from edge_agent.bundle.verify import verify_bundle
from edge_agent.cli import installed, main
from edge_agent.errors import UserError
from tests.harness import ROOT
from tests.harness.small_bundle import make


@pytest.fixture
def device(tmp_path, monkeypatch):
    """The configuration of a device, in the place of /etc/edge-agent.yaml."""
    signing.keygen(tmp_path / "fleet")
    config = tmp_path / "edge-agent.yaml"
    config.write_text(
        f"bundle: {tmp_path}/bundles/current\ntrusted_keys: [{tmp_path}/fleet.pub]\ncamera: {{source: /dev/video0}}\n"
    )
    monkeypatch.setattr(installed, "DEFAULT_CONFIG", config)
    return config


def bundle(*arguments: object) -> int:
    return main.run_command(main.make_parser().parse_args(["bundle", *map(str, arguments)]))


def test_a_device_from_its_first_bundle_to_a_rollback(device, tmp_path, capsys):
    key = tmp_path / "fleet"
    assert bundle("list") == 0 and "no bundle is installed; install one" in capsys.readouterr().out
    assert bundle("verify") == 0
    assert bundle("install", make(tmp_path / "one", 1, key)) == 0
    shown = capsys.readouterr()
    assert "ministral3 3B Q4_K_M" in shown.out and "counter 1, verified, signed, current" in shown.out
    assert shown.err == ""
    assert bundle("install", make(tmp_path / "two", 1, key)) == 0 and bundle("list") == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0].split() == ["name", "model", "installed", "counter", "state", "size"]
    assert " current " in lines[1] and " previous " in lines[2]
    assert bundle("rollback") == 0 and bundle("verify") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["ok", "ok"]
    assert verify_bundle(tmp_path / "bundles" / "current").manifest.created_by == "one"
    assert bundle("install", tmp_path / "one") == 0 and "was current already" in capsys.readouterr().out


def test_control_characters_of_a_manifest_are_not_printed(device, tmp_path, capsys):
    source = make(tmp_path / "one", 1, tmp_path / "fleet")
    manifest = json.loads((source / "bundle.json").read_text())
    manifest["model"]["family"] = "x\nok   current  verified\x1b[2J"
    (source / "bundle.json").write_text(json.dumps(manifest))
    signature = signing.sign((source / MANIFEST).read_bytes(), tmp_path / "fleet")
    (source / signing.SIGNATURE).write_bytes(signature)
    assert bundle("install", source) == 0 and bundle("list") == 0 and bundle("verify") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and not any(line.startswith("ok   current") for line in out.splitlines())


def test_the_list_as_json(device, tmp_path, capsys):
    for name, counter in (("one", 3), ("two", 4)):
        bundle("install", make(tmp_path / name, counter, tmp_path / "fleet"))
    bundle("rollback", "--allow-lower-counter")
    _folder, descriptor = hold_folder(tmp_path / "bundles" / "current")
    previous = os.readlink(tmp_path / "bundles" / "current")
    capsys.readouterr()
    assert bundle("list", "--json") == 0
    os.close(descriptor)
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["store"] == str(tmp_path / "bundles") and found["least_counter"] == 4
    one, two = found["bundles"]
    assert one.keys() == two.keys() and one["name"] == one["bundle_id"] == previous
    assert (one["state"], one["counter"], one["served"], one["below_least_counter"]) == ("current", 3, True, True)
    assert (two["state"], two["counter"], two["served"], two["below_least_counter"]) == ("previous", 4, False, False)
    assert one["model"] == "ministral3 3B Q4_K_M" and one["installed"].endswith("Z") and one["fault"] is None
    files = read_manifest(tmp_path / "one").manifest.files
    assert one["bytes"] == sum(file.bytes for file in files.values())


@pytest.mark.parametrize(
    ("make_wrong", "words"),
    [
        (lambda path, key: make(path, 0, key), "counter: expected 1 or more"),
        (lambda path, key: make(path, 1), "missing, but trusted_keys requires a signature"),
        (lambda path, key: path, "no such folder"),
        (lambda path, key: (make(path, 1, key) / LANGUAGE).write_bytes(b"GGUF"), "expected"),
    ],
)
def test_a_refused_bundle_changes_nothing(device, tmp_path, make_wrong, words):
    bundle("install", make(tmp_path / "good", 1, tmp_path / "fleet"))
    before = os.readlink(tmp_path / "bundles" / "current")
    make_wrong(tmp_path / "wrong", tmp_path / "fleet")
    with pytest.raises(UserError, match=words):
        bundle("install", tmp_path / "wrong")
    assert os.readlink(tmp_path / "bundles" / "current") == before


def test_verify_names_what_is_damaged(device, tmp_path, capsys):
    for name in ("old", "new"):
        bundle("install", make(tmp_path / name, key=tmp_path / "fleet"))
    names = [entry.folder for entry in list_bundles(tmp_path / "bundles")]
    path = tmp_path / "bundles" / names[1] / LANGUAGE
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    assert bundle("verify") == 78
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["ok", names[0]], ["FAIL", names[1]]]
    for name, status in ((names[0], 0), ("current", 0), (names[1], 78), (tmp_path / "old", 0), ("none", 78)):
        assert bundle("verify", name) == status
    (path.parent / MANIFEST).write_text("{")
    assert bundle("list") == 0
    shown = capsys.readouterr()
    assert "previous, damaged" in shown.out and "bundle.json: damaged" in shown.err


def test_what_the_configuration_leaves_open_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(installed, "DEFAULT_CONFIG", tmp_path / "none.yaml")
    folder = tmp_path / "bundles"
    bundle("install", make(tmp_path / "one"), "--store", folder)
    notes = capsys.readouterr().err
    assert "none.yaml: the signature is not checked" in notes and "it counts as 0" in notes
    config = tmp_path / "config.yaml"
    config.write_text(f"bundle: {tmp_path}/one\ncamera: {{source: none}}\n")
    bundle("install", tmp_path / "one", "--store", folder, "--config", config)
    notes = capsys.readouterr().err
    assert "trusted_keys is empty" in notes and f"set it to {folder}/current" in notes
    assert installed.read_device(main.make_parser().parse_args(["bundle", "list"])).store == store.DEFAULT_STORE


@pytest.mark.parametrize("content", [None, "", "bundle: 3"])
def test_a_configuration_that_cannot_be_read_is_not_passed_over(device, tmp_path, content):
    """A key in it would be ignored. None: a link to nothing."""
    device.unlink()
    device.symlink_to("nothing") if content is None else device.write_text(content)
    for arguments in (["install", make(tmp_path / "one")], ["rollback"], ["verify"]):
        with pytest.raises((UserError, OSError)):
            bundle(*arguments)
    assert not (tmp_path / "bundles").exists()


def test_an_installation_beside_a_running_daemon_asks_for_a_restart(device, tmp_path, capsys):
    for name in ("one", "two"):
        if name == "two":
            folder, descriptor = hold_folder(tmp_path / "bundles" / "current")
        bundle("install", make(tmp_path / name, key=tmp_path / "fleet"))
    os.close(descriptor)
    assert f"a daemon still serves {folder.name}; systemctl restart edge-agent" in capsys.readouterr().err


# -- the real command -------------------------------------------------------------------------------------------------

# Loads the command once, and runs it in a process of its own for each line. Prints its number, then its status.
COMMANDS = """
import os, sys
from edge_agent.bundle import gguf_package
from edge_agent.cli import installed, main
for line in sys.stdin:
    if not (child := os.fork()):
        sys.argv = ["edge-agent", "bundle", *line.split()]
        main.main()
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Commands:
    """Starts `edge-agent bundle` commands quickly."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMANDS], env=env, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.communicate(timeout=60)

    def start(self, *arguments: object) -> int:
        """Returns the number of the process."""
        self._process.stdin.write(" ".join(map(str, arguments)) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def status(self) -> int:
        return int(self._line())

    def _line(self) -> str:
        """The next line that is a number; the commands print between them."""
        while not (line := self._process.stdout.readline()).strip().isdigit():
            assert line
        return line


def bench_device(tmp_path: Path) -> tuple[Path, Path]:
    """A configuration without keys, and the store that it names."""
    config, folder = tmp_path / "config.yaml", tmp_path / "bundles"
    config.write_text(f"bundle: {folder}/current\ncamera: {{source: none}}\n")
    return config, folder


@pytest.fixture(scope="module")
def commands():
    with Commands() as running:
        yield running


def kill_at_random_points(commands: Commands, tmp_path: Path, n_kills: int) -> set[str]:
    """Kill installations; the store is right after each. Returns the makers of the bundles that were current."""
    config, folder = bench_device(tmp_path)
    large, delay, seen = random.Random(4).randbytes(1 << 20), random.Random(5), set()
    sources = [make(tmp_path / name, report=large) for name in ("one", "two")]
    for _ in range(n_kills):
        shutil.rmtree(folder, ignore_errors=True)
        begin_s = time.monotonic()
        commands.start("install", sources[0], "--config", config)
        assert commands.status() == 0
        duration_s = time.monotonic() - begin_s
        process = commands.start("install", sources[1], "--config", config)
        time.sleep(duration_s * delay.uniform(0, 1.1))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        assert commands.status() in (0, signal.SIGKILL)
        seen.add(verify_bundle(folder / "current").manifest.created_by)
        for entry in list_bundles(folder):
            verify_bundle(folder / entry.folder)
        commands.start("install", sources[1], "--config", config)
        assert commands.status() == 0 and not list(folder.glob(".*"))
        assert verify_bundle(folder / "current").manifest.created_by == "two"
    return seen


def test_a_killed_installation_leaves_the_old_bundle_or_the_new_one(commands, tmp_path):
    assert kill_at_random_points(commands, tmp_path, 3) <= {"one", "two"}


@pytest.mark.soak
def test_installations_killed_at_100_points(commands, tmp_path):
    assert kill_at_random_points(commands, tmp_path, 100) == {"one", "two"}


def test_two_installations_at_once(commands, tmp_path):
    """Nobody waits: a command installs, or says that another one is at work."""
    config, folder = bench_device(tmp_path)
    sources = [make(tmp_path / name) for name in ("one", "two")]
    commands.start("install", sources[0], "--config", config)
    here = True
    try:
        bundle("install", sources[1], "--config", config)
    except UserError as error:
        here = False
        assert "another edge-agent bundle command" in str(error)
    status = commands.status()
    assert (status == 0 or here) and status in (0, 1 << 8)
    assert verify_bundle(folder / "current").manifest.created_by in ("one", "two")
