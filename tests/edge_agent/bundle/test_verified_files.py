"""What was verified is what is loaded: a file that is replaced or overwritten meanwhile is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edge_agent.actions.space import encode_action_space, load_action_space
from edge_agent.bundle.files import hash_file
from edge_agent.bundle.model_start import decode_model_start, encode_model_start
from edge_agent.bundle.verified_files import FIRST_DESCRIPTOR, VerifiedFiles
from edge_agent.config import CameraConfig, Config, LanguageConfig, TaskConfig
from edge_agent.errors import BundleError, ConfigError
from tests.harness.in_process import FAKE_BUNDLE

GOOD, BAD = b"good" * 1000, b"evil" * 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "bundle" / "vision.onnx"
    path.parent.mkdir()
    path.write_bytes(GOOD)
    return path


def another_file(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(BAD)
    os.replace(other, path)


def another_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("aside"))
    path.parent.mkdir()
    path.write_bytes(BAD)


def in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(BAD)


def in_place_with_the_old_time(path: Path) -> None:
    before = path.stat()
    in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def shorter(path: Path) -> None:
    os.truncate(path, 10)


def gone(path: Path) -> None:
    path.unlink()


def a_link(path: Path) -> None:
    path.rename(path.with_name("aside"))
    path.symlink_to("aside")


ANOTHER_NAME = (another_file, another_folder, gone)  # the opened file keeps its bytes
SAME_FILE = (in_place, in_place_with_the_old_time, longer, shorter)


@pytest.mark.parametrize("change", [*ANOTHER_NAME, *SAME_FILE, a_link])
def test_a_file_that_changed_after_verification_is_refused(path: Path, change: Callable[[Path], None]):
    expected = {path: hash_file(path)}
    change(path)
    with VerifiedFiles(expected) as files, pytest.raises(BundleError, match=r"vision\.onnx: [^\n]*$"):
        files.open(path)


@pytest.mark.parametrize("change", [*ANOTHER_NAME, a_link])
def test_a_name_that_is_given_to_another_file_does_not_change_what_is_loaded(path: Path, change):
    with VerifiedFiles({path: hash_file(path)}) as files:
        opened = files.open(path)
        change(path)
        assert opened.read_bytes() == GOOD


@pytest.mark.parametrize("change", SAME_FILE)
def test_a_file_that_is_written_to_while_it_is_loaded_is_refused(path: Path, change):
    with VerifiedFiles({path: hash_file(path)}) as files:
        files.open(path)
        files.check_unchanged()
        change(path)
        with pytest.raises(BundleError, match=r"vision\.onnx: changed while it was loaded; stop the daemon"):
            files.check_unchanged()


def test_descriptors_are_closed_and_have_the_same_numbers_at_each_start(path: Path):
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with VerifiedFiles({path: hash_file(path)}) as files:
            opened = files.open(path)
            assert int(opened.name) >= FIRST_DESCRIPTOR
            assert files.with_names(f"{opened}: cannot be loaded") == f"{path}: cannot be loaded"
        with VerifiedFiles({path: hash_file(path)}) as files:
            assert files.open(path) == opened
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_hashing_reports_each_block(path: Path):
    reports = []
    with VerifiedFiles({path: hash_file(path)}, lambda *report: reports.append(report)) as files:
        files.open(path)
    assert reports == [(path, len(GOOD))]


# -- the first message ------------------------------------------------------------------------------------------------


def config(**changes: object) -> Config:
    return Config(bundle="/nowhere", camera=CameraConfig(source="a.mp4"), **changes)


@pytest.mark.parametrize("name", ["velocity_body", "velocity_body_action_tokens", "waypoint"])
def test_the_model_process_gets_what_was_verified(path: Path, name: str):
    from edge_agent.actions.space import decode_action_space

    space, adapter = load_action_space(name), hash_file(path)
    manifest = msgspec.structs.replace(
        FAKE_BUNDLE.manifest, files={"vision.onnx": adapter}, source_sha256={"model.safetensors": "0" * 64}
    )
    bundle = msgspec.structs.replace(FAKE_BUNDLE, manifest=manifest, adapters={"night": adapter})
    configured = config(language=LanguageConfig(adapters={"night": "/n.gguf"}))
    start = decode_model_start(encode_model_start(configured, bundle, encode_action_space(space)))
    assert start.config == configured and decode_action_space(start.space) == space
    assert start.bundle == msgspec.structs.replace(bundle, manifest=msgspec.structs.replace(manifest, source_sha256={}))
    assert start.files == {Path("/nowhere/vision.onnx"): adapter, Path("/n.gguf"): adapter}


def test_a_message_that_is_too_long_is_an_error_of_the_configuration():
    long = config(task=TaskConfig(action_space="x" * 200_000))
    with pytest.raises(ConfigError, match=r"expected at most 98304 bytes in all; found task\.action_space 1"):
        encode_model_start(long, FAKE_BUNDLE, b"x")
