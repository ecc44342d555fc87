"""edge-agent bundle install, list, verify and rollback: the bundles that are installed on this device."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

from edge_agent.bundle import store
from edge_agent.bundle.manifest import CURRENT, Bundle
from edge_agent.bundle.verify import verify_bundle
from edge_agent.cli.commands import EX_CONFIG
from edge_agent.config import load_config
from edge_agent.errors import BundleError, one_line

DEFAULT_CONFIG = Path("/etc/edge-agent.yaml")


class Device(NamedTuple):
    """Where this device keeps its bundles, and whose bundles it accepts."""

    store: Path
    trusted_keys: tuple[str, ...]
    remarks: tuple[str, ...]  # what the configuration leaves open


def read_device(arguments: argparse.Namespace) -> Device:
    """Raises ConfigError if there is a configuration and it cannot be read: a key in it would be ignored."""
    path = arguments.config
    if path is None and os.path.lexists(DEFAULT_CONFIG):
        path = DEFAULT_CONFIG
    if path is None:
        remark = f"there is no {DEFAULT_CONFIG}: the signature is not checked"
        return Device(arguments.store or store.DEFAULT_STORE, (), (remark,))
    config = load_config(path)
    served = Path(config.bundle)
    folder = arguments.store or (served.parent if served.name == CURRENT else store.DEFAULT_STORE)
    remarks = [] if config.trusted_keys else [f"{path}: trusted_keys is empty: the signature is not checked"]
    if os.path.abspath(served) != os.path.abspath(folder / CURRENT):
        remarks.append(f"{path}: bundle: the daemon serves {served}; set it to {folder / CURRENT}")
    return Device(folder, config.trusted_keys, tuple(remarks))


def install(arguments: argparse.Namespace) -> int:
    device = read_device(arguments)
    change = store.install(device.store, arguments.bundle, device.trusted_keys, _show_progress)
    if change.bundle.manifest.counter is None:
        remark = "no counter in the manifest: it counts as 0, and a device that had a higher one refuses it"
        if change.bundle.manifest.layout is None:  # edge-quantize made it
            remark += "; edge-quantize build --counter N sets one"
        change.remarks.append(remark)
    _print_change(device, change)
    return 0


def rollback(arguments: argparse.Namespace) -> int:
    device = read_device(arguments)
    allow = arguments.allow_lower_counter
    _print_change(device, store.roll_back(device.store, device.trusted_keys, allow, _show_progress))
    return 0


def list_bundles(arguments: argparse.Namespace) -> int:
    device = read_device(arguments)
    entries = store.list_bundles(device.store)
    if arguments.json:
        bundles = [_entry_fields(entry) for entry in entries]
        print(json.dumps({"store": str(device.store), "least_counter": _least(device), "bundles": bundles}))
        return 0
    if not entries:
        print(f"{device.store}: no bundle is installed; install one: edge-agent bundle install BUNDLE")
        return 0
    rows: list[tuple[str, ...]] = [("name", "model", "installed", "counter", "state", "size")]
    rows += [_entry_row(entry) for entry in entries]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for entry in entries:
        if entry.fault:
            print(f"note: {entry.fault}", file=sys.stderr)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    device = read_device(arguments)
    names = [arguments.bundle] if arguments.bundle else [entry.folder for entry in store.list_bundles(device.store)]
    status = 0
    if not names:
        print(f"{device.store}: no bundle is installed")
    for name in names:
        path = device.store / name if (device.store / name).is_dir() else Path(name)
        try:
            bundle = verify_bundle(path, device.trusted_keys, _show_progress)
            print(f"ok    {name}  {_describe(bundle)}{', signed' if device.trusted_keys else ''}")
        except BundleError as error:
            print(f"FAIL  {name}  {error}")
            status = EX_CONFIG
    for remark in device.remarks:
        print(f"note: {remark}", file=sys.stderr)
    return status


# -- printing ---------------------------------------------------------------------------------------------------------


def _print_change(device: Device, change: store.Change) -> None:
    signed = ", signed" if device.trusted_keys else ""
    state = "current" if change.is_new else "was current already"
    print(f"{change.bundle.folder}: {_describe(change.bundle)}, verified{signed}, {state}")
    served = ", ".join(change.served)
    restart = [f"a daemon still serves {served}; systemctl restart edge-agent serves the current one"] if served else []
    for remark in (*device.remarks, *change.remarks, *restart):
        print(f"note: {remark}", file=sys.stderr)


def _describe(bundle: Bundle) -> str:
    counter = bundle.manifest.counter
    words = "no counter" if counter is None else f"counter {counter}"
    return f"{_model(bundle)}, {bundle.file_bytes / 1e6:.1f} MB, {words}"


def _model(bundle: Bundle) -> str:
    model = bundle.manifest.model
    return one_line(f"{model.family} {model.size} {bundle.manifest.recipe}")


def _states(entry: store.Entry) -> str:
    words = [entry.state, "served" if entry.is_served else "", "damaged" if entry.fault else ""]
    words.append("below the lowest counter" if entry.is_below_counter else "")
    return ", ".join(filter(None, words))


def _entry_row(entry: store.Entry) -> tuple[str, ...]:
    bundle = entry.bundle
    model, size = (_model(bundle), f"{bundle.file_bytes / 1e6:.1f} MB") if bundle else ("unknown", "unknown")
    return entry.folder, model, entry.installed_at or "unknown", str(entry.counter), _states(entry), size


def _entry_fields(entry: store.Entry) -> dict[str, object]:
    bundle = entry.bundle
    return {
        "name": entry.folder,
        "bundle_id": bundle.id if bundle else None,
        "model": _model(bundle) if bundle else None,
        "installed": entry.installed_at or None,
        "counter": entry.counter,
        "state": entry.state,
        "served": entry.is_served,
        "below_least_counter": entry.is_below_counter,
        "bytes": bundle.file_bytes if bundle else None,
        "fault": entry.fault or None,
    }


def _least(device: Device) -> int:
    return store.least_counter(device.store)


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done / max(1, total):.0%}", end="\n" if done == total else "", file=sys.stderr, flush=True)


HANDLERS = {
    "bundle install": install,
    "bundle list": list_bundles,
    "bundle rollback": rollback,
    "bundle verify": verify,
}
