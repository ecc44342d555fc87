"""The bundle: anything that differs from the manifest is refused, before a native parser reads a model."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edge_agent.bundle.files import BundleFile, hash_file, sync_folder, write_durably
from edge_agent.bundle.manifest import (
    FORMAT,
    LANGUAGE,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MMPROJ,
    REPORT,
    VISION,
    read_manifest,
    write_manifest,
)
from edge_agent.bundle.model_start import fit_to_bundle
from edge_agent.bundle.verify import verify_bundle
from edge_agent.config import load_config_text
from edge_agent.errors import BundleError, ConfigError
from tests.harness import ROOT
from tests.harness.small_bundle import CONTENT, NAMES, manifest_fields, sha256


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small bundle: its files have headers and no weights, and nothing here reads weights."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name, data in CONTENT.items():
        (folder / name).write_bytes(data)
    write(folder, manifest_fields())
    return folder


def write(folder: Path, fields: object) -> None:
    (folder / MANIFEST).write_text(json.dumps(fields), encoding="utf-8")


def refused(folder: Path, read=verify_bundle) -> str:
    """The one line that says why."""
    with pytest.raises(BundleError) as caught:
        read(folder)
    line = str(caught.value)
    assert "\n" not in line and str(folder) in line, line
    return line


# -- a good one -------------------------------------------------------------------------------------------------------


def test_a_good_bundle_is_read_as_it_was_written(folder):
    reports = []
    verified = verify_bundle(folder, (), lambda n_done, n_total: reports.append((n_done, n_total)))
    n_total = sum(len(data) for data in CONTENT.values())
    assert verified.id == sha256((folder / MANIFEST).read_bytes())[:16]
    assert verified.file_bytes == n_total and reports[-1] == (n_total, n_total)
    assert [n_done for n_done, _ in reports] == sorted(n_done for n_done, _ in reports)
    assert msgspec.to_builtins(verified.manifest) == manifest_fields() | {
        "counter": None,
        "vision": manifest_fields()["vision"] | {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)},
    }
    assert verified.path(VISION) == folder / VISION


def test_a_built_bundle_verifies_and_its_hashes_are_those_of_sha256sum(toy_bundle):
    verified = verify_bundle(toy_bundle)
    listed = subprocess.run(["sha256sum", *NAMES], cwd=toy_bundle, capture_output=True, text=True, check=True).stdout
    assert {line.split()[1]: line.split()[0] for line in listed.splitlines()} == {
        name: file.sha256 for name, file in verified.manifest.files.items()
    }
    for name, file in verified.manifest.files.items():
        assert file.bytes == (toy_bundle / name).stat().st_size
    assert verified.manifest.format == FORMAT and verified.manifest.model.special["bos"] == 1


def test_unknown_keys_of_a_newer_writer_are_accepted(folder):
    fields = manifest_fields() | {"quality": {"kl": 0.01}, "memory": [1, 2]}
    fields["model"]["rope"] = "yarn"
    fields["files"][VISION]["compressed"] = False
    write(folder, fields)
    assert verify_bundle(folder).manifest.recipe == "Q4_K_M"


def test_a_signature_without_trusted_keys_changes_nothing(folder):
    unsigned = verify_bundle(folder)
    (folder / "bundle.sig").write_bytes(b"\x00" * 64)
    assert verify_bundle(folder) == unsigned


def test_reading_the_manifest_alone_does_not_hash(folder):
    (folder / LANGUAGE).write_bytes(b"changed")
    assert read_manifest(folder).manifest.recipe == "Q4_K_M"
    assert f"expected {len(CONTENT[LANGUAGE])} bytes" in refused(folder)


# -- changed files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_bit_is_found(folder, name):
    data = CONTENT[name]
    for index in (0, 1, len(data) // 2, len(data) - 1):
        for bit in range(8):
            changed = bytearray(data)
            changed[index] ^= 1 << bit
            (folder / name).write_bytes(changed)
            line = refused(folder)
            assert name in line and sha256(data)[:16] in line and sha256(changed)[:16] in line


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", ["truncated", "empty", "appended"])
def test_a_changed_length_is_found(folder, name, change):
    data = CONTENT[name]
    changed = {"truncated": data[:-1], "empty": b"", "appended": data + b"\x00"}[change]
    (folder / name).write_bytes(changed)
    line = refused(folder)
    assert name in line and f"expected {len(data)} bytes, found {len(changed)}" in line


def test_swapped_files_are_found(folder):
    (folder / LANGUAGE).write_bytes(CONTENT[MMPROJ])
    (folder / MMPROJ).write_bytes(CONTENT[LANGUAGE])
    assert LANGUAGE in refused(folder)


def test_a_flipped_bit_in_a_built_bundle_is_found(toy_bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(toy_bundle, copy)
    verify_bundle(copy)
    for name in NAMES:
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 3] ^= 4
        (copy / name).write_bytes(data)
        assert name in refused(copy)
        data[len(data) // 3] ^= 4
        (copy / name).write_bytes(data)
    verify_bundle(copy)


# -- files of another kind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert f"{name}: missing" in refused(folder)


@pytest.mark.parametrize("name", ["payload.so", "language.gguf.new", ".hidden", "bundle.json.new"])
def test_an_unlisted_file_is_named(folder, name):
    (folder / name).write_bytes(b"x")
    assert name in refused(folder) and name in refused(folder, read_manifest)


@pytest.mark.parametrize("name", [*NAMES, MANIFEST])
@pytest.mark.parametrize(
    "kind", ["symbolic link", "symbolic link within", "hard link", "pipe", "folder", "socket", "device"]
)
def test_anything_but_a_plain_file_with_one_name_is_refused(folder, name, kind, tmp_path):
    """Also a pipe without a writer, which must not block the check."""
    path, elsewhere = folder / name, tmp_path / "elsewhere"
    if kind == "symbolic link":
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
    elif kind == "symbolic link within":
        path.unlink()
        path.symlink_to(REPORT if name != REPORT else VISION)
    elif kind == "hard link":
        os.link(path, elsewhere)
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "socket":
        path.unlink()
        with socket.socket(socket.AF_UNIX) as listener:
            os.chdir(folder)  # a socket's path may be long here
            try:
                listener.bind(name)
            finally:
                os.chdir(ROOT)
    elif kind == "device":
        if os.geteuid() != 0:
            pytest.skip("only root makes device nodes")
        path.unlink()
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("no device nodes here")
    line = refused(folder)
    assert name in line and "plain file" in line


def test_refusing_leaves_no_descriptor_open(folder, tmp_path):
    os.link(folder / LANGUAGE, tmp_path / "elsewhere")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        refused(folder)
    assert len(os.listdir("/proc/self/fd")) == before


# -- wrong manifests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "..", ".", "", "a/b", "./language.gguf", "bundle.json", "a\x00b", "folder/../x"],
)
def test_names_outside_the_bundle_are_refused(folder, name):
    (folder.parent / "secret").write_bytes(b"secret")
    fields = manifest_fields()
    fields["files"][name] = {"bytes": 6, "sha256": sha256(b"secret")}
    write(folder, fields)
    line = refused(folder)
    assert not name or repr(name) in line


@pytest.mark.parametrize("name", [LANGUAGE, VISION, MMPROJ])
def test_a_manifest_without_a_needed_file_is_refused(folder, name):
    fields = manifest_fields()
    del fields["files"][name]
    write(folder, fields)
    (folder / name).unlink()
    assert f"{name} missing" in refused(folder)


@pytest.mark.parametrize("number", [2, 0, -1, 1000])
def test_another_format_is_refused_by_number(folder, number):
    write(folder, {"format": number, "everything": "else may have changed"})
    assert f"expected 1, found {number}" in refused(folder)


def test_special_tokens_have_their_numbers_by_text_and_by_name(folder):
    manifest = read_manifest(folder).manifest
    numbers = manifest.model.special
    assert manifest.token_id("[INST]") == numbers["inst"]
    assert all(manifest.token_id(name) == number for name, number in numbers.items())
    with pytest.raises(KeyError):
        manifest.token_id("[NOTHING]")


def test_without_its_own_encoder_a_bundle_is_served_by_mtmd(folder):
    built = read_manifest(folder).manifest
    manifest = msgspec.structs.replace(built, files={name: built.files[name] for name in built.files if name != VISION})
    config = load_config_text("bundle: /b\ncamera: {source: clip.mp4}", "test")
    assert fit_to_bundle(config, manifest).vision.backend == "mtmd"
    asked = load_config_text("bundle: /b\ncamera: {source: clip.mp4}\nvision: {backend: onnxruntime}", "test")
    with pytest.raises(ConfigError, match=r"vision\.backend: expected mtmd .* found 'onnxruntime'"):
        fit_to_bundle(asked, manifest)


def test_a_text_only_model_is_verified(folder):
    fields = manifest_fields() | {"vision": None}
    for name in (VISION, MMPROJ):
        (folder / name).unlink()
        del fields["files"][name]
    write(folder, fields)
    assert verify_bundle(folder).manifest.vision is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "1",
        '"text"',
        "\x00" * 100,
        '{"format": 1}',
        '{"format": "1"}',
        '{"format": 1.5}',
        '{"format": null}',
        '{"format": 1, "format": 1} trailing',
        '{"format": 1, "x": ' + "[" * 100_000,
        '{"format": 1, "created_by": "\\ud800"}',
    ],
    ids=lambda text: repr(text[:30]),
)
def test_a_damaged_manifest_is_refused(folder, text):
    (folder / MANIFEST).write_text(text)
    assert MANIFEST in refused(folder)


def test_a_manifest_that_is_not_utf8_is_refused(folder):
    raw = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(raw.replace(b"a test", b"\xff\xfe\xff"))
    assert "damaged" in refused(folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("files", "language.gguf", "bytes"), -1),
        (("files", "language.gguf", "bytes"), "850"),
        (("files", "language.gguf", "sha256"), "0" * 63),
        (("files", "language.gguf", "sha256"), "G" * 64),
        (("files", "language.gguf", "sha256"), ""),
        (("model", "layers"), 0),
        (("model", "embedding", "offset"), -1),
        (("model", "embedding", "row_bytes"), 0),
        (("vision", "mean"), [0.5, 0.5]),
        (("vision", "patch"), 0),
        (("model", "special", "bos"), "1"),
    ],
)
def test_a_wrong_value_in_the_manifest_is_named_with_its_path(folder, path, value):
    fields = manifest_fields()
    inner = fields
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    write(folder, fields)
    line = refused(folder, read_manifest)
    assert "damaged" in line and path[0] in line


@pytest.mark.parametrize("key", sorted(manifest_fields().keys() - {"layout"}))
def test_a_missing_key_in_the_manifest_is_named(folder, key):
    fields = manifest_fields()
    del fields[key]
    write(folder, fields)
    assert key in refused(folder, read_manifest)


def test_an_oversized_manifest_is_refused_without_being_read_whole(folder):
    (folder / MANIFEST).write_text(json.dumps(manifest_fields() | {"padding": "x" * MAX_MANIFEST_BYTES}))
    assert "not a manifest" in refused(folder)
    os.truncate(folder / MANIFEST, 1 << 32)  # a hole of 4 GiB
    assert "not a manifest" in refused(folder)


def test_a_missing_manifest_or_folder_is_an_error_with_advice(folder, tmp_path):
    (folder / MANIFEST).unlink()
    assert "edge-quantize build" in refused(folder)
    assert "no such folder; expected a bundle made by" in refused(tmp_path / "nowhere")
    assert "no such folder; install one: edge-agent bundle install" in refused(tmp_path / "current")
    assert "a GGUF file (llama); edge-agent bundle wrap makes a bundle of it" in refused(folder / LANGUAGE)


# -- native parsers ---------------------------------------------------------------------------------------------------


def test_verifying_loads_no_native_parser(toy_bundle):
    code = (
        "import sys; from edge_agent.bundle.verify import verify_bundle; verify_bundle(sys.argv[1])\n"
        "bad = {'llama_cpp', 'onnxruntime', 'onnx', 'cv2', 'gguf', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {sorted(bad)}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, toy_bundle], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# -- writing ----------------------------------------------------------------------------------------------------------


def test_a_written_manifest_is_read_back_and_readable(folder):
    manifest = read_manifest(folder).manifest
    (folder / MANIFEST).unlink()
    write_manifest(folder, manifest)
    assert verify_bundle(folder).manifest == manifest
    text = (folder / MANIFEST).read_text()
    assert text.endswith("}\n") and '\n  "recipe": "Q4_K_M"' in text


def test_size_and_hash_of_a_file_of_several_blocks(tmp_path):
    data = os.urandom(1 << 20) * 9 + b"tail"  # more than two blocks, and a part of one
    (tmp_path / "file").write_bytes(data)
    reports = []
    assert hash_file(tmp_path / "file", reports.append) == BundleFile(bytes=len(data), sha256=sha256(data))
    assert sum(reports) == len(data) and len(reports) == 3
    (tmp_path / "empty").touch()
    assert hash_file(tmp_path / "empty").sha256 == sha256(b"")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "state"
    write_durably(path, b"old")

    def fail(*_arguments: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="Input/output"):
        write_durably(path, b"new" * 1000)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    write_durably(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["state"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "state"
    write_durably(path, b"old")
    (tmp_path / "state.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_durably(path, b"new" * 1000)
    assert path.read_bytes() == b"old"


def test_a_failed_sync_of_the_folder_is_an_error(tmp_path, monkeypatch):
    """The file is there, but it may not survive a power cut: the caller gets the error."""
    real, synced = os.fsync, []

    def fsync(descriptor: int) -> None:
        if synced:
            raise OSError(5, "Input/output error")
        synced.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        write_durably(tmp_path / "state", b"new")
    assert (tmp_path / "state").read_bytes() == b"new"


def test_a_file_system_that_cannot_sync_a_folder_keeps_the_file(tmp_path, monkeypatch):
    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    write_durably(tmp_path / "state", b"new")
    assert (tmp_path / "state").read_bytes() == b"new" and not sync_folder(tmp_path)


def test_the_order_of_a_durable_write(tmp_path, monkeypatch):
    """Sync the file, rename it, sync the folder: another order can leave a part of a file, or none."""
    real_fsync, real_replace, steps = os.fsync, os.replace, []

    def fsync(descriptor: int) -> None:
        steps.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def replace(old, new) -> None:
        assert Path(old).read_bytes() == b"new"
        steps.append(("rename", str(new)))
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_durably(tmp_path / "state", b"new")
    assert [step for step, _ in steps] == ["sync", "rename", "sync"]
    assert Path(steps[0][1]).parent == tmp_path and steps[0][1] != str(tmp_path / "state")
    assert steps[1][1] == str(tmp_path / "state") and steps[2][1] == str(tmp_path)
