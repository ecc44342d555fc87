"""The installed bundles: every interruption leaves the old one or the new one, and no older one comes back unasked."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from pathlib import Path

import pytest

from edge_agent.bundle import signing, store
from edge_agent.bundle.manifest import LANGUAGE, MANIFEST, REPORT, read_manifest
from edge_agent.bundle.store import hold_folder, install, is_held, least_counter, list_bundles, roll_back
from edge_agent.bundle.verify import verify_bundle
from tests.harness.small_bundle import maker, refused, states

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

NOON_S = 1_795_780_800  # 2026-11-27T12:00:00Z


# -- install, list, roll back -----------------------------------------------------------------------------------------


def test_the_newest_installed_bundle_is_current_and_the_one_before_it_stays(bundles, make):
    assert list_bundles(bundles) == [] and least_counter(bundles) == 0
    for name in ("first", "second", "third"):
        made = make(name)
        change = install(bundles, made, now_s=lambda: NOON_S)
        assert change.is_new and change.bundle.manifest.created_by == maker(bundles / "current") == name
        assert {path.name: path.read_bytes() for path in change.bundle.folder.iterdir()} == {
            path.name: path.read_bytes() for path in made.iterdir()
        }
    assert states(bundles) == {"third": "current", "second": "previous"}
    current, previous = list_bundles(bundles)
    assert (current.installed_at, current.counter, current.is_served) == ("2026-11-27T12:00:00Z", 0, False)
    assert os.readlink(bundles / "current") == current.folder == read_manifest(made).id
    assert sorted(os.listdir(bundles)) == sorted([current.folder, previous.folder, "current", "lock", "store.json"])


def test_everybody_may_read_what_was_installed(bundles, make):
    before = os.umask(0o077)
    try:
        installed = install(bundles, make("one")).bundle.folder
    finally:
        os.umask(before)
    for path in (bundles, installed):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755
    for path in installed.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_rollback_exchanges_current_and_previous(bundles, make):
    refused(lambda: roll_back(bundles), str(bundles), "no previous bundle", "install BUNDLE")
    install(bundles, make("old"))
    refused(lambda: roll_back(bundles), "no previous bundle")
    install(bundles, make("new"))
    for expected in ({"old": "current", "new": "previous"}, {"new": "current", "old": "previous"}):
        roll_back(bundles)
        assert states(bundles) == expected


def test_after_a_rollback_the_next_installation_keeps_the_one_that_served(bundles, make):
    for name in ("good", "bad"):
        install(bundles, make(name))
    roll_back(bundles)
    install(bundles, make("next"))
    assert states(bundles) == {"next": "current", "good": "previous"}


def test_the_same_bundle_twice_changes_nothing(bundles, make):
    old, new = make("old"), make("new")
    for source in (old, new):
        install(bundles, source)
    before = {path: path.lstat().st_mtime_ns for path in bundles.rglob("*")}
    change = install(bundles, new)
    assert not change.is_new and {path: path.lstat().st_mtime_ns for path in bundles.rglob("*")} == before
    change = install(bundles, old)  # as a rollback, and nothing is copied
    assert change.is_new and states(bundles) == {"old": "current", "new": "previous"}
    change = install(bundles, bundles / "current")
    assert not change.is_new


def test_a_bundle_inside_the_store_can_be_installed(bundles, make):
    for name in ("old", "new"):
        install(bundles, make(name))
    previous = list_bundles(bundles)[1].folder
    install(bundles, bundles / previous)
    assert states(bundles) == {"old": "current", "new": "previous"}


@pytest.mark.parametrize("damage", ["file", "manifest", "missing"])
def test_a_damaged_current_bundle_is_replaced_by_the_same_one(bundles, make, damage):
    old, new = make("old"), make("new")
    for source in (old, new):
        install(bundles, source)
    damaged = list_bundles(bundles)[0].folder
    path = bundles / damaged / (MANIFEST if damage == "manifest" else LANGUAGE)
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1])
    change = install(bundles, new)
    assert change.is_new and change.bundle.folder.name == f"{damaged}.2" and maker(bundles / "current") == "new"
    assert states(bundles) == {"new": "current", "old": "previous"} and not (bundles / damaged).exists()


def test_the_list_shows_a_bundle_that_cannot_be_read(bundles, make):
    for name in ("old", "new"):
        install(bundles, make(name))
    current, previous = (bundles / entry.folder for entry in list_bundles(bundles))
    (previous / MANIFEST).write_text("{")
    shutil.rmtree(current)
    entries = list_bundles(bundles)
    assert [entry.state for entry in entries] == ["current", "previous"]
    assert "no such folder" in entries[0].fault and "damaged" in entries[1].fault
    refused(lambda: roll_back(bundles), "damaged")


# -- signature and counter --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        signing.keygen(folder / name)
    return folder


def test_with_trusted_keys_the_signature_is_checked_before_anything_is_copied(bundles, make, keys):
    trusted = (str(keys / "ours.pub"),)
    install(bundles, make("signed", key=keys / "ours"), trusted)
    before = sorted(os.listdir(bundles))
    refused(lambda: install(bundles, make("unsigned"), trusted), signing.SIGNATURE, "missing")
    refused(lambda: install(bundles, make("foreign", key=keys / "theirs"), trusted), "not signed by any key")
    install(bundles, make("unsigned, no keys"))
    refused(lambda: install(bundles, bundles / "current", trusted), "missing")
    roll_back(bundles, trusted)
    refused(lambda: roll_back(bundles, trusted), "missing, but trusted_keys requires")
    assert set(before) <= set(os.listdir(bundles)) and maker(bundles / "current") == "signed"


def test_a_signature_that_came_later_replaces_the_unsigned_copy(bundles, make, keys):
    made = make("one")
    install(bundles, made)
    (made / signing.SIGNATURE).write_bytes(signing.sign((made / MANIFEST).read_bytes(), keys / "ours"))
    change = install(bundles, made, (str(keys / "ours.pub"),))
    assert change.is_new and (bundles / "current" / signing.SIGNATURE).exists()


@pytest.mark.parametrize("lower", [None, 0, 4])
def test_a_lower_counter_is_refused(bundles, make, lower):
    install(bundles, make("new", counter=5))
    before = sorted(os.listdir(bundles))
    found = "none" if lower is None else str(lower)
    refused(lambda: install(bundles, make("old", lower)), "counter: expected 5 or more", f"found {found}")
    assert sorted(os.listdir(bundles)) == before and least_counter(bundles) == 5
    install(bundles, make("same", counter=5))
    install(bundles, make("newer", counter=7))
    assert least_counter(bundles) == 7


def test_a_rollback_below_the_counter_needs_a_word_and_forgets_nothing(bundles, make):
    install(bundles, make("old", counter=1))
    install(bundles, make("new", counter=2))
    refused(lambda: roll_back(bundles), "counter: expected 2 or more, found 1", "--allow-lower-counter")
    assert maker(bundles / "current") == "new"
    change = roll_back(bundles, allow_lower_counter=True)
    assert maker(bundles / "current") == "old" and "needs 2" in change.remarks[0]
    assert [entry.is_below_counter for entry in list_bundles(bundles)] == [True, False]
    refused(lambda: install(bundles, make("between", counter=1)), "expected 2 or more")
    assert roll_back(bundles).remarks == [] and maker(bundles / "current") == "new"


def test_without_its_record_the_store_takes_the_counter_of_the_current_bundle(bundles, make):
    for n in (3, 4):
        install(bundles, make(str(n), counter=n))
    (bundles / "store.json").unlink()
    assert least_counter(bundles) == 4 and list_bundles(bundles)[0].installed_at == ""
    refused(lambda: install(bundles, make("old", counter=3)), "expected 4 or more")


@pytest.mark.parametrize("content", ["", "{", '{"least_counter": "many"}', "[]", "\xff"])
def test_a_damaged_record_is_named(bundles, make, content):
    install(bundles, make("one"))
    (bundles / "store.json").write_bytes(content.encode("latin-1"))
    for call in (lambda: install(bundles, make("two")), lambda: list_bundles(bundles), lambda: roll_back(bundles)):
        refused(call, "store.json: damaged", "counter")


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["short", "long", "changed", "missing", "link", "no manifest", "extra"])
def test_a_bundle_that_is_not_right_is_refused_in_its_own_words(bundles, make, tmp_path, fault):
    install(bundles, make("old"))
    before, made = sorted(os.listdir(bundles)), make("new")
    path = made / REPORT
    content = path.read_bytes()
    if fault in ("missing", "link"):
        path.unlink()
    if fault == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    if fault == "no manifest":
        (made / MANIFEST).unlink()
    if fault == "extra":
        (made / "notes.txt").write_text("x")
    different = {"short": content[:-1], "long": content + b"x", "changed": content[:-1] + b"?"}
    if fault in different:
        path.write_bytes(different[fault])
    refused(lambda: install(bundles, made), str(made))
    assert sorted(os.listdir(bundles)) == before and states(bundles) == {"old": "current"}


def test_a_manifest_that_changes_while_it_is_copied_is_refused(bundles, make):
    made = make("new")
    manifest = made / MANIFEST
    content = manifest.read_bytes()

    def change(n_done: int, n_total: int) -> None:
        manifest.write_bytes(content + b"\n")

    refused(lambda: install(bundles, made, (), change), "changed while it was copied")
    assert list_bundles(bundles) == []


def test_what_is_in_the_place_of_the_store_is_named(tmp_path, make):
    source, file = make("one"), tmp_path / "file"
    file.write_text("x")
    refused(lambda: install(file, source), str(file), "found a file")
    refused(lambda: install(tmp_path / "a" / "b", source), "No such file", "make the folder above it first")
    refused(lambda: install(file / "below", source), "Not a directory")
    refused(lambda: list_bundles(file), "Not a directory")


def test_a_bundle_is_no_store(make):
    source = make("one")
    before = sorted(os.listdir(source))
    refused(lambda: install(source, source), "a bundle, not a folder of installed bundles", "another --store")
    assert sorted(os.listdir(source)) == before


def test_a_file_or_a_link_in_the_place_of_a_folder_of_ours_is_removed(bundles, make, tmp_path):
    bundles.mkdir()
    (tmp_path / "victim").mkdir()
    (bundles / ".0123456789abcdef.part").write_text("x")
    (bundles / "0123456789abcdef").symlink_to(tmp_path / "victim")
    install(bundles, make("one"))
    assert not {".0123456789abcdef.part", "0123456789abcdef"} & set(os.listdir(bundles))
    assert (tmp_path / "victim").is_dir()


@pytest.mark.parametrize("kind", ["folder", "absolute", "outside", "odd name"])
def test_a_current_that_we_did_not_make_is_left_alone(bundles, make, kind):
    bundles.mkdir()
    link = bundles / "current"
    if kind == "folder":
        link.mkdir()
    else:
        link.symlink_to({"absolute": "/opt/bundle", "outside": "../bundle", "odd name": "3b"}[kind])
    refused(lambda: install(bundles, make("one")), "current: expected a link", "install" if kind == "folder" else "rem")
    assert os.path.lexists(link)


def test_files_of_others_stay(bundles, make):
    bundles.mkdir()
    for name in ("3b", ".hidden.part", "0123"):
        (bundles / name).mkdir()
    for name in ("a", "b", "c"):
        install(bundles, make(name))
    assert {"3b", ".hidden.part", "0123"} <= set(os.listdir(bundles))


# -- while a daemon runs ----------------------------------------------------------------------------------------------


def test_a_folder_that_a_daemon_serves_stays_until_it_ends(bundles, make):
    install(bundles, make("served"))
    folder, descriptor = hold_folder(bundles / "current")
    assert folder == (bundles / "current").resolve() and is_held(folder)
    for name in ("second", "third", "fourth"):
        change = install(bundles, make(name))
        assert change.served == [folder.name] and verify_bundle(folder).manifest.created_by == "served"
    assert states(bundles) == {"fourth": "current", "third": "previous", "served": "unused"}
    assert [entry.is_served for entry in list_bundles(bundles)] == [False, False, True]
    os.close(descriptor)
    assert install(bundles, make("fifth")).served == [] and "served" not in states(bundles)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_folder_that_is_removed_while_it_is_opened_is_looked_up_again(bundles, make, monkeypatch, is_replaced):
    install(bundles, make("old"))
    old, new, real = (bundles / "current").resolve(), make("new"), os.open

    def slow(path, flags, *arguments, **options):
        descriptor = real(path, flags, *arguments, **options)
        if Path(path) == old and flags & os.O_DIRECTORY and not (bundles / "moved").exists():
            monkeypatch.setattr(os, "open", real)
            install(bundles, new)
            old.rename(bundles / "moved")
            if is_replaced:
                old.mkdir()
        return descriptor

    monkeypatch.setattr(os, "open", slow)
    folder, descriptor = hold_folder(bundles / "current")
    os.close(descriptor)
    assert maker(folder) == "new"


@pytest.mark.parametrize("is_let_go", [True, False])
def test_a_lock_of_somebody_else_does_not_keep_the_daemon_from_starting(bundles, make, monkeypatch, is_let_go):
    install(bundles, make("one"))
    other = os.open(bundles / "current", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if is_let_go:
            fcntl.flock(other, fcntl.LOCK_UN)

    monkeypatch.setattr(store.time, "sleep", sleep)
    folder, descriptor = hold_folder(bundles / "current")
    os.close(other)
    assert is_held(folder) == is_let_go and len(waits) == (1 if is_let_go else store.LOCK_TRIES)
    os.close(descriptor)


def test_a_folder_with_a_name_that_cannot_be_sent_is_held_by_its_link(tmp_path):
    odd = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(odd)
    (tmp_path / "link").symlink_to(os.fsdecode(odd))
    folder, descriptor = hold_folder(tmp_path / "link")
    os.close(descriptor)
    assert folder == tmp_path / "link"


def test_nothing_to_hold_is_an_error_of_the_system(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for name in ("none", "loop"):
        with pytest.raises(OSError):
            hold_folder(tmp_path / name)
    assert not is_held(tmp_path / "none")
