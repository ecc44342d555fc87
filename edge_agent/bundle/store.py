"""The bundles that are installed on a device, and the link `current` to the one that the daemon serves.

    bundles/  current -> 1f2e3d4c5b6a7988   1f2e3d4c5b6a7988/   77aa66bb55cc44dd/   store.json   lock

An installation takes effect with one rename: that of the link `current`. Everything else is on the disk before, so a
kill or a power cut leaves the old bundle or the new one. The bundle that was current before stays, for a rollback.

The counter of a manifest works against an older bundle: a bundle whose counter is lower than one that was current here
is refused. The daemon never writes here: it holds a shared lock on the folder that it serves, and only a folder that
nobody holds is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_agent.bundle import signing
from edge_agent.bundle.files import BLOCK_BYTES, open_plain, sync_folder, write_durably
from edge_agent.bundle.manifest import CURRENT, MANIFEST, Bundle, read_manifest
from edge_agent.bundle.verify import check_signature, verify_bundle
from edge_agent.errors import BundleError, UserError, encodable

DEFAULT_STORE = Path("/var/lib/edge-agent/bundles")
RECORD, LOCK = "store.json", "lock"
NEW_LINK = ".current.new"
PART, REMOVED = ".part", ".removed"  # endings of hidden folders: not complete yet, not complete any more
FOLDER = re.compile(r"[0-9a-f]{16}(\.[0-9]+)?")  # the bundle's id; a number where a damaged folder has that name
HIDDEN = re.compile(rf"\.{FOLDER.pattern}({re.escape(PART)}|{re.escape(REMOVED)})")
SPARE_BYTES = 8 << 20  # free space beyond the files: folders, links, store.json
LOCK_TRIES, LOCK_INTERVAL_S = 50, 0.01
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}  # of symlink(), on FAT and the like

Report = Callable[[int, int], None]  # bytes done, bytes in total


class StoreError(UserError):
    """One line: which store or bundle, what is wrong, what to do."""


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """What store.json keeps about one folder."""

    installed_at: str  # UTC, by the device's own clock: 2026-11-27T14:51:21Z
    counter: int
    previous: str = ""  # the folder that was current when this one became current


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """store.json. It is written before the link is changed, and says nothing about which folder is current."""

    least_counter: int = 0
    bundles: dict[str, Installed] = {}  # by the name of the folder


class Entry(NamedTuple):
    """One bundle, as `list` shows it."""

    folder: str  # its name in the store
    state: str  # current, previous or unused
    is_served: bool  # a running daemon holds it
    installed_at: str
    counter: int
    is_below_counter: bool  # installed here only because an older bundle was allowed explicitly
    bundle: Bundle | None  # None: its manifest cannot be read
    fault: str  # why


class Change(NamedTuple):
    """What `install` or `roll_back` did."""

    bundle: Bundle  # now current
    is_new: bool  # False: it was current already
    served: list[str]  # other folders that a running daemon still serves
    remarks: list[str]


# -- reading ----------------------------------------------------------------------------------------------------------


def list_bundles(store: Path) -> list[Entry]:
    """Current, then previous, then the others. Empty: nothing is installed. Raises StoreError."""
    current, record = _current(store), _read_record(store)
    names = [path.name for path in store.iterdir() if FOLDER.fullmatch(path.name)] if store.is_dir() else []
    order = [current, _previous(store, current, record), *sorted(names)]
    states = {"": "", order[0]: "current", order[1]: "previous"}
    least = least_counter(store)
    entries = []
    for name in dict.fromkeys(filter(None, order)):
        bundle, fault = None, ""
        try:
            bundle = read_manifest(store / name)
        except BundleError as error:
            fault = str(error)
        found = record.bundles.get(name) or Installed(installed_at="", counter=_counter(bundle))
        state, counter = states.get(name, "unused"), found.counter
        entries.append(
            Entry(
                name, state, is_held(store / name), found.installed_at, counter, counter < least, bundle, fault
            )
        )  # fmt: skip
    return entries


def least_counter(store: Path) -> int:
    """The lowest counter that may be installed: the highest one that was ever current here. Raises StoreError."""
    current, record = _current(store), _read_record(store)
    if current in record.bundles:
        return max(record.least_counter, record.bundles[current].counter)
    bundle = None
    with contextlib.suppress(BundleError):
        bundle = read_manifest(store / CURRENT)
    return max(record.least_counter, _counter(bundle))


def _counter(bundle: Bundle | None) -> int:
    return (bundle.manifest.counter or 0) if bundle is not None else 0


def _current(store: Path) -> str:
    """The name of the folder that the link leads to; empty: there is no link. Raises StoreError."""
    link = store / CURRENT
    try:
        name = os.readlink(link)
    except FileNotFoundError:
        return ""
    except OSError as error:
        what = "something that is not a link" if error.errno == errno.EINVAL else error.strerror
        raise StoreError(f"{link}: expected a link made by edge-agent bundle install, found {what}") from None
    if not FOLDER.fullmatch(name):
        raise StoreError(f"{link}: expected a link to a bundle beside it, found one to {name!r}; remove the link")
    return name


def _previous(store: Path, current: str, record: _Record) -> str:
    """The folder that was current before; empty: there is none."""
    name = record.bundles[current].previous if current in record.bundles else ""
    return name if name and (store / name).is_dir() else ""


def _read_record(store: Path) -> _Record:
    path = store / RECORD
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Record)
    except (FileNotFoundError, NotADirectoryError):
        return _Record()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StoreError(
            f"{path}: damaged: {error}; it holds the lowest counter that may be installed: put a copy back, or remove "
            "it and the counter starts again at that of the current bundle"
        ) from None


# -- installing -------------------------------------------------------------------------------------------------------


def install(
    store: Path,
    source: Path,
    trusted_keys: tuple[str, ...] = (),
    report: Report = lambda n_done, n_total: None,
    now_s: Callable[[], float] = time.time,
) -> Change:
    """Copy a bundle into the store, verify the copy, and make it current. Raises BundleError, StoreError.

    now_s: seconds since 1970, for the date in the list.
    """
    found = read_manifest(source)
    with _writing(store) as remarks:
        if trusted_keys:
            check_signature(found, trusted_keys)
        least = least_counter(store)
        if _counter(found) < least:
            raise StoreError(
                f"{source}: counter: expected {least} or more, as a bundle with {least} was installed here, found "
                f"{'none' if found.manifest.counter is None else found.manifest.counter}; install a newer bundle"
            )
        there = _reusable(store, found, trusted_keys)
        is_new = not there or there != _current(store)
        _remove_unused(store, there)
        try:
            name = there or _copy(store, found, trusted_keys, report)
            if is_new:
                _make_current(store, name, _counter(found), now_s)
        except OSError:
            with contextlib.suppress(OSError):
                _remove_unused(store, there)  # a copy that is not current: gigabytes on a disk that may be full
            raise
        return _change(store, name, is_new, remarks)


def roll_back(
    store: Path,
    trusted_keys: tuple[str, ...] = (),
    allow_lower_counter: bool = False,
    report: Report = lambda n_done, n_total: None,
    now_s: Callable[[], float] = time.time,
) -> Change:
    """Verify the previous bundle and make it current. The one that was current becomes the previous one. Raises
    BundleError, StoreError."""
    with _writing(store) as remarks:
        name = _previous(store, _current(store), _read_record(store))
        if not name:
            raise StoreError(f"{store}: there is no previous bundle; install one with edge-agent bundle install BUNDLE")
        bundle = verify_bundle(store / name, trusted_keys, report)
        least = least_counter(store)
        if _counter(bundle) < least:
            if not allow_lower_counter:
                raise StoreError(
                    f"{store / name}: counter: expected {least} or more, found {_counter(bundle)}: the current bundle "
                    "was made to replace this one; add --allow-lower-counter if you must serve the older one"
                )
            remarks.append(f"the counter {_counter(bundle)} is lower than {least}; the next installation needs {least}")
        _make_current(store, name, _counter(bundle), now_s)
        return _change(store, name, True, remarks)


@contextlib.contextmanager
def _writing(store: Path) -> Iterator[list[str]]:
    """The lock of the store. Yields a list for remarks. Raises StoreError for every fault of the disk."""
    try:
        _make_folder(store)
        descriptor = os.open(store / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            remarks = []
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(f"{store}: another edge-agent bundle command is writing there; wait for it") from None
            except OSError:  # a server without a lock service
                remarks.append("no locks on this file system: never run two of these commands at once")
            _check_links(store)
            if not sync_folder(store):
                remarks.append("no fsync of folders on this file system: unmount it before you cut the power")
            yield remarks
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StoreError(_fault_line(store, error)) from None


def _fault_line(store: Path, error: OSError) -> str:
    remedies = {
        errno.EACCES: "run the command as the owner of the folder, usually with sudo",
        errno.EPERM: "run the command as the owner of the folder, usually with sudo",
        errno.ENOSPC: "make room and run the command again",
        errno.EDQUOT: "make room and run the command again",
        errno.EROFS: "mount the file system for writing",
        errno.ENOENT: "make the folder above it first",
    }
    remedy = remedies.get(error.errno or 0, "look for a fault of the disk in dmesg")
    return f"{error.filename or store}: {error.strerror or error}; {remedy}"


def _make_folder(store: Path) -> None:
    if (store / MANIFEST).exists():
        raise StoreError(f"{store}: a bundle, not a folder of installed bundles; give another --store")
    with contextlib.suppress(FileExistsError):
        store.mkdir()
        store.chmod(0o755)  # the daemon's user reads it, whatever the umask of the installer
        sync_folder(store.parent)
    if not store.is_dir():
        raise StoreError(f"{store}: expected the folder of the installed bundles, found a file")


def _check_links(store: Path) -> None:
    """A file system without links is found before the bundle is copied, not after it."""
    link = store / NEW_LINK
    link.unlink(missing_ok=True)
    try:
        os.symlink("none", link)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        raise StoreError(
            f"{store}: this file system has no symbolic links (FAT and exFAT have none); put the store on ext4 or "
            "another Linux file system"
        ) from None
    link.unlink()


def _reusable(store: Path, found: Bundle, trusted_keys: tuple[str, ...]) -> str:
    """The name of a folder in the store that holds the same bundle, undamaged and with a signature that is trusted."""
    for path in sorted(store.glob(f"{found.id}*")):
        with contextlib.suppress(BundleError):
            if FOLDER.fullmatch(path.name) and verify_bundle(path, trusted_keys).id == found.id:
                return path.name
    return ""


def _copy(store: Path, source: Bundle, trusted_keys: tuple[str, ...], report: Report) -> str:
    """Copy a bundle into the store and verify the copy. Returns the name of its folder."""
    names = [*source.manifest.files, MANIFEST]
    if (source.folder / signing.SIGNATURE).exists():
        names.append(signing.SIGNATURE)
    _check_sizes(source)
    status = os.statvfs(store)
    free, need = status.f_bavail * status.f_frsize, source.file_bytes + SPARE_BYTES
    if free < need:
        raise StoreError(f"{store}: expected {need / 1e6:.0f} MB of free space, found {free / 1e6:.0f} MB; make room")
    name = _free_name(store, source.id)
    part = store / f".{name}{PART}"
    part.mkdir(mode=0o700)
    try:
        n_done = 0

        for file in names:
            for n_bytes in _copy_file(source.folder / file, part / file):
                n_done += n_bytes
                report(min(n_done, source.file_bytes), 2 * source.file_bytes)  # copied, then verified
        part.chmod(0o755)
        sync_folder(part)
        try:
            copied = verify_bundle(
                part, trusted_keys, lambda n_done, n_total: report(n_total + n_done, 2 * source.file_bytes)
            )
        except BundleError as error:  # the copy has the source's bytes
            raise BundleError(str(error).replace(str(part), str(source.folder))) from None
        if copied.id != source.id:
            raise BundleError(f"{source.folder / MANIFEST}: changed while it was copied; try again")
        os.rename(part, store / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return name


def _check_sizes(source: Bundle) -> None:
    """A bundle that cannot be right is refused before gigabytes are copied. Raises BundleError."""
    for name, expected in source.manifest.files.items():
        path = source.path(name)
        try:
            found = path.lstat().st_size
        except FileNotFoundError:
            raise BundleError(f"{path}: missing; copy the bundle again") from None
        if found != expected.bytes:
            raise BundleError(f"{path}: expected {expected.bytes} bytes, found {found}; copy it again")


def _copy_file(source: Path, target: Path) -> Iterator[int]:
    """Yields the bytes of each block that was copied."""
    with os.fdopen(open_plain(source), "rb", buffering=0) as reading, target.open("xb") as writing:
        while block := reading.read(BLOCK_BYTES):
            writing.write(block)
            yield len(block)
        writing.flush()
        os.fchmod(writing.fileno(), 0o644)
        os.fsync(writing.fileno())


def _free_name(store: Path, bundle_id: str) -> str:
    """A folder of the same bundle that is there and not reusable is damaged: the new one gets another name."""
    name, number = bundle_id, 1
    while (store / name).exists():
        number += 1
        name = f"{bundle_id}.{number}"
    return name


def _make_current(store: Path, name: str, counter: int, now_s: Callable[[], float]) -> None:
    """The record first, which says nothing until the link is changed; then the link, by one rename.

    Writing the record durably also syncs the name of a new folder.
    """
    current, record = _current(store), _read_record(store)
    known = {folder: found for folder, found in record.bundles.items() if (store / folder).is_dir()}
    first = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_s()))
    installed_at = known[name].installed_at if name in known else first
    if current.partition(".")[0] == name.partition(".")[0]:  # the same bundle, damaged: never go back to that
        current = _previous(store, current, record)
    known[name] = Installed(installed_at=installed_at, counter=counter, previous=current)
    raised = _Record(least_counter=least_counter(store), bundles=known)
    write_durably(store / RECORD, msgspec.json.format(msgspec.json.encode(raised), indent=2) + b"\n")
    os.symlink(name, store / NEW_LINK)
    os.replace(store / NEW_LINK, store / CURRENT)
    sync_folder(store)


def _change(store: Path, name: str, is_new: bool, remarks: list[str]) -> Change:
    _remove_unused(store, name)
    served = [entry.folder for entry in list_bundles(store) if entry.is_served and entry.folder != name]
    return Change(read_manifest(store / name), is_new, served, remarks)


def _remove_unused(store: Path, wanted: str) -> None:
    """Remove what interrupted commands have left, and bundles that are neither current, nor previous, nor wanted, nor
    served."""
    current = _current(store)
    keep = {current, _previous(store, current, _read_record(store)), wanted}
    for path in sorted(store.iterdir()):
        is_ours = HIDDEN.fullmatch(path.name) or FOLDER.fullmatch(path.name)
        if is_ours and (path.is_symlink() or not path.is_dir()):
            path.unlink()
        elif HIDDEN.fullmatch(path.name):
            shutil.rmtree(path)
        elif FOLDER.fullmatch(path.name) and path.name not in keep:
            removed = path.with_name(f".{path.name}{REMOVED}")
            with _exclusive(path) as is_free:
                if not is_free:
                    continue
                os.rename(path, removed)  # a folder with the name of a bundle is always complete
            shutil.rmtree(removed)


# -- serving ----------------------------------------------------------------------------------------------------------


def hold_folder(path: Path) -> tuple[Path, int]:
    """The folder behind a link, and a descriptor that keeps it in the store for as long as it is open.

    The daemon asks once, at its start: a link that is changed later does not change what it loads. Raises OSError.
    """
    while True:
        real = Path(os.path.realpath(path))
        if encodable(str(real)) != str(real):  # it could not be sent to the model process; the link's name can
            real = path
        descriptor = os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _lock_shared(descriptor)
            if os.path.samestat(os.fstat(descriptor), real.stat()):
                return real, descriptor
        except FileNotFoundError:
            pass  # removed between the two calls: the link leads to another folder now
        os.close(descriptor)


def _lock_shared(descriptor: int) -> None:
    """The commands hold a folder for an instant. Somebody who holds it longer cannot keep the daemon from starting:
    then the folder is not protected."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(LOCK_INTERVAL_S)
        except OSError:  # a file system without locks
            return


def is_held(folder: Path) -> bool:
    """Whether a running daemon serves the folder."""
    with _exclusive(folder) as is_free:
        return not is_free


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[bool]:
    """Whether nobody holds the folder. Meanwhile nobody can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = True
        except BlockingIOError:
            is_free = False
        except OSError:  # no locks: nobody knows
            is_free = True
        yield is_free
    finally:
        os.close(descriptor)
