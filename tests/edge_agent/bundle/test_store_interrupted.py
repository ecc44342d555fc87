"""Installations that end early: after each, the store has the old bundle or the new one, and goes on working."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from edge_agent.bundle import store
from edge_agent.bundle.store import hold_folder, install, least_counter, list_bundles, roll_back
from edge_agent.bundle.verify import verify_bundle
from edge_agent.errors import BundleError
from tests.harness.power_cut import recorded
from tests.harness.small_bundle import maker, refused, states

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def check_every_state(disk, scratch: Path, old: str, new: str, make) -> set[str]:
    """After every interruption the store is what it was before, or what it was meant to be; and it goes on working."""
    seen, another = set(), make("another")
    for state in disk.states(scratch):
        current = maker(state / "current")
        seen.add(current)
        assert current in (old, new)
        before = states(state)
        expected = {"old": {"old": "current", "older": "previous"}, "new": {"new": "current", "old": "previous"}}
        assert {name: word for name, word in before.items() if word != "unused"} == expected[current]
        for entry in list_bundles(state):
            verify_bundle(state / entry.folder)  # a folder with a bundle's name is complete
        install(state, another)
        assert states(state) == {"another": "current", current: "previous"}
        assert not [name for name in os.listdir(state) if name.startswith(".")]
    return seen


def test_every_prefix_of_an_installation_leaves_the_old_bundle_or_the_new_one(bundles, make, tmp_path):
    for name in ("older", "old"):
        install(bundles, make(name))
    new = make("new")
    with recorded(bundles) as disk:
        install(bundles, new)
    assert disk.n_steps > 15 and check_every_state(disk, tmp_path / "states", "old", "new", make) == {"old", "new"}


def test_every_prefix_of_a_rollback_leaves_one_of_the_two(bundles, make, tmp_path):
    for name, counter in (("good", 1), ("bad", 2)):
        install(bundles, make(name, counter))
    with recorded(bundles) as disk:
        roll_back(bundles, allow_lower_counter=True)
    seen = set()
    for state in disk.states(tmp_path / "states"):
        seen.add(tuple(states(state).items()))
        assert least_counter(state) == 2
    assert seen == {(("bad", "current"), ("good", "previous")), (("good", "current"), ("bad", "previous"))}


def test_every_prefix_of_the_first_installation_leaves_nothing_or_the_bundle(tmp_path, make):
    bundles, source = tmp_path / "var" / "bundles", make("first")
    bundles.parent.mkdir()
    with recorded(bundles.parent) as disk:
        install(bundles, source)
    seen = set()
    for state in disk.states(tmp_path / "states"):
        seen.add(maker(state / "bundles" / "current") if (state / "bundles" / "current").exists() else "")
        install(state / "bundles", source)
        assert states(state / "bundles") == {"first": "current"}
    assert seen == {"", "first"}


@pytest.mark.parametrize("forgotten", ["the file", "the folder"])
def test_the_recorder_finds_a_missing_fsync(bundles, make, tmp_path, monkeypatch, forgotten):
    """Or the tests above would say nothing."""
    install(bundles, make("old"))
    if forgotten == "the folder":
        monkeypatch.setattr(store, "sync_folder", lambda folder: True)
    else:
        copy = lambda source, target: iter([target.write_bytes(source.read_bytes())])  # noqa: E731
        monkeypatch.setattr(store, "_copy_file", copy)
    new = make("new")
    with recorded(bundles) as disk:
        install(bundles, new)
    wrong = 0
    for state in disk.states(tmp_path / "states"):
        try:
            assert maker(state / "current") in ("old", "new")
        except BundleError:
            wrong += 1
    assert wrong > 0


@pytest.mark.parametrize("n_written", [0, 1, 3, 6, 7])
def test_a_full_disk_leaves_the_old_bundle_and_no_rest(bundles, make, monkeypatch, n_written):
    install(bundles, make("old"))
    before, real, count = sorted(os.listdir(bundles)), os.fsync, []

    def full(descriptor: int) -> None:
        count.append(descriptor)
        if len(count) > n_written + 1:  # the first one is that of the store itself
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    refused(lambda: install(bundles, make("new")), "No space left on device; make room")
    monkeypatch.setattr(os, "fsync", real)
    assert sorted(os.listdir(bundles)) == before and states(bundles) == {"old": "current"}


def test_too_little_room_is_seen_before_anything_is_copied(bundles, make, monkeypatch):
    install(bundles, make("old"))
    monkeypatch.setattr(store, "SPARE_BYTES", 1 << 60)
    refused(lambda: install(bundles, make("new")), "of free space, found", "make room")
    assert states(bundles) == {"old": "current"}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errno.EPERM, "no symbolic links (FAT and exFAT have none); put the store on ext4"),
        (errno.ENOTSUP, "no symbolic links"),
        (errno.EROFS, "mount the file system for writing"),
        (errno.EIO, "look for a fault of the disk"),
    ],
)
def test_a_file_system_without_links_is_refused_before_anything_is_copied(bundles, make, monkeypatch, error, words):
    def no_link(target, link, **_options):
        raise OSError(error, os.strerror(error), str(link))

    monkeypatch.setattr(os, "symlink", no_link)
    refused(lambda: install(bundles, make("one")), str(bundles), words)
    assert os.listdir(bundles) == ["lock"]


def test_a_store_that_may_not_be_written_is_one_line(bundles, make, monkeypatch):
    install(bundles, make("old"))
    real = os.open

    def read_only(path, flags, *arguments, **options):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", read_only)
    refused(lambda: install(bundles, make("new")), "lock: Read-only file system; mount")
    refused(lambda: roll_back(bundles), "lock: Read-only file system; mount")
    assert states(bundles) == {"old": "current"}


@pytest.mark.parametrize("kind", ["read-only", "full"])
def test_a_real_disk_that_cannot_be_written(tmp_path, make, kind):
    disk, source = tmp_path / "disk", make("one")
    disk.mkdir()
    options = "ro" if kind == "read-only" else "size=16k"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    try:
        words = "mount the file system for writing" if kind == "read-only" else "make room"
        refused(lambda: install(disk / "bundles", source), words)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_the_file_system_cannot_do_is_said(bundles, make, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(store, "sync_folder", lambda folder: False)
    change = install(bundles, make("one"))
    assert [remark.split(":")[0] for remark in change.remarks] == [
        "no locks on this file system", "no fsync of folders on this file system",
    ]  # fmt: skip
    install(bundles, make("two"))
    install(bundles, make("three"))
    assert states(bundles) == {"three": "current", "two": "previous"}
    assert hold_folder(bundles / "current")[0].is_dir()


def test_one_command_at_a_time(bundles, make):
    install(bundles, make("one"))
    with (bundles / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(lambda: install(bundles, make("two")), "another edge-agent bundle command", "wait")
        refused(lambda: roll_back(bundles), "another edge-agent bundle command")
        assert states(bundles) == {"one": "current"}
    install(bundles, make("three"))
